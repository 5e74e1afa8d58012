//! The ways to install pages, by the size of one call.
#![allow(unsafe_code, reason = "installed memory is given back to the kernel")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use snaprestore_uffd::memory::{Mapping, MappingOptions, RawRegion};
use snaprestore_uffd::uffd::{Features, Installed, Modes, OpenOptions, Userfaultfd, Wake};

/// Memory that is filled, emptied and filled again.
const BYTES: u64 = 64 << 20;

struct Target {
    uffd: Userfaultfd,
    memory: Arc<Mapping>,
}

impl Target {
    /// Opens a userfaultfd on empty memory; returns none if userfaultfd is not permitted.
    fn new() -> Option<Self> {
        // No events: emptying the memory must not wait for a thread to read one.
        let options = OpenOptions::new().required(Features::EMPTY);
        let uffd = options.open().ok()?;
        let memory = Arc::new(MappingOptions::new().map(BYTES).ok()?);
        let region = RawRegion::owned(Arc::clone(&memory));
        uffd.register(&region, 0, BYTES, Modes::MISSING).ok()?;
        Some(Self { uffd, memory })
    }

    fn empty(&self) {
        let len = usize::try_from(BYTES).expect("64 bits");
        // SAFETY: the mapping is ours, and nothing relies on its content.
        let result =
            unsafe { libc::madvise(self.memory.as_ptr().cast(), len, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "emptying the memory");
    }

    /// Measures `count` installs of `len` bytes each. Each time the memory is full it is emptied,
    /// which is not timed.
    fn time(
        &self,
        count: u64,
        len: u64,
        mut install: impl FnMut(&Userfaultfd, u64) -> Installed,
    ) -> Duration {
        let mut total = Duration::ZERO;
        let mut left = count;
        while left > 0 {
            self.empty();
            let now = left.min(BYTES / len);
            let began = Instant::now();
            for n in 0..now {
                let done = install(&self.uffd, self.memory.address() + n * len);
                assert_eq!(done, Installed::Done);
            }
            total += began.elapsed();
            left -= now;
        }
        total
    }
}

/// Measures COPY and ZEROPAGE.
pub(crate) fn install(criterion: &mut Criterion) {
    let Some(target) = Target::new() else {
        return;
    };
    let mut group = criterion.benchmark_group("install");
    for kib in [4, 16, 64, 128, 256, 2048] {
        let len = kib << 10;
        let bytes = vec![0x5a; usize::try_from(len).expect("64 bits")];
        group.throughput(Throughput::Bytes(len));
        let size = format!("{kib} KiB");
        group.bench_function(BenchmarkId::new("COPY", &size), |bencher| {
            bencher.iter_custom(|count| {
                target.time(count, len, |uffd, at| {
                    uffd.copy(at, &bytes, Wake::Later).expect("COPY")
                })
            });
        });
        group.bench_function(BenchmarkId::new("ZEROPAGE", &size), |bencher| {
            bencher.iter_custom(|count| {
                target.time(count, len, |uffd, at| {
                    uffd.zeropage(at, len, Wake::Later).expect("ZEROPAGE")
                })
            });
        });
    }
    group.finish();
}
