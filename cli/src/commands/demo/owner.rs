//! The process that the demonstration packs. It reads this machine's own files into memory, indexes
//! the words of the texts among them, and answers questions. [`Owner`] is the parent's side, which
//! starts the process and queries it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::args;
use crate::exit::Exit;
use crate::signals::Cancel;

/// Folders in which files are looked for. Texts come first and fill half of the memory.
const FOLDERS: [&str; 6] = [
    "/usr/share",
    "/etc",
    "/usr/lib",
    "/usr/bin",
    "/var/lib",
    "/opt",
];
/// Maximum number of bytes of one file.
const MAX_FILE: u64 = 8 << 20;
/// The word that is counted.
pub(super) const WORD: &str = "the";

/// The owner's description of its state.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct OwnerCounts {
    pub(super) files: u64,
    pub(super) bytes: u64,
    /// Number of distinct words in the index.
    pub(super) words: u64,
    /// Number of occurrences of [`WORD`].
    pub(super) occurrences: u64,
    /// Iterations of a thread that never sleeps; grows while the process runs.
    pub(super) rounds: u64,
}

/// A started owner. It is killed at the latest when this process exits.
#[derive(Debug)]
pub(super) struct Owner {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Owner {
    /// Starts an owner that fills `mib` MiB.
    pub(super) fn start(mib: u32) -> Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        let mut child = Command::new(program)
            .args(["demo-owner", &mib.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a process to pack")?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(questions), Some(answers)) => Ok(Self {
                child,
                questions,
                answers: BufReader::new(answers),
            }),
            _ => bail!("the process to pack has no pipes"),
        }
    }

    pub(super) fn pid(&self) -> Result<i32> {
        Ok(i32::try_from(self.child.id())?)
    }

    /// Queries the owner's state. The first query waits until it has loaded everything.
    pub(super) fn ask(&mut self, cancel: &Cancel) -> Result<OwnerCounts> {
        let mut answer = String::new();
        writeln!(self.questions, "{WORD}").context("asking the packed process")?;
        // The owner answers with one line, which arrives whole.
        cancel.wait_readable(self.answers.get_ref().as_fd())?;
        self.answers
            .read_line(&mut answer)
            .context("asking the packed process")?;
        let numbers: Vec<u64> = answer
            .split_whitespace()
            .filter_map(|number| number.parse().ok())
            .collect();
        match numbers[..] {
            [files, bytes, words, occurrences, rounds] => Ok(OwnerCounts {
                files,
                bytes,
                words,
                occurrences,
                rounds,
            }),
            _ => bail!("the packed process does not answer"),
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The files and the index that the owner holds.
#[derive(Default)]
struct Library {
    files: Vec<(PathBuf, Vec<u8>)>,
    bytes: u64,
    words: HashMap<Box<[u8]>, u64>,
}

/// Runs the owner: loads the files, then answers until its input ends.
pub(crate) fn run(args: &args::DemoOwner, cancel: &Cancel) -> Result<Exit> {
    cancel.end_at_once();
    // This process is killed when its parent exits, also while it loads.
    prctl::set_pdeathsig(Signal::SIGKILL).context("tying this process to its parent")?;
    if asker_is_gone() {
        return Ok(Exit::Done);
    }
    let mut library = Library::default();
    library.load(u64::from(args.size) << 20);
    let rounds = Arc::new(AtomicU64::new(0));
    let restless = Arc::clone(&rounds);
    std::thread::spawn(move || {
        loop {
            restless.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(500));
        }
    });
    for question in io::stdin().lock().lines() {
        let occurrences = library.words.get(question?.as_bytes()).copied();
        let told = [
            library.files.len() as u64,
            library.bytes,
            library.words.len() as u64,
            occurrences.unwrap_or(0),
            rounds.load(Ordering::Relaxed),
        ];
        let told = told.map(|number| number.to_string()).join(" ");
        writeln!(io::stdout(), "{told}")?;
    }
    Ok(Exit::Done)
}

/// Returns whether the parent exited before this process was tied to it: nobody writes questions
/// then.
fn asker_is_gone() -> bool {
    let questions = io::stdin();
    let mut fds = [PollFd::new(questions.as_fd(), PollFlags::empty())];
    let hung_up = |fd: &PollFd<'_>| fd.revents().is_some_and(|e| e.contains(PollFlags::POLLHUP));
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|_| hung_up(&fds[0]))
}

impl Library {
    fn load(&mut self, limit: u64) {
        for (number, folder) in FOLDERS.iter().enumerate() {
            let limit = if number == 0 { limit / 2 } else { limit };
            self.load_folder(Path::new(folder), limit);
        }
        // If the machine has none of these folders, this program itself is loaded.
        if self.files.is_empty() {
            self.load_file(Path::new("/proc/self/exe"));
        }
    }

    /// Loads files below `folder`, ordered by name.
    fn load_folder(&mut self, folder: &Path, limit: u64) {
        let Ok(entries) = fs::read_dir(folder) else {
            return;
        };
        let mut entries: Vec<_> = entries.flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            if self.bytes >= limit {
                return;
            }
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => self.load_folder(&entry.path(), limit),
                Ok(kind) if kind.is_file() => self.load_file(&entry.path()),
                _ => {}
            }
        }
    }

    fn load_file(&mut self, path: &Path) {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
        if read.is_err() || bytes.is_empty() {
            return;
        }
        if !bytes.contains(&0) {
            self.index(&bytes);
        }
        self.bytes += bytes.len() as u64;
        self.files.push((path.to_owned(), bytes));
    }

    fn index(&mut self, text: &[u8]) {
        for word in text.split(|byte| !byte.is_ascii_alphanumeric()) {
            if !(2..=24).contains(&word.len()) {
                continue;
            }
            let word = word.to_ascii_lowercase();
            match self.words.get_mut(&word[..]) {
                Some(count) => *count += 1,
                None => {
                    self.words.insert(word.into(), 1);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_without_regard_to_case() {
        let mut library = Library::default();
        library.index(b"The cat, the dog; THE-end. a");
        let count = |word: &str| library.words.get(word.as_bytes()).copied();
        assert_eq!(count("the"), Some(3));
        assert_eq!(count("end"), Some(1));
        assert_eq!(count("a"), None);
    }
}
