//! Measures restores side by side: snaprestore's, and those of common alternatives.
//!
//! ```text
//! workload (data) --> plan: the pages, in the order of touch
//!                       |
//! contender ------------+--> trial: one fresh process, one measurement --> outcome (JSON)
//!                                                                            |
//! rounds: every contender once, then all again, ...  --> spreads --> table, results, pictures
//! ```
//!
//! | module | what |
//! | --- | --- |
//! | [`workload`] | what is touched and how; which page comes when |
//! | [`contender`] | the ways to bring memory back, and their implementations |
//! | [`touch`] | the loop that touches, the same for all |
//! | [`usage`] | processor time, memory and disk reads of a process |
//! | [`trial`] | one measurement in a process of its own |
//! | `server` | the process that serves a trial's memory, where another one does |
//! | [`prepare`] | the files that the contenders need, made from the raw image |
//! | [`rounds`] | trials interleaved in rounds, and whether all of them read the same bytes |
//! | [`create`] | writing snapshots, against writing a compressed file |
//! | [`crowd`] | several VMs served at once, of which one storms |
//! | [`limits`] | what decoding and installing cost by themselves |
//! | [`stats`] | medians, quartiles, percentiles |
//! | [`machine`] | what was measured on |
//! | [`report`] | results as a table |
//!
//! A trial is a process because memory, processor time and page tables of the one before would
//! otherwise be counted with it. The first round is for proof, not for time: every page that was
//! touched is compared between the contenders, byte by byte through a checksum, and a difference
//! ends the run.

mod cache;
pub mod contender;
mod contenders;
pub mod create;
pub mod crowd;
pub mod limits;
pub mod machine;
pub mod plot;
pub mod prepare;
pub mod report;
pub mod rounds;
mod server;
pub mod stats;
pub mod targets;
pub mod touch;
pub mod trial;
mod uffd;
pub mod usage;
pub mod wide;
pub mod workload;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Why a measurement is not available.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// Operation that failed.
        what: String,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// This machine or process doesn't support it; the message gives the reason.
    #[error("{0}")]
    Unavailable(String),
    /// A trial's process failed.
    #[error("{what}: {why}")]
    Trial {
        /// The trial.
        what: String,
        /// Error message of the process.
        why: String,
    },
    /// Two contenders read different bytes, so no time of either counts.
    #[error("{workload}: {contender} read other bytes than {other}")]
    WrongBytes {
        /// The workload.
        workload: String,
        /// Contender that differs.
        contender: String,
        /// Contender that it differs from.
        other: String,
    },
    /// An argument or a workload is invalid.
    #[error("{0}")]
    Invalid(String),
}

impl BenchError {
    /// Wraps an error of the operating system.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Returns the error of the last system call.
    pub(crate) fn last(what: impl Into<String>) -> Self {
        Self::io(what)(std::io::Error::last_os_error())
    }

    /// Wraps any error of the libraries under test.
    pub(crate) fn of<E: std::error::Error>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |error| Self::Trial {
            what,
            why: with_causes(&error),
        }
    }
}

/// Formats an error with all its causes in one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
