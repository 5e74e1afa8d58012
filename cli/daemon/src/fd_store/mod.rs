//! Who holds the userfaultfd and the pidfd of each VM besides the daemon, so that the daemon's death harms
//! no guest.
//!
//! When the last descriptor of a userfaultfd closes, what is missing becomes zeros, or the VM, if it has
//! kept a descriptor, waits for ever. Keeper and worker can die together: by a group kill, by the machine's
//! shortage of memory. So somebody else has to hold the descriptors:
//!
//! ```text
//!   who                        the keeper dies                          afterwards
//!   systemd's store            systemd starts it again, with all        VMs go on; they waited meanwhile
//!                              that was held                            at missing pages
//!   the guardian, a process    it kills the VMs, waits for their end,   they are started anew
//!   outside of its cgroup      and only then closes
//!   nobody                                                              VMs wait for ever, or read zeros
//! ```
//!
//! A VM is held from the moment at which it is accepted, by its pidfd alone until its handshake has come: what it has sent
//! could be lost with the keeper, and it would wait for ever. Who has connected and was not accepted is held with the
//! listening socket: the next keeper accepts from the same one, and the guardian kills whoever is in its queue.
//!
//! What is held has an id, made of letters, digits, `-` and `_`, which means the same over restarts, and
//! roles below it. systemd compares what it is given: the same open file is kept once, under the name that
//! came first. So what VMs share, as a snapshot's file, is held under an id of its own.

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

use self::guardian::{A_MOMENT, Guardian};
use self::systemd::{Given, Manager};

/// The role of a userfaultfd; more of one owner, born of its forks, have roles that begin so.
pub const UFFD: &str = "uffd";
/// The role of the pidfd of the process whose memory it is.
pub const OWNER: &str = "owner";

/// The role of a socket at which VMs connect.
const LISTENING: &str = "listening";

/// The longest id. With the longest role a name has at most the 255 bytes that systemd permits.
const ID_MAX: usize = 64;
const ROLE_MAX: usize = 64;

/// Whoever it is.
#[derive(Debug)]
pub struct Outside {
    who: Who,
    /// The roles that are held of each id.
    held: BTreeMap<String, Vec<String>>,
    /// The last message about each id that the guardian could not be told, to be sent when it reads again.
    untold: BTreeMap<String, Untold>,
    /// Whether the keeper knows that there are some.
    lags: bool,
}

/// A message that waits until the guardian reads.
#[derive(Debug)]
struct Untold {
    text: String,
    fds: Vec<OwnedFd>,
}

/// How the guardian keeps up with what it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// It has begun to lag: so many messages wait.
    Lags(usize),
    /// It has read all that had waited.
    UpToDate,
}

#[derive(Debug)]
enum Who {
    Systemd { manager: Manager, room: usize },
    Guardian(Guardian),
    Nobody { why: io::Error },
}

/// Something that the keeper has to do something about.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    /// The guardian could not take what was to be held: it has to be held again, or given up.
    NotHeld {
        /// Of which id.
        id: String,
        /// Why.
        why: String,
    },
    /// The guardian has ended: another has to be found, and everything be held anew.
    Gone,
}

impl Outside {
    /// systemd if it keeps descriptors for this service, else a guardian, started from `program` (the keeper's
    /// is `/proc/self/exe`), else nobody. `given` is what systemd gave back: it holds that still.
    ///
    /// What is to be said at the start is [`Outside::warning`].
    pub fn find(program: &Path, given: &Given) -> Self {
        let room = systemd::store_size();
        let roles =
            |fds: &Vec<(String, OwnedFd)>| fds.iter().map(|(role, _)| role.clone()).collect();
        if room > 0
            && let Some(Ok(manager)) = Manager::of_this_process()
        {
            return Self {
                who: Who::Systemd { manager, room },
                held: given
                    .held
                    .iter()
                    .map(|(id, fds)| (id.clone(), roles(fds)))
                    .collect(),
                untold: BTreeMap::new(),
                lags: false,
            };
        }
        Self::by(match Guardian::start(program) {
            Ok(guardian) => Who::Guardian(guardian),
            Err(why) => Who::Nobody { why },
        })
    }

    /// Nothing is held yet.
    fn by(who: Who) -> Self {
        Self {
            who,
            held: BTreeMap::new(),
            untold: BTreeMap::new(),
            lags: false,
        }
    }

