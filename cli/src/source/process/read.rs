//! Reads all memory of a stopped process into the spool.

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;

use super::super::{CHUNK, PAGE, Remark};
use super::hold::ended;
use super::plan::{Plan, UnavailableReason};
use super::spool::{Filler, Spool};
use super::{Inner, VAST, region};
use crate::output::count;

/// Maximum number of pages that may be read through the process although they aren't in its page
/// table, which may add them to its memory: 8 MiB in all.
const MAX_HIDDEN_PAGES: u64 = (8 << 20) / PAGE;

/// Time for which the process was held, and counts of pages that were not read, or whose content
/// may differ from what was assumed.
#[derive(Debug, Default)]
pub(super) struct Summary {
    pub(super) held: Duration,
    /// Number of pages that could not be read.
    unreadable: u64,
    /// Number of missing pages that another process provides.
    answered: u64,
    /// Number of pages of device memory.
    device: u64,
    /// Number of pages of `memfd_secret`.
    secret: u64,
    /// Number of pages of files that the process itself may serve.
    served: u64,
    /// Number of pages whose content this user can't determine.
    hidden: u64,
    /// Number of such pages that were read, because they were few enough.
    hidden_read: u64,
    /// Number of pages beyond the end of the mapped file.
    beyond_file: u64,
    /// Number of pages excluded from core dumps that were read.
    undumped: u64,
    /// Number of pages of vast memory that was never touched, or is unavailable.
    left_out: u64,
    left_out_unavailable: u64,
}

/// Guard that reports the end of reading, also after a panic.
struct EndOnDrop<'a>(&'a Spool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Inner {
    /// Reads everything, releases the process, and reports the end to the writer.
    pub(super) fn read(self: Box<Self>, spool: &Spool) -> Result<Summary> {
        let _end = EndOnDrop(spool);
        let mut summary = self.read_mappings(spool)?;
        let since = self.hold.since();
        // The process continues here.
        drop(self);
        summary.held = since.elapsed();
        Ok(summary)
    }

    fn read_mappings(&self, spool: &Spool) -> Result<Summary> {
        let check = || self.check();
        let mut filler = Filler::new(spool, &check);
        let mut summary = Summary::default();
        for mapping in &self.mappings {
            // A region ends where vast memory is left out, and another one begins after it.
            let mut begun = false;
            self.plan(mapping, &mut |start, pages, plan| {
                if pages >= VAST {
                    match plan {
                        Plan::Zero => summary.left_out += pages,
                        Plan::Unavailable(_) => summary.left_out_unavailable += pages,
                        _ => {}
                    }
                    if matches!(plan, Plan::Zero | Plan::Unavailable(_)) {
                        begun = false;
                        return Ok(());
                    }
                }
                if !begun {
                    filler.region(&region(mapping, start))?;
                    begun = true;
                }
                self.read_run(start, pages, plan, mapping, &mut filler, &mut summary)
            })?;
        }
        filler.flush()?;
        self.hold.check()?;
        Ok(summary)
    }

    fn read_run(
        &self,
        start: u64,
        pages: u64,
        plan: Plan,
        mapping: &super::Mapping,
        filler: &mut Filler<'_>,
        summary: &mut Summary,
    ) -> Result<()> {
        if matches!(plan, Plan::Process | Plan::File(_))
            && mapping.details.is_some_and(|details| details.undumped)
        {
            summary.undumped += pages;
        }
        match plan {
            Plan::Process => {
                summary.unreadable += self.read_process(start, pages, filler)?;
            }
            Plan::File(backing) => {
                let offset = mapping.offset + (start - mapping.start);
                let read = |buffer: &mut [u8], at: u64| backing.read(buffer, offset + at);
                summary.unreadable +=
                    read_pages(pages, filler, read, |_, _| Ok(Failed::Unavailable))?;
            }
            Plan::Zero => filler.zeros(pages)?,
            Plan::Unavailable(reason) => {
                match reason {
                    UnavailableReason::Device => summary.device += pages,
                    UnavailableReason::Answered => summary.answered += pages,
                    UnavailableReason::Secret => summary.secret += pages,
                    UnavailableReason::Served => summary.served += pages,
                    UnavailableReason::BeyondFile => summary.beyond_file += pages,
                }
                filler.unavailable(pages)?;
            }
            Plan::Hidden if pages <= MAX_HIDDEN_PAGES - summary.hidden_read => {
                summary.hidden_read += pages;
                summary.unreadable += self.read_process(start, pages, filler)?;
            }
            Plan::Hidden => {
                summary.hidden += pages;
                filler.unavailable(pages)?;
            }
        }
        Ok(())
    }

