//! The fast test for fills is compared with one that looks at one word at a time.

use proptest::prelude::*;
use snapshot_format::digest::fill_word;
use snapshot_format::layout::PAGE_SIZE;

fn oracle(page: &[u8]) -> Option<u64> {
    let mut words = page
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
    let first = words.next()?;
    words.all(|word| word == first).then_some(first)
}

fn filled(word: u64) -> Vec<u8> {
    word.to_le_bytes().repeat(PAGE_SIZE / 8)
}

#[test]
fn change_of_any_byte_ends_a_fill() {
    for word in [0, 0xcc, u64::MAX, 0x0102_0304_0506_0708] {
        let mut page = filled(word);
        assert_eq!(fill_word(&page), Some(word));
        for at in 0..PAGE_SIZE {
            page[at] ^= 1;
            assert_eq!(fill_word(&page), None, "byte {at}");
            page[at] ^= 1;
        }
    }
}

#[test]
fn period_of_another_length_is_no_fill() {
    for period in [3, 5, 7, 16, 24, 4088] {
        let page: Vec<u8> = (0..PAGE_SIZE)
            .map(|at| u8::from(at % period == 0))
            .collect();
        assert_eq!(fill_word(&page), None, "period {period}");
        assert_eq!(oracle(&page), None, "period {period}");
    }
}

proptest! {
    #[test]
    fn fill_detection_agrees_with_the_oracle(
        word: u64,
        changes in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..3),
    ) {
        let mut page = filled(word);
        for (at, byte) in changes {
            page[at] = byte;
        }
        prop_assert_eq!(fill_word(&page), oracle(&page));
    }
}
