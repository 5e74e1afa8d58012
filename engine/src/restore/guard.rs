//! Failure policy of a restore into this process.

use std::sync::Arc;
use std::time::Duration;

use crate::session::{
    Failure, FailureDecision, FailurePolicy, Fault, FaultOutcome, Guard, Kernel, Session,
    SnapshotImage,
};

use super::questions::Questions;
use snaprestore_uffd::os::abort;

/// A callback that decides about failures.
pub(super) type Callback = Arc<dyn Fn(&Failure) -> FailureDecision + Send + Sync>;

/// The failure policy of this process.
pub(super) struct PolicyGuard {
    policy: Policy,
}

enum Policy {
    Poison,
    Abort,
    Ask(Arc<Questions>),
}

/// The state of the asking thread, before it runs.
pub(super) struct Asker {
    callback: Callback,
    questions: Arc<Questions>,
}

/// Interval at which the asking thread checks whether the session has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

impl Asker {
    pub(super) fn new(callback: Callback) -> Self {
        Self {
            callback,
            questions: Arc::default(),
        }
    }

    /// Asks the callback about failures until the session ends. The faulting threads wait
    /// meanwhile; other faults are served.
    pub(super) fn run(self, session: &Session<Kernel, SnapshotImage>) {
        while !session.is_ending() {
            let Some(failure) = self.questions.next(POLL_INTERVAL) else {
                continue;
            };
            let page = failure.page;
            let decision = (self.callback)(&failure);
            if session.is_ending() {
                // The callback took so long that the restore was given up, with all its pages.
                return;
            }
            match decision {
                FailureDecision::Retry => {
                    self.each(page, |fault| session.retry_deferred(fault, page));
                }
                FailureDecision::Poison => self.each(page, |fault| session.poison_deferred(fault)),
                FailureDecision::Abort => abort(&failure.to_string()),
            }
        }
    }

    /// Calls `apply` with each fault that waits for a decision about `page`.
    fn each(&self, page: u64, apply: impl Fn(Fault)) {
        loop {
            let faults = self.questions.take(page);
            if faults.is_empty() {
                return;
            }
            faults.into_iter().for_each(&apply);
        }
    }
}

impl PolicyGuard {
    pub(super) fn new(on_failure: &FailurePolicy, asker: Option<&Asker>) -> Self {
        let policy = match (on_failure, asker) {
            (FailurePolicy::Ask(_), Some(asker)) => Policy::Ask(Arc::clone(&asker.questions)),
            (FailurePolicy::Poison, _) => Policy::Poison,
            (FailurePolicy::Abort | FailurePolicy::Ask(_), _) => Policy::Abort,
        };
        Self { policy }
    }
}

impl Guard for PolicyGuard {
    fn decide(&self, fault: Fault, failure: &Failure) -> Option<FaultOutcome> {
        match &self.policy {
            Policy::Poison => None,
            // The asking thread runs until the session ends. After that no fault is served any
            // more.
            Policy::Ask(questions) => Some(questions.ask(fault, failure)),
            Policy::Abort => abort(&failure.to_string()),
        }
    }

    fn pending_decision(&self, fault: Fault, page: u64) -> Option<FaultOutcome> {
        match &self.policy {
            Policy::Ask(questions) => questions.join(fault, page),
            Policy::Poison | Policy::Abort => None,
        }
    }

    fn kill_owner(&self, why: &str) {
        abort(why)
    }
}