    /// Reads `pages` pages at `start` from the process; pages that can't be read become
    /// unavailable. Returns the number of those.
    fn read_process(&self, start: u64, pages: u64, filler: &mut Filler<'_>) -> Result<u64> {
        let read = |buffer: &mut [u8], at: u64| match self.memory.read_at(buffer, start + at) {
            // The process no longer exists.
            Ok(0) => Err(Errno::ESRCH.into()),
            result => result,
        };
        read_pages(pages, filler, read, |at, error| {
            let errno = error.raw_os_error().map(Errno::from_raw);
            match errno {
                // There is no memory at the address, or a marker forbids access.
                Some(Errno::EIO | Errno::EFAULT | Errno::EOVERFLOW) => {
                    self.hold.check()?;
                    let is_guard = |pagemap: &super::Pagemap| pagemap.is_guard(start + at);
                    Ok(if self.pagemap.as_ref().is_some_and(is_guard) {
                        Failed::Guard
                    } else {
                        Failed::Unavailable
                    })
                }
                Some(Errno::ESRCH) => Err(ended(self.pid)),
                _ => Err(io::Error::from(error.kind()))
                    .with_context(|| format!("process {}: reading at {:#x}", self.pid, start + at)),
            }
        })
    }
}

/// Treatment of a page that can't be read.
enum Failed {
    Unavailable,
    Guard,
}

/// Reads `pages` pages with `read`, which gets an offset in bytes from the first page. `failed`
/// decides about a page that can't be read. Returns the number of unavailable pages.
fn read_pages(
    pages: u64,
    filler: &mut Filler<'_>,
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
    failed: impl Fn(u64, &io::Error) -> Result<Failed>,
) -> Result<u64> {
    let end = pages * PAGE;
    let (mut at, mut unavailable) = (0, 0);
    let mut most = CHUNK as u64;
    while at < end {
        let error = match filler.pages((end - at).min(most), |buffer| read(buffer, at))? {
            Ok(count) if count as u64 >= PAGE => {
                at += count as u64 / PAGE * PAGE;
                most = CHUNK as u64;
                continue;
            }
            Ok(_) => Errno::EIO.into(),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => error,
        };
        match failed(at, &error)? {
            Failed::Guard => filler.zeros(1)?,
            Failed::Unavailable => {
                filler.unavailable(1)?;
                unavailable += 1;
            }
        }
        at += PAGE;
        // The next page is likely to fail as well.
        most = PAGE;
    }
    Ok(unavailable)
}

impl Summary {
    /// Returns the remarks about process `pid`.
    pub(super) fn remarks(&self, pid: i32) -> Vec<Remark> {
        let remark = |pages: u64, key, warning, why: &str| {
            (pages > 0).then(|| Remark {
                key,
                value: (pages * PAGE).to_string(),
                text: format!("{} of process {pid} {why}", count(pages, "page")),
                warning,
            })
        };
        let unavailable = |pages, key, why: &str| {
            remark(pages, key, true, &format!("{why}; recorded as unavailable"))
        };
        let remarks = [
            unavailable(
                self.unreadable,
                "source.unreadable_bytes",
                "could not be read (poisoned or damaged memory, or an error of its file)",
            ),
            unavailable(
                self.answered,
                "source.missing_bytes",
                "are not in its memory yet: another process still serves them (a lazy restore?)",
            ),
            unavailable(self.device, "source.device_bytes", "belong to a device"),
            unavailable(
                self.secret,
                "source.secret_bytes",
                "are secret (memfd_secret), and only it can read them",
            ),
            unavailable(
                self.served,
                "source.served_bytes",
                "are not in its memory, and of a file on FUSE, which it may serve itself: it can't \
                 while it is held",
            ),
            unavailable(
                self.hidden,
                "source.hidden_bytes",
                "are shared memory, or of a file that can't be opened, and not in its page table: \
                 reading them could make it grow by as much (root can see whether they hold \
                 anything)",
            ),
            remark(
                self.beyond_file,
                "source.beyond_file_bytes",
                false,
                "lie beyond the end of the file that they map, where there is no content; recorded \
                 as unavailable",
            ),
            remark(
                self.undumped,
                "source.undumped_bytes",
                false,
                "are marked as not to be dumped (MADV_DONTDUMP, often keys), and were taken: keep \
                 the snapshot as you keep them",
            ),
            Remark::left_out(
                self.left_out_unavailable,
                &format!(
                    "of process {pid} can't be read (64 GiB or more in a row, of mappings longer \
                     than their file, of a device, or filled by another process)"
                ),
            ),
            remark(
                self.left_out,
                "source.untouched_bytes",
                false,
                "are reserved and were never touched (64 GiB or more in a row); left out",
            ),
        ];
        remarks.into_iter().flatten().collect()
    }
}