    /// Has the descriptors `fds` of `id`, each with its role, held. What is held of `id` under one of these roles already
    /// must be the same. `service` is what the guardian's log says of it.
    ///
    /// The guardian holds the owner and the userfaultfds, and nothing else: it ends VMs, and can't go on with
    /// them. Once this has returned, the keeper may die, unless the guardian [lags](Outside::catch_up).
    pub fn hold(
        &mut self,
        id: &str,
        service: &str,
        fds: &[(&str, BorrowedFd<'_>)],
    ) -> io::Result<()> {
        check(id, fds)?;
        match &self.who {
            Who::Systemd { manager, room } => {
                let held: usize = self.held.values().map(Vec::len).sum();
                let roles = self.held.entry(id.to_owned()).or_default();
                let known = |role: &str| roles.iter().any(|known| known == role);
                let new: Vec<_> = fds.iter().filter(|(role, _)| !known(role)).collect();
                if held + new.len() > *room {
                    let why = format!("FileDescriptorStoreMax={room} is used up");
                    return Err(io::Error::other(why));
                }
                for (role, fd) in new {
                    manager.store(&systemd::name(id, role), *fd)?;
                    roles.push((*role).to_owned());
                }
                Ok(())
            }
            Who::Guardian(_) => {
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
                self.tell(id, format!("hold {id} {service}"), &all)
            }
            Who::Nobody { .. } => Ok(()),
        }
    }

    /// Has the socket `listening` of `service` held, at which VMs of the users `allowed` connect, or of all if none is
    /// named.
    pub(crate) fn hold_listening(
        &mut self,
        id: &str,
        service: &str,
        listening: BorrowedFd<'_>,
        allowed: &[u32],
    ) -> io::Result<()> {
        if !matches!(self.who, Who::Guardian(_)) {
            return self.hold(id, service, &[(LISTENING, listening)]);
        }
        let uids: Vec<_> = allowed.iter().map(ToString::to_string).collect();
        let text = format!("listen {id} {service} {}", uids.join(","));
        self.tell(id, text, &[listening])
    }

    /// Has all descriptors of `id` let go: its VM has ended, or all its memory is there.
    pub fn release(&mut self, id: &str) -> io::Result<()> {
        let roles = self.held.remove(id).unwrap_or_default();
        match &self.who {
            Who::Systemd { manager, .. } => roles
                .iter()
                .try_for_each(|role| manager.remove(&systemd::name(id, role))),
            Who::Guardian(_) => self.tell(id, format!("release {id}"), &[]),
            Who::Nobody { .. } => Ok(()),
        }
    }

    /// Tells the guardian something about `id`, in the place of what it was not told yet. If it doesn't read, it is told
    /// later.
    fn tell(&mut self, id: &str, text: String, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Who::Guardian(guardian) = &self.who else {
            return Ok(());
        };
        self.untold.remove(id);
        // It is given time once, not for each message.
        let wait = if self.untold.is_empty() { A_MOMENT } else { 0 };
        match guardian.tell(&text, fds, wait) {
            Err(error) if comes_later(&error) => {
                let fds = fds.iter().map(BorrowedFd::try_clone_to_owned);
                let fds = fds.collect::<io::Result<_>>()?;
                self.untold.insert(id.to_owned(), Untold { text, fds });
                Ok(())
            }
            // Another will be told everything.
            Err(error) if is_gone(&error) => Ok(()),
            told => told,
        }
    }

    /// Tells the guardian what it could not be told. Gives what the operator ought to know, once.
    pub(crate) fn catch_up(&mut self) -> Option<Pace> {
        while let Some((id, Untold { text, fds })) = self.untold.pop_first() {
            let Who::Guardian(guardian) = &self.who else {
                continue;
            };
            let borrowed: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
            match guardian.tell(&text, &borrowed, 0) {
                Err(error) if !is_gone(&error) => {
                    self.untold.insert(id, Untold { text, fds });
                    break;
                }
                _ => {}
            }
        }
        let waiting = self.untold.len();
        match (waiting, self.lags) {
            (1.., false) => {
                self.lags = true;
                Some(Pace::Lags(waiting))
            }
            (0, true) => {
                self.lags = false;
                Some(Pace::UpToDate)
            }
            _ => None,
        }
    }

    /// Waits until the guardian was told everything. False if it does not read in time: it could kill who was released
    /// long ago.
    pub(crate) fn settle(&mut self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        loop {
            let _ = self.catch_up();
            if self.untold.is_empty() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            if let Some(socket) = self.watched() {
                let _ = poll(&mut [PollFd::new(socket, PollFlags::POLLOUT)], A_MOMENT);
            }
        }
    }

    /// What has to be polled for reading, to ask for [`Outside::news`] then.
    pub(crate) fn watched(&self) -> Option<BorrowedFd<'_>> {
        match &self.who {
            Who::Guardian(guardian) => Some(guardian.as_fd()),
            _ => None,
        }
    }

    /// What has happened; never blocks.
    pub fn news(&self) -> Vec<News> {
        match &self.who {
            Who::Guardian(guardian) => guardian.news(),
            _ => Vec::new(),
        }
    }

    /// What the operator has to know at the start, if anything.
    pub fn warning(&self) -> Option<String> {
        match &self.who {
            Who::Systemd { .. } => None,
            Who::Guardian(guardian) => guardian.stays().map(|why| {
                format!(
                    "the guardian could not leave the cgroup of this process ({why}): if that is killed as a \
                     whole, VMs wait for ever at missing pages, or read zeros; run it as a service with \
                     FileDescriptorStoreMax, or where a parent cgroup may be written"
                )
            }),
            Who::Nobody { why } => Some(format!(
                "nobody holds the VMs' memory if this process is killed, for a guardian can't be started \
                 ({why}): VMs then wait for ever at missing pages, or read zeros; run it as a service with \
                 FileDescriptorStoreMax"
            )),
        }
    }
}

impl fmt::Display for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.who {
            Who::Systemd { room, .. } => write!(f, "systemd, for {room} descriptors"),
            Who::Guardian(guardian) => write!(f, "guardian {}", guardian.pid()),
            Who::Nobody { .. } => f.write_str("nobody"),
        }
    }
}

