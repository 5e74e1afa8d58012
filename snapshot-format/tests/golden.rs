//! The golden files of every format version are compared with their manifest. They were written
//! once and are kept: a reader that treats one of them differently has changed the format.

mod counting;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use counting::Counting;
use serde_json::Value;
use snapshot_format::layout::{PAGE_SIZE, SectionKind, TAIL_BYTES};
use snapshot_format::{
    Defect, FrameDecoder, LayerFolders, MemoryStore, OpenError, Page, Reason, Report, Snapshot,
    SnapshotOptions, Store, VerifyError, VerifyOptions, WorkingSetRun, verify,
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/golden/v1")
}

fn manifest() -> Vec<Value> {
    let text =
        fs::read_to_string(folder().join("manifest.json")).expect("cannot read the manifest");
    let manifest: Value = serde_json::from_str(&text).expect("JSON");
    manifest["files"].as_array().expect("a list").clone()
}

fn text<'a>(entry: &'a Value, key: &str) -> &'a str {
    entry[key]
        .as_str()
        .unwrap_or_else(|| panic!("{key} of {entry}"))
}

fn number(entry: &Value, key: &str) -> u64 {
    entry[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key} of {entry}"))
}

fn list<'a>(entry: &'a Value, key: &str) -> &'a [Value] {
    entry[key]
        .as_array()
        .unwrap_or_else(|| panic!("{key} of {entry}"))
}

/// Returns ranges given as `[first page, pages]`.
fn ranges(entry: &Value, key: &str) -> Vec<Range<u64>> {
    let pair = |pair: &Value| {
        let first = pair[0].as_u64().expect("a page");
        first..first + pair[1].as_u64().expect("a count")
    };
    list(entry, key).iter().map(pair).collect()
}

fn store(file: &str) -> Arc<MemoryStore> {
    let bytes = fs::read(folder().join(file)).expect("a golden file");
    Arc::new(MemoryStore::named(bytes, file))
}

/// Returns the manifest's name for an error.
fn name_of(error: &OpenError) -> String {
    match error {
        OpenError::NotASnapshot { .. } => "not a snapshot".to_owned(),
        OpenError::Incomplete { .. } => "incomplete".to_owned(),
        OpenError::UnsupportedVersion { version, .. } => format!("unsupported version {version}"),
        OpenError::UnsupportedFeature { names, .. } => format!("unsupported feature {names}"),
        OpenError::AncestorMissing { .. } => "orphaned: missing".to_owned(),
        OpenError::AncestorUnusable { source, .. } => name_of(source),
        OpenError::AncestorReplaced { .. } => "orphaned: replaced".to_owned(),
        OpenError::AncestorPageSize { .. } => "orphaned: page size".to_owned(),
        OpenError::AncestorCycle { .. } => "damaged cycle".to_owned(),
        OpenError::Damaged { part, defect, .. } => {
            let defect = match defect {
                Defect::Checksum { .. } => "checksum",
                Defect::Reserved { .. } => "reserved",
                Defect::Value { .. } => "value",
                Defect::TooLarge { .. } => "too large",
                Defect::OutOfBounds { .. } => "out of bounds",
                Defect::Overlap { .. } => "overlap",
                Defect::Text { .. } => "text",
                Defect::Decode { .. } => "decode",
                Defect::Missing { .. } => "missing",
                _ => "?",
            };
            format!("damaged {part}: {defect}")
        }
        other => format!("{other:?}"),
    }
}

/// Returns the damaged part and offset of a file that can't be opened.
fn place_of(error: &OpenError) -> Option<(String, u64)> {
    match error {
        OpenError::Damaged { part, offset, .. } => Some((part.to_string(), *offset)),
        OpenError::Incomplete { file_bytes, .. } => Some(("trailer".to_owned(), *file_bytes)),
        _ => None,
    }
}

/// Returns a region's name, shortened as in the manifest if it repeats one letter.
fn region_name(region: &Value) -> String {
    match &region["name"] {
        Value::String(name) => name.clone(),
        name => {
            let times = usize::try_from(number(name, "times")).expect("small");
            text(name, "repeat").repeat(times)
        }
    }
}

/// Content of a page number.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Bytes(Vec<u8>),
    Unavailable,
    Unused,
    /// The page was refused as damaged.
    Lost,
}

/// Layer and offset of a frame.
type FrameKey = (u16, u64);

/// Reads pages one after the other, and decodes each frame when it is needed and is not the last
/// one decoded.
struct Pages {
    snapshot: Snapshot,
    decoder: FrameDecoder,
    last: Option<(FrameKey, Option<Vec<u8>>)>,
}

