//! Model checker: runs the session in every interleaving on a model of the kernel.
//!
//! Each scenario has threads of the owner, which touch, discard, unmap and move pages and know what
//! they must read, and threads of the session: fault threads, a prefetcher, and one that gives the
//! session up. The correct code passes in every interleaving. Each mistake planted in the platform
//! below it makes some interleaving fail.

mod explore;

mod pages;
mod platform;
mod world;

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use explore::{Body, Explored, Setup, Thread, explore};
use pages::Pages;
use platform::{Mistake, Model, Scene};
use world::{Change, Content, Unmapped, World, at};

use crate::session::Session;
use crate::session::failure::{Failure, FailureKind};
use crate::session::fault::context::{LendContext, ThreadContext};
use crate::session::fault::outcome::Decision;
use crate::session::fault::queue::Fault;
use crate::session::guard::Guard;
use crate::session::platform::{PAGE, PageNumber};
use crate::session::state::State;
use crate::session::state::address_map::Extent;
use platform::Op;

/// Number of pages in the model's snapshot: two frames of two pages.
const PAGES: u64 = 4;

/// An action of a thread of the owner.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Read the page at this place. The page must have its content, or be zero if it was discarded.
    Touch(u64),
    /// Discard the pages in a range of places.
    Discard(u64, u64),
    /// Unmap a range of places.
    Unmap(u64, u64),
    /// Move one place to another, where the same content is expected.
    Move(u64, u64),
    /// Read a place that another thread may unmap or move away.
    TouchIfMapped(u64),
    /// Write to this place, which must then keep the written content.
    Write(u64, u8),
    /// Map something else at this place, if nothing is mapped there. Its content must stay
    /// unchanged.
    MapAfresh(u64),
}

/// The content of new mappings.
const FRESH: u8 = 77;

/// A scenario to run.
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent switches of a test"
)]
struct Scenario {
    owner: &'static [&'static [Act]],
    fault_threads: usize,
    prefetchers: usize,
    /// Pages that are prefetched.
    prefetched: Range<u64>,
    mistake: Option<Mistake>,
    /// Pages whose discard was lost: they are marked present, and are missing.
    lost: &'static [u64],
    /// Whether those pages are counted twice.
    miscounted: bool,
    /// Numbers of COPY calls that may be cut short, and of installs that may find no memory.
    cuts: u32,
    shortages: u32,
    /// Whether time passes between the start of a change and its event.
    slow: bool,
    /// Whether a change may begin between an install's first check for one and the kernel's lock.
    two_checks: bool,
    /// Whether fault threads run on the core of the thread that they serve, and so wake it after
    /// they have released the lock.
    same_core: bool,
    /// Whether nobody ends the session, so that it must complete by itself.
    completes: bool,
    /// Whether the memory has large pages, of two pages each.
    large: bool,
    /// Whether a thread gives the session up, at any time.
    gives_up: bool,
    /// The damaged frame.
    damaged: Option<u64>,
    /// Number of faults that are served together: none is served before this many were taken, as
    /// with a store that answers the first read after the last.
    together: usize,
    /// The place of a discarded page that a session thread fills with zeros, for a reader.
    zeroed: Option<u64>,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            owner: &[],
            fault_threads: 1,
            prefetchers: 0,
            prefetched: 0..PAGES,
            mistake: None,
            lost: &[],
            miscounted: false,
            cuts: 0,
            shortages: 0,
            slow: false,
            two_checks: false,
            same_core: false,
            completes: false,
            large: false,
            gives_up: false,
            damaged: None,
            together: 0,
            zeroed: None,
        }
    }
}

/// The owner's knowledge of a page.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Expected {
    /// The page has its original content.
    Original,
    /// A discard has begun, so the page may have its original content or be zero.
    Discarding,
    /// The page was discarded.
    Zero,
    /// The page was written after its discard.
    Written(u8),
}

impl Expected {
    /// Whether the page of `place`, which may be lost, may read as `content`.
    fn allows(self, place: u64, content: Content, may_be_lost: bool) -> bool {
        let original = content == Content::Byte(pages::content_of(place))
            || may_be_lost && content == Content::Poison;
        match self {
            Self::Original => original,
            Self::Discarding => original || content == Content::Byte(0),
            Self::Zero => content == Content::Byte(0),
            Self::Written(byte) => content == Content::Byte(byte),
        }
    }
}

