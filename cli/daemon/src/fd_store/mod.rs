//! Holds the userfaultfd and the pidfd of each VM besides the daemon, so that the daemon's death
//! harms no guest.
//!
//! When the last descriptor of a userfaultfd closes, what is missing becomes zeros, or the VM, if
//! it has kept a descriptor, waits for ever. Supervisor and worker can die together: by a group
//! kill, by the machine's shortage of memory. So somebody else has to hold the descriptors:
//!
//! ```text
//!   store                    the supervisor dies                      afterwards
//!   systemd's store          systemd starts it again, with all        VMs go on; they waited
//!                            that was stored                          meanwhile at missing pages
//!   the guardian, a process  it kills the VMs, waits for their exit,  they are started anew
//!   outside of its cgroup    and only then closes
//!   none                                                              VMs wait for ever, or read
//!                                                                     zeros
//! ```
//!
//! A VM is held from the moment at which it is accepted, by its pidfd alone until its handshake has
//! come: what it has sent could be lost with the supervisor, and it would wait for ever. A VM that
//! has connected and was not accepted is held with the listening socket: the next supervisor
//! accepts from the same one, and the guardian kills whoever is in its queue.
//!
//! Stored descriptors have an id, made of letters, digits, `-` and `_`, which means the same over
//! restarts, and roles below it. systemd compares what it is given: the same open file is kept
//! once, under the name that came first. So what VMs share, as a snapshot's file, is held under an
//! id of its own.

pub(crate) mod backlog;
mod cgroup;
pub(crate) mod guardian;
pub(crate) mod systemd;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use self::guardian::{Guardian, SEND_TIMEOUT_MS};
use self::systemd::{Inherited, Manager};

/// The role of a userfaultfd; more of one owner, born of its forks, have roles that begin so.
pub const UFFD: &str = "uffd";
/// The role of the pidfd of the process whose memory it is.
pub const OWNER: &str = "owner";

/// The role of a socket at which VMs connect.
const LISTENING: &str = "listening";

/// The longest id. With the longest role a name has at most the 255 bytes that systemd permits.
const MAX_ID_BYTES: usize = 64;
const MAX_ROLE_BYTES: usize = 64;

/// A store of descriptors outside of this process.
#[derive(Debug)]
pub struct FdStore {
    backend: Backend,
    /// The roles that are stored of each id.
    stored: BTreeMap<String, Vec<String>>,
    /// The last message about each id that the guardian could not be told, to be sent when it reads
    /// again.
    queued: BTreeMap<String, QueuedMessage>,
    /// Whether the operator knows that messages wait.
    is_lagging: bool,
}

/// A message that waits until the guardian reads.
#[derive(Debug)]
struct QueuedMessage {
    text: String,
    fds: Vec<OwnedFd>,
}

/// A change in how the guardian keeps up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuardianProgress {
    /// The guardian does not read: so many messages wait.
    Lagging(usize),
    /// The guardian has read all messages that had waited.
    CaughtUp,
}

#[derive(Debug)]
enum Backend {
    Systemd { manager: Manager, room: usize },
    Guardian(Guardian),
    Unavailable { why: io::Error },
}

/// An event that the supervisor has to handle.
#[derive(Debug, PartialEq, Eq)]
pub enum StoreEvent {
    /// The guardian could not take what was to be stored: it has to be held again, or given up.
    NotStored {
        /// The id.
        id: String,
        /// The reason.
        why: String,
    },
    /// The guardian has ended: another has to be found, and everything be held anew.
    GuardianExited,
}

impl FdStore {
    /// Chooses systemd if it keeps descriptors for this service, else a guardian, started from
    /// `program` (the supervisor's is `/proc/self/exe`), else nobody. `inherited` came back from
    /// systemd, which still holds it.
    ///
    /// [`FdStore::warning`] tells what an operator should know about the choice.
    pub fn find(program: &Path, inherited: &Inherited) -> Self {
        let room = systemd::capacity();
        let roles =
            |fds: &Vec<(String, OwnedFd)>| fds.iter().map(|(role, _)| role.clone()).collect();
        if room > 0
            && let Some(Ok(manager)) = Manager::from_env()
        {
            return Self {
                backend: Backend::Systemd { manager, room },
                stored: inherited
                    .stored
                    .iter()
                    .map(|(id, fds)| (id.clone(), roles(fds)))
                    .collect(),
                queued: BTreeMap::new(),
                is_lagging: false,
            };
        }
        Self::with(match Guardian::start(program) {
            Ok(guardian) => Backend::Guardian(guardian),
            Err(why) => Backend::Unavailable { why },
        })
    }