impl Pages {
    fn open(file: &str) -> Self {
        Self {
            snapshot: open(store(file)).unwrap_or_else(|error| panic!("{error}")),
            decoder: FrameDecoder::new(),
            last: None,
        }
    }

    fn page(&mut self, page: u64) -> Content {
        match self.snapshot.look_up(page, Reason::Demand) {
            Ok(Page::Fill(word)) => Content::Bytes(word.to_le_bytes().repeat(PAGE_SIZE / 8)),
            Ok(Page::Unavailable) => Content::Unavailable,
            Ok(Page::Unused) => Content::Unused,
            Ok(Page::Stored { frame, slot }) => {
                if self
                    .last
                    .as_ref()
                    .is_none_or(|(at, _)| *at != (frame.layer(), frame.offset()))
                {
                    let mut out = vec![0; frame.decoded_len()];
                    let decoded =
                        self.decoder
                            .decode(&self.snapshot, &frame, Reason::Demand, &mut out);
                    let good = match decoded {
                        Ok(_) => true,
                        Err(error) => {
                            assert!(error.is_damage(), "{error}");
                            false
                        }
                    };
                    let at = (frame.layer(), frame.offset());
                    self.last = Some((at, good.then_some(out)));
                }
                let decoded = self.last.as_ref().and_then(|(_, decoded)| decoded.as_ref());
                decoded.map_or(Content::Lost, |bytes| {
                    let from = usize::from(slot) * PAGE_SIZE;
                    Content::Bytes(bytes[from..from + PAGE_SIZE].to_vec())
                })
            }
            Err(error) => {
                assert!(error.is_damage(), "{error}");
                Content::Lost
            }
        }
    }
}

fn check(file: &str) -> Result<Report, VerifyError> {
    let options = VerifyOptions::default().threads(2);
    verify(store(file), options.ancestors(ancestors()))
}

/// Returns the folder as the place where ancestors are.
fn ancestors() -> Arc<LayerFolders> {
    Arc::new(LayerFolders::new([folder()]))
}

fn open(store: Arc<dyn Store>) -> Result<Snapshot, OpenError> {
    Snapshot::open_with(store, &SnapshotOptions::default().ancestors(ancestors()))
}

/// Returns the kinds of a report's problems, sorted, each once.
fn kinds(report: &Report) -> Vec<&str> {
    let mut kinds: Vec<&str> = report
        .problems
        .iter()
        .map(|problem| &problem.what[..])
        .collect();
    kinds.sort_unstable();
    kinds.dedup();
    kinds
}

#[test]
fn manifest_names_every_file_and_its_length() {
    let mut named: Vec<String> = manifest()
        .iter()
        .map(|entry| text(entry, "file").to_owned())
        .collect();
    for entry in &manifest() {
        let path = folder().join(text(entry, "file"));
        let bytes = fs::metadata(path).expect("a golden file").len();
        assert_eq!(bytes, number(entry, "bytes"), "{entry}");
        assert!(text(entry, "shows").len() > 5, "{entry}");
    }
    let there = fs::read_dir(folder()).expect("folder is missing");
    let mut there: Vec<String> = there
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("a plain name")
        })
        .filter(|name| name != "manifest.json")
        .collect();
    named.sort_unstable();
    there.sort_unstable();
    assert_eq!(there, named);
}

/// Returns whether `offset` lies in the part that the manifest calls damaged.
fn is_there(entry: &Value, offset: u64) -> bool {
    let bytes = list(&entry["place"], "bytes");
    let [from, to] = [0, 1].map(|i| bytes[i].as_u64().expect("an offset"));
    // A truncated file is damaged at its end.
    (from..to).contains(&offset) || from == to && from == offset
}

#[test]
fn each_outcome_follows_from_errors_and_problems() {
    let mut seen = std::collections::BTreeSet::new();
    for entry in &manifest() {
        let (file, outcome, open) = (
            text(entry, "file"),
            text(entry, "outcome"),
            text(entry, "open"),
        );
        let good = open == "ok" && list(entry, "problems").is_empty();
        match outcome {
            "good" => assert!(good && file.starts_with("good-"), "{file}"),
            "damaged" => assert!(
                !good && (open == "ok" || open.starts_with(outcome)),
                "{file}"
            ),
            "incomplete" | "not a snapshot" | "unsupported" | "orphaned" => {
                assert!(open.starts_with(outcome), "{file}");
            }
            other => panic!("{file}: {other}"),
        }
        seen.insert(outcome.to_owned());
    }
    assert_eq!(seen.len(), 6, "{seen:?}");
}

