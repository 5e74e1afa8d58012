//! `snaprestore create`: packs memory into a snapshot.

mod rewrite;

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use indicatif::BinaryBytes;
use serde::Serialize;
use snapshot_format::layout::{
    MAX_ANCESTORS, MAX_BLOBS, MAX_DICTIONARY_BYTES, MAX_NAME_BYTES, PAGE_SIZE, PAGE_SIZE_U64,
};
use snapshot_format::{
    Dictionary, FileStore, RegionSpec, Snapshot, WriteError, Writer, WriterOptions, Written,
    dictionary,
};

use snaprestore_uffd::memory::Mapping;

use super::flatten::RewriteFacts;
use super::optimize::WorkingSetFacts;
use super::trace;
use crate::args::{self, Holes};
use crate::counterparts::{Counterpart, Counterparts};
use crate::exit::{Exit, Refusal};
use crate::facts::Facts;
use crate::layers;
use crate::names;
use crate::output::{Output, count};
use crate::progress::Progress;
use crate::signals::Cancel;
use crate::source::{self, Change, MERGE_A_DIFF, Region, Remark, Sampling, Sink, Source, Stamp};
use crate::target::{self, Target};

/// Minimum size of the samples on which a dictionary is trained and tried. With large frames it is
/// four frames, because fewer give no meaningful result.
const SAMPLE_BYTES: usize = 8 << 20;

/// Memory that writing takes with default options, including the stacks of its threads.
const MEMORY_BYTES: u64 = 192 << 20;

/// Report about the written snapshot.
#[derive(Serialize)]
pub(crate) struct CreateReport {
    #[serde(flatten)]
    pub(crate) facts: Facts,
    /// The base, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) base: Option<BaseFacts>,
    /// The number of files that the snapshot would have needed, if it was flattened for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) flattened: Option<Flattened>,
    /// The working set at the front of the file, if there were traces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) working_set: Option<WorkingSetFacts>,
    /// Ways in which the source may have been read differently than intended.
    pub(crate) remarks: Vec<Remark>,
    /// Time for which a process was stopped, until its memory was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) held_ms: Option<u64>,
    pub(crate) elapsed_ms: u64,
}

/// The base of a new snapshot.
#[derive(Serialize)]
pub(crate) struct BaseFacts {
    file: String,
    snapshot_id: String,
    /// Number of pages taken from it and its ancestors.
    pages: u64,
}

/// A child that was flattened because its chain was too long.
#[derive(Serialize)]
pub(crate) struct Flattened {
    /// Number of files that the child would have needed.
    ancestors: usize,
    /// The number that it may need.
    limit: u16,
    /// The frames of the file, unless it was written again in the order of traces.
    #[serde(flatten)]
    rewrite: Option<RewriteFacts>,
}

impl fmt::Display for CreateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.facts)?;
        if let Some(base) = &self.base {
            let (file, pages) = (names::shown(&base.file), count(base.pages, "page"));
            let id = &base.snapshot_id;
            let what = match &self.flattened {
                Some(_) => "copied",
                None => "taken",
            };
            writeln!(
                f,
                "base        {file} ({id}): {pages} {what} from it and its ancestors"
            )?;
        }
        if let Some(flattened) = &self.flattened {
            let (ancestors, limit) = (count(flattened.ancestors as u64, "file"), flattened.limit);
            writeln!(
                f,
                "flattened   needs no other file; would have needed {ancestors}, more than {limit}"
            )?;
            if let Some(rewrite) = &flattened.rewrite {
                write!(f, "{rewrite}")?;
            }
        }
        if let Some(set) = &self.working_set {
            write!(f, "{set}")?;
        }
        for remark in &self.remarks {
            write!(f, "{remark}")?;
        }
        write!(f, "time        {} ms", self.elapsed_ms)?;
        match self.held_ms {
            Some(held) => writeln!(f, ", the process was held for {held} ms"),
            None => writeln!(f),
        }
    }
}

