//! The platform on the model: every operation stops first, so that the explorer can run another
//! thread before it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use super::explore::{self, Thread};
use super::pages::Pages;
use super::scenario::{Expected, Owner};
use super::world::{BASE, Content as Held, World, at};
use crate::session::Session;
use crate::session::platform::{Event, FrameId, Installed, PAGE, Platform, ReadFailed, Waited};

/// An operation before which a thread stops.
#[derive(Clone, Copy, Debug, PartialEq, Hash)]
pub(super) enum Op {
    Shared(u64),
    Exclusive(u64),
    WaitReadable,
    WaitInFlight(FrameId),
    BackOff,
    Copy(u64, u64),
    Zeropage(u64, u64),
    /// Between an install's first check for a change and taking the kernel's lock.
    Lock,
    Wake(u64, u64),
    Unregister(u64, u64),
    Poison(u64, u64),
    /// Between the wake-up of the sleepers in a range and the end of its registration.
    Unregistered(u64, u64),
    Probe,
    /// Waits until all faults that are served together are being served.
    Together,
    /// Gives the session up.
    End,
    /// Waits until the session's threads have returned.
    Join,
    Close,
    MapAfresh,
    /// After an install, before its pages are marked.
    Mark,
    Touch(u64),
    Sleep,
    BeginChange,
    Announce,
    WaitRead,
    Resume,
}

/// A mistake planted in the platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mistake {
    /// The install lock excludes nobody.
    NoInstallLock,
    /// A fault on a present page is answered with WAKE alone.
    WakeForPresent,
    /// An install that returned EAGAIN counts as done.
    EagainDropped,
    /// Sleepers where nothing is mapped any more are not woken, neither by UNMAP and REMAP nor when
    /// an install notices it.
    NoWakeAfterUnmap,
    /// Pages are marked present before the COPY.
    PresentBeforeCopy,
    /// Faults of a batch are served before its events are recorded.
    RemoveAfterFaults,
    /// Pages that are missing in the end are made inaccessible by their address.
    ProtectByAddress,
    /// A COPY that is cut short counts as one page longer than it was.
    CutMarksOneMore,
    /// Nobody is woken after a range was unregistered.
    NoWakeAfterUnregister,
}

/// The kernel model as the session's platform.
pub(super) struct Model {
    pub(super) world: RefCell<World>,
    threads: Rc<[Thread<Op>]>,
    /// The running thread; each thread sets it after every stop.
    current: Cell<usize>,
    mistake: Option<Mistake>,
    /// Whether a change may begin between an install's first check for one and taking the kernel's
    /// lock.
    two_checks: bool,
    /// Whether the last install of the running thread returned EAGAIN.
    again: Cell<bool>,
    /// Number of session threads that have not returned.
    pub(super) serving: Cell<usize>,
    /// Number of faults that were taken, in scenarios that serve some faults only together.
    pub(super) taken: Cell<usize>,
    session: Cell<*const Session<Self, Pages>>,
}

// SAFETY: the session requires a platform that threads can share. Here all threads are coroutines
// of one thread, which runs one at a time.
#[expect(unsafe_code)]
unsafe impl Sync for Model {}

impl Model {
    pub(super) fn new(
        world: World,
        threads: Rc<[Thread<Op>]>,
        mistake: Option<Mistake>,
        two_checks: bool,
    ) -> Self {
        Self {
            world: RefCell::new(world),
            threads,
            current: Cell::new(0),
            mistake,
            two_checks,
            again: Cell::new(false),
            serving: Cell::new(0),
            taken: Cell::new(0),
            session: Cell::new(std::ptr::null()),
        }
    }

    /// Records that a thread of the session starts.
    pub(super) fn enter(&self, thread: usize) {
        self.current.set(thread);
    }

    /// Sets the session that runs on this model.
    pub(super) fn watch(&self, session: &Session<Self, Pages>) {
        self.session.set(session);
    }

    /// Returns the session that runs on this model.
    #[expect(unsafe_code)]
    fn session(&self) -> &Session<Self, Pages> {
        // SAFETY: `watch` set the pointer before any thread started, to the session that owns this
        // model and doesn't move.
        unsafe { &*self.session.get() }
    }

