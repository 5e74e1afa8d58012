//! Attributes of the engine's threads: blocked signals, and a scheduling policy and cores that are
//! not those of the creator. Also returns freed memory to the system.

use std::io;
use std::marker::PhantomData;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::unistd::Pid;

/// A guard that changes the signal mask of the calling thread until dropped.
#[derive(Debug)]
pub(crate) struct SignalMask {
    before: SigSet,
    // The mask belongs to one thread, so the value must be dropped there.
    not_send: PhantomData<*const ()>,
}

impl SignalMask {
    /// Changes the mask of the calling thread.
    pub(crate) fn change(how: SigmaskHow, signals: &SigSet) -> io::Result<Self> {
        Ok(Self {
            before: signals.thread_swap_mask(how)?,
            not_send: PhantomData,
        })
    }
}

impl Drop for SignalMask {
    fn drop(&mut self) {
        // Fails only for an unknown `how`.
        let _ = self.before.thread_set_mask();
    }
}

/// A guard that blocks all signals of the calling thread until dropped; threads started meanwhile
/// inherit the mask and keep it.
///
/// The kernel still delivers SIGKILL, SIGSTOP, and the signals that a thread's own instructions
/// cause.
#[derive(Debug)]
pub struct SignalsBlocked {
    _mask: SignalMask,
}

impl SignalsBlocked {
    /// Blocks all signals of the calling thread.
    pub fn now() -> io::Result<Self> {
        let mask = SignalMask::change(SigmaskHow::SIG_SETMASK, &SigSet::all())?;
        Ok(Self { _mask: mask })
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
