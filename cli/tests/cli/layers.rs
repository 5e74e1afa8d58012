//! Layered snapshots: children that hold what differs from a base, and their chains.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use serde_json::Value;
use snaprestore_fixtures::images::Mix;

use crate::common::{Folder, Run, command, noise, number, remarks, run};
use crate::elf_core::{Core, Load};
use crate::owner::Owner;
use crate::restore::possible;

const PAGE: usize = 4096;
/// Pages of the base, of which the last block is a short one.
const PAGES: usize = 2100;

/// Creates the image `base.raw` and its snapshot `base.snap`; returns the image.
pub(crate) fn base(folder: &Folder) -> Vec<u8> {
    let bytes = Mix::new(PAGES as u64, 3).bytes();
    folder.write("base.raw", &bytes);
    run(folder, &["create", "base.raw", "-o", "base.snap"]).exits(0);
    bytes
}

/// Changes granules of `granule` pages, every `stride` pages from page `first` on, and writes them
/// to a sparse file of full length, as Firecracker does. Returns the number of changed pages.
pub(crate) fn write_diff(
    folder: &Folder,
    name: &str,
    memory: &mut [u8],
    (granule, stride, first): (usize, usize, usize),
) -> usize {
    let file = File::create(folder.file(name)).unwrap();
    file.set_len(memory.len() as u64).unwrap();
    let pages = memory.len() / PAGE;
    let mut changed = 0;
    for page in (first..pages).step_by(stride) {
        let range = page * PAGE..(page + granule).min(pages) * PAGE;
        // The pages of all diffs of these tests differ.
        let seed = (page + memory.len() * first) as u64;
        let new = Mix::new((range.len() / PAGE) as u64, seed).bytes();
        memory[range.clone()].copy_from_slice(&new);
        file.write_all_at(&new, range.start as u64).unwrap();
        changed += range.len() / PAGE;
    }
    changed
}

#[track_caller]
pub(crate) fn create(
    folder: &Folder,
    source: &str,
    base: &str,
    child: &str,
    more: &[&str],
) -> Value {
    let args = ["create", source, "--base", base, "-o", child, "--json"];
    run(folder, &[&args[..], more].concat()).exits(0).json()
}

/// Runs the command with a file's bytes in a pipe as its standard input.
fn piped(folder: &Folder, file: &str, args: &[&str]) -> Run {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let bytes = folder.read(file);
    // Fails if the command refuses the pipe.
    let feeder = std::thread::spawn(move || writer.write_all(&bytes));
    let mut command = command(args);
    let run = Run::to_end(command.current_dir(folder.path()).stdin(reader));
    // The read end is closed with the command that holds it.
    drop(command);
    let _ = feeder.join().expect("the feeder does not panic");
    run
}

/// Asserts that a snapshot is good and holds `memory`.
#[track_caller]
pub(crate) fn holds(folder: &Folder, snapshot: &str, memory: &[u8]) {
    run(folder, &["verify", snapshot]).exits(0);
    run(folder, &["extract", snapshot, "-o", "out", "--force"]).exits(0);
    assert!(folder.read("out") == memory, "{snapshot}");
}

#[test]
fn diffs_of_4_kib_and_2_mib_restore_byte_for_byte() {
    let folder = Folder::new();
    let base = base(&folder);
    for (name, diff) in [("4k", (1, 7, 5)), ("2m", (512, 1024, 512))] {
        let mut memory = base.clone();
        let changed = write_diff(&folder, "diff", &mut memory, diff);
        let report = create(&folder, "diff", "base.snap", name, &[]);
        let hole_bytes = ((PAGES - changed) * PAGE) as u64;
        let expected = [("source.base_hole_bytes".to_owned(), hole_bytes)];
        assert_eq!(remarks(&report), expected, "every hole is seen");
        let stored = number(&report, "stored_pages");
        assert!(stored <= changed as u64, "{name}: {stored} of {changed}");
        assert_eq!(
            report["base"]["pages"], report["ancestor_pages"],
            "{report}"
        );
        assert!(number(&report, "ancestor_pages") > 0);
        holds(&folder, name, &memory);
        folder.write("memory", &memory);
        if possible(&folder, "diffs_of_4_kib_and_2_mib_restore_byte_for_byte") {
            for touch in ["sequential", "random"] {
                let restore = ["restore", name, "--check", "memory", "--touch", touch];
                run(&folder, &restore).exits(0);
            }
        }
    }
}

