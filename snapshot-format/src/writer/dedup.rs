//! Finds pages whose content is stored already.
//!
//! This is an open-addressing table of fixed size, allocated zeroed, so that parts never touched
//! take no memory. A slot is 24 bytes: half of the page's digest, and the page's location.
//!
//! ```text
//! find(key):   probe from the key's slot to the first empty one; an entry whose frame is
//!              forgotten counts as none and is overwritten
//! insert(key): the empty slot that find ended at; if the table is 3/4 full, the oldest of a few
//!              entries is taken out first
//! ```
//!
//! Up to `exact` distinct pages nothing is ever evicted, so every repetition is found. Beyond that,
//! every new page is still inserted, and old ones are forgotten: content that repeats soon is
//! found.

/// Half of a page's digest. Contents that share it by chance are not to be expected before 2^64
/// pages, and `verify` would detect them, because it compares whole digests.
pub(super) type Key = [u64; 2];

/// Location of a page that this file stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) frame: u32,
    pub(super) slot: u16,
}

impl Location {
    /// Packs the location into a word that grows with the frame's number and is never 0, which
    /// marks an empty slot.
    fn pack(self) -> u64 {
        (u64::from(self.frame) + 1) << 16 | u64::from(self.slot)
    }

    fn unpack(packed: u64) -> Self {
        Self {
            frame: u32::try_from((packed >> 16) - 1).expect("packed from 32 bits"),
            slot: u16::try_from(packed & 0xffff).expect("masked to 16 bits"),
        }
    }
}

/// Number of entries that are examined to find an old one.
const CANDIDATES: usize = 16;

/// Place where [`DedupTable::find`] stopped, and where the key is to be inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Empty(usize),
    /// The key is present, with a frame that is forgotten.
    Forgotten(usize),
}

pub(super) struct DedupTable {
    /// Two words of key, then the packed location.
    slots: Vec<[u64; 3]>,
    used: usize,
    /// Number of entries above which each insertion evicts one.
    most: usize,
    /// Slot at which the search for the next entry to evict starts.
    hand: usize,
}

impl DedupTable {
    /// Creates a table that is exact up to `exact` distinct pages. It has twice as many slots.
    pub(super) fn new(exact: usize) -> Self {
        let slots = (exact.max(8) * 2).next_power_of_two();
        Self {
            slots: vec![[0; 3]; slots],
            used: 0,
            most: slots / 4 * 3,
            hand: 0,
        }
    }

    /// Returns the slot at which probing for `key` starts.
    fn home(&self, key: Key) -> usize {
        // Any part of a digest is as good as any other.
        let mask = self.slots.len() as u64 - 1;
        usize::try_from(key[0] & mask).expect("masked to an index")
    }

    fn after(&self, at: usize) -> usize {
        (at + 1) & (self.slots.len() - 1)
    }

    /// Returns the location of `key` if its frame is `oldest` or later, and otherwise the place to
    /// insert it.
    pub(super) fn find(&self, key: Key, oldest: u64) -> Result<Location, Place> {
        let mut at = self.home(key);
        loop {
            let [first, second, packed] = self.slots[at];
            if packed == 0 {
                return Err(Place::Empty(at));
            }
            if [first, second] == key {
                let location = Location::unpack(packed);
                if u64::from(location.frame) < oldest {
                    return Err(Place::Forgotten(at));
                }
                return Ok(location);
            }
            at = self.after(at);
        }
    }

    /// Inserts `key` at the place where [`DedupTable::find`] stopped; nothing may have been
    /// inserted in between.
    pub(super) fn insert(&mut self, place: Place, key: Key, location: Location) {
        let at = match place {
            Place::Forgotten(at) => at,
            Place::Empty(at) if self.used < self.most => {
                self.used += 1;
                at
            }
            Place::Empty(_) => {
                self.take_out_an_old_one();
                let mut at = self.home(key);
                while self.slots[at][2] != 0 {
                    at = self.after(at);
                }
                at
            }
        };
        self.slots[at] = [key[0], key[1], location.pack()];
    }

