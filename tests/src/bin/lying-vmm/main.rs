//! A VMM that lies, stalls and does what no VMM does, at random and for a bounded time.
//!
//! ```text
//! lying-vmm SOCKET RAW SEED
//! lying-vmm SOCKET RAW NAME...
//! ```
//!
//! `RAW` is the memory that it should have. With a number, its behaviour follows from that seed;
//! with names, it has those lies and deeds and is otherwise honest. It may exit, hang, stop itself,
//! or be killed, so the process that starts it must be ready to kill it. It prints its behaviour in
//! one line at the start.
#![allow(
    unsafe_code,
    reason = "it does to its memory what nobody should, through raw pointers"
)]
#![allow(clippy::print_stdout, reason = "it is a program")]

mod deeds;
mod fuse;
mod handshake;
mod memory;

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use deeds::Deed;
use handshake::{Descriptors, Pieces, Text};
use memory::{Lie, Memory};

/// Behaviour of one run.
struct Plan {
    memory: Lie,
    text: Text,
    descriptors: Descriptors,
    pieces: Pieces,
    deeds: Vec<Deed>,
    /// Number of connections; each one after the first hands over the same userfaultfd.
    connections: usize,
    /// Duration of the run.
    time: Duration,
}

impl Plan {
    fn honest() -> Self {
        Self {
            memory: Lie::None,
            text: Text::Honest,
            descriptors: Descriptors::Honest,
            pieces: Pieces::Whole,
            deeds: Vec::new(),
            connections: 1,
            time: Duration::from_millis(500),
        }
    }

    fn random(rng: &mut SmallRng) -> Self {
        let mut plan = Self::honest();
        // A VM that lies in everything is refused because of the first lie.
        match rng.random_range(0..8) {
            0 | 1 => plan.text = pick(Text::ALL, rng),
            2 | 3 => plan.descriptors = pick(Descriptors::ALL, rng),
            4 => plan.pieces = pick(Pieces::ALL, rng),
            5 => plan.memory = pick(Lie::ALL, rng),
            _ => {}
        }
        if rng.random_bool(0.3) {
            plan.pieces = pick(Pieces::ALL, rng);
        }
        for _ in 0..rng.random_range(0..5) {
            plan.deeds.push(pick(Deed::ALL, rng));
        }
        if rng.random_bool(0.1) {
            plan.connections = *[2, 3, 40].choose(rng).expect("one of them");
        }
        plan.time = Duration::from_millis(rng.random_range(50..800));
        plan
    }

    fn named(names: &[String]) -> Option<Self> {
        let mut plan = Self::honest();
        for name in names {
            if let Some(text) = named(Text::ALL, name) {
                plan.text = text;
            } else if let Some(descriptors) =
                named(&[Descriptors::ALL, &[Descriptors::Fuse]].concat(), name)
            {
                plan.descriptors = descriptors;
            } else if let Some(pieces) = named(Pieces::ALL, name) {
                plan.pieces = pieces;
            } else if let Some(lie) = named(Lie::ALL, name) {
                plan.memory = lie;
            } else if let Some(times) = name.strip_prefix("times=") {
                plan.connections = times.parse().ok()?;
            } else if let Some(seconds) = name.strip_prefix("seconds=") {
                plan.time = Duration::from_secs(seconds.parse().ok()?);
            } else {
                plan.deeds.push(named(Deed::ALL, name)?);
            }
        }
        Some(plan)
    }

    fn told(&self) -> String {
        let Self {
            memory,
            text,
            descriptors,
            pieces,
            deeds,
            connections,
            time,
        } = self;
        format!(
            "{memory:?} {text:?} {descriptors:?} {pieces:?} {deeds:?} times={connections} for {time:?}"
        )
    }
}

fn pick<T: Copy>(all: &[T], rng: &mut SmallRng) -> T {
    *all.choose(rng).expect("not empty")
}

/// Returns the value whose `Debug` output is `name`.
fn named<T: Copy + std::fmt::Debug>(all: &[T], name: &str) -> Option<T> {
    all.iter().copied().find(|one| format!("{one:?}") == name)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (plan, seed) = match &args[..] {
        [_, _, seed] if seed.parse::<u64>().is_ok() => {
            let seed = seed.parse().unwrap_or(0);
            let mut rng = SmallRng::seed_from_u64(seed);
            (Some(Plan::random(&mut rng)), seed)
        }
        [_, _, names @ ..] if !names.is_empty() => (Plan::named(names), 0),
        _ => (None, 0),
    };
    let Some(plan) = plan else {
        println!("usage: lying-vmm SOCKET RAW SEED|NAME...");
        return ExitCode::from(2);
    };
    println!("{}", plan.told());
    let mut rng = SmallRng::seed_from_u64(!seed);
    match run(Path::new(&args[0]), Path::new(&args[1]), &plan, &mut rng) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::from(3)
        }
    }
}

fn run(socket: &Path, raw: &Path, plan: &Plan, rng: &mut SmallRng) -> io::Result<()> {
    let len = fs::metadata(raw)?.len();
    let memory = Memory::new(len, plan.memory, &plan.deeds)?;
    let mut sockets = Vec::new();
    for _ in 0..plan.connections {
        // A daemon that closes the connection has recognised the lie.
        match handshake::send(
            socket,
            &memory,
            plan.text,
            plan.descriptors,
            plan.pieces,
            rng,
        ) {
            Ok(socket) => sockets.push(socket),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(error),
        }
    }
    for deed in &plan.deeds {
        deed.begin(&memory, socket, rng.random());
    }
    // Its memory goes with the process, and so do threads that would wait forever.
    std::thread::sleep(plan.time);
    Ok(())
}
