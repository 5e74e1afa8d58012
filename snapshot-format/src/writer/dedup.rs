//! Finds pages whose content is stored already.
//!
//! An open-addressing table of fixed size, allocated zeroed, so that parts never touched take no
//! memory. A slot is 24 bytes: half of the page's digest, and where the page is stored.
//!
//! ```text
//! find(key):   probe from the key's slot to the first empty one
//! insert(key): the empty slot that find ended at, while the table is at most 3/4 full;
//!              after that the oldest entry on the probe path gives way
//! ```
//!
//! Up to `exact` distinct pages nothing is ever replaced, so every repetition is found. Beyond, old
//! pages are forgotten, and a page whose own slot is still empty is not entered: the paths of the
//! others end there.

/// Half of a page's digest. Contents that share it by chance are not to be expected before 2^64
/// pages, and `verify` would show them, because it compares whole digests.
pub(super) type Key = [u64; 2];

/// Where a page is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) frame: u32,
    pub(super) slot: u16,
}

impl Location {
    /// Never 0, which marks an empty slot; grows with the frame's number.
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

/// Where [`DedupTable::find`] ended: where the key would go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    empty: usize,
    oldest: Option<usize>,
}

pub(super) struct DedupTable {
    /// Two words of key, then the packed location.
    slots: Vec<[u64; 3]>,
    used: usize,
    /// Entries after which the table replaces.
    most: usize,
}

impl DedupTable {
    /// A table that is exact up to `exact` distinct pages: twice as many slots.
    pub(super) fn new(exact: usize) -> Self {
        let slots = (exact.max(8) * 2).next_power_of_two();
        Self {
            slots: vec![[0; 3]; slots],
            used: 0,
            most: slots / 4 * 3,
        }
    }

    /// The location of `key`, or the place for it.
    pub(super) fn find(&self, key: Key) -> Result<Location, Place> {
        let mask = self.slots.len() - 1;
        // Any part of a digest is as good as any other.
        let mut at = usize::try_from(key[0] & mask as u64).expect("masked to an index");
        let mut oldest: Option<(usize, u64)> = None;
        loop {
            let [first, second, packed] = self.slots[at];
            if packed == 0 {
                return Err(Place {
                    empty: at,
                    oldest: oldest.map(|(at, _)| at),
                });
            }
            if [first, second] == key {
                return Ok(Location::unpack(packed));
            }
            if oldest.is_none_or(|(_, age)| packed < age) {
                oldest = Some((at, packed));
            }
            at = (at + 1) & mask;
        }
    }

    /// Enters `key` at the place where [`DedupTable::find`] ended; nothing may have been entered
    /// in between.
    pub(super) fn insert(&mut self, place: Place, key: Key, location: Location) {
        let at = if self.used < self.most {
            self.used += 1;
            place.empty
        } else if let Some(oldest) = place.oldest {
            oldest
        } else {
            return;
        };
        self.slots[at] = [key[0], key[1], location.pack()];
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
        /// Up to the limit the table is a map.
        #[test]
        fn equals_a_map_up_to_its_limit(pages in prop::collection::vec(0u64..200, 1..600)) {
            let mut table = DedupTable::new(200);
            let mut map = HashMap::new();
            for (n, &page) in (0u64..).zip(&pages) {
                match table.find(key(page)) {
                    Ok(found) => prop_assert_eq!(Some(&found), map.get(&page)),
                    Err(place) => {
                        prop_assert!(map.insert(page, location(n)).is_none());
                        table.insert(place, key(page), location(n));
                    }
                }
            }
        }

        /// Beyond the limit it may forget, but never answers with another page's location, never
        /// grows, and still finds what repeats soon.
        #[test]
        fn never_answers_wrongly_beyond_its_limit(seed in 0u64..1000) {
            let mut table = DedupTable::new(64);
            let slots = table.slots.len();
            let (mut map, mut found_soon) = (HashMap::new(), 0);
            for n in 0..4000u64 {
                // Every content comes twice, the second time shortly after the first.
                let page = seed * 10_000 + n / 20 * 10 + n % 10;
                match table.find(key(page)) {
                    Ok(found) => {
                        prop_assert_eq!(Some(&found), map.get(&page));
                        found_soon += 1;
                    }
                    Err(place) => {
                        map.insert(page, location(n));
                        table.insert(place, key(page), location(n));
                    }
                }
            }
            prop_assert_eq!(table.slots.len(), slots);
            prop_assert!(table.used <= table.most);
            prop_assert!(found_soon > 1000, "{} of 2000 repetitions found", found_soon);
        }
    }

    #[test]
    fn a_full_table_takes_new_pages_in() {
        let mut table = DedupTable::new(64);
        for n in 0..10_000 {
            if let Err(place) = table.find(key(n)) {
                table.insert(place, key(n), location(n));
            }
        }
        let recent = (9900..10_000)
            .filter(|&n| table.find(key(n)).is_ok())
            .count();
        assert!(recent > 30, "{recent} of the last 100 pages are known");
    }
}
