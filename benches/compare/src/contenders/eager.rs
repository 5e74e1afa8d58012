//! Eager restores: the raw file read, or a compressed one decompressed, into anonymous memory. One
//! thread, as the tools do it.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use zstd::zstd_safe::{DCtx, InBuffer, OutBuffer, get_error_name};

use super::region::Region;
use crate::BenchError;
use crate::contender::Restored;
use crate::touch::Memory;

/// Bytes of the compressed file that are read at a time, as `zstd` itself does.
const READ: usize = 128 << 10;

#[derive(Debug)]
pub(crate) struct Eager {
    region: Region,
}

/// Reads the raw file.
pub(crate) fn read(file: &Path, bytes: u64) -> Result<Eager, BenchError> {
    let named = || format!("{}: reading", file.display());
    let mut from = File::open(file).map_err(BenchError::io(named()))?;
    let mut region = Region::anonymous(bytes)?;
    from.read_exact(region.bytes_mut())
        .map_err(BenchError::io(named()))?;
    Ok(Eager { region })
}

/// Decompresses a solid zstd file.
pub(crate) fn decompress(file: &Path, bytes: u64) -> Result<Eager, BenchError> {
    let named = || format!("{}: decompressing", file.display());
    let mut from = File::open(file).map_err(BenchError::io(named()))?;
    let mut region = Region::anonymous(bytes)?;
    let mut context = DCtx::create();
    let mut stored = vec![0; READ];
    let mut output = OutBuffer::around(region.bytes_mut());
    loop {
        let len = from.read(&mut stored).map_err(BenchError::io(named()))?;
        if len == 0 {
            break;
        }
        let mut input = InBuffer::around(&stored[..len]);
        while input.pos() < len {
            let before = (input.pos(), output.pos());
            let result = context.decompress_stream(&mut output, &mut input);
            let stuck = (input.pos(), output.pos()) == before;
            result.map_err(|code| BenchError::Trial {
                what: named(),
                why: get_error_name(code).into(),
            })?;
            if stuck {
                return Err(BenchError::Invalid(format!(
                    "{}: more than {bytes} bytes",
                    named()
                )));
            }
        }
    }
    let done = output.pos() as u64;
    if done != bytes {
        return Err(BenchError::Invalid(format!(
            "{}: {done} bytes, not {bytes}",
            named()
        )));
    }
    Ok(Eager { region })
}

impl Restored for Eager {
    fn memory(&self) -> Memory {
        self.region.memory()
    }

    fn complete(&mut self) -> Result<(), BenchError> {
        Ok(())
    }
}
