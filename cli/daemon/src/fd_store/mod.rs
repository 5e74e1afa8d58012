//! Stores the userfaultfd and the pidfd of each VM outside the daemon, so that the daemon's death
//! harms no guest.
//!
//! When the last descriptor of a userfaultfd closes, missing pages become zeros; if the VM has kept
//! a descriptor, it waits forever instead. Supervisor and worker can die together, by a kill of
//! their group or because the machine is out of memory. So another process has to hold the
//! descriptors:
//!
//! ```text
//!   store                    the supervisor dies                      afterwards
//!   systemd's store          systemd starts it again, with all        VMs continue; they waited
//!                            that was stored                          meanwhile at missing pages
//!   the guardian, a process  it kills the VMs, waits for their exit,  they are started anew
//!   outside of its cgroup    and only then closes
//!   none                                                              VMs wait forever, or read
//!                                                                     zeros
//! ```
//!
//! A VM is stored from the moment at which it is accepted, by its pidfd alone until its handshake
//! is complete: data that it has sent could be lost with the supervisor, and it would wait forever.
//! A VM that has connected and was not accepted is stored with the listening socket: the next
//! supervisor accepts from the same socket, and the guardian kills the peers in its backlog.
//!
//! Stored descriptors have an id, made of letters, digits, `-` and `_`, which keeps its meaning
//! over restarts, and a role within the id. systemd compares descriptors: it stores the same open
//! file only once, under the first name. So files that VMs share, such as a snapshot, are stored
//! under an id of their own.

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

use self::guardian::{Guardian, MAX_MESSAGE_BYTES, SEND_TIMEOUT_MS};
use self::systemd::{Inherited, Manager};
use crate::policy;

/// The role of a userfaultfd; those of an owner's forks have roles with this prefix.
pub const UFFD: &str = "uffd";
/// The role of the pidfd of the process that owns the memory.
pub const OWNER: &str = "owner";

/// The role of a socket to which VMs connect.
const LISTENING: &str = "listening";

/// The maximum length of an id. With the longest role, a name has the 255 bytes of systemd's limit.
const MAX_ID_BYTES: usize = 64;
const MAX_ROLE_BYTES: usize = 64;

/// Why descriptors could not be stored or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// systemd stores no more descriptors for this service.
    #[error("the descriptor store is full; raise FileDescriptorStoreMax= (now {room})")]
    Full {
        /// The number of descriptors that it stores.
        room: usize,
    },
    /// systemd would not accept an id or a role.
    #[error(
        "the id {id:?} or a role of it is no name: at most {MAX_ID_BYTES} letters, digits, - and _ are"
    )]
    Name {
        /// The id.
        id: String,
    },
    /// The message to the guardian is too long.
    #[error("too many users are allowed to connect")]
    TooManyUsers,
    /// A message could not be sent.
    #[error(transparent)]
    Send(#[from] io::Error),
}

/// A store of descriptors outside this process.
#[derive(Debug)]
pub struct FdStore {
    backend: Backend,
    /// The stored roles of each id.
    stored: BTreeMap<String, Vec<String>>,
    /// The last message about each id that the guardian has not been sent, because it was not
    /// reading.
    queued: BTreeMap<String, QueuedMessage>,
    /// Whether the operator was told about queued messages.
    is_lagging: bool,
}

/// A message that is queued until the guardian reads.
#[derive(Debug)]
struct QueuedMessage {
    text: String,
    fds: Vec<OwnedFd>,
}

/// A change in whether the guardian keeps up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuardianProgress {
    /// The guardian does not read, and this number of messages is queued.
    Lagging(usize),
    /// The guardian has read all queued messages.
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
    /// The guardian could not store an id: it has to be stored again, or given up.
    NotStored {
        /// The id.
        id: String,
        /// The reason.
        why: String,
    },
    /// The guardian exited: another one is needed, and everything has to be stored again.
    GuardianExited,
}

impl FdStore {
    /// Chooses systemd if it stores descriptors for this service, else starts a guardian from
    /// `program` (the supervisor's is `/proc/self/exe`), else stores nothing. `inherited` was
    /// passed on by systemd, which still has it stored.
    ///
    /// [`FdStore::warning`] returns what an operator should know about the choice.
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

