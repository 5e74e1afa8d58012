//! A model of one owner's memory and its userfaultfd: the kernel's guarantees, and no more.
//!
//! The model covers faults that wait until woken and then fault again; faults read before events;
//! events whose caller waits until they are read, and acts only after that; EAGAIN from the moment
//! the caller starts until it continues; partial COPY; EEXIST, ENOENT, ENOMEM; UNREGISTER, which
//! wakes the sleepers of a range before it unregisters the range, so that a thread that faults in
//! between sleeps until somebody wakes it; poison, which stays when everything is closed; new
//! mappings where something was unmapped. Large pages (here of two pages) fault, arrive and
//! disappear as one. A discarded part of a large page is zeroed if the page is present, and
//! otherwise nothing happens to it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::session::platform::{Event, Installed, PAGE};
use crate::session::state::address_map::LARGE_PAGES;

/// Size of a large page in bytes.
const LARGE: u64 = LARGE_PAGES * PAGE;

/// Address of the first page.
pub(super) const BASE: u64 = 0x10_0000;

/// Returns the address of a page's place.
pub(super) fn at(place: u64) -> u64 {
    BASE + place * PAGE
}

/// Number of a thread, in the order of their start.
pub(super) type Thread = usize;

/// The content of a mapped address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Content {
    Missing,
    /// A page with this content; 0 is the zero page.
    Byte(u8),
    /// Poison: a touch raises a signal.
    Poison,
}

/// A fault whose thread sleeps.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) struct Sleeper {
    thread: Thread,
    address: u64,
    read: bool,
}

/// An event whose caller waits.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) enum Change {
    Remove(u64, u64),
    Unmap(u64, u64),
    Remap(u64, u64, u64),
}

/// The kernel's state.
#[expect(
    clippy::struct_excessive_bools,
    reason = "what may happen, thing by thing"
)]
#[derive(Debug, Default, Hash)]
pub(super) struct World {
    /// Mapped and registered places. A place that isn't here is not mapped.
    pub(super) places: BTreeMap<u64, Content>,
    /// Other mappings of the owner at places that no longer belong to the session; their memory
    /// isn't registered.
    pub(super) fresh: BTreeMap<u64, Content>,
    /// Places that the kernel serves by itself.
    pub(super) unregistered: BTreeSet<u64>,
    /// Whether the pages are large.
    pub(super) large: bool,
    pub(super) sleepers: Vec<Sleeper>,
    pub(super) events: VecDeque<(Thread, Change)>,
    /// Events that were acknowledged, but are delivered only by the next read: a planted mistake.
    pub(super) withheld: VecDeque<Change>,
    /// Number of threads that have started a change and not yet continued.
    pub(super) changing: u32,
    pub(super) shared: u32,
    pub(super) exclusive: bool,
    pub(super) kicked: bool,
    /// Whether something to read has arrived since a thread was woken for it. The woken thread
    /// clears it, and only later arrivals set it again.
    pub(super) edge: bool,
    /// Remaining number of COPY calls of several pages that may be cut short, and of installs that
    /// may find no memory.
    pub(super) cuts: u32,
    pub(super) shortages: u32,
}

impl World {
    /// Returns a digest of the state.
    pub(super) fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    /// Returns whether a read would return something.
    pub(super) fn readable(&self) -> bool {
        self.sleepers.iter().any(|s| !s.read)
            || !self.events.is_empty()
            || !self.withheld.is_empty()
    }

    /// Returns whether installs are currently refused.
    pub(super) fn is_changing(&self) -> bool {
        self.changing > 0
    }

    /// Touches `address` in a thread. Returns its content, or `None` if the thread now sleeps.
    pub(super) fn touch(
        &mut self,
        thread: Thread,
        address: u64,
    ) -> Option<Result<Content, Unmapped>> {
        match self.places.get(&address) {
            None => Some(self.fresh.get(&address).copied().ok_or(Unmapped)),
            Some(Content::Missing) if self.unregistered.contains(&address) => {
                let unit = self.unit(address);
                for (_, content) in self.places.range_mut(unit) {
                    *content = Content::Byte(0);
                }
                Some(Ok(Content::Byte(0)))
            }
            Some(Content::Missing) => {
                let address = self.unit(address).start;
                self.sleepers.push(Sleeper {
                    thread,
                    address,
                    read: false,
                });
                self.edge = true;
                None
            }
            Some(content) => Some(Ok(*content)),
        }
    }

    /// Returns the kernel's page that contains `address`.
    fn unit(&self, address: u64) -> std::ops::Range<u64> {
        let len = if self.large { LARGE } else { PAGE };
        let start = address / len * len;
        start..start + len
    }

    /// Returns whether a thread sleeps in a fault.
    pub(super) fn sleeps(&self, thread: Thread) -> bool {
        self.sleepers.iter().any(|sleeper| sleeper.thread == thread)
    }

    /// Returns whether the session receives an event for a change.
    pub(super) fn is_registered(&self, change: Change) -> bool {
        let (Change::Remove(start, end) | Change::Unmap(start, end)) = change else {
            let Change::Remap(from, ..) = change else {
                return false;
            };
            return !self.unregistered.contains(&from);
        };
        self.places
            .range(start..end)
            .any(|(address, _)| !self.unregistered.contains(address))
    }

    /// Starts a change: installs are refused from now on.
    pub(super) fn begin_change(&mut self) {
        self.changing += 1;
    }

