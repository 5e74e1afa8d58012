//! Sources that are no memory, cannot be read, or change meanwhile.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use crate::common::{Folder, command, finish, noise, run};

#[test]
fn files_other_than_memory_are_refused_by_kind() {
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
fn unreadable_or_unwritable_file_is_named() {
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
fn stream_ending_within_a_page_leaves_no_file() {
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
fn shrinking_source_is_an_error() {
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