#[test]
fn reader_agrees_with_the_manifest() {
    let mut refused = 0;
    for entry in &manifest() {
        let (file, wanted) = (text(entry, "file"), text(entry, "open"));
        match open(store(file)) {
            // Regions may be read on first use.
            Ok(_) => assert_eq!(wanted, "ok", "{file}"),
            Err(error) => {
                assert_eq!(name_of(&error), wanted, "{file}: {error}");
                if let Some((part, offset)) = place_of(&error) {
                    assert_eq!(part, text(&entry["place"], "part"), "{file}: {error}");
                    assert!(is_there(entry, offset), "{file}: {error}");
                }
                // Such files get no verdict.
                let unsupported =
                    wanted.starts_with("unsupported") || wanted.starts_with("orphaned");
                assert_eq!(error.is_damage(), !unsupported, "{file}: {error}");
                match check(file) {
                    Ok(report) => assert!(!unsupported && report.problems.len() == 1, "{file}"),
                    Err(error) => assert!(unsupported, "{file}: {error}"),
                }
                refused += 1;
            }
        }
    }
    assert!(refused >= 30, "{refused} files are refused");
}

#[test]
fn verifier_agrees_with_the_manifest() {
    let mut bad = 0;
    for entry in manifest()
        .iter()
        .filter(|entry| text(entry, "open") == "ok")
    {
        let file = text(entry, "file");
        let wanted: Vec<&str> = list(entry, "problems")
            .iter()
            .map(|kind| kind.as_str().expect("a kind"))
            .collect();
        let report = check(file).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert_eq!(kinds(&report), wanted, "{file}: {report:#?}");
        assert_eq!(report.ok(), wanted.is_empty(), "{file}");
        if let Some(first) = report.problems.first() {
            assert!(is_there(entry, first.offset), "{file}: {first:?}");
        }
        bad += u32::from(!wanted.is_empty());
    }
    assert!(bad >= 40, "{bad} files have problems");
}

#[test]
fn good_files_return_what_was_written() {
    let mut good = 0;
    for entry in manifest()
        .iter()
        .filter(|entry| !entry["summary"].is_null())
    {
        let file = text(entry, "file");
        let mut pages = Pages::open(file);
        let snapshot = &pages.snapshot;
        let (id, summary) = (snapshot.id().to_string(), *snapshot.summary());
        assert_eq!(id, text(entry, "snapshot_id"), "{file}");
        for (key, value) in [
            ("pages", summary.pages),
            ("zero_pages", summary.zero_pages),
            ("fill_pages", summary.fill_pages),
            ("stored_pages", summary.stored_pages),
            ("duplicate_pages", summary.duplicate_pages),
            ("unavailable_pages", summary.unavailable_pages),
            ("frames", summary.frames),
            ("frame_bytes", summary.frame_bytes),
        ] {
            assert_eq!(value, number(&entry["summary"], key), "{file}: {key}");
        }
        let dictionaries = snapshot
            .dictionaries()
            .expect("cannot read the dictionaries");
        let dictionary_bytes: u64 = dictionaries.iter().map(|dictionary| dictionary.bytes).sum();
        assert_eq!(
            dictionary_bytes,
            number(entry, "dictionary_bytes"),
            "{file}"
        );
        let digest = blake3::Hash::from(summary.content_digest).to_string();
        assert_eq!(digest, text(entry, "content_digest"), "{file}");
        let digest = blake3::Hash::from(summary.state_digest).to_string();
        assert_eq!(digest, text(entry, "state_digest"), "{file}");
        blobs_are_as_in(entry, snapshot);
        regions_are_as_in(entry, &mut pages);
        good += 1;
    }
    assert!(good >= 23, "{good} good files");
}

fn blobs_are_as_in(entry: &Value, snapshot: &Snapshot) {
    let sets = snapshot
        .working_sets()
        .expect("cannot read the working sets");
    assert_eq!(sets.len(), list(entry, "working_sets").len());
    for (set, wanted) in sets.iter().zip(list(entry, "working_sets")) {
        assert_eq!(set.name, text(wanted, "name"));
        let runs = snapshot.working_set(&set.name).expect("a working set");
        let wanted: Vec<WorkingSetRun> = ranges(wanted, "runs")
            .into_iter()
            .map(|run| WorkingSetRun {
                first_page: run.start,
                pages: run.end - run.start,
            })
            .collect();
        assert_eq!(runs, wanted);
    }
    let attachments = snapshot.attachments().expect("cannot read the attachments");
    assert_eq!(attachments.len(), list(entry, "attachments").len());
    for (attachment, wanted) in attachments.iter().zip(list(entry, "attachments")) {
        let mut bytes = Vec::new();
        snapshot
            .read_attachment(&attachment.name, &mut bytes)
            .expect("an attachment");
        assert_eq!(attachment.name, text(wanted, "name"));
        assert_eq!(bytes.len() as u64, number(wanted, "bytes"));
        assert_eq!(blake3::hash(&bytes).to_string(), text(wanted, "blake3"));
    }
}

