//! Serving faults.
//!
//! ```text
//! answer(fault):
//!   loop:
//!     hold the lock shared: look up the page's state
//!       no page of ours, removed, present: ZEROPAGE, or WAKE if something is there; done
//!       poisoned: POISON, or WAKE; done
//!     absent: what is its content?
//!       fill: install the fills around it; done
//!       stored: claim the frame (or wait for who has it, and look again)
//!               read, check, decode
//!               install the wanted page, then its run, then the other runs, then the fills
//!               between them; done
//!       can't be had: the failure policy
//! ```

use std::collections::VecDeque;
use std::ops::Range;

use snapshot_format::Reason;
use snapshot_format::layout::{PAGE_SIZE, PAGES_PER_BLOCK_U64};

use super::install::{HOLD_PAGES, Source, Stop};
use super::platform::{Content, Image, Installed, PAGE, PageNumber, Platform, Run};
use super::state::Status;
use super::stats::add;
use super::{Decision, Failure, FailureKind, Fault, Session};

/// Pages of the buffer that fills other than zero are installed from.
const FILL_PAGES: usize = 64;
/// How often a frame that could not be read is read again, with some milliseconds in between.
const READ_TRIES: u32 = 4;
/// The longest run that a fault waits for as a whole: to copy as many pages takes as long as one more
/// system call for the page that is wanted.
/// (The frames of the model have two pages.)
const PAGES_WORTH_WAITING: u16 = if cfg!(test) { 1 } else { 4 };
/// Damaged frames that a thread remembers.
const BAD_FRAMES: usize = 64;
/// Runs that a frame may have: every slot four times.
const MOST_RUNS: usize =
    snapshot_format::layout::MAX_FRAME_SLOTS * snapshot_format::layout::MAX_LISTED_PAGES_PER_SLOT;

/// What one thread needs to serve faults and to prefetch, allocated once.
pub(crate) struct Worker<I: Image> {
    pub(super) decoder: I::Decoder,
    pub(super) runs: Vec<Run>,
    fill: Vec<u8>,
    fill_word: u64,
    /// Frames that prefetch found damaged, the latest last: not read once for each of their pages.
    bad: VecDeque<(I::Frame, Failure)>,
}

impl<I: Image> Worker<I> {
    pub(crate) fn new(decoder: I::Decoder) -> Self {
        Self {
            decoder,
            runs: Vec::with_capacity(MOST_RUNS),
            fill: vec![0; FILL_PAGES * PAGE_SIZE],
            fill_word: 0,
            bad: VecDeque::new(),
        }
    }

    fn known_bad(&self, frame: &I::Frame) -> Option<&Failure> {
        let known = self.bad.iter().find(|(bad, _)| bad == frame);
        known.map(|(_, failure)| failure)
    }

    fn remember_bad(&mut self, frame: &I::Frame, failure: &Failure) {
        if self.bad.len() == BAD_FRAMES {
            self.bad.pop_front();
        }
        self.bad.push_back((*frame, failure.clone()));
    }

    /// A buffer of pages that repeat `word`.
    fn filled(&mut self, word: u64) -> &[u8] {
        if self.fill_word != word {
            for chunk in self.fill.chunks_exact_mut(8) {
                chunk.copy_from_slice(&word.to_le_bytes());
            }
            self.fill_word = word;
        }
        &self.fill
    }
}

/// What the state of the faulting page asks for.
pub(super) enum Step {
    /// It was answered.
    Answered,
    /// Read events, then look again.
    Again,
    /// Bring this page.
    Bring(PageNumber),
    /// It can't go on.
    Stop(Stop),
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It was answered.
    Given,
    /// The guard has it, and will have it served again or poisoned.
    Left,
    /// Nobody answers it, or who answers another one does.
    Nobody,
}

/// What became of an attempt to bring a page.
pub(super) enum Brought {
    /// It was installed by this thread.
    Yes,
    /// Look again.
    Look,
}

/// Why a page was not brought.
pub(super) enum Lost {
    /// Its content can't be had.
    Failed(Failure),
    /// It could not be installed.
    Stopped(Stop),
}

