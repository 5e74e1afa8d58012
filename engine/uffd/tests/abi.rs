//! Comparison of the userfaultfd ABI with linux-raw-sys, and with the first version of the kernel's
//! header.
//!
//! `abi_header.rs` compares it with the header of this system.

use std::mem::{align_of, offset_of, size_of};

use linux_raw_sys::{general as raw, ioctl};
use snaprestore_uffd::uffd::abi;

macro_rules! same_constants {
    ($($name:ident),* $(,)?) => {
        $(assert_eq!(abi::$name as u64, u64::from(raw::$name), stringify!($name));)*
    };
}

macro_rules! same_layout {
    ($($name:ident { $($field:ident),* })*) => {
        $(
            assert_eq!(size_of::<abi::$name>(), size_of::<raw::$name>(), stringify!($name));
            assert_eq!(align_of::<abi::$name>(), align_of::<raw::$name>(), stringify!($name));
            $(assert_eq!(
                offset_of!(abi::$name, $field),
                offset_of!(raw::$name, $field),
                concat!(stringify!($name), ".", stringify!($field))
            );)*
        )*
    };
}

#[test]
#[expect(clippy::cast_lossless, reason = "the constants have several widths")]
fn numbers_agree_with_linux_raw_sys() {
    same_constants!(
        UFFD_API,
        UFFDIO,
        USERFAULTFD_IOC,
        _UFFDIO_REGISTER,
        _UFFDIO_UNREGISTER,
        _UFFDIO_WAKE,
        _UFFDIO_COPY,
        _UFFDIO_ZEROPAGE,
        _UFFDIO_MOVE,
        _UFFDIO_WRITEPROTECT,
        _UFFDIO_CONTINUE,
        _UFFDIO_POISON,
        _UFFDIO_API,
        UFFD_EVENT_PAGEFAULT,
        UFFD_EVENT_FORK,
        UFFD_EVENT_REMAP,
        UFFD_EVENT_REMOVE,
        UFFD_EVENT_UNMAP,
        UFFD_PAGEFAULT_FLAG_WRITE,
        UFFD_PAGEFAULT_FLAG_WP,
        UFFD_PAGEFAULT_FLAG_MINOR,
        UFFD_FEATURE_PAGEFAULT_FLAG_WP,
        UFFD_FEATURE_EVENT_FORK,
        UFFD_FEATURE_EVENT_REMAP,
        UFFD_FEATURE_EVENT_REMOVE,
        UFFD_FEATURE_MISSING_HUGETLBFS,
        UFFD_FEATURE_MISSING_SHMEM,
        UFFD_FEATURE_EVENT_UNMAP,
        UFFD_FEATURE_SIGBUS,
        UFFD_FEATURE_THREAD_ID,
        UFFD_FEATURE_MINOR_HUGETLBFS,
        UFFD_FEATURE_MINOR_SHMEM,
        UFFD_FEATURE_EXACT_ADDRESS,
        UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
        UFFD_FEATURE_WP_UNPOPULATED,
        UFFD_FEATURE_POISON,
        UFFD_FEATURE_WP_ASYNC,
        UFFD_FEATURE_MOVE,
        UFFDIO_REGISTER_MODE_MISSING,
        UFFDIO_REGISTER_MODE_WP,
        UFFDIO_REGISTER_MODE_MINOR,
        UFFDIO_COPY_MODE_DONTWAKE,
        UFFDIO_COPY_MODE_WP,
        UFFDIO_ZEROPAGE_MODE_DONTWAKE,
    );
    assert_eq!(
        i64::from(abi::UFFD_USER_MODE_ONLY),
        i64::from(raw::UFFD_USER_MODE_ONLY)
    );
}

#[test]
fn request_numbers_agree_with_linux_raw_sys() {
    // linux-raw-sys has no POISON and no MOVE; those are compared with the literals in `ioctls.rs`.
    let ours_and_theirs = [
        (abi::UFFDIO_API, ioctl::UFFDIO_API),
        (abi::UFFDIO_REGISTER, ioctl::UFFDIO_REGISTER),
        (abi::UFFDIO_UNREGISTER, ioctl::UFFDIO_UNREGISTER),
        (abi::UFFDIO_WAKE, ioctl::UFFDIO_WAKE),
        (abi::UFFDIO_COPY, ioctl::UFFDIO_COPY),
        (abi::UFFDIO_ZEROPAGE, ioctl::UFFDIO_ZEROPAGE),
        (abi::UFFDIO_WRITEPROTECT, ioctl::UFFDIO_WRITEPROTECT),
        (abi::UFFDIO_CONTINUE, ioctl::UFFDIO_CONTINUE),
    ];
    for (ours, theirs) in ours_and_theirs {
        assert_eq!(ours, u64::from(theirs), "{ours:#x} {theirs:#x}");
    }
}

