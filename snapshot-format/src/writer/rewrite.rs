//! Snapshots that are made of other snapshots: flattened chains, children with another base, and
//! files with another order.

use std::io::Write;
use std::sync::Arc;

use super::block::Alike;
use super::copy::{CopySource, RewriteMode, Wanted};
use super::sections::{self, BlobWriter};
use super::{Dictionary, ProgressCallback, QueueEntry, WriteError, Writer, WriterOptions, Written};
use crate::error::{Defect, Flaw, Part, ReadError};
use crate::index::Top;
use crate::layout::{
    MAX_BLOBS, MAX_FRAME_SLOTS, MAX_SECTION_BYTES, PAGE_SIZE_U64, PAGES_PER_BLOCK_U64, SectionKind,
    TRAILER_BYTES, region_flags,
};
use crate::sections::Blob;
use crate::snapshot::Snapshot;
use crate::store::Reason;
use crate::types::{Region, SnapshotId, WorkingSetRun};

/// Options of [`flatten`], [`rebase`] and [`optimize`].
pub struct RewriteOptions {
    /// The zstd level of frames that are repacked.
    pub level: i32,
    /// Threads that decode, hash and compress. By default one for each processor, at most 8.
    pub threads: Option<usize>,
    /// The new snapshot's id; random by default.
    pub snapshot_id: Option<SnapshotId>,
    /// Properties to record, besides those of the snapshot.
    pub properties: Vec<(String, String)>,
    /// Callback as of [`Writer::on_progress`].
    pub progress: Option<ProgressCallback>,
}

impl Default for RewriteOptions {
    fn default() -> Self {
        Self {
            level: WriterOptions::default().level,
            threads: None,
            snapshot_id: None,
            properties: Vec::new(),
            progress: None,
        }
    }
}

impl std::fmt::Debug for RewriteOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RewriteOptions")
            .field("level", &self.level)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

/// Options of [`optimize`].
#[derive(Debug)]
pub struct OptimizeOptions {
    /// Name of the working set. One of this name is replaced.
    pub name: String,
    /// Options for packing.
    pub rewrite: RewriteOptions,
}

/// Name of the working set of [`OptimizeOptions::default`].
pub const DEFAULT_WORKING_SET: &str = "default";

impl Default for OptimizeOptions {
    fn default() -> Self {
        Self {
            name: DEFAULT_WORKING_SET.into(),
            rewrite: RewriteOptions::default(),
        }
    }
}

/// Result of [`optimize`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Optimized {
    /// The new snapshot.
    pub rewritten: Rewritten,
    /// Its working set.
    pub working_set: WorkingSetStats,
}

/// Counts of the working set at the front of an optimized file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkingSetStats {
    /// Pages of the set.
    pub pages: u64,
    /// Pages of it that no frame stores: fills, and unavailable pages.
    pub not_stored_pages: u64,
    /// Pages of it that stay in frames of ancestors, because these are dense.
    pub left_in_ancestors: u64,
    /// Pages of it that lay in frames of ancestors, and are now stored in the new file.
    pub from_ancestors: u64,
    /// Pages that were given and that no region has, or that were given before.
    pub ignored_pages: u64,
    /// Frames of the set. They lie at the front of the file, in order of need.
    pub frames: u64,
    /// Length of these frames.
    pub stored_bytes: u64,
}

/// Result of [`flatten`] and [`rebase`].
#[derive(Clone, Debug)]
pub struct Rewritten {
    /// The new snapshot. Its digests are those of the old one.
    pub written: Written,
    /// Number of frames that were copied as they are.
    pub copied_frames: u64,
    /// Number of slots in copied frames that no page uses.
    pub dead_slots: u64,
}

/// Writes `snapshot`, which may be layered, as a snapshot in one file.
///
/// Frames of which at least half is in use are copied as they are, with a new page list; the others
/// are repacked, without the pages that the snapshot does not use. Regions, attachments,
/// working sets and properties are kept, except for properties about ancestors.
///
/// The checksum of every frame is verified. The content digest, which is computed from the recorded
/// digests of the blocks, and the state digest are those of `snapshot`, or the result is an error.
/// Copied frames are not decoded; [`verify`](crate::verify()) compares every page of the new file
/// with its digest.
///
/// Takes 250 bytes of memory for each frame, besides that of a [`Writer`].
pub fn flatten<W: Write>(
    out: W,
    snapshot: &Arc<Snapshot>,
    options: RewriteOptions,
) -> Result<(W, Rewritten), WriteError> {
    let (out, rewritten, _) = rewrite(out, snapshot, RewriteMode::Flatten, options)?;
    Ok((out, rewritten))
}

