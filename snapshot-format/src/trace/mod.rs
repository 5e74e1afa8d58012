//! Traces: the pages that an owner touched after a restore, in order of first touch.
//!
//! A trace is bound to the content of the memory, not to a file: it fits a child, the same chain
//! flattened, and the file that was optimized with it. "Traces" in `FORMAT.md` describes the file.
//!
//! ```text
//! record ──▶ Trace ──▶ file ──▶ Trace ─┬─▶ merge ──▶ pages in order of need ──▶ optimize
//!                                      └─▶ compare
//! ```
//!
//! ```
//! use std::time::{Duration, SystemTime};
//!
//! use snapshot_format::trace::{MergeOptions, Touch, TouchReason, Trace, TraceEnd, merge};
//!
//! let touch = |page| Touch { page, at: Duration::ZERO, reason: TouchReason::Demand };
//! let trace = |pages: [u64; 2]| Trace {
//!     content_digest: [7; 32],
//!     page_slots: 512,
//!     begun: SystemTime::UNIX_EPOCH,
//!     present_at_start: 0,
//!     end: TraceEnd::Settled,
//!     touches: pages.map(touch).into(),
//! };
//! let traces = [trace([5, 1]), trace([1, 9]), trace([5, 3])];
//! assert_eq!(Trace::from_bytes(&traces[0].to_bytes())?, traces[0]);
//! assert_eq!(merge(&traces, &MergeOptions::default()), [5, 1]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod merge;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use zerocopy::{FromBytes, IntoBytes};

pub use self::merge::{Comparison, MergeOptions, compare, merge};
use crate::digest::{Digest, hex};
use crate::error::{Defect, Flaw};
use crate::file::{FileError, SnapshotFile};
use crate::layout::{
    MAX_PAGES, MAX_TRACE_TOUCHES, PAGES_PER_BLOCK_U64, RawTraceHeader, RawTraceTouch, TRACE_MAGIC,
    TRACE_VERSION, touch_reason, trace_end,
};
use crate::names::escape_path;
use crate::snapshot::Snapshot;
use crate::store::{FileStore, Reason, Store as _};

/// The extension of the names of trace files.
pub const FILE_EXTENSION: &str = "trace";

const HEADER_BYTES: usize = size_of::<RawTraceHeader>();
const TOUCH_BYTES: usize = size_of::<RawTraceTouch>();
const CRC_BYTES: usize = 4;
const MIN_BYTES: u64 = (HEADER_BYTES + CRC_BYTES) as u64;

/// A recording of first touches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Content digest of the memory.
    pub content_digest: Digest,
    /// [`Snapshot::page_slots`] of the memory: all pages are below it.
    pub page_slots: u64,
    /// The time at which the recording began. Stored in nanoseconds since 1970; earlier times
    /// become 1970.
    pub begun: SystemTime,
    /// Number of pages that were present when the recording began. Their touches are not seen.
    pub present_at_start: u64,
    /// The reason for which the recording ended.
    pub end: TraceEnd,
    /// The touches, in order. No page comes twice.
    pub touches: Vec<Touch>,
}

/// The reason for which a recording ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TraceEnd {
    /// The caller stopped it.
    Stopped,
    /// The rate of first touches had settled.
    Settled,
    /// The time limit was reached.
    TimeLimit,
    /// The limit of pages was reached.
    PageLimit,
    /// All pages were present.
    Completed,
    /// The owner exited or unmapped its memory.
    OwnerEnded,
    /// The trace was merged from others.
    Merged,
}

impl TraceEnd {
    /// All reasons.
    pub const ALL: [Self; 7] = [
        Self::Stopped,
        Self::Settled,
        Self::TimeLimit,
        Self::PageLimit,
        Self::Completed,
        Self::OwnerEnded,
        Self::Merged,
    ];

    /// Returns the name in JSON output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Settled => "settled",
            Self::TimeLimit => "time-limit",
            Self::PageLimit => "page-limit",
            Self::Completed => "completed",
            Self::OwnerEnded => "owner-ended",
            Self::Merged => "merged",
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::Stopped => trace_end::STOPPED,
            Self::Settled => trace_end::SETTLED,
            Self::TimeLimit => trace_end::TIME_LIMIT,
            Self::PageLimit => trace_end::PAGE_LIMIT,
            Self::Completed => trace_end::COMPLETED,
            Self::OwnerEnded => trace_end::OWNER_ENDED,
            Self::Merged => trace_end::MERGED,
        }
    }
}

