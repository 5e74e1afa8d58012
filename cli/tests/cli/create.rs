//! Packing memory into a snapshot, and extracting it again.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use snaprestore_fixtures::images::Mix;

use crate::common::{
    Folder, Run, command, finish, finish_within, make_fifo, noise, number, program, remarks, run,
    wait_until,
};

/// Returns an image with every kind of page, 4 MiB and a part of a block.
fn image() -> Vec<u8> {
    Mix::new(1100, 7).bytes()
}

#[test]
fn a_raw_file_comes_back_byte_for_byte() {
    let folder = Folder::new();
    let image = image();
    folder.write("raw", &image);
    for options in [
        &[][..],
        &["--frame-size", "4", "--dictionary", "off"],
        &["--frame-size", "2M", "--level", "19", "--threads", "1"],
        &["--level", "-5"],
    ] {
        let mut args = vec!["create", "raw", "-o", "s", "--force"];
        args.extend(options);
        run(&folder, &args).exits(0);
        run(&folder, &["verify", "s"]).exits(0);
        run(&folder, &["extract", "s", "-o", "out", "--force"]).exits(0);
        assert!(folder.read("out") == image, "{options:?}");
    }
}

#[test]
fn the_report_has_the_promised_keys_and_they_add_up() {
    let folder = Folder::new();
    folder.write("raw", &image());
    let created = run(&folder, &["create", "raw", "-o", "s", "--json"])
        .exits(0)
        .json();
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    for report in [&created, &info] {
        let n = |key| number(report, key);
        assert_eq!(report["snapshot_id"].as_str().unwrap().len(), 32);
        assert_eq!(n("format_version"), 1);
        assert_eq!(n("page_size"), 4096);
        assert_eq!(n("pages"), 1100);
        assert_eq!(
            n("pages"),
            n("zero_pages")
                + n("fill_pages")
                + n("stored_pages")
                + n("duplicate_pages")
                + n("unavailable_pages")
        );
        for kind in [
            "zero_pages",
            "fill_pages",
            "stored_pages",
            "duplicate_pages",
        ] {
            assert!(n(kind) > 0, "{kind}");
        }
        assert!(n("frames") > 0);
        assert_eq!(n("frame_bytes"), 128 << 10);
        assert_eq!(n("logical_bytes"), 1100 * 4096);
        assert!(0 < n("stored_bytes") && n("stored_bytes") < n("file_bytes"));
        assert_eq!(n("file_bytes"), folder.read("s").len() as u64);
        let regions = report["regions"].as_array().unwrap();
        assert_eq!(regions.len(), 1);
        assert_eq!(regions[0]["name"], "memory");
        assert_eq!(number(&regions[0], "start"), 0);
        assert_eq!(number(&regions[0], "bytes"), 1100 * 4096);
    }
    number(&created, "elapsed_ms");
    assert_eq!(created["snapshot_id"], info["snapshot_id"]);
    assert_eq!(created["content_digest"], info["content_digest"]);
    assert_eq!(info["properties"]["source"], "raw");

    let verified = run(&folder, &["verify", "s", "--json"]).exits(0).json();
    assert_eq!(verified["ok"], true);
    assert_eq!(number(&verified, "pages_checked"), 1100);
    assert_eq!(verified["frames_checked"], created["frames"]);
    assert_eq!(verified["problems"].as_array().unwrap().len(), 0);
}

#[test]
fn holes_are_not_read_and_come_back_as_holes() {
    let folder = Folder::new();
    // A terabyte: reading its holes would take minutes.
    let file = File::create(folder.file("raw")).unwrap();
    file.set_len(1 << 40).unwrap();
    let page = [9; 4096];
    let places = [0, 300 << 30, (1 << 40) - 4096];
    for place in places {
        file.write_all_at(&page, place).unwrap();
    }
    let report = run(&folder, &["create", "raw", "-o", "s", "--json"])
        .exits(0)
        .json();
    assert_eq!(number(&report, "pages"), 1 << 28);
    assert_eq!(number(&report, "zero_pages"), (1 << 28) - 3);

    // As much as the test's file system can hold in one file.
    let small = File::create(folder.file("small")).unwrap();
    small.set_len(1 << 30).unwrap();
    small.write_all_at(&page, 700 << 20).unwrap();
    run(&folder, &["create", "small", "-o", "t"]).exits(0);
    run(&folder, &["extract", "t", "-o", "out"]).exits(0);
    let out = File::open(folder.file("out")).unwrap();
    let metadata = out.metadata().unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    assert!(
        metadata.blocks() * 512 < 1 << 20,
        "{} blocks",
        metadata.blocks()
    );
    let mut found = [0; 4096];
    out.read_exact_at(&mut found, 700 << 20).unwrap();
    assert_eq!(found, page);
}

