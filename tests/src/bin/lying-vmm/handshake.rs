//! Ways in which it hands its memory over, or sends something else.

use std::io::{self, IoSlice, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rand::RngExt as _;
use rand::rngs::SmallRng;
use serde_json::json;
use snaprestore_uffd::os::open_pidfd;

use crate::memory::{Memory, PAGE};

/// Maximum number of descriptors that the kernel takes in one message.
const MAX_AT_ONCE: usize = 253;

/// Text about its regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Text {
    Honest,
    Nothing,
    Empty,
    Noise,
    WrongTypes,
    Negative,
    HugeNumbers,
    WrapsAround,
    NotAligned,
    Overlaps,
    SameOffsets,
    WrongPageSize,
    HugePages,
    MixedPageSizes,
    TooSmall,
    TooLarge,
    Elsewhere,
    InDaemon,
    ManyRegions,
    /// Regions as arrays, which are shorter.
    VeryManyRegions,
    Deep,
    TooLong,
    Twice,
    GuestMemfd,
}

impl Text {
    pub(crate) const ALL: &[Self] = &[
        Self::Honest,
        Self::Nothing,
        Self::Empty,
        Self::Noise,
        Self::WrongTypes,
        Self::Negative,
        Self::HugeNumbers,
        Self::WrapsAround,
        Self::NotAligned,
        Self::Overlaps,
        Self::SameOffsets,
        Self::WrongPageSize,
        Self::HugePages,
        Self::MixedPageSizes,
        Self::TooSmall,
        Self::TooLarge,
        Self::Elsewhere,
        Self::InDaemon,
        Self::ManyRegions,
        Self::VeryManyRegions,
        Self::Deep,
        Self::TooLong,
        Self::Twice,
        Self::GuestMemfd,
    ];

    fn bytes(self, memory: &Memory, rng: &mut SmallRng) -> Vec<u8> {
        let (address, len, half) = (memory.address, memory.len, memory.len / 2);
        let region = |address: u64, size: u64, offset: u64, page_size: u64| {
            json!({
                "base_host_virt_addr": address,
                "size": size,
                "offset": offset,
                "page_size": page_size,
                "page_size_kib": page_size,
            })
        };
        let two = |address: u64, offset: u64, page_size: u64| {
            let first = region(memory.address, half, 0, PAGE);
            json!([first, region(address, half, offset, page_size)])
        };
        let honest = json!([region(address, len, 0, PAGE)]);
        let value = match self {
            Self::Honest => honest,
            Self::Nothing => return Vec::new(),
            Self::Empty => json!([]),
            Self::Noise => return (0..3000).map(|_| rng.random()).collect(),
            Self::WrongTypes => {
                let (any, field) = (
                    [
                        json!("4096"),
                        json!(null),
                        json!([{}]),
                        json!(true),
                        json!(1.5),
                    ],
                    rng.random_range(0..5),
                );
                let mut one = region(address, len, 0, PAGE);
                let fields = [
                    "base_host_virt_addr",
                    "size",
                    "offset",
                    "page_size",
                    "page_size_kib",
                ];
                one[fields[field]] = any[rng.random_range(0..5)].clone();
                json!([one])
            }
            Self::Negative => json!([{"base_host_virt_addr": -4096, "size": -1, "offset": 0}]),
            Self::HugeNumbers => json!([region(u64::MAX, u64::MAX, u64::MAX, u64::MAX)]),
            Self::WrapsAround => json!([region(u64::MAX - PAGE + 1, len, 0, PAGE)]),
            Self::NotAligned => json!([region(address + 1, len, 0, PAGE)]),
            Self::Overlaps => two(address + half - PAGE, half, PAGE),
            Self::SameOffsets => two(address + half, 0, PAGE),
            Self::WrongPageSize => {
                let sizes = [0, 1, 3, 4095, 8192, 1 << 30, u64::MAX];
                json!([region(address, len, 0, sizes[rng.random_range(0..7)])])
            }
            Self::HugePages => json!([region(address & !((2 << 20) - 1), len, 0, 2 << 20)]),
            Self::MixedPageSizes => two(address + half, half, 2 << 20),
            Self::TooSmall => json!([region(address, half, 0, PAGE)]),
            Self::TooLarge => json!([region(address, len << 20, 0, PAGE)]),
            Self::Elsewhere => json!([region(
                rng.random::<u64>() >> 17 & !(PAGE - 1),
                len,
                0,
                PAGE
            )]),
            // Addresses at which programs and their heaps lie.
            Self::InDaemon => json!([region(0x5555_5555_4000, len, 0, PAGE)]),
            Self::ManyRegions => {
                let all = (0..memory.pages()).map(|page| {
                    json!({
                        "base_host_virt_addr": address + page * PAGE,
                        "size": PAGE,
                        "offset": page * PAGE,
                    })
                });
                all.collect()
            }
            Self::VeryManyRegions => vec![json!([0, 0, 0, 0, 0]); 5000].into(),
            Self::Deep => return "[".repeat(60_000).into_bytes(),
            Self::TooLong => return format!("[{}", " ".repeat(200_000)).into_bytes(),
            Self::Twice => return format!("{honest}{honest}").into_bytes(),
            Self::GuestMemfd => {
                let mut one = region(address, len, 0, PAGE);
                one["is_guest_memfd"] = true.into();
                json!([one])
            }
        };
        value.to_string().into_bytes()
    }
}