/// Writes `child`, a layered snapshot, as a child of `base`, which holds the same memory as its old
/// base: that base flattened, or packed with other options.
///
/// Frames of the child's own file are copied as by [`flatten`]. Pages that lay in files of old
/// ancestors are looked for in `base`, at the same place first. Where the digest of the block
/// proves that they are the same, the old ancestors are not read.
/// [`Layer::absent`](crate::Layer::absent) stands in for those that are missing. A page that `base`
/// does not have is stored in the new file.
///
/// Everything else is kept, and checked, as by [`flatten`]. Blocks that are not as in `base` are
/// decoded, and compared with their recorded digests.
pub fn rebase<W: Write>(
    out: W,
    child: &Arc<Snapshot>,
    base: &Arc<Snapshot>,
    options: RewriteOptions,
) -> Result<(W, Rewritten), WriteError> {
    if child.ancestors().is_empty() {
        return Err(WriteError::NotLayered {
            file: child.name().to_owned(),
        });
    }
    if base.layers().iter().any(|layer| layer.id() == child.id()) {
        return Err(WriteError::BaseOfItself {
            file: child.name().to_owned(),
            base: base.name().to_owned(),
        });
    }
    let old_base = check_base(child, base)?;
    let mode = RewriteMode::Rebase { base, old_base };
    let (out, rewritten, _) = rewrite(out, child, mode, options)?;
    Ok((out, rewritten))
}

/// Writes `snapshot` with the working set `pages`, in order of need, at the front of the file.
///
/// The pages of the working set lie in frames of their own, in this order; within a frame they are
/// sorted by page number, and the working set lists them in the order of the file. A restore reads
/// them with a few large reads. Everything else follows: frames without a page of the working set
/// as by [`flatten`], the rest of the others repacked. All index blocks lie together behind the
/// frames.
///
/// Other working sets are kept, and packed in the same way behind the first one. Attachments,
/// properties and dictionaries are kept, and the digests are checked, as by [`flatten`]. The caller
/// should [`verify`](crate::verify()) the new file, which decodes every page.
///
/// A layered snapshot stays a child of the same ancestors. Pages of the working set in a frame of
/// an ancestor of which at least half belongs to it stay there. Others are stored in the new file,
/// which grows by them.
///
/// Takes 120 bytes of memory for each page of the working sets, the index blocks of the file, and
/// 64 MiB, besides the memory of [`flatten`].
pub fn optimize<W: Write>(
    out: W,
    snapshot: &Arc<Snapshot>,
    pages: &[u64],
    options: OptimizeOptions,
) -> Result<(W, Optimized), WriteError> {
    let name = &options.name[..];
    let others = other_working_sets(snapshot, name)?;
    let wanted = Wanted::new(snapshot, pages, &others, frame_pages(snapshot));
    let mode = RewriteMode::Optimize { wanted, name };
    let (out, rewritten, stats) = rewrite(out, snapshot, mode, options.rewrite)?;
    let working_set = WorkingSetStats {
        ignored_pages: pages.len() as u64 - stats.pages,
        ..stats
    };
    let optimized = Optimized {
        rewritten,
        working_set,
    };
    Ok((out, optimized))
}

/// Returns the number of pages of a full frame.
fn frame_pages(snapshot: &Snapshot) -> usize {
    let pages = snapshot.summary().frame_bytes / PAGE_SIZE_U64;
    let pages = usize::try_from(pages).unwrap_or(MAX_FRAME_SLOTS);
    pages.clamp(1, MAX_FRAME_SLOTS)
}

