//! The event loop.
//!
//! ```text
//!   wait for any of
//!     a connection          identify the peer, and check whether the service admits it
//!     a handshake           complete: it becomes a VM, and the worker gets it
//!     a worker's message    tables to keep, a VM that ended
//!     the worker's exit     read its last messages, start another, brief it
//!     a client              the worker gets its connection
//!     an upgrade's message  kill the old worker; the new one serves
//!     an event of the store the guardian exited: start another, store everything again
//!     an owner's exit       close its descriptors
//!     a signal              no more VMs; the worker completes those that are there; after a second
//!                           one they are killed
//!     a second has passed   is the worker stuck, is a handshake overdue?
//! ```

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::workers::{Briefing, SHUTDOWN_TIMEOUT};
use super::{Outgoing, POLL_INTERVAL, RunError, Stopping, Supervisor};
use crate::fd_store::{GuardianProgress, systemd};

/// Interval at which the loop checks a worker that doesn't read, and a file that is being opened or
/// written.
const BUSY_INTERVAL: Duration = Duration::from_millis(10);
/// Pause after a connection could not be accepted, since descriptors may be short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Meaning of a descriptor that the loop waits for.
#[derive(Clone, Copy, Debug)]
enum Token {
    Signal,
    Channel,
    WorkerExit,
    Upgrade,
    FdStore,
    Endpoint(usize),
    Listener(u64),
    Handshake(u64),
    Exiting,
}

impl Supervisor {
    /// Waits for events and handles them: one pass of the loop.
    pub(super) fn run_once(&mut self) -> Result<(), RunError> {
        self.send()?;
        let ready = wait(&self.awaited(), self.interval())?;
        // New VMs come before the worker's messages and its death.
        for token in ready.into_iter().rev() {
            match token {
                // Checked below, whenever it arrives.
                Token::Signal => {}
                Token::Channel => self.read_worker()?,
                Token::WorkerExit => self.replace_worker()?,
                Token::Upgrade => self.workers.read_upgrade(),
                Token::Endpoint(at) => self.accept_client(at),
                Token::Listener(key) => {
                    self.accept(key);
                }
                Token::Handshake(id) => self.read_handshake(id),
                Token::Exiting => self.reap(),
                Token::FdStore => self.handle_store_events(),
            }
        }
        if self.stop_requests.count() > 0 {
            self.stop();
        }
        for (id, error) in self.vms.overdue() {
            self.refuse(id, &error);
        }
        if self.stopping == Stopping::Draining && self.stop_requests.count() > 1 {
            self.kill_all("asked twice to stop");
            self.stopping = Stopping::Killing;
        }
        self.flush_fd_store();
        self.vms.check_closing();
        self.add_services_opened();
        self.journal.log_suppressed();
        self.log_vm_files();
        self.workers.check_upgrade();
        self.check_worker()
    }

    /// Returns the descriptors to wait for.
    fn awaited(&self) -> Vec<(BorrowedFd<'_>, Token)> {
        let mut awaited = vec![
            (self.workers.pidfd(), Token::WorkerExit),
            (self.workers.channel(), Token::Channel),
        ];
        let fd_store = self.fd_store.poll_fd();
        awaited.extend(fd_store.map(|fd| (fd, Token::FdStore)));
        if self.stop_requests.count() == 0 {
            awaited.push((self.stop_requests.as_fd(), Token::Signal));
        }
        let upgrade = self.workers.upgrade_channel();
        awaited.extend(upgrade.map(|fd| (fd, Token::Upgrade)));
        if self.workers.admits_clients() {
            let endpoints = self.endpoints.sockets();
            awaited.extend(endpoints.map(|(at, fd)| (fd, Token::Endpoint(at))));
        }
        if self.vms.has_capacity() {
            let listeners = self.services.listeners();
            awaited.extend(listeners.map(|(key, fd)| (fd, Token::Listener(key))));
        }
        let connections = self.vms.connections();
        awaited.extend(connections.map(|(id, fd)| (fd, Token::Handshake(id))));
        let exiting = self.vms.exiting_pidfds();
        awaited.extend(exiting.map(|fd| (fd, Token::Exiting)));
        awaited
    }

