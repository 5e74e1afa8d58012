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

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use super::guardian::Guardian;
use super::systemd::{self, Given, Manager};

/// The role of a userfaultfd; more of one owner, born of its forks, have roles that begin so.
pub(crate) const UFFD: &str = "uffd";
/// The role of the pidfd of the process whose memory it is.
pub(crate) const OWNER: &str = "owner";

/// The role of a socket at which VMs connect.
const LISTENING: &str = "listening";

/// The longest id. With the longest role a name has at most the 255 bytes that systemd permits.
const ID_MAX: usize = 64;
const ROLE_MAX: usize = 64;

/// Whoever it is.
#[derive(Debug)]
pub(crate) struct Outside {
    who: Who,
    /// The roles that are held of each id.
    held: BTreeMap<String, Vec<String>>,
    /// What is to be let go as soon as the guardian reads again.
    unreleased: BTreeSet<String>,
}

#[derive(Debug)]
enum Who {
    Systemd { manager: Manager, room: usize },
    Guardian(Guardian),
    Nobody { why: io::Error },
}

/// Something that the keeper has to do something about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
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
    pub(crate) fn find(program: &Path, given: &Given) -> Self {
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
                unreleased: BTreeSet::new(),
            };
        }
        let who = match Guardian::start(program) {
            Ok(guardian) => Who::Guardian(guardian),
            Err(why) => Who::Nobody { why },
        };
        Self {
            who,
            held: BTreeMap::new(),
            unreleased: BTreeSet::new(),
        }
    }

    /// Has the descriptors `fds` of `id`, each with its role, held. What is held of `id` under one of these roles already
    /// must be the same.
    ///
    /// The guardian holds the owner and the userfaultfds, and nothing else: it ends VMs, and can't go on with
    /// them. Once this has returned, the keeper may die.
    pub(crate) fn hold(&mut self, id: &str, fds: &[(&str, BorrowedFd<'_>)]) -> io::Result<()> {
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
            Who::Guardian(guardian) => {
                let of = |wanted: fn(&str) -> bool| {
                    fds.iter()
                        .filter(move |(role, _)| wanted(role))
                        .map(|(_, fd)| *fd)
                };
                let owner = of(|role| role == OWNER).next();
                let uffds: Vec<_> = of(|role| role.starts_with(UFFD)).collect();
                // It takes the place of what is held of `id`.
                self.unreleased.remove(id);
                owner.map_or(Ok(()), |owner| guardian.hold(id, owner, &uffds))
            }
            Who::Nobody { .. } => Ok(()),
        }
    }

    /// Has the socket `listening` held, at which VMs of the users `allowed` connect, or of all if none is named.
    pub(crate) fn hold_listening(
        &mut self,
        id: &str,
        listening: BorrowedFd<'_>,
        allowed: &[u32],
    ) -> io::Result<()> {
        match &self.who {
            Who::Guardian(guardian) => guardian.listen(id, listening, allowed),
            _ => self.hold(id, &[(LISTENING, listening)]),
        }
    }

    /// Has all descriptors of `id` let go: its VM has ended, or all its memory is there.
    pub(crate) fn release(&mut self, id: &str) -> io::Result<()> {
        let roles = self.held.remove(id).unwrap_or_default();
        match &self.who {
            Who::Systemd { manager, .. } => roles
                .iter()
                .try_for_each(|role| manager.remove(&systemd::name(id, role))),
            Who::Guardian(guardian) => match guardian.release(id) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.unreleased.insert(id.to_owned());
                    Ok(())
                }
                released => released,
            },
            Who::Nobody { .. } => Ok(()),
        }
    }

    /// Tries again what could not be let go.
    pub(crate) fn release_rest(&mut self) {
        while let Some(id) = self.unreleased.pop_first() {
            // If it has ended, all is let go.
            if self.release(&id).is_err() || self.unreleased.contains(&id) {
                return;
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
    pub(crate) fn news(&self) -> Vec<News> {
        match &self.who {
            Who::Guardian(guardian) => guardian.news(),
            _ => Vec::new(),
        }
    }

    /// What the operator has to know at the start, if anything.
    pub(crate) fn warning(&self) -> Option<String> {
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
