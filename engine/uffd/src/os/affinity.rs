//! Serves a thread on its own core.
//!
//! Waking a thread on another, idle core costs 45-60 us in a virtual machine, and an idle core is
//! where the scheduler puts a fault thread. On the core of the faulting thread, which stops there
//! anyway, it runs after 6 us. The core of a thread is unknown unless the thread may run on only
//! one, like the virtual CPUs of many VMMs: then a fault thread moves there as long as consecutive
//! faults come from that thread.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Number of consecutive faults of one thread before it is followed: a move costs as much as some
/// faults.
const BEFORE_FOLLOWING: u32 = 4;
/// Number of faults after which the cores of the thread are looked up again.
const POLL_INTERVAL: u32 = 256;

/// A follower that moves the calling thread to the core of the thread that it serves.
#[derive(Debug, Default)]
pub struct CoreFollower {
    thread: u32,
    faults: u32,
    /// The core to which the thread was moved, and the cores on which it may run otherwise.
    at: Option<(usize, CpuSet)>,
}

impl CoreFollower {
    /// Records that `thread`, given by its thread ID, has faulted and the caller is about to serve
    /// it. Occasionally costs two system calls; if they are not permitted, nothing moves. Returns
    /// `true` if the caller is now on the only core of `thread`.
    pub fn served(&mut self, thread: u32) -> bool {
        if thread != self.thread {
            self.thread = thread;
            self.faults = 0;
            self.go_home();
        }
        self.faults += 1;
        if self.faults == BEFORE_FOLLOWING || self.faults.is_multiple_of(POLL_INTERVAL) {
            self.follow();
        }
        self.at.is_some()
    }

    fn follow(&mut self) {
        let core = only_core(self.thread);
        if core == self.at.map(|(at, _)| at) {
            return;
        }
        self.go_home();
        // If this thread is bound to some cores, that was intended.
        if let Some(core) = core
            && let Ok(home) = sched_getaffinity(Pid::from_raw(0))
            && home.is_set(core) == Ok(true)
            && bind(&[core])
        {
            self.at = Some((core, home));
        }
    }

    fn go_home(&mut self) {
        if let Some((_, home)) = self.at
            && sched_setaffinity(Pid::from_raw(0), &home).is_ok()
        {
            self.at = None;
        }
    }
}

/// Moves the thread back: what it does afterwards is not for the thread that it served.
impl Drop for CoreFollower {
    fn drop(&mut self) {
        self.go_home();
    }
}

/// Returns the only core on which a thread may run. Returns `None` for a real-time thread: nobody
/// else runs on its core while it does, and it may be waiting in a loop for a thread whose fault
/// nobody would then read.
fn only_core(thread: u32) -> Option<usize> {
    let thread = i32::try_from(thread).ok().filter(|id| *id > 0)?;
    // SAFETY: the system call takes and returns numbers.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&policy) {
        return None;
    }
    let cores = sched_getaffinity(Pid::from_raw(thread)).ok()?;
    let mut set = (0..CpuSet::count()).filter(|core| cores.is_set(*core) == Ok(true));
    let first = set.next()?;
    set.next().is_none().then_some(first)
}

/// Restricts the calling thread to `cores`.
fn bind(cores: &[usize]) -> bool {
    let mut set = CpuSet::new();
    cores.iter().all(|core| set.set(*core).is_ok())
        && sched_setaffinity(Pid::from_raw(0), &set).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn cores() -> Vec<usize> {
        let mine = sched_getaffinity(Pid::from_raw(0)).unwrap();
        (0..CpuSet::count())
            .filter(|core| mine.is_set(*core) == Ok(true))
            .collect()
    }

    /// Starts a thread that may run only on `cores` and waits. Returns its ID.
    fn waiting_on(cores: Vec<usize>) -> (u32, impl FnOnce()) {
        let (tell, told) = channel();
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::spawn(move || {
            assert!(bind(&cores));
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = stopped.recv();
        });
        let id = u32::try_from(told.recv().unwrap()).unwrap();
        let end = move || {
            drop(stop);
            thread.join().unwrap();
        };
        (id, end)
    }

    #[test]
    fn bound_thread_is_followed_after_some_faults() {
        let all = cores();
        let (bound, end_bound) = waiting_on(vec![all[0]]);
        let (free, end_free) = waiting_on(all.clone());
        let mut follower = CoreFollower::default();
        for _ in 1..BEFORE_FOLLOWING {
            follower.served(bound);
            assert_eq!(cores(), all);
        }
        follower.served(bound);
        assert_eq!(cores(), [all[0]]);
        follower.served(free);
        assert_eq!(cores(), all);
        for _ in 0..2 * BEFORE_FOLLOWING {
            follower.served(free);
        }
        // On a machine with one core, it is bound to that core anyway.
        assert_eq!(cores(), all);
        for _ in 0..BEFORE_FOLLOWING {
            follower.served(bound);
        }
        assert_eq!(cores(), [all[0]]);
        drop(follower);
        assert_eq!(cores(), all, "after its work it goes where it was");
        end_bound();
        end_free();
    }

    #[test]
    fn thread_bound_elsewhere_stays() {
        let all = cores();
        let [first, .., last] = all[..] else {
            let test = "thread_bound_elsewhere_stays";
            return snaprestore_fixtures::host::skipped(test, &"it needs two cores");
        };
        let (bound, end) = waiting_on(vec![first]);
        assert!(bind(&[last]));
        let mut follower = CoreFollower::default();
        for _ in 0..POLL_INTERVAL {
            follower.served(bound);
        }
        assert_eq!(cores(), [last]);
        assert!(bind(&all));
        end();
    }
}
