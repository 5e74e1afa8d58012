//! Server of a trial's memory in a process of its own: `snaprestore serve`, or a handler.
//!
//! The server is started before anything is measured, as an operator would do, and is listening
//! when the VMM connects.
#![allow(unsafe_code, reason = "children end with the trial, by a signal")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::BenchError;
use crate::contender::{Ours, Prefetch};
use crate::contenders::outside::Outside;
use crate::trial::Trial;

/// Time allowed for it to listen, and to exit.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A serving process and its descendants.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
    said: File,
    complained: File,
    _folder: TempDir,
}

/// The socket on which it will listen, and its folder.
struct Place {
    folder: TempDir,
    socket: PathBuf,
}

impl Place {
    fn new() -> Result<Self, BenchError> {
        // A socket's path must be short, which a folder for images may not be.
        let folder = tempfile::tempdir().map_err(BenchError::io("a folder for a socket"))?;
        let socket = folder.path().join("socket");
        Ok(Self { folder, socket })
    }
}

impl Server {
    /// Starts `snaprestore serve` of a snapshot.
    pub(crate) fn serve(
        program: &Path,
        snapshot: &Path,
        options: &Ours,
    ) -> Result<Self, BenchError> {
        let place = Place::new()?;
        let mut command = Command::new(program);
        command.args(["serve", "--quiet", "--json", "--snapshot"]);
        command.arg(snapshot).arg("--socket").arg(&place.socket);
        command.args([
            "--prefetch",
            match options.prefetch {
                Prefetch::Off => "off",
                Prefetch::WorkingSet => "working-set",
                Prefetch::All => "all",
            },
        ]);
        if let Some(name) = &options.working_set {
            command.args(["--working-set", name]);
        }
        if let Some(threads) = options.fault_threads {
            command.args(["--threads", &threads.to_string()]);
        }
        if let Some(mib) = options.frame_cache {
            command.args(["--frame-cache", &mib.to_string()]);
        }
        Self::start(place, command, b"")
    }

    /// Starts a handler: this program, with its own arguments.
    pub(crate) fn handler(
        file: &Path,
        bytes: u64,
        core: Option<usize>,
        everything: bool,
        populated: bool,
    ) -> Result<Self, BenchError> {
        let place = Place::new()?;
        let trial = Trial::Outside(Outside {
            file: file.to_owned(),
            bytes,
            socket: place.socket.clone(),
            core,
            everything,
            populated,
        });
        let text = serde_json::to_vec(&trial).map_err(BenchError::trial("starting a handler"))?;
        let own = std::env::current_exe().map_err(BenchError::io("starting a handler"))?;
        let mut command = Command::new(own);
        command.args(std::env::args_os().skip(1));
        Self::start(place, command, &text)
    }

    fn start(place: Place, mut command: Command, input: &[u8]) -> Result<Self, BenchError> {
        let what = format!("starting {}", command.get_program().display());
        let failed = || BenchError::io(what.clone());
        // Files instead of pipes: reading a pipe to its end waits for all processes that hold it.
        let file = || tempfile::tempfile().map_err(failed());
        let (said, complained) = (file()?, file()?);
        command
            .stdin(Stdio::piped())
            .stdout(said.try_clone().map_err(failed())?)
            .stderr(complained.try_clone().map_err(failed())?);
        // SAFETY: the child makes one system call between fork and exec, which makes the kernel
        // kill it when the thread that started it exits.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(failed())?;
        if let Some(mut stdin) = child.stdin.take() {
            // A child that died is reported below.
            let _ = stdin.write_all(input);
        }
        let mut server = Self {
            child,
            socket: place.socket,
            said,
            complained,
            _folder: place.folder,
        };
        server.wait_for_socket(command.get_program())?;
        Ok(server)
    }

    fn wait_for_socket(&mut self, program: &OsStr) -> Result<(), BenchError> {
        let began = Instant::now();
        while !self.socket.exists() {
            let ended = self.child.try_wait().ok().flatten();
            if ended.is_some() || began.elapsed() > TIMEOUT {
                return Err(BenchError::Trial {
                    what: format!("waiting for {} to listen", program.display()),
                    why: format!("{ended:?}: {}", text(&mut self.complained).trim()),
                });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // Time for the server's remaining start-up work, which would otherwise be done when a VMM
        // connects.
        std::thread::sleep(Duration::from_millis(30));
        Ok(())
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks the server to exit, and returns its report.
    pub(crate) fn stop(mut self) -> serde_json::Value {
        self.end();
        serde_json::from_str(&text(&mut self.said)).unwrap_or_default()
    }

    /// Sends SIGTERM and waits until it exits. Before exiting, the server completes the VM, so that
    /// nothing waits for a page that will never come.
    fn end(&mut self) {
        // SAFETY: the child wasn't waited for, or `try_wait` below has returned `Some`, after which
        // this is not reached again.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        let began = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if began.elapsed() > TIMEOUT {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.end();
        }
    }
}

/// Returns everything that was written to a file.
fn text(file: &mut File) -> String {
    let mut text = String::new();
    let _ = file.seek(SeekFrom::Start(0));
    let _ = file.read_to_string(&mut text);
    text
}
