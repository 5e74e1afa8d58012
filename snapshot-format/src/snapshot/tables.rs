//! Content of a snapshot besides its pages: read on request, checked, and returned.

use std::cmp::Reverse;
use std::io;

use super::Snapshot;
use crate::error::{Defect, Flaw, Part, ReadError};
use crate::index::{Page, Top};
use crate::layout::{self, PAGES_PER_BLOCK_U64, SectionKind};
use crate::sections::{self, Blob};
use crate::store::Reason;
use crate::types::{Attachment, DictionaryInfo, FillRun, WorkingSet, WorkingSetRun};

impl Snapshot {
    /// Reads everything that decoding a frame of the snapshot's own file would otherwise read on
    /// first use: its dictionaries. A dictionary of an ancestor is read when the first frame that
    /// needs it is decoded, so that opening a long chain stays fast.
    pub fn prepare(&self) -> Result<(), ReadError> {
        self.own().prepare()
    }

    /// Returns the longest runs of pages that all repeat one word, longest first, verified against
    /// the index. A caller that leaves them to the kernel need not look at any of their pages
    /// again.
    ///
    /// Reads the index blocks that runs begin or end in. If such a block is damaged, its pages are
    /// left out of the run.
    pub fn fill_runs(&self) -> Result<Vec<FillRun>, ReadError> {
        let kind = SectionKind::FillRuns;
        let Some((section, bytes)) = self.own().optional_section(kind)? else {
            return Ok(Vec::new());
        };
        let runs = sections::fill_runs(&bytes, section, &self.regions)
            .map_err(|flaw| self.own().damaged(Part::Section(kind), flaw))?;
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
                return Err(self.own().damaged(part, Flaw::new(at, defect)));
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
        self.own().properties()
    }

    /// Returns the dictionaries of the snapshot's own file that frames may name.
    pub fn dictionaries(&self) -> Result<Vec<DictionaryInfo>, ReadError> {
        let lengths = self.own().dictionary_lengths()?.into_iter();
        Ok(lengths
            .map(|(number, bytes)| DictionaryInfo { number, bytes })
            .collect())
    }

    /// Returns the working sets, in the order of the file.
    pub fn working_sets(&self) -> Result<Vec<WorkingSet>, ReadError> {
        let run = size_of::<layout::RawWorkingSetRun>() as u64;
        let blobs = self.own().blobs(SectionKind::WorkingSets)?;
        Ok(blobs
            .into_iter()
            .map(|blob| WorkingSet {
                name: blob.name,
                runs: blob.len / run,
            })
            .collect())
    }

    /// Checks that there is a working set called `name`, without reading its runs.
    pub fn check_working_set(&self, name: &str) -> Result<(), ReadError> {
        self.named_blob(SectionKind::WorkingSets, Part::WorkingSet, name)
            .map(drop)
    }

    /// Returns the runs of the working set called `name`, in order of first touch.
    pub fn working_set(&self, name: &str) -> Result<Vec<WorkingSetRun>, ReadError> {
        let blob = self.named_blob(SectionKind::WorkingSets, Part::WorkingSet, name)?;
        self.working_set_runs(&blob)
    }

    pub(crate) fn working_set_runs(&self, blob: &Blob) -> Result<Vec<WorkingSetRun>, ReadError> {
        let bytes = self
            .own()
            .read_checked(Part::WorkingSet, blob.offset, blob.len, blob.crc)?;
        sections::working_set(&bytes, blob.offset, self.page_slots())
            .map_err(|flaw| self.own().damaged(Part::WorkingSet, flaw))
    }

    /// Returns the attachments, in the order of the file.
    pub fn attachments(&self) -> Result<Vec<Attachment>, ReadError> {
        let blobs = self.own().blobs(SectionKind::Attachments)?;
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
        self.own()
            .check_blob(Part::Attachment, &blob, Reason::Open, |_| {
                Ok::<_, ReadError>(())
            })?;
        self.own()
            .check_blob(Part::Attachment, &blob, Reason::Open, |bytes| {
                out.write_all(bytes).map_err(|source| ReadError::Output {
                    file: self.name().to_owned(),
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
            return Err(self
                .own()
                .damaged(Part::Attachment, Flaw::new(blob.offset, defect)));
        }
        self.own()
            .read_checked(Part::Attachment, blob.offset, blob.len, blob.crc)
    }
}

impl Snapshot {
    pub(crate) fn named_blob(
        &self,
        kind: SectionKind,
        part: Part,
        name: &str,
    ) -> Result<Blob, ReadError> {
        let mut blobs = self.own().blobs(kind)?;
        match blobs.iter().position(|blob| blob.name == name) {
            Some(at) => Ok(blobs.swap_remove(at)),
            None => Err(ReadError::NoSuchName {
                file: self.name().to_owned(),
                part,
                name: name.to_owned(),
                names: blobs.into_iter().map(|blob| blob.name).collect(),
            }),
        }
    }
}
