//! A VMM from the point of view of a userfaultfd handler: maps memory, hands it over as Firecracker
//! does, and touches all of it.
//!
//! ```text
//! fake-vmm SOCKET RAW [--manner v1.1|v1.7|v1.12] [--split PAGES] [--threads N] [--huge]
//!          [--discard] [--move] [--wait] [--hold] [--let-go] [--only PAGES] [--die]
//!          [--send nothing|half|late] [--hang-up]
//! ```
//!
//! `RAW` is the original memory: each touched page is compared with it.
//!
//! - `--manner`: the release whose message is sent.
//! - `--split`: cuts the memory into two regions, the second of which lies at a lower address, as
//!   with Firecracker.
//! - `--huge`: takes the memory from the pool of 2 MiB pages.
//! - `--discard`: before the touches, gives back every fourth run of 16 pages (with `--huge`, every
//!   fourth huge page), as a balloon does, and expects zeros there.
//! - `--move`: moves every fourth run of 16 pages elsewhere, which Firecracker never does.
//! - `--wait`: waits for the end of standard input before it touches anything.
//! - `--hold`: waits for it when all pages were right, and then touches everything again.
//! - `--let-go`: keeps no descriptor of its memory, unlike Firecracker. When all other descriptors
//!   are closed it reads zeros instead of waiting.
//! - `--only`: touches at most this number of pages.
//! - `--die`: exits by SIGKILL when all touched pages were right.
//! - `--send`: sends nothing or half of its message and continues as if it had sent all of it
//!   (`nothing`, `half`), or sends the other half when a line arrives on standard input (`late`).
//! - `--hang-up`: then closes the socket and touches nothing.
#![allow(
    unsafe_code,
    reason = "memory that another process fills is touched through raw pointers"
)]
#![allow(clippy::print_stdout, reason = "it is a program")]

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead as _, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use snaprestore_uffd::memory::{MappingOptions, RawRegion};
use snaprestore_uffd::uffd::{Features, Modes, OpenOptions, UserModeOnly, Userfaultfd};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
/// Pages that are discarded or moved together, of small ones.
const RUN: usize = 16;
const USAGE: &str = "usage: fake-vmm SOCKET RAW [--manner v1.1|v1.7|v1.12] [--split PAGES] [--threads N] [--huge] [--discard] [--move] [--wait] [--hold] [--let-go] [--only PAGES] [--die] [--send nothing|half|late] [--hang-up]";

/// The releases whose messages differ.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// v1.1 to v1.6: no page size; the socket is closed afterwards.
    V1_1,
    /// v1.7 to v1.11: `page_size_kib`, in bytes; the socket is closed afterwards.
    V1_7,
    /// v1.12 and later: `page_size` as well; the socket stays open; discards are reported.
    V1_12,
}

#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of the command line"
)]
struct Options {
    socket: PathBuf,
    raw: PathBuf,
    manner: Manner,
    split: Option<usize>,
    threads: usize,
    huge: bool,
    discard: bool,
    moves: bool,
    wait: bool,
    hold: bool,
    let_go: bool,
    only: usize,
    die: bool,
    hang_up: bool,
    send: Send,
}

/// Part of its message that it sends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Send {
    All,
    /// Half, with the descriptor.
    Half,
    /// Half, with the descriptor, and the other half on request.
    Late,
    Nothing,
}

fn options() -> Option<Options> {
    let mut args = std::env::args_os().skip(1);
    let mut options = Options {
        socket: args.next()?.into(),
        raw: args.next()?.into(),
        manner: Manner::V1_12,
        split: None,
        threads: 1,
        huge: false,
        discard: false,
        moves: false,
        wait: false,
        hold: false,
        let_go: false,
        only: usize::MAX,
        die: false,
        hang_up: false,
        send: Send::All,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next()?.into_string().ok();
        match arg.to_str()? {
            "--manner" => {
                options.manner = match value()?.as_str() {
                    "v1.1" => Manner::V1_1,
                    "v1.7" => Manner::V1_7,
                    "v1.12" => Manner::V1_12,
                    _ => return None,
                }
            }
            "--split" => options.split = Some(value()?.parse().ok()?),
            "--threads" => options.threads = value()?.parse().ok()?,
            "--huge" => options.huge = true,
            "--discard" => options.discard = true,
            "--move" => options.moves = true,
            "--wait" => options.wait = true,
            "--hold" => options.hold = true,
            "--let-go" => options.let_go = true,
            "--only" => options.only = value()?.parse().ok()?,
            "--die" => options.die = true,
            "--hang-up" => options.hang_up = true,
            "--send" => {
                options.send = match value()?.as_str() {
                    "half" => Send::Half,
                    "late" => Send::Late,
                    "nothing" => Send::Nothing,
                    _ => return None,
                }
            }
            _ => return None,
        }
    }
    Some(options)
}

