//! Content of a snapshot besides its pages: read on request, checked, and returned.

use std::cmp::Reverse;
use std::io;
use std::sync::OnceLock;

use zstd::zstd_safe;

use super::{Dictionary, Prepared, Snapshot, get_or_try};
use crate::error::{Defect, Flaw, Part, ReadError};
use crate::index::{Page, Top};
use crate::layout::{self, PAGES_PER_BLOCK_U64, SectionKind};
use crate::sections::{self, Blob, Section};
use crate::store::Reason;
use crate::types::{Attachment, DictionaryInfo, FillRun, WorkingSet, WorkingSetRun};

/// Number of bytes of a blob that are in memory at a time.
const PIECE: usize = 64 << 10;

impl Snapshot {
    /// Reads everything that decoding would otherwise read on first use: all dictionaries.
    pub fn prepare(&self) -> Result<(), ReadError> {
        for dictionary in self.dictionary_table()? {
            self.prepared(dictionary)?;
        }
        Ok(())
    }

    /// Returns the longest runs of pages that all repeat one word, longest first, verified against
    /// the index. A caller that leaves them to the kernel need not look at any of their pages
    /// again.
    ///
    /// Reads the index blocks that runs begin or end in. If such a block is damaged, its pages are
    /// left out of the run.
    pub fn fill_runs(&self) -> Result<Vec<FillRun>, ReadError> {
        let kind = SectionKind::FillRuns;
        let Some((section, bytes)) = self.optional_section(kind)? else {
            return Ok(Vec::new());
        };
        let runs = sections::fill_runs(&bytes, section, &self.regions)
            .map_err(|flaw| self.damaged(Part::Section(kind), flaw))?;
        let mut good = Vec::with_capacity(runs.len());
        for (number, run) in runs.into_iter().enumerate() {
            let at = section.offset + (number * size_of::<layout::RawFillRun>()) as u64;
            let run = self.check_against_index(number, run, at)?;
            good.extend((run.pages > 0).then_some(run));
        }
        good.sort_by_key(|run| Reverse(run.pages));
        Ok(good)
    }

    /// Returns the part of fill run `number` whose index blocks are intact, or an error if one of
    /// its pages is not a fill. Whole blocks must be fills of the top table, which is in memory.
    fn check_against_index(
        &self,
        number: usize,
        run: FillRun,
        at: u64,
    ) -> Result<FillRun, ReadError> {
        // The reader of the section has verified that the run ends within a region.
        let (mut first, mut end) = (run.first_page, run.first_page + run.pages);
        for block in first / PAGES_PER_BLOCK_U64..end.div_ceil(PAGES_PER_BLOCK_U64) {
            let block_first = block * PAGES_PER_BLOCK_U64;
            let block_end = block_first + PAGES_PER_BLOCK_U64;
            let mut pages =
                run.first_page.max(block_first)..block_end.min(run.first_page + run.pages);
            let wrong = match self.top(block) {
                Top::Fill(word) if word == run.word => continue,
                Top::Block if pages.end - pages.start < PAGES_PER_BLOCK_U64 => {
                    match self.index_block(block, Reason::Open) {
                        Ok(index) => pages.find(|page| {
                            // The difference is below 512.
                            let i = usize::try_from(page - block_first).unwrap_or(usize::MAX);
                            index.page(i) != Page::Fill(run.word)
                        }),
                        Err(error) if error.is_damage() => {
                            if first >= block_first {
                                first = block_end.min(end);
                            } else {
                                end = block_first;
                            }
                            None
                        }
                        Err(error) => return Err(error),
                    }
                }
                Top::Fill(_) | Top::Block | Top::Unavailable => Some(pages.start),
            };
            if let Some(page) = wrong {
                let detail = format!(
                    "page {page} of run {number} is not a fill of {:#x} in the index",
                    run.word
                );
                let defect = Defect::Text {
                    field: "fill run",
                    detail: detail.into(),
                };
                let part = Part::Section(SectionKind::FillRuns);
                return Err(self.damaged(part, Flaw::new(at, defect)));
            }
        }
        Ok(FillRun {
            first_page: first,
            pages: end - first,
            word: run.word,
        })
    }

