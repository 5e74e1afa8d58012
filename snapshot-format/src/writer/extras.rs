//! The writer's methods for everything besides pages, and for finishing the snapshot.
//!
//! Anything that exceeds a limit of the format is refused by the call that adds it. No error is
//! deferred to the end, after minutes of writing pages.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use zerocopy::IntoBytes;

use super::sections::{self, BlobWriter, Sections};
use super::workers::DICTIONARY_NUMBER;
use super::{WriteError, Writer, Written};
use crate::digest::{self, ContentHasher};
use crate::layout::{
    self, MAX_PROPERTIES_BYTES, MAX_SECTION_BYTES, PAGES_PER_BLOCK_U64, SectionKind, optional,
    required,
};
use crate::types::WorkingSetRun;

/// The properties, and the length of their section.
#[derive(Default)]
pub(super) struct Properties {
    all: BTreeMap<String, String>,
    bytes: u64,
}

impl Properties {
    /// Records a property, replacing an earlier one of the same key.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), WriteError> {
        sections::check_property(key, value)?;
        let line = |key: &str, value: &str| (key.len() + value.len() + "=\n".len()) as u64;
        let before = self.all.get(key).map_or(0, |before| line(key, before));
        let bytes = self.bytes - before + line(key, value);
        WriteError::limit("the size of the properties", bytes, MAX_PROPERTIES_BYTES)?;
        self.bytes = bytes;
        self.all.insert(key.to_owned(), value.to_owned());
        Ok(())
    }

    fn count(&self) -> u64 {
        self.all.len() as u64
    }

    /// Returns the section's text.
    fn text(&self) -> String {
        let mut text = String::new();
        for (key, value) in &self.all {
            text.extend([key, "=", value, "\n"]);
        }
        debug_assert_eq!(text.len() as u64, self.bytes);
        text
    }
}

impl<W: Write> Writer<W> {
    /// Adds the blob `name` with the bytes that `from` yields.
    pub fn attach(&mut self, name: &str, from: &mut dyn Read) -> Result<(), WriteError> {
        self.guarded(|writer| {
            sections::check_blob_name(
                "an attachment's name",
                "the number of attachments",
                name,
                &writer.attachments,
            )?;
            writer.settle()?;
            let mut blob = BlobWriter::new(&writer.stage.out, name, 0);
            let mut buffer = vec![0; 64 << 10];
            loop {
                match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(len) => {
                        blob.write(&mut writer.stage.out, "an attachment", &buffer[..len])?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(source) => {
                        return Err(WriteError::Attachment {
                            name: name.to_owned(),
                            source,
                        });
                    }
                }
                writer.report()?;
            }
            writer.attachments.push(blob.finish());
            Ok(())
        })
    }

    /// Adds the working set `name`. The runs are page numbers in order of first touch, each within
    /// a region and among the pages that are already written, and together at most as many pages as
    /// those.
    pub fn add_working_set(
        &mut self,
        name: &str,
        runs: impl IntoIterator<Item = WorkingSetRun>,
    ) -> Result<(), WriteError> {
        self.guarded(|writer| {
            sections::check_blob_name(
                "a working set's name",
                "the number of working sets",
                name,
                &writer.working_sets,
            )?;
            writer.settle()?;
            let mut blob = BlobWriter::new(&writer.stage.out, name, 0);
            let before: u64 = writer.working_sets.iter().map(|set| set.len).sum();
            let slots = writer.regions.last().map_or(0, |last| {
                (last.first_page + last.pages).next_multiple_of(PAGES_PER_BLOCK_U64)
            });
            let mut pages = 0;
            for run in runs {
                if !writer.has_pages(&run) {
                    return Err(WriteError::argument(
                        "a working set's run",
                        format_args!("{} pages from page {}", run.pages, run.first_page),
                        "1 page or more of one region, written before",
                    ));
                }
                let raw = layout::RawWorkingSetRun {
                    first_page: run.first_page.into(),
                    pages: run.pages.into(),
                };
                pages += run.pages;
                WriteError::limit("the number of pages of a working set", pages, slots)?;
                blob.write(&mut writer.stage.out, "a working set", raw.as_bytes())?;
                let bytes = before + blob.len();
                WriteError::limit("the size of all working sets", bytes, MAX_SECTION_BYTES)?;
            }
            writer.working_sets.push(blob.finish());
            Ok(())
        })
    }

