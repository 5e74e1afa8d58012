//! Content of children: their memory, byte for byte, stored as no more than what differs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use snaprestore_fixtures::images::Mix;

use super::{PAGE, PAGES, base, create, holds, piped, write_diff};
use crate::common::{Folder, noise, number, remarks, run};
use crate::elf_core::{Core, Load};
use crate::owner::Owner;
use crate::restore::possible;

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
