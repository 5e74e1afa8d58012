//! Layered snapshots: a hand-made chain reads and verifies, every kind of defect is named, and
//! damage in any file never turns into wrong content.

mod chain;
mod common;
mod counting;

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chain::{Encoder, Entry, File, Frame, Given, PAGES, Three, three};
use common::pattern;
use counting::Counting;
use snapshot_format::layout::{
    HEADER_BYTES, PAGE_SIZE, RawAncestorEntry, RawHeader, RawTopEntry, SectionKind,
};
use snapshot_format::{
    Defect, FrameDecoder, Layer, LayerFolders, OpenError, Page, Part, Problem, ReadError, Reason,
    Report, Snapshot, SnapshotOptions, VerifyError, VerifyOptions, verify,
};

/// Result of reading a page: its bytes, nothing if it has none, or the file that is to blame.
type Read = Result<Option<Vec<u8>>, String>;

/// Reads every page number of a snapshot.
fn read_all(snapshot: &Snapshot) -> Vec<Read> {
    let mut decoder = FrameDecoder::in_steps(snapshot).unwrap_or_default();
    let mut frames: BTreeMap<(u16, u64), Result<Vec<u8>, String>> = BTreeMap::new();
    let mut read = |page| match snapshot.look_up(page, Reason::Demand) {
        Ok(Page::Fill(word)) => Ok(Some(word.to_le_bytes().repeat(PAGE_SIZE / 8))),
        Ok(Page::Unavailable | Page::Unused) => Ok(None),
        Ok(Page::Stored { frame, slot }) => {
            let key = (frame.layer(), frame.offset());
            let bytes = frames.entry(key).or_insert_with(|| {
                let mut out = vec![0; frame.decoded_len()];
                match decoder.decode(snapshot, &frame, Reason::Demand, &mut out) {
                    Ok(_) => Ok(out),
                    Err(error) => {
                        assert!(error.is_damage(), "{error}");
                        Err(error.to_string())
                    }
                }
            });
            let bytes = bytes.as_ref().map_err(String::clone)?;
            Ok(Some(
                bytes[usize::from(slot) * PAGE_SIZE..][..PAGE_SIZE].to_vec(),
            ))
        }
        Err(error) => {
            assert!(error.is_damage(), "{error}");
            Err(error.to_string())
        }
    };
    (0..snapshot.page_slots()).map(&mut read).collect()
}

fn assert_reads(snapshot: &Snapshot, file: &File) {
    let expected = file.pages();
    let read = read_all(snapshot);
    assert_eq!(read.len(), expected.len());
    for (page, (read, expected)) in read.iter().zip(&expected).enumerate() {
        assert!(
            read.as_ref() == Ok(expected),
            "page {page} of {}",
            file.name
        );
    }
}

fn verified(file: &File, ancestors: &[&File]) -> Report {
    let given = Arc::new(Given::of(ancestors).expect("ancestors"));
    let options = VerifyOptions::default().threads(2).ancestors(given);
    verify(file.store(), options).expect("verify")
}

fn open_c(chain: &Three) -> Result<Snapshot, OpenError> {
    chain::open(&chain.c, &[&chain.a, &chain.b])
}

#[test]
fn chain_of_three_reads_as_written() {
    let chain = three();
    assert_reads(&chain::open(&chain.a, &[]).expect("a"), &chain.a);
    assert_reads(&chain::open(&chain.b, &[&chain.a]).expect("b"), &chain.b);
    let snapshot = open_c(&chain).expect("c");
    assert_reads(&snapshot, &chain.c);

    let names: Vec<&str> = snapshot
        .ancestors()
        .iter()
        .map(|layer| layer.name())
        .collect();
    assert_eq!(names, ["b.snap", "a.snap"]);
    assert_eq!(snapshot.layer(2).expect("a").id().0, chain.a.id);
    assert_eq!(
        snapshot.layer(1).expect("b").file_bytes(),
        chain.b.bytes.len() as u64
    );
    assert!(snapshot.layer(3).is_none());
    // The grandparent's frame is named through the parent's index block, in the child's numbers.
    let layer = |page| match snapshot.look_up(page, Reason::Demand) {
        Ok(Page::Stored { frame, .. }) => frame.layer(),
        other => panic!("{other:?}"),
    };
    let layers = [0, 512, 514, 1024, 1027, 1032, 1536, 1537].map(layer);
    assert_eq!(layers, [2, 2, 1, 0, 2, 1, 1, 2]);
}