    /// Queues the event of a change.
    pub(super) fn announce(&mut self, thread: Thread, change: Change) {
        self.events.push_back((thread, change));
        self.edge = true;
    }

    /// Returns whether a thread's event has not been read yet.
    pub(super) fn announced(&self, thread: Thread) -> bool {
        self.events.iter().any(|(waiting, _)| *waiting == thread)
    }

    /// Lets the caller continue: installs are accepted again.
    pub(super) fn end_change(&mut self) {
        self.changing -= 1;
    }

    /// Drops the pages of a range.
    pub(super) fn zap(&mut self, start: u64, end: u64) {
        let units: BTreeSet<u64> = (start..end)
            .step_by(usize::try_from(PAGE).unwrap())
            .map(|address| self.unit(address).start)
            .collect();
        for first in units {
            let unit = self.unit(first);
            let whole = start <= unit.start && unit.end <= end;
            let part = unit.start.max(start)..unit.end.min(end);
            for (_, content) in self.places.range_mut(part) {
                *content = match content {
                    Content::Byte(_) if !whole => Content::Byte(0),
                    _ => Content::Missing,
                };
            }
        }
    }

    /// Leaves the range to the kernel, which has already woken its sleepers.
    pub(super) fn unregister(&mut self, start: u64, len: u64) {
        let range = start..start + len;
        self.unregistered
            .extend(self.places.range(range).map(|(address, _)| *address));
    }

    /// Closes the userfaultfd: everything is left to the kernel, and threads that wait for an event
    /// continue.
    pub(super) fn close(&mut self) {
        self.unregistered.extend(self.places.keys());
        self.sleepers.clear();
        self.events.clear();
    }

    /// Makes a range inaccessible by address, except for pages of the session that are present.
    pub(super) fn protect(&mut self, start: u64, len: u64) {
        let range = start..start + len;
        for (_, content) in self.places.range_mut(range.clone()) {
            if *content == Content::Missing {
                *content = Content::Poison;
            }
        }
        for (_, content) in self.fresh.range_mut(range) {
            *content = Content::Poison;
        }
        self.wake(start, len);
    }

    /// Maps something else at an address where nothing is mapped. Returns `false` if something is.
    pub(super) fn map_afresh(&mut self, address: u64, content: u8) -> bool {
        let free = !self.places.contains_key(&address) && !self.fresh.contains_key(&address);
        if free {
            self.fresh.insert(address, Content::Byte(content));
        }
        free
    }

    /// Removes the range from the address space.
    pub(super) fn unmap(&mut self, start: u64, end: u64) {
        self.places
            .retain(|address, _| !(start..end).contains(address));
    }

    /// Moves the range.
    pub(super) fn remap(&mut self, from: u64, to: u64, len: u64) {
        for i in 0..len / PAGE {
            if let Some(content) = self.places.remove(&(from + i * PAGE)) {
                self.places.insert(to + i * PAGE, content);
            }
        }
    }

    /// Wakes the sleepers of a range.
    pub(super) fn wake(&mut self, start: u64, len: u64) {
        self.sleepers
            .retain(|sleeper| !(start..start + len).contains(&sleeper.address));
    }

    /// Reads all messages, faults first. With `late`, events that come with faults are acknowledged
    /// now but delivered by the next read.
    pub(super) fn read(&mut self, late: bool, record: &mut dyn FnMut(Event)) -> usize {
        let mut count = 0;
        for change in std::mem::take(&mut self.withheld) {
            record(change.event());
            count += 1;
        }
        let mut faults = 0;
        for sleeper in self.sleepers.iter_mut().filter(|sleeper| !sleeper.read) {
            sleeper.read = true;
            faults += 1;
            record(Event::Fault {
                address: sleeper.address,
                thread: 0,
            });
        }
        for (_, change) in std::mem::take(&mut self.events) {
            if late && faults > 0 {
                self.withheld.push_back(change);
                self.edge = true;
            } else {
                record(change.event());
                count += 1;
            }
        }
        count + faults
    }

    /// Installs pages one by one, as the kernel does. `each` returns the content of the i-th page.
    pub(super) fn install(
        &mut self,
        address: u64,
        len: u64,
        most: u64,
        each: impl Fn(u64) -> Content,
    ) -> Installed {
        let pages = len / PAGE;
        if self.large && self.unit(address) != (address..address + len) {
            return Installed::Refused(libc::EINVAL);
        }
        let registered =
            |address| self.places.contains_key(&address) && !self.unregistered.contains(&address);
        if (0..pages).any(|i| !registered(address + i * PAGE)) {
            return Installed::Gone;
        }
        if self.changing > 0 {
            return Installed::Again;
        }
        let mut done = 0;
        for i in 0..pages.min(most) {
            let place = self
                .places
                .get_mut(&(address + i * PAGE))
                .expect("place vanished during the install");
            match place {
                Content::Missing => {}
                Content::Byte(_) | Content::Poison => break,
            }
            *place = each(i);
            done += 1;
        }
        if done == 0 {
            return Installed::Exists;
        }
        if done == pages {
            Installed::Done
        } else {
            Installed::Partial(done * PAGE)
        }
    }
}

/// The error for a touched address that is not mapped: the thread would get SIGSEGV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unmapped;

impl Change {
    fn event(self) -> Event {
        match self {
            Self::Remove(start, end) => Event::Remove { start, end },
            Self::Unmap(start, end) => Event::Unmap { start, end },
            Self::Remap(from, to, len) => Event::Remap { from, to, len },
        }
    }
}
