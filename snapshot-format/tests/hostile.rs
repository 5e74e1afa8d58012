//! Damaged files: every byte flipped, every length, and noise. Nothing panics, no wrong byte is
//! returned, and the verifier always reports the damage.

mod common;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use common::{Sample, page_bytes};
use proptest::prelude::*;
use snapshot_format::layout::{
    HEADER_BYTES, HEADER_MAGIC, PAGE_SIZE, TRAILER_BYTES, TRAILER_MAGIC,
};
use snapshot_format::{
    FrameDecoder, MemoryStore, OpenError, Page, Reason, Snapshot, Store, VerifyOptions, verify,
};

/// Reads everything that can be read; errors are allowed, wrong bytes and panics are not.
fn read_everything(snapshot: &Snapshot, expect: impl Fn(u64) -> Option<Vec<u8>>) {
    let mut decoder = FrameDecoder::new();
    let mut frames: BTreeMap<u64, Option<Vec<u8>>> = BTreeMap::new();
    // A hostile top table may promise any number of pages; the sample has five blocks.
    for page in 0..snapshot.page_slots().min(5 * 512) {
        match snapshot.look_up(page, Reason::Demand) {
            Ok(Page::Fill(word)) => {
                let bytes = word.to_le_bytes().repeat(PAGE_SIZE / 8);
                assert_eq!(expect(page), Some(bytes), "page {page}");
            }
            Ok(Page::Stored { frame, slot }) => {
                let bytes = frames.entry(frame.offset()).or_insert_with(|| {
                    let mut out = vec![0; frame.decoded_len()];
                    decoder
                        .decode(snapshot, &frame, Reason::Demand, &mut out)
                        .is_ok()
                        .then_some(out)
                });
                if let Some(bytes) = bytes {
                    let from = usize::from(slot) * PAGE_SIZE;
                    let bytes = &bytes[from..from + PAGE_SIZE];
                    assert!(
                        expect(page).is_some_and(|page| page == bytes),
                        "page {page}"
                    );
                }
            }
            Ok(Page::Unavailable | Page::Unused) => assert_eq!(expect(page), None, "page {page}"),
            Err(error) => assert!(error.is_damage(), "{error}"),
        }
    }
    let _ = (
        snapshot.fill_runs(),
        snapshot.properties(),
        snapshot.dictionaries(),
    );
    for set in snapshot.working_sets().unwrap_or_default() {
        let _ = snapshot.working_set(&set.name);
    }
    for attachment in snapshot.attachments().unwrap_or_default() {
        let _ = snapshot.read_attachment(&attachment.name, io::sink());
    }
}

/// The first bytes of a file.
struct Prefix {
    bytes: Arc<Vec<u8>>,
    len: usize,
}

