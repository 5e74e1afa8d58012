//! Firecracker's handshake: one message on a Unix socket, which is a JSON array of regions with the
//! userfaultfd attached.
//!
//! ```text
//! [{"base_host_virt_addr": A, "size": N, "offset": O,
//!   "page_size": 4096, "page_size_kib": 4096}, ...]
//! ```
//!
//! Releases from v1.1 to v1.16 differ in the fields that they send and in whether they close the
//! socket afterwards (up to v1.11); the fields that are present are sufficient. `page_size_kib` is
//! in bytes, despite its name. The array may arrive in pieces, and the descriptor comes with the
//! first piece. Variants of forks that continue differently are rejected by name.
//!
//! Source: Firecracker's `src/vmm/src/persist.rs` (`GuestRegionUffdMapping`,
//! `send_uffd_handshake`).

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::handover::OwnerRegion;
use snaprestore_uffd::os::receive;
use snaprestore_uffd::uffd::{PendingClose, Untrusted, may_report_forks};

/// Maximum number of bytes in a message: some hundred regions, where a VM has four.
const MAX_BYTES: usize = 64 << 10;

/// Maximum number of regions, however few bytes each takes, which bounds the memory made of them.
const MAX_REGIONS: usize = 1000;

/// Maximum number of pieces of a message; up to two are normal.
const MAX_PIECES: usize = 256;

/// The reason why a handshake failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The socket failed.
    #[error("reading from the VMM failed")]
    Socket(#[from] io::Error),
    /// The message did not arrive in time.
    #[error("the VMM sent {received} bytes of its region list, then nothing for {patience:?}")]
    Silent {
        /// Number of bytes received.
        received: usize,
        /// The time that was waited.
        patience: Duration,
    },
    /// The peer closed the socket before its message was complete.
    #[error("the VMM closed the socket after {received} bytes of its region list")]
    Closed {
        /// Number of bytes received.
        received: usize,
    },
    /// The message is too long for a handshake.
    #[error(
        "the VMM sent more than {MAX_BYTES} bytes, or {MAX_PIECES} pieces: too long for a region list"
    )]
    TooLong,
    /// The message has too many regions for a handshake.
    #[error("the VMM sent {regions} regions; the limit is {MAX_REGIONS}")]
    TooMany {
        /// Number of regions.
        regions: usize,
    },
    /// The message is not one of Firecracker's.
    #[error("the VMM sent something other than Firecracker's region list: {detail}")]
    NotRegions {
        /// Description of the problem.
        detail: String,
    },
    /// The message came without a descriptor.
    #[error("the VMM sent its regions without a userfaultfd")]
    NoDescriptor,
    /// The descriptor is not a userfaultfd.
    #[error("the VMM sent {found:?} instead of a userfaultfd")]
    NotUserfaultfd {
        /// Description of the descriptor received.
        found: String,
    },
    /// The kernel would deliver a userfaultfd of each child to the reader.
    #[error(
        "the VMM's userfaultfd reports forks (or has not been initialised): forked children cannot be served"
    )]
    ReportsForks,
    /// The message belongs to a variant that continues differently.
    #[error("unsupported handshake: {variant}")]
    Variant {
        /// Name of the variant.
        variant: &'static str,
    },
}

/// The content of a handshake.
#[derive(Debug)]
pub struct Handshake {
    /// The userfaultfd.
    pub userfaultfd: OwnedFd,
    /// The regions.
    pub regions: Vec<OwnerRegion>,
}

/// A region, with the fields of all releases.
#[derive(Debug, Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
    #[serde(default)]
    is_guest_memfd: bool,
}

/// Receives the handshake on `socket`, and waits at most `patience` for all of it.
pub fn handshake(socket: &UnixStream, patience: Duration) -> Result<Handshake, HandshakeError> {
    let deadline = Instant::now() + patience;
    let mut arriving = Arriving::default();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let silent = HandshakeError::Silent {
            received: arriving.received,
            patience,
        };
        if left.is_zero() {
            return Err(silent);
        }
        socket.set_read_timeout(Some(left))?;
        match arriving.receive(socket.as_fd()) {
            Ok(Some(handshake)) => return Ok(handshake),
            Ok(None) => {}
            Err(HandshakeError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(silent);
            }
            Err(error) => return Err(error),
        }
    }
}

/// A partially received handshake, for callers that wait for several at once.
#[derive(Debug, Default)]
pub struct Arriving {
    text: Vec<u8>,
    received: usize,
    pieces: usize,
    descriptors: Untrusted,
}

