//! A queue between the thread that reads a stopped process and the writer of the snapshot.
//!
//! ```text
//!   reader ──chunks──▶ 16 MiB of memory, then a temporary file ──chunks──▶ writer
//! ```
//!
//! The process is stopped until the last chunk is in the queue, not until it is compressed and
//! written. The reader waits for the writer only if there is no room in the file either, and not
//! forever: the writer may be blocked on the stopped process. The file has no name, so it
//! disappears when this process exits, however it exits. Chunks that were taken from it are punched
//! out, so that in most cases hardly any of it reaches the disk.
//!
//! The file is created before the process is stopped, and if possible on a file system that no
//! process serves.
//!
//! The writer begins when everything is read, when there is no room for more, or when
//! [`HEAD_START`] bytes are in the file. Earlier, its compression threads would take the processors
//! from the reader while the process is stopped.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::{
    AFS_SUPER_MAGIC, CODA_SUPER_MAGIC, FUSE_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC,
    statfs,
};
use nix::sys::statvfs::fstatvfs;

use super::super::{CHUNK, PAGE, Region, Sink};
use super::backing::Served;

/// Maximum number of chunks that are kept in memory.
const MAX_CHUNKS_IN_MEMORY: usize = 16;
/// Number of bytes in the file at which the writer begins. With many more, the kernel would start
/// to write them to the disk, and the reader would have to wait for that.
const HEAD_START: u64 = 2 << 30;
/// Interval at which a reader that waits for room checks whether to stop.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Maximum time for which the writer may take nothing while the reader waits for room.
const ROOM_TIMEOUT: Duration = Duration::from_secs(60);

/// Folders in which a spool may put its file: the first one that works is used.
#[derive(Debug)]
pub(crate) struct Place {
    folders: Vec<Folder>,
}

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// Whether the snapshot is written there too, and needs room.
    is_shared: bool,
}

impl Place {
    /// Returns the folder of `target`, unless the target is a stream, followed by a folder for
    /// large temporary files.
    pub(crate) fn beside(target: Option<&Path>) -> Self {
        let beside = target.map(|target| {
            let parent = target.parent().filter(|parent| *parent != Path::new(""));
            Folder {
                path: parent.unwrap_or(Path::new(".")).into(),
                is_shared: true,
            }
        });
        let given = std::env::var_os("TMPDIR").map(PathBuf::from);
        let temporary = Folder {
            // Often on a disk, while /tmp is memory.
            path: given.unwrap_or_else(|| "/var/tmp".into()),
            is_shared: false,
        };
        Self {
            folders: beside.into_iter().chain([temporary]).collect(),
        }
    }

    /// Creates a file without a name, and returns whether it shares its room with the snapshot. A
    /// file system that a process may serve is the last resort, and is not used if the process to
    /// be stopped serves any (`served`).
    fn file(&self, served: &Served) -> Option<(File, bool)> {
        let (apart, last_resort): (Vec<_>, Vec<_>) = self
            .folders
            .iter()
            .partition(|folder| !may_be_served(&folder.path));
        let last_resort = last_resort.into_iter().filter(|_| served.is_empty());
        apart.into_iter().chain(last_resort).find_map(|folder| {
            let file = tempfile::tempfile_in(&folder.path).ok()?;
            Some((file, folder.is_shared))
        })
    }
}

/// Returns whether files in the folder may depend on a process: a FUSE server, or a server of
/// network files on this machine.
fn may_be_served(folder: &Path) -> bool {
    const CEPH_SUPER_MAGIC: FsType = FsType(0x00c3_6400);
    const CIFS_SUPER_MAGIC: FsType = FsType(0xff53_4d42);
    const SMB2_SUPER_MAGIC: FsType = FsType(0xfe53_4d42);
    const V9FS_SUPER_MAGIC: FsType = FsType(0x0102_1997);
    let kinds = [
        AFS_SUPER_MAGIC,
        CEPH_SUPER_MAGIC,
        CIFS_SUPER_MAGIC,
        CODA_SUPER_MAGIC,
        FUSE_SUPER_MAGIC,
        NFS_SUPER_MAGIC,
        SMB2_SUPER_MAGIC,
        SMB_SUPER_MAGIC,
        V9FS_SUPER_MAGIC,
    ];
    statfs(folder).is_ok_and(|about| kinds.contains(&about.filesystem_type()))
}

