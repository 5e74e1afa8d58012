//! A process that hands its memory over, as a VMM does.

use std::io::{PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::fd::AsRawFd as _;

use snaprestore_engine::pager::{Handover, OwnerRegion};
use snaprestore_fixtures::images::{Mix, Shares};
use snaprestore_uffd::memory::{Mapping, MappingOptions, RawRegion};
use snaprestore_uffd::os::open_pidfd;
use snaprestore_uffd::uffd::{Features, Installed, Modes, OpenOptions, Userfaultfd, Wake};

use crate::common::PAGE;
use crate::uffd_support::{Child, in_threads};

/// Returns pages of all kinds: zeros, fills, repeated ones and others.
pub(crate) fn mixed(pages: u64) -> Vec<u8> {
    Mix::with_shares(pages, 77, Shares::MIXED).bytes()
}

/// A region to map.
#[derive(Clone, Copy)]
pub(crate) struct Region {
    pub(crate) pages: u64,
    pub(crate) offset_pages: u64,
}

/// The kind of an owner's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Private memory in pages of 4 KiB.
    Small,
    /// Private memory from the pool of 2 MiB pages, as Firecracker maps it.
    Huge,
    /// A shared file of that pool, in which parts of a page can be discarded.
    HugeFile,
}

impl Backing {
    fn page_size(self) -> u64 {
        match self {
            Self::Small => PAGE as u64,
            Self::Huge | Self::HugeFile => 2 << 20,
        }
    }

    /// Maps `len` bytes for as long as this process lives.
    fn map(self, len: u64) -> (*mut u8, u64) {
        match self {
            Self::Small => Mapping::new(len).unwrap().into_raw(),
            Self::Huge => MappingOptions::new()
                .huge_pool(true)
                .map(len)
                .unwrap()
                .into_raw(),
            Self::HugeFile => {
                let bytes = usize::try_from(len).unwrap();
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
                // SAFETY: the calls take numbers and a live string, and map at a place of the
                // kernel's choice.
                let start = unsafe {
                    let file = libc::memfd_create(
                        c"huge".as_ptr(),
                        libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
                    );
                    assert!(file >= 0, "{}", std::io::Error::last_os_error());
                    let end = i64::try_from(len).unwrap();
                    assert_eq!(libc::ftruncate(file, end), 0);
                    libc::mmap(std::ptr::null_mut(), bytes, protection, flags, file, 0)
                };
                assert_ne!(
                    start,
                    libc::MAP_FAILED,
                    "{}",
                    std::io::Error::last_os_error()
                );
                (start.cast(), len)
            }
        }
    }
}

/// The child process, and what it handed over.
pub(crate) struct Owner {
    pub(crate) child: Child,
    uffd: i32,
    regions: Vec<OwnerRegion>,
    to_child: PipeWriter,
}

/// The memory, in the child.
pub(crate) struct Memory {
    regions: Vec<OwnerRegion>,
    from_parent: PipeReader,
    uffd: Option<Userfaultfd>,
}

impl Owner {
    /// Starts a process that maps and registers `regions`, the first above the others, reports
    /// where they are, and runs `body`. Its exit code is the body's result.
    pub(crate) fn start(regions: &[Region], body: impl FnOnce(&mut Memory) -> i32) -> Self {
        Self::start_in(Backing::Small, regions, body)
    }