/// Settings for writing a snapshot, checked and with their files opened.
pub(crate) struct WriteSettings {
    pub(crate) level: i32,
    pub(crate) frame_bytes: usize,
    pub(crate) dictionary: DictionaryChoice,
    pub(crate) threads: Option<usize>,
    pub(crate) attachments: Vec<Attachment>,
    pub(crate) base: Option<Arc<Snapshot>>,
    /// Names of attachments of the base.
    pub(crate) inherited: Vec<String>,
}

/// A file to store beside the memory.
pub(crate) struct Attachment {
    name: String,
    file: File,
    at_opening: Stamp,
}

/// Choice of dictionary.
pub(crate) enum DictionaryChoice {
    Trained,
    Off,
    Given(Vec<u8>),
}

/// Checks that the process's memory limit leaves room for writing: if an allocation fails later,
/// the process aborts.
fn check_memory() -> Result<()> {
    Mapping::new(MEMORY_BYTES).with_context(|| {
        format!(
            "writing a snapshot takes {} MiB of memory",
            MEMORY_BYTES >> 20
        )
    })?;
    Ok(())
}

#[expect(
    clippy::too_many_lines,
    reason = "one step after the other, in the order of their checks"
)]
pub(crate) fn run(args: &args::Create, output: Output, cancel: &Cancel) -> Result<Exit> {
    let began = Instant::now();
    let to_stdout = target::is_stdout_without_json(&args.output, output)?;
    let attached = args.attach.iter().map(|attachment| &attachment.path);
    let dictionary = match &args.dictionary {
        args::Dictionary::File(path) => Some(path),
        _ => None,
    };
    let read = args.source.iter().chain(attached).chain(dictionary);
    for source in read.chain(&args.base).chain(&args.traces) {
        target::refuse_source(&args.output, source)?;
    }
    let traces = trace::read_all(&args.traces, cancel)?;
    // Reports all errors in options and target before a process is stopped.
    let settings = WriteSettings::new(args)?;
    if let Some(base) = &settings.base {
        layers::refuse_ancestor(&args.output, base)?;
        if base.ancestors().len() >= MAX_ANCESTORS {
            let text = format!(
                "{}: has {MAX_ANCESTORS} ancestors, as many as a snapshot may have; make a flat \
                 base of it first, with `snaprestore flatten`",
                base.name()
            );
            return Err(Refusal::Usage(text).into());
        }
    }
    layers::refuse_needed(&args.output, &args.layers)?;
    check_memory()?;
    let target = create_target(args, cancel)?;
    let mut source = source::open(args, output, cancel)?;
    if let Some(page_slots) = source.page_slots() {
        rewrite::check_size(args, &traces, page_slots)?;
    }
    if args.holes.is_none() && args.base.is_none() && source.is_mostly_holes() {
        settings.refuse_diff(args.source.as_deref())?;
    }
    let progress = Progress::bytes(
        output,
        "packing",
        source.pages().map(|pages| pages * PAGE_SIZE_U64),
    );
    let mut writer = settings
        .start(target, &mut *source, progress, cancel)
        .map_err(|error| target::named(error, &args.output))?;
    source
        .feed(&mut writer)
        .map_err(|error| target::named(error, &args.output))?;
    let mut remarks = source.remarks();
    let held = source.held().map(|held| held.as_millis());
    let held_ms = held.map(u64::try_from).transpose()?;
    drop(source);
    let changed = writer
        .attach(settings.attachments, &settings.inherited)
        .map_err(|error| target::named(error, &args.output))?;
    remarks.extend(changed);
    remarks.extend(writer.base_remark());
    let damaged = writer.damage_remark();
    remarks.extend(damaged.map_err(|error| target::named(error, &args.output))?);
    for remark in remarks.iter().filter(|remark| remark.warning) {
        output.warn(format_args!("warning: {}", remark.text));
    }
    let (target, written) = writer
        .finish(&remarks)
        .map_err(|error| target::named(error, &args.output))?;
    let taken_pages = written.ancestor_pages;
    let (target, written, flattened) = match args.flatten_after.zip(settings.base.as_deref()) {
        Some((limit, base)) => {
            rewrite::flatten_beyond(limit, args, base, (target, written), (output, cancel))
                .map_err(|error| target::named(error, &args.output))?
        }
        None => (target, written, None),
    };
    let (mut target, written, working_set) = if traces.is_empty() {
        (target, written, None)
    } else {
        let base = settings.base.as_deref();
        let (target, written, set, remark) =
            rewrite::optimize_written(args, traces, base, target, (output, cancel))
                .map_err(|error| target::named(error, &args.output))?;
        remarks.extend(remark);
        (target, written, Some(set))
    };
    if let (None, Some((path, base))) = (
        &flattened,
        args.base.as_deref().zip(settings.base.as_deref()),
    ) {
        layers::check_unchanged(path, base)?;
    }
    // Not a property: the files may be moved.
    remarks.extend(layers::remark_away(&mut target, &args.output)?);
    target.complete()?;
    let facts = Facts::of_written(&written);
    let base = args.base.as_deref().zip(settings.base);
    let report = CreateReport {
        base: base.map(|(path, base)| BaseFacts {
            file: names::exact(path),
            snapshot_id: base.id().to_string(),
            pages: taken_pages,
        }),
        facts,
        flattened,
        working_set,
        remarks,
        held_ms,
        elapsed_ms: u64::try_from(began.elapsed().as_millis())?,
    };
    output.report_beside(to_stdout, &report)?;
    Ok(Exit::Done)
}

