//! `trace`, `optimize` and `create --trace`.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use snaprestore_fixtures::images::Mix;
use snapshot_format::trace::{Touch, TouchReason, Trace, TraceEnd};
use snapshot_format::{Page, Reason, Snapshot};

use crate::common::{Folder, noise, number, remarks, run};
use crate::elf_core::{Core, Load};

const PAGE: usize = 4096;

/// Returns a trace of these pages of a snapshot.
pub(crate) fn trace_of(folder: &Folder, snapshot: &str, pages: &[u64]) -> Trace {
    let snapshot = Snapshot::open_path(folder.file(snapshot)).unwrap();
    let touches = pages.iter().zip(1..).map(|(page, number)| Touch {
        page: *page,
        at: Duration::from_millis(number),
        reason: TouchReason::Demand,
    });
    Trace {
        content_digest: snapshot.summary().content_digest,
        page_slots: snapshot.page_slots(),
        begun: SystemTime::UNIX_EPOCH + Duration::from_secs(951_782_400),
        present_at_start: 7,
        end: TraceEnd::Settled,
        touches: touches.collect(),
    }
}

/// Writes a trace of these pages of a snapshot.
pub(crate) fn write_trace(folder: &Folder, name: &str, snapshot: &str, pages: &[u64]) {
    let trace = trace_of(folder, snapshot, pages);
    trace.write_path(folder.file(name), true).unwrap();
}

/// Returns every third page of an image, in an order that has nothing to do with addresses.
pub(crate) fn scattered(pages: u64) -> Vec<u64> {
    let wanted = pages / 3;
    (0..wanted).map(|n| n * 7919 % wanted * 3).collect()
}

/// Creates `image.raw`, and `image.snap` of it.
fn image(folder: &Folder) -> Vec<u8> {
    let memory = Mix::new(4200, 3).bytes();
    folder.write("image.raw", &memory);
    run(folder, &["create", "image.raw", "-o", "image.snap"]).exits(0);
    memory
}

fn info(folder: &Folder, file: &str) -> Value {
    run(folder, &["info", file, "--json"]).exits(0).json()
}

/// Asserts that a snapshot is good, and holds `memory`.
#[track_caller]
fn holds(folder: &Folder, snapshot: &str, memory: &[u8]) {
    run(folder, &["verify", snapshot, "--chain"]).exits(0);
    let extracted = run(folder, &["extract", snapshot, "-o", "-", "-q"]).exits(0);
    assert!(extracted.out == memory, "{snapshot} holds other memory");
}

/// Offsets of the frames of these pages, without those of pages that no frame stores.
fn offsets(folder: &Folder, snapshot: &str, pages: &[u64]) -> Vec<u64> {
    let snapshot = Snapshot::open_path(folder.file(snapshot)).unwrap();
    let places = pages
        .iter()
        .map(|page| match snapshot.look_up(*page, Reason::Demand) {
            Ok(Page::Stored { frame, .. }) => Some(frame.offset()),
            _ => None,
        });
    places.flatten().collect()
}

#[test]
fn optimized_snapshot_has_the_touched_pages_first() {
    let folder = Folder::new();
    let memory = image(&folder);
    let pages = scattered(4200);
    write_trace(&folder, "a.trace", "image.snap", &pages);
    let args = [
        "optimize",
        "image.snap",
        "-o",
        "new.snap",
        "--trace",
        "a.trace",
        "--json",
    ];
    let report = run(&folder, &args).exits(0).json();
    holds(&folder, "new.snap", &memory);
    let (old, new) = (info(&folder, "image.snap"), info(&folder, "new.snap"));
    assert_eq!(new["content_digest"], old["content_digest"]);
    assert_eq!(new["state_digest"], old["state_digest"]);
    assert_eq!(report["content_digest"], old["content_digest"]);
    assert_eq!(
        number(&report, "old_file_bytes"),
        number(&old, "file_bytes")
    );
    let set = &report["working_set"];
    assert_eq!(set["name"], "default");
    assert_eq!(number(set, "pages"), pages.len() as u64);
    let sets = new["working_sets"].as_array().unwrap();
    assert_eq!(sets.len(), 1);
    assert_eq!(
        (&sets[0]["name"], &sets[0]["pages"]),
        (&json!("default"), &set["pages"])
    );

    // The stored ones lie in the given bytes at the front, and nothing else does.
    let end = 4096 + number(set, "stored_bytes");
    let hot = offsets(&folder, "new.snap", &pages);
    assert_eq!(
        hot.len() as u64,
        pages.len() as u64 - number(set, "not_stored_pages")
    );
    assert!(hot.iter().all(|offset| *offset < end));
    let snapshot = Snapshot::open_path(folder.file("image.snap")).unwrap();
    let hot_place = |page: u64| match snapshot.look_up(page, Reason::Demand) {
        Ok(Page::Stored { frame, slot }) => Some((frame.offset(), slot)),
        _ => None,
    };
    let places: std::collections::HashSet<_> =
        pages.iter().filter_map(|page| hot_place(*page)).collect();
    let cold = (0..4200).filter(|page| hot_place(*page).is_some_and(|at| !places.contains(&at)));
    let cold = offsets(&folder, "new.snap", &cold.collect::<Vec<_>>());
    assert!(cold.iter().all(|offset| *offset >= end));
    // A frame has pages that were touched one after another.
    let first = hot[0];
    assert_eq!(first, 4096);
    // Some pages share a slot with one that was touched before.
    let changes = hot.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(4 * changes < hot.len(), "{changes} changes of the frame");
    let grown = number(&new, "file_bytes") * 100 / number(&old, "file_bytes");
    assert!(grown <= 105, "{grown} % of the old file");
}