    /// Returns the writer's properties, which describe how the file was created, sorted by key.
    pub fn properties(&self) -> Result<Vec<(String, String)>, ReadError> {
        let kind = SectionKind::Properties;
        let Some((section, bytes)) = self.optional_section(kind)? else {
            return Ok(Vec::new());
        };
        sections::properties(&bytes, section)
            .map_err(|flaw| self.damaged(Part::Section(kind), flaw))
    }

    /// Returns the dictionaries that frames may name.
    pub fn dictionaries(&self) -> Result<Vec<DictionaryInfo>, ReadError> {
        Ok(self
            .dictionary_table()?
            .iter()
            .map(|dictionary| DictionaryInfo {
                // `sections::blobs` has checked that the number fits.
                number: u16::try_from(dictionary.blob.tag).unwrap_or(0),
                bytes: dictionary.blob.len,
            })
            .collect())
    }

    /// Returns the working sets, in the order of the file.
    pub fn working_sets(&self) -> Result<Vec<WorkingSet>, ReadError> {
        let run = size_of::<layout::RawWorkingSetRun>() as u64;
        let blobs = self.blobs(SectionKind::WorkingSets)?;
        Ok(blobs
            .into_iter()
            .map(|blob| WorkingSet {
                name: blob.name,
                runs: blob.len / run,
            })
            .collect())
    }

    /// Returns the runs of the working set called `name`, in order of first touch.
    pub fn working_set(&self, name: &str) -> Result<Vec<WorkingSetRun>, ReadError> {
        let blob = self.named_blob(SectionKind::WorkingSets, Part::WorkingSet, name)?;
        self.working_set_runs(&blob)
    }

    pub(crate) fn working_set_runs(&self, blob: &Blob) -> Result<Vec<WorkingSetRun>, ReadError> {
        let bytes = self.read_checked(Part::WorkingSet, blob.offset, blob.len, blob.crc)?;
        sections::working_set(&bytes, blob.offset, self.page_slots())
            .map_err(|flaw| self.damaged(Part::WorkingSet, flaw))
    }

    /// Returns the attachments, in the order of the file.
    pub fn attachments(&self) -> Result<Vec<Attachment>, ReadError> {
        let blobs = self.blobs(SectionKind::Attachments)?;
        Ok(blobs
            .into_iter()
            .map(|blob| Attachment {
                name: blob.name,
                bytes: blob.len,
            })
            .collect())
    }

    /// Writes the attachment called `name` to `out`, and returns its length.
    ///
    /// The attachment is read twice: nothing is written before its checksum was verified. If the
    /// file changes between the two reads, that is an error after the last byte.
    pub fn read_attachment(&self, name: &str, mut out: impl io::Write) -> Result<u64, ReadError> {
        let blob = self.named_blob(SectionKind::Attachments, Part::Attachment, name)?;
        self.check_blob(Part::Attachment, &blob, Reason::Open, |_| {
            Ok::<_, ReadError>(())
        })?;
        self.check_blob(Part::Attachment, &blob, Reason::Open, |bytes| {
            out.write_all(bytes).map_err(|source| ReadError::Output {
                file: self.name.clone(),
                part: Part::Attachment,
                name: name.to_owned(),
                source,
            })
        })?;
        Ok(blob.len)
    }

    /// Returns the content of the attachment called `name`, if it is no longer than `limit` bytes.
    pub fn attachment_bytes(&self, name: &str, limit: u64) -> Result<Vec<u8>, ReadError> {
        let blob = self.named_blob(SectionKind::Attachments, Part::Attachment, name)?;
        if blob.len > limit {
            let defect = Defect::TooLarge {
                field: "length of the attachment",
                value: blob.len,
                limit,
            };
            return Err(self.damaged(Part::Attachment, Flaw::new(blob.offset, defect)));
        }
        self.read_checked(Part::Attachment, blob.offset, blob.len, blob.crc)
    }
}

