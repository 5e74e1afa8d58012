//! Decoding a frame allocates nothing: it happens while a thread of the owner waits.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::{Sample, frame_of, page_bytes};
use snapshot_format::layout::PAGE_SIZE;
use snapshot_format::{FrameDecoder, Page, Reason};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // The thread-local no longer exists while a thread exits; allocations at that point don't
    // belong to the test.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

#[allow(unsafe_code, reason = "an allocator can't be written without")]
// SAFETY: every call is passed to the system's allocator unchanged, so its guarantees hold here.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller upholds the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as for `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: `ptr` came from the system's allocator, as all of them do.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from the system's allocator, as all of them do.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.get()
}

/// Memory that zstd takes from C's allocator can't be counted here. zstd promises that its one-shot
/// functions take none for an existing context.
#[test]
fn decoding_allocates_nothing() {
    let before = allocations();
    let snapshot = Sample::new().open().expect("cannot open the snapshot");
    assert!(allocations() > before, "the counter counts");
    snapshot.prepare().expect("cannot read the dictionaries");
    let mut decoder = FrameDecoder::new();
    let mut out = vec![0; 512 * PAGE_SIZE];
    // Raw, zstd, zstd with a dictionary.
    let frames = [0, 4, 512].map(|page| match snapshot.look_up(page, Reason::Demand) {
        Ok(Page::Stored { frame, slot }) => (page, frame, usize::from(slot)),
        other => panic!("page {page}: {other:?}"),
    });
    for (page, frame, slot) in frames {
        let out = &mut out[..frame.decoded_len()];
        let before = allocations();
        let mut listed = 0;
        for _ in 0..3 {
            let pages = decoder
                .decode(&snapshot, &frame, Reason::Demand, out)
                .expect("cannot decode");
            listed = pages.runs().map(|run| run.count).sum();
        }
        let cached = snapshot
            .look_up(page, Reason::Demand)
            .expect("cannot look up the page");
        assert_eq!(
            allocations(),
            before,
            "page {page}: decoding and looking up"
        );
        assert_eq!(listed, frame.slots());
        assert!(matches!(cached, Page::Stored { .. }));
        let bytes = &out[slot * PAGE_SIZE..(slot + 1) * PAGE_SIZE];
        assert_eq!(page_bytes(page).as_deref(), Some(bytes));
        assert_eq!(frame_of(page).1, u16::try_from(slot).expect("small"));
    }
}
