//! Explorer that runs every interleaving of some threads.
//!
//! Threads are coroutines that stop before each operation that another thread could notice. At each
//! stop the explorer picks one of the threads that can continue; depth first, it tries every pick.
//! A state that was seen before is not explored again. Two states are the same if the model, the
//! session's shared state, the operation before which each thread stopped, and everything that each
//! thread was told are the same. A thread's own variables follow from these: it is deterministic,
//! it acts on what it reads from the shared state before its next stop, and each stop names the
//! page or address that it concerns.

use std::cell::Cell;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

/// Number of steps after which a run counts as making no progress.
const MAX_STEPS: usize = 1500;

/// The operation before which a thread stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Pause<O> {
    /// The operation; it may have to wait for its condition.
    Op(O),
    /// A choice of the model among this many alternatives.
    Choose(usize),
}

/// The world on which threads act.
pub(super) trait Scene: 'static {
    /// An operation before which a thread can stop.
    type Op: Copy + std::fmt::Debug + PartialEq + Hash + 'static;
    /// Returns whether the thread that stopped before `op` can continue.
    fn enabled(&self, thread: usize, op: &Self::Op) -> bool;
    /// Returns a digest of all shared state.
    fn digest(&self) -> u64;
    /// Checks the end state, when no thread can continue or all have finished. An error describes
    /// what is wrong.
    fn check_end(&self, stuck: &[usize]) -> Result<(), String>;
}

/// A thread's channel to the explorer.
pub(super) struct Thread<O> {
    yielder: Cell<*const Yielder<usize, Pause<O>>>,
    told: Cell<u64>,
}

impl<O: Copy + Hash> Thread<O> {
    pub(super) fn new() -> Self {
        Self {
            yielder: Cell::new(std::ptr::null()),
            told: Cell::new(0),
        }
    }

    /// Stops before an operation until the explorer picks this thread.
    pub(super) fn stop(&self, op: O) {
        self.suspend(Pause::Op(op));
    }

    /// Returns a number below `n`. The explorer tries each one.
    pub(super) fn choose(&self, n: usize) -> usize {
        let chosen = self.suspend(Pause::Choose(n));
        self.tell(&chosen);
        chosen
    }

    /// Forgets what the thread was told. Only for a point, named by `point`, that the thread
    /// reaches with the same variables whatever it was told.
    pub(super) fn forget(&self, point: u64) {
        self.told.set(point);
    }

    /// Returns a digest of everything that the thread was told.
    pub(super) fn told(&self) -> u64 {
        self.told.get()
    }

    /// Records what the thread is told.
    pub(super) fn tell(&self, what: &impl Hash) {
        let mut hasher = DefaultHasher::new();
        (self.told.get(), 1_u8).hash(&mut hasher);
        what.hash(&mut hasher);
        self.told.set(hasher.finish());
    }

    #[expect(unsafe_code)]
    fn suspend(&self, stop: Pause<O>) -> usize {
        // SAFETY: `spawn` set the pointer when this coroutine started. The yielder lives on the
        // coroutine's stack as long as the coroutine runs, and only the running coroutine comes
        // here.
        let yielder = unsafe { &*self.yielder.get() };
        let chosen = yielder.suspend(stop);
        self.tell(&OpMark(&stop));
        chosen
    }
}

struct OpMark<'a, O>(&'a Pause<O>);

impl<O: Hash> Hash for OpMark<'_, O> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

/// The result of an exploration.
#[derive(Debug)]
pub(super) struct Explored {
    /// Number of runs.
    pub(super) runs: u64,
    /// Number of distinct states.
    pub(super) states: usize,
    /// The first violation.
    pub(super) violation: Option<String>,
}

/// The body of a thread.
pub(super) type Body = Box<dyn FnOnce()>;

/// A run that is ready to start: the scene, and its threads with their bodies.
pub(super) struct Setup<S: Scene> {
    pub(super) scene: Rc<S>,
    pub(super) threads: Rc<[Thread<S::Op>]>,
    pub(super) bodies: Vec<Body>,
}

