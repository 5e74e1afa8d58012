//! Restores a snapshot into this process and touches all of it while it arrives.
//!
//! ```sh
//! cargo run --release -p snaprestore-engine --example lazy -- guest.snap
//! ```
#![allow(
    unsafe_code,
    reason = "restored memory is reached through raw pointers"
)]
#![allow(clippy::print_stdout, reason = "it is a program")]

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{FailurePolicy, Restore};
use snapshot_format::Snapshot;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: lazy SNAPSHOT")?;
    let snapshot = Arc::new(Snapshot::open_path(&path)?);
    let begun = Instant::now();
    let restored = Restore::new(snapshot)
        .prefetch(Prefetch::All)
        .on_failure(FailurePolicy::Poison)
        .start()?;
    println!("usable after {:?}", begun.elapsed());

    let mut sum = 0_u64;
    for region in restored.regions() {
        let mut offset = 0;
        while offset < region.len() {
            // SAFETY: the offset is inside the region, which is mapped as long as `restored` lives;
            // nobody else writes to it, and a missing page arrives before the read returns.
            let byte = unsafe {
                region
                    .as_ptr()
                    .add(usize::try_from(offset)?)
                    .read_volatile()
            };
            sum += u64::from(byte);
            offset += 4096;
        }
    }
    println!(
        "every page touched after {:?}, the sum is {sum}",
        begun.elapsed()
    );

    restored.wait_complete();
    let stats = restored.stats();
    println!(
        "{} faults, half of them answered within {:?}; {} pages copied, {} zeroed",
        stats.faults,
        stats.fault_time.p50,
        stats.demand.copied + stats.prefetch.copied,
        stats.demand.zeroed + stats.prefetch.zeroed,
    );
    Ok(())
}
