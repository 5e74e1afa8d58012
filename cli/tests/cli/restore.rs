//! Lazy restores of snapshots.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use serde_json::Value;
use snaprestore_fixtures::host::{Unavailable, skipped};
use snaprestore_fixtures::images::Mix;
use snapshot_format::trace::Trace;

use crate::common::{Folder, Run, as_nobody, command, number, run};
use crate::elf_core::{Core, Load};

/// Returns whether restoring can be tested on this machine; reports if not.
pub(crate) fn possible(folder: &Folder, test: &str) -> bool {
    let doctor = run(folder, &["doctor", "--json"]);
    let report = doctor.json();
    if doctor.code == Some(0) && report["user_mode_only"] == false {
        return true;
    }
    let missing = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|check| check["name"] == "userfaultfd");
    skipped(
        test,
        &Unavailable {
            why: format!("userfaultfd: {}", missing.unwrap()),
        },
    );
    false
}

/// Creates an image `raw` and its snapshot `s`.
fn packed(folder: &Folder, pages: u64) {
    folder.write("raw", &Mix::new(pages, 11).bytes());
    run(folder, &["create", "raw", "-o", "s"]).exits(0);
}

#[track_caller]
fn restore(folder: &Folder, options: &[&str]) -> Run {
    let mut args = vec!["restore", "s", "--json"];
    args.extend(options);
    run(folder, &args)
}

#[test]
fn memory_equals_the_source_in_any_order() {
    let folder = Folder::new();
    if !possible(&folder, "memory_equals_the_source_in_any_order") {
        return;
    }
    packed(&folder, 3000);
    for touch in ["sequential", "random"] {
        for prefetch in ["off", "working-set", "all"] {
            for threads in [["1", "1"], ["3", "4"]] {
                let options = [
                    "--touch",
                    touch,
                    "--prefetch",
                    prefetch,
                    "--threads",
                    threads[0],
                    "--touch-threads",
                    threads[1],
                    "--check",
                    "raw",
                    "--seed",
                    "5",
                ];
                let report = restore(&folder, &options).exits(0).json();
                let n = |key| number(&report, key);
                assert_eq!(
                    (n("checked_pages"), n("mismatches")),
                    (3000, 0),
                    "{options:?}"
                );
                assert!(n("pages_copied") > 0);
                assert!(n("bytes_read") > 0);
                for key in [
                    "map_us",
                    "first_page_us",
                    "touch_ms",
                    "complete_ms",
                    "pages_zeroed",
                ] {
                    n(key);
                }
                for key in ["p50", "p90", "p99", "max"] {
                    assert!(report["fault_us"][key].is_number(), "{report}");
                }
                if prefetch == "off" {
                    assert!(n("faults") > 0);
                    assert_eq!(n("prefetched_pages"), 0);
                }
            }
        }
    }
}

#[test]
fn selected_working_set_is_prefetched_and_must_exist() {
    let folder = Folder::new();
    let test = "selected_working_set_is_prefetched_and_must_exist";
    // The snapshot has the working sets "boot" and "nothing".
    let golden = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../fixtures/golden/v1/good-working-sets-and-attachments.snap"
    );
    folder.write("s", &std::fs::read(golden).unwrap());
    let names = ["\"none\"", "\"boot\"", "\"nothing\""];
    let socket = ["--socket", "vmm.socket", "--working-set", "none"];
    run(
        &folder,
        &[&["serve", "--snapshot", "s"], &socket[..]].concat(),
    )
    .exits(1)
    .says(&names);
    let off = ["--prefetch", "off", "--working-set", "boot"];
    restore(&folder, &off).exits(2).says(&["--prefetch off"]);
    if !possible(&folder, test) {
        return;
    }
    let missing = ["--working-set", "none"];
    restore(&folder, &missing).exits(1).says(&names);
    let prefetched = |set: &str| {
        let options = ["--touch", "none", "--prefetch", "working-set"];
        let options = [&options[..], &["--working-set", set]].concat();
        number(
            &restore(&folder, &options).exits(0).json(),
            "prefetched_pages",
        )
    };
    assert_eq!(prefetched("nothing"), 0);
    assert!(prefetched("boot") > 0);
}

