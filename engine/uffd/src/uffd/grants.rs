//! Grants: the memory of this process that a userfaultfd may fill.
//!
//! The kernel lets `UFFDIO_COPY` write into absent pages of *any* memory of its address space that
//! is registered with *any* userfaultfd, even another library's. A safe function that can do that
//! would be unsound. Therefore a [`Userfaultfd`] of this process keeps a list of what was
//! registered through it, under an `unsafe` contract, and installs nowhere else.
//!
//! The list follows the kernel's reports on the same descriptor: REMAP moves an entry, UNMAP
//! removes it, and a fault proves that its page is registered with this descriptor (this is how
//! memory grown by `mremap` is learned). Reading locks the list exclusively. Installing locks it
//! shared across check and ioctl, so no install runs between an owner's munmap (held up by the
//! kernel until the message is read) and the update of the list.
//!
//! [`Userfaultfd`]: super::Userfaultfd

use std::sync::Arc;

use crate::memory::Mapping;

/// A range of registered memory. The mapping, if it is ours, stays mapped as long as the entry
/// exists.
#[derive(Debug, Clone)]
struct Entry {
    start: u64,
    end: u64,
    keep: Option<Arc<Mapping>>,
}

/// A list of grants, sorted by start, without overlaps. Neighbours are not merged, because each
/// keeps its own mapping alive.
#[derive(Debug, Default)]
pub(super) struct Grants {
    entries: Vec<Entry>,
    /// All memory that was ever granted, merged. It distinguishes memory that went away from memory
    /// that was never ours.
    ever: Vec<(u64, u64)>,
}

impl Grants {
    /// Returns the index of the first entry that ends above `address`.
    fn position(&self, address: u64) -> usize {
        self.entries.partition_point(|entry| entry.end <= address)
    }

    /// Returns whether all of `[start, end)` is granted.
    pub(super) fn contains(&self, start: u64, end: u64) -> bool {
        let mut reached = start;
        for entry in &self.entries[self.position(start)..] {
            if entry.start > reached {
                return false;
            }
            reached = entry.end;
            if reached >= end {
                return true;
            }
        }
        false
    }

    pub(super) fn add(&mut self, start: u64, end: u64, keep: Option<Arc<Mapping>>) {
        self.remove(start, end);
        let at = self.position(start);
        self.entries.insert(at, Entry { start, end, keep });
        let first = self.ever.partition_point(|range| range.1 < start);
        let last = self.ever.partition_point(|range| range.0 <= end);
        let touched = self.ever.get(first..last).unwrap_or_default();
        let merged = touched.iter().fold((start, end), |(low, high), range| {
            (low.min(range.0), high.max(range.1))
        });
        self.ever.splice(first..last, [merged]);
    }

    /// Returns whether all of `[start, end)` has ever been granted.
    pub(super) fn ever_contained(&self, start: u64, end: u64) -> bool {
        let at = self.ever.partition_point(|range| range.1 < end);
        self.ever.get(at).is_some_and(|range| range.0 <= start)
    }

    pub(super) fn remove(&mut self, start: u64, end: u64) {
        let first = self.position(start);
        let last = self.entries.partition_point(|entry| entry.start < end);
        if first >= last {
            return;
        }
        let head = Entry {
            end: start,
            ..self.entries[first].clone()
        };
        let tail = Entry {
            start: end,
            ..self.entries[last - 1].clone()
        };
        let rest = [head, tail]
            .into_iter()
            .filter(|entry| entry.start < entry.end);
        self.entries.splice(first..last, rest);
    }

    /// Records that the kernel moved registered memory: properties of the old place apply to the
    /// new one.
    pub(super) fn moved(&mut self, from: u64, to: u64, len: u64) {
        let keep = self
            .entries
            .get(self.position(from))
            .and_then(|entry| entry.keep.clone());
        self.remove(from, from.saturating_add(len));
        self.add(to, to.saturating_add(len), keep);
    }

    /// Returns all granted ranges.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.entries.iter().map(|entry| (entry.start, entry.end))
    }

    /// Records that the kernel reported a fault at the page `[start, end)`.
    pub(super) fn faulted(&mut self, start: u64, end: u64) {
        if !self.contains(start, end) {
            self.add(start, end, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(grants: &Grants) -> Vec<(u64, u64)> {
        grants.ranges().collect()
    }

    #[test]
    fn neighbours_count_as_one_range_and_gaps_do_not() {
        let mut grants = Grants::default();
        grants.add(20, 30, None);
        grants.add(10, 20, None);
        grants.add(40, 50, None);
        assert!(grants.contains(10, 30));
        assert!(grants.contains(45, 50));
        assert!(!grants.contains(10, 31));
        assert!(!grants.contains(25, 45));
        assert!(!grants.contains(9, 11));
        assert!(!grants.contains(50, 51));
    }

    #[test]
    fn removal_splits_entries() {
        let mut grants = Grants::default();
        grants.add(0, 100, None);
        grants.remove(40, 60);
        assert_eq!(list(&grants), [(0, 40), (60, 100)]);
        grants.remove(30, 70);
        assert_eq!(list(&grants), [(0, 30), (70, 100)]);
        grants.remove(100, 200);
        grants.remove(30, 70);
        assert_eq!(list(&grants), [(0, 30), (70, 100)]);
        grants.remove(0, 100);
        assert_eq!(list(&grants), []);
    }

    #[test]
    fn moves_follow_the_kernel_in_the_order_read() {
        let mut grants = Grants::default();
        grants.add(0, 100, None);
        grants.moved(20, 500, 10);
        grants.remove(20, 30);
        assert_eq!(list(&grants), [(0, 20), (30, 100), (500, 510)]);
        grants.faulted(510, 520);
        grants.faulted(505, 506);
        assert_eq!(list(&grants), [(0, 20), (30, 100), (500, 510), (510, 520)]);
        assert!(!grants.contains(15, 35));
        assert!(grants.ever_contained(15, 35));
        assert!(grants.ever_contained(500, 520));
        assert!(!grants.ever_contained(90, 101));
        assert!(!grants.ever_contained(499, 501));
        assert_eq!(grants.ever, [(0, 100), (500, 520)]);
    }
}