/// The queue. One thread fills it through a [`Filler`], another empties it.
#[derive(Debug)]
pub(super) struct Spool {
    state: Mutex<State>,
    changed: Condvar,
    file: Option<File>,
    /// Whether the snapshot needs room on the same file system.
    is_shared: bool,
    /// Maximum length of a file (`RLIMIT_FSIZE`).
    longest: u64,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Chunk>,
    in_memory: usize,
    /// Offset of the next chunk in the file.
    file_end: u64,
    /// Number of bytes that the file takes, and the maximum.
    file_bytes: u64,
    file_limit: u64,
    /// Value of [`HEAD_START`], and whether the writer may begin.
    head_start: u64,
    has_begun: bool,
    /// Value of [`ROOM_TIMEOUT`].
    room_timeout: Duration,
    /// Buffers for reuse.
    spare: Vec<Vec<u8>>,
    /// Whether the writer has stopped taking chunks.
    closed: bool,
    /// Whether the reader has delivered its last chunk.
    ended: bool,
}

#[derive(Debug)]
enum Chunk {
    Memory(Vec<u8>),
    File { offset: u64, len: usize },
}

impl Spool {
    /// Creates a queue for the memory of a process that is still running. If no file can be
    /// created, the queue has none.
    pub(super) fn new(place: &Place, served: &Served) -> Self {
        let (file, is_shared) = place.file(served).unzip();
        let limit = file.as_ref().map_or(0, |file| {
            let Ok(about) = fstatvfs(file) else { return 0 };
            let free = about
                .blocks_available()
                .saturating_mul(about.fragment_size());
            free / 2
        });
        Self {
            state: Mutex::new(State {
                file_limit: limit,
                head_start: HEAD_START,
                room_timeout: ROOM_TIMEOUT,
                ..State::default()
            }),
            changed: Condvar::new(),
            file,
            is_shared: is_shared.unwrap_or(false),
            longest: getrlimit(Resource::RLIMIT_FSIZE).map_or(0, |(soft, _)| soft),
        }
    }

    /// Reserves room for a snapshot of memory of which at most `bytes` bytes are not zero. The
    /// snapshot may become as large as that, and must not lack room because of the file.
    pub(super) fn leave_room(&self, bytes: u64) {
        if self.is_shared {
            let mut state = self.lock();
            state.file_limit = state.file_limit.saturating_sub(bytes / 2);
        }
    }

    /// Locks the state, also after a panic: it is consistent after every statement.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the reader's next call fail, since nobody takes its chunks any more.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Puts a chunk into the queue and returns a buffer for the next. `check` is called while there
    /// is no room; if it fails, so does this.
    fn push(&self, chunk: Vec<u8>, check: &dyn Fn() -> Result<()>) -> Result<Vec<u8>> {
        let mut state = self.lock();
        let mut waited = Duration::ZERO;
        loop {
            if state.closed {
                bail!("the reader of the memory is gone");
            }
            if state.in_memory < MAX_CHUNKS_IN_MEMORY {
                state.in_memory += 1;
                state.queue.push_back(Chunk::Memory(chunk));
                break;
            }
            let (offset, len) = (state.file_end, chunk.len());
            if let Some(file) = &self.file
                && state.file_bytes + len as u64 <= state.file_limit
                && offset + len as u64 <= self.longest
            {
                drop(state);
                let written = file.write_all_at(&chunk, offset);
                state = self.lock();
                if written.is_ok() {
                    state.file_bytes += len as u64;
                    state.file_end = offset + len as u64;
                    state.queue.push_back(Chunk::File { offset, len });
                    state.has_begun |= state.file_end >= state.head_start;
                    state.spare.push(chunk);
                    break;
                }
                // The disk is full, so the reader waits from now on.
                state.file_limit = 0;
                continue;
            }
            if waited >= state.room_timeout {
                bail!(
                    "the process was let go before all its memory was read: there was no room for \
                     it, and for {} s the output took nothing (does it need the process?); write \
                     to a file, and set TMPDIR to a folder on a local disk with room",
                    waited.as_secs()
                );
            }
            state.has_begun = true;
            self.changed.notify_all();
            let woken = self.changed.wait_timeout(state, LOOK_INTERVAL);
            let (unlocked, woken) = woken.unwrap_or_else(PoisonError::into_inner);
            drop(unlocked);
            if woken.timed_out() {
                // Excludes time in which this process was stopped.
                waited += LOOK_INTERVAL;
            }
            check()?;
            state = self.lock();
        }
        self.changed.notify_all();
        let mut buffer = state.spare.pop().unwrap_or_default();
        buffer.clear();
        Ok(buffer)
    }