    /// Starts a process like [`Owner::start`], with memory of another kind.
    pub(crate) fn start_in(
        backing: Backing,
        regions: &[Region],
        body: impl FnOnce(&mut Memory) -> i32,
    ) -> Self {
        let (mut from_child, mut to_parent) = std::io::pipe().unwrap();
        let (from_parent, to_child) = std::io::pipe().unwrap();
        let child = Child::start(|| {
            let uffd = OpenOptions::new()
                .required(Features::EVENT_REMOVE)
                .open()
                .unwrap();
            let mut mapped = Vec::new();
            for region in regions {
                let len = region.pages * PAGE as u64;
                let (start, len) = backing.map(len);
                // SAFETY: the memory is accessed only through raw pointers, and stays mapped as
                // long as this process.
                let memory = unsafe { RawRegion::new(start, len) }.unwrap();
                uffd.register(&memory, 0, len, Modes::MISSING).unwrap();
                mapped.push(OwnerRegion {
                    address: memory.address(),
                    len,
                    offset: region.offset_pages * PAGE as u64,
                    page_size: backing.page_size(),
                });
            }
            let number = u64::try_from(uffd.as_fd().as_raw_fd()).unwrap();
            let mut words = vec![number];
            words.extend(mapped.iter().map(|region| region.address));
            for word in words {
                to_parent.write_all(&word.to_le_bytes()).unwrap();
            }
            body(&mut Memory {
                regions: mapped,
                from_parent,
                uffd: Some(uffd),
            })
        });
        let mut next = || {
            let mut bytes = [0; 8];
            from_child.read_exact(&mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        let uffd = i32::try_from(next()).unwrap();
        let regions = regions.iter().map(|region| OwnerRegion {
            address: next(),
            len: region.pages * PAGE as u64,
            offset: region.offset_pages * PAGE as u64,
            page_size: backing.page_size(),
        });
        Self {
            regions: regions.collect(),
            child,
            uffd,
            to_child,
        }
    }

    pub(crate) fn handover(&self) -> Handover {
        Handover {
            userfaultfd: self.child.descriptor(self.uffd),
            owner: open_pidfd(u32::try_from(self.child.pid()).unwrap()).unwrap(),
            regions: self.regions.clone(),
            page_map: None,
        }
    }

    /// Returns where its memory is.
    pub(crate) fn regions(&self) -> Vec<OwnerRegion> {
        self.regions.clone()
    }

    /// Ends [`Memory::wait_for_word`].
    pub(crate) fn word(&self) {
        (&self.to_child).write_all(b"!").unwrap();
    }
}

impl Memory {
    pub(crate) fn wait_for_word(&mut self) {
        self.from_parent.read_exact(&mut [0]).unwrap();
    }

    /// Closes the owner's own descriptor: missing pages become zeros when the pager closes its own.
    pub(crate) fn close_userfaultfd(&mut self) {
        // Dropping it would unregister the memory as well.
        let uffd = std::mem::ManuallyDrop::new(self.uffd.take().unwrap());
        // SAFETY: the descriptor is this process's own, and nobody uses it any more.
        assert_eq!(unsafe { libc::close(uffd.as_fd().as_raw_fd()) }, 0);
    }

    /// Returns whether `page`, which is present, is still registered. Checks without a fault.
    pub(crate) fn is_registered(&self, page: u64) -> bool {
        let uffd = self.uffd.as_ref().unwrap();
        let copied = uffd.copy(self.page(page), &[0; PAGE], Wake::Later);
        // If a page is present, nothing is copied.
        matches!(copied, Ok(Installed::Exists | Installed::Again))
    }

    pub(crate) fn regions(&self) -> impl Iterator<Item = &OwnerRegion> {
        self.regions.iter()
    }

    /// Returns the address of `page`.
    pub(crate) fn page(&self, page: u64) -> u64 {
        let offset = page * PAGE as u64;
        let within =
            |region: &&OwnerRegion| (region.offset..region.offset + region.len).contains(&offset);
        let region = self.regions.iter().find(within).unwrap();
        region.address + (offset - region.offset)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum::<u64>() / PAGE as u64
    }

    /// Returns whether `page` reads as `expected`; touches it.
    pub(crate) fn is(&self, page: u64, expected: &[u8]) -> bool {
        let address = usize::try_from(self.page(page)).unwrap();
        crate::common::peek(address)[..] == *expected
    }

    /// Reads all pages in shuffled order from `threads` threads. Returns 0 if they are right.
    pub(crate) fn compare_in_threads(&self, source: &[u8], threads: u64) -> i32 {
        let pages = self.pages();
        let check = |thread: u64| {
            let mine = (thread..pages).step_by(usize::try_from(threads).unwrap());
            // A step that has no factor in common with the number of pages.
            let order = mine.map(|page| page * 1021 % pages);
            order.fold(true, |right, page| {
                let start = usize::try_from(page).unwrap() * PAGE;
                right & self.is(page, &source[start..start + PAGE])
            })
        };
        let (right, ()) = in_threads(threads, check, || {});
        i32::from(right.contains(&false))
    }

    /// Reads all pages in order; they must be those of the source, except for `gone` ones, which
    /// must be zero. Returns the first that isn't right.
    pub(crate) fn wrong(&self, source: &[u8], gone: impl Fn(u64) -> bool) -> Option<u64> {
        (0..self.pages()).find(|page| {
            let start = usize::try_from(*page).unwrap() * PAGE;
            let expected = if gone(*page) {
                &[0; PAGE][..]
            } else {
                &source[start..start + PAGE]
            };
            !self.is(*page, expected)
        })
    }

    /// Discards some ranges as a balloon does, then reads everything. Returns 0 if it is right.
    pub(crate) fn discard_and_compare(&self, source: &[u8], round: u64) -> i32 {
        let gone = |page: u64| page / 16 % 4 == round % 4;
        for page in (0..self.pages()).step_by(16).filter(|page| gone(*page)) {
            let count = 16.min(self.pages() - page);
            for page in page..page + count {
                crate::uffd_support::madvise(self.page(page), PAGE as u64, libc::MADV_DONTNEED);
            }
        }
        i32::from(self.wrong(source, gone).is_some())
    }
}
