//! Snapshots that are damaged or truncated, and files that are none.

use std::process::Stdio;
use std::time::{Duration, Instant};

use snaprestore_fixtures::host::{Unavailable, skipped};
use snaprestore_fixtures::images::Mix;

use crate::common::{Folder, command, finish, number, run};

fn snapshot(folder: &Folder) -> Vec<u8> {
    folder.write("raw", &Mix::new(700, 5).bytes());
    run(folder, &["create", "raw", "-o", "good"]).exits(0);
    folder.read("good")
}

#[test]
fn flipped_bit_in_a_frame_is_found_and_nothing_is_extracted() {
    let folder = Folder::new();
    let mut bytes = snapshot(&folder);
    // The first frame follows the header.
    bytes[4096 + 200] ^= 1;
    folder.write("bad", &bytes);
    let verified = run(&folder, &["verify", "bad", "--json"]).exits(3).json();
    assert_eq!(verified["ok"], false);
    number(&verified, "frames_checked");
    number(&verified, "pages_checked");
    let problem = &verified["problems"][0];
    assert_eq!(problem["what"], "frame");
    assert_eq!(number(problem, "offset"), 4096);
    assert!(problem["detail"].as_str().unwrap().contains("checksum"));
    let text = run(&folder, &["verify", "bad"]).exits(3).text();
    assert!(
        text.contains("DAMAGED") && text.contains("at byte 4096"),
        "{text}"
    );

    run(&folder, &["extract", "bad", "-o", "out"])
        .exits(3)
        .says(&["bad", "damaged frame at byte 4096"]);
    assert_eq!(folder.names(), ["bad", "good", "raw"]);
    let streamed = run(&folder, &["extract", "bad", "-o", "-"]).exits(3);
    let raw = folder.read("raw");
    assert!(
        raw.starts_with(&streamed.out),
        "what was streamed before it is right"
    );
    // The directory is intact.
    run(&folder, &["info", "bad"]).exits(0);
}

#[test]
fn truncated_or_foreign_file_exits_3() {
    let folder = Folder::new();
    let bytes = snapshot(&folder);
    folder.write("short", &bytes[..bytes.len() - 1]);
    folder.write("half", &bytes[..bytes.len() / 2]);
    folder.write("text", b"hello");
    folder.write("empty", b"");
    for file in ["short", "half", "text", "empty", "raw"] {
        for command in [&["info"][..], &["verify"], &["extract", "-o", "out"]] {
            let mut args = command.to_vec();
            args.push(file);
            let run = run(&folder, &args);
            assert_eq!(run.code, Some(3), "{args:?}: {}{}", run.text(), run.err);
            assert!(
                run.text().contains(file) || run.err.contains(file),
                "{args:?}"
            );
        }
        let verified = run(&folder, &["verify", file, "--json"]).exits(3).json();
        assert_eq!(verified["ok"], false);
        assert!(!verified["problems"].as_array().unwrap().is_empty());
    }
    assert!(!folder.file("out").exists());
}

#[test]
fn foreign_file_is_not_called_damaged() {
    let folder = Folder::new();
    folder.write("nothing", b"");
    std::fs::create_dir(folder.file("folder")).unwrap();
    let text = run(&folder, &["verify", "nothing"]).exits(3).text();
    assert!(
        text.starts_with("nothing: not a snapshot: it is empty"),
        "{text}"
    );
    assert_eq!(text.matches("nothing").count(), 1, "{text}");
    for command in [
        &["info"][..],
        &["verify"],
        &["restore"],
        &["extract", "-o", "out"],
    ] {
        let run = run(&folder, &[command, &["folder"]].concat()).exits(1);
        assert!(
            run.err
                .starts_with("snaprestore: folder: cannot be opened: it is a folder"),
            "{}",
            run.err
        );
    }
}

