//! Files about VMs: traces of first touches, and statistics of VMs that have ended.
//!
//! A thread writes them, one after another, since a disk may not answer.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Supervisor;
use crate::api::summary::VmLabel;
use crate::policy;

/// Maximum number of files that wait to be written.
const MAX_WAITING: usize = 64;

/// Maximum number of names that are tried for a file.
const MAX_NAMES: u32 = 1000;

/// A task that writes a file. Returns a message for the log, if there is one, or the reason why the
/// file is lost.
type Job = Box<dyn FnOnce() -> JobResult + Send>;
type JobResult = Result<Option<String>, String>;

/// Files that are being written.
#[derive(Debug, Default)]
pub(super) struct VmFiles {
    /// Started with the first file.
    writer: Option<Writer>,
    waiting: usize,
}

#[derive(Debug)]
struct Writer {
    jobs: Sender<(VmLabel, Job)>,
    results: Receiver<(VmLabel, JobResult)>,
}

impl VmFiles {
    /// Hands a file to the thread. Returns an error if that is too far behind.
    fn write(&mut self, label: VmLabel, job: Job) -> Result<(), String> {
        if self.waiting >= MAX_WAITING {
            return Err(format!(
                "{MAX_WAITING} files of other VMs wait to be written; check that the disk answers"
            ));
        }
        let writer = match self.writer.take() {
            Some(writer) => writer,
            None => Writer::start().map_err(|error| format!("cannot start a thread: {error}"))?,
        };
        let sent = writer.jobs.send((label, job));
        self.writer = Some(writer);
        sent.map_err(|_| "the thread that writes files has exited".to_owned())?;
        self.waiting += 1;
        Ok(())
    }

    /// Returns whether files are being written.
    pub(super) fn is_writing(&self) -> bool {
        self.waiting > 0
    }

    /// Returns the next file that is done, waiting for it at most for `timeout`.
    fn next_result(&mut self, timeout: Duration) -> Option<(VmLabel, JobResult)> {
        let results = &self.writer.as_ref()?.results;
        let result = results.recv_timeout(timeout).ok()?;
        self.waiting -= 1;
        Some(result)
    }
}

impl Writer {
    fn start() -> std::io::Result<Self> {
        let (jobs, received) = channel::<(VmLabel, Job)>();
        let (sender, results) = channel();
        let body = move || {
            for (label, job) in received {
                // Fails only when the daemon has stopped.
                let _ = sender.send((label, job()));
            }
        };
        std::thread::Builder::new()
            .name("files".into())
            .spawn(body)?;
        Ok(Self { jobs, results })
    }
}

impl Supervisor {
    /// Queues a file about a VM to be written. `lost` is the message if it can't be.
    pub(super) fn write_vm_file(
        &mut self,
        label: &VmLabel,
        lost: &'static str,
        job: impl FnOnce() -> JobResult + Send + 'static,
    ) {
        let job = move || job().map_err(|why| format!("{lost}: {why}"));
        if let Err(why) = self.vm_files.write(label.clone(), Box::new(job)) {
            self.journal.vm_error(label, format_args!("{lost}: {why}"));
        }
    }

    /// Logs the files that were written, or could not be.
    pub(super) fn log_vm_files(&mut self) {
        while self.vm_files.is_writing()
            && let Some((label, result)) = self.vm_files.next_result(Duration::ZERO)
        {
            self.log_vm_file(&label, result);
        }
    }

    /// Waits until all files are written, for a limited time.
    pub(super) fn finish_vm_files(&mut self) {
        let until = Instant::now() + policy::FLUSH_TIMEOUT;
        while self.vm_files.is_writing() {
            let left = until.saturating_duration_since(Instant::now());
            let Some((label, result)) = self.vm_files.next_result(left) else {
                self.journal.error(format_args!(
                    "{} traces or statistics of VMs are not written: a disk does not answer",
                    self.vm_files.waiting
                ));
                return;
            };
            self.log_vm_file(&label, result);
        }
    }

    fn log_vm_file(&mut self, label: &VmLabel, result: JobResult) {
        match result {
            Ok(None) => {}
            Ok(Some(what)) => self.journal.vm_info(label, what),
            Err(why) => self.journal.vm_error(label, why),
        }
    }
}