/// Tries every interleaving of the threads, which `setup` creates anew for each run.
pub(super) fn explore<S: Scene>(setup: impl Fn() -> Setup<S>) -> Explored {
    let mut seen = HashSet::new();
    let mut path: Vec<(usize, usize)> = Vec::new();
    let mut runs = 0;
    let mut stacks = Vec::new();
    loop {
        runs += 1;
        if let Err(violation) = run(setup(), &mut path, &mut seen, &mut stacks) {
            return Explored {
                runs,
                states: seen.len(),
                violation: Some(violation),
            };
        }
        while let Some((pick, of)) = path.last_mut() {
            *pick += 1;
            if pick < of {
                break;
            }
            path.pop();
        }
        if path.is_empty() {
            return Explored {
                runs,
                states: seen.len(),
                violation: None,
            };
        }
    }
}

/// Runs along `path`, and continues from its end with first picks.
fn run<S: Scene>(
    setup: Setup<S>,
    path: &mut Vec<(usize, usize)>,
    seen: &mut HashSet<u64>,
    stacks: &mut Vec<DefaultStack>,
) -> Result<(), String> {
    let Setup {
        scene,
        threads,
        bodies,
    } = setup;
    let mut coroutines = Vec::new();
    let mut stops = Vec::new();
    for (number, body) in bodies.into_iter().enumerate() {
        let threads = Rc::clone(&threads);
        let stack = stacks
            .pop()
            .unwrap_or_else(|| DefaultStack::new(256 << 10).expect("cannot allocate a stack"));
        let mut coroutine =
            Coroutine::with_stack(stack, move |yielder: &Yielder<usize, Pause<S::Op>>, _| {
                threads[number].yielder.set(yielder);
                body();
            });
        stops.push(resume(&mut coroutine, 0));
        coroutines.push(coroutine);
    }
    let mut trace = Vec::new();
    let result = (0..).find_map(|step| {
        let mut picks = Vec::new();
        for (thread, stop) in stops.iter().enumerate() {
            match stop {
                Some(Pause::Op(op)) if scene.enabled(thread, op) => picks.push((thread, 0)),
                Some(Pause::Choose(n)) => picks.extend((0..*n).map(|choice| (thread, choice))),
                _ => {}
            }
        }
        if picks.is_empty() {
            let stuck: Vec<usize> = (0..stops.len()).filter(|i| stops[*i].is_some()).collect();
            return Some(scene.check_end(&stuck));
        }
        if step > MAX_STEPS {
            return Some(Err("no progress: the threads go in circles".to_owned()));
        }
        if step == path.len() {
            let mut hasher = DefaultHasher::new();
            scene.digest().hash(&mut hasher);
            for (thread, stop) in threads.iter().zip(&stops) {
                (thread.told.get(), stop).hash(&mut hasher);
            }
            if !seen.insert(hasher.finish()) {
                return Some(Ok(()));
            }
            path.push((0, picks.len()));
        }
        let (thread, choice) = picks[path[step].0];
        trace.push((thread, stops[thread]));
        stops[thread] = resume(&mut coroutines[thread], choice);
        None
    });
    for mut coroutine in coroutines {
        // An unfinished thread is unwound; its guards release without stopping.
        coroutine.force_unwind();
        stacks.push(coroutine.into_stack());
    }
    match result {
        Some(Err(what)) => Err(format!("{what}\n{}", shown(&trace))),
        _ => Ok(()),
    }
}

fn resume<O>(
    coroutine: &mut Coroutine<usize, Pause<O>, (), DefaultStack>,
    choice: usize,
) -> Option<Pause<O>> {
    match coroutine.resume(choice) {
        CoroutineResult::Yield(stop) => Some(stop),
        CoroutineResult::Return(()) => None,
    }
}

/// Returns the end of a trace in readable form.
fn shown<O: std::fmt::Debug>(trace: &[(usize, Option<Pause<O>>)]) -> String {
    let from = trace.len().saturating_sub(60);
    let lines = trace[from..].iter();
    let lines: Vec<_> = lines
        .map(|(thread, stop)| format!("  thread {thread}: {stop:?}"))
        .collect();
    lines.join("\n")
}