/// Starts of states as written by releases of Firecracker with bincode and with bitcode.
const STATES: [&[u8]; 2] = [
    b"\x00\x00\x64\x86\x84\x19\x10\x07\x06\x00\x00\x00\x00\x00\x00\x00",
    b"\x00\x00\x00\x64\x86\x84\x19\x10\x07\x06\x31\x31\x2e\x30\x2e\x30",
];

/// Writes a file of 8 MiB with 64 KiB of data.
fn write_diff(folder: &Folder, name: &str) {
    let file = File::create(folder.file(name)).unwrap();
    file.set_len(8 << 20).unwrap();
    file.write_all_at(&vec![7; 64 << 10], 1 << 20).unwrap();
}

#[test]
fn holes_that_were_read_as_zeros_are_told() {
    let folder = Folder::new();
    write_diff(&folder, "diff");
    let create = ["create", "diff", "-o", "s", "--force"];
    let told = run(&folder, &create).exits(0);
    for says in ["read as zeros from holes", "snapshot-editor"] {
        assert!(told.text().contains(says), "{}", told.text());
    }
    // Most raw files have holes, so this is no warning.
    assert_eq!(told.err, "");
    let told = run(&folder, &[&create[..], &["--json"]].concat()).json();
    let remark = &told["remarks"][0];
    assert_eq!(remark["key"], "source.hole_bytes");
    let bytes: u64 = remark["value"].as_str().unwrap().parse().unwrap();
    assert!((7 << 20..8 << 20).contains(&bytes), "{bytes}");
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    assert_eq!(info["properties"]["source.hole_bytes"], remark["value"]);

    // A user who has confirmed it needs no advice.
    let confirmed = [&create[..], &["--holes", "zero"]].concat();
    let told = run(&folder, &confirmed).exits(0).text();
    assert!(told.contains("as --holes zero says"), "{told}");
    assert!(!told.contains("snapshot-editor"), "{told}");

    // A file is treated the same through standard input.
    let stdin = File::open(folder.file("diff")).unwrap();
    let mut piped = command(["create", "-", "-o", "s", "-f", "--json"]);
    let piped = Run::of(piped.current_dir(folder.path()).stdin(stdin)).exits(0);
    assert_eq!(piped.json()["remarks"], told_remarks(&folder, &create));

    folder.write("dense", &vec![7; 64 << 10]);
    let told = run(&folder, &["create", "dense", "-o", "s", "-f", "--json"]).exits(0);
    assert_eq!(told.json()["remarks"], serde_json::json!([]));
}

fn told_remarks(folder: &Folder, create: &[&str]) -> serde_json::Value {
    run(folder, &[create, &["--json"]].concat()).json()["remarks"].take()
}

#[test]
fn a_diff_of_firecracker_is_refused_unless_holes_are_said_to_be_zeros() {
    let folder = Folder::new();
    write_diff(&folder, "diff");
    folder.write("dense", &noise(1 << 20));
    folder.write("other", b"{\"vcpus\": 2}");
    for state in STATES {
        folder.write("state", &[state, &[1; 100]].concat());
        let names = folder.names();
        let attach = ["--attach", "vmstate=state"];
        let diff = [&["create", "diff", "-o", "s"][..], &attach].concat();
        run(&folder, &diff).exits(1).says(&[
            "diff: ",
            "\"vmstate\"",
            "merge it into its base",
            "--holes zero",
        ]);
        assert_eq!(folder.names(), names);
        run(&folder, &[&diff[..], &["--holes", "zero"]].concat()).exits(0);
        run(
            &folder,
            &["extract", "s", "--attachment", "vmstate", "-o", "out"],
        )
        .exits(0);
        assert_eq!(folder.read("out"), folder.read("state"));
        // The full memory of a VM, and a diff beside which another file is attached.
        run(
            &folder,
            &[&["create", "dense", "-o", "t"][..], &attach].concat(),
        )
        .exits(0);
        run(
            &folder,
            &["create", "diff", "-o", "u", "--attach", "a=other"],
        )
        .exits(0);
        for name in ["s", "t", "u", "out"] {
            std::fs::remove_file(folder.file(name)).unwrap();
        }
    }
}

