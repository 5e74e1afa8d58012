//! A scenario: threads of the owner and of the session, and what must hold in every interleaving.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use super::explore::{Body, Explored, Setup, Thread, explore};
use super::pages::{self, Pages};
use super::platform::{Mistake, Model, Op, Scene};
use super::world::{Change, Content, Unmapped, World, at};

use crate::session::Session;
use crate::session::failure::{Failure, FailureKind};
use crate::session::fault::context::{LendContext, ThreadContext};
use crate::session::fault::outcome::FaultOutcome;
use crate::session::fault::queue::Fault;
use crate::session::guard::Guard;
use crate::session::platform::{PAGE, PageNumber};
use crate::session::state::State;
use crate::session::state::address_map::Extent;

/// Number of pages in the model's snapshot: two frames of two pages.
pub(super) const PAGES: u64 = 4;

/// An action of a thread of the owner.
#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
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
pub(super) struct Scenario {
    pub(super) owner: &'static [&'static [Act]],
    pub(super) fault_threads: usize,
    pub(super) prefetchers: usize,
    /// Pages that are prefetched.
    pub(super) prefetched: Range<u64>,
    pub(super) mistake: Option<Mistake>,
    /// Pages whose discard was lost: they are marked present, and are missing.
    pub(super) lost: &'static [u64],
    /// Whether those pages are counted twice.
    pub(super) miscounted: bool,
    /// Numbers of COPY calls that may be cut short, and of installs that may find no memory.
    pub(super) cuts: u32,
    pub(super) shortages: u32,
    /// Whether time passes between the start of a change and its event.
    pub(super) slow: bool,
    /// Whether a change may begin between an install's first check for one and the kernel's lock.
    pub(super) two_checks: bool,
    /// Whether nobody ends the session, so that it must complete by itself.
    pub(super) completes: bool,
    /// Whether the memory has large pages, of two pages each.
    pub(super) large: bool,
    /// Whether a thread gives the session up, at any time.
    pub(super) gives_up: bool,
    /// The damaged frame.
    pub(super) damaged: Option<u64>,
    /// Number of faults that are served together: none is served before this many were taken, as
    /// with a store that answers the first read after the last.
    pub(super) together: usize,
    /// The place of a discarded page that a session thread fills with zeros, for a reader.
    pub(super) zeroed: Option<u64>,
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
pub(super) enum Expected {
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
    /// Returns whether the page of `place`, which may be lost, may read as `content`.
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
    fn decide(&self, _: Fault, failure: &Failure) -> Option<FaultOutcome> {
        assert_eq!(failure.kind, FailureKind::Damaged, "{failure}");
        None
    }
    fn pending_decision(&self, _: Fault, _: PageNumber) -> Option<FaultOutcome> {
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

pub(super) type Owner = RefCell<(Vec<Expected>, Vec<String>, usize)>;

impl Scenario {
    pub(super) fn explore(&self) -> Explored {
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
        let model = Model::new(world, Rc::clone(&threads), self.mistake, self.two_checks);
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
                    let _ = session.prefetch(context, prefetched, false, || true);
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
    pub(super) fn passes(&self) {
        let explored = self.explore();
        println!("{} states, {} runs", explored.states, explored.runs);
        assert!(
            explored.violation.is_none(),
            "{}",
            explored.violation.unwrap()
        );
    }

    /// Asserts that some interleaving fails as described by `expected`.
    pub(super) fn fails_with(&self, expected: &str) {
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
