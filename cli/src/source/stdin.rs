//! Memory that can be read only once: standard input, or a named pipe.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Seek as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::{CHUNK, Guess, PAGE, Remark, Samples, Sampling, Sink, Source, guess, raw};
use crate::exit::Refusal;
use crate::names;
use crate::output::count;
use crate::signals::Cancel;

/// A pipe, file or terminal that is read to its end.
#[derive(Debug)]
pub(crate) struct Stream {
    file: File,
    name: String,
    /// Number of bytes of a redirected file before the position at which reading began.
    skipped: u64,
    /// Whether to skip the check for other kinds of files.
    raw: bool,
    cancel: Cancel,
}

impl Stream {
    pub(crate) fn stdin(raw: bool, cancel: &Cancel) -> Result<Self> {
        if io::IsTerminal::is_terminal(&io::stdin()) {
            return Err(
                Refusal::Usage("standard input is a terminal; pipe memory into it".into()).into(),
            );
        }
        let fd = io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .context("standard input")?;
        let mut file = File::from(fd);
        let kind = file.metadata().context("standard input")?.file_type();
        let skipped = if kind.is_file() || kind.is_block_device() {
            file.stream_position().context("standard input")?
        } else {
            0
        };
        Ok(Self {
            file,
            name: "standard input".into(),
            skipped,
            raw,
            cancel: cancel.clone(),
        })
    }

    pub(crate) fn pipe(path: &Path, file: File, raw: bool, cancel: &Cancel) -> Self {
        Self {
            file,
            name: names::path(path),
            skipped: 0,
            raw,
            cancel: cancel.clone(),
        }
    }

    /// Fills `buffer` unless the stream ends before. Returns the number of bytes read.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            // A pipe that no writer has opened yet reports neither data nor its end, so this does
            // not mistake that state for the end.
            self.cancel.wait_readable(self.file.as_fd())?;
            match self.file.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(error) => return Err(error).context(self.name.clone()),
            }
        }
        Ok(filled)
    }
}

impl Source for Stream {
    fn describe(&self) -> Vec<(String, String)> {
        vec![("source".into(), "stream".into())]
    }

    fn pages(&self) -> Option<u64> {
        None
    }

    fn sample(&mut self, _wanted: &Sampling) -> Result<Samples> {
        Ok(Samples::default())
    }

    fn feed(&mut self, sink: &mut dyn Sink) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let mut total = 0;
        sink.region(&raw::region())?;
        loop {
            let count = self.fill(&mut buffer)?;
            if total == 0 && !self.raw {
                match guess(&buffer[..count]) {
                    Guess::Raw => {}
                    Guess::ElfCore => bail!(
                        "{}: cannot read an ELF core from a stream; save it to a file first, or --raw \
                         packs it as if it were memory",
                        self.name
                    ),
                    Guess::Other(what) => bail!("{}: {}", self.name, what.refusal()),
                }
            }
            total += count as u64;
            if total == 0 {
                bail!("{}: is empty; there is no memory to pack", self.name);
            }
            if total % PAGE != 0 {
                bail!(
                    "{}: ended after {total} bytes, which is no multiple of {PAGE}, so it is not \
                     all of a memory",
                    self.name
                );
            }
            if count > 0 {
                sink.pages(&buffer[..count])?;
            }
            if count < buffer.len() {
                return Ok(());
            }
        }
    }

    fn remarks(&self) -> Vec<Remark> {
        let skipped = (self.skipped > 0).then(|| Remark {
            key: "source.skipped_bytes",
            value: self.skipped.to_string(),
            text: format!(
                "{} of the redirected file were read before this command started, or skipped; left \
                 out",
                count(self.skipped, "byte")
            ),
            warning: true,
        });
        skipped.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Recorder;
    use super::*;
    use std::io::Write as _;
    use std::os::fd::OwnedFd;

    fn stream(bytes: Vec<u8>, raw: bool) -> Result<Recorder> {
        let (reader, mut writer) = io::pipe().unwrap();
        let feeder = std::thread::spawn(move || {
            // Uneven pieces: a page may come in two.
            for piece in bytes.chunks(3001) {
                if writer.write_all(piece).is_err() {
                    break;
                }
            }
        });
        let mut sink = Recorder::default();
        let file = File::from(OwnedFd::from(reader));
        let mut stream = Stream::pipe(Path::new("pipe"), file, raw, &Cancel::never());
        let result = stream.feed(&mut sink);
        drop(stream);
        feeder.join().unwrap();
        result.map(|()| sink)
    }

    #[test]
    fn pages_stay_whole_across_short_reads() {
        let bytes: Vec<u8> = (0..768_u32)
            .flat_map(|page| [page.to_le_bytes()[0]; 4096])
            .collect();
        let sink = stream(bytes, false).unwrap();
        assert_eq!(sink.page(0, 0), Some(vec![0; 4096]));
        assert_eq!(sink.page(0, 767), Some(vec![255; 4096]));
    }

    #[test]
    fn stream_ending_within_a_page_is_an_error() {
        let error = stream(vec![1; (1 << 20) + 5], false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("1048581 bytes"), "{error}");
    }

    #[test]
    fn what_must_be_a_file_is_refused_unless_meant() {
        let mut bytes = vec![0; 8192];
        bytes[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0");
        let error = stream(bytes.clone(), false).unwrap_err().to_string();
        assert!(error.contains("ELF core"), "{error}");
        stream(bytes, true).unwrap();
    }
}
