//! Memory comes back byte for byte, whatever it was read from, and the report adds up.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::process::Stdio;

use super::image;
use crate::common::{Folder, Run, command, finish, make_fifo, number, remarks, run, wait_until};

#[test]
fn raw_file_comes_back_byte_for_byte() {
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
fn report_has_documented_keys_that_add_up() {
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
        Run::to_end(create.current_dir(folder.path())).exits(0);
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
            let missing = Run::to_end(missing.arg(name).current_dir(folder.path())).exits(1);
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
fn skipped_bytes_of_a_redirected_file_are_remarked() {
    let folder = Folder::new();
    folder.write("raw", &[[1; 4096], [2; 4096], [3; 4096]].concat());
    let mut file = File::open(folder.file("raw")).unwrap();
    file.seek(SeekFrom::Start(4096)).unwrap();
    let mut create = command(["create", "-", "-o", "s", "--json"]);
    let told = Run::to_end(create.current_dir(folder.path()).stdin(file))
        .exits(0)
        .says(&["warning: 4,096 bytes of the redirected file", "left out"])
        .json();
    assert_eq!(remarks(&told), [("source.skipped_bytes".to_owned(), 4096)]);
    let all = run(&folder, &["extract", "s", "-o", "-"]).exits(0).out;
    assert_eq!(all, [[2; 4096], [3; 4096]].concat());
}

#[test]
fn pipe_without_a_writer_yet_is_waited_for() {
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
    assert_eq!(Run::to_end(&mut command(["--version"])).code, Some(0));
    finish(child).exits(0);
    run(&folder, &["verify", "s"]).exits(0);
}
