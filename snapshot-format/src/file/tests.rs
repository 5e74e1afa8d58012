use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt as _;

use super::*;

/// Reports that a test can't run here, past the test harness, which would swallow a `println!`.
fn skipped(test: &str, why: &str) {
    let _ = writeln!(io::stdout(), "SKIPPED {test}: {why}");
}

/// Returns the combinations to test: a folder, whether files in it are nameless, and whether they
/// replace an existing file.
fn cases() -> impl Iterator<Item = (tempfile::TempDir, bool, bool)> {
    [(true, true), (true, false), (false, true), (false, false)]
        .into_iter()
        .map(|(nameless, force)| (tempfile::tempdir().unwrap(), nameless, force))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn write_new(target: &Path, force: bool, nameless: bool) -> SnapshotFile {
    let mut file = SnapshotFile::create_with(target, force, nameless).unwrap();
    assert!(file.is_regular());
    file.write_all(b"new").unwrap();
    file.flush().unwrap();
    file
}

#[test]
fn target_appears_whole_or_not_at_all() {
    for (folder, nameless, force) in cases() {
        let target = folder.path().join("snapshot");
        drop(write_new(&target, force, nameless));
        assert_eq!(names(folder.path()), [""; 0], "dropped before the end");

        let file = write_new(&target, force, nameless);
        assert!(!target.exists());
        assert_eq!(names(folder.path()).len(), usize::from(!nameless));
        file.commit().unwrap();
        assert_eq!(names(folder.path()), ["snapshot"]);
        assert_eq!(fs::read(&target).unwrap(), b"new");
    }
}

#[test]
fn existing_target_is_an_error_and_stays() {
    for (folder, nameless, _) in cases() {
        let target = folder.path().join("snapshot");
        fs::write(&target, "old").unwrap();
        let refused = SnapshotFile::create_with(&target, false, nameless);
        assert!(matches!(refused, Err(FileError::Exists { .. })));
        assert_eq!(names(folder.path()), ["snapshot"]);

        // It may also come while the file is written, which is kept then.
        fs::remove_file(&target).unwrap();
        let file = write_new(&target, false, nameless);
        fs::write(&target, "old").unwrap();
        assert_eq!(kept(file.commit()), b"new");
        assert_eq!(names(folder.path()).len(), 2);
        assert_eq!(fs::read(&target).unwrap(), b"old");
    }
}

/// Returns the content of the file that could not be given its name because another file had it.
fn kept(committed: Result<(), FileError>) -> Vec<u8> {
    let error = committed.unwrap_err();
    let FileError::NotNamed {
        partial, source, ..
    } = &error
    else {
        panic!("{error:?}");
    };
    assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
    assert!(error.to_string().contains(partial.to_str().unwrap()));
    fs::read(partial).unwrap()
}

#[test]
fn replaced_target_stays_until_the_end() {
    for (folder, nameless, _) in cases() {
        let target = folder.path().join("snapshot");
        fs::write(&target, "old").unwrap();
        let mut reader = File::open(&target).unwrap();

        drop(write_new(&target, true, nameless));
        assert_eq!(fs::read(&target).unwrap(), b"old");
        let file = write_new(&target, true, nameless);
        assert_eq!(fs::read(&target).unwrap(), b"old");
        file.commit().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["snapshot"]);

        // A process that has the old file open can still read it.
        let mut old = String::new();
        reader.read_to_string(&mut old).unwrap();
        assert_eq!(old, "old");
    }
}

/// Runs the test `name` of this file in a process of its own, which ends without running any
/// destructor.
fn in_dying_process(name: &str, folder: &Path, step: &str) {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("file::tests::{name}"), "--nocapture"])
        .env("SNAPSHOT_FILE_TEST", folder)
        .env("SNAPSHOT_FILE_STEP", step)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(!status.success(), "the process was to die at {step}");
}