#[test]
fn untouched_restore_prefetches_everything_or_nothing() {
    let folder = Folder::new();
    if !possible(
        &folder,
        "untouched_restore_prefetches_everything_or_nothing",
    ) {
        return;
    }
    packed(&folder, 3000);
    let all = restore(&folder, &["--touch", "none", "--prefetch", "all"])
        .exits(0)
        .json();
    number(&all, "complete_ms");
    assert_eq!(number(&all, "faults"), 0);
    assert_eq!(
        number(&all, "prefetched_pages"),
        number(&all, "pages_copied") + number(&all, "pages_zeroed")
    );
    assert_eq!(all["touch_ms"], Value::Null);
    let none = restore(&folder, &["--touch", "none", "--prefetch", "off"])
        .exits(0)
        .json();
    assert_eq!(none["complete_ms"], Value::Null);
    assert_eq!(none["first_page_us"], Value::Null);
    assert_eq!(number(&none, "pages_copied"), 0);
}

#[test]
fn mismatch_is_reported_and_fails() {
    let folder = Folder::new();
    if !possible(&folder, "mismatch_is_reported_and_fails") {
        return;
    }
    packed(&folder, 600);
    let mut other = folder.read("raw");
    for page in [7, 300, 599] {
        other[page * 4096 + 9] ^= 1;
    }
    folder.write("other", &other);
    let report = restore(&folder, &["--check", "other", "--touch", "random"])
        .exits(1)
        .json();
    assert_eq!(number(&report, "mismatches"), 3);
    assert_eq!(report["mismatched"], serde_json::json!([7, 300, 599]));
    let text = run(&folder, &["restore", "s", "--check", "other"])
        .exits(1)
        .text();
    assert!(text.contains("3 DIFFER: pages 7, 300, 599\n"), "{text}");
    folder.write("short", &other[..4096]);
    run(&folder, &["restore", "s", "--check", "short"])
        .exits(1)
        .says(&["short", "4096 bytes"]);
    run(&folder, &["restore", "s", "--check", "none"])
        .exits(1)
        .says(&["none"]);
}

#[test]
fn bad_frame_loses_only_its_own_pages() {
    let folder = Folder::new();
    if !possible(&folder, "bad_frame_loses_only_its_own_pages") {
        return;
    }
    // Every page is distinct, so that a frame holds 32 consecutive pages.
    let pages = 1024;
    let raw: Vec<u8> = crate::common::noise(pages * 4096);
    folder.write("raw", &raw);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let mut bytes = folder.read("s");
    let first = 4096;
    // Within the payload of the first frame.
    bytes[first + 50_000] ^= 0x10;
    folder.write("s", &bytes);
    for prefetch in ["off", "all"] {
        for touch in ["sequential", "random"] {
            let options = ["--check", "raw", "--prefetch", prefetch, "--touch", touch];
            let report = restore(&folder, &options).exits(3).json();
            assert_eq!(
                number(&report, "checked_pages"),
                pages as u64 - 32,
                "{report}"
            );
            assert_eq!(number(&report, "mismatches"), 0);
            let failures = report["failures"].as_array().unwrap();
            assert_eq!(failures.len(), 1, "{report}");
            assert_eq!(failures[0]["file"], "s");
            assert_eq!(number(&failures[0], "offset"), first as u64);
            assert_eq!(failures[0]["damaged"], true);
            assert_eq!(failures[0]["pages"], serde_json::json!([[0, 31]]));
            let detail = failures[0]["detail"].as_str().unwrap();
            assert!(!detail.contains("at byte"), "{detail}");
            assert_eq!(number(&report, "bad_pages"), 32);
            assert_eq!(report["complete_ms"], Value::Null);
        }
    }
    let text = run(&folder, &["restore", "s"]).exits(3).text();
    assert!(
        text.contains("BAD         s, at byte 4096: damaged frame: ")
            && text.contains("pages 0-31")
            && text.contains("complete    except 32 bad pages"),
        "{text}"
    );
    // The damage is found even if nobody touches the page.
    let report = restore(&folder, &["--touch", "none", "--prefetch", "all"])
        .exits(3)
        .json();
    assert!(!report["failures"].as_array().unwrap().is_empty());
    assert!(number(&report, "bad_pages") > 0);
    assert_eq!(report["complete_ms"], Value::Null);
    let text = run(&folder, &["restore", "s", "--touch", "none"])
        .exits(3)
        .text();
    assert!(text.contains("complete    except "), "{text}");
}

