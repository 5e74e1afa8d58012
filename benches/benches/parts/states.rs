//! The state of each page.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use snaprestore_engine::bench::PageStates;

const PAGES: u64 = 1 << 18;

/// Measures the operations of a fault and an install.
pub(crate) fn page_states(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page states");
    let fresh = || PageStates::new(PAGES).expect("a table");
    let states = fresh();
    for page in (0..PAGES).step_by(2) {
        states.mark_present(page..page + 1);
    }
    let mut page = 0;
    group.bench_function("is one page absent", |bencher| {
        bencher.iter(|| {
            page = (page + 7919) % PAGES;
            black_box(states.is_absent(page))
        });
    });
    let full = fresh();
    full.mark_present(0..PAGES - 1);
    group.bench_function("find the one absent page of 1 GiB", |bencher| {
        bencher.iter(|| black_box(full.absent_in(0..PAGES)));
    });
    group.bench_function("count the absent pages of 1 GiB", |bencher| {
        bencher.iter(|| black_box(full.recount()));
    });
    for count in [1, 32, 512] {
        group.bench_function(format!("mark {count} pages present"), |bencher| {
            bencher.iter_custom(|iterations| {
                let (mut total, mut left) = (Duration::ZERO, iterations);
                while left > 0 {
                    let states = fresh();
                    // The kernel allocates the bitmap's memory at the first write to it, which
                    // isn't what is measured.
                    (0..PAGES)
                        .step_by(8 * 4096)
                        .for_each(|page| states.mark_present(page..page + 1));
                    let now = left.min(PAGES / count);
                    let began = Instant::now();
                    for n in 0..now {
                        states.mark_present(n * count..(n + 1) * count);
                    }
                    total += began.elapsed();
                    left -= now;
                }
                total
            });
        });
    }
    group.finish();
}