fn rewrite<W: Write>(
    out: W,
    snapshot: &Arc<Snapshot>,
    mode: RewriteMode<'_>,
    options: RewriteOptions,
) -> Result<(W, Rewritten, WorkingSetStats), WriteError> {
    let properties = snapshot.properties().map_err(WriteError::Copied)?;
    let (base, set_name) = match mode {
        RewriteMode::Flatten => (None, None),
        RewriteMode::Rebase { base, .. } => (Some(base), None),
        // The ancestors stay.
        RewriteMode::Optimize { name, .. } => {
            let base = (!snapshot.ancestors().is_empty()).then_some(snapshot);
            (base, Some(name))
        }
    };
    // The writer records its own, and a new base is the caller's to name.
    let kept = properties.into_iter().filter(|(key, _)| {
        !["writer", "writer.level", "writer.frame_pages"].contains(&&key[..])
            && (set_name.is_some() || !["base.id", "base.path"].contains(&&key[..]))
            && !key.starts_with("ancestor.")
    });
    let writer_options = WriterOptions {
        level: options.level,
        frame_pages: frame_pages(snapshot),
        dictionary: Dictionary::Off,
        threads: options.threads,
        snapshot_id: options.snapshot_id,
        properties: kept.chain(options.properties).collect(),
        base: base.cloned(),
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(out, writer_options)?;
    writer.progress = options.progress;
    if set_name.is_some() {
        writer.stage.write_index_at_end();
    }
    let (copied_frames, runs, stats) = writer.copy_from(snapshot, mode)?;
    for attachment in snapshot.attachments().map_err(WriteError::Copied)? {
        writer.copy_attachment(snapshot, &attachment.name)?;
    }
    if let Some(name) = set_name {
        writer.add_working_set(name, runs)?;
    }
    writer.copy_working_sets(snapshot, set_name)?;
    let (out, written, dead_slots) = writer.finish_copy()?;
    let (old, new) = (snapshot.summary(), &written.summary);
    for (field, differs) in [
        ("content digest", old.content_digest != new.content_digest),
        ("state digest", old.state_digest != new.state_digest),
    ] {
        if differs {
            let at = snapshot.file_bytes() - TRAILER_BYTES as u64;
            let detail = "not that of what the file holds".into();
            let flaw = Flaw::new(at, Defect::Text { field, detail });
            let damaged = snapshot.own().damaged(Part::Trailer, flaw);
            return Err(WriteError::Copied(damaged));
        }
    }
    let rewritten = Rewritten {
        written,
        copied_frames,
        dead_slots,
    };
    Ok((out, rewritten, stats))
}

/// Reads the working sets of a snapshot, without that called `name`.
fn other_working_sets(
    snapshot: &Snapshot,
    name: &str,
) -> Result<Vec<Vec<WorkingSetRun>>, WriteError> {
    let sets = snapshot.working_sets().map_err(WriteError::Copied)?;
    let others = sets.iter().filter(|set| set.name != name);
    others
        .map(|set| snapshot.working_set(&set.name))
        .collect::<Result<_, _>>()
        .map_err(WriteError::Copied)
}

/// Compares a new base with the old base, if that is known and open. Returns the name of the old
/// base for messages.
fn check_base(child: &Snapshot, base: &Snapshot) -> Result<String, WriteError> {
    let properties = child.properties().map_err(WriteError::Copied)?;
    let known = properties.iter().find(|(key, _)| key == "base.id");
    let Some((_, id)) = known else {
        return Ok("its base".to_owned());
    };
    let old = child
        .ancestors()
        .iter()
        .find(|layer| layer.id().to_string() == *id);
    let Some(old) = old else {
        return Ok(id.clone());
    };
    if old.is_absent() {
        return Ok(old.name().to_owned());
    }
    if old.ends().summary.content_digest != base.summary().content_digest {
        return Err(WriteError::OtherContent {
            file: child.name().to_owned(),
            base: base.name().to_owned(),
            old_base: old.name().to_owned(),
        });
    }
    Ok(old.name().to_owned())
}

/// Copying from other snapshots.
impl<W: Write> Writer<W> {
    /// Adds the attachment `name` of another snapshot.
    pub fn copy_attachment(&mut self, from: &Snapshot, name: &str) -> Result<(), WriteError> {
        self.guarded(|writer| {
            sections::check_blob_name(
                "an attachment's name",
                "the number of attachments",
                name,
                &writer.attachments,
            )?;
            let (kind, part) = (SectionKind::Attachments, Part::Attachment);
            let blob = from.named_blob(kind, part, name);
            let blob = writer.copy_blob(from, part, &blob.map_err(WriteError::Copied)?)?;
            writer.attachments.push(blob);
            Ok(())
        })
    }

    /// Adds the working sets of another snapshot of the same pages, without that called `except`.
    fn copy_working_sets(
        &mut self,
        from: &Snapshot,
        except: Option<&str>,
    ) -> Result<(), WriteError> {
        self.guarded(|writer| {
            let blobs = from.own().blobs(SectionKind::WorkingSets);
            for blob in blobs.map_err(WriteError::Copied)? {
                if except == Some(&blob.name[..]) {
                    continue;
                }
                let before: u64 = writer.working_sets.iter().map(|set| set.len).sum();
                let bytes = before + blob.len;
                WriteError::limit("the size of all working sets", bytes, MAX_SECTION_BYTES)?;
                let count = writer.working_sets.len() as u64 + 1;
                WriteError::limit("the number of working sets", count, MAX_BLOBS as u64)?;
                // Page numbers are the same, so the bytes are, once they are checked.
                from.working_set_runs(&blob).map_err(WriteError::Copied)?;
                let blob = writer.copy_blob(from, Part::WorkingSet, &blob)?;
                writer.working_sets.push(blob);
            }
            Ok(())
        })
    }

    fn copy_blob(
        &mut self,
        from: &Snapshot,
        part: Part,
        blob: &Blob,
    ) -> Result<sections::Blob, WriteError> {
        self.settle()?;
        let mut copy = BlobWriter::new(&self.stage.out, &blob.name, 0);
        let what = match part {
            Part::Attachment => "an attachment",
            _ => "a working set",
        };
        from.own()
            .check_blob(part, blob, Reason::Prefetch, |bytes| {
                let written = copy.write(&mut self.stage.out, what, bytes);
                written.and_then(|()| self.report()).map_err(Copying::Write)
            })?;
        Ok(copy.finish())
    }

    /// Writes all memory of `snapshot`. Returns the number of frames that are copied as they are,
    /// and the runs and counts of the working set that comes first.
    fn copy_from(
        &mut self,
        snapshot: &Arc<Snapshot>,
        mode: RewriteMode<'_>,
    ) -> Result<(u64, Vec<WorkingSetRun>, WorkingSetStats), WriteError> {
        self.guarded(|writer| {
            let (base, workers) = (writer.base.as_ref(), &writer.stage.workers);
            let mut source = CopySource::plan(snapshot, base, mode, workers)?;
            let dictionaries = source.take_dictionaries();
            if let Some(first) = dictionaries.first() {
                writer.stage.workers.use_dictionary(first)?;
            }
            writer.stage.dictionaries = dictionaries;
            writer.copies = true;
            let stats = writer.write_hot(&mut source)?;
            let source = Arc::new(source);
            for region in snapshot.regions() {
                writer.copy_region(&source, region)?;
            }
            writer.end_region()?;
            Ok((source.copied_frames(), source.hot_runs(), stats))
        })
    }

    /// Writes the hot frames, if there are any, and returns the counts of the first set.
    fn write_hot(&mut self, source: &mut CopySource) -> Result<WorkingSetStats, WriteError> {
        let (of_first, all) = (source.first_hot_frames(), source.hot_frames());
        let mut bytes = 0;
        let mut written = 0;
        while written < all {
            let frames = source.gather_hot(written, self.stage.workers.pool())?;
            for frame in frames {
                if written == of_first {
                    self.stage.settle()?;
                    bytes = self.stage.summary.stored_bytes;
                }
                self.stage.push_hot(frame)?;
                written += 1;
            }
            self.report()?;
        }
        self.stage.settle()?;
        if of_first == all {
            bytes = self.stage.summary.stored_bytes;
        }
        Ok(WorkingSetStats {
            frames: of_first as u64,
            stored_bytes: bytes,
            ..source.count_hot_pages()
        })
    }

    fn copy_region(&mut self, source: &Arc<CopySource>, region: &Region) -> Result<(), WriteError> {
        self.end_region()?;
        sections::check_region_count(self.regions.len() + 1)?;
        self.region_bytes += sections::region_bytes(&region.name);
        WriteError::limit(
            "the size of the regions",
            self.region_bytes,
            MAX_SECTION_BYTES,
        )?;
        debug_assert_eq!(self.next_page, region.first_page);
        self.regions.push(Region {
            pages: 0,
            // Hints are for the reader of the file that they were written for.
            flags: region.flags & region_flags::KNOWN,
            ..region.clone()
        });
        self.extend_region(region.pages)?;
        let number = self.regions.len() - 1;
        let first = region.first_page / PAGES_PER_BLOCK_U64;
        let blocks = region.pages.div_ceil(PAGES_PER_BLOCK_U64);
        let top = |block| source.snapshot().top(first + block);
        let mut block = 0;
        while block < blocks {
            let kind = top(block);
            let alike = match kind {
                Top::Fill(word) => Alike::Fill(word),
                Top::Unavailable => Alike::Unavailable,
                Top::Block => {
                    let source = Arc::clone(source);
                    self.stage.workers.examine_copied(source, first + block);
                    let (region, buffer) = (number, None);
                    self.enqueue(QueueEntry::Block { region, buffer })?;
                    block += 1;
                    continue;
                }
            };
            let same = (block..blocks)
                .take_while(|next| top(*next) == kind)
                .count() as u64;
            let end = region.pages.min((block + same) * PAGES_PER_BLOCK_U64);
            self.enqueue(QueueEntry::Uniform {
                region: number,
                alike,
                blocks: usize::try_from(same).map_err(|_| WriteError::Stopped)?,
                pages: end - block * PAGES_PER_BLOCK_U64,
            })?;
            block += same;
        }
        Ok(())
    }

    fn finish_copy(mut self) -> Result<(W, Written, u64), WriteError> {
        let written = self.guarded(Self::write_end)?;
        let dead_slots = self.stage.dead_slots;
        Ok((self.stage.out.finish()?, written, dead_slots))
    }
}

/// An error of either side of a copy.
enum Copying {
    Read(ReadError),
    Write(WriteError),
}

impl From<ReadError> for Copying {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

impl From<Copying> for WriteError {
    fn from(error: Copying) -> Self {
        match error {
            Copying::Read(error) => Self::Copied(error),
            Copying::Write(error) => error,
        }
    }
}