impl From<Failure> for Lost {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Stop> for Lost {
    fn from(stop: Stop) -> Self {
        Self::Stopped(stop)
    }
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Serves faults until the session ends.
    pub(crate) fn serve(&self, worker: &mut Worker<I>) {
        let mut follower = P::Follower::default();
        while let Some(fault) = self.next_fault() {
            add(&self.stats.faults, 1);
            self.platform.follow(&mut follower, fault.thread);
            match self.answer(worker, fault) {
                Answer::Given => {
                    self.stats.fault_time.record(fault.at.elapsed());
                    self.inbox.answered();
                }
                Answer::Nobody => self.inbox.answered(),
                Answer::Left => self.inbox.left(),
            }
            self.look_if_settled();
        }
    }

    /// Has a thread that waits for messages look whether the session is complete: there may be no
    /// more.
    pub(super) fn look_if_settled(&self) {
        if self.state.may_be_settled() {
            self.platform.kick();
        }
    }

    /// Answers one fault.
    pub(super) fn answer(&self, worker: &mut Worker<I>, fault: Fault) -> Answer {
        let address = fault.address & !(PAGE - 1);
        let (mut tries, mut reads) = (0, 0);
        loop {
            let page = match self.look(address) {
                Step::Answered => return Answer::Given,
                Step::Bring(page) => page,
                Step::Again => {
                    if let Err(stop) = self.after_again(&mut tries, address) {
                        return self.stopped(fault, stop);
                    }
                    continue;
                }
                Step::Stop(stop) => return self.stopped(fault, stop),
            };
            if let Some(decision) = self.guard.undecided(fault, page) {
                return self.decided(fault, decision);
            }
            match self.bring(worker, page, Reason::Demand) {
                Ok(Brought::Yes) => {
                    if let Some(observe) = &self.observer {
                        observe(page);
                    }
                    return Answer::Given;
                }
                Ok(Brought::Look) => {}
                // Somebody else has decided about it meanwhile.
                Err(Lost::Failed(_)) if self.state.status(page) != Status::Absent => {}
                Err(Lost::Failed(failure))
                    if failure.kind == FailureKind::Io && reads < READ_TRIES =>
                {
                    reads += 1;
                    self.platform.back_off(reads * 100);
                }
                Err(Lost::Failed(mut failure)) => {
                    failure.address = Some(address);
                    return self.fail(fault, &failure);
                }
                Err(Lost::Stopped(stop)) => return self.stopped(fault, stop),
            }
        }
    }

    /// Looks up the page at `address` and answers what needs no content.
    pub(super) fn look(&self, address: u64) -> Step {
        let _hold = self.platform.shared(address);
        let page = self.state.map().page_at(address);
        let installed = match page.map(|page| (page, self.state.status(page))) {
            Some((page, Status::Absent)) => return Step::Bring(page),
            Some((_, Status::Poisoned)) => self.platform.poison(address, PAGE),
            Some((_, Status::Present | Status::Removed)) | None => {
                self.platform.zeropage(address, PAGE)
            }
        };
        match installed {
            Installed::Done | Installed::Partial(_) => Step::Answered,
            Installed::Exists | Installed::Gone => {
                self.platform.wake(address, PAGE);
                Step::Answered
            }
            Installed::Again | Installed::NoMemory => Step::Again,
            Installed::OwnerGone => Step::Stop(Stop::OwnerGone),
            Installed::Refused(errno) => Step::Stop(Stop::Refused(errno)),
        }
    }

    /// Brings `page`, which is absent, and what comes with it.
    pub(super) fn bring(
        &self,
        worker: &mut Worker<I>,
        page: PageNumber,
        reason: Reason,
    ) -> Result<Brought, Lost> {
        let done = match self.image.content(page, reason)? {
            Content::Fill(word) => self.bring_fill(worker, page, word, reason)?,
            Content::Stored(frame, slot) => {
                if reason == Reason::Prefetch
                    && let Some(failure) = worker.known_bad(&frame)
                {
                    let failure = failure.clone();
                    return Err(Lost::Failed(Failure { page, ..failure }));
                }
                let id = self.image.id(&frame);
                let Some(claim) = self.claims.claim(id) else {
                    if reason == Reason::Demand {
                        self.platform.wait_unclaimed(&self.claims, id);
                    }
                    return Ok(Brought::Look);
                };
                // Who had the claim a moment ago may have brought it.
                if self.state.status(page) != Status::Absent {
                    return Ok(Brought::Look);
                }
                let done = self.bring_frame(worker, page, &frame, slot, reason)?;
                drop(claim);
                done
            }
            Content::Unavailable => return Err(Lost::Failed(self.unavailable(page))),
        };
        Ok(if done { Brought::Yes } else { Brought::Look })
    }

