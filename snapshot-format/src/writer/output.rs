//! The output and the position in it.

use std::io::Write;

use super::WriteError;

/// Bytes gathered before the output is called.
const BUFFER_BYTES: usize = 1 << 20;

/// Counts and buffers the written bytes. Dropping it writes nothing, because after an error the
/// rest of the buffer must not follow.
pub(super) struct Output<W> {
    inner: W,
    buffer: Vec<u8>,
    offset: u64,
}

impl<W: Write> Output<W> {
    pub(super) fn new(inner: W) -> Self {
        Self {
            inner,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            offset: 0,
        }
    }

    /// Returns the offset of the next byte.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Appends `bytes`; an error names `what`.
    pub(super) fn write(&mut self, what: &'static str, bytes: &[u8]) -> Result<(), WriteError> {
        if self.buffer.len() + bytes.len() > BUFFER_BYTES {
            self.drain(what)?;
        }
        if bytes.len() >= BUFFER_BYTES {
            self.inner
                .write_all(bytes)
                .map_err(|source| WriteError::Io { what, source })?;
        } else {
            self.buffer.extend_from_slice(bytes);
        }
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn drain(&mut self, what: &'static str) -> Result<(), WriteError> {
        self.inner
            .write_all(&self.buffer)
            .map_err(|source| WriteError::Io { what, source })?;
        self.buffer.clear();
        Ok(())
    }

    /// Writes the buffered bytes and returns the output.
    pub(super) fn finish(mut self) -> Result<W, WriteError> {
        self.drain("the end of the file")?;
        self.inner.flush().map_err(|source| WriteError::Io {
            what: "the end of the file",
            source,
        })?;
        Ok(self.inner)
    }
}
