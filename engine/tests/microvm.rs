//! The example launcher on `/dev/kvm`: a guest continues in memory that arrives while it runs.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "one call: no core dumps of guests")]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Cursor;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::Restore;
use snaprestore_fixtures::host::skipped;
use snapshot_format::{
    FileStore, LayerFolders, Page, Reason, RegionSpec, Snapshot, VerifyOptions, Writer,
    WriterOptions, verify,
};

/// Maximum time for a wait; only a hang takes this long.
const TIMEOUT: Duration = Duration::from_secs(120);
const MIB: &str = "32";
/// Number of filled pages: all but the first 64 KiB, which contain the program, its stack and its
/// page tables.
const FILLED: u64 = (32 << 20) / 4096 - 16;
/// The seed that the example uses: it is in the registers.
const SEED: u64 = 0x5eed_0fa1_17b1_e5ed;

/// Returns the path of the example. Cargo builds it with all tests and puts it beside them, but not
/// with this one alone.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let profile = test.ancestors().nth(2).unwrap();
        let program = profile.join("examples/microvm");
        let engine = Path::new(env!("CARGO_MANIFEST_DIR"));
        let sources = [
            "examples/microvm",
            "src",
            "uffd/src",
            "../snapshot-format/src",
        ];
        let newest = sources.map(|folder| newest_below(&engine.join(folder)));
        let built = fs::metadata(&program).and_then(|program| program.modified());
        if !built.is_ok_and(|built| newest.iter().all(|newest| built >= *newest)) {
            build(profile);
        }
        program
    })
}

fn newest_below(folder: &Path) -> SystemTime {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap());
    let times = files.map(|file| match file.metadata().unwrap() {
        folder if folder.is_dir() => newest_below(&file.path()),
        file => file.modified().unwrap(),
    });
    times.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

fn build(profile: &Path) {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--features", "rust-vmm", "--example", "microvm"])
        .arg("--target-dir")
        .arg(profile.parent().unwrap());
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    let built = cargo.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{cargo:?}: {said}");
}

/// Returns the reason why no VM can run here, if there is one.
fn no_kvm() -> Option<String> {
    let made = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    made.err().map(|error| format!("/dev/kvm: {error}"))
}

/// The exit status of a run of the example, and its output.
#[derive(Debug)]
struct Ended {
    status: ExitStatus,
    out: String,
    err: String,
}

impl Ended {
    #[track_caller]
    fn succeeded(self) -> Self {
        assert!(self.status.success(), "{self:#?}");
        self
    }

    /// Returns the guest's output.
    fn guest(&self) -> Vec<&str> {
        let lines = self.out.lines();
        lines
            .filter_map(|line| line.strip_prefix("guest: "))
            .collect()
    }
}

fn microvm<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ended {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a live rlimit. The limit is inherited by the guest's process, which
    // may be aborted.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    let folder = tempfile::tempdir().unwrap();
    let [out, err] = ["out", "err"].map(|name| folder.path().join(name));
    let mut child = Command::new(program())
        .args(args)
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > TIMEOUT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the guest hangs: {}", fs::read_to_string(&out).unwrap());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ended {
        status,
        out: fs::read_to_string(out).unwrap(),
        err: fs::read_to_string(err).unwrap(),
    }
}

fn restore(file: &Path, prefetch: &str) -> Ended {
    microvm([
        "restore".as_ref(),
        file.as_os_str(),
        "--prefetch".as_ref(),
        prefetch.as_ref(),
    ])
}

/// Creates a folder with the snapshot of a guest.
fn snapshot() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.snap");
    let args = ["snapshot".as_ref(), file.as_os_str()];
    let options = ["--memory", MIB].map(OsStr::new);
    let ended = microvm(args.into_iter().chain(options)).succeeded();
    assert_eq!(ended.guest(), [format!("filled {FILLED} pages")]);
    (folder, file)
}

#[test]
fn restored_guest_verifies_every_page() {
    if let Some(why) = no_kvm() {
        return skipped("restored_guest_verifies_every_page", &why);
    }
    let (_folder, file) = snapshot();
    let held = Snapshot::open_path(&file).unwrap();
    let starts: Vec<u64> = held.regions().iter().map(|r| r.start).collect();
    assert_eq!(starts, [0, 4 << 30]);
    // An eighth for each kind of page, and a quarter for the zeros in whole 2 MiB.
    let summary = held.summary();
    assert_eq!(summary.pages, FILLED + 16);
    assert!(summary.zero_pages > FILLED / 4 + FILLED / 16, "{summary:?}");
    assert!(summary.fill_pages > FILLED / 16, "{summary:?}");
    assert!(summary.stored_pages > FILLED / 2, "{summary:?}");
    for prefetch in ["off", "all"] {
        let ended = restore(&file, prefetch).succeeded();
        let said = [
            "goes on".to_owned(),
            format!("verified {FILLED} pages"),
            format!("verified again {FILLED} pages"),
        ];
        assert_eq!(ended.guest(), said, "{ended:#?}");
        // Some of the zeros were left to the kernel.
        assert!(!ended.out.contains("; 0 left"), "{ended:#?}");
    }
}

