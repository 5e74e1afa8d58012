//! A wrong value for a field of the hand-made sample, and the expected error.

#![allow(unreachable_pub, reason = "each test includes it")]

/// A field, its new bytes, and a part of the expected error.
pub struct Case {
    pub at: usize,
    pub bytes: Vec<u8>,
    pub error: &'static str,
}

pub fn u16(at: usize, value: u16, error: &'static str) -> Case {
    Case {
        at,
        bytes: value.to_le_bytes().to_vec(),
        error,
    }
}

pub fn u32(at: usize, value: u32, error: &'static str) -> Case {
    Case {
        at,
        bytes: value.to_le_bytes().to_vec(),
        error,
    }
}

pub fn u64(at: usize, value: u64, error: &'static str) -> Case {
    Case {
        at,
        bytes: value.to_le_bytes().to_vec(),
        error,
    }
}

pub fn u8(at: usize, value: u8, error: &'static str) -> Case {
    Case {
        at,
        bytes: vec![value],
        error,
    }
}