#[test]
fn image_with_a_known_base_stores_only_what_differs() {
    let folder = Folder::new();
    let mut memory = base(&folder);
    let block = 600 * PAGE..601 * PAGE;
    memory[block].copy_from_slice(&noise(PAGE));
    memory[1500 * PAGE..1501 * PAGE].fill(0);
    folder.write("dense", &memory);
    let report = create(&folder, "dense", "base.snap", "of-dense", &[]);
    assert_eq!(number(&report, "stored_pages"), 1);
    holds(&folder, "of-dense", &memory);

    // The same image with holes for its zero pages, one of which is not zero in the base.
    let sparse = File::create(folder.file("sparse")).unwrap();
    sparse.set_len(memory.len() as u64).unwrap();
    for (page, bytes) in memory.chunks(PAGE).enumerate() {
        if bytes.iter().any(|&byte| byte != 0) {
            sparse.write_all_at(bytes, (page * PAGE) as u64).unwrap();
        }
    }
    let zero = ["--holes", "zero"];
    let report = create(&folder, "sparse", "base.snap", "of-sparse", &zero);
    assert_eq!(number(&report, "stored_pages"), 1);
    assert_eq!(report["remarks"][0]["key"], "source.hole_bytes");
    holds(&folder, "of-sparse", &memory);
    let digest = |name| run(&folder, &["info", name, "--json"]).json()["content_digest"].take();
    assert_eq!(digest("of-sparse"), digest("of-dense"));

    // Through a pipe.
    let args = ["create", "-", "--base", "base.snap", "-o", "of-pipe"];
    piped(&folder, "dense", &[&args[..], &zero].concat()).exits(0);
    assert_eq!(digest("of-pipe"), digest("of-dense"));
}

#[test]
fn chain_of_four_holds_every_state() {
    let folder = Folder::new();
    let mut memory = base(&folder);
    let first = memory.clone();
    let mut states = vec![("base.snap".to_owned(), memory.clone())];
    for number in 1..4 {
        write_diff(&folder, "diff", &mut memory, (1, 40, number));
        let child = format!("{number}.snap");
        create(&folder, "diff", &states[number - 1].0, &child, &[]);
        states.push((child, memory.clone()));
    }
    fs::remove_file(folder.file("diff")).unwrap();
    for (name, memory) in states.iter().rev() {
        holds(&folder, name, memory);
    }

    let info = run(&folder, &["info", "3.snap", "--json"]).exits(0).json();
    let ancestors = info["ancestors"].as_array().unwrap();
    assert_eq!(ancestors.len(), 3, "{info}");
    let mut pages = 0;
    for ancestor in ancestors {
        let file = ancestor["file"].as_str().unwrap();
        let other = run(&folder, &["info", file, "--json"]).exits(0).json();
        assert_eq!(ancestor["snapshot_id"], other["snapshot_id"]);
        assert_eq!(ancestor["file_bytes"], other["file_bytes"]);
        assert!(number(ancestor, "pages") > 0, "{info}");
        pages += number(ancestor, "pages");
    }
    assert_eq!(number(&info, "ancestor_pages"), pages);
    let kinds = ["zero", "fill", "duplicate", "stored", "ancestor"];
    let sum: u64 = kinds
        .map(|kind| number(&info, &format!("{kind}_pages")))
        .iter()
        .sum();
    assert_eq!(sum, PAGES as u64);
    let id = info["properties"]["base.id"].as_str().unwrap();
    assert_eq!(
        id,
        run(&folder, &["info", "2.snap", "--json"]).json()["snapshot_id"]
    );
    let text = run(&folder, &["info", "3.snap"]).exits(0).text();
    for part in ["layer", "3.snap", "2.snap", "1.snap", "base.snap"] {
        assert!(text.contains(part), "{text}");
    }
    let plain = run(&folder, &["info", "base.snap", "--json"]).json();
    assert_eq!(plain["ancestors"], serde_json::json!([]));
    assert_eq!(number(&plain, "ancestor_pages"), 0);

    // Memory that returns to what an ancestor holds.
    folder.write("first", &first);
    let report = create(&folder, "first", "3.snap", "4.snap", &[]);
    assert!(number(&report, "stored_pages") < 60, "{report}");
    holds(&folder, "4.snap", &first);
}