/// A guard that poisons the pages of the damaged frame. Nothing else fails in these scenarios.
struct OnlyDamage;

impl Guard for OnlyDamage {
    fn decide(&self, _: Fault, failure: &Failure) -> Decision {
        assert_eq!(failure.kind, FailureKind::Damaged, "{failure}");
        Decision::Poison
    }
    fn pending_decision(&self, _: Fault, _: PageNumber) -> Option<Decision> {
        None
    }
    fn kill_owner(&self, why: &str) {
        panic!("{why}")
    }
}

/// A context source with one context for each thread.
struct OwnContext {
    scene: Rc<Scene>,
    context: RefCell<ThreadContext<Pages>>,
}

impl LendContext<Pages> for OwnContext {
    fn with<T>(&self, work: impl FnOnce(&mut ThreadContext<Pages>) -> T) -> T {
        if self.scene.together > 0 {
            let model = &self.scene.session.platform;
            model.taken.set(model.taken.get() + 1);
            model.stop(Op::Together);
        }
        work(&mut self.context.borrow_mut())
    }
}

type Owner = RefCell<(Vec<Expected>, Vec<String>, usize)>;

impl Scenario {
    fn explore(&self) -> Explored {
        explore(|| self.setup())
    }

    #[expect(
        clippy::too_many_lines,
        reason = "one scene, set up from top to bottom"
    )]
    fn setup(&self) -> Setup<Scene> {
        let readers = usize::from(self.zeroed.is_some());
        let serving = self.fault_threads + self.prefetchers + readers;
        let served = self.owner.len() + serving;
        let count = served + usize::from(self.gives_up);
        let threads: Rc<[Thread<Op>]> = (0..count).map(|_| Thread::new()).collect();
        let mut world = World {
            cuts: self.cuts,
            shortages: self.shortages,
            large: self.large,
            ..World::default()
        };
        for place in 0..PAGES {
            world.places.insert(at(place), Content::Missing);
        }
        let extent = Extent {
            address: at(0),
            pages: PAGES,
            first_page: 0,
            large: self.large,
        };
        let (state, _) = State::new(PAGES, &[extent], 8).unwrap();
        for page in self.lost {
            state.mark_present(*page..page + 1);
            if self.miscounted {
                state.leave_to_kernel(*page..page + 1);
            }
        }
        let expected = (0..PAGES)
            .map(|page| {
                if self.lost.contains(&page) {
                    Expected::Zero
                } else {
                    Expected::Original
                }
            })
            .collect();
        let model = Model::new(
            world,
            Rc::clone(&threads),
            self.mistake,
            self.two_checks,
            self.same_core,
        );
        let pages = Pages {
            damaged: self.damaged,
        };
        let scene = Rc::new(Scene {
            session: Session::new(model, pages, state, Box::new(OnlyDamage), None, 4),
            owner: RefCell::new((expected, Vec::new(), self.owner.len())),
            owners: self.owner.len(),
            gives_up: self.gives_up,
            together: self.together,
        });
        scene.session.platform.watch(&scene.session);
        scene.session.platform.serving.set(serving);
        let mut bodies: Vec<Body> = Vec::new();
        for (thread, acts) in self.owner.iter().copied().enumerate() {
            let (scene, threads) = (Rc::clone(&scene), Rc::clone(&threads));
            let (slow, ends) = (self.slow, !self.completes && !self.gives_up);
            bodies.push(Box::new(move || {
                for (i, act) in (0..).zip(acts) {
                    threads[thread].forget(i);
                    owner_acts(&scene, &threads[thread], thread, *act, slow);
                }
                let mut owner = scene.owner.borrow_mut();
                owner.2 -= 1;
                if owner.2 == 0 && ends {
                    scene.session.end();
                }
            }));
        }
        for i in 0..serving {
            let (scene, thread) = (Rc::clone(&scene), self.owner.len() + i);
            let is_fault_thread = i < self.fault_threads;
            let zeroed = self.zeroed.filter(|_| i + 1 == serving);
            let prefetched = self.prefetched.clone();
            bodies.push(Box::new(move || {
                let session = &scene.session;
                let own = OwnContext {
                    scene: Rc::clone(&scene),
                    context: RefCell::new(ThreadContext::new(Vec::new())),
                };
                session.platform.enter(thread);
                if is_fault_thread {
                    session.serve(0, &own);
                } else if let Some(place) = zeroed {
                    session.zero_for_reader(at(place));
                } else {
                    let context = &mut own.context.borrow_mut();
                    let _ = session.prefetch(context, prefetched, false, || ());
                }
                session.platform.leave();
            }));
        }
        if self.gives_up {
            let scene = Rc::clone(&scene);
            bodies.push(Box::new(move || {
                let session = &scene.session;
                session.platform.enter(served);
                session.platform.stop(Op::End);
                session.end();
                session.platform.stop(Op::Join);
                session.give_up().expect("the model supports poison");
                session.platform.close();
            }));
        }
        Setup {
            scene,
            threads,
            bodies,
        }
    }

    /// Asserts that every interleaving is correct.
    #[expect(clippy::print_stdout, reason = "how much was tried")]
    fn passes(&self) {
        let explored = self.explore();
        println!("{} states, {} runs", explored.states, explored.runs);
        assert!(
            explored.violation.is_none(),
            "{}",
            explored.violation.unwrap()
        );
    }

    /// Asserts that some interleaving fails as described by `expected`.
    fn fails_with(&self, expected: &str) {
        let violation = self.explore().violation.expect("no interleaving failed");
        assert!(
            violation.contains(expected),
            "another violation: {violation}"
        );
    }
}