impl fmt::Display for TraceEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped by request",
            Self::Settled => "the rate of first touches settled",
            Self::TimeLimit => "time limit reached",
            Self::PageLimit => "page limit reached",
            Self::Completed => "all pages were present",
            Self::OwnerEnded => "the owner ended",
            Self::Merged => "merged from other traces",
        })
    }
}

/// The first touch of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Number of the page.
    pub page: u64,
    /// Time since the recording began. Stored in microseconds; more than 71 minutes become
    /// 2^32 - 1 of them.
    pub at: Duration,
    /// Means by which the touch was seen.
    pub reason: TouchReason,
}

/// Means by which a touch was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TouchReason {
    /// A fault.
    Demand,
    /// Another means: the page was present already, for example because of a prefetch.
    Present,
}

impl TouchReason {
    /// Returns the name in JSON output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Present => "present",
        }
    }
}

/// A trace could not be read, written, or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file could not be read.
    #[error("{file}: cannot be read")]
    Read {
        /// Name of the file.
        file: String,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The file could not be written.
    #[error("{file}: cannot be written")]
    Write {
        /// Name of the file.
        file: String,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The file could not be created or given its name.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file does not begin as traces do.
    #[error("{file}: not a trace: it does not begin with the magic bytes of one")]
    NotATrace {
        /// Name of the file.
        file: String,
    },
    /// The trace is of another version of the format.
    #[error("{file}: trace version {version} is not supported; accepted: {accepted}")]
    UnsupportedVersion {
        /// Name of the file.
        file: String,
        /// Version of the file.
        version: u32,
        /// Version that this reader knows.
        accepted: u32,
    },
    /// The file is not as long as its header says.
    #[error(
        "{file}: {} trace: {bytes} bytes where {expected} are expected",
        if bytes < expected { "truncated" } else { "damaged" }
    )]
    WrongLength {
        /// Name of the file.
        file: String,
        /// Its length.
        bytes: u64,
        /// The length that it must have, or at least have.
        expected: u64,
    },
    /// A part of the trace is wrong.
    #[error("{file}: damaged trace at byte {offset}: {defect}")]
    Damaged {
        /// Name of the file.
        file: String,
        /// Offset of the damage.
        offset: u64,
        /// Description of the damage.
        defect: Defect,
    },
    /// The trace is of other memory.
    #[error(
        "the trace is of content {}, and {file} of {}; record a trace of that content",
        hex(trace),
        hex(snapshot)
    )]
    OtherContent {
        /// Name of the snapshot, or of the other trace.
        file: String,
        /// Content digest of the trace.
        trace: Digest,
        /// Content digest of the snapshot.
        snapshot: Digest,
    },
    /// The trace is of memory of another size.
    #[error(
        "the trace is of memory with {trace} page numbers, and {file} of memory with {snapshot}; \
         record a trace of that memory"
    )]
    OtherSize {
        /// Name of the snapshot, or of the other trace.
        file: String,
        /// Page numbers of the trace's memory.
        trace: u64,
        /// Page numbers of the snapshot.
        snapshot: u64,
    },
    /// There is nothing to merge.
    #[error("no traces to merge; name at least one")]
    NoTraces,
}

impl TraceError {
    /// Returns whether the error means that the file is not, or no longer, a good trace, as opposed
    /// to a failed operation.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::NotATrace { .. } | Self::WrongLength { .. } | Self::Damaged { .. }
        )
    }

    /// Returns whether the file can't be used: it is damaged, or of another version.
    pub fn is_unusable(&self) -> bool {
        self.is_damage() || matches!(self, Self::UnsupportedVersion { .. })
    }
}

impl Trace {
    /// Reads the trace in a file, and checks all of it.
    pub fn read_path(path: impl AsRef<Path>) -> Result<Self, TraceError> {
        let path = path.as_ref();
        let file = escape_path(path);
        let failed = |source| TraceError::Read {
            file: file.clone(),
            source,
        };
        let store = FileStore::open(path).map_err(failed)?;
        let len = store.len().map_err(failed)?;
        // The header decides how much more is read: a file of any length costs nothing to make.
        let mut bytes = vec![0; usize::try_from(len).map_or(HEADER_BYTES, |n| n.min(HEADER_BYTES))];
        let read = |buf: &mut [u8], at| store.read_exact_at(buf, at, Reason::Open);
        read(&mut bytes, 0).map_err(failed)?;
        check_ends(&file, &bytes, len)?;
        bytes.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
        read(&mut bytes[HEADER_BYTES..], HEADER_BYTES as u64).map_err(failed)?;
        Self::parse(&file, &bytes)
    }