#[test]
fn killed_writer_leaves_the_old_target_or_the_new() {
    if let Some(folder) = std::env::var_os("SNAPSHOT_FILE_TEST") {
        let target = Path::new(&folder).join("snapshot");
        let mut file = SnapshotFile::create(&target, true).unwrap();
        let step = std::env::var("SNAPSHOT_FILE_STEP").unwrap();
        if step == "created" {
            std::process::abort();
        }
        file.write_all(&vec![7; 1 << 20]).unwrap();
        if step == "written" {
            std::process::abort();
        }
        file.commit().unwrap();
        std::process::abort();
    }
    for (step, len) in [("created", 3), ("written", 3), ("committed", 1 << 20)] {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("snapshot");
        fs::write(&target, "old").unwrap();
        in_dying_process(
            "killed_writer_leaves_the_old_target_or_the_new",
            folder.path(),
            step,
        );
        assert_eq!(
            fs::metadata(&target).unwrap().len(),
            len,
            "killed when {step}"
        );
        if SnapshotFile::create(&target, true)
            .is_ok_and(|file| matches!(file.place, Place::Nameless { .. }))
        {
            assert_eq!(names(folder.path()), ["snapshot"], "killed when {step}");
        }
    }
}

#[test]
fn missing_folder_and_a_folder_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = SnapshotFile::create(folder.path().join("no/snapshot"), true);
    assert!(matches!(missing, Err(FileError::NoFolder { .. })));
    for force in [true, false] {
        let itself = SnapshotFile::create(folder.path(), force);
        assert!(matches!(itself, Err(FileError::IsFolder { .. })));
    }
}

#[test]
fn link_keeps_pointing_to_the_replaced_file() {
    let folder = tempfile::tempdir().unwrap();
    let (link, target) = (folder.path().join("link"), folder.path().join("snapshot"));
    fs::write(&target, "old").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    write_new(&link, true, true).commit().unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(fs::read(&target).unwrap(), b"new");
}

#[test]
fn devices_and_pipes_are_written_directly() {
    let mut null = SnapshotFile::create("/dev/null", false).unwrap();
    assert!(!null.is_regular());
    null.write_all(&vec![1; 100_000]).unwrap();
    null.commit().unwrap();
    assert!(
        Path::new("/dev/null")
            .metadata()
            .unwrap()
            .file_type()
            .is_char_device()
    );

    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut reader = File::options().read(true).write(true).open(&fifo).unwrap();
    let mut file = SnapshotFile::create(&fifo, false).unwrap();
    file.write_all(b"new").unwrap();
    file.commit().unwrap();
    let mut read = [0; 3];
    reader.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"new");
}

#[test]
fn full_device_is_an_error() {
    let mut full = SnapshotFile::create("/dev/full", false).unwrap();
    full.write_all(b"new").unwrap();
    assert!(matches!(full.commit(), Err(FileError::Io { .. })));
}

#[test]
fn writing_at_offsets_and_in_sequence_agree() {
    use std::os::unix::fs::FileExt;

    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("raw");
    let mut file = SnapshotFile::create(&target, false).unwrap();
    file.write_all(b"head").unwrap();
    file.file().unwrap().write_all_at(b"tail", 8).unwrap();
    file.commit().unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"head\0\0\0\0tail");
}

#[test]
fn only_the_owner_reads_a_new_file_and_a_replaced_one_keeps_its_permissions() {
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    for (folder, nameless, force) in cases() {
        let target = folder.path().join("snapshot");
        write_new(&target, force, nameless).commit().unwrap();
        // The test's umask can only take bits away.
        assert_eq!(mode(&target) & 0o177, 0, "{:o}", mode(&target));

        for given in [0o640, 0o604, 0o600] {
            fs::set_permissions(&target, Permissions::from_mode(given)).unwrap();
            write_new(&target, true, nameless).commit().unwrap();
            assert_eq!(mode(&target), given);
        }
    }
}