#[test]
fn optimized_file_replaces_its_source() {
    let folder = Folder::new();
    let memory = image(&folder);
    write_trace(&folder, "a.trace", "image.snap", &[100, 7, 3000]);
    let text = |args: &[&str]| {
        let run = run(&folder, args).exits(0);
        run.text()
    };
    let optimize = [
        "optimize",
        "image.snap",
        "-o",
        "image.snap",
        "--trace",
        "a.trace",
    ];
    let told = text(&[&optimize[..], &["--name", "boot"]].concat());
    assert!(
        told.contains("replaced    image.snap (its ID was "),
        "{told}"
    );
    assert!(
        told.contains("working set \"boot\": 3 pages of 1 trace; "),
        "{told}"
    );
    holds(&folder, "image.snap", &memory);
    // The trace still fits, and another set is added.
    text(&optimize);
    let sets = info(&folder, "image.snap")["working_sets"].clone();
    let names: Vec<&Value> = sets
        .as_array()
        .unwrap()
        .iter()
        .map(|set| &set["name"])
        .collect();
    assert_eq!(names, ["default", "boot"]);
    holds(&folder, "image.snap", &memory);
    assert_eq!(folder.names(), ["a.trace", "image.raw", "image.snap"]);
}

#[test]
fn several_traces_are_merged() {
    let folder = Folder::new();
    image(&folder);
    for (name, pages) in [("1", [5, 6, 7]), ("2", [6, 5, 8]), ("3", [9, 6, 5])] {
        write_trace(&folder, name, "image.snap", &pages);
    }
    let traces = [
        "--trace", "1", "--trace", "2", "--trace", "3", "--force", "--json",
    ];
    let pages = |more: &[&str]| {
        let optimize = ["optimize", "image.snap", "-o", "new.snap"];
        let report = run(&folder, &[&optimize[..], &traces, more].concat());
        let report = report.exits(0).json();
        number(&report["working_set"], "pages")
    };
    assert_eq!(pages(&[]), 2);
    assert_eq!(pages(&["--min-share", "0.3"]), 5);
    assert_eq!(pages(&["--min-share", "1"]), 2);

    let merge = ["trace", "merge", "1", "2", "3", "-o", "all", "--json"];
    let report = run(&folder, &merge).exits(0).json();
    assert_eq!(
        (number(&report, "touched_pages"), &report["end"]),
        (2, &json!("merged"))
    );
    let kept = report["sources"].as_array().unwrap().iter();
    assert!(
        kept.map(|source| number(source, "kept_pages"))
            .all(|kept| kept == 2)
    );
    let merged = Trace::read_path(folder.file("all")).unwrap();
    // Equal median ranks: the lower number comes first.
    assert_eq!(merged.pages(), [5, 6]);
    let exists = "all exists already; --force replaces it";
    run(&folder, &merge).exits(1).says(&[exists]);
    // The same to standard output.
    let written = folder.read("all");
    let piped = run(&folder, &["trace", "merge", "1", "2", "3", "-o", "-"]).exits(0);
    assert!(piped.out == written, "another trace is written");
    piped.says(&["written     2 pages, 8.00 KiB: standard output"]);
    let json = run(&folder, &["trace", "merge", "1", "-o", "-", "--json"]);
    json.exits(2).says(&["name a file"]);
    let over = ["trace", "merge", "1", "2", "-o", "1", "--force"];
    let read = "is read to make the output";
    run(&folder, &over).exits(2).says(&[read]);
    let usage = run(
        &folder,
        &["trace", "merge", "1", "-o", "x", "--min-share", "2"],
    );
    usage.exits(2).says(&["must be a number from 0 to 1"]);
}