/// Creates a base and its child in a folder, and returns the base's id.
fn child(folder: &Folder) -> (Vec<u8>, String) {
    let mut memory = base(folder);
    write_diff(folder, "diff", &mut memory, (1, 37, 5));
    create(folder, "diff", "base.snap", "child.snap", &[]);
    let info = run(folder, &["info", "base.snap", "--json"]).json();
    (memory, info["snapshot_id"].as_str().unwrap().to_owned())
}

#[test]
fn missing_ancestor_is_named_with_folders_and_remedy() {
    let folder = Folder::new();
    let (memory, id) = child(&folder);
    fs::create_dir(folder.file("old")).unwrap();
    fs::create_dir(folder.file("empty")).unwrap();
    fs::rename(folder.file("base.snap"), folder.file("old/renamed")).unwrap();
    let names = folder.names();
    for args in [
        &["info", "child.snap"][..],
        &["verify", "child.snap"],
        &["verify", "child.snap", "--chain"],
        &["extract", "child.snap", "-o", "out"],
        &["restore", "child.snap"],
        &["create", "base.raw", "--base", "child.snap", "-o", "out"],
    ] {
        let told = run(&folder, &[args, &["--layers", "empty"]].concat()).exits(1);
        told.says(&[
            "child.snap: is layered",
            &id,
            "last known as base.snap",
            "searched: ., empty",
            "--layers DIR or SNAPRESTORE_LAYERS",
        ]);
    }
    assert_eq!(folder.names(), names, "nothing was left behind");

    // In another folder, and under another name.
    let extract = ["extract", "child.snap", "-o", "out", "--force"];
    let layers = ["--layers", "empty", "--layers", "old"];
    run(&folder, &[&extract[..], &layers].concat()).exits(0);
    assert!(folder.read("out") == memory);
    for args in [
        &["info", "child.snap"][..],
        &["verify", "child.snap"],
        &["verify", "child.snap", "--chain"],
        &["create", "base.raw", "--base", "child.snap", "-o", "new"],
    ] {
        run(&folder, &[args, &layers].concat()).exits(0);
    }
    let mut by_variable = command(extract);
    by_variable
        .current_dir(folder.path())
        .env("SNAPRESTORE_LAYERS", "empty::old");
    Run::to_end(&mut by_variable).exits(0);

    // Beside the child, under another name.
    fs::rename(folder.file("old/renamed"), folder.file("renamed")).unwrap();
    holds(&folder, "child.snap", &memory);

    let wrong = [&extract[..], &["--layers", "child.snap"]].concat();
    run(&folder, &wrong)
        .exits(2)
        .says(&["child.snap: is not a folder"]);
    let wrong = [&extract[..], &["--layers", "none"]].concat();
    run(&folder, &wrong)
        .exits(1)
        .says(&["none: cannot search it"]);
}

#[test]
fn truncated_or_replaced_ancestor_is_an_error() {
    let folder = Folder::new();
    let (memory, id) = child(&folder);
    let whole = folder.read("base.snap");
    let extract = ["extract", "child.snap", "-o", "new"];

    folder.write("base.snap", &whole[..whole.len() - 1]);
    run(&folder, &extract).exits(3).says(&[&id, "base.snap"]);
    let verified = run(&folder, &["verify", "child.snap"]).exits(3).text();
    assert!(verified.contains("base.snap"), "{verified}");

    // The same memory, repacked.
    run(
        &folder,
        &["create", "base.raw", "-o", "base.snap", "--force"],
    )
    .exits(0);
    run(&folder, &extract).exits(1).says(&[
        "child.snap: is layered",
        &id,
        "base.snap: is not the file that was recorded",
        "its id is",
        "--layers DIR",
    ]);
    assert!(!folder.file("new").exists());

    folder.write("base.snap", &whole);
    holds(&folder, "child.snap", &memory);
}