    /// Installs the fills around `page`.
    fn bring_fill(
        &self,
        worker: &mut Worker<I>,
        page: PageNumber,
        word: u64,
        reason: Reason,
    ) -> Result<bool, Lost> {
        let most = if word == 0 {
            HOLD_PAGES
        } else {
            FILL_PAGES as u64
        };
        let same = |p: &PageNumber| matches!(self.image.content(*p, reason), Ok(Content::Fill(w)) if w == word);
        let window = window(page, most);
        let start = (window.start..page)
            .rev()
            .take_while(same)
            .last()
            .unwrap_or(page);
        let end = (page + 1..window.end)
            .take_while(same)
            .last()
            .map_or(page + 1, |p| p + 1);
        let source = if word == 0 {
            Source::Zeros
        } else {
            Source::Filled(worker.filled(word))
        };
        Ok(self.install(start..end, source, Some(page), reason)?)
    }

    /// Decodes `frame` and installs what it holds: `page`, the pages around it that its own index
    /// block knows, then, when nobody waits any more, what the frame lists and some of what repeats
    /// it elsewhere.
    fn bring_frame(
        &self,
        worker: &mut Worker<I>,
        page: PageNumber,
        frame: &I::Frame,
        slot: u16,
        reason: Reason,
    ) -> Result<bool, Lost> {
        let decoded = self.image.decode(&mut worker.decoder, frame, reason);
        decoded.map_err(|failure| {
            let failure = Failure { page, ..failure };
            // A touch looks for itself: the file may have been mended.
            if reason == Reason::Prefetch && failure.kind == FailureKind::Damaged {
                worker.remember_bad(frame, &failure);
            }
            failure
        })?;
        let near = self.run_around(page, frame, slot, reason);
        let bytes = self.image.bytes(&worker.decoder);
        let mut done = false;
        if reason == Reason::Demand && near.count > PAGES_WORTH_WAITING {
            let alone = Run {
                page,
                slot,
                count: 1,
            };
            done = self.install(
                alone.pages(),
                Source::Frame(bytes, alone),
                Some(page),
                reason,
            )?;
        }
        match self.install(near.pages(), Source::Frame(bytes, near), Some(page), reason) {
            Ok(now) => done |= now,
            // The pages around the one that was wanted only came with it.
            Err(Stop::NoMemory | Stop::Stuck) if done => return Ok(true),
            Err(stop) => return Err(stop.into()),
        }
        let own = self
            .image
            .runs(&mut worker.decoder, reason, &mut worker.runs);
        let bytes = self.image.bytes(&worker.decoder);
        for run in &worker.runs {
            if self.is_ending() {
                return Ok(done);
            }
            match self.install(run.pages(), Source::Frame(bytes, *run), None, reason) {
                Ok(_) => {}
                Err(Stop::NoMemory | Stop::Stuck) if done => return Ok(true),
                Err(stop) => return Err(stop.into()),
            }
        }
        if reason == Reason::Demand {
            worker.runs.truncate(own);
            self.bring_fills_between(worker, page);
        }
        Ok(done)
    }