#[test]
fn chain_of_three_verifies() {
    let chain = three();
    for (file, ancestors) in [
        (&chain.a, &[][..]),
        (&chain.b, &[&chain.a][..]),
        (&chain.c, &[&chain.a, &chain.b][..]),
    ] {
        let report = verified(file, ancestors);
        assert_eq!(report.problems, [], "{}", file.name);
        assert_eq!(
            report.pages_checked,
            file.blocks.iter().flatten().count() as u64
        );
    }
}

#[test]
fn counts_are_of_the_file_itself() {
    let chain = three();
    let summary = *open_c(&chain).expect("c").summary();
    assert_eq!(summary.pages, 76 + PAGES);
    assert_eq!(
        (
            summary.frames,
            summary.stored_pages,
            summary.duplicate_pages
        ),
        (1, 3, 1),
        "a page that repeats an ancestor's page is no duplicate"
    );
    // A wrong count is found.
    let mut c = chain.c.clone();
    let at = c.bytes.len() - 4096 + 48 + 32;
    c.put(at, &2u64.to_le_bytes());
    c.seal();
    let report = verified(&c, &[&chain.a, &chain.b]);
    assert_eq!(report.problems.len(), 1, "{report:?}");
    assert!(report.problems[0].detail.contains("duplicate_pages is 2"));
}

/// A file that a chain was flattened into may have frames with slots that no page uses.
#[test]
fn unused_slots_need_no_listed_page() {
    let file = |last: fn(Frame) -> Entry, unused| {
        let mut file = Encoder::new("flat.snap", &[("ram", 3)], &[]);
        let frame = file.frame_listing(&[(0, 0, 2)], &[1, 2, 3]);
        let mut pages: Vec<Entry> = (0..2)
            .map(|slot| Entry::Stored(frame.clone(), slot))
            .collect();
        pages.push(last(frame));
        file.block(&pages);
        file.unused_slots(unused);
        file.finish()
    };
    let flat = file(|_| Entry::Fill(0), 1);
    assert_eq!(verified(&flat, &[]).problems, []);
    let unlisted = file(|frame| Entry::Stored(frame, 2), 0);
    let problems = verified(&unlisted, &[]).problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].detail.contains("no page is listed for slot 2"));
}

#[test]
fn opening_reads_little_of_an_ancestor() {
    let chain = three();
    let [a, b] = [&chain.a, &chain.b].map(|file| Arc::new(Counting::new(file.bytes.clone())));
    let layers = [&a, &b].map(|store| Arc::new(Layer::open(Arc::clone(store) as _).expect("open")));
    let options = SnapshotOptions::default().ancestors(Arc::new(Given(layers.to_vec())));
    let snapshot = Snapshot::open_with(chain.c.store(), &options).expect("open");
    // Trailer and header; b has a list.
    assert_eq!(a.take(Reason::Open), (2, 8192));
    assert_eq!(b.take(Reason::Open), (3, 8192 + 64));
    // The dictionary and its table are read with the first frame that needs them.
    snapshot.prepare().expect("prepare");
    let mut decoder = FrameDecoder::in_steps(&snapshot).expect("a decoder");
    assert_eq!(
        (a.take(Reason::Open), b.take(Reason::Open)),
        ((0, 0), (0, 0))
    );
    let Ok(Page::Stored { frame, .. }) = snapshot.look_up(1027, Reason::Verify) else {
        panic!("page 1027 lies in the grandparent's frame with a dictionary");
    };
    let mut out = vec![0; frame.decoded_len()];
    for reads in [2, 0] {
        decoder
            .decode(&snapshot, &frame, Reason::Verify, &mut out)
            .expect("decode");
        assert_eq!(a.take(Reason::Open).0, reads);
    }
    assert_eq!(b.take(Reason::Open), (0, 0));
    // A look-up is one read, of the file that has the block.
    for (page, reads) in [(0, (1, 0)), (76 + 512, (0, 1)), (1024, (0, 0))] {
        snapshot.look_up(page, Reason::Demand).expect("look up");
        assert_eq!(
            (a.take(Reason::Demand).0, b.take(Reason::Demand).0),
            reads,
            "page {page}"
        );
    }
}

/// Returns a folder with the files of the chain.
fn folder(files: &[&File]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("folder");
    for file in files {
        file.write_to(folder.path());
    }
    folder
}