    /// Stores the descriptors `fds` of `id`, each with its role. A descriptor already stored under
    /// the same id and role must be the same. `service` is the service's name for the guardian's
    /// log.
    ///
    /// The guardian stores the owner and the userfaultfds, and nothing else: it kills VMs, and
    /// can't serve them. Once this has returned, the supervisor may die, unless the guardian
    /// [lags](FdStore::send_queued).
    ///
    /// # Errors
    ///
    /// Returns an error if systemd has no room, or a message could not be sent.
    pub fn store(
        &mut self,
        id: &str,
        service: &str,
        fds: &[(&str, BorrowedFd<'_>)],
    ) -> Result<(), StoreError> {
        check(id, fds)?;
        match &self.backend {
            Backend::Systemd { manager, room } => {
                let stored: usize = self.stored.values().map(Vec::len).sum();
                let roles = self.stored.entry(id.to_owned()).or_default();
                let known = |role: &str| roles.iter().any(|known| known == role);
                let new: Vec<_> = fds.iter().filter(|(role, _)| !known(role)).collect();
                if stored + new.len() > *room {
                    return Err(StoreError::Full { room: *room });
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
                // The owner comes first.
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

    /// Stores the socket `listener` of `service`, to which VMs of the users `allowed` connect; if
    /// it is empty, VMs of all users.
    pub(crate) fn store_listener(
        &mut self,
        id: &str,
        service: &str,
        listener: BorrowedFd<'_>,
        allowed: &[u32],
    ) -> Result<(), StoreError> {
        if !matches!(self.backend, Backend::Guardian(_)) {
            return self.store(id, service, &[(LISTENING, listener)]);
        }
        let uids: Vec<_> = allowed.iter().map(ToString::to_string).collect();
        let text = format!("listen {id} {service} {}", uids.join(","));
        self.send(id, text, &[listener])
    }

    /// Removes all descriptors of `id`: its VM has exited, or has all its memory.
    ///
    /// # Errors
    ///
    /// Returns an error if a message could not be sent.
    pub fn remove(&mut self, id: &str) -> Result<(), StoreError> {
        let roles = self.stored.remove(id).unwrap_or_default();
        match &self.backend {
            Backend::Systemd { manager, .. } => Ok(roles
                .iter()
                .try_for_each(|role| manager.remove(&systemd::name(id, role)))?),
            Backend::Guardian(_) => self.send(id, format!("release {id}"), &[]),
            Backend::Unavailable { .. } => Ok(()),
        }
    }

    /// Sends the guardian a message about `id`, replacing one that is still queued. If the guardian
    /// doesn't read, the message is queued.
    fn send(&mut self, id: &str, text: String, fds: &[BorrowedFd<'_>]) -> Result<(), StoreError> {
        let Backend::Guardian(guardian) = &self.backend else {
            return Ok(());
        };
        if text.len() > MAX_MESSAGE_BYTES {
            return Err(StoreError::TooManyUsers);
        }
        self.queued.remove(id);
        // The guardian gets this time once, and not for each message.
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
            // The next guardian will be sent everything.
            Err(error) if is_gone(&error) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// Sends the queued messages. Returns what the operator should know, once for each change.
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
        let is_lagging = policy::QUEUED_MESSAGES.is_reached_by(waiting);
        match (
            std::mem::replace(&mut self.is_lagging, is_lagging),
            is_lagging,
        ) {
            (false, true) => Some(GuardianProgress::Lagging(waiting)),
            (true, false) => Some(GuardianProgress::CaughtUp),
            _ => None,
        }
    }

    /// Waits until the guardian has read all messages. Returns false if it does not in time; it
    /// could then kill VMs that were removed long ago.
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

    /// Returns the events that have happened; never blocks.
    pub fn events(&self) -> Vec<StoreEvent> {
        match &self.backend {
            Backend::Guardian(guardian) => guardian.events(),
            _ => Vec::new(),
        }
    }

    /// Returns a warning for the operator at the start, if there is one.
    pub fn warning(&self) -> Option<String> {
        match &self.backend {
            Backend::Systemd { .. } => None,
            Backend::Guardian(guardian) => guardian.cgroup_error().map(|why| {
                format!(
                    "the guardian cannot leave the cgroup of this process ({why}): if the whole cgroup is \
                     killed, VMs block forever at missing pages or read zeros; run as a service with \
                     FileDescriptorStoreMax=, or with a writable parent cgroup"
                )
            }),
            Backend::Unavailable { why } => Some(format!(
                "cannot start a guardian ({why}): if this process is killed, VMs block forever at missing \
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

/// Returns whether a retry may succeed, after the guardian has read or the kernel has memory again.
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

/// Checks that systemd accepts the names, and that they can be split again.
fn check(id: &str, fds: &[(&str, BorrowedFd<'_>)]) -> Result<(), StoreError> {
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
    Err(StoreError::Name { id: id.to_owned() })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
    use snaprestore_uffd::os::receive;

    use super::*;

    /// A guardian that reads when the test tells it to.
    pub(crate) struct FakeGuardian(OwnedFd);

    impl FakeGuardian {
        pub(crate) fn pair() -> (FdStore, Self) {
            let flags = SockFlag::SOCK_CLOEXEC;
            let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
            let (ours, theirs) = pair.unwrap();
            setsockopt(&ours, sockopt::SndBuf, &4096).unwrap();
            (
                FdStore::with(Backend::Guardian(Guardian::at(ours))),
                Self(theirs),
            )
        }

        /// Returns the next message, with its number of descriptors, if there is one.
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

        /// Returns the messages that were sent and not read yet.
        pub(crate) fn read_all(&self) -> Vec<(String, usize)> {
            std::iter::from_fn(|| self.read()).collect()
        }
    }

    /// Releases other ids until the socket is full.
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
        // The queued message has the supervisor's own copy of the descriptors.
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

    /// A file system that reuses inode numbers gives two successive sockets the same id.
    #[test]
    fn late_release_does_not_drop_a_new_socket_of_the_same_id() {
        let (mut store, other) = FakeGuardian::pair();
        let (old, new) = (null(), null());
        store
            .store_listener("socket-1", "old", old.as_fd(), &[])
            .unwrap();
        let _ = fill(&mut store);
        store.remove("socket-1").unwrap();
        // There is room again before the supervisor sends the queued messages.
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
    fn shortage_of_kernel_memory_is_retried() {
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
    fn messages_to_exited_guardian_are_dropped() {
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
