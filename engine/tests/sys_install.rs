//! Every install and its outcomes, against the running kernel.

#![allow(unsafe_code, reason = "a test that touches memory under restore")]

use std::sync::Arc;

use snaprestore_engine::mem::{Mapping, RawRegion, Ring};
use snaprestore_engine::sys::{Installed, Message, Modes, OpenOptions, ReadOutcome, Wake};

const PAGE: u64 = 4096;

#[test]
fn a_fault_is_read_and_served() {
    let uffd = OpenOptions::new().open().expect("a userfaultfd");
    let mapping = Arc::new(Mapping::new(16 * PAGE).expect("a mapping"));
    let region = RawRegion::owned(Arc::clone(&mapping));
    uffd.register(&region, 0, region.len(), Modes::MISSING)
        .expect("registered");
    let address = region.address() + 3 * PAGE;
    let reader = std::thread::spawn(move || {
        let pointer = std::ptr::with_exposed_provenance::<u8>(usize::try_from(address).unwrap());
        // SAFETY: the page is mapped until after the join, and the read waits for its content.
        unsafe { pointer.add(7).read_volatile() }
    });
    let mut ring = Ring::private().expect("a ring");
    let mut messages = Vec::new();
    while uffd.read(&mut ring, &mut messages).expect("read") == ReadOutcome::Empty {
        std::thread::yield_now();
    }
    let [Message::Pagefault { address: at, .. }] = messages[..] else {
        panic!("{messages:?}")
    };
    assert_eq!(at, address);
    let page = [0x5a; 4096];
    assert_eq!(
        uffd.copy(at, &page, Wake::Now).expect("copied"),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 0x5a);
}