#[test]
fn ancestors_are_found_by_id_under_any_name() {
    let chain = three();
    let (beside, other) = (folder(&[&chain.c, &chain.a]), folder(&[&chain.b]));
    let rename = |folder: &Path, from: &str, to: &str| {
        std::fs::rename(folder.join(from), folder.join(to)).expect("rename");
    };
    rename(beside.path(), "a.snap", "x\u{1b}y");
    rename(other.path(), "b.snap", "a.snap");
    // Neither a pipe nor a folder nor another snapshot is in the way.
    std::fs::create_dir(other.path().join("b.snap")).expect("folder");
    let pipe = other.path().join("pipe");
    nix_mkfifo(&pipe);
    let store = || {
        let path = beside.path().join("c.snap");
        Arc::new(snapshot_format::FileStore::open(path).expect("c"))
    };
    let folders = Arc::new(LayerFolders::new([
        PathBuf::from("/nonexistent"),
        other.path().to_owned(),
    ]));
    let options = SnapshotOptions::default().ancestors(folders);
    let snapshot = Snapshot::open_with(store(), &options).expect("open");
    assert_reads(&snapshot, &chain.c);
    // It moves while the resolver remembers where it was.
    rename(other.path(), "a.snap", "again");
    let snapshot = Snapshot::open_with(store(), &options).expect("open");

    // An open chain needs no names.
    drop((beside, other));
    assert_reads(&snapshot, &chain.c);
}

/// The trailer of a renamed file has its id, too.
#[test]
fn renamed_ancestor_with_a_damaged_header_is_found() {
    let chain = three();
    let id = offset_of!(RawHeader, snapshot_id);
    for at in [0, id, id + 15, offset_of!(RawHeader, crc)] {
        let files = folder(&[&chain.a, &chain.b, &chain.c]);
        let mut bytes = chain.a.bytes.clone();
        // Another file of the length, without a trailer, is no error.
        std::fs::write(files.path().join("0"), vec![1; bytes.len()]).expect("write");
        bytes[at] ^= 1;
        std::fs::remove_file(files.path().join("a.snap")).expect("remove");
        std::fs::write(files.path().join("renamed"), &bytes).expect("write");
        let path = files.path().join("c.snap");
        assert_reads(&Snapshot::open_path(&path).expect("open"), &chain.c);
        // Without a trailer nothing tells.
        let end = bytes.len() - 1;
        bytes[end] ^= 1;
        std::fs::write(files.path().join("renamed"), &bytes).expect("write");
        let error = Snapshot::open_path(&path).expect_err("not found");
        let is_missing = matches!(error, OpenError::AncestorMissing { .. });
        let has_id = !(id..id + 16).contains(&at) && at != 0;
        assert!(is_missing != has_id, "{at}: {error}");
    }
}

fn nix_mkfifo(path: &Path) {
    let status = std::process::Command::new("mkfifo").arg(path).status();
    assert!(status.expect("mkfifo").success());
}

