//! The program under test, and the output of its runs.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

/// Returns the path of the `snaprestore` program: the one that `SNAPRESTORE_BIN` names, or one that
/// is built now.
///
/// Cargo gives a test the programs of its own package only, so this asks cargo for it.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| match std::env::var_os("SNAPRESTORE_BIN") {
        Some(path) => PathBuf::from(path),
        None => build(),
    })
}

/// Builds the program, with the fail points at which tests kill it.
fn build() -> PathBuf {
    let what = ["--package", "snaprestore", "--all-features", "--bins"];
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let output = Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .arg("build")
        .args(what)
        .args(["--message-format", "json-render-diagnostics"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .expect("cannot run cargo");
    assert!(output.status.success(), "{what:?} can't be built");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .expect("cargo named no program")
}

/// Returns a `snaprestore` command with arguments and empty standard input.
pub fn snaprestore<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program());
    command.args(args).stdin(Stdio::null());
    command
}

/// A finished run.
#[derive(Debug)]
pub struct Run {
    what: String,
    /// The exit code; `None` if a signal killed it.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// Standard output.
    pub out: Vec<u8>,
    /// Standard error.
    pub err: String,
}

impl Run {
    /// Runs a command to its end.
    pub fn to_end(command: &mut Command) -> Self {
        let what = format!("{command:?}");
        let output = command.output();
        Self::new(what, output)
    }

    /// Waits for a child whose output goes to pipes.
    pub fn finish(child: Child) -> Self {
        Self::new("the child".into(), child.wait_with_output())
    }

    fn new(what: String, output: io::Result<Output>) -> Self {
        use std::os::unix::process::ExitStatusExt as _;
        let output = output.unwrap_or_else(|error| panic!("{what}: {error}"));
        Self {
            what,
            code: output.status.code(),
            signal: output.status.signal(),
            out: output.stdout,
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Asserts an exit code, and prints the output if it is another one.
    #[must_use]
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "{} (signal {:?})\n{}\n{}",
            self.what,
            self.signal,
            String::from_utf8_lossy(&self.out),
            self.err
        );
        self
    }

    /// Asserts that standard error contains each of these parts.
    #[track_caller]
    pub fn says(&self, parts: &[&str]) {
        for part in parts {
            let what = &self.what;
            assert!(
                self.err.contains(part),
                "{what} says no {part:?} but: {}",
                self.err
            );
        }
    }

    /// Parses standard output as one JSON object.
    #[track_caller]
    pub fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.out);
        let value: Value = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{}: {error}: {text}\n{}", self.what, self.err));
        assert!(value.is_object(), "{value}");
        value
    }
}

/// Runs `snaprestore`, asserts that it succeeds, and returns its JSON report.
#[track_caller]
pub fn done<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Value {
    Run::to_end(snaprestore(args).arg("--json")).exits(0).json()
}

/// Returns a number of a report.
#[track_caller]
pub fn number(report: &Value, key: &str) -> u64 {
    report[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {key:?} in {report}"))
}
