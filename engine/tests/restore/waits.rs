//! Threads that wait for each other, and must all proceed.

use std::fs;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use snaprestore_engine::restore::Restore;
use snapshot_format::Reason;

use crate::common::{
    Gate, PAGE, address, frame_of, in_child, open, open_hooked, pack, peek, random_bytes, source,
    wait_until, within,
};

/// Returns whether a thread of this process sleeps.
pub(crate) fn sleeps(thread: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
    let state = stat.rsplit(") ").next().unwrap();
    state.starts_with(['S', 'D'])
}

/// A read takes at most 64 messages. If more have arrived before it, nothing announces the rest
/// again, and the reading thread must take care of them.
#[test]
fn faults_beyond_one_batch_of_messages_are_served() {
    in_child(|| {
        const THREADS: u64 = 300;
        let bytes = Arc::new(random_bytes(THREADS + 2, 21));
        let gate = Gate::default();
        let held = gate.clone();
        let restored = Restore::new(open(pack(&bytes, 1)))
            .fault_threads(2)
            .on_first_touch(move |_| held.pass())
            .start()
            .unwrap();
        let start = address(&restored, 0);
        let _opener = gate.opener();
        // The observer blocks both threads that read.
        for busy in 1..=2 {
            peek(start + (busy - 1) * PAGE);
            wait_until("the observer is called", || gate.waiting() == busy);
        }
        let (say, said) = mpsc::channel();
        let touch = |page: u64| {
            let (say, bytes) = (say.clone(), Arc::clone(&bytes));
            let touch = move || {
                // SAFETY: the call has no arguments.
                say.send(unsafe { libc::gettid() }).unwrap();
                let seen = peek(start + page as usize * PAGE);
                assert!(seen == source(&bytes, page), "page {page}");
            };
            let small = std::thread::Builder::new().stack_size(256 << 10);
            small.spawn(touch).unwrap()
        };
        let touches: Vec<JoinHandle<()>> = (2..THREADS + 2).map(touch).collect();
        for thread in said.iter().take(touches.len()) {
            wait_until("it waits for its page", || sleeps(thread));
        }
        gate.open();
        within("all are served", move || {
            for touch in touches {
                touch.join().unwrap();
            }
        });
    })
    .expect_success();
}

/// Two frames are being read, and another thread waits for each. The thread that waits first waits
/// for the frame that finishes last: it must not swallow the notification of the other read.
#[test]
fn threads_waiting_for_different_frames_all_resume() {
    let bytes = random_bytes(64, 22);
    let file = pack(&bytes, 8);
    let good = open(file.clone());
    let (one, other) = (frame_of(&good, 0).offset(), frame_of(&good, 32).offset());
    assert_eq!(frame_of(&good, 1).offset(), one);
    assert_eq!(frame_of(&good, 33).offset(), other);
    let gates = [Gate::default(), Gate::default()];
    let held = gates.clone();
    let snapshot = open_hooked(file, move |_, offset, reason| {
        match offset {
            _ if reason != Reason::Demand => {}
            _ if offset == one => held[0].pass(),
            _ if offset == other => held[1].pass(),
            _ => {}
        }
        Ok(())
    });
    let restored = Restore::new(snapshot).fault_threads(4).start().unwrap();
    let _openers = gates.each_ref().map(Gate::opener);
    let touch = |page: u64| {
        let there = address(&restored, page);
        let expected = source(&bytes, page).to_vec();
        std::thread::spawn(move || assert!(peek(there) == expected[..], "page {page}"))
    };
    let mut touches = Vec::new();
    for (page, gate) in [(0, &gates[0]), (32, &gates[1])] {
        touches.push(touch(page));
        wait_until("the frame is being read", || gate.waiting() == 1);
    }
    for (page, faults) in [(33, 3), (1, 4)] {
        touches.push(touch(page));
        wait_until("the fault is taken", || restored.stats().faults == faults);
        // Nothing tells whether its thread waits by now. If it doesn't, this test shows less.
        sleep(Duration::from_millis(20));
    }
    for gate in gates {
        gate.open();
        sleep(Duration::from_millis(20));
    }
    within("all go on", move || {
        for touch in touches {
            touch.join().unwrap();
        }
        drop(restored);
    });
}