    /// Creates an empty store.
    fn with(backend: Backend) -> Self {
        Self {
            backend,
            stored: BTreeMap::new(),
            queued: BTreeMap::new(),
            is_lagging: false,
        }
    }

    /// Stores the descriptors `fds` of `id`, each with its role. One that is stored under the same
    /// id and role already must be the same. `service` is the name of the service for the
    /// guardian's log.
    ///
    /// The guardian holds the owner and the userfaultfds, and nothing else: it ends VMs, and can't
    /// go on with them. Once this has returned, the supervisor may die, unless the guardian
    /// [lags](FdStore::send_queued).
    pub fn store(
        &mut self,
        id: &str,
        service: &str,
        fds: &[(&str, BorrowedFd<'_>)],
    ) -> io::Result<()> {
        check(id, fds)?;
        match &self.backend {
            Backend::Systemd { manager, room } => {
                let stored: usize = self.stored.values().map(Vec::len).sum();
                let roles = self.stored.entry(id.to_owned()).or_default();
                let known = |role: &str| roles.iter().any(|known| known == role);
                let new: Vec<_> = fds.iter().filter(|(role, _)| !known(role)).collect();
                if stored + new.len() > *room {
                    let why = format!(
                        "the descriptor store is full; raise FileDescriptorStoreMax= (now {room})"
                    );
                    return Err(io::Error::other(why));
                }
                for (role, fd) in new {
                    manager.store(&systemd::name(id, role), *fd)?;
                    roles.push((*role).to_owned());
                }
                Ok(())
            }
            Backend::Guardian(_) => {
                let of = |wanted: fn(&str) -> bool| {
                    fds.iter()
                        .filter(move |(role, _)| wanted(role))
                        .map(|(_, fd)| *fd)
                };
                // The owner is the first of them.
                let mut all: Vec<_> = of(|role| role == OWNER).collect();
                if all.is_empty() {
                    return Ok(());
                }
                all.extend(of(|role| role.starts_with(UFFD)));
                self.send(id, format!("hold {id} {service}"), &all)
            }
            Backend::Unavailable { .. } => Ok(()),
        }
    }

    /// Stores the socket `listener` of `service`, at which VMs of the users `allowed` connect, or
    /// of all if none is named.
    pub(crate) fn store_listener(
        &mut self,
        id: &str,
        service: &str,
        listener: BorrowedFd<'_>,
        allowed: &[u32],
    ) -> io::Result<()> {
        if !matches!(self.backend, Backend::Guardian(_)) {
            return self.store(id, service, &[(LISTENING, listener)]);
        }
        let uids: Vec<_> = allowed.iter().map(ToString::to_string).collect();
        let text = format!("listen {id} {service} {}", uids.join(","));
        self.send(id, text, &[listener])
    }

    /// Removes all descriptors of `id`: its VM has exited, or has all its memory.
    pub fn remove(&mut self, id: &str) -> io::Result<()> {
        let roles = self.stored.remove(id).unwrap_or_default();
        match &self.backend {
            Backend::Systemd { manager, .. } => roles
                .iter()
                .try_for_each(|role| manager.remove(&systemd::name(id, role))),
            Backend::Guardian(_) => self.send(id, format!("release {id}"), &[]),
            Backend::Unavailable { .. } => Ok(()),
        }
    }

    /// Sends the guardian a message about `id`, in the place of one that still waits. If the
    /// guardian doesn't read, the message waits.
    fn send(&mut self, id: &str, text: String, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Backend::Guardian(guardian) = &self.backend else {
            return Ok(());
        };
        self.queued.remove(id);
        // It is given time once, not for each message.
        let wait = if self.queued.is_empty() {
            SEND_TIMEOUT_MS
        } else {
            0
        };
        match guardian.send(&text, fds, wait) {
            Err(error) if is_retryable(&error) => {
                let fds = fds.iter().map(BorrowedFd::try_clone_to_owned);
                let fds = fds.collect::<io::Result<_>>()?;
                self.queued
                    .insert(id.to_owned(), QueuedMessage { text, fds });
                Ok(())
            }
            // Another will be told everything.
            Err(error) if is_gone(&error) => Ok(()),
            told => told,
        }
    }

    /// Sends the messages that wait. Returns what the operator ought to know, once.
    pub(crate) fn send_queued(&mut self) -> Option<GuardianProgress> {
        while let Some((id, QueuedMessage { text, fds })) = self.queued.pop_first() {
            let Backend::Guardian(guardian) = &self.backend else {
                continue;
            };
            let borrowed: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
            match guardian.send(&text, &borrowed, 0) {
                Err(error) if !is_gone(&error) => {
                    self.queued.insert(id, QueuedMessage { text, fds });
                    break;
                }
                _ => {}
            }
        }
        let waiting = self.queued.len();
        match (waiting, self.is_lagging) {
            (1.., false) => {
                self.is_lagging = true;
                Some(GuardianProgress::Lagging(waiting))
            }
            (0, true) => {
                self.is_lagging = false;
                Some(GuardianProgress::CaughtUp)
            }
            _ => None,
        }
    }

    /// Waits until the guardian has taken all messages. False if it does not read in time: it could
    /// kill VMs that were removed long ago.
    pub(crate) fn flush(&mut self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        loop {
            let _ = self.send_queued();
            if self.queued.is_empty() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            if let Some(socket) = self.poll_fd() {
                let _ = poll(
                    &mut [PollFd::new(socket, PollFlags::POLLOUT)],
                    SEND_TIMEOUT_MS,
                );
            }
        }
    }

    /// Returns the descriptor that is readable when there are [events](FdStore::events).
    pub(crate) fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.backend {
            Backend::Guardian(guardian) => Some(guardian.as_fd()),
            _ => None,
        }
    }

    /// Returns what has happened; never blocks.
    pub fn events(&self) -> Vec<StoreEvent> {
        match &self.backend {
            Backend::Guardian(guardian) => guardian.events(),
            _ => Vec::new(),
        }
    }

    /// Returns what the operator has to know at the start, if anything.
    pub fn warning(&self) -> Option<String> {
        match &self.backend {
            Backend::Systemd { .. } => None,
            Backend::Guardian(guardian) => guardian.cgroup_error().map(|why| {
                format!(
                    "the guardian cannot leave the cgroup of this process ({why}): if the whole cgroup is \
                     killed, VMs block for ever at missing pages or read zeros; run as a service with \
                     FileDescriptorStoreMax=, or with a writable parent cgroup"
                )
            }),
            Backend::Unavailable { why } => Some(format!(
                "cannot start a guardian ({why}): if this process is killed, VMs block for ever at missing \
                 pages or read zeros; run as a service with FileDescriptorStoreMax="
            )),
        }
    }
}

impl fmt::Display for FdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.backend {
            Backend::Systemd { room, .. } => write!(f, "systemd, for {room} descriptors"),
            Backend::Guardian(guardian) => write!(f, "guardian {}", guardian.pid()),
            Backend::Unavailable { .. } => f.write_str("nobody"),
        }
    }
}

