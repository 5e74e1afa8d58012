//! Measures restores of memory side by side: those of snaprestore, and those of the common
//! alternatives.
//!
//! A *workload* says which pages are touched, in which order and how. A *contender* is a way to
//! restore memory: snaprestore, a mapped file, a decompressed file, a userfaultfd handler, a
//! compressed file system.
//!
//! ```text
//! workload (data) --> plan: the pages, in the order of touch
//!                       |
//! contender ------------+--> trial: one fresh process, one measurement --> outcome (JSON)
//!                                                                            |
//! rounds: every contender once, then all again, ...  --> spreads --> table, results, pictures
//! ```
//!
//! # Example
//!
//! ```
//! use snaprestore_compare::contender::Contender;
//! use snaprestore_compare::workload::{Access, Order, Workload};
//!
//! let workload: Workload = serde_json::from_str(
//!     r#"{
//!         "name": "random-reads",
//!         "title": "random reads of everything",
//!         "contenders": ["ours:prefetch=all,frame=64", "mmap"]
//!     }"#,
//! )?;
//! workload.check()?;
//! assert_eq!((workload.order, workload.access), (Order::Random, Access::Read));
//! assert_eq!(workload.contenders[1], Contender::Mmap);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `snaprestore bench` runs such a workload on one file, and the project's own `benches/` run many.
//!
//! # Where to start
//!
//! | module | contents |
//! | --- | --- |
//! | [`workload`] | which pages are touched, in which order and how |
//! | [`contender`] | the ways to restore memory, and their implementations |
//! | [`prepare`] | the files that the contenders need, made from the raw image |
//! | [`trial`] | one measurement in a process of its own |
//! | [`rounds`] | trials interleaved in rounds, and whether all of them read the same bytes |
//! | [`touch`] | the loop that touches, the same for all |
//! | [`create`] | writing snapshots, against writing a compressed file |
//! | [`crowd`] | several VMs served at once, of which one storms |
//! | [`layers`] | writing children of a base, and the chains that are restored |
//! | [`working_set`] | the pages that an owner needs first, and how they are touched |
//! | `server`, `usage`, `limits` | another process that serves; its costs; the costs of the parts |
//! | [`machine`] | the machine on which the trials ran |
//! | [`report`], [`plot`], [`stats`] | tables and charts of the results, medians and percentiles |
//! | [`targets`] | the project's performance targets, computed from the results |
//!
//! # How it measures
//!
//! Each trial is a process of its own. Otherwise memory, processor time and page tables of the
//! trial before would be counted with it. The first round checks the contenders and its times are
//! not used: a checksum over every byte of the touched pages is compared between them, and a
//! difference ends the run.
//!
//! # Features
//!
//! The crate has no optional features.

mod cache;
pub mod contender;
mod contenders;
pub mod create;
pub mod crowd;
pub mod layers;
mod limits;
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
mod usage;
pub mod wide;
pub mod working_set;
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
    pub(crate) fn trial<E: std::error::Error>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |error| Self::Trial {
            what,
            why: with_causes(&error),
        }
    }
}

/// Formats an error with all its causes in one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
