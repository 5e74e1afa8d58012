//! Attributes of the engine's threads: blocked signals, and a scheduling policy and cores that are
//! not those of the creator. Also returns freed memory to the system.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// A guard that blocks all signals of the calling thread until dropped; threads started meanwhile
/// inherit the mask and keep it.
///
/// The kernel still delivers SIGKILL, SIGSTOP, and the signals that a thread's own instructions
/// cause.
#[derive(Debug)]
pub struct SignalsBlocked {
    before: libc::sigset_t,
    // The mask belongs to one thread, so the value must be dropped there.
    not_send: PhantomData<*const ()>,
}

impl SignalsBlocked {
    /// Blocks all signals of the calling thread.
    pub fn now() -> io::Result<Self> {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both pointers are to live, writable sigset_t. sigfillset initialises the first
        // before it is read. pthread_sigmask initialises the second when it returns 0, which is
        // checked before it is used.
        let before = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            match libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) {
                0 => before.assume_init(),
                errno => return Err(io::Error::from_raw_os_error(errno)),
            }
        };
        Ok(Self {
            before,
            not_send: PhantomData,
        })
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: `before` is the initialised mask of this thread, and can't have moved to another
        // thread. The call fails only for a bad first argument.
        unsafe {
            libc::pthread_sigmask(
                libc::SIG_SETMASK,
                &raw const self.before,
                std::ptr::null_mut(),
            )
        };
    }
}

/// Undoes what the calling thread inherited from its creator: a real-time policy, and an affinity
/// smaller than the main thread's.
///
/// A thread that decodes under `SCHED_FIFO` stops all others on its core, and a thread bound to the
/// core of one that waits for it, and spins, never runs. If a change is not permitted, the
/// attribute stays as it is.
pub fn leave_creator() {
    // SAFETY: the system call takes and returns numbers.
    let policy = unsafe { libc::sched_getscheduler(0) };
    // SCHED_RESET_ON_FORK is reported as a flag, and has already taken effect.
    let real_time = [libc::SCHED_FIFO, libc::SCHED_RR].contains(&policy);
    if real_time {
        let normal = libc::sched_param { sched_priority: 0 };
        // SAFETY: the pointer is to a live sched_param, which the kernel reads.
        let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const normal) };
        if let Err(error) = Errno::result(set) {
            tracing::debug!(%error, "leaving the real-time policy of the creating thread");
        }
    }
    let (Ok(main), Ok(mine)) = (
        sched_getaffinity(Pid::this()),
        sched_getaffinity(Pid::from_raw(0)),
    ) else {
        return;
    };
    let mut both = CpuSet::new();
    for core in 0..CpuSet::count() {
        let is_in = |set: &CpuSet| set.is_set(core) == Ok(true);
        if is_in(&main) || is_in(&mine) {
            // The number is within the set.
            let _ = both.set(core);
        }
    }
    if both != mine
        && let Err(error) = sched_setaffinity(Pid::from_raw(0), &both)
    {
        tracing::debug!(%error, "leaving the cores of the creating thread");
    }
}

/// Returns freed memory to the system, which the C library might otherwise keep for future threads.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes no pointer, and any thread may make it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
