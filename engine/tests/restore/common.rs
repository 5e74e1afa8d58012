//! Images, stores that misbehave, touches, and child processes.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use snaprestore_engine::restore::Restored;
use snaprestore_fixtures::images::{Mix, Shares};
use snapshot_format::{
    FrameRef, MemoryStore, Page, Reason, RegionSpec, Snapshot, Store, Writer, WriterOptions,
};

pub(crate) const PAGE: usize = 4096;

/// Maximum time for a wait; only a hang takes this long.
pub(crate) const HANG_TIMEOUT: Duration = Duration::from_secs(120);

/// Returns pages that are all stored and all different.
pub(crate) fn random_bytes(pages: u64, seed: u64) -> Vec<u8> {
    Mix::with_shares(pages, seed, Shares::RANDOM).bytes()
}

/// Writes a snapshot file of one region.
pub(crate) fn pack(bytes: &[u8], frame_pages: usize) -> Vec<u8> {
    let options = WriterOptions {
        frame_pages,
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(Vec::new(), options).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer.write_pages(bytes).unwrap();
    writer.finish().unwrap().0
}

pub(crate) fn open(file: Vec<u8>) -> Arc<Snapshot> {
    Arc::new(Snapshot::open(Arc::new(MemoryStore::new(file))).unwrap())
}

/// A store that lets a test observe each read, block it, fail it, or change its result.
pub(crate) struct Hooked<H> {
    store: MemoryStore,
    hook: H,
}

impl<H> Store for Hooked<H>
where
    H: Fn(&mut [u8], u64, Reason) -> io::Result<()> + Send + Sync,
{
    fn len(&self) -> io::Result<u64> {
        self.store.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, reason: Reason) -> io::Result<()> {
        self.store.read_exact_at(buf, offset, reason)?;
        (self.hook)(buf, offset, reason)
    }

    fn name(&self) -> String {
        "hooked.snap".to_owned()
    }
}

pub(crate) fn open_hooked<H>(file: Vec<u8>, hook: H) -> Arc<Snapshot>
where
    H: Fn(&mut [u8], u64, Reason) -> io::Result<()> + Send + Sync + 'static,
{
    let store = MemoryStore::new(file);
    Arc::new(Snapshot::open(Arc::new(Hooked { store, hook })).unwrap())
}

/// Returns the frame that contains `page`.
pub(crate) fn frame_of(snapshot: &Snapshot, page: u64) -> FrameRef {
    match snapshot.look_up(page, Reason::Verify).unwrap() {
        Page::Stored { frame, .. } => frame,
        other => panic!("page {page} is {other:?}"),
    }
}

/// Returns the pages whose content is in the frame at `offset`.
pub(crate) fn pages_of_frame(snapshot: &Snapshot, offset: u64) -> Vec<u64> {
    let of_frame = |page: &u64| match snapshot.look_up(*page, Reason::Verify).unwrap() {
        Page::Stored { frame, .. } => frame.offset() == offset,
        _ => false,
    };
    (0..snapshot.page_slots()).filter(of_frame).collect()
}

/// Returns the file with one bit of the record of `frame` flipped.
pub(crate) fn damaged(mut file: Vec<u8>, frame: &FrameRef) -> Vec<u8> {
    file[index(frame.offset() + u64::from(frame.stored_len()) / 2)] ^= 4;
    file
}

pub(crate) fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

/// Returns the address of a page of the first region.
pub(crate) fn address(restored: &Restored, page: u64) -> usize {
    restored.regions()[0].as_ptr().expose_provenance() + index(page) * PAGE
}

/// Reads a whole page, which touches it.
pub(crate) fn peek(address: usize) -> [u8; PAGE] {
    // SAFETY: the tests pass addresses of mapped pages. Before this read can see a page, only the
    // engine writes to it.
    unsafe { std::ptr::with_exposed_provenance::<[u8; PAGE]>(address).read_volatile() }
}

/// Writes a byte of a page.
pub(crate) fn poke(address: usize, byte: u8) {
    // SAFETY: as for `peek`.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(address).write_volatile(byte) }
}

/// Returns page `n` of the source.
pub(crate) fn source(bytes: &[u8], n: u64) -> &[u8] {
    &bytes[index(n) * PAGE..][..PAGE]
}

/// Touches pages of the first region and compares them.
pub(crate) fn compare(restored: &Restored, bytes: &[u8], pages: impl IntoIterator<Item = u64>) {
    for page in pages {
        assert!(
            peek(address(restored, page)) == source(bytes, page),
            "page {page}"
        );
    }
}

/// Returns the result of `work`, which runs in a thread of its own, so that a hang fails the test.
pub(crate) fn within<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    result
        .recv_timeout(HANG_TIMEOUT)
        .unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// Polls until `condition` holds.
pub(crate) fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < HANG_TIMEOUT, "waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A gate at which reads wait until it is opened. Dropping the opener opens it, so that a failed
/// test ends.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Default)]
struct GateState {
    open: bool,
    waiting: usize,
}

impl Gate {
    pub(crate) fn pass(&self) {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap();
        state.waiting += 1;
        while !state.open {
            state = changed.wait(state).unwrap();
        }
        state.waiting -= 1;
    }

    pub(crate) fn open(&self) {
        self.0.0.lock().unwrap().open = true;
        self.0.1.notify_all();
    }

    pub(crate) fn waiting(&self) -> usize {
        self.0.0.lock().unwrap().waiting
    }

    pub(crate) fn opener(&self) -> Opener {
        Opener(self.clone())
    }
}

/// A handle that opens its gate when dropped.
pub(crate) struct Opener(Gate);

impl Drop for Opener {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// The exit status of a child process, and its output.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) output: String,
}

impl Ended {
    pub(crate) fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    #[track_caller]
    pub(crate) fn expect_success(self) -> String {
        assert!(self.status.success(), "{}: {}", self.status, self.output);
        self.output
    }
}

const CHILD: &str = "SNAPRESTORE_TEST_CHILD";

/// Runs `body`, a closure of a test, in a child process: this program again, with only this test.
pub(crate) fn in_child<F: FnOnce()>(body: F) -> Ended {
    let name = std::any::type_name::<F>();
    let name = name.strip_suffix("::{{closure}}").unwrap();
    let (_, name) = name.split_once("::").unwrap();
    if std::env::var(CHILD).is_ok_and(|child| child == name) {
        let no_core = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the pointer is to a live rlimit.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core) };
        body();
        std::process::exit(0);
    }
    let said = tempfile::NamedTempFile::new().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .stdout(said.as_file().try_clone().unwrap())
        .stderr(said.as_file().try_clone().unwrap())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > HANG_TIMEOUT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the child of {name} hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ended {
        status,
        output: std::fs::read_to_string(said.path()).unwrap(),
    }
}
