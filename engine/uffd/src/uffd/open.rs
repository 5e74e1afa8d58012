//! Ways to open a userfaultfd, and the negotiation of its features.
//!
//! `/dev/userfaultfd` (6.1) is tried first: a process that may open it also gets faults of the
//! kernel's own accesses. Then comes the system call, which the kernel permits to `CAP_SYS_PTRACE`,
//! to everybody if `vm.unprivileged_userfaultfd` is 1, and to everybody for faults of user code
//! only.
//!
//! `UFFDIO_API` can succeed only once per descriptor, and fails if a feature is unknown. Therefore
//! a first descriptor is queried without features for what is available, and closed, and a second
//! one enables what is both available and wanted.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::features::{Features, KernelVersion, Mask};
use super::userfaultfd::Userfaultfd;
use super::{abi, ioctls};

/// A way to open a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// The device of 6.1; its file permissions decide.
    Device,
    /// The system call; capabilities and `vm.unprivileged_userfaultfd` decide.
    Syscall,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "/dev/userfaultfd",
            Self::Syscall => "the userfaultfd system call",
        })
    }
}

/// A way that was tried, and the kernel's answer.
#[derive(Debug)]
pub struct AccessFailure {
    /// The way that was tried.
    pub access: Access,
    /// Whether only faults of user code were requested.
    pub user_mode_only: bool,
    /// The kernel's error.
    pub source: io::Error,
}

/// Whether a userfaultfd that doesn't see the kernel's own accesses is acceptable.
///
/// With such a userfaultfd, a system call or a virtual CPU that touches a missing page gets EFAULT
/// at once instead of the page. It suits only owners whose memory is touched by nothing but their
/// own instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UserModeOnly {
    /// Never.
    #[default]
    Never,
    /// Only if no other is permitted.
    IfNeeded,
    /// Always.
    Always,
}

/// The reason why there is no userfaultfd. Each message names the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The kernel lacks features that correctness depends on.
    #[error(
        "Linux {found} is too old: restoring lazily needs {needed} or later (events for discarded memory, repeated faults)"
    )]
    KernelTooOld {
        /// The running kernel.
        found: KernelVersion,
        /// The oldest suitable kernel.
        needed: KernelVersion,
    },
    /// This process is not permitted any way.
    #[error(
        "no permission to create a userfaultfd ({}). Any one of these grants it: access to /dev/userfaultfd (Linux 6.1 or later), \
         the capability CAP_SYS_PTRACE, sysctl vm.unprivileged_userfaultfd=1{}. In a container, the seccomp filter must allow userfaultfd",
        list(tried),
        if *user_mode_only_would_do { ", or, if only this process's own instructions touch the memory, user-mode-only faults" } else { "" }
    )]
    NotPermitted {
        /// The ways that were tried.
        tried: Vec<AccessFailure>,
        /// Whether faults of user code only would be permitted, but weren't requested.
        user_mode_only_would_do: bool,
    },
    /// The kernel was built without userfaultfd, or a system call filter makes it appear so.
    #[error(
        "this kernel offers no userfaultfd ({}): it needs CONFIG_USERFAULTFD, and a seccomp filter that allows it",
        list(tried)
    )]
    NotSupported {
        /// The ways that were tried.
        tried: Vec<AccessFailure>,
    },
    /// A required feature is not available.
    #[error("this kernel lacks the userfaultfd features {missing} (it has: {available})")]
    MissingFeatures {
        /// Required features that are not available.
        missing: Features,
        /// Available features.
        available: Features,
    },
    /// Fork events were required without the capability.
    #[error("fork events need the capability CAP_SYS_PTRACE")]
    ForkEventsNotPermitted,
    /// Any other error, such as too many open files.
    #[error("cannot open a userfaultfd: {doing} failed")]
    Failed {
        /// The operation that failed.
        doing: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

fn list(tried: &[AccessFailure]) -> String {
    let one = |failure: &AccessFailure| {
        let narrowed = if failure.user_mode_only {
            " for user-mode faults"
        } else {
            ""
        };
        format!("{}{narrowed}: {}", failure.access, failure.source)
    };
    tried.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Options for opening a userfaultfd. [`open`](Self::open) may be called any number of times.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    required: Features,
    wanted: Features,
    mask: Mask,
    user_mode_only: UserModeOnly,
    access: Option<Access>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            required: Features::EVENTS,
            wanted: Features::EMPTY,
            mask: Mask::NONE,
            user_mode_only: UserModeOnly::Never,
            access: None,
        }
    }
}

impl OpenOptions {
    /// Returns options that require [`Features::EVENTS`] and want nothing more.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the features without which opening fails.
    #[must_use]
    pub fn required(mut self, features: Features) -> Self {
        self.required = features;
        self
    }

    /// Replaces the features that are enabled if they exist and are permitted.
    #[must_use]
    pub fn wanted(mut self, features: Features) -> Self {
        self.wanted = features;
        self
    }

    /// Hides features of the kernel.
    #[must_use]
    pub fn mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// Sets whether user-mode-only faults are acceptable.
    #[must_use]
    pub fn user_mode_only(mut self, user_mode_only: UserModeOnly) -> Self {
        self.user_mode_only = user_mode_only;
        self
    }