/// Descriptors that it sends with the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Descriptors {
    Honest,
    None,
    Two,
    Three,
    Eight,
    ThreeHundred,
    Pipe,
    Memfd,
    Pidfd,
    Eventfd,
    Socket,
    Listening,
    /// A userfaultfd on which no features were negotiated.
    Fresh,
    /// The userfaultfd of the parent, sent by a child.
    OfParent,
    /// A file that can't be closed before this program has exited. It is only chosen by name, since
    /// it needs a mount.
    Fuse,
}

impl Descriptors {
    pub(crate) const ALL: &[Self] = &[
        Self::Honest,
        Self::None,
        Self::Two,
        Self::Three,
        Self::Eight,
        Self::ThreeHundred,
        Self::Pipe,
        Self::Memfd,
        Self::Pidfd,
        Self::Eventfd,
        Self::Socket,
        Self::Listening,
        Self::Fresh,
        Self::OfParent,
    ];

    fn numbers(self, memory: &Memory) -> Vec<RawFd> {
        let good = memory.number();
        // SAFETY: the calls take numbers and live memory of their own; the descriptors that they
        // create are never closed.
        unsafe {
            match self {
                Self::Honest | Self::OfParent => vec![good],
                Self::None => Vec::new(),
                Self::Two => vec![good; 2],
                Self::Three => vec![good; 3],
                Self::Eight => vec![good; 8],
                Self::ThreeHundred => vec![good; 300],
                Self::Pipe => {
                    let mut ends = [0; 2];
                    libc::pipe(ends.as_mut_ptr());
                    vec![ends[0]]
                }
                Self::Memfd => vec![libc::memfd_create(c"lie".as_ptr(), 0)],
                Self::Pidfd => open_pidfd(std::process::id())
                    .map(|fd| vec![std::os::fd::IntoRawFd::into_raw_fd(fd)])
                    .unwrap_or_default(),
                Self::Eventfd => vec![libc::eventfd(1, 0)],
                Self::Socket | Self::Listening => {
                    let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
                    if self == Self::Listening {
                        libc::listen(fd, 1);
                    }
                    vec![fd]
                }
                Self::Fuse => vec![crate::fuse::file().unwrap_or(-1)],
                Self::Fresh => {
                    let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
                    vec![i32::try_from(fd).unwrap_or(-1)]
                }
            }
        }
    }
}

/// Way of sending the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pieces {
    Whole,
    AtRandom,
    ByteByByte,
    DescriptorLast,
    /// Sends a part and then nothing more, with the socket open.
    Stalls,
    /// Sends a part and then closes the socket.
    HangsUp,
    /// Sends a part and then shuts down its writing side, but reads.
    ShutsDown,
    /// Sends nothing, on many connections that stay open.
    Crowd,
    /// Opens many connections and closes them at once.
    Flickers,
}

impl Pieces {
    pub(crate) const ALL: &[Self] = &[
        Self::Whole,
        Self::AtRandom,
        Self::ByteByByte,
        Self::DescriptorLast,
        Self::Stalls,
        Self::HangsUp,
        Self::ShutsDown,
        Self::Crowd,
        Self::Flickers,
    ];
}

/// Connects and sends the message. The socket is kept open, as Firecracker keeps it.
pub(crate) fn send(
    path: &Path,
    memory: &Memory,
    text: Text,
    descriptors: Descriptors,
    pieces: Pieces,
    rng: &mut SmallRng,
) -> io::Result<Option<UnixStream>> {
    if descriptors == Descriptors::OfParent {
        // SAFETY: the child allocates as well, but this process has one thread still.
        if unsafe { libc::fork() } != 0 {
            return Ok(None);
        }
        // SAFETY: takes numbers.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    }
    for _ in 0..if pieces == Pieces::Flickers { 200 } else { 0 } {
        drop(UnixStream::connect(path)?);
    }
    if pieces == Pieces::Crowd {
        let crowd: Result<Vec<_>, _> = (0..150).map(|_| UnixStream::connect(path)).collect();
        std::mem::forget(crowd?);
        return Ok(None);
    }
    let mut stream = UnixStream::connect(path)?;
    let bytes = text.bytes(memory, rng);
    let numbers = descriptors.numbers(memory);
    let mut sent = 0;
    let cut = rng.random_range(0..=bytes.len());
    let end = match pieces {
        Pieces::Stalls | Pieces::HangsUp | Pieces::ShutsDown => cut,
        _ => bytes.len(),
    };
    let mut rights = numbers.chunks(MAX_AT_ONCE);
    while sent < end {
        let piece = match pieces {
            Pieces::AtRandom | Pieces::Stalls => rng.random_range(1..=end - sent),
            Pieces::ByteByByte => 1,
            Pieces::DescriptorLast if sent == 0 => end - 1,
            _ => end - sent,
        };
        let with = if pieces == Pieces::DescriptorLast && sent == 0 {
            None
        } else {
            rights.next()
        };
        let bytes = [IoSlice::new(&bytes[sent..sent + piece])];
        let scm = with.map(ControlMessage::ScmRights);
        let flags = MsgFlags::MSG_NOSIGNAL;
        sent += sendmsg::<()>(stream.as_raw_fd(), &bytes, scm.as_slice(), flags, None)?;
        if rng.random_bool(0.2) {
            std::thread::sleep(Duration::from_micros(rng.random_range(1..3000)));
        }
    }
    match pieces {
        Pieces::HangsUp => return Ok(None),
        Pieces::ShutsDown => stream.shutdown(std::net::Shutdown::Write)?,
        _ => stream.flush()?,
    }
    Ok(Some(stream))
}