    /// Records that a thread of the session has returned.
    pub(super) fn leave(&self) {
        self.serving.set(self.serving.get() - 1);
    }

    /// Closes the userfaultfd.
    pub(super) fn close(&self) {
        self.stop(Op::Close);
        self.world.borrow_mut().close();
    }

    pub(super) fn stop(&self, op: Op) {
        let current = self.current.get();
        self.threads[current].stop(op);
        self.current.set(current);
    }

    /// Returns the current thread, and what it was told so far.
    fn here(&self) -> (usize, u64) {
        let current = self.current.get();
        (current, self.threads[current].told())
    }

    fn is(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    fn choose(&self, n: usize) -> usize {
        let current = self.current.get();
        let chosen = self.threads[current].choose(n);
        self.current.set(current);
        chosen
    }

    fn told(&self, installed: Installed) -> Installed {
        self.threads[self.current.get()].tell(&installed);
        self.again.set(installed == Installed::Again);
        match installed {
            Installed::Again if self.is(Mistake::EagainDropped) => Installed::Done,
            Installed::Partial(done) if self.is(Mistake::CutMarksOneMore) => {
                Installed::Partial(done + PAGE)
            }
            other => other,
        }
    }

    /// Models the kernel's first check for a change: it checks once before it takes its lock, and
    /// once more after it has found the mapping. Returns `true` if there is a change now.
    fn early_check(&self) -> bool {
        let changing = self.world.borrow().is_changing();
        if self.two_checks && !changing {
            self.stop(Op::Lock);
        }
        changing
    }

    /// Performs the kernel's wake at the end of an install.
    fn wake_now(&self, address: u64, installed: Installed, len: u64) {
        let done = match installed {
            Installed::Done => len,
            Installed::Partial(done) => done,
            _ => return,
        };
        self.world.borrow_mut().wake(address, done);
    }

    fn out_of_memory(&self) -> bool {
        if self.world.borrow().shortages == 0 || self.choose(2) == 0 {
            return false;
        }
        // Another thread may have made the same choice meanwhile.
        let left = &mut self.world.borrow_mut().shortages;
        let short = *left > 0;
        *left = left.saturating_sub(1);
        short
    }
}

/// A hold of the install lock that ends when dropped.
pub(super) struct Hold<'a> {
    model: &'a Model,
    release: fn(&mut World),
    /// The thread, and what it had been told before the hold, if it keeps nothing of what it was
    /// told during the hold.
    forgets: Option<(usize, u64)>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        (self.release)(&mut self.model.world.borrow_mut());
        let again = self.model.again.take();
        if let Some((thread, told)) = self.forgets
            && (again || std::ptr::fn_addr_eq(self.release, RELEASE_EXCLUSIVE))
        {
            self.model.threads[thread].forget(told);
        }
    }
}

const RELEASE_EXCLUSIVE: fn(&mut World) = |world| world.exclusive = false;

impl Platform for Model {
    type Shared<'h>
        = Hold<'h>
    where
        Self: 'h;
    type Exclusive<'h>
        = Hold<'h>
    where
        Self: 'h;

    type Brake = ();