/// Creates the output. Options that write it twice need a file.
fn create_target(args: &args::Create, cancel: &Cancel) -> Result<Target> {
    let target = Target::create(&args.output, args.force, cancel)?;
    if args.flatten_after.is_some() && !target.is_file() {
        let text = "--flatten-after needs a file as its output, as it may have to be written twice";
        return Err(Refusal::Usage(text.into()).into());
    }
    if !args.traces.is_empty() && !target.is_file() {
        let text = "--trace needs a file as its output, as it is written twice";
        return Err(Refusal::Usage(text.into()).into());
    }
    Ok(target)
}

impl WriteSettings {
    fn new(args: &args::Create) -> Result<Self> {
        if args.attach.len() > MAX_BLOBS {
            return Err(Refusal::Usage(format!(
                "there are {} attachments; a snapshot has at most {MAX_BLOBS}",
                args.attach.len()
            ))
            .into());
        }
        let mut used = HashSet::new();
        let mut attachments = Vec::new();
        for attachment in &args.attach {
            if !used.insert(&attachment.name) {
                return Err(Refusal::Usage(format!(
                    "two attachments are named {:?}; each needs a name of its own",
                    attachment.name
                ))
                .into());
            }
            let named = || format!("{}: opening the attachment", names::path(&attachment.path));
            let store = FileStore::open(&attachment.path).with_context(named)?;
            let file = store.into_file();
            attachments.push(Attachment {
                name: attachment.name.clone(),
                at_opening: Stamp::from_metadata(&file.metadata().with_context(named)?),
                file,
            });
        }
        if args.holes == Some(Holes::Base) && args.base.is_none() {
            let text = "--holes base needs --base, the snapshot that the holes are as in";
            return Err(Refusal::Usage(text.into()).into());
        }
        let base = args
            .base
            .as_deref()
            .map(|path| layers::open(path, &args.layers))
            .transpose()
            .context("cannot open the base")?
            .map(Arc::new);
        let inherited = &args.inherit_attachment;
        if let Some(base) = &base {
            check_inherited(inherited, base, &mut used)?;
        }
        let frame_bytes = args.frame_size.kib << 10;
        let frame_pages = frame_bytes / PAGE_SIZE;
        Ok(Self {
            level: args.level,
            frame_bytes,
            dictionary: match &args.dictionary {
                args::Dictionary::Auto if dictionary::is_worth_training(frame_pages) => {
                    DictionaryChoice::Trained
                }
                args::Dictionary::Train => DictionaryChoice::Trained,
                args::Dictionary::Auto | args::Dictionary::Off => DictionaryChoice::Off,
                args::Dictionary::File(path) => DictionaryChoice::Given(read_dictionary(path)?),
            },
            threads: args.threads,
            attachments,
            base,
            inherited: inherited.clone(),
        })
    }