    /// Reads a trace from memory, and checks all of it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TraceError> {
        Self::parse("the trace", bytes)
    }

    fn parse(file: &str, bytes: &[u8]) -> Result<Self, TraceError> {
        let header = check_ends(file, bytes, bytes.len() as u64)?;
        let damaged = |flaw: Flaw| TraceError::Damaged {
            file: file.to_owned(),
            offset: flaw.at,
            defect: flaw.defect,
        };
        let (body, crc) = bytes.split_at(bytes.len() - CRC_BYTES);
        let stored = crc.try_into().map_or(0, u32::from_le_bytes);
        let computed = crc32fast::hash(body);
        if stored != computed {
            let at = body.len() as u64;
            let defect = Defect::Checksum { stored, computed };
            return Err(damaged(Flaw::new(at, defect)));
        }
        let mut trace = check_header(header).map_err(damaged)?;
        let touches = <[RawTraceTouch]>::ref_from_bytes(&body[HEADER_BYTES..]).unwrap_or(&[]);
        for (at, raw) in touches.iter().enumerate() {
            trace.touches.push(check_touch(at, raw).map_err(damaged)?);
        }
        trace.check_pages().map_err(damaged)?;
        Ok(trace)
    }

    /// Returns the bytes of the trace's file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let since_1970 = self.begun.duration_since(SystemTime::UNIX_EPOCH);
        let begun = since_1970.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        let header = RawTraceHeader {
            magic: TRACE_MAGIC,
            version: TRACE_VERSION.into(),
            flags: 0.into(),
            content_digest: self.content_digest,
            page_slots: self.page_slots.into(),
            begun: begun.into(),
            present_at_start: self.present_at_start.into(),
            count: (self.touches.len() as u64).into(),
            end: self.end.number().into(),
            reserved: [0; 44],
        };
        let len = HEADER_BYTES + self.touches.len() * TOUCH_BYTES + CRC_BYTES;
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(header.as_bytes());
        for touch in &self.touches {
            let raw = RawTraceTouch {
                page: touch.page.into(),
                at: u32::try_from(touch.at.as_micros())
                    .unwrap_or(u32::MAX)
                    .into(),
                reason: match touch.reason {
                    TouchReason::Demand => touch_reason::DEMAND,
                    TouchReason::Present => touch_reason::PRESENT,
                },
                reserved: [0; 3],
            };
            bytes.extend_from_slice(raw.as_bytes());
        }
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Returns an error if a reader would refuse the trace, which is called `name` in the error.
    pub fn check(&self, name: &str) -> Result<(), TraceError> {
        let (len, limit) = (self.touches.len() as u64, MAX_TRACE_TOUCHES);
        let checked = check_limit("count", 72, len, limit).and_then(|()| self.check_pages());
        checked.map_err(|flaw| TraceError::Damaged {
            file: name.to_owned(),
            offset: flaw.at,
            defect: flaw.defect,
        })
    }

    /// Writes the trace to a file, which gets its name when all of it is on disk. With `force` it
    /// replaces a file that exists. A trace that a reader would refuse is an error.
    pub fn write_path(&self, path: impl AsRef<Path>, force: bool) -> Result<(), TraceError> {
        let path = path.as_ref();
        self.check(&escape_path(path))?;
        let mut file = SnapshotFile::create(path, force)?;
        file.write_all(&self.to_bytes())
            .map_err(|source| TraceError::Write {
                file: escape_path(path),
                source,
            })?;
        file.commit()?;
        Ok(())
    }

    /// Returns the pages, in order of first touch.
    pub fn pages(&self) -> Vec<u64> {
        self.touches.iter().map(|touch| touch.page).collect()
    }

    /// Returns an error unless the trace is of the content of `snapshot`.
    pub fn check_matches(&self, snapshot: &Snapshot) -> Result<(), TraceError> {
        let there = (
            snapshot.summary().content_digest,
            snapshot.page_slots(),
            snapshot.name(),
        );
        self.check_same(there)
    }

    /// Returns an error unless the trace is of the same content as `other`, which is called `name`
    /// in the error.
    pub fn check_same_memory(&self, other: &Self, name: &str) -> Result<(), TraceError> {
        self.check_same((other.content_digest, other.page_slots, name))
    }

    fn check_same(&self, (digest, slots, name): (Digest, u64, &str)) -> Result<(), TraceError> {
        if self.content_digest != digest {
            return Err(TraceError::OtherContent {
                file: name.to_owned(),
                trace: self.content_digest,
                snapshot: digest,
            });
        }
        if self.page_slots != slots {
            return Err(TraceError::OtherSize {
                file: name.to_owned(),
                trace: self.page_slots,
                snapshot: slots,
            });
        }
        Ok(())
    }

    /// Refuses pages beyond the memory, and pages that come twice.
    fn check_pages(&self) -> Result<(), Flaw> {
        check_limit("page_slots", 48, self.page_slots, MAX_PAGES)?;
        check_limit(
            "present_at_start",
            64,
            self.present_at_start,
            self.page_slots,
        )?;
        let mut seen = HashSet::new();
        for (number, touch) in self.touches.iter().enumerate() {
            let at = offset_of_touch(number);
            if touch.page >= self.page_slots {
                let accepted = format!("below {}", self.page_slots);
                return Err(Flaw::new(at, Defect::value("page", touch.page, accepted)));
            }
            if !seen.insert(touch.page) {
                let accepted = "each page once";
                return Err(Flaw::new(at, Defect::value("page", touch.page, accepted)));
            }
        }
        Ok(())
    }
}