/// Whether sending may succeed later: when the guardian has read, or the kernel has memory again.
fn is_retryable(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(
        errno,
        Some(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS | Errno::ENOMEM | Errno::ETOOMANYREFS)
    )
}

fn is_gone(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

/// Checks that systemd accepts the names, and that they can be taken apart again.
fn check(id: &str, fds: &[(&str, BorrowedFd<'_>)]) -> io::Result<()> {
    let plain = |text: &str, max, also: &[u8]| {
        let byte = |byte: u8| byte.is_ascii_alphanumeric() || also.contains(&byte);
        !text.is_empty() && text.len() <= max && text.bytes().all(byte)
    };
    if plain(id, MAX_ID_BYTES, b"-_")
        && fds
            .iter()
            .all(|(role, _)| plain(role, MAX_ROLE_BYTES, b"-_."))
    {
        return Ok(());
    }
    let why = format!(
        "the id {id:?} or a role of it is no name: at most {MAX_ID_BYTES} letters, digits, - and _ are"
    );
    Err(io::Error::new(ErrorKind::InvalidInput, why))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
    use snaprestore_uffd::os::receive;

    use super::*;

    /// A guardian that reads when the test does.
    struct FakeGuardian(OwnedFd);

    impl FakeGuardian {
        fn pair() -> (FdStore, Self) {
            let flags = SockFlag::SOCK_CLOEXEC;
            let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
            let (ours, theirs) = pair.unwrap();
            setsockopt(&ours, sockopt::SndBuf, &4096).unwrap();
            (
                FdStore::with(Backend::Guardian(Guardian::at(ours))),
                Self(theirs),
            )
        }

        /// The next message, with the number of its descriptors, if there is one.
        fn read(&self) -> Option<(String, usize)> {
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, 0_u8).unwrap() == 0 {
                return None;
            }
            let mut buffer = [0; 4096];
            let received = receive(self.0.as_fd(), &mut buffer).unwrap();
            let text = String::from_utf8_lossy(&buffer[..received.bytes]).into_owned();
            Some((text, received.descriptors.len()))
        }

        fn read_all(&self) -> Vec<(String, usize)> {
            std::iter::from_fn(|| self.read()).collect()
        }
    }

    /// Releases others until the socket takes nothing more.
    fn fill(store: &mut FdStore) -> usize {
        let mut number = 0;
        while store.queued.is_empty() {
            store.remove(&format!("other-{number}")).unwrap();
            number += 1;
        }
        number
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn full_socket_delays_messages_and_loses_none() {
        let (mut store, other) = FakeGuardian::pair();
        let (owner, uffd, socket) = (null(), null(), null());
        let fds = [(OWNER, owner.as_fd()), (UFFD, uffd.as_fd())];
        store.store("vm-1", "web", &fds).unwrap();
        let others = fill(&mut store);
        store.remove("vm-1").unwrap();
        store.store("vm-2", "web", &fds).unwrap();
        store
            .store_listener("socket-1", "web", socket.as_fd(), &[7, 8])
            .unwrap();
        // What waits is the supervisor's own copy.
        drop((owner, uffd, socket));
        assert_eq!(store.send_queued(), Some(GuardianProgress::Lagging(4)));
        assert_eq!(store.send_queued(), None);
        assert!(!store.flush(Duration::ZERO));

        let mut all = other.read_all();
        while store.send_queued() != Some(GuardianProgress::CaughtUp) {
            all.extend(other.read_all());
        }
        all.extend(other.read_all());
        assert_eq!(all[0], ("hold vm-1 web".to_owned(), 2));
        let all: BTreeSet<_> = all.into_iter().collect();
        assert_eq!(all.len(), others + 4);
        for message in [
            ("release vm-1", 0),
            ("hold vm-2 web", 2),
            ("listen socket-1 web 7,8", 1),
        ] {
            let (text, count) = message;
            assert!(all.contains(&(text.to_owned(), count)), "{text}: {all:?}");
        }
        assert!(store.flush(Duration::ZERO));
    }

    /// A file system that gives an inode's number to the next file makes sockets of one id out of
    /// two.
    #[test]
    fn late_release_does_not_drop_a_new_socket_of_the_same_id() {
        let (mut store, other) = FakeGuardian::pair();
        let (old, new) = (null(), null());
        store
            .store_listener("socket-1", "old", old.as_fd(), &[])
            .unwrap();
        let _ = fill(&mut store);
        store.remove("socket-1").unwrap();
        // There is room again before the supervisor comes to what waits.
        let mut all = other.read_all();
        store
            .store_listener("socket-1", "new", new.as_fd(), &[])
            .unwrap();
        let _ = store.send_queued();
        all.extend(other.read_all());
        let about = all.iter().filter(|(text, _)| text.contains(" socket-1"));
        let about: Vec<_> = about.map(|(text, _)| text.as_str()).collect();
        assert_eq!(about, ["listen socket-1 old ", "listen socket-1 new "]);
    }

    #[test]
    fn shortage_of_kernel_memory_is_tried_again() {
        for errno in [
            Errno::EAGAIN,
            Errno::ENOBUFS,
            Errno::ENOMEM,
            Errno::ETOOMANYREFS,
        ] {
            assert!(is_retryable(&errno.into()), "{errno}");
        }
        assert!(!is_retryable(&Errno::EINVAL.into()));
    }

    #[test]
    fn guardian_that_has_ended_loses_nothing_more() {
        let (mut store, other) = FakeGuardian::pair();
        let _ = fill(&mut store);
        drop(other);
        let owner = null();
        store
            .store("vm-1", "web", &[(OWNER, owner.as_fd())])
            .unwrap();
        store.remove("vm-1").unwrap();
        let _ = store.send_queued();
        assert!(store.queued.is_empty());
        assert_eq!(store.events(), [StoreEvent::GuardianExited]);
    }
}
