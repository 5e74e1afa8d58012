//! Reads, writes and verifies snapshots of memory: small checksummed files with random access.
//!
//! A snapshot holds the memory of a microVM or of processes, compressed in small frames that can be
//! decoded in any order. Every byte is verified before it is returned. `FORMAT.md` in this package
//! is the normative description of the file.
//!
//! ```text
//!  pages ──▶ Writer ──▶ ┌────────┬─────────────────────────────┬─────────┬───────────┬─────────┐
//!                       │ header │ frames, index blocks, blobs │ regions │ top table │ trailer │
//!                       └────────┴─────────────────────────────┴─────────┴───────────┴─────────┘
//!                                        ▲       ▲                 one read opens the file ▲
//!  Snapshot::open ───────────────────────┼───────┼─────────────────────────────────────────┘
//!  Snapshot::look_up ────────────────────┼───────┘  at most one read of 16 KiB
//!  FrameDecoder::decode ─────────────────┘          one read, up to 512 pages
//! ```
//!
//! # Example
//!
//! Writes a snapshot of four pages to memory, and reads one of them back. A file is written with
//! [`SnapshotFile`] and opened with [`Snapshot::open_path`].
//!
//! ```
//! use std::sync::Arc;
//!
//! use snapshot_format::layout::PAGE_SIZE;
//! use snapshot_format::{
//!     FrameDecoder, MemoryStore, Page, Reason, RegionSpec, Snapshot, Writer, WriterOptions,
//! };
//!
//! let text = b"it was a dark and stormy night".repeat(1000);
//! let mut writer = Writer::new(Vec::new(), WriterOptions::default())?;
//! writer.begin_region(&RegionSpec { name: "ram".into(), ..RegionSpec::default() })?;
//! writer.write_pages(&text[..2 * PAGE_SIZE])?;
//! writer.write_fill(2, 0)?;
//! let (file, written) = writer.finish()?;
//! assert_eq!((written.summary.stored_pages, written.summary.zero_pages), (2, 2));
//!
//! let snapshot = Snapshot::open(Arc::new(MemoryStore::new(file)))?;
//! assert_eq!(snapshot.look_up(3, Reason::Demand)?, Page::Fill(0));
//! let Page::Stored { frame, slot } = snapshot.look_up(1, Reason::Demand)? else {
//!     panic!("page 1 is stored in a frame");
//! };
//! let mut decoder = FrameDecoder::new();
//! let mut pages = vec![0; frame.decoded_len()];
//! decoder.decode(&snapshot, &frame, Reason::Demand, &mut pages)?;
//! let page = &pages[usize::from(slot) * PAGE_SIZE..][..PAGE_SIZE];
//! assert_eq!(page, &text[PAGE_SIZE..2 * PAGE_SIZE]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # A child
//!
//! Writes a base and a child of it, in which one page differs, to files in one folder, and reads
//! the child.
//!
//! ```
//! use std::sync::Arc;
//!
//! use snapshot_format::layout::PAGE_SIZE;
//! use snapshot_format::{
//!     FrameDecoder, Page, Reason, RegionSpec, Snapshot, SnapshotFile, Writer, WriterOptions,
//! };
//!
//! let folder = tempfile::tempdir()?;
//! let (base_path, child_path) = (folder.path().join("base"), folder.path().join("child"));
//! let text = b"it was a dark and stormy night".repeat(1000);
//! let file = SnapshotFile::create(&base_path, false)?;
//! let mut writer = Writer::new(file, WriterOptions::default())?;
//! writer.begin_region(&RegionSpec { name: "ram".into(), ..RegionSpec::default() })?;
//! writer.write_pages(&text[..3 * PAGE_SIZE])?;
//! writer.finish()?.0.commit()?;
//!
//! let base = Arc::new(Snapshot::open_path(&base_path)?);
//! let region = &base.regions()[0];
//! let options = WriterOptions { base: Some(Arc::clone(&base)), ..WriterOptions::default() };
//! let mut writer = Writer::new(SnapshotFile::create(&child_path, false)?, options)?;
//! writer.begin_region(&RegionSpec {
//!     name: region.name.clone(),
//!     base_page: Some(region.first_page),
//!     ..RegionSpec::default()
//! })?;
//! writer.write_from_base(2)?;
//! writer.write_pages(&text[5 * PAGE_SIZE..6 * PAGE_SIZE])?;
//! let (file, written) = writer.finish()?;
//! file.commit()?;
//! assert_eq!(written.ancestor_pages, 2);
//!
//! // The base is found beside the child.
//! let child = Snapshot::open_path(&child_path)?;
//! assert_eq!(child.ancestors()[0].id(), base.id());
//! let mut decoder = FrameDecoder::new();
//! for (number, expected) in [(0, 0), (1, 1), (2, 5)] {
//!     let Page::Stored { frame, slot } = child.look_up(number, Reason::Demand)? else {
//!         panic!("page {number} is stored in a frame");
//!     };
//!     let mut pages = vec![0; frame.decoded_len()];
//!     decoder.decode(&child, &frame, Reason::Demand, &mut pages)?;
//!     let page = &pages[usize::from(slot) * PAGE_SIZE..][..PAGE_SIZE];
//!     assert_eq!(page, &text[expected * PAGE_SIZE..][..PAGE_SIZE]);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where to start
//!
//! | to | use |
//! | --- | --- |
//! | read pages | [`Snapshot`], [`Page`], [`FrameDecoder`] |
//! | read from something other than a file | the trait [`Store`] |
//! | write a snapshot in one pass, to anything that implements [`std::io::Write`] | [`Writer`] |
//! | write a file that gets its name when all of it is on disk | [`SnapshotFile`] |
//! | name the base of a child to write | [`WriterOptions::base`], [`RegionSpec::base_page`] |
//! | leave out pages that are as in the base | [`Writer::write_from_base`] |
//! | say where ancestors are found | [`SnapshotOptions::ancestors`], [`LayerFolders`] |
//! | make one file of a chain, or change a base | [`flatten`], [`rebase`] |
//! | put the pages that are needed first to the front of a file | [`optimize`] |
//! | read, merge and compare recordings of first touches | [`trace`] |
//! | read everything, and report everything that is wrong | [`verify()`] |
//! | know what the fields on disk mean | [`layout`], `FORMAT.md` |
//!
//! # Hostile files
//!
//! Every file is assumed to be hostile. A length, offset or count is checked against the file and a
//! named limit before it is used, and no byte is interpreted before its checksum has been verified.
//! Files are read, never mapped. Errors distinguish a damaged file from a failed read
//! ([`ReadError::is_damage`]).
//!
//! # Layers
//!
//! A snapshot can be the child of another, the base: [`WriterOptions::base`]. It stores only what
//! differs and refers to the files of its ancestors for the rest. [`Snapshot::open_path`] finds
//! them beside the child, [`LayerFolders`] in other folders, and [`Ancestors`] anywhere.
//! [`flatten`] makes one file of a chain, and [`rebase`] gives a child another base.
//!
//! # Features
//!
//! The crate has no optional features. It runs on Linux and has no `unsafe` code.

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
pub mod trace;
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
    AllowMissing, Ancestor, Ancestors, FrameDecoder, Layer, LayerFolders, MAX_READ_AHEAD, Snapshot,
    SnapshotOptions,
};
pub use store::{FileStore, MemoryStore, Reason, Store};
pub use types::{
    Attachment, DictionaryInfo, FillRun, Region, SnapshotId, Summary, WorkingSet, WorkingSetRun,
};
pub use verify::{
    MAX_PROBLEMS, Problem, Report, VerifyCallback, VerifyError, VerifyOptions, VerifyProgress,
    verify,
};
pub use writer::{
    BaseDamage, DEFAULT_WORKING_SET, Dictionary, OptimizeOptions, Optimized, Progress, RegionSpec,
    RewriteOptions, Rewritten, WorkingSetStats, WriteError, Writer, WriterOptions, Written,
    flatten, optimize, rebase,
};
