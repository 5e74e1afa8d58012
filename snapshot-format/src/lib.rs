//! The snaprestore file format.
#![forbid(unsafe_code)]

pub mod digest;
pub mod layout;
mod store;
mod types;

pub use digest::Digest;
pub use store::{FileStore, MemoryStore, Reason, Store};
pub use types::{
    Attachment, DictionaryInfo, FillRun, Region, SnapshotId, Summary, WorkingSet, WorkingSetRun,
};