#[test]
fn prefetching_everything_is_the_default() {
    let folder = Folder::new();
    if !possible(&folder, "prefetching_everything_is_the_default") {
        return;
    }
    let mut raw = crate::common::noise(600 * 4096);
    raw.resize(4096 * 4096, 0);
    folder.write("raw", &raw);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let report = restore(&folder, &["--touch", "none"]).exits(0).json();
    number(&report, "complete_ms");
    // Every page was installed, or left to the kernel.
    let all = ["pages_copied", "pages_zeroed", "pages_left_to_kernel"];
    let sum: u64 = all.iter().map(|key| number(&report, key)).sum();
    assert_eq!(sum, 4096, "{report}");
    assert!(number(&report, "pages_left_to_kernel") >= 2048, "{report}");
    let text = run(&folder, &["restore", "s", "--touch", "none"])
        .exits(0)
        .text();
    assert!(!text.contains("faults"), "{text}");
    assert!(text.contains("zero pages left to the kernel"), "{text}");
}

fn number_at(file: &[u8], at: usize) -> usize {
    let bytes = file[at..at + 8].try_into().unwrap();
    usize::try_from(u64::from_le_bytes(bytes)).unwrap()
}

/// Returns the offset of the section of a kind, as listed in the trailer.
pub(crate) fn section(file: &[u8], kind: u8) -> usize {
    let sections = file.len() - 4096 + 1524;
    let entry = (sections..)
        .step_by(40)
        .find(|&entry| file[entry] == kind)
        .unwrap();
    number_at(file, entry + 8)
}

/// Returns the offset of the index block of a block. The top table is a section of kind 2; each of
/// its entries has 24 bytes, with the offset in the second 8.
fn index_block(file: &[u8], block: usize) -> usize {
    number_at(file, section(file, 2) + 24 * block + 8)
}

#[test]
fn bad_index_block_loses_only_its_own_pages() {
    let folder = Folder::new();
    if !possible(&folder, "bad_index_block_loses_only_its_own_pages") {
        return;
    }
    folder.write("raw", &crate::common::noise(1024 * 4096));
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let mut bytes = folder.read("s");
    let place = index_block(&bytes, 1);
    bytes[place + 40] ^= 1;
    folder.write("s", &bytes);
    let report = restore(&folder, &["--check", "raw"]).exits(3).json();
    assert_eq!(number(&report, "checked_pages"), 512, "{report}");
    assert_eq!(
        report["failures"][0]["pages"],
        serde_json::json!([[512, 1023]])
    );
}