/// Returns the damage that a test does to a file of a chain, by name.
fn damages(whole: &[u8]) -> [(&'static str, Option<Vec<u8>>); 4] {
    let mut trailer = whole.to_vec();
    let at = trailer.len() - 100;
    trailer[at] ^= 1;
    [
        ("missing", None),
        ("truncated", Some(whole[..whole.len() / 2].to_vec())),
        ("replaced", None),
        ("damaged trailer", Some(trailer)),
    ]
}

/// Whatever happens to whichever file of a chain, no command does anything before it says so.
#[test]
fn each_lost_file_of_a_chain_is_an_error_by_name() {
    let folder = Folder::new();
    let mut memory = base(&folder);
    write_diff(&folder, "diff", &mut memory, (1, 40, 1));
    create(&folder, "diff", "base.snap", "middle.snap", &[]);
    write_diff(&folder, "diff", &mut memory, (1, 40, 2));
    create(&folder, "diff", "middle.snap", "child.snap", &[]);
    let id = |name| run(&folder, &["info", name, "--json"]).json()["snapshot_id"].to_string();
    let ids: Vec<_> = ["base.snap", "middle.snap", "child.snap"]
        .map(|name| (name, id(name).trim_matches('"').to_owned()))
        .into();
    fs::create_dir(folder.file("empty")).unwrap();
    // The same memory, repacked.
    run(&folder, &["create", "base.raw", "-o", "other"]).exits(0);
    let other = folder.read("other");
    fs::remove_file(folder.file("other")).unwrap();
    for (victim, id) in &ids {
        let whole = folder.read(victim);
        for (damage, bytes) in damages(&whole) {
            fs::remove_file(folder.file(victim)).unwrap();
            match (damage, bytes) {
                ("replaced", _) => folder.write(victim, &other),
                (_, Some(bytes)) => folder.write(victim, &bytes),
                (_, None) => {}
            }
            let names = folder.names();
            let is_child = *victim == "child.snap";
            for args in [
                &["info", "child.snap"][..],
                &["verify", "child.snap"],
                &["verify", "child.snap", "--chain"],
                &["extract", "child.snap", "-o", "out"],
                &["restore", "child.snap"],
                &["create", "diff", "--base", "child.snap", "-o", "out"],
            ] {
                let run = run(&folder, &[args, &["--layers", "empty"]].concat());
                let case = format!("{damage} {victim}: {args:?}");
                if is_child && damage == "replaced" {
                    // Another good snapshot.
                    assert_eq!(run.code, Some(0), "{case}: {}", run.err);
                    let _ = fs::remove_file(folder.file("out"));
                    continue;
                }
                let code = match damage {
                    "missing" | "replaced" => 1,
                    _ => 3,
                };
                assert_eq!(run.code, Some(code), "{case}: {}{}", run.text(), run.err);
                // `verify` reports damage on standard output.
                let said = run.text() + &run.err;
                assert!(said.contains(victim), "{case}: {said}");
                if !is_child {
                    assert!(said.contains(id), "{case}: {said}");
                    assert!(said.contains("child.snap"), "{case}: {said}");
                }
                if !is_child && damage == "missing" {
                    let searched = ["searched: ., empty", "--layers DIR or SNAPRESTORE_LAYERS"];
                    let all = searched.iter().all(|part| said.contains(part));
                    assert!(all, "{case}: {said}");
                }
                assert_eq!(folder.names(), names, "{case} left a file");
            }
            folder.write(victim, &whole);
        }
    }
    holds(&folder, "child.snap", &memory);
}

/// Memory of a VM with more than 3 GiB is in two slots, with a gap between their addresses and none
/// in the file. Slots begin and end at any page, also within a block.
#[test]
fn diff_of_several_memory_slots_equals_their_memory() {
    let folder = Folder::new();
    let slots = [(3 << 30) / PAGE, 700, 1 << 18, 1];
    let pages: usize = slots.iter().sum();
    let sparse = |name: &str| {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(folder.file(name))
            .unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        file
    };
    let ends: Vec<usize> = slots
        .iter()
        .scan(0, |end, slot| {
            *end += slot;
            Some(*end)
        })
        .collect();
    // Content about each end of a slot, and far from any.
    let put = |file: &File, first: usize, count: usize, seed: u64| {
        let count = count.min(pages - first);
        let bytes = Mix::new(count as u64, seed).bytes();
        file.write_all_at(&bytes, (first * PAGE) as u64).unwrap();
    };
    let memory = sparse("memory");
    for (seed, end) in (10..).zip(&ends) {
        put(&memory, end.saturating_sub(40), 80, seed);
    }
    put(&memory, 1000, 600, 20);
    let flat = |name: &str| {
        let args = ["create", "memory", "--holes", "zero", "-o", name, "--json"];
        run(&folder, &args).exits(0).json()
    };
    flat("base.snap");
    // Single pages, and 2 MiB of huge pages, across the ends.
    for (granule, (name, base)) in [(1, ("4k", "base.snap")), (512, ("2m", "4k"))] {
        let _ = fs::remove_file(folder.file("diff"));
        let diff = sparse("diff");
        for (seed, end) in (30..).zip(&ends) {
            let first = (end - 1) / granule * granule;
            for page in [first, first + granule] {
                if page < pages {
                    put(&diff, page, granule, seed + granule as u64);
                    put(&memory, page, granule, seed + granule as u64);
                }
            }
        }
        let report = create(&folder, "diff", base, name, &[]);
        let plain = flat("flat");
        fs::remove_file(folder.file("flat")).unwrap();
        assert_eq!(report["content_digest"], plain["content_digest"], "{name}");
        assert_eq!(number(&report, "pages"), pages as u64);
        assert!(
            number(&report, "file_bytes") < number(&plain, "file_bytes"),
            "{report}"
        );
        run(&folder, &["verify", name, "--chain"]).exits(0);
    }
}

#[test]
fn chain_is_verified_wholly_on_request() {
    let folder = Folder::new();
    base(&folder);
    // The child uses a few pages of the base only.
    folder.write("small", &folder.read("base.raw")[..100 * PAGE]);
    create(&folder, "small", "base.snap", "child.snap", &[]);
    let report = run(&folder, &["verify", "child.snap", "--chain", "--json"])
        .exits(0)
        .json();
    assert_eq!(report["ok"], true);
    let [ancestor] = &report["chain"].as_array().unwrap()[..] else {
        panic!("{report}");
    };
    assert_eq!(number(ancestor, "pages_checked"), PAGES as u64);
    assert_eq!(ancestor["ok"], true);

    // A byte near the end of the base's frames.
    let info = run(&folder, &["info", "base.snap", "--json"]).json();
    let mut bytes = folder.read("base.snap");
    let at = usize::try_from(number(&info, "stored_bytes")).unwrap();
    bytes[at] ^= 1;
    folder.write("base.snap", &bytes);
    run(&folder, &["verify", "child.snap"]).exits(0);
    let report = run(&folder, &["verify", "child.snap", "--chain", "--json"])
        .exits(3)
        .json();
    assert_eq!(report["ok"], false);
    assert_eq!(report["problems"], serde_json::json!([]));
    let ancestor = &report["chain"][0];
    assert_eq!(ancestor["ok"], false);
    assert_ne!(ancestor["problems"], serde_json::json!([]), "{report}");
    let text = run(&folder, &["verify", "child.snap", "--chain"])
        .exits(3)
        .text();
    assert!(text.contains("child.snap: good"), "{text}");
    assert!(text.contains("base.snap: DAMAGED"), "{text}");
}

/// A file that only an ancestor lists need not be there: nothing of the snapshot lies in it.
#[test]
fn chain_without_a_file_that_it_does_not_need_is_verified() {
    let folder = Folder::new();
    base(&folder);
    // The first block is of the base, and the second one is the child's own.
    let pages = 2 * 512;
    let mut memory = folder.read("base.raw")[..pages * PAGE].to_vec();
    memory[512 * PAGE..].copy_from_slice(&noise(512 * PAGE));
    folder.write("memory", &memory);
    create(&folder, "memory", "base.snap", "1.snap", &[]);
    // The grandchild needs only the latter.
    memory[..512 * PAGE].fill(0);
    folder.write("memory", &memory);
    create(&folder, "memory", "1.snap", "2.snap", &["--holes", "zero"]);
    let listed = run(&folder, &["info", "2.snap", "--json"]).json()["ancestors"].clone();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    let verify = ["verify", "2.snap", "--chain", "--json"];
    let report = run(&folder, &verify).exits(0).json();
    assert_eq!(number(&report["chain"][0], "pages_checked"), pages as u64);
    assert_eq!(report["chain"][0].get("not_checked_alone"), None);

    let whole = folder.read("base.snap");
    let info = run(&folder, &["info", "base.snap", "--json"]).json();
    for (bytes, reason) in [
        (None, "missing"),
        (Some(&whole[..5000]), "./base.snap: incomplete"),
    ] {
        fs::remove_file(folder.file("base.snap")).unwrap();
        if let Some(bytes) = bytes {
            folder.write("base.snap", bytes);
        }
        let report = run(&folder, &verify).exits(0).json();
        assert_eq!(report["ok"], true);
        assert_eq!(number(&report, "pages_checked"), pages as u64);
        let unneeded = &report["chain"][0]["not_checked_alone"];
        assert_eq!(unneeded["snapshot_id"], info["snapshot_id"], "{report}");
        assert_eq!(unneeded["name"], "base.snap");
        let told = unneeded["reason"].as_str().unwrap();
        assert!(told.starts_with(reason), "{told}");
        let text = run(&folder, &["verify", "2.snap", "--chain"])
            .exits(0)
            .text();
        let expected = "1.snap: not checked beyond what 2.snap uses of it";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("last known as base.snap"), "{text}");
        assert!(text.contains("which 2.snap does not need"), "{text}");
        folder.write("base.snap", &whole);
    }

    // Damage in what the snapshot uses is found without the file, too.
    fs::remove_file(folder.file("base.snap")).unwrap();
    let mut bytes = folder.read("1.snap");
    bytes[4096 + 200] ^= 1;
    folder.write("1.snap", &bytes);
    let told = run(&folder, &["verify", "2.snap", "--chain"]).exits(3);
    assert!(told.text().contains("2.snap: DAMAGED"), "{}", told.text());
    // A snapshot that needs the file is still refused.
    run(&folder, &["verify", "1.snap", "--chain"]).exits(1);
}