impl Arriving {
    /// Returns the number of bytes received.
    pub fn received(&self) -> usize {
        self.received
    }

    /// Returns a handle that tells, after `self` was dropped, whether every received descriptor is
    /// closed.
    pub fn closing(&self) -> PendingClose {
        self.descriptors.closing()
    }

    /// Reads once from `socket`. Returns `None` if the message is not complete yet.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<Option<Handshake>, HandshakeError> {
        self.text.resize(MAX_BYTES, 0);
        // Checking for completeness costs more with each piece.
        if self.received == MAX_BYTES || self.pieces == MAX_PIECES {
            return Err(HandshakeError::TooLong);
        }
        let read = match receive(socket, &mut self.text[self.received..]) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let (received, before) = (self.received, self.descriptors.count());
        self.descriptors.extend(read.descriptors);
        if read.truncated || received > 0 && self.descriptors.count() > before {
            return Err(HandshakeError::Variant {
                variant: "an unknown VMM, which hands more descriptors over",
            });
        }
        if read.bytes == 0 {
            return Err(HandshakeError::Closed { received });
        }
        self.received += read.bytes;
        self.pieces += 1;
        match parse(&self.text[..self.received])? {
            Some(mappings) => checked(&mappings, &mut self.descriptors).map(Some),
            None => Ok(None),
        }
    }
}

/// Parses the regions. Returns `None` if the message is not complete yet.
fn parse(text: &[u8]) -> Result<Option<Vec<Mapping>>, HandshakeError> {
    match serde_json::from_slice(text) {
        Ok(mappings) => Ok(Some(mappings)),
        Err(error) if error.is_eof() => Ok(None),
        // The error may quote the peer's message, which must not be repeated at length.
        Err(error) => Err(HandshakeError::NotRegions {
            detail: error.to_string().chars().take(200).collect(),
        }),
    }
}

fn checked(mappings: &[Mapping], descriptors: &mut Untrusted) -> Result<Handshake, HandshakeError> {
    let variant = |variant| Err(HandshakeError::Variant { variant });
    if mappings.iter().any(|mapping| mapping.is_guest_memfd) || descriptors.count() == 3 {
        return variant("Firecracker's branch for secret-free memory");
    }
    if descriptors.count() == 2 {
        return variant("E2B's Firecracker, which hands a memfd over as well");
    }
    if descriptors.count() > 3 {
        return variant("an unknown VMM, which hands more descriptors over");
    }
    let userfaultfd = descriptors.userfaultfd();
    let userfaultfd = userfaultfd.map_err(|found| match found {
        Some(found) => HandshakeError::NotUserfaultfd { found },
        None => HandshakeError::NoDescriptor,
    })?;
    if may_report_forks(userfaultfd) {
        return Err(HandshakeError::ReportsForks);
    }
    if mappings.len() > MAX_REGIONS {
        let regions = mappings.len();
        return Err(HandshakeError::TooMany { regions });
    }
    let regions = mappings.iter().map(|mapping| OwnerRegion {
        address: mapping.base_host_virt_addr,
        len: mapping.size,
        offset: mapping.offset,
        page_size: mapping.page_size(),
    });
    Ok(Handshake {
        userfaultfd: descriptors
            .take_first()
            .ok_or(HandshakeError::NoDescriptor)?,
        regions: regions.collect(),
    })
}

impl Mapping {
    /// Returns the page size in bytes. The older field is documented as KiB and has always
    /// contained bytes; no page is so small that its size in bytes could be mistaken for KiB.
    fn page_size(&self) -> u64 {
        let older = self.page_size_kib.map(|number| match number {
            4 | 2048 => number << 10,
            bytes => bytes,
        });
        self.page_size.or(older).unwrap_or(4096)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write as _};
    use std::os::fd::AsRawFd as _;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::*;
    use snaprestore_uffd::uffd::OpenOptions;