    /// Installs the fills that lie between the pages in `worker.runs`, near `page`: they
    /// take microseconds, and a fault for each takes many.
    fn bring_fills_between(&self, worker: &mut Worker<I>, page: PageNumber) {
        let block = window(page, PAGES_PER_BLOCK_U64);
        let near = worker.runs.iter().map(Run::pages);
        let near = near.filter(|pages| block.contains(&pages.start));
        let Some(between) = near.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)) else {
            return;
        };
        let mut next = between.start;
        while let Some(page) = self.state.first_absent(next..between.end.min(block.end)) {
            next = page + 1;
            if let Ok(Content::Fill(word)) = self.image.content(page, Reason::Demand)
                && self.bring_fill(worker, page, word, Reason::Demand).is_err()
            {
                // It will be met again by whoever wants the page.
                return;
            }
        }
    }

    /// The pages around `page`, in its hold-sized window, that follow each other in `frame` as they
    /// do here. The window lies in one index block, which was read to find `page`.
    fn run_around(&self, page: PageNumber, frame: &I::Frame, slot: u16, reason: Reason) -> Run {
        let is_at = |other: PageNumber, slot: u16| matches!(self.image.content(other, reason), Ok(Content::Stored(f, s)) if f == *frame && s == slot);
        let window = window(page, HOLD_PAGES);
        let mut run = Run {
            page,
            slot,
            count: 1,
        };
        while run.page > window.start && run.slot > 0 && is_at(run.page - 1, run.slot - 1) {
            run.page -= 1;
            run.slot -= 1;
            run.count += 1;
        }
        while run.pages().end < window.end && is_at(run.pages().end, run.slot + run.count) {
            run.count += 1;
        }
        run
    }

    /// The failure of a page that the snapshot doesn't hold.
    fn unavailable(&self, page: PageNumber) -> Failure {
        Failure {
            page,
            kind: FailureKind::Unavailable,
            ..self
                .image
                .failure("it could not be read when the snapshot was taken".to_owned())
        }
    }

    /// A page that a fault wants can't be restored.
    fn fail(&self, fault: Fault, failure: &Failure) -> Answer {
        self.report(failure);
        self.decided(fault, self.guard.decide(fault, failure))
    }

    fn decided(&self, fault: Fault, decision: Decision) -> Answer {
        match decision {
            Decision::Poison => self.poison(fault),
            Decision::Leave => Answer::Left,
            Decision::Forget => Answer::Nobody,
        }
    }

    /// Poisons the page of a fault.
    pub(super) fn poison(&self, fault: Fault) -> Answer {
        let address = fault.address & !(PAGE - 1);
        let mut tries = 0;
        loop {
            let again = {
                let _hold = self.platform.shared(address);
                let page = self.state.map().page_at(address);
                match page.filter(|page| self.state.status(*page) == Status::Absent) {
                    None => {
                        self.platform.wake(address, PAGE);
                        return Answer::Given;
                    }
                    Some(page) => match self.platform.poison(address, PAGE) {
                        Installed::Done | Installed::Partial(_) => {
                            self.state.mark_poisoned(page..page + 1);
                            add(&self.stats.poisoned, 1);
                            self.look_if_settled();
                            return Answer::Given;
                        }
                        Installed::Exists | Installed::Gone => {
                            self.platform.wake(address, PAGE);
                            return Answer::Given;
                        }
                        Installed::Again | Installed::NoMemory => Ok(()),
                        Installed::OwnerGone => Err(Stop::OwnerGone),
                        Installed::Refused(errno) => Err(Stop::Refused(errno)),
                    },
                }
            };
            if let Err(stop) = again.and_then(|()| self.after_again(&mut tries, address)) {
                return self.stopped(fault, stop);
            }
        }
    }

    /// An install for a fault could not go on: the owner is gone, or must not go on.
    fn stopped(&self, fault: Fault, stop: Stop) -> Answer {
        if stop == Stop::OwnerGone {
            self.owner_is_gone();
            return Answer::Nobody;
        }
        let page = {
            let _hold = self.platform.shared(fault.address);
            self.state.map().page_at(fault.address).unwrap_or_default()
        };
        let failure = Failure {
            address: Some(fault.address),
            ..self.install_failure(page, stop)
        };
        self.report(&failure);
        self.guard.end_owner(&failure.detail);
        Answer::Nobody
    }

    /// The failure of a page that the kernel would not install.
    pub(super) fn install_failure(&self, page: PageNumber, stop: Stop) -> Failure {
        let why = match stop {
            Stop::OwnerGone => "the owner of the memory is gone".to_owned(),
            Stop::Stuck => "the owner's mappings kept changing without an event".to_owned(),
            Stop::NoMemory => "the kernel had no memory for it, many times".to_owned(),
            Stop::Refused(errno) => {
                let error = std::io::Error::from_raw_os_error(errno);
                format!("the kernel refused to install it: {error}")
            }
        };
        Failure {
            page,
            kind: FailureKind::Install,
            ..self.image.failure(why)
        }
    }
}

impl Run {
    /// The numbers of its pages.
    pub(crate) fn pages(&self) -> Range<PageNumber> {
        self.page..self.page + u64::from(self.count)
    }
}

/// The aligned window of `pages` pages around `page`.
fn window(page: PageNumber, pages: u64) -> Range<PageNumber> {
    let start = page / pages * pages;
    start..start + pages
}