    fn shared(&self, about: u64) -> Self::Shared<'_> {
        // A hold that ends in EAGAIN is repeated from the same point.
        let forgets = Some(self.here());
        self.stop(Op::Shared(about));
        self.world.borrow_mut().shared += 1;
        Hold {
            model: self,
            release: |world| world.shared -= 1,
            forgets,
        }
    }

    fn exclusive(&self, about: u64) -> Self::Exclusive<'_> {
        // What is read goes into the shared state.
        let forgets = Some(self.here());
        self.stop(Op::Exclusive(about));
        if !self.is(Mistake::NoInstallLock) {
            self.world.borrow_mut().exclusive = true;
        }
        Hold {
            model: self,
            release: RELEASE_EXCLUSIVE,
            forgets,
        }
    }

    fn wait_readable(&self, timeout: Option<Duration>) -> Waited {
        assert_eq!(timeout, None, "nothing fails in the model");
        // Between two faults, a fault thread carries no state.
        self.threads[self.current.get()].forget(0);
        self.stop(Op::WaitReadable);
        let mut world = self.world.borrow_mut();
        (world.kicked, world.edge) = (false, false);
        Waited::Ready
    }

    fn kick(&self) {
        self.world.borrow_mut().kicked = true;
    }

    fn wait_in_flight(&self, frame: FrameId, _wait: impl FnOnce()) {
        self.stop(Op::WaitInFlight(frame));
    }

    fn back_off(&self, _: u32) -> bool {
        self.stop(Op::BackOff);
        true
    }

    fn brake(&self) {}

    /// Doesn't stop: whatever others can do between the start of the exclusive hold and the read,
    /// they could as well have done before it.
    fn read(&self, _: &mut Hold<'_>, record: &mut dyn FnMut(Event)) -> Result<usize, ReadFailed> {
        let thread = &self.threads[self.current.get()];
        let late = self.is(Mistake::RemoveAfterFaults);
        let mut events = Vec::new();
        let count = self
            .world
            .borrow_mut()
            .read(late, &mut |event| events.push(event));
        for event in events {
            thread.tell(&format!("{event:?}"));
            record(event);
        }
        Ok(count)
    }

    fn unrecorded(&self, _: &mut Hold<'_>, _: &mut dyn FnMut(usize, Event)) {}

    fn forget(&self, _: &mut Hold<'_>) {}

    fn wake_all(&self) {}

    fn copy(&self, address: u64, bytes: &[u8]) -> Installed {
        let len = bytes.len() as u64;
        // The copied content was assembled before, from what was known then: threads that copy
        // different bytes are not in the same state.
        let page = snaprestore_uffd::to_usize(PAGE);
        let decided: Vec<u8> = bytes.chunks(page).map(|page| page[0]).collect();
        self.threads[self.current.get()].tell(&decided);
        if self.is(Mistake::PresentBeforeCopy) {
            let first = (address - BASE) / PAGE;
            self.session().state.mark_present(first..first + len / PAGE);
        }
        self.stop(Op::Copy(address, len));
        if self.out_of_memory() {
            return self.told(Installed::NoMemory);
        }
        let mut most = u64::MAX;
        if len > PAGE
            && !self.world.borrow().large
            && self.world.borrow().cuts > 0
            && self.choose(2) == 1
        {
            let left = &mut self.world.borrow_mut().cuts;
            most = if *left > 0 { 1 } else { u64::MAX };
            *left = left.saturating_sub(1);
        }
        if self.early_check() {
            return self.told(Installed::Again);
        }
        let page = |i: u64| Held::Byte(bytes[usize::try_from(i * PAGE).unwrap()]);
        let installed = self.world.borrow_mut().install(address, len, most, page);
        self.wake_now(address, installed, len);
        let reported = self.told(installed);
        let again = self.again.take();
        self.stop(Op::Mark);
        self.again.set(again);
        reported
    }

    fn zeropage(&self, address: u64, len: u64) -> Installed {
        self.stop(Op::Zeropage(address, len));
        if self.is(Mistake::WakeForPresent) {
            return self.told(Installed::Exists);
        }
        if self.early_check() {
            return self.told(Installed::Again);
        }
        if self.world.borrow().large {
            return self.told(Installed::Refused(libc::EINVAL));
        }
        let zero = |_| Held::Byte(0);
        let installed = self
            .world
            .borrow_mut()
            .install(address, len, u64::MAX, zero);
        self.wake_now(address, installed, len);
        self.told(installed)
    }

    fn poison(&self, address: u64, len: u64) -> Installed {
        self.stop(Op::Poison(address, len));
        if self.is(Mistake::ProtectByAddress) {
            self.world.borrow_mut().protect(address, len);
            return self.told(Installed::Done);
        }
        if self.early_check() {
            return self.told(Installed::Again);
        }
        let poison = |_| Held::Poison;
        let installed = self
            .world
            .borrow_mut()
            .install(address, len, u64::MAX, poison);
        self.wake_now(address, installed, len);
        self.told(installed)
    }

    fn unregister(&self, address: u64, len: u64) -> bool {
        self.stop(Op::Unregister(address, len));
        self.world.borrow_mut().wake(address, len);
        self.stop(Op::Unregistered(address, len));
        self.world.borrow_mut().unregister(address, len);
        true
    }

    fn is_changing(&self, _: u64) -> bool {
        self.stop(Op::Probe);
        let changing = self.world.borrow().is_changing();
        self.threads[self.current.get()].tell(&changing);
        changing
    }

    fn is_there(&self, address: u64) -> bool {
        let place = self.world.borrow().places.get(&address).copied();
        let there = matches!(place, Some(Held::Byte(_)));
        self.threads[self.current.get()].tell(&there);
        there
    }

    fn wake(&self, address: u64, len: u64) {
        if !self.world.borrow().exclusive {
            self.stop(Op::Wake(address, len));
        }
        let place = self.world.borrow().places.get(&address).copied();
        let unregistered = self.world.borrow().unregistered.contains(&address);
        if unregistered && self.is(Mistake::NoWakeAfterUnregister)
            || place.is_none() && self.is(Mistake::NoWakeAfterUnmap)
        {
            return;
        }
        self.world.borrow_mut().wake(address, len);
    }
}

/// Returns a digest of everything that the session's threads share.
fn shared_digest(session: &Session<Model, Pages>) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    session.state.snapshot().hash(&mut hasher);
    session.queue.addresses().hash(&mut hasher);
    session.in_flight.frames().hash(&mut hasher);
    session.phase_digest().hash(&mut hasher);
    hasher.finish()
}

