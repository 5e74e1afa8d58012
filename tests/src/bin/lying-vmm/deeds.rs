//! Actions of the lying VMM while it is served.

use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, raise};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::memory::{Memory, PAGE};

/// An action that it repeats until it exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Touch,
    /// Discards from several threads, without a pause.
    DiscardStorm,
    Discard,
    Unmap,
    Move,
    /// Maps other memory over its own.
    MapOver,
    Protect,
    Unregister,
    RegisterAnew,
    /// Wakes waiting threads, although no page has been installed.
    Wake,
    /// Reads messages that are meant for the daemon.
    Steal,
    /// Makes reads of the userfaultfd blocking, again and again.
    ClearNonblocking,
    Fork,
    Exec,
    StopMode,
    Exit,
    /// Connects and closes.
    Knock,
    /// Installs the pages itself.
    Fill,
}

impl Deed {
    pub(crate) const ALL: &[Self] = &[
        Self::Touch,
        Self::DiscardStorm,
        Self::Discard,
        Self::Unmap,
        Self::Move,
        Self::MapOver,
        Self::Protect,
        Self::Unregister,
        Self::RegisterAnew,
        Self::Wake,
        Self::Steal,
        Self::ClearNonblocking,
        Self::Fork,
        Self::Exec,
        Self::StopMode,
        Self::Exit,
        Self::Knock,
        Self::Fill,
    ];

    /// Returns whether the daemon only learns of it from an event of the kernel. Half of the VMs
    /// with such a deed request these events.
    pub(crate) fn wants_events(self) -> bool {
        matches!(self, Self::Unmap | Self::Move)
    }

    /// Starts the action, in threads that are never joined.
    pub(crate) fn begin(self, memory: &Memory, socket: &Path, seed: u64) {
        let threads = match self {
            Self::Touch | Self::DiscardStorm => 4,
            _ => 1,
        };
        for number in 0..threads {
            let (memory, socket) = (*memory, socket.to_owned());
            let mut rng = SmallRng::seed_from_u64(seed + number);
            std::thread::spawn(move || self.go_on(&memory, &socket, &mut rng));
        }
    }

    fn go_on(self, memory: &Memory, socket: &PathBuf, rng: &mut SmallRng) {
        let pause = match self {
            Self::Touch | Self::DiscardStorm | Self::Steal | Self::ClearNonblocking => 0,
            _ => 2000,
        };
        loop {
            if pause > 0 {
                std::thread::sleep(Duration::from_micros(rng.random_range(1..pause)));
            }
            self.once(memory, socket, rng);
        }
    }

    fn once(self, memory: &Memory, socket: &PathBuf, rng: &mut SmallRng) {
        let page = rng.random_range(0..memory.pages());
        let pages = rng.random_range(1..=(memory.pages() - page).min(64));
        let (at, len) = (
            memory.pointer(page),
            usize::try_from(pages * PAGE).unwrap_or(0),
        );
        // SAFETY: nothing holds a reference to this memory or relies on its content. If it is not
        // mapped, or was made inaccessible, a touch kills this process, which is allowed.
        unsafe {
            match self {
                Self::Touch if rng.random() => at.cast::<u8>().write_volatile(rng.random()),
                Self::Touch => {
                    at.cast::<u8>().read_volatile();
                }
                Self::DiscardStorm | Self::Discard => {
                    libc::madvise(at, len, libc::MADV_DONTNEED);
                }
                Self::Unmap => {
                    libc::munmap(at, len);
                }
                Self::Move => {
                    libc::mremap(at, len, len, libc::MREMAP_MAYMOVE);
                    let elsewhere = libc::mmap(std::ptr::null_mut(), len, 0, ANONYMOUS, -1, 0);
                    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                    libc::mremap(at, len, len, flags, elsewhere);
                }
                Self::MapOver => {
                    let access = libc::PROT_READ | libc::PROT_WRITE;
                    libc::mmap(at, len, access, ANONYMOUS | libc::MAP_FIXED, -1, 0);
                }
                Self::Protect => {
                    let access = [0, libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE];
                    libc::mprotect(at, len, access[rng.random_range(0..3)]);
                }
                Self::Unregister => memory.unregister(page, pages),
                Self::RegisterAnew => memory.register_anew(page, pages),
                Self::Wake => memory.wake_all(),
                Self::Steal => {
                    let mut messages = [0_u64; 64];
                    let bytes = size_of_val(&messages);
                    let mut poll = libc::pollfd {
                        fd: memory.number(),
                        events: libc::POLLIN,
                        revents: 0,
                    };
                    libc::poll(&raw mut poll, 1, 5);
                    libc::read(memory.number(), messages.as_mut_ptr().cast(), bytes);
                }
                Self::ClearNonblocking => memory.clear_nonblocking(),
                Self::Fork => fork(rng),
                Self::Exec if rng.random_bool(0.01) => {
                    let _ = Command::new("/bin/sleep").arg("0.3").exec();
                }
                Self::StopMode if rng.random_bool(0.01) => {
                    let _ = raise(Signal::SIGSTOP);
                }
                Self::Exit if rng.random_bool(0.01) => libc::_exit(0),
                Self::Exec | Self::StopMode | Self::Exit => {}
                Self::Knock => {
                    if let Ok(stream) = UnixStream::connect(socket) {
                        libc::shutdown(stream.as_raw_fd(), libc::SHUT_RDWR);
                    }
                }
                Self::Fill => fill(memory, page),
            }
        }
    }
}

const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Forks a child that touches nothing and exits at once, soon, or with its parent.
fn fork(rng: &mut SmallRng) {
    let time = rng.random_range(0..20_000);
    // SAFETY: the child makes system calls only.
    unsafe {
        match libc::fork() {
            0 => {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::usleep(time);
                libc::_exit(0);
            }
            child if child > 0 && rng.random() => {
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
            _ => {}
        }
    }
}

/// Installs a page that the daemon should install.
fn fill(memory: &Memory, page: u64) {
    #[repr(C)]
    struct Copy {
        to: u64,
        from: u64,
        len: u64,
        mode: u64,
        copied: i64,
    }
    let source = [9_u64; 512];
    let mut copy = Copy {
        to: memory.address + page * PAGE,
        from: source.as_ptr().expose_provenance() as u64,
        len: PAGE,
        mode: 0,
        copied: 0,
    };
    // SAFETY: the structure is the kernel's `uffdio_copy`, and its source is a live page of
    // numbers.
    unsafe { libc::ioctl(memory.number(), 0xC028_AA03, &raw mut copy) };
}