#[test]
fn structures_agree_with_linux_raw_sys() {
    same_layout! {
        uffd_msg { event, arg }
        uffdio_api { api, features, ioctls }
        uffdio_range { start, len }
        uffdio_register { range, mode, ioctls }
        uffdio_copy { dst, src, len, mode, copy }
        uffdio_zeropage { range, mode, zeropage }
        uffdio_writeprotect { range, mode }
        uffdio_continue { range, mode, mapped }
        uffdio_poison { range, mode, updated }
        uffdio_move { dst, src, len, mode, move_ }
    }
    assert_eq!(
        size_of::<abi::uffd_msg_arg>(),
        size_of::<raw::uffd_msg__bindgen_ty_1>()
    );
}

/// The first public version of `linux/userfaultfd.h` (Linux 4.3), from its text: its definitions
/// have never changed their meaning.
#[test]
fn first_published_header_still_agrees() {
    assert_eq!(abi::UFFD_API, 0xAA);
    assert_eq!(abi::UFFDIO, 0xAA);
    assert_eq!(abi::_UFFDIO_REGISTER, 0x00);
    assert_eq!(abi::_UFFDIO_UNREGISTER, 0x01);
    assert_eq!(abi::_UFFDIO_WAKE, 0x02);
    assert_eq!(abi::_UFFDIO_COPY, 0x03);
    assert_eq!(abi::_UFFDIO_ZEROPAGE, 0x04);
    assert_eq!(abi::_UFFDIO_API, 0x3F);
    assert_eq!(abi::UFFD_EVENT_PAGEFAULT, 0x12);
    // Announced there as not available yet.
    assert_eq!(abi::UFFD_EVENT_FORK, 0x13);
    assert_eq!(abi::UFFD_FEATURE_PAGEFAULT_FLAG_WP, 1 << 0);
    assert_eq!(abi::UFFD_FEATURE_EVENT_FORK, 1 << 1);
    assert_eq!(abi::UFFD_PAGEFAULT_FLAG_WRITE, 1 << 0);
    assert_eq!(abi::UFFD_PAGEFAULT_FLAG_WP, 1 << 1);
    assert_eq!(abi::UFFDIO_REGISTER_MODE_MISSING, 1 << 0);
    assert_eq!(abi::UFFDIO_REGISTER_MODE_WP, 1 << 1);
    assert_eq!(abi::UFFDIO_COPY_MODE_DONTWAKE, 1 << 0);
    assert_eq!(abi::UFFDIO_ZEROPAGE_MODE_DONTWAKE, 1 << 0);

    // `_IOWR(type, number, struct)` and `_IOR(...)` with the sizes of that header's structures.
    assert_eq!(abi::UFFDIO_API, 0xC018_AA3F);
    assert_eq!(abi::UFFDIO_REGISTER, 0xC020_AA00);
    assert_eq!(abi::UFFDIO_UNREGISTER, 0x8010_AA01);
    assert_eq!(abi::UFFDIO_WAKE, 0x8010_AA02);
    assert_eq!(abi::UFFDIO_COPY, 0xC028_AA03);
    assert_eq!(abi::UFFDIO_ZEROPAGE, 0xC020_AA04);

    assert_eq!(size_of::<abi::uffd_msg>(), 32);
    assert_eq!(align_of::<abi::uffd_msg>(), 1);
    assert_eq!(offset_of!(abi::uffd_msg, event), 0);
    assert_eq!(offset_of!(abi::uffd_msg, reserved1), 1);
    assert_eq!(offset_of!(abi::uffd_msg, reserved2), 2);
    assert_eq!(offset_of!(abi::uffd_msg, reserved3), 4);
    assert_eq!(offset_of!(abi::uffd_msg, arg), 8);
    assert_eq!(offset_of!(abi::uffd_msg_pagefault, flags), 0);
    assert_eq!(offset_of!(abi::uffd_msg_pagefault, address), 8);
    assert_eq!(offset_of!(abi::uffdio_api, features), 8);
    assert_eq!(offset_of!(abi::uffdio_api, ioctls), 16);
    assert_eq!(offset_of!(abi::uffdio_register, mode), 16);
    assert_eq!(offset_of!(abi::uffdio_register, ioctls), 24);
    // "must be at the end: the copy_from_user will not read the last 8 bytes."
    assert_eq!(
        offset_of!(abi::uffdio_copy, copy),
        size_of::<abi::uffdio_copy>() - 8
    );
    assert_eq!(
        offset_of!(abi::uffdio_zeropage, zeropage),
        size_of::<abi::uffdio_zeropage>() - 8
    );
}
