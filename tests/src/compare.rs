//! Comparing large memory.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Bytes of a page.
pub const PAGE: usize = 4096;
const CHUNK: usize = 1 << 20;

/// Asserts that two files have the same bytes.
#[track_caller]
pub fn assert_same_files(one: &Path, other: &Path) {
    let open = |path: &Path| {
        File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    match first_difference(&mut open(one), &mut open(other)).expect("reading") {
        None => {}
        Some(at) => panic!(
            "{} and {} differ at byte {at:#x}",
            one.display(),
            other.display()
        ),
    }
}

/// Returns the offset of the first difference between two streams; the end of only one of them is a
/// difference.
pub fn first_difference(one: &mut impl Read, other: &mut impl Read) -> io::Result<Option<u64>> {
    let (mut a, mut b) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    loop {
        let (a, b) = (fill(one, &mut a)?, fill(other, &mut b)?);
        if a != b {
            let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            return Ok(Some(at + same as u64));
        }
        if a.is_empty() {
            return Ok(None);
        }
        at += a.len() as u64;
    }
}

/// Reads until `buf` is full or the stream ends.
fn fill<'a>(from: &mut impl Read, buf: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let mut done = 0;
    while done < buf.len() {
        match from.read(&mut buf[done..])? {
            0 => break,
            read => done += read,
        }
    }
    Ok(&buf[..done])
}

/// Returns `len` bytes of a file.
#[track_caller]
pub fn bytes_at(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).expect("reading a file");
    bytes
}

#[cfg(test)]
mod tests {
    use super::first_difference;

    #[test]
    fn differences_are_found_wherever_they_are() {
        let base = vec![7_u8; (2 << 20) + 5];
        let diff = |other: &[u8]| first_difference(&mut &base[..], &mut &other[..]).unwrap();
        assert_eq!(diff(&base.clone()), None);
        for at in [0, (1 << 20) - 1, 1 << 20, base.len() - 1] {
            let mut other = base.clone();
            other[at] ^= 1;
            assert_eq!(diff(&other), Some(at as u64));
            assert_eq!(diff(&base[..at]), Some(at as u64));
        }
        assert_eq!(diff(&[&base[..], &[7]].concat()), Some(base.len() as u64));
    }
}