/// Performs one action of an owner's thread, operation by operation.
fn owner_acts(scene: &Scene, thread: &Thread<Op>, number: usize, act: Act, slow: bool) {
    let (model, owner) = (&scene.session.platform, &scene.owner);
    let may_be_lost = |page: u64| scene.gives_up || scene.session.image.is_damaged(page);
    let set = |places: std::ops::Range<u64>, to: Expected| {
        for place in places {
            owner.borrow_mut().0[usize::try_from(place).unwrap()] = to;
        }
    };
    let wrong = |what: String| owner.borrow_mut().1.push(what);
    let read = |place: u64| {
        thread.stop(Op::Touch(at(place)));
        loop {
            if let Some(found) = model.world.borrow_mut().touch(number, at(place)) {
                thread.tell(&found.is_ok());
                return found;
            }
            thread.stop(Op::Sleep);
        }
    };
    let change = |change: Change, before: &dyn Fn(), after: &dyn Fn()| {
        thread.stop(Op::BeginChange);
        if !model.world.borrow().is_registered(change) {
            before();
            after();
            return;
        }
        model.world.borrow_mut().begin_change();
        before();
        if slow {
            thread.stop(Op::Announce);
        }
        model.world.borrow_mut().announce(number, change);
        thread.stop(Op::WaitRead);
        model.world.borrow_mut().end_change();
        thread.stop(Op::Resume);
        after();
    };
    match act {
        Act::Touch(place) | Act::TouchIfMapped(place) => match read(place) {
            Ok(content) => {
                let expected = owner.borrow().0[usize::try_from(place).unwrap()];
                let right = expected.allows(place, content, may_be_lost(place));
                if !right {
                    wrong(format!(
                        "wrong byte: page {place} reads {content:?}, but it is {expected:?}"
                    ));
                }
            }
            Err(Unmapped) if matches!(act, Act::TouchIfMapped(_)) => {}
            Err(Unmapped) => wrong(format!("page {place} is not mapped")),
        },
        Act::Write(place, byte) => {
            if let Ok(Content::Byte(_)) = read(place) {
                model
                    .world
                    .borrow_mut()
                    .places
                    .insert(at(place), Content::Byte(byte));
                set(place..place + 1, Expected::Written(byte));
            }
        }
        Act::Discard(start, end) => change(
            Change::Remove(at(start), at(end)),
            &|| set(start..end, Expected::Discarding),
            &|| {
                model.world.borrow_mut().zap(at(start), at(end));
                set(start..end, Expected::Zero);
            },
        ),
        // The kernel first removes the mappings, and then sends the event.
        Act::Unmap(start, end) => change(
            Change::Unmap(at(start), at(end)),
            &|| model.world.borrow_mut().unmap(at(start), at(end)),
            &|| (),
        ),
        Act::MapAfresh(place) => {
            thread.stop(Op::MapAfresh);
            let mapped = model.world.borrow_mut().map_afresh(at(place), FRESH);
            thread.tell(&mapped);
            if mapped {
                match read(place) {
                    Ok(Content::Byte(FRESH)) => {}
                    found => wrong(format!("wrong byte: fresh place {place} reads {found:?}")),
                }
            }
        }
        Act::Move(from, to) => {
            change(
                Change::Remap(at(from), at(to), PAGE),
                &|| model.world.borrow_mut().remap(at(from), at(to), PAGE),
                &|| (),
            );
            let expected = Content::Byte(pages::content_of(from));
            match read(to) {
                Ok(content) if content == expected => {}
                Ok(Content::Poison) if may_be_lost(from) => {}
                found => wrong(format!("wrong byte: moved page {from} reads {found:?}")),
            }
        }
    }
}

