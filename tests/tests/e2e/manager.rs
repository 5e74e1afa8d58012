//! A service manager that stores descriptors.

use std::fs;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::scene::HANG_TIMEOUT;

/// A stand-in for systemd that stores the descriptors that a service sends.
pub(crate) struct FakeManager {
    socket: UnixDatagram,
    path: PathBuf,
    kept: Vec<(String, OwnedFd)>,
}

impl FakeManager {
    pub(crate) fn at(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).expect("no socket at the path");
        socket
            .set_read_timeout(Some(HANG_TIMEOUT))
            .expect("cannot change the setting");
        Self {
            socket,
            path: path.to_owned(),
            kept: Vec::new(),
        }
    }

    /// Returns a service for which this manager stores up to `room` descriptors.
    pub(crate) fn manages(&self, mut service: Command, room: usize) -> Command {
        service
            .env("NOTIFY_SOCKET", &self.path)
            .env("FDSTORE", room.to_string());
        service
    }

    pub(crate) fn take_one(&mut self) {
        use snaprestore_uffd::os::receive;
        let mut buffer = [0; 4096];
        let received = receive(self.socket_fd(), &mut buffer).expect("no message arrived");
        let text = String::from_utf8_lossy(&buffer[..received.bytes]).into_owned();
        let lines: Vec<_> = text.lines().collect();
        let name = |line: &str| line.strip_prefix("FDNAME=").expect(line).to_owned();
        match lines[..] {
            ["FDSTORE=1", of, "FDPOLL=0"] => {
                assert_eq!(received.descriptors.len(), 1);
                let fds = received.descriptors.into_iter();
                self.kept.extend(fds.map(|fd| (name(of), fd)));
            }
            ["READY=1" | "STOPPING=1"] => {}
            ["FDSTOREREMOVE=1", of] => self.kept.retain(|(kept, _)| *kept != name(of)),
            _ => panic!("{text}"),
        }
    }

    fn socket_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        self.socket.as_fd()
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        self.kept.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Returns a command that starts `service` with all stored descriptors and one of its own.
    pub(crate) fn start(&self, service: &Command) -> Command {
        let names: Vec<_> = std::iter::once("some.socket").chain(self.names()).collect();
        // In the service they are numbered from 3 on, whatever their numbers are here.
        let null = fs::File::open("/dev/null").expect("file is missing");
        let mut sources: Vec<RawFd> = vec![null.as_raw_fd()];
        sources.extend(self.kept.iter().map(|(_, fd)| fd.as_raw_fd()));
        let high: Vec<OwnedFd> = sources
            .iter()
            .map(|fd| {
                // SAFETY: the call takes numbers; nothing owns the descriptor that it creates yet.
                unsafe {
                    let high = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, 200);
                    assert!(high >= 200);
                    OwnedFd::from_raw_fd(high)
                }
            })
            .collect();
        let mut command = Command::new("sh");
        command
            .args(["-c", "export LISTEN_PID=$$; exec \"$0\" \"$@\""])
            .arg(service.get_program())
            .args(service.get_args())
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"));
        let pass_on = move || {
            for (number, fd) in (3..).zip(&high) {
                // SAFETY: between fork and exec only this thread runs, and the numbers from 3 on
                // belong to the parent's copies, of which the child needs none.
                if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(pass_on) };
        command
    }
}