    /// Refuses a raw file that is mostly holes beside the state of a Firecracker VM. The full
    /// memory of a VM that has run is not mostly holes, but a diff is.
    fn refuse_diff(&self, source: Option<&Path>) -> Result<()> {
        for Attachment { name, file, .. } in &self.attachments {
            let mut start = [0; 16];
            // A file without random access is not a state file written by a VMM.
            let Ok(len) = file.read_at(&mut start, 0) else {
                continue;
            };
            if source::is_firecracker_state(&start[..len]) {
                bail!(
                    "{}: most of it is holes, and the attachment {name:?} is the state of a \
                     Firecracker VM, so this looks like a diff, in which a hole means \
                     \"unchanged\": {MERGE_A_DIFF}; if holes are zeros: --holes zero",
                    source.map(names::path).unwrap_or_default()
                );
            }
        }
        Ok(())
    }

    /// Trains a dictionary if that may pay off, and starts the snapshot.
    pub(crate) fn start(
        &self,
        target: Target,
        source: &mut dyn Source,
        progress: Progress,
        cancel: &Cancel,
    ) -> Result<SnapshotSink> {
        let dictionary = match &self.dictionary {
            DictionaryChoice::Trained => self.train(source)?,
            DictionaryChoice::Off => Dictionary::Off,
            DictionaryChoice::Given(bytes) => Dictionary::Use(bytes.clone()),
        };
        source.begin()?;
        let mut properties = source.describe();
        if let Some(base) = &self.base {
            properties.push(("base.id".into(), base.id().to_string()));
            properties.push(("base.path".into(), base.name().to_owned()));
        }
        let options = WriterOptions {
            level: self.level,
            frame_pages: self.frame_bytes / PAGE_SIZE,
            dictionary,
            threads: self.threads,
            expected_pages: source.data_pages(),
            properties,
            base: self.base.clone(),
            ..WriterOptions::default()
        };
        let mut writer = Writer::new(target, options)?;
        let cancel = cancel.clone();
        writer.on_progress(move |at| {
            progress.set(at.pages_done * PAGE_SIZE_U64);
            if cancel.requested() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        Ok(SnapshotSink {
            writer,
            base: self.base.clone(),
            counterparts: Counterparts::new(self.base.as_deref()),
            region: (String::new(), 0),
            pages: 0,
            there: Counterpart::default(),
            first_counterparts: 0,
            compared_pages: 0,
            has_holes: false,
        })
    }

    /// Trains a dictionary on samples from the whole source, if it pays off. If the source can't be
    /// sampled, the writer trains on the beginning of the memory instead.
    fn train(&self, source: &mut dyn Source) -> Result<Dictionary> {
        let samples = source.sample(&Sampling {
            bytes: SAMPLE_BYTES.max(4 * self.frame_bytes),
            piece: self.frame_bytes.max(16 << 10),
        })?;
        if samples.bytes.is_empty() {
            return Ok(Dictionary::Train);
        }
        let mut pool = rayon::ThreadPoolBuilder::new().thread_name(|n| format!("train-{n}"));
        if let Some(threads) = self.threads {
            pool = pool.num_threads(threads);
        }
        let pool = pool.build().context("starting threads to train with")?;
        let trained = pool.install(|| {
            dictionary::train(
                &samples.bytes,
                self.frame_bytes / PAGE_SIZE,
                self.level,
                samples.expected_bytes(),
            )
        });
        Ok(trained.map_or(Dictionary::Off, |trained| Dictionary::Use(trained.bytes)))
    }
}

/// Checks that the base has these attachments, and that none has the name of another one.
fn check_inherited<'a>(
    names: &'a [String],
    base: &Snapshot,
    used: &mut HashSet<&'a String>,
) -> Result<()> {
    let there = base.attachments().context("cannot read the base")?;
    for name in names {
        if !there.iter().any(|attachment| attachment.name == *name) {
            let there: Vec<String> = there
                .iter()
                .map(|attachment| format!("{:?}", attachment.name))
                .collect();
            let there = match &there[..] {
                [] => "none".to_owned(),
                there => there.join(", "),
            };
            bail!(
                "{}: has no attachment {name:?} to inherit; attachments there: {there}",
                base.name()
            );
        }
        if !used.insert(name) {
            return Err(Refusal::Usage(format!(
                "two attachments are named {name:?}; each needs a name of its own"
            ))
            .into());
        }
    }
    Ok(())
}

fn read_dictionary(path: &Path) -> Result<Vec<u8>> {
    let named = || format!("{}: reading the dictionary", names::path(path));
    let mut bytes = Vec::new();
    let limit = MAX_DICTIONARY_BYTES as u64 + 1;
    let store = FileStore::open(path).with_context(named)?;
    store
        .into_file()
        .take(limit)
        .read_to_end(&mut bytes)
        .with_context(named)?;
    match bytes.len() {
        0 => bail!("{}: an empty file is no dictionary", names::path(path)),
        len if len > MAX_DICTIONARY_BYTES => bail!(
            "{}: is longer than {MAX_DICTIONARY_BYTES} bytes, the most that a dictionary may have",
            names::path(path)
        ),
        _ => Ok(bytes),
    }
}

/// A snapshot being written.
pub(crate) struct SnapshotSink {
    writer: Writer<Target>,
    base: Option<Arc<Snapshot>>,
    counterparts: Counterparts,
    /// Name and start of the region.
    region: (String, u64),
    /// Number of pages of the region so far.
    pages: u64,
    /// Counterpart of the next pages.
    there: Counterpart,
    /// Number of consecutive pages of the base that correspond to the first pages of the region.
    first_counterparts: u64,
    /// Number of pages that have a counterpart in the base.
    compared_pages: u64,
    /// Whether the base's pages were taken for holes.
    has_holes: bool,
}

impl SnapshotSink {
    /// Stores the attachments, and those of the base that are inherited. Returns a remark about
    /// files that changed since they were opened; fails if the length of one changed.
    fn attach(
        &mut self,
        attachments: Vec<Attachment>,
        inherited: &[String],
    ) -> Result<Option<Remark>> {
        if let Some(base) = &self.base {
            for name in inherited {
                self.writer.copy_attachment(base, name)?;
            }
        }
        let mut changed = Vec::new();
        for mut attachment in attachments {
            let name = &attachment.name;
            self.writer.attach(name, &mut attachment.file)?;
            let now = attachment.file.metadata().with_context(|| name.clone())?;
            match attachment.at_opening.change(Stamp::from_metadata(&now)) {
                Change::None => {}
                Change::Size => bail!(
                    "the attachment {name:?}: its size changed since the command began, to {} \
                     bytes; try again when nobody writes to it",
                    now.len()
                ),
                Change::Written | Change::Touched => changed.push(format!("{name:?}")),
            }
        }
        Ok(changed.first().map(|first| Remark {
            key: "attachments.changed",
            value: changed.len().to_string(),
            text: format!(
                "{} may have been written to since the command began (the first {first}), and be of \
                 another moment than the memory",
                count(changed.len() as u64, "attachment")
            ),
            warning: true,
        }))
    }

