//! A launcher with the supervisor inside: serves one snapshot until its standard input ends.
//!
//! ```text
//! launcher SNAPSHOT SOCKET
//! ```
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]

use std::error::Error;
use std::fmt::Display;
use std::io::{self, Stdin};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use snaprestore_daemon::api::config::Service;
use snaprestore_daemon::{Console, Options, Role, StopRequests, Supervisor};

/// The request to stop: the end of standard input, or a line.
struct EndOfInput(Stdin);

impl AsFd for EndOfInput {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl StopRequests for EndOfInput {
    fn count(&self) -> u32 {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        u32::from(matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..)))
    }
}

/// Standard error.
struct Terminal;

impl Console for Terminal {
    fn info(&self, message: &dyn Display) {
        eprintln!("launcher: {message}");
    }

    fn error(&self, message: &dyn Display) {
        eprintln!("launcher: error: {message}");
    }
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    // The daemon has started this program as its worker or its guardian.
    if let Some(role) = Role::of_this_process() {
        return Ok(role.run()?);
    }
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let [snapshot, socket] = &args[..] else {
        return Err("usage: launcher SNAPSHOT SOCKET".into());
    };
    let stop = EndOfInput(io::stdin());
    let options = Options::default();
    let mut supervisor = Supervisor::new(options, Some(Box::new(Terminal)), Box::new(stop))?;
    supervisor.add(Service::new(
        "web",
        std::path::absolute(snapshot)?,
        std::path::absolute(socket)?,
    ))?;
    let summary = supervisor.run()?;
    for vm in &summary.vms {
        println!("{}: {vm}", vm.label);
    }
    println!("served {} VMs", summary.served);
    Ok(ExitCode::SUCCESS)
}