impl Store for Prefix {
    fn len(&self) -> io::Result<u64> {
        Ok(self.len as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, _reason: Reason) -> io::Result<()> {
        let from = usize::try_from(offset).expect("small");
        let there = &self.bytes[..self.len];
        let wanted = there.get(from..from + buf.len());
        buf.copy_from_slice(wanted.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn name(&self) -> String {
        "prefix".to_owned()
    }
}

fn open(bytes: &[u8]) -> Result<Snapshot, OpenError> {
    Snapshot::open(Arc::new(MemoryStore::new(bytes.to_vec())))
}

/// Returns the number of problems that the verifier finds, or none if the file needs another
/// reader.
fn problems(bytes: &[u8]) -> Option<usize> {
    problems_of(Arc::new(MemoryStore::new(bytes.to_vec())))
}

fn problems_of(store: Arc<dyn Store>) -> Option<usize> {
    match verify(store, VerifyOptions::default().threads(1)) {
        Ok(report) => Some(report.problems.len()),
        Err(error) => {
            assert!(error.to_string().contains("support"), "{error}");
            None
        }
    }
}

#[test]
fn every_flipped_byte_is_found() {
    let sample = Sample::new();
    let all = sample.bytes.len();
    // The inside of payloads and of the attachment makes no difference to the reader, so every 97th
    // byte is enough.
    let bulk = |at: usize| {
        let inside = |range: &std::ops::Range<usize>| (range.start + 64..range.end).contains(&at);
        sample.frames.iter().any(inside) || sample.blobs.iter().any(|(_, _, range)| inside(range))
    };
    let pages: Vec<_> = (0..5 * 512).map(page_bytes).collect();
    let mut flipped = sample.bytes.clone();
    let mut tried = 0;
    for at in (0..all).filter(|at| !bulk(*at) || at % 97 == 0) {
        // A different bit each time.
        let bit = 1 << (at % 8);
        flipped[at] ^= bit;
        assert_ne!(
            problems(&flipped),
            Some(0),
            "byte {at} was flipped unnoticed"
        );
        if at % 29 == 0
            && let Ok(snapshot) = open(&flipped)
        {
            read_everything(&snapshot, |page| {
                pages[usize::try_from(page).expect("small")].clone()
            });
        }
        flipped[at] ^= bit;
        tried += 1;
    }
    assert!(tried > 2 * HEADER_BYTES);
}

#[test]
fn every_truncation_is_refused() {
    let sample = Sample::new();
    let bytes = Arc::new(sample.bytes.clone());
    for len in 0..bytes.len() {
        let bytes = bytes.clone();
        let prefix = Arc::new(Prefix { bytes, len });
        let error = Snapshot::open(prefix.clone()).expect_err("cut off");
        assert!(error.is_damage());
        if len == 0 {
            assert!(matches!(error, OpenError::NotASnapshot { .. }));
        } else {
            assert!(
                matches!(error, OpenError::Incomplete { .. }),
                "{len}: {error}"
            );
        }
        assert_eq!(problems_of(prefix), Some(1), "{len}");
    }
    // One additional byte is wrong, too.
    let mut longer = sample.bytes.clone();
    longer.push(0);
    assert!(matches!(open(&longer), Err(OpenError::Incomplete { .. })));
    longer.extend_from_slice(&sample.bytes[sample.trailer()..]);
    assert!(matches!(open(&longer), Err(OpenError::Damaged { .. })));
}

#[test]
fn foreign_files_are_not_snapshots() {
    for bytes in [
        &b""[..],
        b"\x7fELF",
        b"s",
        &[0; 10_000],
        b"snaprstX and so on",
    ] {
        let result = open(bytes);
        let whole_prefix = HEADER_MAGIC.starts_with(bytes) && !bytes.is_empty();
        match result {
            Err(OpenError::Incomplete { .. }) => assert!(whole_prefix),
            Err(error @ OpenError::NotASnapshot { .. }) => {
                assert!(!whole_prefix);
                assert_eq!(error.to_string().contains("is empty"), bytes.is_empty());
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(problems(bytes), Some(1));
    }
    let error = Snapshot::open_path("/nonexistent/file").expect_err("no file");
    assert!(!error.is_damage());
    assert!(error.to_string().contains("/nonexistent/file"));
}

#[test]
fn input_other_than_file_or_disk_is_refused_by_kind() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, kind) in [
        (fifo.as_path(), "named pipe"),
        (&socket, "socket"),
        (folder.path(), "folder"),
        (Path::new("/dev/zero"), "character device"),
    ] {
        let (told, heard) = std::sync::mpsc::channel();
        let opened = path.to_owned();
        std::thread::spawn(move || {
            // The receiver is gone if opening took too long.
            let _ = told.send(Snapshot::open_path(opened));
        });
        let error = heard
            .recv_timeout(std::time::Duration::from_secs(60))
            .expect("opening waits for a writer")
            .expect_err("no snapshot");
        assert!(!error.is_damage());
        assert!(error.to_string().contains(path.to_str().unwrap()));
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains(kind), "{why}");
    }
}

/// Overwrites parts of the sample's structure, and recomputes all checksums.
fn tampered() -> impl Strategy<Value = Vec<u8>> {
    let sample = Sample::new();
    let structure: Vec<usize> = (0..sample.bytes.len())
        .filter(|at| {
            let in_payload = sample
                .frames
                .iter()
                .any(|frame| (frame.start + 40..frame.end).contains(at));
            let in_blob = sample.blobs.iter().any(|(_, _, range)| range.contains(at));
            !in_payload && !in_blob
        })
        .filter(|at| (8..64).contains(at) || *at >= HEADER_BYTES)
        .collect();
    let values = prop_oneof![
        any::<[u8; 8]>(),
        Just([0xff; 8]),
        Just([0; 8]),
        (0u64..70_000).prop_map(u64::to_le_bytes),
    ];
    let edit = (prop::sample::select(structure), values, 1usize..=8);
    prop::collection::vec(edit, 1..4).prop_map(move |edits| {
        let mut sample = sample.clone();
        for (at, value, len) in edits {
            let len = len.min(sample.bytes.len() - at);
            sample.put(at, &value[..len]);
        }
        sample.seal();
        sample.bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn noise_does_not_open(bytes in prop::collection::vec(any::<u8>(), 0..20_000)) {
        prop_assert!(open(&bytes).is_err());
    }

    #[test]
    fn noise_between_good_magics_does_not_open(
        mut bytes in prop::collection::vec(any::<u8>(), HEADER_BYTES + TRAILER_BYTES..20_000)
    ) {
        bytes[..8].copy_from_slice(&HEADER_MAGIC);
        let end = bytes.len();
        bytes[end - 8..].copy_from_slice(&TRAILER_MAGIC);
        prop_assert!(open(&bytes).is_err());
    }

    /// Checksums are right, so only the checks of the values protect memory. A file that still
    /// opens may hold other pages than the sample does, but is read without a panic.
    #[test]
    fn hostile_writer_causes_no_panic(bytes in tampered()) {
        let _ = problems(&bytes);
        if let Ok(snapshot) = open(&bytes) {
            let mut decoder = FrameDecoder::new();
            for block in 0..snapshot.block_count().min(8) {
                let Ok(index) = snapshot.index_block(block, Reason::Demand) else { continue };
                for frame in index.frames() {
                    let mut out = vec![0; frame.decoded_len()];
                    if let Ok(listed) = decoder.decode(&snapshot, frame, Reason::Demand, &mut out) {
                        for run in listed.runs() {
                            prop_assert!(run.slot + run.count <= frame.slots());
                            prop_assert!(
                                run.first_page + u64::from(run.count) <= snapshot.page_slots()
                            );
                        }
                    }
                }
            }
            let _ = (snapshot.fill_runs(), snapshot.properties(), snapshot.prepare());
            let _ = snapshot.working_set("boot");
            let _ = snapshot.read_attachment("vmm state", io::sink());
        }
    }
}