/// The pages that a guest has written are scattered over its memory, with holes between them that
/// are shorter than what is read at once.
#[test]
fn a_diff_of_scattered_pages_is_refused_and_its_holes_are_counted() {
    let folder = Folder::new();
    let diff = File::create(folder.file("diff")).unwrap();
    diff.set_len(8 << 20).unwrap();
    for place in (0..8 << 20).step_by(32 << 10) {
        diff.write_all_at(&[7; 4096], place).unwrap();
    }
    folder.write("state", &[STATES[0], &[1; 100]].concat());
    let args = ["create", "diff", "-o", "s"];
    run(
        &folder,
        &[&args[..], &["--attach", "vmstate=state"]].concat(),
    )
    .exits(1)
    .says(&["diff: most of it is holes"]);
    let told = run(&folder, &[&args[..], &["--json"]].concat())
        .exits(0)
        .json();
    assert_eq!(
        remarks(&told),
        [("source.hole_bytes".to_owned(), (8 << 20) / 8 * 7)]
    );
}

#[test]
fn files_that_are_no_memory_are_refused_by_name() {
    let folder = Folder::new();
    for (magic, is, remedy) in [
        (&b"\x28\xb5\x2f\xfd"[..], "zstd", "zstd -d"),
        (b"\x1f\x8b\x08\x00", "gzip", "gzip -d"),
        (b"\xfd7zXZ\x00", "xz", "xz -d"),
        (b"\x04\x22\x4d\x18", "lz4", "lz4 -d"),
        (b"QEVM\x00\x00\x00\x03", "QEMU", "dump-guest-memory"),
        (b"LibvirtQemudSave\x02", "virsh save", "virsh dump"),
        (b"EMiL\x01\x00\x00\x00", "LiME", "format=padded"),
        (b"\x5e\x2a\x4d\x18\x04\0\0\0", "zstd or lz4", "zstd -d"),
        (b"DISKDUMP", "kdump", "makedumpfile -E"),
        (b"KDMV\x01\0\0\0", "VMDK", "dump of the memory"),
        (b"hibr", "hibernation", "convert"),
        (b"\x19\x43\x56\x54", "CRIU", "--pid"),
        (b"AVML\x02\x00\x00\x00", "AVML", "convert"),
        (b"MDMP\x93\xa7\x00\x00", "minidump", "gcore"),
        (b"PAGEDU64", "Windows", "convert"),
        (b"QFI\xfb\x00\x00\x00\x03", "qcow2", "dump-guest-memory"),
        (
            b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0",
            "no core",
            "gcore",
        ),
    ] {
        for len in [8192, 8100] {
            let mut bytes = noise(8192);
            bytes[..magic.len()].copy_from_slice(magic);
            folder.write("x", &bytes[..len]);
            let refused = run(&folder, &["create", "x", "-o", "s"])
                .exits(1)
                .says(&["x: is ", is, remedy, "--raw"]);
            assert!(!refused.err.contains("truncate"), "{}", refused.err);
            // The file is refused through a pipe as well.
            let mut child = command(["create", "-", "-o", "s"])
                .current_dir(folder.path())
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut stdin = child.stdin.take().unwrap();
            stdin.write_all(&bytes[..len]).unwrap();
            drop(stdin);
            finish(child).exits(1).says(&["standard input: is ", is]);
            assert_eq!(folder.names(), ["x"]);
            // The file is not all of another kind, so padding it would not help.
            let raw = run(&folder, &["create", "--raw", "x", "-o", "s"]);
            if len == 8192 {
                raw.exits(0);
                run(&folder, &["extract", "s", "-o", "out"]).exits(0);
                assert!(folder.read("out") == bytes);
                std::fs::remove_file(folder.file("s")).unwrap();
                std::fs::remove_file(folder.file("out")).unwrap();
            } else {
                let refused = raw.exits(1).says(&["8100 bytes"]);
                assert!(!refused.err.contains("truncate"), "{}", refused.err);
            }
        }
    }
}