    /// Returns whether all pages of `run` belong to one region.
    fn has_pages(&self, run: &WorkingSetRun) -> bool {
        let after = self
            .regions
            .partition_point(|region| region.first_page <= run.first_page);
        let region = after
            .checked_sub(1)
            .map(|index| self.regions[index].page_numbers());
        let end = run.first_page.checked_add(run.pages);
        run.pages > 0
            && region
                .zip(end)
                .is_some_and(|(region, end)| end <= region.end)
    }

    /// Records a property, replacing an earlier one of the same key.
    pub fn set_property(&mut self, key: &str, value: &str) -> Result<(), WriteError> {
        self.guarded(|writer| writer.properties.set(key, value))
    }

    /// Writes the rest of the file and completes it. Without this call the file is incomplete and
    /// readers refuse it.
    pub fn finish(mut self) -> Result<(W, Written), WriteError> {
        let written = self.guarded(Self::write_end)?;
        Ok((self.stage.out.finish()?, written))
    }

    pub(super) fn write_end(&mut self) -> Result<Written, WriteError> {
        self.end_region()?;
        self.settle()?;
        self.stage.finish()?;
        self.report()?;
        let stage = &mut self.stage;
        let out = &mut stage.out;
        let mut dictionaries = Vec::new();
        for (number, bytes) in (u32::from(DICTIONARY_NUMBER)..).zip(&stage.dictionaries) {
            let mut blob = BlobWriter::new(out, "", number);
            blob.write(out, "the dictionary", bytes)?;
            dictionaries.push(blob.finish());
            self.optional_features |= optional::DICTIONARIES;
        }
        let mut content = ContentHasher::new();
        stage
            .digests
            .iter()
            .for_each(|digest| content.block(digest));
        stage.summary.content_digest = content.finish(
            self.regions
                .iter()
                .map(|region| (region.space, region.start, region.pages)),
        );
        let attachments: Vec<_> = self
            .attachments
            .iter()
            .map(|blob| (&blob.name[..], blob.digest))
            .collect();
        stage.summary.state_digest =
            digest::state(&stage.summary.content_digest, &self.regions, &attachments);

        let mut sections = Sections::default();
        let runs = std::mem::take(&mut stage.runs).finish();
        sections.write(
            out,
            SectionKind::BlockDigests,
            stage.digests.len() as u64,
            &[stage.digests.as_bytes()],
        )?;
        sections.write(
            out,
            SectionKind::FillRuns,
            runs.len() as u64,
            &[runs.as_bytes()],
        )?;
        sections.write_blobs(out, SectionKind::Dictionaries, &dictionaries)?;
        sections.write_blobs(out, SectionKind::WorkingSets, &self.working_sets)?;
        sections.write_blobs(out, SectionKind::Attachments, &self.attachments)?;
        let (ancestors, names) = stage.layers.records();
        let mut required_features = 0;
        if !ancestors.is_empty() {
            required_features |= required::ANCESTORS;
            let (kind, count) = (SectionKind::Ancestors, ancestors.len() as u64);
            sections.write(out, kind, count, &[ancestors.as_bytes()])?;
        }
        for (key, name) in &names {
            self.properties.set(key, name)?;
        }
        let properties = self.properties.text();
        sections.write(
            out,
            SectionKind::Properties,
            self.properties.count(),
            &[properties.as_bytes()],
        )?;
        // The sections that a reader needs for opening come last, so that one read of the tail
        // brings them.
        sections.write_regions(out, &self.regions)?;
        sections.write(
            out,
            SectionKind::Top,
            stage.top.len() as u64,
            &[stage.top.as_bytes()],
        )?;
        let features = [required_features, self.optional_features];
        let file_bytes = sections.finish(out, self.id, features, &stage.summary)?;
        Ok(Written {
            id: self.id,
            summary: stage.summary,
            file_bytes,
            regions: std::mem::take(&mut self.regions),
            ancestor_pages: stage.ancestor_pages,
            dictionary_bytes: dictionaries.iter().map(|blob| blob.len).sum(),
        })
    }
}