fn offset_of_touch(number: usize) -> u64 {
    (HEADER_BYTES + number * TOUCH_BYTES) as u64
}

fn check_limit(field: &'static str, at: u64, value: u64, limit: u64) -> Result<(), Flaw> {
    if value <= limit {
        return Ok(());
    }
    let defect = Defect::TooLarge {
        field,
        value,
        limit,
    };
    Err(Flaw::new(at, defect))
}

/// Checks magic, version, and that a file of `len` bytes that begins with `bytes` is as long as its
/// header says.
fn check_ends<'a>(file: &str, bytes: &'a [u8], len: u64) -> Result<&'a RawTraceHeader, TraceError> {
    let file = || file.to_owned();
    let begun = bytes.len().min(TRACE_MAGIC.len());
    if begun == 0 || bytes[..begun] != TRACE_MAGIC[..begun] {
        return Err(TraceError::NotATrace { file: file() });
    }
    let wrong_length = |expected| TraceError::WrongLength {
        file: file(),
        bytes: len,
        expected,
    };
    let (header, _) =
        RawTraceHeader::ref_from_prefix(bytes).map_err(|_| wrong_length(MIN_BYTES))?;
    let version = header.version.get();
    if version != TRACE_VERSION {
        return Err(TraceError::UnsupportedVersion {
            file: file(),
            version,
            accepted: TRACE_VERSION,
        });
    }
    let count = header.count.get();
    check_limit("count", 72, count, MAX_TRACE_TOUCHES).map_err(|flaw| TraceError::Damaged {
        file: file(),
        offset: flaw.at,
        defect: flaw.defect,
    })?;
    let expected = MIN_BYTES + count * TOUCH_BYTES as u64;
    if len != expected {
        return Err(wrong_length(expected));
    }
    Ok(header)
}

/// Checks the header of a trace of which magic, version, length and CRC are right.
fn check_header(header: &RawTraceHeader) -> Result<Trace, Flaw> {
    if header.flags.get() != 0 {
        return Err(Flaw::new(12, Defect::Reserved { field: "flags" }));
    }
    if header.reserved != [0; 44] {
        return Err(Flaw::new(84, Defect::Reserved { field: "reserved" }));
    }
    if !header.page_slots.get().is_multiple_of(PAGES_PER_BLOCK_U64) {
        let (value, accepted) = (header.page_slots.get(), "multiples of 512");
        return Err(Flaw::new(48, Defect::value("page_slots", value, accepted)));
    }
    let end = header.end.get();
    let known = TraceEnd::ALL
        .into_iter()
        .find(|known| known.number() == end);
    let end = known.ok_or_else(|| Flaw::new(80, Defect::value("end", end, "1 to 7")))?;
    Ok(Trace {
        content_digest: header.content_digest,
        page_slots: header.page_slots.get(),
        begun: SystemTime::UNIX_EPOCH + Duration::from_nanos(header.begun.get()),
        present_at_start: header.present_at_start.get(),
        end,
        touches: Vec::new(),
    })
}

fn check_touch(number: usize, raw: &RawTraceTouch) -> Result<Touch, Flaw> {
    let at = offset_of_touch(number);
    if raw.reserved != [0; 3] {
        return Err(Flaw::new(at + 13, Defect::Reserved { field: "reserved" }));
    }
    let reason = match raw.reason {
        touch_reason::DEMAND => TouchReason::Demand,
        touch_reason::PRESENT => TouchReason::Present,
        other => {
            let defect = Defect::value("reason", other, "0 or 1");
            return Err(Flaw::new(at + 12, defect));
        }
    };
    Ok(Touch {
        page: raw.page.get(),
        at: Duration::from_micros(raw.at.get().into()),
        reason,
    })
}
