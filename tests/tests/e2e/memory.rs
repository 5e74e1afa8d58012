//! Memory use of the command itself.

use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::resource::{UsageWho, getrusage};
use snaprestore_fixtures::host::told;
use snaprestore_tests::program::{program, snaprestore};
use snaprestore_tests::real::guest;

/// The promised limit for writing.
const MAX_BYTES: i64 = 128 << 20;

const CHILD: &str = "SNAPRESTORE_TEST_MEMORY_OF";

/// Returns the peak resident memory of a command (`ru_maxrss`), as reported by the kernel at its
/// exit. It is correct only if this process has waited for no other child.
fn peak_of(command: &mut Command) -> i64 {
    let status = command.stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{status}");
    let children = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    children.max_rss() * 1024
}

/// The limit holds with default options for any size of the source, here a guest of 1 GiB.
#[test]
fn create_holds_at_most_128_mib() {
    let name = "create_holds_at_most_128_mib";
    if let Some(raw) = std::env::var_os(CHILD) {
        let snapshot = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-memory.snap");
        let peak = peak_of(
            snaprestore(["create", "--force", "--output"])
                .arg(&snapshot)
                .arg(raw),
        );
        let bytes = std::fs::metadata(&snapshot).unwrap().len();
        std::fs::remove_file(&snapshot).unwrap();
        told(&format_args!(
            "create of 1 GiB to {} MiB: peak {} MiB",
            bytes >> 20,
            peak >> 20
        ));
        assert!(bytes > 1 << 20, "{bytes} bytes were written");
        assert!(peak <= MAX_BYTES, "{peak} bytes");
        return;
    }
    let Some(image) = guest(name) else {
        return;
    };
    // The kernel includes the peak of a process before its exec, and this process may have restored
    // a guest; so a fresh process starts the command.
    let output = Command::new(std::env::current_exe().unwrap())
        .args([&format!("memory::{name}"), "--exact", "--nocapture"])
        .env(CHILD, &image.raw)
        .env("SNAPRESTORE_BIN", program())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    // The rest is the output of a test harness, and would be counted.
    let said = String::from_utf8_lossy(&output.stdout);
    let peak = said.lines().find(|line| line.contains("peak"));
    told(&peak.expect("what was measured"));
}