    /// Writes the next `pages` pages with `write`, which gets a range of them at a time: those of
    /// one region of the base, or without a counterpart.
    fn write_parts(
        &mut self,
        pages: u64,
        mut write: impl FnMut(&mut Writer<Target>, Range<u64>) -> Result<(), WriteError>,
    ) -> Result<()> {
        let mut done = 0;
        while done < pages {
            if self.there.pages == 0 {
                self.there = self.counterpart();
                self.writer.set_base_page(self.there.page)?;
            }
            let part = (pages - done).min(self.there.pages);
            write(&mut self.writer, done..done + part)?;
            if self.there.page.is_some() {
                self.compared_pages += part;
            }
            self.there.pages -= part;
            self.pages += part;
            done += part;
        }
        Ok(())
    }

    /// Returns the counterpart of the next pages of the region.
    fn counterpart(&self) -> Counterpart {
        let (name, start) = &self.region;
        // The address after the last page may be beyond the last address.
        let address = start.wrapping_add(self.pages * PAGE_SIZE_U64);
        self.counterparts.of(name, address)
    }

    /// Returns a remark about memory of the base that the new snapshot lacks.
    fn base_remark(&self) -> Option<Remark> {
        let base = self.base.as_ref()?;
        let bytes = (base.summary().pages).saturating_sub(self.compared_pages) * PAGE_SIZE_U64;
        let why = if self.compared_pages == 0 {
            ": no region of the source overlaps one of the same name in the base, so memory was \
             only looked for by its content"
        } else {
            ": the source is smaller, or has other regions"
        };
        (bytes > 0).then(|| Remark {
            key: "base.left_out_bytes",
            value: bytes.to_string(),
            text: format!(
                "{} of the base's memory has no counterpart in the source{why}",
                BinaryBytes(bytes)
            ),
            // A diff is of the memory of its base.
            warning: self.has_holes || self.compared_pages == 0,
        })
    }