/// Whether the guardian may take it when it has read, or the kernel has memory again.
fn comes_later(error: &io::Error) -> bool {
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

/// Names as systemd takes them, and as can be taken apart again.
fn check(id: &str, fds: &[(&str, BorrowedFd<'_>)]) -> io::Result<()> {
    let plain = |text: &str, max, also: &[u8]| {
        let byte = |byte: u8| byte.is_ascii_alphanumeric() || also.contains(&byte);
        !text.is_empty() && text.len() <= max && text.bytes().all(byte)
    };
    if plain(id, ID_MAX, b"-_") && fds.iter().all(|(role, _)| plain(role, ROLE_MAX, b"-_.")) {
        return Ok(());
    }
    let why = format!(
        "the id {id:?} or a role of it is no name: at most {ID_MAX} letters, digits, - and _ are"
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
    struct Other(OwnedFd);

    impl Other {
        fn pair() -> (Outside, Self) {
            let flags = SockFlag::SOCK_CLOEXEC;
            let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
            let (ours, theirs) = pair.unwrap();
            setsockopt(&ours, sockopt::SndBuf, &4096).unwrap();
            (Outside::by(Who::Guardian(Guardian::at(ours))), Self(theirs))
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
    fn fill(outside: &mut Outside) -> usize {
        let mut number = 0;
        while outside.untold.is_empty() {
            outside.release(&format!("other-{number}")).unwrap();
            number += 1;
        }
        number
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn full_socket_delays_messages_and_loses_none() {
        let (mut outside, other) = Other::pair();
        let (owner, uffd, socket) = (null(), null(), null());
        let fds = [(OWNER, owner.as_fd()), (UFFD, uffd.as_fd())];
        outside.hold("vm-1", "web", &fds).unwrap();
        let others = fill(&mut outside);
        outside.release("vm-1").unwrap();
        outside.hold("vm-2", "web", &fds).unwrap();
        outside
            .hold_listening("socket-1", "web", socket.as_fd(), &[7, 8])
            .unwrap();
        // What waits is the keeper's own copy.
        drop((owner, uffd, socket));
        assert_eq!(outside.catch_up(), Some(Pace::Lags(4)));
        assert_eq!(outside.catch_up(), None);
        assert!(!outside.settle(Duration::ZERO));

        let mut all = other.read_all();
        while outside.catch_up() != Some(Pace::UpToDate) {
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
        assert!(outside.settle(Duration::ZERO));
    }

    /// A file system that gives an inode's number to the next file makes sockets of one id out of two.
    #[test]
    fn late_release_does_not_drop_a_new_socket_of_the_same_id() {
        let (mut outside, other) = Other::pair();
        let (old, new) = (null(), null());
        outside
            .hold_listening("socket-1", "old", old.as_fd(), &[])
            .unwrap();
        let _ = fill(&mut outside);
        outside.release("socket-1").unwrap();
        // There is room again before the keeper comes to what waits.
        let mut all = other.read_all();
        outside
            .hold_listening("socket-1", "new", new.as_fd(), &[])
            .unwrap();
        let _ = outside.catch_up();
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
            assert!(comes_later(&errno.into()), "{errno}");
        }
        assert!(!comes_later(&Errno::EINVAL.into()));
    }

    #[test]
    fn guardian_that_has_ended_loses_nothing_more() {
        let (mut outside, other) = Other::pair();
        let _ = fill(&mut outside);
        drop(other);
        let owner = null();
        outside
            .hold("vm-1", "web", &[(OWNER, owner.as_fd())])
            .unwrap();
        outside.release("vm-1").unwrap();
        let _ = outside.catch_up();
        assert!(outside.untold.is_empty());
        assert_eq!(outside.news(), [News::Gone]);
    }
}
