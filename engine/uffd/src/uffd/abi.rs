//! The kernel's userfaultfd interface, number for number, as in `linux/userfaultfd.h` of Linux
//! 6.18.
//!
//! Everything has its C name, so that the kernel's documentation can be read beside it. The file
//! uses nothing but `core`, because a test passes it to ctest, which compiles it alone and compares
//! it with the system's header; a second test compares it with linux-raw-sys, a third with the
//! first version of the header.
//!
//! The request numbers follow `asm-generic/ioctl.h` (x86, ARM, RISC-V, s390). On an architecture
//! that encodes them differently the assertions in `ioctls.rs`, which compare them with nix's own
//! encoding, stop the build.

#![allow(
    non_camel_case_types,
    missing_docs,
    reason = "the names are C's, and the kernel documents them"
)]

use core::ffi::c_ulong;

pub const UFFD_API: u64 = 0xAA;
pub const UFFDIO: u64 = 0xAA;
pub const USERFAULTFD_IOC: u64 = 0xAA;

pub const _UFFDIO_REGISTER: u64 = 0x00;
pub const _UFFDIO_UNREGISTER: u64 = 0x01;
pub const _UFFDIO_WAKE: u64 = 0x02;
pub const _UFFDIO_COPY: u64 = 0x03;
pub const _UFFDIO_ZEROPAGE: u64 = 0x04;
pub const _UFFDIO_MOVE: u64 = 0x05;
pub const _UFFDIO_WRITEPROTECT: u64 = 0x06;
pub const _UFFDIO_CONTINUE: u64 = 0x07;
pub const _UFFDIO_POISON: u64 = 0x08;
pub const _UFFDIO_API: u64 = 0x3F;

// UNREGISTER and WAKE are `_IOR` although the kernel reads the argument: a mistake in the header
// that can't be corrected any more.
pub const USERFAULTFD_IOC_NEW: c_ulong = io(0x00);
pub const UFFDIO_API: c_ulong = iowr::<uffdio_api>(_UFFDIO_API);
pub const UFFDIO_REGISTER: c_ulong = iowr::<uffdio_register>(_UFFDIO_REGISTER);
pub const UFFDIO_UNREGISTER: c_ulong = ior::<uffdio_range>(_UFFDIO_UNREGISTER);
pub const UFFDIO_WAKE: c_ulong = ior::<uffdio_range>(_UFFDIO_WAKE);
pub const UFFDIO_COPY: c_ulong = iowr::<uffdio_copy>(_UFFDIO_COPY);
pub const UFFDIO_ZEROPAGE: c_ulong = iowr::<uffdio_zeropage>(_UFFDIO_ZEROPAGE);
pub const UFFDIO_MOVE: c_ulong = iowr::<uffdio_move>(_UFFDIO_MOVE);
pub const UFFDIO_WRITEPROTECT: c_ulong = iowr::<uffdio_writeprotect>(_UFFDIO_WRITEPROTECT);
pub const UFFDIO_CONTINUE: c_ulong = iowr::<uffdio_continue>(_UFFDIO_CONTINUE);
pub const UFFDIO_POISON: c_ulong = iowr::<uffdio_poison>(_UFFDIO_POISON);

pub const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub const UFFD_EVENT_FORK: u8 = 0x13;
pub const UFFD_EVENT_REMAP: u8 = 0x14;
pub const UFFD_EVENT_REMOVE: u8 = 0x15;
pub const UFFD_EVENT_UNMAP: u8 = 0x16;

pub const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
pub const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

pub const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
pub const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
pub const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;
pub const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
pub const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
pub const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub const UFFD_FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
pub const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub const UFFD_FEATURE_POISON: u64 = 1 << 14;
pub const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
pub const UFFD_FEATURE_MOVE: u64 = 1 << 16;

pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
pub const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_COPY_MODE_WP: u64 = 1 << 1;
pub const UFFDIO_ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
pub const UFFDIO_WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
pub const UFFDIO_CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_CONTINUE_MODE_WP: u64 = 1 << 1;
pub const UFFDIO_POISON_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_MOVE_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: u64 = 1 << 1;

pub const UFFD_USER_MODE_ONLY: i32 = 1;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_api {
    pub api: u64,
    pub features: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_range {
    pub start: u64,
    pub len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_register {
    pub range: uffdio_range,
    pub mode: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_copy {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    pub copy: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_zeropage {
    pub range: uffdio_range,
    pub mode: u64,
    pub zeropage: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_writeprotect {
    pub range: uffdio_range,
    pub mode: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_continue {
    pub range: uffdio_range,
    pub mode: u64,
    pub mapped: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_poison {
    pub range: uffdio_range,
    pub mode: u64,
    pub updated: i64,
}

/// `move_` is C's `move`, a reserved word here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_move {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    pub move_: i64,
}

/// A message returned by `read`, 32 bytes each.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct uffd_msg {
    pub event: u8,
    pub reserved1: u8,
    pub reserved2: u16,
    pub reserved3: u32,
    pub arg: uffd_msg_arg,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_arg {
    pub pagefault: uffd_msg_pagefault,
    pub fork: uffd_msg_fork,
    pub remap: uffd_msg_remap,
    pub remove: uffd_msg_remove,
    pub reserved: [u64; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffd_msg_pagefault {
    pub flags: u64,
    pub address: u64,
    pub ptid: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffd_msg_fork {
    pub ufd: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffd_msg_remap {
    pub from: u64,
    pub to: u64,
    pub len: u64,
}

/// UNMAP has the same shape.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffd_msg_remove {
    pub start: u64,
    pub end: u64,
}

const NONE: u64 = 0;
const READ: u64 = 2;
const READ_WRITE: u64 = 3;

const fn request(direction: u64, number: u64, size: usize) -> c_ulong {
    direction << 30 | (size as u64) << 16 | UFFDIO << 8 | number
}

const fn io(number: u64) -> c_ulong {
    request(NONE, number, 0)
}

const fn ior<T>(number: u64) -> c_ulong {
    request(READ, number, size_of::<T>())
}

const fn iowr<T>(number: u64) -> c_ulong {
    request(READ_WRITE, number, size_of::<T>())
}

const _: () = {
    assert!(size_of::<uffd_msg>() == 32);
    assert!(core::mem::offset_of!(uffd_msg, arg) == 8);
    assert!(size_of::<uffdio_api>() == 24);
    assert!(size_of::<uffdio_range>() == 16);
    assert!(size_of::<uffdio_register>() == 32);
    assert!(size_of::<uffdio_copy>() == 40);
    assert!(size_of::<uffdio_zeropage>() == 32);
    assert!(size_of::<uffdio_writeprotect>() == 24);
    assert!(size_of::<uffdio_continue>() == 32);
    assert!(size_of::<uffdio_poison>() == 32);
    assert!(size_of::<uffdio_move>() == 40);
};