#[test]
fn replaced_file_keeps_its_owner_and_group() {
    let name = "replaced_file_keeps_its_owner_and_group";
    let other = (54_321, 54_322);
    if let Some(folder) = std::env::var_os("SNAPSHOT_FILE_TEST") {
        let (target, nameless) = (Path::new(&folder).join("snapshot"), false);
        write_new(&target, true, nameless).commit().unwrap();
        std::process::abort();
    }
    let access = |path: &Path| {
        let file = fs::metadata(path).unwrap();
        ((file.uid(), file.gid()), file.mode() & 0o7777)
    };
    for (folder, nameless, copied) in cases() {
        let target = folder.path().join("snapshot");
        fs::write(&target, "old").unwrap();
        if let Err(error) = std::os::unix::fs::chown(&target, Some(other.0), Some(other.1)) {
            return skipped(name, &format!("cannot change the owner of a file: {error}"));
        }
        fs::set_permissions(&target, Permissions::from_mode(0o664)).unwrap();
        let file = write_new(&target, true, nameless);
        let refuse = |_: &Path, _: &Path| Err(io::Error::from(Errno::EXDEV));
        if copied {
            file.commit_with(refuse).unwrap();
        } else {
            file.commit().unwrap();
        }
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(access(&target), (other, 0o664), "{nameless} {copied}");
    }

    // A user who may replace the file, but not give it away: no other group gains access.
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("snapshot");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    fs::write(&target, "old").unwrap();
    fs::set_permissions(&target, Permissions::from_mode(0o664)).unwrap();
    // That user may not be able to run a program of this folder.
    let program = folder.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let status = std::process::Command::new(program)
        .args(["--exact", &format!("file::tests::{name}"), "--nocapture"])
        .env("SNAPSHOT_FILE_TEST", folder.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .uid(other.0)
        .gid(other.1)
        .status()
        .unwrap();
    assert!(!status.success(), "the process was to die");
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert_eq!(access(&target), (other, 0o604));
}

#[test]
fn nameless_file_that_gets_no_name_is_copied() {
    let refuse = |_: &Path, _: &Path| Err(io::Error::from(Errno::EXDEV));
    for force in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("snapshot");
        if force {
            fs::write(&target, "old").unwrap();
            fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
        }
        let file = write_new(&target, force, true);
        if !matches!(file.place, Place::Nameless { .. }) {
            return skipped(
                "nameless_file_that_gets_no_name_is_copied",
                "the file system knows none",
            );
        }
        file.commit_with(refuse).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["snapshot"]);
        let mode = fs::metadata(&target).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, if force { 0o640 } else { 0o600 });

        // One that came in between stays here, too.
        let late = folder.path().join("late");
        let file = write_new(&late, false, true);
        fs::write(&late, "old").unwrap();
        assert_eq!(kept(file.commit_with(refuse)), b"new");
        assert_eq!(fs::read(&late).unwrap(), b"old");
        assert_eq!(names(folder.path()).len(), 3);
    }
}

/// `rename_new` where there is neither a flag for it nor a link.
#[test]
fn temporary_name_is_claimed_once() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("snapshot");
    claim(&target).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"");
    fs::write(&target, "old").unwrap();
    let refused = claim(&target).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&target).unwrap(), b"old");
}

#[test]
fn file_that_cannot_be_named_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("snapshot");
    let file = write_new(&target, true, false);
    // Nothing can be renamed over a folder.
    fs::create_dir(&target).unwrap();
    let error = file.commit().unwrap_err();
    let FileError::NotNamed { partial, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(fs::read(partial).unwrap(), b"new");
}

#[test]
fn temporary_names_are_unpredictable() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("snapshot");
    let (_first, one) = create_named(&target).unwrap();
    fs::remove_file(&one).unwrap();
    let (_second, other) = create_named(&target).unwrap();
    assert_ne!(one, other);
}

#[test]
fn block_device_is_refused() {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};

    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    // No driver has this number, and it is not opened.
    if let Err(error) = mknod(&disk, SFlag::S_IFBLK, Mode::S_IRWXU, makedev(511, 7)) {
        return skipped(
            "block_device_is_refused",
            &format!("cannot make one: {error}"),
        );
    }
    let refused = SnapshotFile::create(&disk, true);
    assert!(matches!(refused, Err(FileError::BlockDevice { .. })));
}