#[test]
fn unknown_pages_are_skipped_and_are_no_damage() {
    let folder = Folder::new();
    if !possible(&folder, "unknown_pages_are_skipped_and_are_no_damage") {
        return;
    }
    let load = |start: u64, known: &[u8], unknown: u64| Load {
        start,
        bytes: known.iter().flat_map(|&byte| [byte; 4096]).collect(),
        memory_bytes: (known.len() as u64 + unknown) * 4096,
    };
    let core = Core {
        loads: vec![
            load(0x10000, &[1, 2], 3),
            load(0x80000, &[], 600),
            load(0x90_0000, &[3], 0),
        ],
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    run(&folder, &["create", "core", "-o", "s"]).exits(0);
    run(
        &folder,
        &["extract", "s", "-o", "raw", "--unavailable", "zero"],
    )
    .exits(0);
    for options in [["--prefetch", "off"], ["--prefetch", "all"]] {
        let options = [&options[..], &["--check", "raw", "--touch", "random"]].concat();
        let report = restore(&folder, &options).exits(0).json();
        assert_eq!(number(&report, "checked_pages"), 3);
        assert_eq!(number(&report, "unavailable_pages"), 603);
    }
}

#[test]
fn foreign_file_exits_3() {
    let folder = Folder::new();
    folder.write("s", b"hello");
    run(&folder, &["restore", "s"])
        .exits(3)
        .says(&["s: not a snapshot"]);
    run(&folder, &["restore", "none"]).exits(1).says(&["none"]);
}

/// Returns whether an unprivileged user can be tested who may not create a full userfaultfd.
pub(crate) fn nobody_is_limited(test: &str) -> bool {
    let why = if nix::unistd::geteuid().is_root() {
        let folder = Folder::new();
        let doctor = as_nobody(&folder, &["doctor", "--json"]);
        if doctor.json()["user_mode_only"] == true {
            return true;
        }
        "every user may make a full userfaultfd here, or none"
    } else {
        "becoming another user needs root"
    };
    skipped(test, &Unavailable { why: why.into() });
    false
}

#[test]
fn ordinary_user_restores_with_a_user_mode_warning() {
    if !nobody_is_limited("ordinary_user_restores_with_a_user_mode_warning") {
        return;
    }
    let folder = Folder::new();
    folder.write("raw", &Mix::new(300, 11).bytes());
    as_nobody(&folder, &["create", "raw", "-o", "s"]).exits(0);
    as_nobody(&folder, &["verify", "s"]).exits(0);
    let everything = [
        "--prefetch",
        "all",
        "--touch",
        "random",
        "--touch-threads",
        "2",
    ];
    for options in [&everything[..], &["--prefetch", "off"]] {
        let args = [&["restore", "s", "--json", "--check", "raw"], options].concat();
        let run = as_nobody(&folder, &args).exits(0);
        let report = run.json();
        let n = |key| number(&report, key);
        assert_eq!((n("checked_pages"), n("mismatches")), (300, 0), "{report}");
        n("complete_ms");
        assert_eq!(run.err.lines().count(), 1, "{}", run.err);
        run.says(&["note: ", "user mode only", "snaprestore doctor"]);
    }
    // The user knows, so there is no note.
    let args = ["restore", "s", "--touch", "none", "--user-mode-only"];
    let run = as_nobody(&folder, &args).exits(0);
    assert_eq!(run.err, "");
}

/// The system call filter of a container may block userfaultfd.
#[test]
fn missing_rights_exit_4_with_a_remedy() {
    let name = "missing_rights_exit_4_with_a_remedy";
    if !nobody_is_limited(name) {
        return;
    }
    let folder = Folder::new();
    folder.write("raw", &Mix::new(300, 11).bytes());
    as_nobody(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let without = |args: &[&str]| {
        let mut command = Command::new(folder.file("snaprestore"));
        command
            .args(args)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .uid(65534)
            .gid(65534);
        let filter = without_userfaultfd();
        let confine = move || {
            seccompiler::apply_filter(&filter).map_err(|_| std::io::ErrorKind::Other.into())
        };
        // SAFETY: the closure makes two system calls, and neither allocates nor takes a lock.
        unsafe { command.pre_exec(confine) };
        Run::to_end(&mut command)
    };
    for args in [&["restore", "s"][..], &["demo", "--size", "1"]] {
        without(args).exits(4).says(&[
            "\n  access to /dev/userfaultfd",
            "\n  the capability CAP_SYS_PTRACE\n",
            "\n  sysctl vm.unprivileged_userfaultfd=1\n",
        ]);
    }
}

fn without_userfaultfd() -> seccompiler::BpfProgram {
    let json = r#"{"all":{"mismatch_action":"allow","match_action":{"errno":1},
        "filter":[{"syscall":"userfaultfd"}]}}"#;
    let arch: seccompiler::TargetArch = std::env::consts::ARCH.try_into().unwrap();
    let mut filters = seccompiler::compile_from_json(json.as_bytes(), arch).unwrap();
    filters.remove("all").unwrap()
}