    /// Returns the time after which conditions are checked that no descriptor reports.
    fn interval(&self) -> Duration {
        if self.workers.has_outgoing() || self.services.is_opening() || self.vm_files.is_writing() {
            BUSY_INTERVAL
        } else {
            POLL_INTERVAL
        }
    }

    /// Sends queued messages to the worker.
    fn send(&mut self) -> Result<(), RunError> {
        self.workers.send(&Briefing {
            services: &self.services,
            vms: &self.vms,
            draining: self.stopping != Stopping::No,
        })
    }

    /// Passes a client to the worker.
    fn accept_client(&mut self, at: usize) {
        match self.endpoints.accept(at) {
            Ok(Some((endpoint, client))) => self.workers.queue(Outgoing::Client(endpoint, client)),
            Ok(None) => {}
            Err(error) => self.accept_failed(&error),
        }
    }

    /// Logs that a connection could not be accepted, and pauses.
    pub(super) fn accept_failed(&self, error: &io::Error) {
        self.journal
            .error(format_args!("cannot accept a connection: {error}"));
        std::thread::sleep(ACCEPT_PAUSE);
    }

    /// Stops accepting VMs, and makes the worker complete the current ones.
    pub(super) fn stop(&mut self) {
        if self.stopping != Stopping::No {
            return;
        }
        for key in self.services.keys() {
            self.close_service(key);
        }
        systemd::notify("STOPPING=1");
        self.stopping = Stopping::Draining;
        self.workers.queue(Outgoing::Drain);
    }

    /// Sends the messages queued for the guardian.
    fn flush_fd_store(&mut self) {
        match self.fd_store.send_queued() {
            Some(GuardianProgress::Lagging(count)) => self.journal.error(format_args!(
                "{} is not reading: {count} messages are queued until it resumes; their VMs are lost if this process is \
                 killed before that",
                self.fd_store
            )),
            Some(GuardianProgress::CaughtUp) => self.journal.info(format_args!(
                "{} has read all queued messages",
                self.fd_store
            )),
            None => {}
        }
    }

    /// Waits until the processes of all VMs that are no longer served have exited.
    pub(super) fn wait_for_exits(&mut self) -> Result<(), RunError> {
        while self.vms.has_exiting() {
            let exiting = self.vms.exiting_pidfds();
            let exiting: Vec<_> = exiting.map(|fd| (fd, Token::Exiting)).collect();
            wait(&exiting, POLL_INTERVAL)?;
            self.reap();
        }
        Ok(())
    }

    /// Shuts the worker down, with time to finish its replies to operators.
    pub(super) fn shut_down_worker(&mut self) {
        self.workers.queue(Outgoing::Shutdown);
        let until = Instant::now() + SHUTDOWN_TIMEOUT;
        while self.send().is_ok() && Instant::now() < until {
            let ready = wait(
                &[
                    (self.workers.pidfd(), Token::WorkerExit),
                    (self.workers.channel(), Token::Channel),
                ],
                self.interval(),
            );
            if ready.is_err() || self.read_worker().is_err() || self.workers.reap_if_exited() {
                return;
            }
        }
    }
}

/// Waits until one of the descriptors is ready, at most for `interval`. Returns the ready ones.
fn wait(awaited: &[(BorrowedFd<'_>, Token)], interval: Duration) -> Result<Vec<Token>, RunError> {
    let fds = awaited.iter();
    let mut fds: Vec<_> = fds
        .map(|(fd, _)| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    let timeout = PollTimeout::try_from(interval).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(RunError::Wait(errno)),
    }
    let ready = fds.iter().zip(awaited);
    let ready = ready.filter(|(fd, _)| fd.any().unwrap_or(true));
    Ok(ready.map(|(_, (_, token))| *token).collect())
}