fn main() -> ExitCode {
    let Some(options) = options() else {
        println!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(&options) {
        Ok(Ok(_)) if options.hang_up => {
            println!("hung up");
            ExitCode::SUCCESS
        }
        Ok(Ok(pages)) => {
            println!("{pages} pages right");
            if options.die {
                let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
            }
            ExitCode::SUCCESS
        }
        Ok(Err(page)) => {
            println!("page {page} is wrong");
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("{error}");
            ExitCode::from(3)
        }
    }
}

/// The memory, by region.
struct Memory {
    /// First page and address of each region.
    regions: Vec<(usize, RawRegion)>,
    pages: usize,
    /// New addresses of moved runs of [`RUN`] pages.
    moved: HashMap<usize, usize>,
}

fn run(options: &Options) -> io::Result<Result<usize, usize>> {
    let raw = fs::read(&options.raw)?;
    let mut features = Features::EMPTY;
    if options.manner == Manner::V1_12 {
        features |= Features::EVENT_REMOVE;
    }
    if options.moves {
        features |= Features::EVENT_REMAP | Features::EVENT_UNMAP;
    }
    let uffd = OpenOptions::new()
        .required(features)
        .user_mode_only(UserModeOnly::IfNeeded)
        .open()
        .map_err(io::Error::other)?;
    let mut memory = Memory::map(raw.len() / PAGE, options, &uffd)?;
    let socket = memory.hand_over(options, &uffd)?;
    if options.hang_up {
        return Ok(Ok(0));
    }
    // Dropping it would unregister the memory first; kept, it is closed when the program ends.
    let uffd = std::mem::ManuallyDrop::new(uffd);
    if options.let_go {
        // SAFETY: the number is the descriptor's, and nothing uses it or closes it from here on.
        unsafe { libc::close(uffd.as_fd().as_raw_fd()) };
    }
    let run = if options.huge { HUGE_PAGE / PAGE } else { RUN };
    let gone = |page: usize| options.discard && page / run % 4 == 1;
    if options.discard {
        memory.discard(run, gone);
    }
    if options.moves {
        memory.scatter();
    }
    if options.wait {
        println!("handed over");
        io::stdin().read_to_end(&mut Vec::new())?;
    }
    let mut result = memory.compare(&raw, options, gone);
    if options.hold && result.is_ok() {
        println!("right so far");
        io::stdin().read_to_end(&mut Vec::new())?;
        result = memory.compare(&raw, options, gone);
    }
    drop(socket);
    Ok(result)
}

impl Memory {
    fn map(pages: usize, options: &Options, uffd: &Userfaultfd) -> io::Result<Self> {
        let cut = options.split.filter(|cut| *cut < pages).unwrap_or(pages);
        let mut regions = Vec::new();
        for (first, count) in [(0, cut), (cut, pages - cut)] {
            if count == 0 {
                continue;
            }
            let len = (count * PAGE) as u64;
            let mapping = MappingOptions::new().huge_pool(options.huge).map(len);
            let (start, len) = mapping.map_err(io::Error::other)?.into_raw();
            // SAFETY: the memory is reached through raw pointers only, and stays mapped as long as
            // this process.
            let region = unsafe { RawRegion::new(start, len) }.map_err(io::Error::other)?;
            uffd.register(&region, 0, len, Modes::MISSING)
                .map_err(io::Error::other)?;
            regions.push((first, region));
        }
        let moved = HashMap::new();
        Ok(Self {
            regions,
            pages,
            moved,
        })
    }

    /// Sends the regions and the descriptor. The socket stays open where the release keeps it so.
    fn hand_over(&self, options: &Options, uffd: &Userfaultfd) -> io::Result<Option<UnixStream>> {
        let page_size = if options.huge { HUGE_PAGE } else { PAGE };
        let region = |(first, region): &(usize, RawRegion)| {
            let mut fields = json!({
                "base_host_virt_addr": region.address(),
                "size": region.len(),
                "offset": first * PAGE,
            });
            if options.manner != Manner::V1_1 {
                fields["page_size_kib"] = page_size.into();
            }
            if options.manner == Manner::V1_12 {
                fields["page_size"] = page_size.into();
            }
            fields
        };
        let message: Value = self.regions.iter().map(region).collect();
        let socket = UnixStream::connect(&options.socket)?;
        let message = message.to_string();
        let part = match options.send {
            Send::All => &message[..],
            Send::Half | Send::Late => &message[..message.len() / 2],
            Send::Nothing => return Ok(Some(socket)),
        };
        let descriptors = [uffd.as_fd().as_raw_fd()];
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(part.as_bytes())],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::empty(),
            None,
        )?;
        if options.send == Send::Late {
            println!("half sent");
            io::stdin().lock().read_line(&mut String::new())?;
            (&socket).write_all(&message.as_bytes()[part.len()..])?;
        }
        let stays_open = options.manner == Manner::V1_12 || options.send != Send::All;
        Ok((stays_open && !options.hang_up).then_some(socket))
    }

    fn address(&self, page: usize) -> *mut u8 {
        if let Some(run) = self.moved.get(&(page / RUN)) {
            return std::ptr::with_exposed_provenance_mut(run + page % RUN * PAGE);
        }
        let within = |(first, region): &&(usize, RawRegion)| {
            page.checked_sub(*first)
                .is_some_and(|page| ((page * PAGE) as u64) < region.len())
        };
        let (first, region) = self
            .regions
            .iter()
            .find(within)
            .expect("a page of a region");
        region.as_ptr().wrapping_add((page - first) * PAGE)
    }

    /// Moves every fourth run to other addresses.
    fn scatter(&mut self) {
        for run in (3..self.pages / RUN).step_by(4) {
            let from = self.address(run * RUN);
            // A run that lies in two regions can't be moved at once.
            if from.wrapping_add((RUN - 1) * PAGE) != self.address(run * RUN + RUN - 1) {
                continue;
            }
            // SAFETY: the run is this program's own, reached through `address` only, which knows
            // the new place from now on. Nothing else is at the target, which was reserved for it.
            let to = unsafe {
                let len = RUN * PAGE;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let target = libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0);
                assert_ne!(target, libc::MAP_FAILED);
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                libc::mremap(from.cast(), len, len, flags, target)
            };
            assert_ne!(to, libc::MAP_FAILED, "{}", io::Error::last_os_error());
            self.moved.insert(run, to.expose_provenance());
        }
    }

    /// Discards the runs of `run` pages that are gone, in pieces as the memory allows.
    fn discard(&self, run: usize, gone: impl Fn(usize) -> bool) {
        let piece = if run * PAGE == HUGE_PAGE { run } else { 1 };
        for page in (0..self.pages).step_by(piece).filter(|page| gone(*page)) {
            let (address, len) = (self.address(page).cast(), piece * PAGE);
            // SAFETY: the pages are this program's own, and nothing holds a reference to them.
            let result = unsafe { libc::madvise(address, len, libc::MADV_DONTNEED) };
            assert_eq!(result, 0, "{}", io::Error::last_os_error());
        }
    }

    /// Touches the pages in a shuffled order, all or the first of them. Returns the number of
    /// correct pages, or the first wrong one.
    fn compare(
        &self,
        raw: &[u8],
        options: &Options,
        gone: impl Fn(usize) -> bool + Sync,
    ) -> Result<usize, usize> {
        let is_right = |page: usize| {
            // SAFETY: the page is mapped as long as this process, and only the handler writes to
            // it, before this read can see it.
            let content = unsafe { self.address(page).cast::<[u8; PAGE]>().read_volatile() };
            if gone(page) {
                content == [0; PAGE]
            } else {
                content[..] == raw[page * PAGE..][..PAGE]
            }
        };
        let (count, threads) = (self.pages.min(options.only), options.threads);
        let wrong = std::thread::scope(|scope| {
            let part = |thread: usize| {
                // 1021 is a prime, and divides no number of pages that is a power of two.
                let order = (thread..count).step_by(threads);
                order
                    .map(|page| page * 1021 % self.pages)
                    .find(|page| !is_right(*page))
            };
            let threads: Vec<_> = (0..threads)
                .map(|thread| scope.spawn(move || part(thread)))
                .collect();
            let wrong = threads.into_iter().filter_map(|thread| thread.join().ok()?);
            wrong.min()
        });
        wrong.map_or(Ok(count), Err)
    }
}
