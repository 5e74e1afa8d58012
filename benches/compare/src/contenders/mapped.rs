//! A private mapping of a file: the raw one, or the one that a compressed file system shows. The
//! kernel does the rest.

use std::fs::File;
use std::path::Path;

use super::region::Region;
use crate::BenchError;
use crate::contender::Restored;
use crate::touch::Memory;

#[derive(Debug)]
pub(crate) struct Mapped {
    region: Region,
}

pub(crate) fn start(file: &Path, bytes: u64) -> Result<Mapped, BenchError> {
    let named = format!("{}: opening", file.display());
    let file = File::open(file).map_err(BenchError::io(named))?;
    Ok(Mapped {
        region: Region::of_file(&file, bytes, true)?,
    })
}

impl Restored for Mapped {
    fn memory(&self) -> Memory {
        self.region.memory()
    }

    /// Touches every page, which comes closest to completing the restore.
    fn complete(&mut self) -> Result<(), BenchError> {
        let memory = self.region.memory();
        let pages: Vec<u64> = (0..memory.len() / crate::PAGE)
            .map(|page| page * crate::PAGE)
            .collect();
        memory.touch(&pages, crate::workload::Access::Read, 1, false);
        Ok(())
    }
}