use Act::{Discard, MapAfresh, Move, Touch, TouchIfMapped, Unmap, Write};

/// The second touch may come before, during or after the discard, and must read accordingly.
const TWO_AND_A_DISCARDER: &[&[Act]] = &[&[Touch(0)], &[Touch(2)], &[Discard(1, 3)]];

/// One frame at a time: with both frames there are ten times as many interleavings.
fn two_faulting_threads_a_prefetcher_and_a_discarder_of(prefetched: Range<u64>) {
    Scenario {
        owner: TWO_AND_A_DISCARDER,
        prefetchers: 1,
        prefetched,
        same_core: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn two_faulting_threads_a_prefetcher_and_a_discarder() {
    two_faulting_threads_a_prefetcher_and_a_discarder_of(2..4);
}

#[test]
fn two_faulting_threads_a_prefetcher_of_the_other_frame_and_a_discarder() {
    two_faulting_threads_a_prefetcher_and_a_discarder_of(0..2);
}

/// Both frames are prefetched, and one thread touches both.
#[test]
fn a_faulting_thread_a_prefetcher_of_two_frames_and_a_discarder() {
    Scenario {
        owner: &[&[Touch(0), Touch(2)], &[Discard(1, 3)]],
        prefetchers: 1,
        same_core: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn two_fault_threads_and_a_discarder() {
    Scenario {
        owner: &[&[Touch(0)], &[Touch(2)], &[Discard(0, 2)]],
        fault_threads: 2,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn copies_cut_short() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Touch(1)]],
        prefetchers: 1,
        cuts: 1,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: PAGES_BEHIND_THE_CUT,
        prefetchers: 1,
        cuts: 2,
        ..Scenario::default()
    }
    .passes();
}

/// The pages after the cut, of either frame, are touched as well: the session must not consider
/// them present.
const PAGES_BEHIND_THE_CUT: &[&[Act]] = &[&[Touch(0), Touch(1)], &[Touch(3)]];

#[test]
fn installs_without_memory() {
    Scenario {
        owner: &[&[Touch(0)], &[Touch(3)]],
        prefetchers: 1,
        shortages: 1,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn write_after_discard_is_kept() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Write(1, 99), Touch(1)]],
        prefetchers: 1,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn unmapping_during_faults() {
    for same_core in [false, true] {
        Scenario {
            owner: &[&[TouchIfMapped(0)], &[Unmap(0, 1), Touch(1)]],
            prefetchers: 1,
            same_core,
            ..Scenario::default()
        }
        .passes();
    }
}

/// Regression test: a page was moved while its install waited for the kernel's lock. The kernel had
/// checked for a change before, and returned ENOENT. The page was considered gone and read as zeros
/// at its new address. A thread that gets ENOENT now checks whether a change has begun.
#[test]
fn moving_while_install_waits_for_kernel() {
    Scenario {
        owner: &[&[TouchIfMapped(0)], &[Move(0, 9)]],
        two_checks: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Move(0, 9)]],
        prefetchers: 1,
        two_checks: true,
        ..Scenario::default()
    }
    .passes();
}

/// Regression test: one thread settled the last page while another waited for messages forever.
#[test]
fn session_completes_by_itself() {
    Scenario {
        owner: &[&[Touch(0), Touch(2)], &[Touch(3)]],
        fault_threads: 2,
        completes: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 3)]],
        prefetchers: 1,
        completes: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: FAULTS_AT_THE_END,
        completes: true,
        ..Scenario::default()
    }
    .passes();
}

