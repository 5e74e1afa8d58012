//! The ioctls of `abi.rs` as functions, made by nix's macros, and the proof that both spell the
//! same numbers.
//!
//! Each function is `unsafe` because the kernel reads and writes through the pointer and acts on
//! the addresses in the structure; the callers in this module say why theirs are right.

use nix::{
    ioctl_read, ioctl_readwrite, ioctl_write_int_bad, request_code_none, request_code_read,
    request_code_readwrite,
};

use super::abi;

ioctl_write_int_bad!(userfaultfd_new, request_code_none!(0xAA, 0x00));
ioctl_readwrite!(api, 0xAA, 0x3F, abi::uffdio_api);
ioctl_readwrite!(register, 0xAA, 0x00, abi::uffdio_register);
ioctl_read!(unregister, 0xAA, 0x01, abi::uffdio_range);
ioctl_read!(wake, 0xAA, 0x02, abi::uffdio_range);
ioctl_readwrite!(copy, 0xAA, 0x03, abi::uffdio_copy);
ioctl_readwrite!(zeropage, 0xAA, 0x04, abi::uffdio_zeropage);
ioctl_readwrite!(move_, 0xAA, 0x05, abi::uffdio_move);
ioctl_readwrite!(writeprotect, 0xAA, 0x06, abi::uffdio_writeprotect);
ioctl_readwrite!(continue_, 0xAA, 0x07, abi::uffdio_continue);
ioctl_readwrite!(poison, 0xAA, 0x08, abi::uffdio_poison);

macro_rules! same_number {
    ($name:ident, $nix:expr, $c:literal) => {
        const _: () = assert!(abi::$name == $nix && abi::$name == $c);
    };
}

// The literals are what the C macros expand to with the asm-generic encoding.
same_number!(
    USERFAULTFD_IOC_NEW,
    request_code_none!(0xAA, 0x00),
    0x0000_AA00
);
same_number!(
    UFFDIO_API,
    request_code_readwrite!(0xAA, 0x3F, 24),
    0xC018_AA3F
);
same_number!(
    UFFDIO_REGISTER,
    request_code_readwrite!(0xAA, 0x00, 32),
    0xC020_AA00
);
same_number!(
    UFFDIO_UNREGISTER,
    request_code_read!(0xAA, 0x01, 16),
    0x8010_AA01
);
same_number!(UFFDIO_WAKE, request_code_read!(0xAA, 0x02, 16), 0x8010_AA02);
same_number!(
    UFFDIO_COPY,
    request_code_readwrite!(0xAA, 0x03, 40),
    0xC028_AA03
);
same_number!(
    UFFDIO_ZEROPAGE,
    request_code_readwrite!(0xAA, 0x04, 32),
    0xC020_AA04
);
same_number!(
    UFFDIO_MOVE,
    request_code_readwrite!(0xAA, 0x05, 40),
    0xC028_AA05
);
same_number!(
    UFFDIO_WRITEPROTECT,
    request_code_readwrite!(0xAA, 0x06, 24),
    0xC018_AA06
);
same_number!(
    UFFDIO_CONTINUE,
    request_code_readwrite!(0xAA, 0x07, 32),
    0xC020_AA07
);
same_number!(
    UFFDIO_POISON,
    request_code_readwrite!(0xAA, 0x08, 32),
    0xC020_AA08
);