#[test]
fn memory_larger_or_smaller_than_the_base_is_packed() {
    let folder = Folder::new();
    let base = base(&folder);
    for pages in [PAGES + 700, PAGES + 3, PAGES - 3, 700, 1] {
        let mut memory = base.clone();
        memory.truncate(pages * PAGE);
        let more = pages.saturating_sub(PAGES);
        memory.extend(Mix::new(more as u64, 8).bytes());
        folder.write("image", &memory);
        let report = create(&folder, "image", "base.snap", "child", &["--force"]);
        assert!(number(&report, "stored_pages") <= more as u64, "{report}");
        holds(&folder, "child", &memory);
        let left_out = (PAGES.saturating_sub(pages) * PAGE) as u64;
        let expected = (left_out > 0).then(|| ("base.left_out_bytes".to_owned(), left_out));
        assert_eq!(remarks(&report), Vec::from_iter(expected));
    }

    // A diff that is longer: what lies beyond the base has to be data.
    let mut memory = base.clone();
    memory.resize(base.len() + 600 * PAGE, 0);
    write_diff(&folder, "diff", &mut memory, (1, 100, 1));
    let args = ["create", "diff", "--base", "base.snap", "-o", "new"];
    run(&folder, &args)
        .exits(1)
        .says(&["the memory of the base base.snap 8.20 MiB", "--holes zero"]);
    assert!(!folder.file("new").exists());
    let diff = File::options()
        .write(true)
        .open(folder.file("diff"))
        .unwrap();
    let beyond = &memory[base.len()..];
    diff.write_all_at(beyond, base.len() as u64).unwrap();
    create(&folder, "diff", "base.snap", "new", &[]);
    holds(&folder, "new", &memory);

    // A diff that is shorter may be of another memory.
    let mut memory = base[..1024 * PAGE].to_vec();
    write_diff(&folder, "diff", &mut memory, (1, 100, 1));
    let told = run(
        &folder,
        &["create", "diff", "--base", "base.snap", "-o", "c"],
    )
    .exits(0);
    told.says(&["warning:", "of the base's memory has no counterpart"]);
    holds(&folder, "c", &memory);
}