/// Accessors for the decoder and the verifier.
impl Snapshot {
    /// Returns the prepared dictionary for the number that a frame names.
    pub(crate) fn dictionary(&self, number: u16) -> Result<&zstd_safe::DDict<'static>, ReadError> {
        let known = self
            .dictionary_table()?
            .iter()
            .find(|dictionary| dictionary.blob.tag == u32::from(number));
        if let Some(dictionary) = known {
            return Ok(&self.prepared(dictionary)?.digested);
        }
        let section = self.directory().get(SectionKind::Dictionaries);
        let what = format!("dictionary {number}").into();
        let flaw = Flaw::new(
            section.map_or(0, |section| section.offset),
            Defect::Missing { what },
        );
        Err(self.damaged(Part::Section(SectionKind::Dictionaries), flaw))
    }

    /// Returns the first `most` dictionaries, with their numbers.
    pub(crate) fn dictionary_bytes(&self, most: usize) -> Result<Vec<(u16, &[u8])>, ReadError> {
        let table = self.dictionary_table()?.iter().take(most);
        let read = table.filter_map(|dictionary| {
            // No frame can name a larger number.
            let number = u16::try_from(dictionary.blob.tag).ok()?;
            let prepared = self.prepared(dictionary);
            Some(prepared.map(|prepared| (number, &prepared.bytes[..])))
        });
        read.collect()
    }

    fn dictionary_table(&self) -> Result<&[Dictionary], ReadError> {
        let table = get_or_try(&self.dictionaries, || {
            let blobs = self.blobs(SectionKind::Dictionaries)?;
            Ok(blobs
                .into_iter()
                .map(|blob| Dictionary {
                    blob,
                    prepared: OnceLock::new(),
                })
                .collect())
        })?;
        Ok(table)
    }

    fn prepared<'a>(&self, dictionary: &'a Dictionary) -> Result<&'a Prepared, ReadError> {
        get_or_try(&dictionary.prepared, || {
            let blob = &dictionary.blob;
            let bytes = self.read_checked(Part::Dictionary, blob.offset, blob.len, blob.crc)?;
            let digested = zstd_safe::DDict::try_create(&bytes).ok_or_else(|| {
                let reason = "not a dictionary".into();
                self.damaged(
                    Part::Dictionary,
                    Flaw::new(blob.offset, Defect::Decode { reason }),
                )
            })?;
            Ok(Prepared { digested, bytes })
        })
    }

    pub(crate) fn blobs(&self, kind: SectionKind) -> Result<Vec<Blob>, ReadError> {
        let Some((section, bytes)) = self.optional_section(kind)? else {
            return Ok(Vec::new());
        };
        sections::blobs(&bytes, section, kind, self.ends.body)
            .map_err(|flaw| self.damaged(Part::Section(kind), flaw))
    }

    fn named_blob(&self, kind: SectionKind, part: Part, name: &str) -> Result<Blob, ReadError> {
        let blob = self.blobs(kind)?.into_iter().find(|blob| blob.name == name);
        blob.ok_or_else(|| ReadError::NoSuchName {
            file: self.name.clone(),
            part,
            name: name.to_owned(),
        })
    }

    /// Reads a blob piece by piece, passes the pieces on, and returns an error at the end if its
    /// checksum is wrong.
    pub(crate) fn check_blob<E: From<ReadError>>(
        &self,
        part: Part,
        blob: &Blob,
        reason: Reason,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut hasher = crc32fast::Hasher::new();
        let mut piece = vec![0; usize::try_from(blob.len).map_or(PIECE, |len| len.min(PIECE))];
        let mut done = 0;
        while done < blob.len {
            let len = usize::try_from(blob.len - done).map_or(PIECE, |left| left.min(PIECE));
            let piece = &mut piece[..len];
            self.read(part, piece, blob.offset + done, reason)?;
            hasher.update(piece);
            each(piece)?;
            done += len as u64;
        }
        Ok(self.check_crc(part, blob.offset, blob.crc, hasher.finalize())?)
    }

    /// Reads a section piece by piece, only to check it.
    pub(crate) fn check_section(&self, section: &Section, part: Part) -> Result<(), ReadError> {
        let blob = Blob {
            offset: section.offset,
            len: section.len,
            crc: section.crc,
            tag: 0,
            name: String::new(),
        };
        self.check_blob(part, &blob, Reason::Verify, |_| Ok(()))
    }

    fn optional_section(
        &self,
        kind: SectionKind,
    ) -> Result<Option<(&Section, Vec<u8>)>, ReadError> {
        let Some(section) = self.directory().get(kind) else {
            return Ok(None);
        };
        let bytes = self.read_section(section, Part::Section(kind))?;
        Ok(Some((section, bytes)))
    }
}