#[test]
fn guest_and_its_copy_end_with_equal_memory() {
    if let Some(why) = no_kvm() {
        return skipped("guest_and_its_copy_end_with_equal_memory", &why);
    }
    for prefetch in ["off", "all"] {
        let ended = microvm(["demo", "--memory", MIB, "--prefetch", prefetch]).succeeded();
        let verified = format!("verified again {FILLED} pages");
        let guests = ended.guest();
        let verifying = guests.iter().filter(|line| **line == verified);
        assert_eq!(verifying.count(), 2, "{ended:#?}");
        let endings: Vec<&str> = ended
            .out
            .lines()
            .filter(|line| line.starts_with("ending"))
            .collect();
        assert_eq!(endings.len(), 2, "{ended:#?}");
        assert_eq!(endings[0], endings[1]);
    }
}

/// Asserts that a child of the snapshot in `base` stores what the guest wrote, and that the guest
/// continues from it.
fn check_child(child: &Path, base: &Snapshot) -> Snapshot {
    let held = Snapshot::open_path(child).unwrap();
    let ids: Vec<_> = held.ancestors().iter().map(|layer| layer.id()).collect();
    assert_eq!(ids, [base.id()]);
    // The guest has inverted the first word of every fourth page, and used its stack. Pages of
    // zeros are now alike in another way.
    let summary = held.summary();
    let changed = summary.stored_pages + summary.duplicate_pages;
    assert!(
        (FILLED / 4..FILLED / 4 + 16).contains(&changed),
        "{summary:?}"
    );
    let given = Arc::new(LayerFolders::new([]));
    let store = Arc::new(FileStore::open(child).unwrap());
    let report = verify(store, VerifyOptions::default().ancestors(given)).unwrap();
    assert_eq!(report.problems, []);
    for prefetch in ["off", "all"] {
        let ended = restore(child, prefetch).succeeded();
        let verified = format!("verified again {FILLED} pages");
        assert_eq!(ended.guest(), [verified], "{ended:#?}");
    }
    held
}

#[test]
fn child_of_a_running_guest_restores_exactly() {
    if let Some(why) = no_kvm() {
        return skipped("child_of_a_running_guest_restores_exactly", &why);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).into_os_string();
    let (file, child) = (path("guest.snap"), path("child.snap"));
    let [filled, goes_on, verified, again] = [
        format!("filled {FILLED} pages"),
        "goes on".to_owned(),
        format!("verified {FILLED} pages"),
        format!("verified again {FILLED} pages"),
    ];
    // Run, snapshot, run, snapshot.
    let args = ["snapshot", "--memory", MIB, "--child"].map(Into::into);
    let ended = microvm([&args[..], &[child.clone(), file.clone()]].concat()).succeeded();
    assert_eq!(ended.guest(), [&filled[..], &goes_on, &verified]);
    let base = Snapshot::open_path(&file).unwrap();
    let held = check_child(child.as_ref(), &base);

    // The same of a guest that was restored itself, whose other pages have not all arrived.
    for prefetch in ["off", "all"] {
        let child = path(prefetch);
        let args = ["restore", "--prefetch", prefetch, "--child"].map(Into::into);
        let ended = microvm([&args[..], &[child.clone(), file.clone()]].concat()).succeeded();
        assert_eq!(ended.guest(), [&goes_on[..], &verified, &again]);
        let same = check_child(child.as_ref(), &base);
        let digest = |held: &Snapshot| held.summary().content_digest;
        assert_eq!(digest(&same), digest(&held), "{prefetch}");
    }

    // Nothing runs without the pages that have not changed.
    fs::remove_file(&file).unwrap();
    let ended = restore(child.as_ref(), "off");
    assert_eq!(ended.status.code(), Some(1), "{ended:#?}");
    assert!(ended.out.is_empty(), "{ended:#?}");
    assert!(ended.err.contains(&base.id().to_string()), "{ended:#?}");
}

