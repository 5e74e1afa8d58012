//! Places that a snapshot is written to, and limits on writing.

use std::fs::File;
use std::io::Read as _;
use std::process::Stdio;

use super::{image, shell};
use crate::common::{Folder, command, finish, finish_within, make_fifo, noise, run};

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
fn snapshot_can_go_to_standard_output_or_a_pipe() {
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
fn existing_target_stays_unless_forced() {
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