    /// Tries only this way.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = Some(access);
        self
    }

    /// Opens a userfaultfd for this process's memory, close-on-exec and non-blocking, with no
    /// memory registered.
    pub fn open(&self) -> Result<Userfaultfd, OpenError> {
        let found = self.mask.kernel.or_else(KernelVersion::running);
        if let Some(found) = found.filter(|found| *found < KernelVersion::MINIMUM) {
            return Err(OpenError::KernelTooOld {
                found,
                needed: KernelVersion::MINIMUM,
            });
        }
        let (first, way) = self.first_descriptor()?;
        let answer = negotiate(&first, Features::EMPTY)
            .map_err(|errno| failed("asking for its features (UFFDIO_API)", errno))?;
        drop(first);
        let available = Features::from_bits(answer.features).without(self.mask.features);
        let missing = self.required.without(available);
        if !missing.is_empty() {
            return Err(OpenError::MissingFeatures { missing, available });
        }

        let fd = new_descriptor(way.access, way.user_mode_only)
            .map_err(|errno| failed("opening it a second time", errno))?;
        let mut enabled = (self.required | self.wanted) & available;
        let mut result = negotiate(&fd, enabled);
        if matches!(result, Err(Errno::EPERM)) && enabled.contains(Features::EVENT_FORK) {
            if self.required.contains(Features::EVENT_FORK) {
                return Err(OpenError::ForkEventsNotPermitted);
            }
            // After a refusal, the kernel permits another request on the same descriptor.
            enabled = enabled.without(Features::EVENT_FORK);
            result = negotiate(&fd, enabled);
        }
        result.map_err(|errno| failed("enabling its features (UFFDIO_API)", errno))?;
        Ok(Userfaultfd::of_this_process(
            fd,
            enabled,
            available,
            self.mask.ioctls,
            way.user_mode_only,
        ))
    }

    fn first_descriptor(&self) -> Result<(OwnedFd, Way), OpenError> {
        let mut tried = Vec::new();
        for way in self.ways() {
            match new_descriptor(way.access, way.user_mode_only) {
                Ok(fd) => return Ok((fd, way)),
                Err(errno @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)) => {
                    return Err(failed("making the descriptor", errno));
                }
                Err(errno) => tried.push(AccessFailure {
                    access: way.access,
                    user_mode_only: way.user_mode_only,
                    source: errno.into(),
                }),
            }
        }
        let forbidden = |failure: &AccessFailure| {
            matches!(
                failure.source.raw_os_error(),
                Some(libc::EPERM | libc::EACCES)
            )
        };
        if tried.iter().any(forbidden) {
            let user_mode_only_would_do = self.user_mode_only == UserModeOnly::Never
                && new_descriptor(Access::Syscall, true).is_ok();
            return Err(OpenError::NotPermitted {
                tried,
                user_mode_only_would_do,
            });
        }
        Err(OpenError::NotSupported { tried })
    }

    fn ways(&self) -> impl Iterator<Item = Way> {
        let widths: &[bool] = match self.user_mode_only {
            UserModeOnly::Never => &[false],
            UserModeOnly::IfNeeded => &[false, true],
            UserModeOnly::Always => &[true],
        };
        let accesses: Vec<Access> = match self.access {
            Some(access) => vec![access],
            None => vec![Access::Device, Access::Syscall],
        };
        widths.iter().flat_map(move |&user_mode_only| {
            accesses.clone().into_iter().map(move |access| Way {
                access,
                user_mode_only,
            })
        })
    }
}

#[derive(Clone, Copy)]
struct Way {
    access: Access,
    user_mode_only: bool,
}

fn failed(doing: &'static str, errno: Errno) -> OpenError {
    OpenError::Failed {
        doing,
        source: errno.into(),
    }
}

/// Creates a userfaultfd before `UFFDIO_API`, which can do nothing yet.
pub(super) fn new_descriptor(access: Access, user_mode_only: bool) -> Result<OwnedFd, Errno> {
    let user_mode_only = if user_mode_only {
        abi::UFFD_USER_MODE_ONLY
    } else {
        0
    };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | user_mode_only;
    let number = match access {
        Access::Device => {
            let device = std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/userfaultfd")
                .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
            // SAFETY: USERFAULTFD_IOC_NEW takes its argument as a number and no pointer; the device
            // stays open during the call. If the file is something else, the kernel returns ENOTTY.
            unsafe { ioctls::userfaultfd_new(device.as_raw_fd(), flags)? }
        }
        // SAFETY: userfaultfd(2) takes a number and no pointer.
        Access::Syscall => unsafe {
            let number = Errno::result(libc::syscall(libc::SYS_userfaultfd, flags))?;
            libc::c_int::try_from(number).map_err(|_| Errno::EBADF)?
        },
    };
    // SAFETY: on success both calls return a new descriptor that nobody else in this process knows,
    // so only its OwnedFd closes it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Calls `UFFDIO_API` with these features. The features in the result are all that the kernel has.
pub(super) fn negotiate(fd: &OwnedFd, features: Features) -> Result<abi::uffdio_api, Errno> {
    let mut api = abi::uffdio_api {
        api: abi::UFFD_API,
        features: features.bits(),
        ioctls: 0,
    };
    // SAFETY: `api` is a live uffdio_api, whose size the request number encodes, and exclusively
    // ours during the call.
    unsafe { ioctls::api(fd.as_raw_fd(), &raw mut api)? };
    Ok(api)
}