/// The complete scene that the explorer sees.
pub(super) struct Scene {
    pub(super) session: Session<Model, Pages>,
    pub(super) owner: Owner,
    /// Number of owner threads, which come first.
    pub(super) owners: usize,
    /// Whether the session is given up in the end.
    pub(super) gives_up: bool,
    /// Number of faults that are served together.
    pub(super) together: usize,
}

impl Scene {
    /// Checks that pages that were missing at the close were not left to the kernel, which would
    /// make them zero.
    fn check_given_up(&self) -> Result<(), String> {
        let world = self.session.platform.world.borrow();
        if world.fresh.values().any(|content| *content == Held::Poison) {
            return Err("a fresh place became inaccessible".to_owned());
        }
        for (page, expected) in (0..).zip(&self.owner.borrow().0) {
            let content = world.places.get(&at(page));
            if *expected == Expected::Original && content == Some(&Held::Missing) {
                return Err(format!("page {page} would read as zeros"));
            }
        }
        Ok(())
    }
}

impl explore::Scene for Scene {
    type Op = Op;

    fn enabled(&self, thread: usize, op: &Op) -> bool {
        let model = &self.session.platform;
        let world = model.world.borrow();
        let unlocked = model.is(Mistake::NoInstallLock);
        match op {
            Op::Shared(_) => unlocked || !world.exclusive,
            Op::Exclusive(_) => unlocked || (!world.exclusive && world.shared == 0),
            // Messages that another thread has read by then don't end the wait.
            Op::WaitReadable => world.kicked || world.edge && world.readable(),
            Op::WaitInFlight(frame) => !self.session.in_flight.is_claimed(*frame),
            // Time passes until something has changed.
            Op::BackOff => world.readable() || !world.is_changing(),
            Op::Sleep => !world.sleeps(thread),
            Op::WaitRead => !world.announced(thread),
            Op::Together => model.taken.get() >= self.together,
            Op::Join => model.serving.get() == 0,
            _ => true,
        }
    }

    fn digest(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        self.session
            .platform
            .world
            .borrow()
            .digest()
            .hash(&mut hasher);
        shared_digest(&self.session).hash(&mut hasher);
        self.session.platform.serving.get().hash(&mut hasher);
        self.session.platform.taken.get().hash(&mut hasher);
        let owner = self.owner.borrow();
        (&owner.0, owner.1.len(), owner.2).hash(&mut hasher);
        hasher.finish()
    }

    fn check_end(&self, stuck: &[usize]) -> Result<(), String> {
        if let Some(wrong) = self.owner.borrow().1.first() {
            return Err(wrong.clone());
        }
        if let Some(thread) = stuck.iter().find(|thread| **thread < self.owners) {
            return Err(format!("hang: thread {thread} of the owner waits forever"));
        }
        if !stuck.is_empty() {
            return Err(format!(
                "hang: threads {stuck:?} of the session don't return"
            ));
        }
        if self.gives_up {
            self.check_given_up()?;
        }
        Ok(())
    }
}
