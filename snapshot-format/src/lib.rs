//! The snaprestore file format: its layout on disk, and its reader, writer and verifier.
//!
//! A snapshot holds the memory of a microVM or of processes, compressed in small frames that can
//! be decoded in any order. `FORMAT.md` beside this crate is normative.
//!
//! # Reading
//!
//! [`Snapshot`] says what a page is, [`FrameDecoder`] decodes the frame that it lies in:
//!
//! ```no_run
//! use snapshot_format::layout::PAGE_SIZE;
//! use snapshot_format::{FrameDecoder, Page, Reason, Snapshot};
//!
//! let snapshot = Snapshot::open_path("guest.snap")?;
//! let mut decoder = FrameDecoder::new();
//! match snapshot.look_up(4711, Reason::Demand)? {
//!     Page::Fill(word) => println!("repeats {word:#x}"),
//!     Page::Stored { frame, slot } => {
//!         let mut pages = vec![0; frame.decoded_len()];
//!         decoder.decode(&snapshot, &frame, Reason::Demand, &mut pages)?;
//!         let page = &pages[usize::from(slot) * PAGE_SIZE..][..PAGE_SIZE];
//!         println!("begins with {:02x?}", &page[..8]);
//!     }
//!     Page::Unavailable => println!("could not be read when the snapshot was taken"),
//!     Page::Unused => println!("no page has this number"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Every file is taken for hostile: a length, offset or number is checked against the file and a
//! named limit before it is used, and no byte is interpreted whose checksum is not right. Nothing
//! is mapped. Errors tell damage from failure (`is_damage`).
//!
//! # Writing
//!
//! [`Writer`] takes pages in order and writes a snapshot in one pass to anything that implements
//! [`std::io::Write`]; [`SnapshotFile`] is a file that gets its name when all of it is on disk.
//!
//! # Layers
//!
//! A snapshot can be the child of another, the base: [`WriterOptions::base`]. It stores only what
//! differs and refers to the files of its ancestors for the rest. [`Snapshot::open_path`] finds
//! them beside the child, [`LayerFolders`] in other folders, and [`Ancestors`] anywhere.
//!
//! # Verifying
//!
//! [`verify()`] reads everything and reports everything that is wrong.

#![forbid(unsafe_code)]

pub mod dictionary;
pub mod digest;
mod error;
mod file;
mod frame;
mod index;
pub mod layout;
pub mod names;
mod open;
mod sections;
mod snapshot;
mod store;
mod types;
mod verify;
mod writer;

pub use digest::Digest;
pub use error::{Defect, FrameError, OpenError, Part, ReadError};
pub use file::{FileError, SnapshotFile, is_unsupported};
pub use frame::{Codec, FrameRef, ListedPages, ListedRun};
pub use index::{IndexBlock, Page, Top};
pub use sections::is_blob_name;
pub use snapshot::{
    Ancestor, Ancestors, FrameDecoder, Layer, LayerFolders, Snapshot, SnapshotOptions,
};
pub use store::{FileStore, MemoryStore, Reason, Store};
pub use types::{
    Attachment, DictionaryInfo, FillRun, Region, SnapshotId, Summary, WorkingSet, WorkingSetRun,
};
pub use verify::{
    MAX_PROBLEMS, Problem, Report, VerifyCallback, VerifyError, VerifyOptions, VerifyProgress,
    verify,
};
pub use writer::{Dictionary, Progress, RegionSpec, WriteError, Writer, WriterOptions, Written};