/// This holds whatever page the frame contains, and whether the guest, its page walk or prefetch
/// finds the damage first.
#[test]
fn damaged_frame_kills_the_vm() {
    if let Some(why) = no_kvm() {
        return skipped("damaged_frame_kills_the_vm", &why);
    }
    let (folder, file) = snapshot();
    let held = Snapshot::open_path(&file).unwrap();
    let good = fs::read(&file).unwrap();
    // The page tables, the program, and pages that the guest has filled.
    let second = held.regions()[1].first_page;
    for page in [1, 8, 300, second + 700] {
        let stored = (page..).find_map(|page| match held.look_up(page, Reason::Verify).unwrap() {
            Page::Stored { frame, .. } => Some(frame),
            _ => None,
        });
        let frame = stored.unwrap();
        let middle = frame.offset() + u64::from(frame.stored_len()) / 2;
        let mut bytes = good.clone();
        bytes[usize::try_from(middle).unwrap()] ^= 4;
        let bad = folder.path().join("bad.snap");
        fs::write(&bad, bytes).unwrap();
        for prefetch in ["off", "all"] {
            let ended = restore(&bad, prefetch);
            assert_eq!(ended.status.signal(), Some(libc::SIGABRT), "{ended:#?}");
            assert!(!ended.out.contains("verified"), "{ended:#?}");
            let why = ["memory cannot be restored", "bad.snap: page "];
            assert!(why.iter().all(|why| ended.err.contains(why)), "{ended:#?}");
        }
    }
}

/// Returns the same snapshot with good checksums, but with one bit of its memory changed.
fn with_a_flipped_bit(file: &Path, region: usize, offset: usize) -> Vec<u8> {
    let held = Arc::new(Snapshot::open_path(file).unwrap());
    let restored = Restore::new(Arc::clone(&held))
        .prefetch(Prefetch::All)
        .start()
        .unwrap();
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
    for (number, part) in restored.regions().iter().enumerate() {
        let mut bytes = vec![0; usize::try_from(part.len()).unwrap()];
        restored.read_at(number, 0, &mut bytes).unwrap();
        if number == region {
            bytes[offset] ^= 1;
        }
        writer
            .begin_region(&RegionSpec {
                start: part.start,
                ..RegionSpec::default()
            })
            .unwrap();
        writer.write_pages(&bytes).unwrap();
    }
    for attachment in held.attachments().unwrap() {
        let bytes = held.attachment_bytes(&attachment.name, attachment.bytes);
        let bytes = bytes.unwrap();
        writer
            .attach(&attachment.name, &mut Cursor::new(bytes))
            .unwrap();
    }
    writer.finish().unwrap().0
}

/// The guest's verification is effective: it finds wrong content that passes every checksum.
#[test]
fn guest_detects_a_flipped_bit() {
    if let Some(why) = no_kvm() {
        return skipped("guest_detects_a_flipped_bit", &why);
    }
    let (folder, file) = snapshot();
    let wrong = folder.path().join("wrong.snap");
    for (region, offset, word) in [
        (0, 0x1_0000, "0x10000"),
        (0, 0x34_5fff, "0x345ff8"),
        (1, 0xab_cde5, "0x100abcde0"),
    ] {
        fs::write(&wrong, with_a_flipped_bit(&file, region, offset)).unwrap();
        let ended = restore(&wrong, "off");
        assert_eq!(ended.status.code(), Some(1), "{ended:#?}");
        let said = ["goes on".to_owned(), format!("wrong at {word}")];
        assert_eq!(ended.guest(), said, "{ended:#?}");
    }
}

#[test]
fn damaged_registers_are_refused() {
    if let Some(why) = no_kvm() {
        return skipped("damaged_registers_are_refused", &why);
    }
    let (folder, file) = snapshot();
    let good = fs::read(&file).unwrap();
    let bad = folder.path().join("bad.snap");
    // The guest keeps the seed in a general register and in a vector register.
    let seeds = good.windows(8).enumerate();
    let seeds = seeds.filter(|(_, bytes)| *bytes == SEED.to_le_bytes());
    let places: Vec<usize> = seeds.map(|(at, _)| at).collect();
    assert!(places.len() >= 2, "{places:?}");
    for at in places {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        fs::write(&bad, bytes).unwrap();
        let ended = restore(&bad, "off");
        assert_eq!(ended.status.code(), Some(1), "{ended:#?}");
        assert!(ended.out.is_empty(), "{ended:#?}");
        assert!(ended.err.contains("attachment"), "{ended:#?}");
    }
}
