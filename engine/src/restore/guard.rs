//! What happens to this process when a page can't be restored.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::session::{
    Decision, Failure, Fault, Guard, Kernel, OnFailure, Session, SnapshotImage, Verdict,
};

/// A callback that decides about failures.
pub(super) type Callback = Arc<dyn Fn(&Failure) -> Verdict + Send + Sync>;

/// The failure policy of this process.
pub(super) struct Owner {
    policy: Policy,
}

enum Policy {
    Poison,
    Abort,
    Ask(Sender<(Fault, Failure)>),
}

/// The thread that asks, before it runs.
pub(super) struct Asker {
    callback: Callback,
    sender: Sender<(Fault, Failure)>,
    questions: Receiver<(Fault, Failure)>,
}

impl Asker {
    pub(super) fn new(callback: Callback) -> Self {
        let (sender, questions) = channel();
        Self {
            callback,
            sender,
            questions,
        }
    }

    /// Asks until the session ends. The fault waits meanwhile; other faults are served.
    pub(super) fn run(self, session: &Session<Kernel, SnapshotImage>) {
        drop(self.sender);
        while !session.is_ending() {
            let Ok((fault, failure)) = self.questions.recv_timeout(ASK_AGAIN) else {
                continue;
            };
            match (self.callback)(&failure) {
                Verdict::Retry => session.serve_again(fault),
                Verdict::Poison => {
                    session.poison(fault);
                }
                Verdict::Abort => abort(&failure.to_string()),
            }
        }
    }
}

/// How often the asking thread looks whether the session has ended.
const ASK_AGAIN: std::time::Duration = std::time::Duration::from_millis(100);

impl Owner {
    pub(super) fn new(on_failure: &OnFailure, asker: Option<&Asker>) -> Self {
        let policy = match (on_failure, asker) {
            (OnFailure::Ask(_), Some(asker)) => Policy::Ask(asker.sender.clone()),
            (OnFailure::Poison, _) => Policy::Poison,
            (OnFailure::Abort | OnFailure::Ask(_), _) => Policy::Abort,
        };
        Self { policy }
    }
}

impl Guard for Owner {
    fn decide(&self, fault: Fault, failure: &Failure) -> Decision {
        match &self.policy {
            Policy::Poison => Decision::Poison,
            Policy::Ask(asker) => {
                // The asking thread runs until the session ends, and then nobody is served any more.
                let _ = asker.send((fault, failure.clone()));
                Decision::Leave
            }
            Policy::Abort => abort(&failure.to_string()),
        }
    }

    fn end_owner(&self, why: &str) {
        abort(why)
    }
}

/// Ends the process: going on would let somebody read wrong memory, or wait for ever.
fn abort(why: &str) -> ! {
    tracing::error!(why, "memory can't be restored: the process is ended");
    std::process::abort()
}