#[test]
fn file_names_of_any_bytes_are_recorded_and_shown() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    let folder = Folder::new();
    let names: [&[u8]; 4] = [b"a\x1b[2J", b"a\xff", b"a\xfe", b"a\nb"];
    let mut recorded = Vec::new();
    for name in names {
        let name = OsStr::from_bytes(name);
        std::fs::write(folder.path().join(name), [1; 4096]).unwrap();
        let attach = [b"state=", name.as_bytes()].concat();
        let args = ["create", "-o", "s", "-f", "--attach"].map(OsStr::new);
        let mut create = command(args);
        create.arg(OsStr::from_bytes(&attach)).arg(name);
        Run::of(create.current_dir(folder.path())).exits(0);
        let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
        recorded.push(
            info["properties"]["source.path"]
                .as_str()
                .unwrap()
                .to_owned(),
        );
        let shown = run(&folder, &["info", "s"]).exits(0).text();
        assert!(shown.contains(recorded.last().unwrap()), "{shown}");
        assert!(!shown.contains('\x1b'), "{shown}");
        // The name is escaped as well in the error for a missing file.
        std::fs::remove_file(folder.path().join(name)).unwrap();
        for command_line in [&["create", "-o", "s", "-f"][..], &["info"], &["verify"]] {
            let mut missing = command(command_line);
            let missing = Run::of(missing.arg(name).current_dir(folder.path())).exits(1);
            assert!(!missing.err.contains('\x1b'), "{}", missing.err);
        }
    }
    assert_eq!(recorded, [r"a\x1b[2J", r"a\xff", r"a\xfe", r"a\x0ab"]);
}

#[test]
fn standard_input_and_pipes_are_streamed() {
    let folder = Folder::new();
    let image = image();
    let mut child = command(["create", "-", "-o", "s"])
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Dropped at the end of the statement, which ends the input.
    child.stdin.take().unwrap().write_all(&image).unwrap();
    finish(child).exits(0);
    run(&folder, &["extract", "s", "-o", "out"]).exits(0);
    assert!(folder.read("out") == image);

    make_fifo(&folder.file("in"));
    let child = command(["create", "in", "-o", "t"])
        .current_dir(folder.path())
        .spawn()
        .unwrap();
    let mut fifo = File::options().write(true).open(folder.file("in")).unwrap();
    fifo.write_all(&image).unwrap();
    drop(fifo);
    finish(child).exits(0);
    let [s, t] = ["s", "t"].map(|file| run(&folder, &["info", file, "--json"]).json());
    assert_eq!(s["content_digest"], t["content_digest"]);
}

#[test]
fn bytes_before_the_offset_of_a_redirected_file_are_told() {
    let folder = Folder::new();
    folder.write("raw", &[[1; 4096], [2; 4096], [3; 4096]].concat());
    let mut file = File::open(folder.file("raw")).unwrap();
    file.seek(SeekFrom::Start(4096)).unwrap();
    let mut create = command(["create", "-", "-o", "s", "--json"]);
    let told = Run::of(create.current_dir(folder.path()).stdin(file))
        .exits(0)
        .says(&["warning: 4,096 bytes of the redirected file", "left out"])
        .json();
    assert_eq!(remarks(&told), [("source.skipped_bytes".to_owned(), 4096)]);
    let all = run(&folder, &["extract", "s", "-o", "-"]).exits(0).out;
    assert_eq!(all, [[2; 4096], [3; 4096]].concat());
}

/// Runs `script` in a shell in which `$0` is the command.
fn shell(folder: &Folder, script: &str) -> Run {
    let mut shell = Command::new("/bin/sh");
    let shell = shell.args(["-c", script]).arg(program());
    Run::of(shell.current_dir(folder.path()).stdin(Stdio::null()))
}

#[test]
fn closed_standard_output_is_refused_as_output() {
    let folder = Folder::new();
    folder.write("raw", &image());
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    for args in [
        "create raw -o -",
        "extract s -o -",
        "create raw -f -o /dev/stdout",
    ] {
        shell(&folder, &format!("exec \"$0\" {args} >&-"))
            .exits(2)
            .says(&["standard output is closed"]);
        shell(&folder, &format!("exec \"$0\" {args} >/dev/null")).exits(0);
    }
}

#[test]
fn file_size_limit_is_an_error_that_names_it() {
    let folder = Folder::new();
    folder.write("raw", &noise(8 << 20));
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let names = folder.names();
    for args in ["create raw -o t", "extract s -o t", "extract s -o - >t"] {
        // The unit is 512 bytes or 1 KiB, depending on the shell.
        shell(&folder, &format!("ulimit -f 2048; exec \"$0\" {args}"))
            .exits(1)
            .says(&["File too large", "RLIMIT_FSIZE", "ulimit -f"]);
        let _ = std::fs::remove_file(folder.file("t"));
        assert_eq!(folder.names(), names);
    }
}