/// Two threads may both count a page, so that all pages seem settled when one is not. The exact
/// check finds it, and is repeated later.
#[test]
fn session_completes_after_page_was_counted_twice() {
    Scenario {
        owner: &[&[Touch(0)], &[Touch(3)]],
        lost: &[1],
        miscounted: true,
        prefetchers: 1,
        completes: true,
        ..Scenario::default()
    }
    .passes();
}

/// Touches of discarded pages come at any moment of the completion, also between the kernel's
/// wake-up and the end of the registration.
const FAULTS_AT_THE_END: &[&[Act]] = &[&[Touch(0), Touch(3)], &[Discard(1, 2), Touch(1)]];

#[test]
fn moving_during_faults() {
    for same_core in [false, true] {
        Scenario {
            owner: &[&[TouchIfMapped(0)], &[Move(0, 9), Touch(1)]],
            prefetchers: 1,
            same_core,
            ..Scenario::default()
        }
        .passes();
    }
}

/// One thread may read both faults at once: another one must serve the second.
#[test]
fn faults_served_at_the_same_time() {
    Scenario {
        owner: &[&[Touch(0)], &[Touch(2)]],
        fault_threads: 2,
        together: 2,
        ..Scenario::default()
    }
    .passes();
}

/// A fault is read during an install for prefetch, by a thread that does not serve it.
#[test]
fn faults_read_during_an_install() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2)]],
        prefetchers: 1,
        prefetched: 2..4,
        ..Scenario::default()
    }
    .passes();
}

/// A thread that only fills a page with zeros reads the discard of the last absent page.
#[test]
fn session_settled_during_an_install_completes() {
    Scenario {
        owner: &[&[Touch(2)], &[Discard(1, 2)]],
        lost: &[0],
        zeroed: Some(0),
        completes: true,
        ..Scenario::default()
    }
    .passes();
}

/// The pages of a damaged frame are poisoned, and discarded ones among them are zero, including one
/// that is discarded after its frame has failed.
#[test]
fn damaged_frame_poisons_its_pages() {
    let owners: [&[&[Act]]; 5] = [
        &[&[Touch(1)], &[Discard(1, 2)]],
        &[&[Touch(1)], &[Discard(1, 2), Touch(1)]],
        &[&[TouchIfMapped(0)], &[Unmap(0, 1), Touch(1)]],
        &[&[Touch(0)], &[Discard(1, 2), Write(1, 99), Touch(1)]],
        &[&[TouchIfMapped(0)], &[Move(0, 9)]],
    ];
    for owner in owners {
        Scenario {
            owner,
            damaged: Some(0),
            ..Scenario::default()
        }
        .passes();
    }
    Scenario {
        owner: &[&[Touch(0), Touch(2)], &[Touch(1)]],
        fault_threads: 2,
        damaged: Some(0),
        completes: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Touch(1)], &[Discard(0, 2)]],
        prefetchers: 1,
        damaged: Some(0),
        completes: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn page_marked_present_but_missing_is_zero() {
    Scenario {
        owner: &[&[Touch(1)], &[Touch(1), Touch(0)]],
        lost: &[1],
        prefetchers: 1,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn event_later_than_its_change() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(0, 2), Touch(1)]],
        slow: true,
        ..Scenario::default()
    }
    .passes();
}

/// Parts of large pages are discarded while the pages are assembled, and when they are present.
#[test]
fn large_pages_with_discarded_parts() {
    let owners: [(usize, &[&[Act]]); 3] = [
        (1, &[&[Touch(0)], &[Discard(1, 2), Touch(1)]]),
        (1, &[&[Touch(3)], &[Discard(1, 3)]]),
        (
            0,
            &[&[Touch(1)], &[Discard(0, 1), Discard(1, 2), Write(0, 99)]],
        ),
    ];
    for (prefetchers, owner) in owners {
        Scenario {
            owner,
            prefetchers,
            large: true,
            ..Scenario::default()
        }
        .passes();
    }
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Touch(1)]],
        fault_threads: 2,
        same_core: true,
        large: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn large_pages_without_memory_lost_or_complete() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Touch(3)]],
        shortages: 1,
        large: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Touch(1)], &[Touch(0), Touch(2)]],
        lost: &[0, 1],
        prefetchers: 1,
        large: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 3), Touch(2)]],
        prefetchers: 1,
        completes: true,
        large: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn mistake_no_install_lock_is_found_with_large_pages() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Touch(1)]],
        prefetchers: 1,
        large: true,
        mistake: Some(Mistake::NoInstallLock),
        ..Scenario::default()
    }
    .fails_with("wrong byte");
}

