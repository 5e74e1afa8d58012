//! What a command's own memory comes to.

use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::resource::{UsageWho, getrusage};
use snaprestore_fixtures::host::told;
use snaprestore_tests::program::{program, snaprestore};
use snaprestore_tests::real::guest;

/// The bound that is promised for writing.
const MOST_BYTES: i64 = 128 << 20;

const CHILD: &str = "SNAPRESTORE_TEST_MEMORY_OF";

/// The most memory that a command held at once (`VmHWM`), as the kernel says at its end; right if
/// this process waited for no other.
fn peak_of(command: &mut Command) -> i64 {
    let status = command.stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{status}");
    let children = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    children.max_rss() * 1024
}

/// With default options, whatever the size of the source: here a guest of 1 GiB.
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
        assert!(peak <= MOST_BYTES, "{peak} bytes");
        return;
    }
    let Some(image) = guest(name) else {
        return;
    };
    // The kernel counts what a process was before it became another program, and this one may have
    // restored a guest; so a fresh one starts the command.
    let output = Command::new(std::env::current_exe().unwrap())
        .args([&format!("memory::{name}"), "--exact", "--nocapture"])
        .env(CHILD, &image.raw)
        .env("SNAPRESTORE_BIN", program())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    // The rest is a test harness's, and would be counted.
    let said = String::from_utf8_lossy(&output.stdout);
    let peak = said.lines().find(|line| line.contains("peak"));
    told(&peak.expect("what was measured"));
}