/// Opening a pipe waits for its writer, and no signal interrupts that.
#[test]
fn pipe_or_device_as_input_is_refused_by_name() {
    let folder = Folder::new();
    folder.write("raw", &crate::common::noise(4096));
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    crate::common::make_fifo(&folder.file("fifo"));
    let _socket = std::os::unix::net::UnixListener::bind(folder.file("socket")).unwrap();
    let commands: [&[&str]; 10] = [
        &["info", "FILE"],
        &["verify", "FILE"],
        &["restore", "FILE"],
        &["restore", "s", "--check", "FILE"],
        &["extract", "FILE", "-o", "out"],
        &["bench", "FILE", "--dir", "."],
        &["serve", "--snapshot", "FILE", "--socket", "vmm.socket"],
        &["serve", "--config", "FILE"],
        &["create", "raw", "-o", "out", "--attach", "a=FILE"],
        &["create", "raw", "-o", "out", "--dictionary", "FILE"],
    ];
    for (file, kind) in [
        ("fifo", "named pipe"),
        ("socket", "socket"),
        ("/dev/zero", "character device"),
    ] {
        for args in commands {
            let args: Vec<_> = args.iter().map(|arg| arg.replace("FILE", file)).collect();
            let mut child = command(&args)
                .current_dir(folder.path())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let began = Instant::now();
            while child.try_wait().unwrap().is_none() {
                if began.elapsed() > Duration::from_secs(60) {
                    child.kill().unwrap();
                    panic!("{args:?} hangs");
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            finish(child).exits(1).says(&[file, kind]);
        }
    }
    assert!(!folder.file("out").exists());
}

/// A loop device over a file, until dropped.
struct Loop(String);

impl Loop {
    fn over(folder: &Folder, file: &str) -> Result<Self, String> {
        let made = std::process::Command::new("losetup")
            .args(["--find", "--show", "--read-only", file])
            .current_dir(folder.path())
            .output()
            .map_err(|error| format!("losetup: {error}"))?;
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).trim().to_owned());
        }
        Ok(Self(
            String::from_utf8(made.stdout).unwrap().trim().to_owned(),
        ))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .args(["--detach", &self.0])
            .status();
    }
}

#[test]
fn block_device_holds_a_snapshot_or_raw_memory() {
    let folder = Folder::new();
    folder.write("raw", &crate::common::noise(64 * 4096));
    // A device has whole sectors.
    for extra in 0..1024 {
        folder.write("extra", &crate::common::noise(8 * 128)[..extra]);
        run(
            &folder,
            &["create", "raw", "-o", "s", "--force", "--attach", "a=extra"],
        )
        .exits(0);
        if folder.read("s").len().is_multiple_of(512) {
            break;
        }
    }
    let (snapshot, raw) = match (Loop::over(&folder, "s"), Loop::over(&folder, "raw")) {
        (Ok(snapshot), Ok(raw)) => (snapshot, raw),
        (Err(why), _) | (_, Err(why)) => {
            let why = format!("no loop device: {why}");
            return skipped(
                "block_device_holds_a_snapshot_or_raw_memory",
                &Unavailable { why },
            );
        }
    };
    run(&folder, &["info", &snapshot.0]).exits(0);
    run(&folder, &["verify", &snapshot.0]).exits(0);
    run(&folder, &["extract", &snapshot.0, "-o", "out"]).exits(0);
    assert!(folder.read("out") == folder.read("raw"));
    run(&folder, &["create", &raw.0, "-o", "again"]).exits(0);
    // A device has no holes.
    let args = ["create", &raw.0, "--base", "again", "-o", "child"];
    run(&folder, &args)
        .exits(2)
        .says(&["a block device has no holes", "--holes zero"]);
    run(&folder, &[&args[..], &["--holes", "zero"]].concat()).exits(0);
    if crate::restore::possible(&folder, "block_device_holds_a_snapshot_or_raw_memory") {
        run(&folder, &["restore", &snapshot.0, "--check", &raw.0]).exits(0);
    }
}

#[test]
fn newer_format_exits_3() {
    let folder = Folder::new();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/golden/v1/");
    for (file, says) in [
        ("bad-version-2.snap", "version 2"),
        ("bad-required-feature.snap", "features"),
    ] {
        let path = format!("{golden}{file}");
        for command in ["info", "verify", "restore"] {
            run(&folder, &[command, &path]).exits(3).says(&[says]);
        }
    }
}

#[test]
fn damaged_section_is_reported_once() {
    let folder = Folder::new();
    // A run of zero pages long enough to be listed.
    let mut raw = crate::common::noise(8 * 4096);
    raw.resize(4096 * 4096, 0);
    folder.write("raw", &raw);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let mut bytes = folder.read("s");
    let runs = crate::restore::section(&bytes, 3);
    bytes[runs + 8] ^= 1;
    folder.write("s", &bytes);
    let report = run(&folder, &["verify", "s", "--json"]).exits(3).json();
    assert_eq!(report["problems"].as_array().unwrap().len(), 1, "{report}");
}

#[test]
fn missing_file_is_a_failed_operation() {
    let folder = Folder::new();
    for command in [&["info"][..], &["verify"], &["extract", "-o", "out"]] {
        let mut args = command.to_vec();
        args.push("nowhere");
        run(&folder, &args)
            .exits(1)
            .says(&["snaprestore: nowhere", "No such file"]);
    }
}