/// Owners of a session that is given up at any moment.
const GIVEN_UP: [&[&[Act]]; 5] = [
    &[&[Touch(0)], &[Touch(2), Touch(3)]],
    &[&[Touch(0)], &[Discard(1, 3), Touch(1)]],
    &[&[Discard(0, 1), Write(0, 99), Touch(0)], &[Discard(2, 4)]],
    &[&[Unmap(0, 2), Touch(2)], &[MapAfresh(0)]],
    &[&[Move(0, 9)], &[MapAfresh(0), Touch(3)]],
];

/// Missing pages are poisoned wherever they are, present and discarded ones stay, and new mappings
/// of the owner at unmapped places are left alone.
#[test]
fn giving_up_while_owner_changes_memory() {
    for owner in GIVEN_UP {
        for two_checks in [false, true] {
            Scenario {
                owner,
                two_checks,
                gives_up: true,
                ..Scenario::default()
            }
            .passes();
        }
    }
    Scenario {
        owner: &[&[Touch(0), Discard(1, 2)]],
        prefetchers: 1,
        cuts: 1,
        gives_up: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn mistake_protecting_by_address_is_found() {
    Scenario {
        owner: GIVEN_UP[3],
        gives_up: true,
        mistake: Some(Mistake::ProtectByAddress),
        ..Scenario::default()
    }
    .fails_with("fresh place");
}

#[test]
fn mistake_eagain_dropped_in_giving_up_is_found() {
    Scenario {
        owner: GIVEN_UP[1],
        fault_threads: 0,
        gives_up: true,
        mistake: Some(Mistake::EagainDropped),
        ..Scenario::default()
    }
    .fails_with("page 0");
}

fn planted(mistake: Mistake) -> Scenario {
    Scenario {
        owner: TWO_AND_A_DISCARDER,
        prefetchers: 1,
        mistake: Some(mistake),
        ..Scenario::default()
    }
}

#[test]
fn mistake_no_install_lock_is_found() {
    planted(Mistake::NoInstallLock).fails_with("wrong byte");
}

#[test]
fn mistake_wake_for_present_is_found() {
    Scenario {
        owner: &[&[Touch(1)]],
        lost: &[1],
        mistake: Some(Mistake::WakeForPresent),
        ..Scenario::default()
    }
    .fails_with("no progress");
}

#[test]
fn mistake_eagain_dropped_is_found() {
    planted(Mistake::EagainDropped).fails_with("hang");
}

#[test]
fn mistake_no_wake_after_unmap_is_found() {
    Scenario {
        owner: &[&[TouchIfMapped(0)], &[Unmap(0, 1), Touch(1)]],
        mistake: Some(Mistake::NoWakeAfterUnmap),
        ..Scenario::default()
    }
    .fails_with("hang");
}

#[test]
fn mistake_present_before_copy_is_found() {
    planted(Mistake::PresentBeforeCopy).fails_with("wrong byte");
}

#[test]
fn mistake_no_late_wake_is_found() {
    Scenario {
        owner: &[&[Touch(0)]],
        same_core: true,
        mistake: Some(Mistake::NoLateWake),
        ..Scenario::default()
    }
    .fails_with("hang");
}

#[test]
fn mistake_remove_after_faults_is_found() {
    planted(Mistake::RemoveAfterFaults).fails_with("wrong byte");
}

#[test]
fn mistake_cut_marks_one_page_more_is_found() {
    Scenario {
        owner: PAGES_BEHIND_THE_CUT,
        prefetchers: 1,
        cuts: 2,
        mistake: Some(Mistake::CutMarksOneMore),
        ..Scenario::default()
    }
    .fails_with("wrong byte");
}

#[test]
fn mistake_no_wake_after_unregister_is_found() {
    Scenario {
        owner: FAULTS_AT_THE_END,
        completes: true,
        mistake: Some(Mistake::NoWakeAfterUnregister),
        ..Scenario::default()
    }
    .fails_with("hang");
}