    /// Evicts the oldest of the next few entries.
    fn take_out_an_old_one(&mut self) {
        let (mut oldest, mut age) = (self.hand, u64::MAX);
        let mut left = CANDIDATES.min(self.used);
        while left > 0 {
            let packed = self.slots[self.hand][2];
            if packed != 0 {
                left -= 1;
                if packed < age {
                    (oldest, age) = (self.hand, packed);
                }
            }
            self.hand = self.after(self.hand);
        }
        // An entry behind the gap whose probe path crosses it moves into it.
        let (mut gap, mut at) = (oldest, self.after(oldest));
        while self.slots[at][2] != 0 {
            let [first, second, _] = self.slots[at];
            let mask = self.slots.len() - 1;
            let from_home = at.wrapping_sub(self.home([first, second])) & mask;
            if from_home >= at.wrapping_sub(gap) & mask {
                self.slots[gap] = self.slots[at];
                gap = at;
            }
            at = self.after(at);
        }
        self.slots[gap] = [0; 3];
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use proptest::prelude::*;

    fn key(n: u64) -> Key {
        let digest = *blake3::hash(&n.to_le_bytes()).as_bytes();
        [
            u64::from_le_bytes(digest[..8].try_into().unwrap()),
            u64::from_le_bytes(digest[8..16].try_into().unwrap()),
        ]
    }

    fn location(n: u64) -> Location {
        Location {
            frame: u32::try_from(n / 32).unwrap(),
            slot: u16::try_from(n % 32).unwrap(),
        }
    }

    #[test]
    fn locations_survive_packing() {
        for location in [
            Location { frame: 0, slot: 0 },
            Location {
                frame: u32::MAX,
                slot: u16::MAX,
            },
            Location {
                frame: 77,
                slot: 511,
            },
        ] {
            assert_ne!(location.pack(), 0);
            assert_eq!(Location::unpack(location.pack()), location);
        }
    }

    proptest! {
        /// Up to the limit the table behaves like a map.
        #[test]
        fn dedup_table_equals_a_map_up_to_its_limit(pages in prop::collection::vec(0u64..200, 1..600)) {
            let mut table = DedupTable::new(200);
            let mut map = HashMap::new();
            for (n, &page) in (0u64..).zip(&pages) {
                match table.find(key(page), 0) {
                    Ok(found) => prop_assert_eq!(Some(&found), map.get(&page)),
                    Err(place) => {
                        prop_assert!(map.insert(page, location(n)).is_none());
                        table.insert(place, key(page), location(n));
                    }
                }
            }
        }

        /// Beyond the limit the table may forget entries. It never returns another page's location,
        /// never grows, loses only the entries that it evicts, and finds every page that repeats
        /// soon.
        #[test]
        fn dedup_table_never_errs_beyond_its_limit(seed in 0u64..1000) {
            let mut table = DedupTable::new(64);
            let slots = table.slots.len();
            let (mut map, mut found_soon) = (HashMap::new(), 0);
            for n in 0..4000u64 {
                // Every content occurs twice, the second time shortly after the first.
                let page = seed * 10_000 + n / 20 * 10 + n % 10;
                match table.find(key(page), 0) {
                    Ok(found) => {
                        prop_assert_eq!(Some(&found), map.get(&page));
                        found_soon += 1;
                    }
                    Err(place) => {
                        map.insert(page, location(n));
                        table.insert(place, key(page), location(n));
                    }
                }
                if n % 501 != 0 {
                    continue;
                }
                let there = map.keys().filter(|page| table.find(key(**page), 0).is_ok()).count();
                prop_assert_eq!(there, table.used, "each entry can be reached");
            }
            prop_assert_eq!(table.slots.len(), slots);
            prop_assert_eq!(table.used, table.most);
            prop_assert!(found_soon > 1900, "{} of 2000 repetitions found", found_soon);
        }
    }

    /// Keys are equal only if all 128 bits are. The table is filled so that the search for the
    /// other key passes the entry for any position of the differing bit.
    #[test]
    fn keys_differing_in_one_bit_are_distinct() {
        for bit in 0..128 {
            let mut table = DedupTable::new(8);
            let mask = table.slots.len() as u64 - 1;
            let other: Key = [key(7)[0] & !mask, key(7)[1]];
            let mut entered = other;
            entered[bit / 64] ^= 1 << (bit % 64);
            let (home, searched) = (table.home(entered), table.home(other));
            assert_eq!(searched, 0);
            for slot in 0..home {
                let filler = [slot as u64 | (100 << 32), slot as u64];
                let place = table.find(filler, 0).expect_err("a new key");
                assert_eq!(place, Place::Empty(slot));
                table.insert(place, filler, location(1));
            }
            let place = table.find(entered, 0).expect_err("a new key");
            assert_eq!(place, Place::Empty(home));
            table.insert(place, entered, location(2));
            assert_eq!(table.find(entered, 0), Ok(location(2)));
            assert_eq!(
                table.find(other, 0),
                Err(Place::Empty(home + 1)),
                "bit {bit} is not compared"
            );
        }
    }

    /// Regression: a new page whose own slot was empty was not inserted into a full table, which
    /// affected every fourth page.
    #[test]
    fn full_table_accepts_every_new_page() {
        let mut table = DedupTable::new(64);
        for n in 0..10_000 {
            if let Err(place) = table.find(key(n), 0) {
                table.insert(place, key(n), location(n));
            }
            assert_eq!(table.find(key(n), 0), Ok(location(n)));
        }
        let recent = (9990..10_000)
            .filter(|&n| table.find(key(n), 0).is_ok())
            .count();
        assert!(recent >= 8, "{recent} of the last 10 pages are known");
    }

    #[test]
    fn pages_of_forgotten_frames_are_added_again() {
        let mut table = DedupTable::new(8);
        let (old, new) = (
            Location { frame: 4, slot: 1 },
            Location { frame: 9, slot: 0 },
        );
        let place = table.find(key(1), 0).expect_err("an empty table");
        table.insert(place, key(1), old);
        assert_eq!(table.find(key(1), 4), Ok(old));
        let place = table.find(key(1), 5).expect_err("forgotten");
        table.insert(place, key(1), new);
        assert_eq!((table.find(key(1), 5), table.used), (Ok(new), 1));
    }
}
