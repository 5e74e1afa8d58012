//! Decides where the content of each page of a mapping is to be read, from the page table and the
//! mapped file, without touching the page.
//!
//! | page table | private, anonymous | private, of a file | shared |
//! | --- | --- | --- | --- |
//! | present, swapped | process | process | process |
//! | poisoned | process, which fails | process, which fails | process, which fails |
//! | nothing, guard page | zero | file | file |
//! | nothing, and a userfaultfd answers | unavailable | | unavailable |
//!
//! Reading a page through the process when it isn't in its page table would add it there, and
//! allocate it if it is a hole of shared memory.

use std::sync::Arc;

use anyhow::Result;

use super::super::PAGE;
use super::super::extents::Stretch;
use super::Inner;
use super::backing::{self, Backing};
use super::maps::{Mapping, Untouched};

/// Location of the content of some pages.
#[derive(Clone, Debug)]
pub(super) enum Plan {
    /// Read the content from the process.
    Process,
    /// Read the content from the mapped file.
    File(Arc<Backing>),
    Zero,
    /// The content can't be determined.
    Unavailable(UnavailableReason),
    /// Shared memory or a file that this user can't open: only reading through the process tells.
    Hidden,
}

/// Reason why pages are unavailable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UnavailableReason {
    /// Device memory, which may have side effects when read.
    Device,
    /// Missing pages that another process provides.
    Answered,
    /// Pages beyond the end of the mapped file, which have no content.
    BeyondFile,
    /// Memory of `memfd_secret`.
    Secret,
    /// Pages of a file that the held process itself may serve.
    Served,
}

type Run<'a> = &'a mut dyn FnMut(u64, u64, Plan) -> Result<()>;

impl Inner {
    /// Calls `run` with the start, the number and the plan of each run of pages of `mapping`, in
    /// order and without gaps.
    pub(super) fn plan(&self, mapping: &Mapping, run: Run<'_>) -> Result<()> {
        let pages = (mapping.end - mapping.start) / PAGE;
        let mut whole = |reason| run(mapping.start, pages, Plan::Unavailable(reason));
        if mapping.is_secret() {
            return whole(UnavailableReason::Secret);
        }
        if mapping.details.is_some_and(|details| details.device) {
            return whole(UnavailableReason::Device);
        }
        match mapping.untouched() {
            Untouched::Zero => self.plan_alike(mapping, Plan::Zero, run),
            Untouched::Unknown => {
                self.plan_alike(mapping, Plan::Unavailable(UnavailableReason::Answered), run)
            }
            Untouched::Read => run(mapping.start, pages, Plan::Process),
            Untouched::File if backing::is_dev_zero(self.pid, mapping) => {
                self.plan_alike(mapping, Plan::Zero, run)
            }
            Untouched::File if self.served.has(mapping) => {
                self.plan_alike(mapping, Plan::Unavailable(UnavailableReason::Served), run)
            }
            Untouched::File => match self.backing(mapping) {
                Some(backing) => self.plan_file(mapping, &backing, run),
                None => self.plan_alike(mapping, Plan::Hidden, run),
            },
        }
    }

    /// Plans, like [`Self::plan`], a mapping whose untouched pages are all alike.
    fn plan_alike(&self, mapping: &Mapping, untouched: Plan, run: Run<'_>) -> Result<()> {
        let Some(pagemap) = &self.pagemap else {
            // Without the page table, only reading tells; but reading a page that another process
            // provides would block this one.
            let plan = match untouched {
                Plan::Unavailable(_) => untouched,
                _ => Plan::Process,
            };
            let pages = (mapping.end - mapping.start) / PAGE;
            return run(mapping.start, pages, plan);
        };
        let planned = pagemap.runs(mapping, |start, pages, own| {
            self.check()?;
            let plan = if own {
                Plan::Process
            } else {
                untouched.clone()
            };
            run(start, pages, plan)
        });
        planned.map_err(|error| self.explain(error))
    }

    /// Plans, like [`Self::plan`], a mapping whose untouched pages hold the contents of its file.
    fn plan_file(&self, mapping: &Mapping, backing: &Arc<Backing>, run: Run<'_>) -> Result<()> {
        let len = mapping.end - mapping.start;
        let there = backing.end.saturating_sub(mapping.offset).min(len);
        let within = Mapping {
            end: mapping.start + there,
            ..mapping.clone()
        };
        if there > 0 {
            self.plan_alike(&within, Plan::Hidden, &mut |start, pages, plan| {
                if !matches!(plan, Plan::Hidden) {
                    return run(start, pages, plan);
                }
                let offset = mapping.offset + (start - mapping.start);
                for stretch in backing.extents.stretches(offset..offset + pages * PAGE) {
                    self.check()?;
                    let (piece, plan) = match stretch {
                        Stretch::Data(piece) => (piece, Plan::File(Arc::clone(backing))),
                        Stretch::Hole(piece) => (piece, Plan::Zero),
                    };
                    run(start + piece.start, (piece.end - piece.start) / PAGE, plan)?;
                }
                Ok(())
            })?;
        }
        if there < len {
            let plan = Plan::Unavailable(UnavailableReason::BeyondFile);
            run(mapping.start + there, (len - there) / PAGE, plan)?;
        }
        Ok(())
    }

    /// Returns the file behind `mapping`. Consecutive mappings are often of the same file.
    fn backing(&self, mapping: &Mapping) -> Option<Arc<Backing>> {
        // For a file of huge pages, whether all of it is mapped is known for one mapping only.
        let is_huge = mapping.page_size() > PAGE;
        let mut last = self.last_backing.borrow_mut();
        match &*last {
            Some((device, inode, backing))
                if !is_huge && (*device, *inode) == (mapping.device, mapping.inode) =>
            {
                backing.clone()
            }
            _ => {
                let backing = Backing::open(self.pid, mapping, &self.served).map(Arc::new);
                *last = Some((mapping.device, mapping.inode, backing.clone()));
                backing
            }
        }
    }
}