    const V1_1: &str = r#"[{"base_host_virt_addr":140573004529664,"size":67108864,"offset":0}]"#;
    const V1_7: &str = r#"[{"base_host_virt_addr":140573004529664,"size":67108864,"offset":0,"page_size_kib":2097152}]"#;
    const V1_16: &str = r#"[{"base_host_virt_addr":139912345600000,"size":3221225472,"offset":0,"page_size":4096,"page_size_kib":4096},
        {"base_host_virt_addr":139909124374528,"size":1073741824,"offset":3221225472,"page_size":4096,"page_size_kib":4096}]"#;

    /// Sends `text` with `count` descriptors, in pieces of `piece` bytes, and then closes the
    /// socket.
    fn sent(text: &str, count: usize, piece: usize) -> Result<Handshake, HandshakeError> {
        let (here, there) = UnixStream::pair().expect("socketpair failed");
        let uffd = OpenOptions::new()
            .open()
            .expect("cannot open a userfaultfd");
        let fds = vec![uffd.as_fd().as_raw_fd(); count];
        let mut pieces = text.as_bytes().chunks(piece);
        if let Some(first) = pieces.next() {
            let rights = [ControlMessage::ScmRights(&fds)];
            let rights = if count == 0 { &[][..] } else { &rights[..] };
            let bytes = [IoSlice::new(first)];
            sendmsg::<()>(there.as_raw_fd(), &bytes, rights, MsgFlags::empty(), None)
                .expect("cannot send");
        }
        let mut rest: Vec<Vec<u8>> = pieces.map(<[u8]>::to_vec).collect();
        let sender = std::thread::spawn(move || {
            for piece in rest.drain(..) {
                std::thread::sleep(Duration::from_millis(1));
                (&there).write_all(&piece).expect("cannot send");
            }
        });
        let result = handshake(&here, Duration::from_secs(20));
        sender.join().expect("sender thread panicked");
        result
    }

    fn sizes(text: &str, piece: usize) -> Vec<(u64, u64)> {
        let regions = sent(text, 1, piece).expect("handshake failed").regions;
        regions
            .iter()
            .map(|region| (region.len, region.page_size))
            .collect()
    }

    #[test]
    fn every_release_is_parsed_whole_and_in_pieces() {
        for piece in [1 << 20, 50, 7] {
            assert_eq!(sizes(V1_1, piece), [(64 << 20, 4096)]);
            assert_eq!(sizes(V1_7, piece), [(64 << 20, 2 << 20)]);
            assert_eq!(sizes(V1_16, piece), [(3 << 30, 4096), (1 << 30, 4096)]);
        }
        let kib = V1_7.replace("2097152", "2048");
        assert_eq!(sizes(&kib, 1000), [(64 << 20, 2 << 20)]);
        let more = V1_1.replace("{\"base", "{\"gpa_start\":0,\"base");
        assert_eq!(sizes(&more, 1000), [(64 << 20, 4096)]);
    }

    #[test]
    fn invalid_handshake_is_refused_with_reason() {
        let secret_free = V1_1.replace("}]", ",\"is_guest_memfd\":true}]");
        // As short as possible, so that its size alone would be accepted.
        let many = format!("[{}[0,0,0,0,0]]", "[0,0,0,0,0],".repeat(MAX_REGIONS));
        let long = format!("[{}", " ".repeat(MAX_BYTES));
        let cases = [
            ("", 0, "closed the socket after 0 bytes"),
            (&V1_1[..20], 1, "closed the socket after 20 bytes"),
            ("GET / HTTP/1.1", 1, "other than Firecracker's region list"),
            ("[{\"size\":1}]", 1, "missing field"),
            (V1_1, 0, "without a userfaultfd"),
            (V1_1, 2, "E2B"),
            (V1_1, 3, "secret-free"),
            (V1_1, 4, "more descriptors"),
            (V1_1, 100, "more descriptors"),
            (&secret_free, 1, "secret-free"),
            (&long, 1, "more than 65536 bytes, or"),
            (&many, 1, "sent 1001 regions"),
        ];
        for (text, count, expected) in cases {
            let error = sent(text, count, 1 << 20).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn other_descriptor_is_refused_with_its_name() {
        let (here, there) = UnixStream::pair().expect("socketpair failed");
        let fds = [here.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let bytes = [IoSlice::new(V1_1.as_bytes())];
        sendmsg::<()>(there.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None)
            .expect("cannot send");
        let error = handshake(&here, Duration::from_secs(20)).expect_err("a socket");
        let error = error.to_string();
        assert!(error.contains("sent \"socket:["), "{error}");
    }

    #[test]
    fn silent_vmm_times_out() {
        let (here, _there) = UnixStream::pair().expect("socketpair failed");
        let error = handshake(&here, Duration::from_millis(20)).expect_err("silent");
        assert!(
            matches!(error, HandshakeError::Silent { received: 0, .. }),
            "{error}"
        );
    }
}