#[test]
fn traces_are_shown_and_compared() {
    let folder = Folder::new();
    image(&folder);
    write_trace(&folder, "a", "image.snap", &[5, 6, 7, 100]);
    write_trace(&folder, "b", "image.snap", &[6, 5, 8, 9, 100]);
    let shown = run(&folder, &["trace", "show", "a"]).exits(0).text();
    for line in [
        "touched     4 pages, 16.00 KiB: 0.1 % of the 4,608 page numbers of the memory",
        "times       half by 2.0 ms, 90 % by 4.0 ms, all by 4.0 ms",
        "order       the next page is the next touch in 66.7 % of the cases",
        "seen        4 by faults, 0 by other means; 7 pages were present at the start",
        "recorded    2000-02-29T00:00:00Z; end: the rate of first touches settled",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    let json = run(&folder, &["trace", "show", "a", "--json"])
        .exits(0)
        .json();
    assert_eq!(
        json["content_digest"],
        info(&folder, "image.snap")["content_digest"]
    );
    assert_eq!(
        (number(&json, "half_us"), &json["end"]),
        (2000, &json!("settled"))
    );

    write_trace(&folder, "none", "image.snap", &[]);
    let shown = run(&folder, &["trace", "show", "none"]).exits(0).text();
    let lines: Vec<&str> = shown.lines().skip(1).collect();
    let expected = [
        "touched     no page; the memory has 4,608 page numbers",
        "present     7 pages at the start",
        "recorded    2000-02-29T00:00:00Z; end: the rate of first touches settled",
    ];
    assert_eq!(lines, expected);

    let json = run(&folder, &["trace", "compare", "a", "b", "--json"])
        .exits(0)
        .json();
    let counts = ["common_pages", "only_a_pages", "only_b_pages"].map(|key| number(&json, key));
    assert_eq!(counts, [3, 1, 2]);
    assert_eq!(
        (&json["precision"], &json["recall"]),
        (&json!(0.75), &json!(0.6))
    );
    assert_eq!(
        (&json["order"], &json["same_content"]),
        (&json!(0.5), &json!(true))
    );
    let text = run(&folder, &["trace", "compare", "a", "b"])
        .exits(0)
        .text();
    for line in [
        "precision   75.0 % of A",
        "recall      60.0 % of B",
        "correlation 0.500",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn traces_of_other_memory_are_refused() {
    let folder = Folder::new();
    let mut memory = image(&folder);
    write_trace(&folder, "a", "image.snap", &[5, 6]);
    memory[5 * PAGE] ^= 1;
    folder.write("other.raw", &memory);
    run(&folder, &["create", "other.raw", "-o", "other.snap"]).exits(0);
    write_trace(&folder, "b", "other.snap", &[5, 6]);
    let digests = ["image.snap", "other.snap"].map(|file| {
        let digest = info(&folder, file)["content_digest"].clone();
        digest.as_str().unwrap().to_owned()
    });
    let optimize = [
        "optimize",
        "image.snap",
        "-o",
        "new.snap",
        "--trace",
        "a",
        "--trace",
        "b",
    ];
    run(&folder, &optimize)
        .exits(1)
        .says(&["b: ", "image.snap", &digests[0], &digests[1]]);
    let merge = run(&folder, &["trace", "merge", "a", "b", "-o", "new"]).exits(1);
    merge.says(&["b: ", &digests[0], &digests[1]]);
    let compared = run(&folder, &["trace", "compare", "a", "b", "--json"]).exits(0);
    assert_eq!(compared.json()["same_content"], json!(false));
    assert!(!folder.file("new.snap").exists() && !folder.file("new").exists());
}

#[test]
fn damaged_traces_are_refused_with_their_place() {
    let folder = Folder::new();
    image(&folder);
    write_trace(&folder, "a", "image.snap", &[5, 6]);
    let good = folder.read("a");
    let mut flipped = good.clone();
    flipped[130] ^= 1;
    for (bytes, says) in [
        (&good[..100], "truncated trace"),
        (&good[..160], "160 bytes where 164 are expected"),
        (&flipped[..], "damaged trace at byte 160: checksum"),
        (b"nothing", "not a trace"),
    ] {
        folder.write("a", bytes);
        let show: &[&str] = &["trace", "show", "a"];
        let optimize = &["optimize", "image.snap", "-o", "image.snap", "--trace", "a"];
        let create = &["create", "image.raw", "-o", "new.snap", "--trace", "a"];
        for args in [show, optimize, create] {
            run(&folder, args).exits(3).says(&["a: ", says]);
        }
    }
    assert_eq!(folder.names(), ["a", "image.raw", "image.snap"]);
}

#[test]
fn outputs_that_cannot_be_read_again_are_refused() {
    let folder = Folder::new();
    image(&folder);
    write_trace(&folder, "a", "image.snap", &[5, 6]);
    let optimize = ["optimize", "image.snap", "--trace", "a", "-o"];
    let streamed = run(&folder, &[&optimize[..], &["-"]].concat());
    streamed.exits(2).says(&["name a file to write"]);
    let trace = run(&folder, &[&optimize[..], &["a", "--force"]].concat());
    trace.exits(2).says(&["a: is read to make the output"]);
    let create = ["create", "image.raw", "--trace", "a", "-o", "-"];
    run(&folder, &create)
        .exits(2)
        .says(&["--trace needs a file"]);
}

#[test]
fn optimized_child_keeps_its_base() {
    let folder = Folder::new();
    let mut memory = image(&folder);
    memory[..40 * PAGE].copy_from_slice(&noise(40 * PAGE));
    folder.write("child.raw", &memory);
    let create = [
        "create",
        "child.raw",
        "--base",
        "image.snap",
        "-o",
        "child.snap",
    ];
    run(&folder, &create).exits(0);
    let base = folder.read("image.snap");
    write_trace(&folder, "a", "child.snap", &scattered(4200));
    let optimize = [
        "optimize",
        "child.snap",
        "-o",
        "child.snap",
        "--trace",
        "a",
        "--json",
    ];
    let report = run(&folder, &optimize).exits(0).json();
    assert!(
        number(&report["working_set"], "from_ancestors") > 100,
        "{report}"
    );
    assert!(number(&report, "ancestor_pages") > 100, "{report}");
    holds(&folder, "child.snap", &memory);
    assert!(folder.read("image.snap") == base, "the base changed");
    let ancestors = info(&folder, "child.snap")["ancestors"].clone();
    assert_eq!(ancestors.as_array().unwrap().len(), 1);
    assert_eq!(remarks(&report), []);
    let away = ["optimize", "child.snap", "-o", "other/x", "--trace", "a"];
    std::fs::create_dir(folder.file("other")).unwrap();
    let told = run(&folder, &away).exits(0).text();
    let note =
        "note        the new snapshot has 1 ancestor in other folders (the first was image.snap)";
    assert!(told.contains(note), "{told}");
    let labels = told.lines().filter(|line| line.starts_with("frames "));
    assert_eq!(labels.count(), 1, "{told}");
    let args = [&away[..], &["--force", "--json"]].concat();
    let elsewhere = [("base.elsewhere".to_owned(), 1)];
    assert_eq!(remarks(&run(&folder, &args).exits(0).json()), elsewhere);

    // A base that others need is not replaced; a new one takes its place by `rebase`.
    let optimize = ["optimize", "image.snap", "--trace", "b", "-o"];
    write_trace(&folder, "b", "image.snap", &scattered(4200));
    let refused = run(&folder, &[&optimize[..], &["image.snap"]].concat());
    refused.exits(2).says(&["is an ancestor of", "child.snap"]);
    run(&folder, &[&optimize[..], &["new.snap"]].concat()).exits(0);
    let rebase = ["rebase", "child.snap", "--base", "new.snap", "--json"];
    let away = run(&folder, &[&rebase[..], &["-o", "other/y"]].concat());
    assert_eq!(remarks(&away.exits(0).json()), elsewhere);
    assert_eq!(remarks(&run(&folder, &rebase).exits(0).json()), []);
    holds(&folder, "child.snap", &memory);
}

#[test]
fn create_packs_in_the_order_of_a_trace() {
    let folder = Folder::new();
    let mut memory = image(&folder);
    let pages = scattered(4200);
    write_trace(&folder, "a", "image.snap", &pages);
    folder.write("state", b"the state");
    let create = [
        "create",
        "image.raw",
        "-o",
        "new.snap",
        "--trace",
        "a",
        "--json",
    ];
    let attach = ["--attach", "vm=state"];
    let report = run(&folder, &[&create[..], &attach].concat())
        .exits(0)
        .json();
    assert_eq!(remarks(&report), []);
    assert_eq!(number(&report["working_set"], "pages"), pages.len() as u64);
    holds(&folder, "new.snap", &memory);
    assert_eq!(offsets(&folder, "new.snap", &pages)[0], 4096);
    assert_eq!(info(&folder, "new.snap")["attachments"][0]["name"], "vm");

    // A later snapshot of the machine: the order is used, and the summary says that the content is
    // another.
    memory[5 * PAGE..9 * PAGE].copy_from_slice(&noise(4 * PAGE));
    folder.write("image.raw", &memory);
    let report = run(&folder, &[&create[..], &["--force"]].concat())
        .exits(0)
        .json();
    assert_eq!(remarks(&report), [("traces.other_content".to_owned(), 1)]);
    holds(&folder, "new.snap", &memory);
    let child = [
        "create",
        "image.raw",
        "--base",
        "image.snap",
        "-o",
        "child.snap",
    ];
    let report = run(&folder, &[&child[..], &["--trace", "a", "--json"]].concat());
    let report = report.exits(0).json();
    assert_eq!(report["base"]["file"], "image.snap");
    holds(&folder, "child.snap", &memory);

    // Memory of another size: found before the source is read, which is no diff of this base.
    folder.write("long.raw", &[]);
    let long = std::fs::File::options()
        .write(true)
        .open(folder.file("long.raw"));
    long.unwrap().set_len(9000 * PAGE as u64).unwrap();
    let args = ["create", "long.raw", "-o", "n", "--base", "image.snap"];
    run(&folder, &args).exits(1).says(&["the diff is at least"]);
    run(&folder, &[&args[..], &["--trace", "a"]].concat())
        .exits(1)
        .says(&[
            "a: the trace is of memory with 4608 page numbers",
            " has 9216;",
        ]);
    folder.write("small.raw", &memory[..1000 * PAGE]);
    let small = ["create", "small.raw", "-o", "small.snap", "--trace", "a"];
    run(&folder, &small)
        .exits(1)
        .says(&["a: ", "create the snapshot without --trace"]);
    assert!(!folder.file("small.snap").exists());
}

#[test]
fn core_is_packed_in_the_order_of_its_own_trace() {
    let folder = Folder::new();
    // Regions of which none fills its last block, and two segments that form one region.
    for (name, qemu) in [("process", false), ("guest", true)] {
        let load = |start: u64, pages| Load {
            start,
            bytes: noise(pages * PAGE),
            memory_bytes: (pages * PAGE) as u64,
        };
        let core = Core {
            loads: vec![
                load(0x10_0000, 600),
                load(0x10_0000 + 600 * 4096, 20),
                load(0x8000_0000, 513),
            ],
            qemu,
            ..Core::default()
        };
        folder.write(name, &core.bytes());
        let create = ["create", name, "--force", "-o", "s"];
        run(&folder, &create).exits(0);
        write_trace(&folder, "t", "s", &[5, 599, 7]);
        let report = run(
            &folder,
            &[&create[..], &["--trace", "t", "--json"]].concat(),
        );
        let report = report.exits(0).json();
        assert_eq!(remarks(&report), [], "{name}");
        assert_eq!(number(&report["working_set"], "pages"), 3, "{name}");
    }
}

#[test]
fn flattened_and_optimized_snapshot_has_one_summary() {
    let folder = Folder::new();
    let mut memory = image(&folder);
    memory[..40 * PAGE].copy_from_slice(&noise(40 * PAGE));
    folder.write("child.raw", &memory);
    write_trace(&folder, "a", "image.snap", &scattered(4200));
    let args = [
        "create",
        "child.raw",
        "--base",
        "image.snap",
        "--holes",
        "zero",
        "-o",
        "new.snap",
        "--flatten-after",
        "0",
        "--trace",
        "a",
    ];
    let told = run(&folder, &args).exits(0).text();
    let lines = |label: &str| told.lines().filter(|line| line.starts_with(label)).count();
    assert_eq!((lines("frames "), lines("flattened ")), (1, 1), "{told}");
    // The frames of the file in between are of no interest.
    assert_eq!(lines("rewritten "), 0, "{told}");
    assert!(
        told.contains("pages copied from it and its ancestors"),
        "{told}"
    );
    let report = run(&folder, &[&args[..], &["--force", "--json"]].concat());
    let report = report.exits(0).json();
    assert_eq!(number(&report["flattened"], "ancestors"), 1);
    assert!(report["flattened"]["copied_frames"].is_null(), "{report}");
    holds(&folder, "new.snap", &memory);
}
