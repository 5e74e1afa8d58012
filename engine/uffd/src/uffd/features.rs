//! Capabilities of a kernel: feature bits, ioctls, and masks that hide some of them.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Not};
use std::str::FromStr;

use super::abi;

/// A kernel release, as far as features depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelVersion {
    /// The major version: 5 of 5.7.
    pub major: u16,
    /// The minor version: 7 of 5.7.
    pub minor: u16,
}

impl KernelVersion {
    /// The oldest kernel on which the engine works; the crate documentation gives the reasons.
    pub const MINIMUM: Self = Self::new(5, 7);

    /// Creates a version; `KernelVersion::new(5, 7)` is Linux 5.7.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major, minor }
    }

    /// Returns the version of the running kernel, from `uname`. A distribution's kernel with
    /// backported features counts by its number.
    pub fn running() -> Option<Self> {
        nix::sys::utsname::uname()
            .ok()?
            .release()
            .to_str()?
            .parse()
            .ok()
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The error for a release string that does not begin with two numbers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel release {0:?} does not begin with a version such as 6.1")]
pub struct BadRelease(String);

impl FromStr for KernelVersion {
    type Err = BadRelease;

    /// Parses the output of `uname -r`, such as `6.1.0-28-amd64`.
    fn from_str(release: &str) -> Result<Self, BadRelease> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        let mut next = || numbers.next().and_then(|n| n.parse().ok());
        match (next(), next()) {
            (Some(major), Some(minor)) => Ok(Self { major, minor }),
            _ => Err(BadRelease(release.to_owned())),
        }
    }
}

/// A member of a set: its bit, the kernel's name for it and the kernel that introduced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<S> {
    /// The set that contains only this member.
    pub set: S,
    /// The kernel's name without its prefix, such as `EVENT_REMOVE`.
    pub name: &'static str,
    /// The first kernel that has it.
    pub since: KernelVersion,
}

macro_rules! bit_set {
    ($(#[$doc:meta])* $set:ident { $($(#[$item_doc:meta])* $name:ident = $bits:expr, since $major:literal, $minor:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $set(u64);

        impl $set {
            $($(#[$item_doc])* pub const $name: Self = Self($bits);)*

            /// Every member that this engine knows by name, oldest bit first.
            pub const KNOWN: &'static [Entry<Self>] = &[
                $(Entry { set: Self::$name, name: stringify!($name), since: KernelVersion::new($major, $minor) },)*
            ];

            /// The empty set.
            pub const EMPTY: Self = Self(0);

            /// The set of all bits, including those that only a later kernel knows.
            pub const ALL_BITS: Self = Self(u64::MAX);

            /// Returns the set of these bits, including unknown ones.
            pub const fn from_bits(bits: u64) -> Self {
                Self(bits)
            }

            /// Returns the bits as the kernel sees them.
            pub const fn bits(self) -> u64 {
                self.0
            }

            /// Returns whether every member of `other` is in `self`.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Returns whether the set is empty.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// Returns the union of both sets.
            #[must_use]
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// Returns the members that aren't in `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// Returns the known members of this set.
            pub fn iter(self) -> impl Iterator<Item = &'static Entry<Self>> {
                Self::KNOWN.iter().filter(move |entry| self.contains(entry.set))
            }

            /// Returns all members that kernels before `version` don't have.
            pub fn newer_than(version: KernelVersion) -> Self {
                let old = Self::KNOWN.iter().filter(|entry| entry.since <= version);
                old.fold(Self::ALL_BITS, |newer, entry| newer.without(entry.set))
            }
        }

        impl BitOr for $set {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                self.union(other)
            }
        }

        impl BitOrAssign for $set {
            fn bitor_assign(&mut self, other: Self) {
                *self = self.union(other);
            }
        }

        impl BitAnd for $set {
            type Output = Self;

            fn bitand(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }

        impl Not for $set {
            type Output = Self;

            fn not(self) -> Self {
                Self(!self.0)
            }
        }

        impl fmt::Display for $set {
            /// Writes the names, separated by commas; bits without a name as one hexadecimal
            /// number; `none` if empty.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut separator = "";
                let mut rest = *self;
                for entry in self.iter() {
                    write!(f, "{separator}{}", entry.name)?;
                    separator = ", ";
                    rest = rest.without(entry.set);
                }
                match (rest.is_empty(), self.is_empty()) {
                    (_, true) => f.write_str("none"),
                    (true, false) => Ok(()),
                    (false, false) => write!(f, "{separator}{:#x}", rest.bits()),
                }
            }
        }

        impl fmt::Debug for $set {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($set))
            }
        }
    };
}