#[test]
fn memory_limit_is_an_error_that_names_it() {
    let folder = Folder::new();
    folder.write("raw", &image());
    let names = folder.names();
    for (limit, named) in [("-v", "RLIMIT_AS"), ("-d", "RLIMIT_DATA")] {
        shell(
            &folder,
            &format!("ulimit {limit} 150000; exec \"$0\" create raw -o t"),
        )
        .exits(1)
        .says(&["writing a snapshot takes 192 MiB of memory", named]);
        assert_eq!(folder.names(), names);
    }
}

#[test]
fn a_snapshot_can_go_to_standard_output_or_a_pipe() {
    let folder = Folder::new();
    let image = image();
    folder.write("raw", &image);
    let made = run(&folder, &["create", "raw", "-o", "-"]).exits(0);
    folder.write("s", &made.out);
    assert!(
        made.err.contains("1,100 pages"),
        "the report is elsewhere: {}",
        made.err
    );
    let back = run(&folder, &["extract", "s", "-o", "-"]).exits(0);
    assert!(back.out == image);

    make_fifo(&folder.file("fifo"));
    let both = File::options()
        .read(true)
        .write(true)
        .open(folder.file("fifo"))
        .unwrap();
    let mut reader = File::open(folder.file("fifo")).unwrap();
    let child = command(["create", "raw", "-o", "fifo", "-q"])
        .current_dir(folder.path())
        .spawn()
        .unwrap();
    let mut piped = vec![0; 8];
    reader.read_exact(&mut piped).unwrap();
    // From here on, the exit of the command ends the pipe.
    drop(both);
    reader.read_to_end(&mut piped).unwrap();
    finish(child).exits(0);
    folder.write("t", &piped);
    run(&folder, &["verify", "t"]).exits(0);
}