#[test]
fn listed_pages_are_touched_in_their_order() {
    let folder = Folder::new();
    if !possible(&folder, "listed_pages_are_touched_in_their_order") {
        return;
    }
    // Two regions: the second begins at the next multiple of 512 page numbers.
    let load = |start, seed| Load {
        start,
        bytes: Mix::new(40, seed).bytes(),
        memory_bytes: 40 * 4096,
    };
    let core = Core {
        loads: vec![load(0x10_0000, 1), load(0x80_0000, 2)],
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    run(&folder, &["create", "core", "-o", "s"]).exits(0);
    run(&folder, &["extract", "s", "-o", "raw"]).exits(0);
    folder.write("order", b"# first\n39\n\n 512\n551\n0\n");
    let args = [
        "restore",
        "s",
        "--touch",
        "file:order",
        "--prefetch",
        "off",
        "--check",
        "raw",
        "--json",
    ];
    let report = run(&folder, &args).exits(0).json();
    assert_eq!(number(&report, "touched_pages"), 4, "{report}");
    assert_eq!(number(&report, "checked_pages"), 4, "{report}");
    assert_eq!(report["complete_ms"], Value::Null, "{report}");

    for (order, says) in [
        ("1\n40\n", "order, line 2: the snapshot has no page 40"),
        ("552", "order, line 1: the snapshot has no page 552"),
        ("x", "order, line 1: \"x\" is not a page number"),
        ("-1", "order, line 1: \"-1\" is not a page number"),
    ] {
        folder.write("order", order.as_bytes());
        run(&folder, &args).exits(1).says(&[says]);
    }
    let other = ["restore", "s", "--touch", "file:"];
    let expected = "expected none, sequential, random or file:PATH";
    run(&folder, &other).exits(2).says(&[expected]);
}

#[test]
fn touched_pages_are_recorded_to_a_new_file() {
    let folder = Folder::new();
    if !possible(&folder, "touched_pages_are_recorded_to_a_new_file") {
        return;
    }
    packed(&folder, 3000);
    folder.write("order", b"7\n2000\n8\n7\n");
    let options = ["--touch", "file:order", "--record", "t", "--prefetch"];
    let report = restore(&folder, &[&options[..], &["off"]].concat())
        .exits(0)
        .json();
    let trace = &report["trace"];
    assert_eq!(
        (number(trace, "touches"), &trace["end"]),
        (3, &"stopped".into()),
        "{report}"
    );
    let text = std::fs::read(folder.file("t")).unwrap();
    let recorded = Trace::from_bytes(&text).unwrap();
    assert_eq!(recorded.pages(), [7, 2000, 8]);
    // An existing file is found before anything is restored.
    let again = restore(&folder, &[&options[..], &["off"]].concat());
    again.exits(1).says(&["t exists already"]);
    assert_eq!(std::fs::read(folder.file("t")).unwrap(), text);
    // The recording ends with the last touch, and prefetch continues.
    let args = ["--touch", "file:order", "--record", "t2", "--prefetch"];
    let report = restore(&folder, &[&args[..], &["all"]].concat())
        .exits(0)
        .json();
    assert_eq!(report["trace"]["end"], "stopped", "{report}");
    // A command that fails afterwards has written its trace.
    let args = ["--touch", "file:order", "--record", "t3", "--run-json"];
    restore(&folder, &[&args[..], &["/dev/full"]].concat())
        .exits(1)
        .says(&["No space left"]);
    let recorded = Trace::read_path(folder.file("t3")).unwrap();
    assert_eq!(recorded.pages(), [7, 2000, 8]);
    // All pages are touched before prefetch gets its turn.
    let args = ["restore", "s", "--touch", "random", "--record", "all"];
    run(&folder, &args).exits(0);
}

#[test]
fn interrupted_restore_writes_its_trace() {
    let folder = Folder::new();
    if !possible(&folder, "interrupted_restore_writes_its_trace") {
        return;
    }
    packed(&folder, 3000);
    // So many touches of one page take long.
    folder.write("order", "7\n".repeat(10_000_000).as_bytes());
    let args = ["restore", "s", "--touch", "file:order", "--record", "t"];
    let mut restore = command(args)
        .current_dir(folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let tasks = format!("/proc/{}/task", restore.id());
    let names = || -> Vec<String> {
        let tasks = std::fs::read_dir(&tasks).unwrap().map_while(Result::ok);
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
        tasks.filter_map(name).collect()
    };
    while !names().iter().any(|name| name == "trace\n") {
        assert!(restore.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(!folder.file("t").exists());
    let pid = nix::unistd::Pid::from_raw(restore.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let ended = restore.wait().unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&ended);
    assert_eq!(signal, Some(libc::SIGTERM), "{ended:?}");
    Trace::read_path(folder.file("t")).unwrap();
}

#[test]
fn statistics_replace_no_file_that_is_read_or_needed() {
    let folder = Folder::new();
    if !possible(&folder, "statistics_replace_no_file_that_is_read_or_needed") {
        return;
    }
    packed(&folder, 300);
    folder.write("order", b"7\n");
    std::os::unix::fs::symlink(".", folder.file("link")).unwrap();
    let args = ["restore", "s", "--touch", "file:order", "--record", "t"];
    for (path, why) in [
        ("s", "is read to make the output"),
        ("order", "is read to make the output"),
        ("t", "name the same file"),
        ("./t", "name the same file"),
        ("link/t", "name the same file"),
    ] {
        let args = [&args[..], &["--run-json", path]].concat();
        run(&folder, &args).exits(2).says(&[why]);
    }
    assert!(!folder.file("t").exists());
    run(&folder, &["verify", "s"]).exits(0);
    let args = [&args[..], &["--run-json", "run.json"]].concat();
    run(&folder, &args).exits(0);
}

#[test]
fn statistics_that_cannot_be_written_are_an_error_at_the_start() {
    let folder = Folder::new();
    let test = "statistics_that_cannot_be_written_are_an_error_at_the_start";
    if !possible(&folder, test) {
        return;
    }
    packed(&folder, 300);
    let args = ["restore", "s", "--record", "t", "--run-json"];
    for (path, code, says) in [
        ("none/run.json", 1, "cannot write the statistics of the run"),
        (".", 1, "is a folder"),
        ("-", 2, "--run-json -: the report goes to standard output"),
    ] {
        let args = [&args[..], &[path]].concat();
        run(&folder, &args).exits(code).says(&[says]);
        assert!(!folder.file("t").exists(), "{path}: it was restored");
    }
    let args = ["restore", "s", "--record", "-"];
    let says = "--record -: the report goes to standard output";
    run(&folder, &args).exits(2).says(&[says]);
}

/// The disk is full at the end of the restore.
#[test]
fn statistics_that_are_lost_do_not_hide_damage() {
    let folder = Folder::new();
    if !possible(&folder, "statistics_that_are_lost_do_not_hide_damage") {
        return;
    }
    folder.write("raw", &crate::common::noise(300 * 4096));
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let lost = "cannot write the statistics of the run: could not write /dev/full: No space left";
    let options = ["--record", "/dev/full", "--run-json", "/dev/full"];
    for (damaged, code) in [(false, 1), (true, 3)] {
        if damaged {
            let mut bytes = folder.read("s");
            bytes[4096 + 50_000] ^= 0x10;
            folder.write("s", &bytes);
        }
        for options in [&options[2..], &options[..2]] {
            let run = restore(&folder, options).exits(code);
            let report = run.json();
            assert_eq!(number(&report, "bad_pages") > 0, damaged, "{report}");
            let unwritten = report["unwritten"][0].as_str().unwrap_or_default();
            assert!(unwritten.contains("/dev/full"), "{report}");
            run.says(&["/dev/full"]);
        }
        let text = run(&folder, &["restore", "s", "--run-json", "/dev/full"]);
        let text = text.exits(code).says(&[lost]).text();
        assert!(text.contains("touched "), "{text}");
    }
}

/// Under a limit of its memory, so that a mistake does not take all of the machine's.
#[test]
fn endless_list_of_pages_is_refused() {
    let folder = Folder::new();
    if !possible(&folder, "endless_list_of_pages_is_refused") {
        return;
    }
    packed(&folder, 300);
    let limited = "ulimit -v 4000000; exec \"$0\" restore s --touch file:/dev/zero";
    let mut command = Command::new("/bin/sh");
    command.args(["-c", limited]).arg(crate::common::program());
    let refused = Run::to_end(command.current_dir(folder.path()));
    refused
        .exits(1)
        .says(&["/dev/zero, line 1: not a list of pages"]);
}
