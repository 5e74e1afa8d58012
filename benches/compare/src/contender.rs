//! Contenders: the ways to restore memory.
//!
//! | name | what it does |
//! | --- | --- |
//! | `ours` | restores a snapshot through the library, with options |
//! | `mmap` | maps the raw file privately |
//! | `handler` | copies a page of the mapped raw file for each userfaultfd fault, on any core |
//! | `handler-pinned` | the same, on the core of the thread that faults |
//! | `read-all` | reads the raw file into anonymous memory first |
//! | `unzstd` | decompresses a solid `.zst` (level 3) into anonymous memory first |
//! | `squashfs-64k`, `squashfs-128k` | maps the raw file inside a squashfs image (zstd) |
//! | `erofs` | maps the raw file inside an erofs image (best codec of mkfs.erofs) |
//! | `serve` | a VMM whose memory `snaprestore serve` serves, with options like `ours` |
//! | `vmm-handler`, `vmm-handler-pinned` | the same VMM, served by a process like `handler` |
//! | `vmm-copy-all` | the same VMM; a process copies the whole raw file at the first touch |
//!
//! Options follow a colon: `ours:prefetch=all,frame=64`.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::BenchError;
use crate::contenders::{eager, handler, mapped, ours, vmm};
use crate::touch::Memory;

/// One way to restore memory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Contender {
    /// snaprestore.
    Ours(Ours),
    /// A private mapping of the raw file.
    Mmap,
    /// A handler for one page a fault. Its thread is placed by the scheduler, or stays on the core
    /// of the touching thread.
    Handler {
        /// Whether the handler stays on the core of the touching thread.
        pinned: bool,
    },
    /// The raw file, read whole.
    ReadAll,
    /// A compressed file, decompressed whole.
    Unzstd,
    /// The raw file in a squashfs image.
    Squashfs {
        /// Size of its blocks.
        block_kib: u32,
    },
    /// The raw file in an erofs image.
    Erofs,
    /// snaprestore, serving a VM from another process.
    Serve(Ours),
    /// One page a fault, from a process of its own.
    VmmHandler {
        /// Whether the handler stays on the core of the touching thread.
        pinned: bool,
    },
    /// The raw file copied whole at the first fault, by a process of its own.
    VmmCopyAll,
}

/// Pages that snaprestore fetches before they are touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Prefetch {
    /// None.
    #[default]
    Off,
    /// The recorded working sets.
    WorkingSet,
    /// All.
    All,
}

/// Options of snaprestore; those that aren't given have their default.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ours {
    /// Pages to prefetch.
    pub prefetch: Prefetch,
    /// The working set to prefetch; all of them if `None`.
    pub working_set: Option<String>,
    /// Threads that serve faults.
    pub fault_threads: Option<usize>,
    /// Threads that prefetch.
    pub prefetch_threads: Option<usize>,
    /// Whether huge pages are advised at the end.
    pub huge_pages: bool,
    /// Whether the touching thread is bound to its core, as virtual CPUs often are.
    pub pinned: bool,
    /// MiB of decoded frames that the VMs of a server share.
    pub frame_cache: Option<usize>,
    /// Kind of the snapshot to restore.
    pub snapshot: SnapshotKind,
}

/// Options with which a snapshot was made; those that aren't given have the default of `create`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SnapshotKind {
    /// Size of a frame, in KiB.
    pub frame_kib: Option<u32>,
    /// Compression level.
    pub level: Option<i32>,
    /// Whether the snapshot has no dictionary.
    pub no_dictionary: bool,
    /// Whether the snapshot is the end of the image's chain, in place of one file.
    #[serde(default)]
    pub layered: bool,
    /// Working set packed for itself, by `optimize`.
    #[serde(default)]
    pub optimized: bool,
}

/// Memory that a contender has restored, or is restoring.
pub trait Restored {
    /// Returns the memory.
    fn memory(&self) -> Memory;

    /// Waits until all memory is restored.
    fn complete(&mut self) -> Result<(), BenchError>;