#[test]
fn unusable_bases_and_outputs_are_refused() {
    let folder = Folder::new();
    let (_, _) = child(&folder);
    let whole = folder.read("base.snap");
    folder.write("cut", &whole[..whole.len() / 2]);
    folder.write("note", b"no snapshot");
    let names = folder.names();
    let refused: &[(&[&str], i32, &str)] = &[
        (&["diff", "--base", "cut", "-o", "n"], 3, "cut: "),
        (&["diff", "--base", "note", "-o", "n"], 3, "note: "),
        (&["diff", "--base", "none", "-o", "n"], 1, "none"),
        (
            &["diff", "--base", "base.snap", "-o", "base.snap", "--force"],
            2,
            "would be lost",
        ),
        (
            &["diff", "--base", "child.snap", "-o", "base.snap", "--force"],
            2,
            "base.snap: is an ancestor of child.snap",
        ),
        (&["diff", "--holes", "base", "-o", "n"], 2, "needs --base"),
    ];
    for (args, code, says) in refused {
        run(&folder, &[&["create"], *args].concat())
            .exits(*code)
            .says(&[says]);
    }
    let over = ["extract", "child.snap", "-o", "base.snap", "--force"];
    run(&folder, &over)
        .exits(2)
        .says(&["is an ancestor of child.snap"]);
    // Another snapshot of the folder, or of those of `--layers`, needs it.
    run(&folder, &["create", "base.raw", "-o", "other"]).exits(0);
    for over in [
        &["create", "base.raw", "-o", "base.snap", "--force"][..],
        &["extract", "other", "-o", "base.snap", "--force"],
    ] {
        run(&folder, over)
            .exits(2)
            .says(&["base.snap: is an ancestor of ./child.snap"]);
    }
    fs::create_dir(folder.file("more")).unwrap();
    fs::rename(folder.file("child.snap"), folder.file("more/child.snap")).unwrap();
    let over = ["extract", "other", "-o", "base.snap", "--force"];
    run(&folder, &[&over[..], &["--layers", "more"]].concat())
        .exits(2)
        .says(&["base.snap: is an ancestor of more/child.snap"]);
    fs::rename(folder.file("more/child.snap"), folder.file("child.snap")).unwrap();
    fs::remove_dir(folder.file("more")).unwrap();
    fs::remove_file(folder.file("other")).unwrap();
    assert_eq!(folder.names(), names);
    assert!(folder.read("base.snap") == whole);

    piped(
        &folder,
        "diff",
        &["create", "-", "--base", "base.snap", "-o", "n"],
    )
    .exits(2)
    .says(&["a pipe has no holes", "--holes zero"]);

    // Damage in the base where the child needs it.
    let mut bytes = whole;
    bytes[4096 + 200] ^= 1;
    folder.write("base.snap", &bytes);
    let mut memory = folder.read("base.raw");
    write_diff(&folder, "diff", &mut memory, (1, 512, 1));
    run(
        &folder,
        &["create", "diff", "--base", "base.snap", "-o", "n"],
    )
    .exits(3)
    .says(&[
        "base.snap",
        "damaged frame",
        "restore the base from a copy, or take a full snapshot",
    ]);
    assert!(!folder.file("n").exists());
}