/// The names to try for a file about a VM, in order: `SERVICE-VM-SECONDS.EXTENSION`, then the same
/// with `-2`, `-3` and so on after the seconds.
#[derive(Debug)]
pub(super) struct VmFileName {
    folder: PathBuf,
    stem: String,
    extension: &'static str,
}

impl VmFileName {
    /// Returns the names for a file that is written now. The time tells runs of the daemon apart,
    /// which count their VMs from 1.
    pub(super) fn now(folder: &Path, label: &VmLabel, extension: &'static str) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self::at(since.unwrap_or_default(), folder, label, extension)
    }

    fn at(time: Duration, folder: &Path, label: &VmLabel, extension: &'static str) -> Self {
        let (seconds, VmLabel { id, service, .. }) = (time.as_secs(), label);
        Self {
            folder: folder.to_owned(),
            stem: format!("{service}-{id}-{seconds}"),
            extension,
        }
    }

    /// Writes the file with `write`, under the first name that is free, and returns its path. The
    /// first name is taken if the daemon was started twice within a second.
    pub(super) fn write<E>(
        &self,
        write: impl Fn(&Path) -> Result<(), E>,
        exists: impl Fn(&E) -> bool,
    ) -> Result<PathBuf, E> {
        let mut number = 1;
        loop {
            let more = if number == 1 {
                String::new()
            } else {
                format!("-{number}")
            };
            let name = format!("{}{more}.{}", self.stem, self.extension);
            let path = self.folder.join(name);
            match write(&path) {
                Ok(()) => return Ok(path),
                Err(error) if exists(&error) && number < MAX_NAMES => number += 1,
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use super::*;

    fn label(id: u64) -> VmLabel {
        VmLabel {
            id,
            pid: 7,
            service: "web".into(),
        }
    }

    #[test]
    fn results_come_in_order_and_a_full_queue_is_an_error() {
        let mut files = VmFiles::default();
        let (go, wait) = channel::<()>();
        let first = move || wait.recv().map(|()| None).map_err(|e| e.to_string());
        files.write(label(1), Box::new(first)).unwrap();
        for id in 2..=MAX_WAITING as u64 {
            let job = move || {
                if id == 3 {
                    Err("full".into())
                } else {
                    Ok(None)
                }
            };
            files.write(label(id), Box::new(job)).unwrap();
        }
        assert!(files.next_result(Duration::ZERO).is_none() && files.is_writing());
        let refused = files.write(label(99), Box::new(|| Ok(None))).unwrap_err();
        assert!(refused.contains("check that the disk answers"), "{refused}");
        go.send(()).unwrap();
        for id in 1..=MAX_WAITING as u64 {
            let (of, result) = files.next_result(Duration::from_secs(60)).unwrap();
            assert_eq!((of.id, result.is_err()), (id, id == 3));
        }
        assert!(!files.is_writing());
    }

    #[test]
    fn names_tell_services_and_vms_apart() {
        let name = VmFileName::now(Path::new("/d"), &label(3), "run.json");
        let path = name.write(|_| Ok::<_, ()>(()), |()| false).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("web-3-"), "{name}");
        assert!(name.strip_suffix(".run.json").is_some(), "{name}");
    }

    #[test]
    fn files_of_one_second_get_different_names() {
        let folder = tempfile::tempdir().unwrap();
        let time = Duration::from_secs(77);
        let name = VmFileName::at(time, folder.path(), &label(3), "trace");
        let create = |path: &Path| std::fs::File::create_new(path).map(drop);
        let exists = |error: &Error| error.kind() == ErrorKind::AlreadyExists;
        let names = [(); 3].map(|()| {
            let path = name.write(create, exists).unwrap();
            path.file_name().unwrap().to_str().unwrap().to_owned()
        });
        let expected = ["web-3-77.trace", "web-3-77-2.trace", "web-3-77-3.trace"];
        assert_eq!(names, expected);
        // Any other error ends the search.
        let gone = VmFileName::at(time, Path::new("/nowhere/x"), &label(3), "trace");
        let error = gone.write(create, exists).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