#[test]
fn missing_ancestor_is_named_with_what_was_searched() {
    let chain = three();
    let beside = folder(&[&chain.b, &chain.c]);
    let path = beside.path().join("c.snap");
    let error = Snapshot::open_path(&path).expect_err("a is missing");
    let OpenError::AncestorMissing {
        id, name, searched, ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!((id.0, &name[..]), (chain.a.id, "a.snap"));
    assert_eq!(searched, &[beside.path().display().to_string()]);
    assert!(!error.is_damage());
    let text = error.to_string();
    for part in ["612e736e6170", "a.snap", &searched[0]] {
        assert!(text.contains(part), "{text}");
    }
    let verdict = verify(
        Arc::new(snapshot_format::FileStore::open(&path).expect("c")),
        VerifyOptions::default(),
    );
    assert!(matches!(verdict, Err(VerifyError::Open(_))), "{verdict:?}");
}

#[test]
fn replaced_ancestors_are_refused() {
    let chain = three();
    let replaced = |make: fn(&mut File)| {
        let mut a = chain.a.clone();
        make(&mut a);
        let files = folder(&[&a, &chain.b, &chain.c]);
        Snapshot::open_path(files.path().join("c.snap")).expect_err("a was replaced")
    };
    let source = |error: OpenError| match error {
        OpenError::AncestorUnusable { source, .. } => *source,
        other => panic!("{other}"),
    };
    // The same id and length, and another trailer.
    let error = replaced(|a| {
        let at = a.bytes.len() - 4096 + 48 + 56;
        a.put(at, &4096u64.to_le_bytes());
        a.seal();
    });
    assert!(!error.is_damage(), "{error}");
    let error = source(error);
    assert!(
        matches!(&error, OpenError::AncestorReplaced { difference, .. } if difference.contains("trailer")),
        "{error}"
    );
    // Another file under the last known name.
    let error = source(replaced(|a| {
        *a = Encoder::new("a.snap", &[], &[]).finish();
        a.id = *b"another one     ";
        a.put(32, b"another one     ");
        let at = a.bytes.len() - 4096 + 24;
        a.put(at, b"another one     ");
        a.seal();
    }));
    assert!(
        matches!(&error, OpenError::AncestorReplaced { difference, .. } if difference.contains("id")),
        "{error}"
    );
    // The same id, another length.
    let error = source(replaced(|a| {
        *a = Encoder::new("a.snap", &[], &[]).finish();
    }));
    assert!(
        matches!(&error, OpenError::AncestorReplaced { difference, .. } if difference.contains("bytes")),
        "{error}"
    );
    // Truncated, and damaged.
    let error = replaced(|a| a.bytes.truncate(20_000));
    assert!(error.is_damage(), "{error}");
    assert!(matches!(source(error), OpenError::Incomplete { .. }));
    let error = replaced(|a| {
        let at = a.bytes.len() - 100;
        a.bytes[at] ^= 1;
    });
    assert!(error.is_damage() && error.to_string().contains("c.snap"));
    assert!(matches!(
        source(error),
        OpenError::Damaged {
            part: Part::Trailer,
            ..
        }
    ));
}

/// Returns the error of opening the chain's child after a change of one of its files.
fn refused(change: impl FnOnce(&mut Three)) -> OpenError {
    let mut chain = three();
    change(&mut chain);
    open_c(&chain).expect_err("refused")
}

#[test]
fn page_size_of_an_ancestor_must_be_ours() {
    let error = refused(|chain| {
        chain
            .a
            .put(offset_of!(RawHeader, page_size), &16384u32.to_le_bytes());
        chain.a.seal();
    });
    let OpenError::AncestorUnusable { source, .. } = error else {
        panic!("{error}");
    };
    assert!(source.to_string().contains("16384"), "{source}");
    // A damaged header is not believed, as always.
    let mut chain = three();
    chain.a.bytes[offset_of!(RawHeader, page_size)] ^= 1;
    assert_reads(&open_c(&chain).expect("open"), &chain.c);
}

#[test]
fn cycles_are_refused() {
    // c lists itself.
    let error = refused(|chain| {
        let at = chain.c.section(SectionKind::Ancestors);
        let id = chain.c.id;
        chain.c.put(at, &id);
        chain.c.seal();
    });
    assert!(matches!(error, OpenError::AncestorCycle { .. }), "{error}");
    assert!(error.is_damage());
    // b lists c.
    let error = refused(|chain| {
        let at = chain.b.section(SectionKind::Ancestors);
        let id = chain.c.id;
        chain.b.put(at, &id);
        chain.b.seal();
        let (list, len) = (chain.c.section(SectionKind::Ancestors), chain.b.bytes.len());
        let hash = blake3::hash(&chain.b.bytes[len - 4096..]);
        let at = list + offset_of!(RawAncestorEntry, trailer_hash);
        chain.c.put(at, hash.as_bytes());
        chain.c.seal();
    });
    assert!(matches!(error, OpenError::AncestorCycle { .. }), "{error}");
    assert!(error.to_string().contains("b.snap"), "{error}");
}

#[test]
fn defects_of_the_list_are_damage() {
    let entry = size_of::<RawAncestorEntry>();
    let list = |change: fn(&mut File, usize)| {
        refused(|chain| {
            let at = chain.c.section(SectionKind::Ancestors);
            change(&mut chain.c, at);
            chain.c.seal();
        })
    };
    let is_list = |error: &OpenError, wanted: fn(&Defect) -> bool| {
        let part = Part::Section(SectionKind::Ancestors);
        matches!(error, OpenError::Damaged { part: found, defect, .. } if *found == part && wanted(defect))
    };
    let error = list(|c, at| c.put(at + offset_of!(RawAncestorEntry, reserved), &[1]));
    assert!(
        is_list(&error, |defect| matches!(defect, Defect::Reserved { .. })),
        "{error}"
    );
    let error = list(|c, at| {
        let id = c.bytes[at..at + 16].to_vec();
        c.put(at + size_of::<RawAncestorEntry>(), &id);
    });
    assert!(
        is_list(&error, |defect| matches!(defect, Defect::Text { .. })),
        "{error}"
    );
    // Its checksum comes first.
    let error = refused(|chain| {
        let at = chain.c.section(SectionKind::Ancestors);
        chain.c.bytes[at + entry] ^= 1;
    });
    assert!(
        is_list(&error, |defect| matches!(defect, Defect::Checksum { .. })),
        "{error}"
    );
    // A hash that was not known says nothing.
    let mut chain = three();
    let at = chain.c.section(SectionKind::Ancestors) + offset_of!(RawAncestorEntry, trailer_hash);
    chain.c.put(at, &[0; 32]);
    chain.c.seal();
    assert_reads(&open_c(&chain).expect("open"), &chain.c);
}

#[test]
fn defects_of_the_top_table_are_damage() {
    let top = |change: fn(&mut File, usize)| {
        let error = refused(|chain| {
            let at = chain.c.section(SectionKind::Top);
            change(&mut chain.c, at);
            chain.c.seal();
        });
        let OpenError::Damaged {
            part: Part::Section(SectionKind::Top),
            defect,
            ..
        } = error
        else {
            panic!("{error}");
        };
        defect.to_string()
    };
    let text = top(|c, at| c.put(at + offset_of!(RawTopEntry, layer), &3u16.to_le_bytes()));
    assert!(text.contains("layer is 3; accepted: 0 to 2"), "{text}");
    // The offset is compared with the length of the ancestor.
    let text = top(|c, at| {
        let beyond = c.bytes.len() as u64 * 9;
        c.put(
            at + offset_of!(RawTopEntry, word_or_offset),
            &beyond.to_le_bytes(),
        );
    });
    assert!(text.contains("index block"), "{text}");
    // Of a block of the file itself.
    let text = top(|c, at| {
        let at = at + 2 * size_of::<RawTopEntry>();
        c.put(
            at + offset_of!(RawTopEntry, ancestor_block),
            &1u32.to_le_bytes(),
        );
    });
    assert!(text.contains("ancestor block"), "{text}");
}

/// Only the ends and the list of an ancestor are checked, and what is read of it.
#[test]
fn other_parts_of_an_ancestor_do_not_matter() {
    let chain = three();
    for kind in [
        SectionKind::Top,
        SectionKind::Regions,
        SectionKind::BlockDigests,
    ] {
        let mut changed = chain.clone();
        for file in [&mut changed.a, &mut changed.b] {
            let at = file.section(kind);
            file.bytes[at] ^= 1;
        }
        assert_reads(&open_c(&changed).expect("open"), &chain.c);
        let report = verified(&changed.c, &[&changed.a, &changed.b]);
        assert_eq!(report.problems, [], "{kind:?}");
        assert!(chain::open(&changed.a, &[]).is_err() || kind == SectionKind::BlockDigests);
    }
}

/// A file that no page of the snapshot lies in is not needed, even if its ancestor lists it.
#[test]
fn files_that_only_an_ancestor_lists_are_not_opened() {
    let mut a = Encoder::new("a.snap", &[("ram", 2)], &[]);
    let of_a = a.frame(0, &[1], false);
    a.block(&[Entry::Stored(of_a.clone(), 0), Entry::Fill(0)]);
    let a = a.finish();
    let mut b = Encoder::new("b.snap", &[("ram", 2)], &[&a]);
    let of_b = b.frame(1, &[2], false);
    b.block(&[Entry::Stored(of_a.of(1), 0), Entry::Stored(of_b.clone(), 0)]);
    let b = b.finish();
    let mut c = Encoder::new("c.snap", &[("ram", 2)], &[&b]);
    c.block(&[Entry::Fill(0), Entry::Stored(of_b.of(1), 0)]);
    let c = c.finish();
    assert_reads(&chain::open(&c, &[&b]).expect("open"), &c);
    assert_eq!(verified(&c, &[&b]).problems, []);
    assert!(chain::open(&b, &[]).is_err());
}

#[test]
fn own_damage_is_found_before_ancestors_are_missed() {
    let mut chain = three();
    let at = chain.c.section(SectionKind::Regions);
    chain.c.bytes[at] ^= 1;
    let error = chain::open(&chain.c, &[]).expect_err("damaged");
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
    chain.c.bytes[at] ^= 1;
    let error = chain::open(&chain.c, &[]).expect_err("missing");
    assert!(
        matches!(error, OpenError::AncestorMissing { .. }),
        "{error}"
    );
}

/// Returns the damage of the index block of one of the chain's pages.
fn index_damage(chain: &Three, page: u64) -> String {
    let snapshot = open_c(chain).expect("open");
    match snapshot.look_up(page, Reason::Demand) {
        Err(
            error @ ReadError::Damaged {
                part: Part::IndexBlock,
                ..
            },
        ) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn block_of_an_ancestor_must_be_the_named_one() {
    let mut chain = three();
    let at = chain.c.section(SectionKind::Top) + offset_of!(RawTopEntry, ancestor_block);
    chain.c.put(at, &1u32.to_le_bytes());
    chain.c.seal();
    let text = index_damage(&chain, 0);
    assert!(
        text.starts_with("a.snap") && text.contains("first page"),
        "{text}"
    );
    // A block of 512 pages in the place of one of 76.
    let mut chain = three();
    let top = chain.a.top[0];
    let at = chain.c.section(SectionKind::Top);
    chain.c.put(at, zerocopy::IntoBytes::as_bytes(&top));
    chain
        .c
        .put(at + offset_of!(RawTopEntry, layer), &2u16.to_le_bytes());
    chain.c.seal();
    let text = index_damage(&chain, 0);
    assert!(text.contains("page count"), "{text}");
}

#[test]
fn files_that_are_not_among_the_ancestors_cannot_be_named() {
    // The same child, whose list has b alone: b's index block names a, too.
    let chain = three();
    let mut c = Encoder::new("c.snap", &[("ram", PAGES)], &[&chain.b]);
    c.block_of(&chain.b, 1, 0);
    c.block(&vec![Entry::Fill(0); 512]);
    c.block_of(&chain.b, 1, 2);
    let chain = Three {
        c: c.finish(),
        ..chain
    };
    let text = index_damage(&chain, 0);
    assert!(
        text.starts_with("b.snap") && text.contains("names layer 1, which is not among"),
        "{text}"
    );
    let report = verified(&chain.c, &[&chain.a, &chain.b]);
    let files: Vec<_> = report
        .problems
        .iter()
        .map(|problem| problem.file.as_deref())
        .collect();
    assert_eq!(files, [Some("b.snap"); 2], "{report:?}");
}

/// A frame of another file may have a page list that would be out of range here.
#[test]
fn page_lists_are_checked_against_their_own_file() {
    let mut a = Encoder::new("a.snap", &[("ram", 4 * 512)], &[]);
    let far = a.frame(3 * 512, &[1, 2], false);
    for _ in 0..3 {
        a.block(&vec![Entry::Fill(0); 512]);
    }
    let mut entries = vec![Entry::Fill(0); 512];
    entries[0] = Entry::Stored(far.clone(), 0);
    entries[1] = Entry::Stored(far.clone(), 1);
    a.block(&entries);
    let a = a.finish();
    let mut b = Encoder::new("b.snap", &[("ram", 3)], &[&a]);
    let far = far.of(1);
    b.block(&[
        Entry::Stored(far.clone(), 1),
        Entry::Stored(far, 0),
        Entry::Fill(0),
    ]);
    let b = b.finish();
    assert_reads(&chain::open(&b, &[&a]).expect("open"), &b);
    assert_eq!(verified(&b, &[&a]).problems, []);
}

/// Two files that lie in each other's place by number and dictionary stay apart.
#[test]
fn frames_of_different_files_at_one_offset_differ() {
    let mut a = Encoder::new("a.snap", &[("ram", 4)], &[]);
    let of_a = a.frame(0, &[1, 2], false);
    a.block(&[
        Entry::Stored(of_a.clone(), 0),
        Entry::Stored(of_a.clone(), 1),
        Entry::Fill(0),
        Entry::Fill(0),
    ]);
    let a = a.finish();
    let mut b = Encoder::new("b.snap", &[("ram", 4)], &[&a]);
    let of_b = b.frame(0, &[3, 4], false);
    assert_eq!(of_a.raw.offset, of_b.raw.offset);
    b.block(&[
        Entry::Stored(of_b.clone(), 0),
        Entry::Stored(of_b, 1),
        Entry::Stored(of_a.of(1), 0),
        Entry::Stored(of_a.of(1), 1),
    ]);
    let b = b.finish();
    assert_reads(&chain::open(&b, &[&a]).expect("open"), &b);
    assert_eq!(verified(&b, &[&a]).problems, []);
}

#[test]
fn damage_in_an_ancestor_names_it_and_costs_its_pages_only() {
    let chain = three();
    let expected = chain.c.pages();
    // The frame of a with a dictionary is its second one, whose pages block 2 of c uses.
    let mut damaged = chain.clone();
    let at = 4096 + 10_000;
    damaged.a.bytes[at] ^= 1;
    let snapshot = open_c(&damaged).expect("open");
    let mut lost = 0;
    for (page, (read, expected)) in read_all(&snapshot).iter().zip(&expected).enumerate() {
        match read {
            Ok(read) => assert!(read == expected, "page {page}"),
            Err(error) => {
                assert!(error.starts_with("a.snap: damaged frame"), "{error}");
                lost += 1;
            }
        }
    }
    assert_eq!(lost, 6, "five pages and a duplicate of one");
    let report = verified(&damaged.c, &[&damaged.a, &damaged.b]);
    let Problem { file, what, .. } = &report.problems[0];
    assert_eq!((file.as_deref(), &what[..]), (Some("a.snap"), "frame"));
    assert_eq!(report.problems.len(), 1);
}

/// Returns a small chain of two files.
fn two() -> (File, File) {
    let mut a = Encoder::new("a.snap", &[("ram", 12)], &[]);
    a.dictionary(1, pattern(9));
    let a0 = a.frame(0, &[1, 2], false);
    let a1 = a.frame(2, &[9], true);
    let entries = |stored: [Entry; 3]| {
        let mut entries = stored.to_vec();
        entries.resize(12, Entry::Fill(5));
        entries
    };
    a.block(&entries([
        Entry::Stored(a0.clone(), 0),
        Entry::Stored(a0.clone(), 1),
        Entry::Stored(a1.clone(), 0),
    ]));
    let a = a.finish();
    let mut b = Encoder::new("b.snap", &[("low", 12), ("high", 12)], &[&a]);
    b.block_of(&a, 1, 0);
    let b0 = b.frame(513, &[3], false);
    b.block(&entries([
        Entry::Stored(a0.of(1), 1),
        Entry::Stored(b0, 0),
        Entry::Stored(a1.of(1), 0),
    ]));
    (a, b.finish())
}

#[test]
fn every_flipped_byte_of_a_chain_is_refused_or_harmless() {
    let (a, b) = two();
    let expected = b.pages();
    let (mut opened, mut harmless) = (0, 0);
    for in_parent in [true, false] {
        let len = if in_parent {
            a.bytes.len()
        } else {
            b.bytes.len()
        };
        for at in 0..len {
            let (mut a, mut b) = (a.clone(), b.clone());
            let file = if in_parent { &mut a } else { &mut b };
            // A different bit each time.
            file.bytes[at] ^= 1 << (at % 8);
            let Ok(snapshot) = chain::open(&b, &[&a]) else {
                continue;
            };
            opened += 1;
            let mut lost = false;
            for (page, (read, expected)) in read_all(&snapshot).iter().zip(&expected).enumerate() {
                match read {
                    Ok(read) => assert!(read == expected, "byte {at}: page {page} is another"),
                    Err(_) => lost = true,
                }
            }
            harmless += usize::from(!lost);
            // What this file's pages need of the parent is verified; the rest of it is not.
            if at % 7 == 0 && (lost || !in_parent) {
                assert!(!verified(&b, &[&a]).ok(), "byte {at} was flipped unnoticed");
            }
        }
    }
    assert!(opened > HEADER_BYTES && harmless > HEADER_BYTES);
}

#[test]
fn layers_are_shared_by_snapshots() {
    let chain = three();
    let given = Arc::new(Given::of(&[&chain.a, &chain.b]).expect("layers"));
    let options = SnapshotOptions::default().ancestors(given.clone());
    let open = |file: &File| Snapshot::open_with(file.store(), &options).expect("open");
    let (b, c) = (open(&chain.b), open(&chain.c));
    let same = |one: Option<&Arc<Layer>>, other: Option<&Arc<Layer>>| {
        Arc::ptr_eq(one.expect("a layer"), other.expect("a layer"))
    };
    assert!(same(b.layer(1), c.layer(2)));
    assert_eq!(given.0.len(), 2);
}