#[test]
fn child_in_another_folder_than_its_base_is_remarked() {
    let folder = Folder::new();
    let mut memory = base(&folder);
    write_diff(&folder, "diff", &mut memory, (1, 37, 5));
    fs::create_dir(folder.file("out")).unwrap();
    let report = create(&folder, "diff", "base.snap", "out/child.snap", &[]);
    assert!(
        remarks(&report).contains(&("base.elsewhere".to_owned(), 1)),
        "{report}"
    );
    let text = report["remarks"].to_string();
    for part in ["base.snap", "pass --layers DIR"] {
        assert!(text.contains(part), "{text}");
    }
    run(&folder, &["info", "out/child.snap"]).exits(1);
    let args = ["info", "out/child.snap", "--layers", ".", "--json"];
    let info = run(&folder, &args).exits(0).json();
    assert!(info["properties"]["base.elsewhere"].is_null(), "{info}");
    run(&folder, &["bench", "out/child.snap"]).exits(1).says(&[
        "is missing",
        "name the folder that has it with --layers DIR",
    ]);
    // All files at hand, under another name.
    fs::copy(folder.file("base.snap"), folder.file("out/renamed")).unwrap();
    let report = create(&folder, "diff", "base.snap", "out/2nd.snap", &[]);
    assert!(!report.to_string().contains("base.elsewhere"), "{report}");
}

