//! Selection of the memory to extract from a snapshot.

use crate::common::{Folder, Run, command, number, run};
use crate::elf_core::{Core, Load};

/// Creates a snapshot `s` of three regions: pages of 1; of 2, with two unknown pages; of 3.
fn three_regions(folder: &Folder) {
    let load = |start, byte, pages: usize, unknown: usize| Load {
        start,
        bytes: vec![byte; pages * 4096],
        memory_bytes: ((pages + unknown) * 4096) as u64,
    };
    let core = Core {
        loads: vec![
            load(0x10000, 1, 3, 0),
            load(0x50000, 2, 2, 2),
            load(0x90000, 3, 600, 0),
        ],
        files: vec![
            (0x10000, 0x13000, "low".into()),
            (0x90000, 0x90000 + 600 * 4096, "1".into()),
        ],
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    run(folder, &["create", "core", "-o", "s"]).exits(0);
}

#[test]
fn unknown_pages_are_refused_unless_zeros_are_allowed() {
    let folder = Folder::new();
    three_regions(&folder);
    for target in ["out", "-"] {
        let refused = run(&folder, &["extract", "s", "-o", target])
            .exits(1)
            .says(&["2 pages could not be read", "--unavailable zero"]);
        assert!(refused.out.is_empty());
    }
    run(
        &folder,
        &[
            "extract", "s", "-o", "out", "--region", "0", "--region", "2",
        ],
    )
    .exits(0);
    run(
        &folder,
        &[
            "extract", "s", "-o", "bad", "--region", "low", "--region", "1",
        ],
    )
    .exits(0);
    let report = run(
        &folder,
        &[
            "extract",
            "s",
            "-o",
            "all",
            "--unavailable",
            "zero",
            "--json",
        ],
    )
    .exits(0)
    .json();
    assert_eq!(number(&report, "bytes"), 607 * 4096);
    assert_eq!(number(&report, "unavailable_pages"), 2);
    let expected = [
        vec![1; 3 * 4096],
        vec![2; 2 * 4096],
        vec![0; 2 * 4096],
        vec![3; 600 * 4096],
    ];
    assert!(folder.read("all") == expected.concat());
}

#[test]
fn regions_are_named_or_numbered_and_keep_their_order() {
    let folder = Folder::new();
    three_regions(&folder);
    let extract = |regions: &[&str]| {
        let mut args = vec!["extract", "s", "-o", "out", "--force"];
        for region in regions {
            args.extend(["--region", region]);
        }
        run(&folder, &args).exits(0);
        folder.read("out")
    };
    assert!(extract(&["low"]) == vec![1; 3 * 4096]);
    // A name takes precedence over a number.
    assert!(extract(&["1"]) == vec![3; 600 * 4096]);
    assert!(extract(&["2", "0"]) == [vec![1; 3 * 4096], vec![3; 600 * 4096]].concat());
    run(&folder, &["extract", "s", "-o", "none", "--region", "high"])
        .exits(1)
        .says(&["\"high\"", "0 to 2"]);
    run(&folder, &["extract", "s", "-o", "none", "--region", "3"]).exits(1);
    assert!(!folder.file("none").exists());
}

#[test]
fn existing_file_stays_unless_forced() {
    let folder = Folder::new();
    folder.write("raw", &[7; 8192]);
    folder.write("out", b"precious");
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    run(&folder, &["extract", "s", "-o", "out"])
        .exits(1)
        .says(&["--force"]);
    assert_eq!(folder.read("out"), b"precious");
    run(
        &folder,
        &["extract", "s", "-o", "out", "--force", "--threads", "3"],
    )
    .exits(0);
    assert!(folder.read("out") == vec![7; 8192]);
    assert_eq!(folder.names(), ["out", "raw", "s"]);
}

#[test]
fn extract_never_overwrites_its_source() {
    let folder = Folder::new();
    folder.write("raw", &[7; 8192]);
    folder.write("note", b"a note");
    std::os::unix::fs::symlink("raw", folder.file("link")).unwrap();
    let packed = ["create", "raw", "-o", "s", "--attach", "note=note"];
    run(&folder, &packed).exits(0);
    let before = folder.read("s");
    let cases: &[&[&str]] = &[
        &["create", "raw", "-o", "raw"],
        &["create", "raw", "-o", "./link"],
        &["create", "link", "-o", "raw"],
        &["create", "raw", "-o", "note", "--attach", "n=note"],
        &["create", "raw", "-o", "note", "--dictionary", "note"],
        &["extract", "s", "-o", "s"],
        &["extract", "s", "-o", "s", "--attachment", "note"],
    ];
    for args in cases {
        for force in [&["--force"][..], &[]] {
            let run = run(&folder, &[args, force].concat());
            assert_eq!(run.code, Some(2), "{args:?}: {}", run.err);
            assert!(run.err.contains("would be lost"), "{args:?}: {}", run.err);
        }
    }
    let stdin = std::fs::File::open(folder.file("raw")).unwrap();
    let mut piped = command(["create", "-", "-o", "raw", "-f"]);
    Run::to_end(piped.current_dir(folder.path()).stdin(stdin)).exits(2);
    assert_eq!(folder.names(), ["link", "note", "raw", "s"]);
    assert_eq!(folder.read("raw"), [7; 8192]);
    assert_eq!(folder.read("note"), b"a note");
    assert_eq!(folder.read("s"), before);
}

#[test]
fn attachment_goes_to_standard_output() {
    let folder = Folder::new();
    folder.write("raw", &[7; 8192]);
    folder.write("note", b"a note");
    let packed = ["create", "raw", "-o", "s", "--attach", "note=note"];
    run(&folder, &packed).exits(0);
    let told = run(
        &folder,
        &["extract", "s", "-o", "-", "--attachment", "note"],
    )
    .exits(0);
    assert_eq!(told.out, b"a note");
    assert!(
        told.err.starts_with("wrote 6 B to standard output in "),
        "{}",
        told.err
    );
}

/// A guest with more than 3 GiB has a gap in its addresses below 4 GiB.
#[test]
fn offsets_are_printed_where_they_are_not_addresses() {
    let folder = Folder::new();
    let load = |start, byte| Load {
        start,
        bytes: vec![byte; 8192],
        memory_bytes: 8192,
    };
    let core = Core {
        loads: vec![load(0, 1), load(1 << 32, 2)],
        qemu: true,
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    run(&folder, &["create", "core", "-o", "s"]).exits(0);
    let told = run(&folder, &["extract", "s", "-o", "out"]).exits(0).text();
    assert!(told.contains("offsets are not addresses"), "{told}");
    assert!(
        told.contains("at offset 0x2000: 8.00 KiB from address 0x100000000 on, memory"),
        "{told}"
    );
    let high = ["extract", "s", "-o", "out", "-f", "--region", "1", "--json"];
    let told = run(&folder, &high).exits(0).json();
    let places = |report: &serde_json::Value| -> Vec<(u64, u64)> {
        let regions = report["regions"].as_array().unwrap();
        let place = |region| (number(region, "start"), number(region, "offset"));
        regions.iter().map(place).collect()
    };
    assert_eq!(places(&told), [(1 << 32, 0)]);
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    assert_eq!(places(&info), [(0, 0), (1 << 32, 0x2000)]);
    assert!(run(&folder, &["info", "s"]).text().contains("0x2000"));

    // If memory begins at 0 and has no gap, offsets are addresses.
    folder.write("raw", &[7; 8192]);
    run(&folder, &["create", "raw", "-o", "t"]).exits(0);
    let told = run(&folder, &["extract", "t", "-o", "raw2"])
        .exits(0)
        .text();
    assert!(!told.contains("address"), "{told}");
}
