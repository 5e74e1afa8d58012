//! What the engine's threads need of the system: no signals, a policy and cores of their own, and
//! reads that fail in place of killing.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// All signals of the calling thread are blocked until this is dropped; threads started meanwhile
/// inherit that and keep it.
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
        // SAFETY: both pointers are to live, writable sigset_t; sigfillset initialises the first
        // before it is read, and pthread_sigmask initialises the second when it returns 0, which is
        // checked before it is taken.
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
        // SAFETY: `before` is the initialised mask that this thread had; it can't have changed
        // threads. The call fails for a bad first argument only.
        unsafe {
            libc::pthread_sigmask(
                libc::SIG_SETMASK,
                &raw const self.before,
                std::ptr::null_mut(),
            )
        };
    }
}

/// Undoes what the calling thread inherited from the one that created it: a real-time policy, and
/// cores that are fewer than those of the main thread.
///
/// A thread that decodes under `SCHED_FIFO` stops everybody else on its core, and one that is bound
/// to the core of a thread that waits for it, and spins, never runs. What is not permitted stays as
/// it is.
pub fn leave_creator() {
    // SAFETY: a system call that takes and returns numbers.
    let policy = unsafe { libc::sched_getscheduler(0) };
    // SCHED_RESET_ON_FORK is reported as a flag, and has acted already.
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

/// Returns freed memory to the system, which the C library may keep for use by threads to come.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer, and any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