/// Regression test: the report of a restore named the child, with the offset in the base.
#[test]
fn restore_names_the_file_of_a_damaged_frame() {
    let folder = Folder::new();
    child(&folder);
    let mut bytes = folder.read("base.snap");
    bytes[4096 + 200] ^= 1;
    folder.write("base.snap", &bytes);
    for prefetch in ["off", "all"] {
        let args = ["restore", "child.snap", "--prefetch", prefetch, "--json"];
        if !possible(&folder, "restore_names_the_file_of_a_damaged_frame") {
            return;
        }
        let report = run(&folder, &args).exits(3).json();
        let failures = report["failures"].as_array().unwrap();
        assert_eq!(failures.len(), 1, "{report}");
        assert_eq!(failures[0]["file"], "./base.snap", "{report}");
        assert_eq!(failures[0]["offset"], 4096, "{report}");
    }
}

#[test]
fn regions_of_cores_are_matched_by_address_and_name() {
    let folder = Folder::new();
    let load = |start, seed| Load {
        start,
        bytes: Mix::new(40, seed).bytes(),
        memory_bytes: 40 * PAGE as u64,
    };
    let core = |loads| Core {
        loads,
        ..Core::default()
    };
    let (low, high, other) = (0x10_0000, 0x80_0000, 0x4000_0000);
    folder.write("before", &core(vec![load(low, 1), load(high, 2)]).bytes());
    run(&folder, &["create", "before", "-o", "base.snap"]).exits(0);
    folder.write(
        "after",
        &core(vec![load(low, 1), load(high, 2), load(other, 4)]).bytes(),
    );
    let report = create(&folder, "after", "base.snap", "child", &[]);
    assert!(number(&report, "ancestor_pages") > 0, "{report}");
    let plain = run(&folder, &["create", "after", "-o", "plain", "--json"]).json();
    assert_eq!(report["content_digest"], plain["content_digest"]);
    assert!(number(&report, "stored_pages") < number(&plain, "stored_pages"));
    run(&folder, &["verify", "child"]).exits(0);

    let args = ["create", "after", "--base", "base.snap", "-o", "n"];
    run(&folder, &[&args[..], &["--holes", "base"]].concat())
        .exits(2)
        .says(&["is an ELF core"]);

    // Nothing corresponds.
    folder.write("elsewhere", &core(vec![load(other, 1)]).bytes());
    run(
        &folder,
        &["create", "elsewhere", "--base", "base.snap", "-o", "n"],
    )
    .exits(0)
    .says(&["warning:", "memory was only looked for by its content"]);
    run(&folder, &["verify", "n"]).exits(0);

    // One region has grown at its start and its end, and the other has lost a page at its start and
    // was split.
    let page = PAGE as u64;
    let memory = |start, bytes: &[u8]| Load {
        start,
        bytes: bytes.to_vec(),
        memory_bytes: bytes.len() as u64,
    };
    let (grown, old) = (noise(5 * PAGE), Mix::new(40, 1).bytes());
    let grown = [&grown[..3 * PAGE], &old, &grown[3 * PAGE..]].concat();
    let rest = Mix::new(40, 2).bytes();
    let loads = vec![
        memory(low - 3 * page, &grown),
        memory(high + page, &rest[PAGE..20 * PAGE]),
        memory(high + 22 * page, &rest[22 * PAGE..]),
    ];
    folder.write("remapped", &core(loads).bytes());
    let report = create(&folder, "remapped", "base.snap", "m", &[]);
    assert_eq!(number(&report, "stored_pages"), 5, "{report}");
    let plain = run(&folder, &["create", "remapped", "-o", "p", "--json"]).json();
    assert_eq!(report["content_digest"], plain["content_digest"]);
    let left_out = ("base.left_out_bytes".to_owned(), 3 * page);
    assert!(remarks(&report).contains(&left_out), "{report}");
    run(&folder, &["verify", "m"]).exits(0);
}

#[test]
fn process_is_packed_as_a_child_of_its_earlier_state() {
    let folder = Folder::new();
    let owner = Owner::start();
    let pid = owner.pid().to_string();
    let whole = run(
        &folder,
        &["create", "--pid", &pid, "-o", "base.snap", "--json"],
    )
    .exits(0)
    .json();
    let args = ["create", "--pid", &pid, "--base", "base.snap"];
    let child = run(&folder, &[&args[..], &["-o", "child", "--json"]].concat())
        .exits(0)
        .json();
    let (before, now) = (
        number(&whole, "stored_pages"),
        number(&child, "stored_pages"),
    );
    assert!(now < before / 2, "{now} of {before}");
    run(&folder, &["verify", "child", "--chain"]).exits(0);
}