bit_set! {
    /// The features of `UFFDIO_API` (`UFFD_FEATURE_*`).
    Features {
        /// Write-protect faults on anonymous memory.
        PAGEFAULT_FLAG_WP = abi::UFFD_FEATURE_PAGEFAULT_FLAG_WP, since 5, 7;
        /// A child of `fork` comes with a userfaultfd of its own; requires `CAP_SYS_PTRACE`.
        EVENT_FORK = abi::UFFD_FEATURE_EVENT_FORK, since 4, 11;
        /// `mremap` is reported.
        EVENT_REMAP = abi::UFFD_FEATURE_EVENT_REMAP, since 4, 11;
        /// Discarded pages (`MADV_DONTNEED`, `MADV_REMOVE`, `MADV_FREE`) are reported.
        EVENT_REMOVE = abi::UFFD_FEATURE_EVENT_REMOVE, since 4, 11;
        /// Missing faults on hugetlbfs.
        MISSING_HUGETLBFS = abi::UFFD_FEATURE_MISSING_HUGETLBFS, since 4, 11;
        /// Missing faults on shared memory.
        MISSING_SHMEM = abi::UFFD_FEATURE_MISSING_SHMEM, since 4, 11;
        /// `munmap` is reported.
        EVENT_UNMAP = abi::UFFD_FEATURE_EVENT_UNMAP, since 4, 11;
        /// The faulting thread gets SIGBUS, no message is sent.
        SIGBUS = abi::UFFD_FEATURE_SIGBUS, since 4, 14;
        /// Fault messages name the thread.
        THREAD_ID = abi::UFFD_FEATURE_THREAD_ID, since 4, 14;
        /// Minor faults on hugetlbfs.
        MINOR_HUGETLBFS = abi::UFFD_FEATURE_MINOR_HUGETLBFS, since 5, 13;
        /// Minor faults on shared memory.
        MINOR_SHMEM = abi::UFFD_FEATURE_MINOR_SHMEM, since 5, 14;
        /// Fault messages carry the address itself, not its page.
        EXACT_ADDRESS = abi::UFFD_FEATURE_EXACT_ADDRESS, since 5, 18;
        /// Write-protect faults on hugetlbfs and shared memory.
        WP_HUGETLBFS_SHMEM = abi::UFFD_FEATURE_WP_HUGETLBFS_SHMEM, since 5, 19;
        /// Write protection covers absent pages too.
        WP_UNPOPULATED = abi::UFFD_FEATURE_WP_UNPOPULATED, since 6, 4;
        /// `UFFDIO_POISON` exists; the bit announces it and need not be requested.
        POISON = abi::UFFD_FEATURE_POISON, since 6, 6;
        /// Write-protect faults resolve themselves and leave a trace for `PAGEMAP_SCAN`.
        WP_ASYNC = abi::UFFD_FEATURE_WP_ASYNC, since 6, 7;
        /// `UFFDIO_MOVE` exists; the bit announces it and need not be requested.
        MOVE = abi::UFFD_FEATURE_MOVE, since 6, 8;
    }
}

bit_set! {
    /// The ioctls of a userfaultfd, as reported by `UFFDIO_API` and `UFFDIO_REGISTER`.
    Ioctls {
        /// Start reporting faults of a range.
        REGISTER = 1 << abi::_UFFDIO_REGISTER, since 4, 3;
        /// Stop reporting faults; absent pages are zero from then on.
        UNREGISTER = 1 << abi::_UFFDIO_UNREGISTER, since 4, 3;
        /// Make the threads that wait in a range retry.
        WAKE = 1 << abi::_UFFDIO_WAKE, since 4, 3;
        /// Install pages with content.
        COPY = 1 << abi::_UFFDIO_COPY, since 4, 3;
        /// Install zero pages.
        ZEROPAGE = 1 << abi::_UFFDIO_ZEROPAGE, since 4, 3;
        /// Install pages by moving them from other memory of the process.
        MOVE = 1 << abi::_UFFDIO_MOVE, since 6, 8;
        /// Set or clear write protection.
        WRITEPROTECT = 1 << abi::_UFFDIO_WRITEPROTECT, since 5, 7;
        /// Install pages that are already in the file behind a mapping.
        CONTINUE = 1 << abi::_UFFDIO_CONTINUE, since 5, 13;
        /// Make pages raise SIGBUS.
        POISON = 1 << abi::_UFFDIO_POISON, since 6, 6;
        /// Negotiate features.
        API = 1 << abi::_UFFDIO_API, since 4, 3;
    }
}

impl Features {
    /// The features that [`OpenOptions`](super::OpenOptions) requires by default: without them, a
    /// page that the owner discarded, moved or unmapped would be filled with old data.
    pub const EVENTS: Self = Self::EVENT_REMOVE
        .union(Self::EVENT_REMAP)
        .union(Self::EVENT_UNMAP);
}

/// A mask that hides features of the running kernel, so that fallbacks can be tested on a kernel
/// that has them.
///
/// A hidden feature is neither seen as available nor requested. A hidden ioctl is missing from what
/// [`register`](super::Userfaultfd::register) returns, and fails as it does on a kernel that
/// doesn't know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Features to hide.
    pub features: Features,
    /// Ioctls to hide.
    pub ioctls: Ioctls,
    /// The kernel version to assume instead of the running kernel's.
    pub kernel: Option<KernelVersion>,
}

impl Mask {
    /// The mask that hides nothing.
    pub const NONE: Self = Self {
        features: Features::EMPTY,
        ioctls: Ioctls::EMPTY,
        kernel: None,
    };

    /// Hides everything that was introduced after `version`.
    pub fn kernel(version: KernelVersion) -> Self {
        Self {
            features: Features::newer_than(version),
            ioctls: Ioctls::newer_than(version),
            kernel: Some(version),
        }
    }

    /// Also hides these features, and the ioctls that exist only with them.
    #[must_use]
    pub fn hiding(mut self, features: Features) -> Self {
        self.features |= features;
        if features.contains(Features::POISON) {
            self.ioctls |= Ioctls::POISON;
        }
        if features.contains(Features::MOVE) {
            self.ioctls |= Ioctls::MOVE;
        }
        if features.contains(Features::MINOR_SHMEM | Features::MINOR_HUGETLBFS) {
            self.ioctls |= Ioctls::CONTINUE;
        }
        self
    }
}