    /// Tells the writer that no more chunks follow.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Delivers everything to `sink`, until the reader has ended.
    pub(super) fn empty(&self, sink: &mut dyn Sink) -> Result<()> {
        while let Some(chunk) = self.pop()? {
            deliver(&chunk, sink)?;
            let mut state = self.lock();
            if state.spare.len() < 2 {
                state.spare.push(chunk);
            }
        }
        Ok(())
    }

    /// Returns the next chunk, or `None` if the reader has ended.
    fn pop(&self) -> Result<Option<Vec<u8>>> {
        let mut state = self.lock();
        let next = loop {
            if (state.has_begun || state.ended)
                && let Some(next) = state.queue.pop_front()
            {
                break next;
            }
            if state.ended {
                return Ok(None);
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        };
        let chunk = match next {
            Chunk::Memory(chunk) => {
                state.in_memory -= 1;
                chunk
            }
            Chunk::File { offset, len } => {
                let mut chunk = state.spare.pop().unwrap_or_default();
                drop(state);
                chunk.resize(len, 0);
                let Some(file) = &self.file else {
                    unreachable!("a chunk was put there");
                };
                file.read_exact_at(&mut chunk, offset)
                    .context("reading back what was read of the process")?;
                let place = (i64::try_from(offset)?, i64::try_from(len)?);
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
                let punch = punch | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let punched = fallocate(file.as_fd(), punch, place.0, place.1);
                let mut state = self.lock();
                if punched.is_ok() {
                    state.file_bytes -= len as u64;
                }
                drop(state);
                self.changed.notify_all();
                return Ok(Some(chunk));
            }
        };
        drop(state);
        self.changed.notify_all();
        Ok(Some(chunk))
    }
}

/// Kinds of records in a chunk. A record is a letter, a number, and the data for it.
const REGION: u8 = b'R';
const PAGES: u8 = b'P';
const ZEROS: u8 = b'Z';
const UNAVAILABLE: u8 = b'U';

/// Minimum room in a chunk for it to take more pages.
const MIN_ROOM: usize = 64 << 10;

/// The reader's end of a [`Spool`].
pub(super) struct Filler<'a> {
    spool: &'a Spool,
    chunk: Vec<u8>,
    /// Function that is called now and then; its error ends the reading.
    check: &'a dyn Fn() -> Result<()>,
}

impl<'a> Filler<'a> {
    pub(super) fn new(spool: &'a Spool, check: &'a dyn Fn() -> Result<()>) -> Self {
        Self {
            spool,
            chunk: Vec::new(),
            check,
        }
    }

    fn record(&mut self, kind: u8, number: u64) -> Result<()> {
        if self.chunk.len() >= CHUNK {
            self.flush()?;
        }
        self.chunk.push(kind);
        self.chunk.extend(number.to_le_bytes());
        Ok(())
    }

    pub(super) fn region(&mut self, region: &Region) -> Result<()> {
        self.record(REGION, region.start)?;
        let name = region.name.as_bytes();
        for number in [region.flags, region.page_shift, u32::try_from(name.len())?] {
            self.chunk.extend(number.to_le_bytes());
        }
        self.chunk.extend(name);
        Ok(())
    }

    pub(super) fn zeros(&mut self, pages: u64) -> Result<()> {
        self.record(ZEROS, pages)
    }

    pub(super) fn unavailable(&mut self, pages: u64) -> Result<()> {
        self.record(UNAVAILABLE, pages)
    }