    /// Returns the contender's own counters.
    fn facts(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

impl Contender {
    /// Restores the memory in `file`, `bytes` long. `core` is the core of the touching thread, and
    /// `socket` that of a process that serves memory from outside.
    pub fn start(
        &self,
        file: &Path,
        bytes: u64,
        core: Option<usize>,
        socket: Option<&Path>,
    ) -> Result<Box<dyn Restored>, BenchError> {
        if let Some(socket) = socket {
            return Ok(Box::new(vmm::start(socket, bytes)?));
        }
        Ok(match self {
            Self::Ours(options) => Box::new(ours::start(file, bytes, options)?),
            Self::Mmap | Self::Squashfs { .. } | Self::Erofs => {
                Box::new(mapped::start(file, bytes)?)
            }
            Self::Handler { .. } => Box::new(handler::start(file, bytes, core)?),
            Self::ReadAll => Box::new(eager::read(file, bytes)?),
            Self::Unzstd => Box::new(eager::decompress(file, bytes)?),
            Self::Serve(_) | Self::VmmHandler { .. } | Self::VmmCopyAll => {
                return Err(BenchError::Invalid(format!("{self}: nobody serves it")));
            }
        })
    }

    /// Returns whether its handler stays on the core of the touching thread.
    pub fn stays_on_a_core(&self) -> bool {
        use Contender::{Handler, VmmHandler};
        matches!(self, Handler { pinned: true } | VmmHandler { pinned: true })
    }

    /// Returns whether the touching thread, and nothing else, is bound to its core.
    pub fn has_pinned_toucher(&self) -> bool {
        matches!(self, Self::Ours(ours) | Self::Serve(ours) if ours.pinned)
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours(options) => options.write("ours", f),
            Self::Serve(options) => options.write("serve", f),
            Self::Mmap => f.write_str("mmap"),
            Self::Handler { pinned: false } => f.write_str("handler"),
            Self::Handler { pinned: true } => f.write_str("handler-pinned"),
            Self::ReadAll => f.write_str("read-all"),
            Self::Unzstd => f.write_str("unzstd"),
            Self::Squashfs { block_kib } => write!(f, "squashfs-{block_kib}k"),
            Self::Erofs => f.write_str("erofs"),
            Self::VmmHandler { pinned: false } => f.write_str("vmm-handler"),
            Self::VmmHandler { pinned: true } => f.write_str("vmm-handler-pinned"),
            Self::VmmCopyAll => f.write_str("vmm-copy-all"),
        }
    }
}

impl Ours {
    fn write(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name)?;
        let mut before = ':';
        let mut option = |name: &str, value: Option<String>| match value {
            Some(value) => {
                write!(f, "{before}{name}={value}")?;
                before = ',';
                Ok(())
            }
            None => Ok(()),
        };
        let text = |number: Option<usize>| number.map(|number| number.to_string());
        let prefetch = match self.prefetch {
            Prefetch::Off => None,
            Prefetch::WorkingSet => Some("working-set".into()),
            Prefetch::All => Some("all".into()),
        };
        option("prefetch", prefetch)?;
        option("working-set", self.working_set.clone())?;
        option("fault-threads", text(self.fault_threads))?;
        option("prefetch-threads", text(self.prefetch_threads))?;
        option("huge-pages", self.huge_pages.then(|| "yes".into()))?;
        option("pinned", self.pinned.then(|| "yes".into()))?;
        option("frame-cache", text(self.frame_cache))?;
        let snapshot = &self.snapshot;
        option("frame", snapshot.frame_kib.map(|kib| kib.to_string()))?;
        option("level", snapshot.level.map(|level| level.to_string()))?;
        option("dictionary", snapshot.no_dictionary.then(|| "off".into()))?;
        option("layered", snapshot.layered.then(|| "yes".into()))?;
        option("optimized", snapshot.optimized.then(|| "yes".into()))
    }
}

impl FromStr for Contender {
    type Err = BenchError;

    fn from_str(text: &str) -> Result<Self, BenchError> {
        let (name, options) = text.split_once(':').unwrap_or((text, ""));
        if !matches!(name, "ours" | "serve") && !options.is_empty() {
            return Err(BenchError::Invalid(format!(
                "{text:?}: only `ours` and `serve` have options"
            )));
        }
        Ok(match name {
            "ours" => {
                let options: Ours = options.parse()?;
                if options.frame_cache.is_some() {
                    return Err(BenchError::Invalid(format!(
                        "{text:?}: only `serve` has frame-cache"
                    )));
                }
                Self::Ours(options)
            }
            "mmap" => Self::Mmap,
            "handler" => Self::Handler { pinned: false },
            "handler-pinned" => Self::Handler { pinned: true },
            "read-all" => Self::ReadAll,
            "unzstd" => Self::Unzstd,
            "squashfs-64k" => Self::Squashfs { block_kib: 64 },
            "squashfs-128k" => Self::Squashfs { block_kib: 128 },
            "erofs" => Self::Erofs,
            "serve" => {
                let options: Ours = options.parse()?;
                if options.prefetch_threads.is_some() || options.huge_pages {
                    return Err(BenchError::Invalid(format!(
                        "{text:?}: only `ours` has prefetch-threads and huge-pages"
                    )));
                }
                Self::Serve(options)
            }
            "vmm-handler" => Self::VmmHandler { pinned: false },
            "vmm-handler-pinned" => Self::VmmHandler { pinned: true },
            "vmm-copy-all" => Self::VmmCopyAll,
            _ => {
                return Err(BenchError::Invalid(format!(
                    "{text:?} is no contender; there are ours, mmap, handler, handler-pinned, read-all, unzstd, \
                     squashfs-64k, squashfs-128k, erofs, serve, vmm-handler, vmm-handler-pinned, vmm-copy-all"
                )));
            }
        })
    }
}