fn regions_are_as_in(entry: &Value, pages: &mut Pages) {
    let file = text(entry, "file");
    let regions = pages.snapshot.regions().to_vec();
    assert_eq!(regions.len(), list(entry, "regions").len(), "{file}");
    for (region, wanted) in regions.iter().zip(list(entry, "regions")) {
        assert_eq!(region.name, region_name(wanted), "{file}");
        for (key, value) in [
            ("space", region.space.into()),
            ("start", region.start),
            ("flags", region.flags.into()),
            ("page_shift", region.page_shift.into()),
            ("first_page", region.first_page),
            ("pages", region.pages),
        ] {
            assert_eq!(
                value,
                number(wanted, key),
                "{file}: {key} of {}",
                region.name
            );
        }
        let unavailable = ranges(wanted, "unavailable");
        let mut hasher = blake3::Hasher::new();
        for page in region.page_numbers() {
            let expected = unavailable.iter().any(|run| run.contains(&page));
            match pages.page(page) {
                Content::Bytes(bytes) if !expected => {
                    hasher.update(&bytes);
                }
                Content::Unavailable if expected => {}
                other => panic!("{file}: page {page} is {other:?}"),
            }
        }
        let hash = hasher.finalize().to_string();
        assert_eq!(hash, text(wanted, "blake3"), "{file}: {}", region.name);
        let end = region.page_numbers().end;
        for unused in end..end.next_multiple_of(512) {
            assert_eq!(pages.page(unused), Content::Unused, "{file}: page {unused}");
        }
    }
}

#[test]
fn bad_files_lose_only_the_damaged_pages() {
    for entry in manifest().iter().filter(|entry| !entry["of"].is_null()) {
        let file = text(entry, "file");
        let lost = ranges(entry, "lost");
        let (mut bad, mut good) = (Pages::open(file), Pages::open(text(entry, "of")));
        for page in 0..good.snapshot.page_slots() {
            let found = bad.page(page);
            if lost.iter().any(|run| run.contains(&page)) {
                assert_eq!(found, Content::Lost, "{file}: page {page}");
            } else {
                assert!(found == good.page(page), "{file}: page {page} is another");
            }
        }
    }
}

/// A file whose tail holds everything needed opens with one read. Anything before the tail costs
/// one more.
#[test]
fn one_read_of_the_tail_opens_a_file() {
    for entry in manifest()
        .iter()
        .filter(|entry| text(entry, "open") == "ok")
    {
        let file = text(entry, "file");
        let bytes = fs::read(folder().join(file)).expect("a golden file");
        let tail = bytes.len().min(TAIL_BYTES) as u64;
        let counting = Arc::new(Counting::new(bytes));
        let snapshot = open(counting.clone()).expect("opens");
        let (reads, bytes) = counting.take(Reason::Open);
        if !snapshot.ancestors().is_empty() {
            // Its properties have the names of the ancestors.
            assert_eq!(reads, 2, "{file}");
        } else if file == "good-long-region-section.snap" {
            let before = counting.len().expect("a length") - tail;
            assert_eq!(reads, 2, "{file}");
            assert!(bytes > tail && bytes <= tail + before, "{file}: {bytes}");
        } else {
            assert_eq!((reads, bytes), (1, tail), "{file}");
        }
        let blocks = snapshot.block_count();
        (0..blocks).for_each(|block| drop(snapshot.look_up(block * 512, Reason::Demand)));
        assert_eq!(
            counting.take(Reason::Open),
            (0, 0),
            "{file}: regions are there"
        );
    }
}

/// A file of a later writer of version 1 reads like any other, and reports its unknown parts.
#[test]
fn unknown_optional_content_is_ignored() {
    let snapshot = Pages::open("good-from-the-future.snap").snapshot;
    assert_eq!(snapshot.optional_features(), 1 << 40);
    assert_eq!(SectionKind::from_number(1000), None);
}
