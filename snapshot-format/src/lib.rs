//! The snaprestore file format.
#![forbid(unsafe_code)]

pub mod digest;
mod error;
mod frame;
mod index;
pub mod layout;
mod open;
mod sections;
mod snapshot;
mod store;
mod types;
mod verify;

pub use digest::Digest;
pub use error::{Defect, FrameError, OpenError, Part, ReadError};
pub use frame::{Codec, FrameDecoder, FrameRef, ListedPages, ListedRun};
pub use index::{IndexBlock, Page, Top};
pub use snapshot::{Snapshot, SnapshotOptions};
pub use store::{FileStore, MemoryStore, Reason, Store};
pub use types::{
    Attachment, DictionaryInfo, FillRun, Region, SnapshotId, Summary, WorkingSet, WorkingSetRun,
};
pub use verify::{
    MAX_PROBLEMS, Problem, Report, VerifyCallback, VerifyError, VerifyOptions, VerifyProgress,
    verify,
};