impl FromStr for Ours {
    type Err = BenchError;

    fn from_str(text: &str) -> Result<Self, BenchError> {
        let mut ours = Self::default();
        for option in text.split(',').filter(|option| !option.is_empty()) {
            let invalid = || {
                BenchError::Invalid(format!(
                    "{option:?} is no option of `ours` or `serve`; there are prefetch=off|working-set|all, working-set=NAME, fault-threads=N, \
                     prefetch-threads=N, huge-pages=yes, pinned=yes, frame-cache=MIB, frame=KIB, level=N, \
                     dictionary=off, layered=yes, optimized=yes"
                ))
            };
            let (name, value) = option.split_once('=').ok_or_else(invalid)?;
            let number = || value.parse().map_err(|_| invalid());
            match (name, value) {
                ("prefetch", "off") => ours.prefetch = Prefetch::Off,
                ("prefetch", "working-set") => ours.prefetch = Prefetch::WorkingSet,
                ("prefetch", "all") => ours.prefetch = Prefetch::All,
                ("working-set", name) => ours.working_set = Some(name.to_owned()),
                ("fault-threads", _) => ours.fault_threads = Some(number()?),
                ("prefetch-threads", _) => ours.prefetch_threads = Some(number()?),
                ("huge-pages", "yes") => ours.huge_pages = true,
                ("pinned", "yes") => ours.pinned = true,
                ("frame-cache", _) => ours.frame_cache = Some(number()?),
                ("frame", _) => {
                    ours.snapshot.frame_kib = Some(value.parse().map_err(|_| invalid())?);
                }
                ("level", _) => ours.snapshot.level = Some(value.parse().map_err(|_| invalid())?),
                ("dictionary", "off") => ours.snapshot.no_dictionary = true,
                ("layered", "yes") => ours.snapshot.layered = true,
                ("optimized", "yes") => ours.snapshot.optimized = true,
                _ => return Err(invalid()),
            }
        }
        Ok(ours)
    }
}

impl TryFrom<String> for Contender {
    type Error = BenchError;

    fn try_from(text: String) -> Result<Self, BenchError> {
        text.parse()
    }
}

impl From<Contender> for String {
    fn from(contender: Contender) -> Self {
        contender.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contender_name_round_trips() {
        for name in [
            "ours",
            "ours:prefetch=all",
            "ours:prefetch=working-set,working-set=boot,fault-threads=1,prefetch-threads=3,huge-pages=yes,pinned=yes,frame=16,level=-1,dictionary=off",
            "mmap",
            "handler",
            "handler-pinned",
            "read-all",
            "unzstd",
            "squashfs-64k",
            "squashfs-128k",
            "erofs",
            "ours:prefetch=all,layered=yes",
            "serve:prefetch=working-set,optimized=yes",
            "serve",
            "serve:prefetch=all,fault-threads=3,pinned=yes,frame-cache=0,frame=64",
            "vmm-handler",
            "vmm-handler-pinned",
            "vmm-copy-all",
        ] {
            let contender: Contender = name.parse().unwrap();
            assert_eq!(contender.to_string(), name);
        }
    }

    #[test]
    fn unknown_contender_error_lists_the_known_ones() {
        for name in [
            "",
            "theirs",
            "mmap:frame=4",
            "ours:frame",
            "ours:frame=x",
            "ours:speed=high",
            "serve:huge-pages=yes",
            "ours:frame-cache=0",
        ] {
            let error = name.parse::<Contender>().unwrap_err().to_string();
            assert!(
                error.contains("there are") || error.contains("only"),
                "{name}: {error}"
            );
        }
    }
}