/// Opening the pipe would wait for a reader, and Ctrl-C could not interrupt that.
#[test]
fn named_pipe_without_reader_is_refused_as_output() {
    let folder = Folder::new();
    folder.write("raw", &image());
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    make_fifo(&folder.file("fifo"));
    for args in [
        ["create", "raw", "-o", "fifo"],
        ["extract", "s", "-o", "fifo"],
    ] {
        let child = command(args)
            .current_dir(folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let refused = finish_within(child, std::time::Duration::from_secs(60));
        refused
            .exits(1)
            .says(&["no process reads the named pipe fifo", "-o -"]);
    }
    assert_eq!(folder.names(), ["fifo", "raw", "s"]);
}

#[test]
fn an_existing_target_stays_unless_forced() {
    let folder = Folder::new();
    folder.write("raw", &[5; 4096]);
    folder.write("s", b"precious");
    run(&folder, &["create", "raw", "-o", "s"])
        .exits(1)
        .says(&["s exists already", "--force"]);
    assert_eq!(folder.read("s"), b"precious");
    // With --force, the old snapshot also stays until the new one is complete.
    run(&folder, &["create", "missing", "-o", "s", "--force"])
        .exits(1)
        .says(&["missing"]);
    assert_eq!(folder.read("s"), b"precious");
    run(&folder, &["create", "raw", "-o", "s", "--force"]).exits(0);
    run(&folder, &["verify", "s"]).exits(0);
    assert_eq!(folder.names(), ["raw", "s"]);
}

#[test]
fn what_cannot_be_read_or_written_is_named() {
    let folder = Folder::new();
    folder.write("raw", &[5; 4096]);
    folder.write("odd", &[5; 5000]);
    folder.write("empty", b"");
    folder.write("kdump", &[b"KDUMP   ".to_vec(), vec![0; 4088]].concat());
    std::fs::create_dir(folder.file("dir")).unwrap();
    let _socket = UnixListener::bind(folder.file("socket")).unwrap();
    run(&folder, &["create", "raw", "-o", "snapshot"]).exits(0);
    let failing: &[(&[&str], &[&str])] = &[
        (
            &["missing", "-o", "s"],
            &["cannot open missing", "No such file"],
        ),
        (&["socket", "-o", "s"], &["socket: is a socket", "a pipe"]),
        (
            &["/sys/devices/system/cpu/online", "-o", "s"],
            &["ends before the 4096 bytes", "copy"],
        ),
        (&["dir", "-o", "s"], &["dir", "is a folder"]),
        (
            &["/dev/zero", "-o", "s"],
            &["/dev/zero", "character device"],
        ),
        (&["odd", "-o", "s"], &["odd", "5000 bytes", "truncate"]),
        (&["empty", "-o", "s"], &["empty", "no memory"]),
        (&["-", "-o", "s"], &["standard input", "no memory"]),
        (&["kdump", "-o", "s"], &["kdump", "without compression"]),
        (&["snapshot", "-o", "s"], &["snapshot already", "--raw"]),
        (&["raw", "-o", "nowhere/s"], &["nowhere"]),
        (&["raw", "-o", "dir"], &["dir"]),
        (
            &["raw", "-o", "s", "--attach", "a=missing"],
            &["missing", "attachment"],
        ),
        (
            &["raw", "-o", "s", "--attach", "a=dir"],
            &["dir", "is a folder"],
        ),
        (
            &["raw", "-o", "s", "--dictionary", "missing"],
            &["missing", "dictionary"],
        ),
        (
            &["raw", "-o", "s", "--dictionary", "empty"],
            &["empty", "no dictionary"],
        ),
        // A target where every write fails because there is no space.
        (
            &["raw", "-o", "/dev/full", "--force"],
            &["/dev/full", "No space left"],
        ),
    ];
    let names = folder.names();
    for (args, says) in failing {
        let args: Vec<_> = ["create"].iter().chain(*args).copied().collect();
        let run = run(&folder, &args);
        assert_eq!(run.code, Some(1), "{args:?}: {}", run.err);
        assert!(
            run.err.starts_with("snaprestore: "),
            "{args:?}: {}",
            run.err
        );
        for says in *says {
            assert!(
                run.err.contains(says),
                "{args:?}: no {says:?} in {}",
                run.err
            );
        }
        assert_eq!(folder.names(), names, "{args:?} left something");
    }
    run(&folder, &["create", "--raw", "kdump", "-o", "s"]).exits(0);
}

#[test]
fn a_stream_that_ends_within_a_page_leaves_nothing() {
    let folder = Folder::new();
    let mut child = command(["create", "-", "-o", "s"])
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&[1; 5000]).unwrap();
    finish(child)
        .exits(1)
        .says(&["standard input", "5000 bytes"]);
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn a_source_that_shrinks_meanwhile_is_an_error() {
    let folder = Folder::new();
    // More than the writer may have in memory, and incompressible: a pipe that nobody reads blocks
    // it.
    folder.write("raw", &noise(160 << 20));
    let mut child = command(["create", "raw", "-o", "-", "--dictionary", "off"])
        .current_dir(folder.path())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = child.stdout.take().unwrap();
    let mut first = [0; 8];
    pipe.read_exact(&mut first).unwrap();
    File::options()
        .write(true)
        .open(folder.file("raw"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    let mut rest = Vec::new();
    pipe.read_to_end(&mut rest).unwrap();
    finish(child)
        .exits(1)
        .says(&["raw", "size changed", "to 4096 bytes"]);
    folder.write("s", &[&first[..], &rest].concat());
    run(&folder, &["verify", "s"]).exits(3);
}

#[test]
fn attachments_are_stored_beside_the_memory() {
    let folder = Folder::new();
    folder.write("raw", &[5; 4096]);
    folder.write("state", b"{\"vcpus\": 2}");
    folder.write("empty", b"");
    run(
        &folder,
        &[
            "create",
            "raw",
            "-o",
            "s",
            "--attach",
            "vm=state",
            "--attach",
            "nothing=empty",
        ],
    )
    .exits(0);
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    assert_eq!(
        info["attachments"],
        serde_json::json!([{"name": "vm", "bytes": 12}, {"name": "nothing", "bytes": 0}])
    );
    run(
        &folder,
        &["extract", "s", "--attachment", "vm", "-o", "out"],
    )
    .exits(0);
    assert_eq!(folder.read("out"), b"{\"vcpus\": 2}");
    let printed = run(
        &folder,
        &["extract", "s", "--attachment", "nothing", "-o", "-"],
    )
    .exits(0);
    assert!(printed.out.is_empty());
    run(
        &folder,
        &["extract", "s", "--attachment", "cpu", "-o", "none"],
    )
    .exits(1)
    .says(&["\"cpu\"", "vm, nothing"]);
    assert!(!folder.file("none").exists());
}

/// The command opens attachments before it reads its source.
#[test]
fn an_attachment_that_changes_meanwhile_is_told_or_an_error() {
    for grows in [false, true] {
        let folder = Folder::new();
        folder.write("state", b"{\"vcpus\": 2}");
        let args = ["create", "-", "-o", "s", "--attach", "vm=state", "--json"];
        let mut child = command(args)
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // More than the pipe holds: once it is written, the command is reading.
        stdin.write_all(&vec![7; 4 << 20]).unwrap();
        let state = File::options()
            .write(true)
            .open(folder.file("state"))
            .unwrap();
        let opened = state.metadata().unwrap();
        let place = if grows { opened.len() } else { 0 };
        wait_until("the file's time has moved on", || {
            state.write_all_at(b"[", place).unwrap();
            let now = state.metadata().unwrap();
            (now.mtime(), now.mtime_nsec()) != (opened.mtime(), opened.mtime_nsec())
        });
        drop(stdin);
        let run_of = finish(child);
        if grows {
            run_of
                .exits(1)
                .says(&["\"vm\": its size changed", "to 13 bytes"]);
            assert_eq!(folder.names(), ["state"]);
            continue;
        }
        let told = run_of.exits(0).says(&["warning: 1 attachment", "\"vm\""]);
        assert_eq!(
            remarks(&told.json()),
            [("attachments.changed".to_owned(), 1)]
        );
        let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
        assert_eq!(info["properties"]["attachments.changed"], "1");
    }
}

/// Unless the user asks for one, a dictionary is trained for small frames only.
#[test]
fn a_dictionary_is_trained_where_it_is_worth_the_time() {
    let folder = Folder::new();
    // Each frame has the same words, in a different order.
    let words: Vec<[u8; 32]> = noise(2000 * 32).as_chunks().0.to_vec();
    let order = noise((2000 * 32) + (24 << 16)).split_off(2000 * 32);
    let order = order.as_chunks::<2>().0.iter();
    let raw: Vec<u8> = order
        .flat_map(|n| words[usize::from(u16::from_le_bytes(*n)) % words.len()])
        .collect();
    folder.write("raw", &raw);
    let dictionaries = |arguments: &[&str]| {
        let arguments = [&["create", "raw", "-o", "s", "--force"], arguments].concat();
        run(&folder, &arguments).exits(0);
        let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
        info["dictionaries"].as_array().unwrap().len()
    };
    assert_eq!(dictionaries(&["--frame-size", "64"]), 1);
    assert_eq!(dictionaries(&["--frame-size", "128"]), 0);
    assert_eq!(
        dictionaries(&["--frame-size", "128", "--dictionary", "train"]),
        1
    );
    assert_eq!(
        dictionaries(&["--frame-size", "64", "--dictionary", "off"]),
        0
    );
}

#[test]
fn a_dictionary_can_be_brought_along() {
    let folder = Folder::new();
    // Any bytes can serve as a dictionary; these are shared by the pages.
    let shared: Vec<u8> = Mix::new(16, 1).bytes();
    folder.write("dictionary", &shared[..32 << 10]);
    folder.write("raw", &image());
    run(
        &folder,
        &["create", "raw", "-o", "s", "--dictionary", "dictionary"],
    )
    .exits(0);
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    assert_eq!(number(&info["dictionaries"][0], "bytes"), 32 << 10);
    run(&folder, &["verify", "s"]).exits(0);
    run(&folder, &["extract", "s", "-o", "out"]).exits(0);
    assert!(folder.read("out") == image());
}

#[test]
fn a_pipe_whose_writer_comes_later_is_waited_for() {
    let folder = Folder::new();
    make_fifo(&folder.file("in"));
    let mut child = command(["create", "in", "-o", "s", "-q"])
        .current_dir(folder.path())
        .spawn()
        .unwrap();
    // Once the other side can be opened without waiting, the command has opened the pipe.
    let mut writer = None;
    wait_until("the pipe has a reader", || {
        writer = File::options().write(true).open(folder.file("in")).ok();
        writer.is_some()
    });
    assert!(child.try_wait().unwrap().is_none());
    writer.unwrap().write_all(&[3; 4096]).unwrap();
    assert_eq!(Run::of(&mut command(["--version"])).code, Some(0));
    finish(child).exits(0);
    run(&folder, &["verify", "s"]).exits(0);
}
