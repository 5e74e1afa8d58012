//! Errors of the writer.

use std::io;

use crate::error::{FrameError, ReadError};
use crate::layout::{PAGE_SIZE_U64, PAGES_PER_BLOCK_U64, RawTopEntry};

/// An error of the writer. The writer that returned it accepts no further calls.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The output returned an error.
    #[error("could not write {what}")]
    Io {
        /// Part that was being written.
        what: &'static str,
        /// Error of the output.
        #[source]
        source: io::Error,
    },
    /// The source of the pages could not be read.
    #[error("could not read pages")]
    Source(#[source] io::Error),
    /// The source of an attachment could not be read.
    #[error("could not read the attachment {name:?}")]
    Attachment {
        /// Name of the attachment.
        name: String,
        /// Error of the source.
        #[source]
        source: io::Error,
    },
    /// The progress callback asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The snapshot would exceed a limit of the format.
    #[error("{what} would be {value}; the format allows at most {limit}")]
    Limit {
        /// The limited quantity.
        what: &'static str,
        /// Value that would have exceeded the limit.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// The snapshot would be one that a reader refuses, unless its
    /// [`max_top_bytes`](crate::SnapshotOptions::max_top_bytes) is raised.
    #[error(
        "the memory is too large for one snapshot: with {} TiB its top table would have {bytes} \
         bytes, and readers refuse more than {limit} (max_top_bytes), which is {} TiB of memory; \
         take it in parts",
        tib(*bytes),
        tib(*limit)
    )]
    TopTooLarge {
        /// Minimum size that the top table would have had.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A part of the base could not be read.
    #[error("could not read the base")]
    Base(#[from] ReadError),
    /// A frame of the base could not be read.
    #[error("could not read the base")]
    BaseFrame(#[from] FrameError),
    /// A part of a snapshot that is copied could not be read.
    #[error("could not read the snapshot")]
    Copied(#[source] ReadError),
    /// A frame of a snapshot that is copied could not be read.
    #[error("could not read the snapshot")]
    CopiedFrame(#[source] FrameError),
    /// The snapshot that was to get another base has none.
    #[error("{file}: needs no other file, so there is no base to replace")]
    NotLayered {
        /// The name of the snapshot's file.
        file: String,
    },
    /// The new base is the snapshot itself, or a descendant of it.
    #[error("{file}: cannot become a child of {base}, which needs it")]
    BaseOfItself {
        /// The name of the snapshot's file.
        file: String,
        /// The name of the new base.
        base: String,
    },
    /// The new base holds other memory than the old base.
    #[error(
        "{base}: holds other memory than {old_base}, the base of {file}: its content digest is \
         another; a base can be replaced by a snapshot of the same memory, such as a flattened one"
    )]
    OtherContent {
        /// The name of the child.
        file: String,
        /// The name of the new base.
        base: String,
        /// The name of the old base.
        old_base: String,
    },
    /// A block could not be taken from the new base.
    #[error(
        "{file}: its block {block} is not as in {base}: either that holds other memory than \
         {old_base}, the base so far, or the block needs an ancestor that is missing"
    )]
    NotInBase {
        /// The name of the child.
        file: String,
        /// Number of the block.
        block: u64,
        /// The name of the new base.
        base: String,
        /// The name of the old base.
        old_base: String,
    },
    /// An argument is invalid.
    #[error("{what} is {value}; accepted: {accepted}")]
    Argument {
        /// The argument.
        what: &'static str,
        /// Its value.
        value: String,
        /// Description of the accepted values.
        accepted: &'static str,
    },
    /// The compressor failed.
    #[error("could not compress {what}: {detail}")]
    Compress {
        /// Part that was being compressed.
        what: &'static str,
        /// Error message of zstd.
        detail: &'static str,
    },
    /// The threads could not be started.
    #[error("could not start the writer's threads")]
    Threads(#[source] rayon::ThreadPoolBuildError),
    /// A thread of the writer panicked: a defect of this crate.
    #[error("a thread of the writer panicked")]
    Panicked,
    /// An earlier call failed.
    #[error("the writer was stopped by an earlier error")]
    Stopped,
}

/// Tebibytes of memory that a top table stands for, with one decimal.
fn tib(top_bytes: u64) -> String {
    let blocks = top_bytes / size_of::<RawTopEntry>() as u64;
    // No number of pages above 2^36 comes here.
    let tenths = (blocks * 10 * PAGES_PER_BLOCK_U64 * PAGE_SIZE_U64) >> 40;
    format!("{}.{}", tenths / 10, tenths % 10)
}

impl WriteError {
    /// Returns whether a file of the base is damaged.
    pub fn is_base_damage(&self) -> bool {
        match self {
            Self::Base(error) => error.is_damage(),
            Self::BaseFrame(error) => error.is_damage(),
            _ => false,
        }
    }

    /// Creates a [`WriteError::Argument`] with a displayable value.
    pub(crate) fn argument(
        what: &'static str,
        value: impl std::fmt::Display,
        accepted: &'static str,
    ) -> Self {
        Self::Argument {
            what,
            value: format!("{value}"),
            accepted,
        }
    }

    /// Refuses a value above its limit.
    pub(crate) fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), Self> {
        if value > limit {
            Err(Self::Limit { what, value, limit })
        } else {
            Ok(())
        }
    }
}