    /// Takes the whole pages that `read` fills from the start of a buffer of at most `most` bytes.
    /// Returns the result of `read`.
    pub(super) fn pages(
        &mut self,
        most: u64,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> Result<io::Result<usize>> {
        (self.check)()?;
        if self.chunk.len() + MIN_ROOM > CHUNK {
            self.flush()?;
        }
        let room = (CHUNK - self.chunk.len()) as u64 / PAGE * PAGE;
        let before = self.chunk.len();
        self.record(PAGES, 0)?;
        let start = self.chunk.len();
        let most = usize::try_from(most.min(room))?;
        self.chunk.resize(start + most, 0);
        let filled = read(&mut self.chunk[start..]);
        let pages = match filled {
            Ok(count) => count as u64 / PAGE,
            Err(_) => 0,
        };
        if pages == 0 {
            self.chunk.truncate(before);
        } else {
            self.chunk[before + 1..start].copy_from_slice(&pages.to_le_bytes());
            self.chunk.truncate(start + usize::try_from(pages * PAGE)?);
        }
        Ok(filled)
    }

    /// Passes the unfinished chunk to the writer.
    pub(super) fn flush(&mut self) -> Result<()> {
        let chunk = std::mem::take(&mut self.chunk);
        self.chunk = self.spool.push(chunk, self.check)?;
        Ok(())
    }
}

/// Delivers the records of a chunk to `sink`.
fn deliver(mut chunk: &[u8], sink: &mut dyn Sink) -> Result<()> {
    while let Some((&kind, rest)) = chunk.split_first() {
        chunk = rest;
        let number = u64::from_le_bytes(cut(&mut chunk)?);
        match kind {
            REGION => {
                let [flags, page_shift, name] =
                    [cut(&mut chunk)?, cut(&mut chunk)?, cut(&mut chunk)?].map(u32::from_le_bytes);
                let name = bytes(&mut chunk, u64::from(name))?;
                sink.region(&Region {
                    start: number,
                    flags,
                    page_shift,
                    name: String::from_utf8_lossy(name).into_owned(),
                })?;
            }
            PAGES => sink.pages(bytes(&mut chunk, number * PAGE)?)?,
            ZEROS => sink.zeros(number)?,
            UNAVAILABLE => sink.unavailable(number)?,
            _ => bail!("{DAMAGED}"),
        }
    }
    Ok(())
}

const DAMAGED: &str = "what was read of the process was changed in the temporary file";

fn cut<const N: usize>(chunk: &mut &[u8]) -> Result<[u8; N]> {
    let (first, rest) = chunk.split_first_chunk().context(DAMAGED)?;
    *chunk = rest;
    Ok(*first)
}

fn bytes<'a>(chunk: &mut &'a [u8], count: u64) -> Result<&'a [u8]> {
    let count = usize::try_from(count)?;
    let (first, rest) = chunk.split_at_checked(count).context(DAMAGED)?;
    *chunk = rest;
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::super::super::testing::Recorder;
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn region(name: &str) -> Region {
        Region {
            start: 0x1000,
            flags: 3,
            page_shift: 21,
            name: name.into(),
        }
    }

    /// Fills `spool` with `count` groups of 3 pages: one with data, one unavailable, one zero.
    fn fill(spool: &Spool, count: u32) -> Result<()> {
        let check = || Ok(());
        let mut filler = Filler::new(spool, &check);
        filler.region(&region("[heap]"))?;
        for number in 0..count {
            let read = filler.pages(PAGE, |page| {
                page.fill(u8::try_from(number % 251).unwrap());
                Ok(page.len())
            })?;
            assert_eq!(read.unwrap() as u64, PAGE);
            // A failed read leaves nothing behind.
            let failed = filler.pages(PAGE, |_| Err(io::ErrorKind::Other.into()))?;
            assert!(failed.is_err());
            filler.unavailable(1)?;
            filler.zeros(1)?;
        }
        filler.flush()
    }

    fn assert_all(recorder: &Recorder, count: u32) {
        assert_eq!(recorder.regions[0].0, region("[heap]"));
        for number in 0..count {
            let at = u64::from(number) * 3;
            let byte = u8::try_from(number % 251).unwrap();
            assert_eq!(recorder.page(0, at), Some(vec![byte; 4096]), "{number}");
            assert_eq!(recorder.page(0, at + 1), None);
            assert_eq!(recorder.page(0, at + 2), Some(vec![0; 4096]));
        }
    }

    fn spool_in(folder: impl Into<PathBuf>) -> Spool {
        let place = Place {
            folders: vec![Folder {
                path: folder.into(),
                is_shared: false,
            }],
        };
        Spool::new(&place, &Served::default())
    }

    fn spool() -> Spool {
        spool_in(std::env::temp_dir())
    }

    /// Returns a spool without a file.
    fn spool_in_memory() -> Spool {
        spool_in("/does/not/exist")
    }

    #[test]
    fn reader_ends_before_writer_begins() {
        let spool = spool();
        // More than fits into memory.
        let count = 2 * u32::try_from(MAX_CHUNKS_IN_MEMORY * CHUNK / 4096).unwrap();
        fill(&spool, count).unwrap();
        spool.end();
        assert!(spool.lock().file_bytes > 0);
        let mut recorder = Recorder::default();
        spool.empty(&mut recorder).unwrap();
        assert_all(&recorder, count);
        assert_eq!(
            spool.lock().file_bytes,
            0,
            "the file system can punch holes"
        );
    }

    /// A sink that calls a function whenever it gets a region or pages.
    struct Noting<'a>(&'a dyn Fn());

    impl Sink for Noting<'_> {
        fn region(&mut self, _: &Region) -> Result<()> {
            (self.0)();
            Ok(())
        }

        fn pages(&mut self, _: &[u8]) -> Result<()> {
            (self.0)();
            Ok(())
        }

        fn zeros(&mut self, _: u64) -> Result<()> {
            Ok(())
        }

        fn unavailable(&mut self, _: u64) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn writer_begins_when_all_is_read() {
        let spool = spool();
        let is_read = AtomicBool::new(false);
        let count = 2 * u32::try_from(MAX_CHUNKS_IN_MEMORY * CHUNK / 4096).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                fill(&spool, count).unwrap();
                is_read.store(true, Ordering::SeqCst);
                spool.end();
            });
            let noted = || assert!(is_read.load(Ordering::SeqCst));
            spool.empty(&mut Noting(&noted)).unwrap();
        });
    }

    #[test]
    fn writer_begins_when_the_reader_is_far_ahead() {
        let spool = spool();
        spool.lock().head_start = CHUNK as u64;
        let has_begun = AtomicBool::new(false);
        let count = 2 * u32::try_from(MAX_CHUNKS_IN_MEMORY * CHUNK / 4096).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                fill(&spool, count).unwrap();
                let began = std::time::Instant::now();
                while !has_begun.load(Ordering::SeqCst) && began.elapsed().as_secs() < 60 {
                    std::thread::yield_now();
                }
                let in_time = has_begun.load(Ordering::SeqCst);
                spool.end();
                assert!(in_time, "the writer still waits");
            });
            let noted = || has_begun.store(true, Ordering::SeqCst);
            spool.empty(&mut Noting(&noted)).unwrap();
        });
    }

    #[test]
    fn without_a_file_the_reader_waits_for_the_writer() {
        let spool = spool_in_memory();
        let count = 3 * u32::try_from(MAX_CHUNKS_IN_MEMORY * CHUNK / 4096).unwrap();
        let mut recorder = Recorder::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                fill(&spool, count).unwrap();
                spool.end();
            });
            spool.empty(&mut recorder).unwrap();
        });
        assert_all(&recorder, count);
    }

    #[test]
    fn waiting_reader_notices_that_nobody_writes() {
        let spool = spool_in_memory();
        let count = 3 * u32::try_from(MAX_CHUNKS_IN_MEMORY * CHUNK / 4096).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| fill(&spool, count));
            spool.close();
            assert!(reader.join().unwrap().is_err());
        });
    }

    #[test]
    fn reader_gives_up_on_a_writer_that_is_stuck() {
        let spool = spool_in_memory();
        spool.lock().room_timeout = 2 * LOOK_INTERVAL;
        let count = 3 * u32::try_from(MAX_CHUNKS_IN_MEMORY * CHUNK / 4096).unwrap();
        let error = fill(&spool, count).unwrap_err().to_string();
        assert!(error.contains("the output took nothing"), "{error}");
    }

    #[test]
    fn spool_file_falls_back_to_the_next_folder() {
        let folder = |path: PathBuf, is_shared| Folder { path, is_shared };
        let place = Place {
            folders: vec![
                folder("/does/not/exist".into(), true),
                folder(std::env::temp_dir(), false),
            ],
        };
        let spool = Spool::new(&place, &Served::default());
        assert!(spool.file.is_some() && !spool.is_shared);
    }

    #[test]
    fn regions_with_long_names_and_nothing_else() {
        let spool = spool();
        let check = || Ok(());
        let mut filler = Filler::new(&spool, &check);
        for name in ["", &"x".repeat(5000)] {
            filler.region(&region(name)).unwrap();
        }
        filler.flush().unwrap();
        spool.end();
        let mut recorder = Recorder::default();
        spool.empty(&mut recorder).unwrap();
        let names = recorder.regions.iter().map(|(region, _)| region.name.len());
        assert_eq!(names.collect::<Vec<_>>(), [0, 5000]);
    }
}