    /// Returns a remark about damage of the base in blocks that were stored whole instead.
    fn damage_remark(&mut self) -> Result<Option<Remark>> {
        let damage = self.writer.base_damage()?;
        Ok(damage.map(|damage| Remark {
            key: "base.damaged_blocks",
            value: damage.blocks.to_string(),
            text: format!(
                "{} of 2 MiB stored whole, because the base is damaged there: {}",
                count(damage.blocks, "block"),
                damage.first
            ),
            warning: true,
        }))
    }

    /// Records the remarks as properties and writes the end. The target is not yet complete.
    pub(crate) fn finish(mut self, remarks: &[Remark]) -> Result<(Target, Written)> {
        for remark in remarks {
            self.writer.set_property(remark.key, &remark.value)?;
        }
        Ok(self.writer.finish()?)
    }
}

impl Sink for SnapshotSink {
    fn region(&mut self, region: &Region) -> Result<()> {
        let name = names::shortened(region.name.clone(), MAX_NAME_BYTES);
        self.region = (name.clone(), region.start);
        self.pages = 0;
        self.there = self.counterpart();
        self.first_counterparts = self.there.page.map_or(0, |_| self.there.pages);
        Ok(self.writer.begin_region(&RegionSpec {
            space: 0,
            flags: region.flags,
            start: region.start,
            page_shift: region.page_shift,
            name,
            base_page: self.there.page,
        })?)
    }

    fn pages(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        self.write_parts((bytes.len() / PAGE_SIZE) as u64, |writer, part| {
            let count = usize::try_from(part.end - part.start).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(count * PAGE_SIZE);
            rest = later;
            writer.write_pages(now)
        })
    }

    fn zeros(&mut self, pages: u64) -> Result<()> {
        self.write_parts(pages, |writer, part| {
            writer.write_fill(part.end - part.start, 0)
        })
    }

    fn unavailable(&mut self, pages: u64) -> Result<()> {
        self.write_parts(pages, |writer, part| {
            writer.write_unavailable(part.end - part.start)
        })
    }

    fn as_in_base(&mut self, pages: u64) -> Result<()> {
        let (first, there) = (self.pages, self.first_counterparts);
        let end = first + pages;
        if end > there {
            let base = self.base.as_ref().map_or("no base", |base| base.name());
            bail!(
                "the diff is at least {} long, the memory of the base {base} {}; name the base \
                 that the diff was taken from (bytes {} to {} are a hole, which means \"as in the \
                 base\"); if the source is all of the memory: --holes zero; if the memory has \
                 grown, write the zeros of the new part into the file",
                BinaryBytes(end * PAGE_SIZE_U64),
                BinaryBytes(there * PAGE_SIZE_U64),
                first * PAGE_SIZE_U64,
                end * PAGE_SIZE_U64
            );
        }
        self.has_holes = true;
        self.write_parts(pages, |writer, part| {
            writer.write_from_base(part.end - part.start)
        })
    }
}
