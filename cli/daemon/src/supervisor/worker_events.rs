//! The worker's messages, its replacement, and its getting stuck.

use std::os::fd::OwnedFd;

use snaprestore_engine::pager::SessionEnd;
use snaprestore_engine::stats::{RunError as WriteRunError, RunRecord};
use snapshot_format::FileError;

use super::vm_files::VmFileName;
use super::workers::{Briefing, WorkerState};
use super::{RunError, Stopping, Supervisor};
use crate::api::summary::{VmLabel, VmSummary};
use crate::error::Chain;
use crate::ipc::{FromWorker, SupervisorRequest};
use crate::log::count;
use crate::supervisor::services::AddServiceError;
use crate::supervisor::worker_process::ExitCause;

impl Supervisor {
    /// Reads and handles the messages of the worker.
    pub(super) fn read_worker(&mut self) -> Result<(), RunError> {
        while let Some((message, descriptors)) = self.workers.receive()? {
            self.handle_message(message, descriptors)?;
        }
        Ok(())
    }

    fn handle_message(
        &mut self,
        message: FromWorker,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), RunError> {
        match message {
            FromWorker::Ready { version, .. } => self.workers.mark_ready(version),
            // If the first worker fails, another one would fail as well. A later one may fail
            // because memory is short.
            FromWorker::ConfineFailed { why } if self.workers.is_first() => {
                return Err(RunError::Confine { why });
            }
            FromWorker::ConfineFailed { why } => self.journal.error(why),
            FromWorker::Request { number, request } => self.handle_request(number, request),
            // The operator has been told, so the old worker may exit.
            FromWorker::Replied => self.workers.finish_upgrade(),
            FromWorker::Tables { id } => self.keep_tables(id, descriptors.into_iter().next()),
            FromWorker::Served { id } => {
                let record = self.vms.get_mut(id).filter(|record| record.is_active());
                if let Some(record) = record {
                    record.serve();
                    self.journal.vm_info(&record.label(), "served");
                }
            }
            FromWorker::VmEnded {
                id,
                vm,
                incomplete,
                run,
            } => self.end_vm(id, vm, incomplete, run),
            FromWorker::RecordingBegan { id, destination } => {
                if let Some(record) = self.vms.get(id).filter(|record| record.is_active()) {
                    self.recordings.begin(record.label(), destination);
                }
            }
            FromWorker::RecordingEnded {
                id,
                destination,
                result,
            } => {
                let memfd = descriptors.into_iter().next();
                self.end_recording(id, destination, result, memfd);
            }
        }
        Ok(())
    }

    /// Keeps the tables that the worker has created for a VM.
    fn keep_tables(&mut self, id: u64, memfd: Option<OwnedFd>) {
        let record = self.vms.get_mut(id).filter(|record| record.is_active());
        let Some(record) = record else {
            return;
        };
        let tracked = match memfd {
            Some(memfd) => record.track(memfd, &mut self.fd_store),
            None => Err(std::io::Error::other("the worker sent no memfd")),
        };
        let label = record.label();
        match tracked {
            Ok(stored) => self.log_partly_stored(&label, stored),
            Err(error) => {
                let why = format!("cannot use the tables of its session: {error}");
                self.drop_active(id, SessionEnd::Killed(why));
            }
        }
    }

    /// Ends a VM that the worker no longer serves.
    fn end_vm(
        &mut self,
        id: u64,
        summary: VmSummary,
        incomplete: bool,
        run: Option<Box<RunRecord>>,
    ) {
        let Some(mut record) = self.vms.take_active(id) else {
            return;
        };
        if let Some(run) = run {
            self.write_run(&record.label(), *run);
        }
        let (service, connected) = (record.service(), record.connected());
        self.log_unfetched_recording(id);
        match summary.end {
            SessionEnd::Complete => {
                if let Err(error) = record.release_complete(&mut self.fd_store) {
                    self.log_not_removed(&summary.label, &error);
                }
            }
            SessionEnd::Refused(_) => {
                self.kill_vm(record);
            }
            SessionEnd::Exited | SessionEnd::Killed(_) => {
                record.await_exit();
                self.vms.insert(record);
            }
        }
        if incomplete {
            self.journal.count_incomplete();
        }
        let _ = self.record_end(service, connected, summary);
        self.drop_service_if_unused(service);
    }

    /// Queues the statistics of an ended VM to be written. The worker is not trusted with the name.
    fn write_run(&mut self, label: &VmLabel, mut run: RunRecord) {
        let Some(folder) = &self.options.run_json else {
            return;
        };
        run.what = label.to_string();
        let name = VmFileName::now(folder, label, "run.json");
        self.write_vm_file(label, "its statistics are lost", move || {
            let exists = |error: &WriteRunError| {
                matches!(error, WriteRunError::File(FileError::Exists { .. }))
            };
            let written = name.write(|path| run.write_path(path, false), exists);
            written
                .map(|_| None)
                .map_err(|error| Chain(&error).to_string())
        });
    }

    /// Handles an operator's request that the worker can't serve alone.
    fn handle_request(&mut self, number: u64, request: SupervisorRequest) {
        let result = match request {
            // A compromised worker must not get rights that nobody has asked for.
            _ if !self.workers.had_operator() => {
                self.journal
                    .error("the worker made a request although no operator has connected: refused");
                Err("no operator has connected".to_owned().into())
            }
            SupervisorRequest::Add(_) if self.stopping != Stopping::No => {
                Err(AddServiceError::ShuttingDown.into())
            }
            SupervisorRequest::Add(service) => {
                match self
                    .services
                    .start_opening(number, service, &self.options.layers)
                {
                    // The reply follows when the snapshot is open.
                    Ok(()) => return,
                    Err(error) => Err(error.into()),
                }
            }
            SupervisorRequest::Remove(name) => self.remove_service(&name),
            SupervisorRequest::Drain => {
                self.stop();
                Ok(())
            }
            SupervisorRequest::Upgrade(program) => {
                match self.workers.start_upgrade(number, program) {
                    // The reply follows when the new worker is ready.
                    Ok(()) => return,
                    Err(error) => Err(Chain(&error).to_string().into()),
                }
            }
        };
        self.workers.reply(number, result);
    }

    /// Replaces a worker that has exited.
    pub(super) fn replace_worker(&mut self) -> Result<(), RunError> {
        // Its last messages count, and it sends no more.
        self.read_worker()?;
        let cause = self.workers.reap()?;
        if self.stopping == Stopping::Killing {
            return Ok(());
        }
        if cause.is_own_fault {
            self.vms.blame_frames();
        }
        self.log_replacement(&cause);
        self.log_lost_recordings();
        self.workers.replace(&cause)?;
        self.kill_vms_stuck_repeatedly();
        self.brief_worker();
        Ok(())
    }

    fn log_replacement(&self, cause: &ExitCause) {
        if let Some(version) = self.workers.upgrade_version() {
            self.journal
                .info(format_args!("upgraded to a worker of version {version}"));
            let ignored = self.workers.upgrade_ignores(&self.services);
            if !ignored.is_empty() {
                self.journal.error(format_args!(
                    "the worker of version {version} does not know these settings and ignores \
                     them: {}; upgrade to a newer program",
                    ignored.join(", ")
                ));
            }
            return;
        }
        let vms = count(self.vms.active().len() as u64, "VM");
        let how = &cause.description;
        self.journal.error(format_args!(
            "the worker {how}; started a new one, which takes over {vms}"
        ));
    }

    /// Tells a new worker everything that it needs to know.
    fn brief_worker(&mut self) {
        self.vms.detach();
        // The operators who wait for these can no longer be answered.
        self.services.cancel_opening();
        let briefing = Briefing {
            services: &self.services,
            vms: &self.vms,
            draining: self.stopping == Stopping::Draining,
        };
        self.workers.brief(&briefing, self.journal.recent());
    }

    /// Kills a worker that keeps a VM waiting, and abandons it if it doesn't exit.
    pub(super) fn check_worker(&mut self) -> Result<(), RunError> {
        self.check_unkillable();
        match self.workers.state() {
            WorkerState::Unkillable if self.stopping != Stopping::Killing => {
                return self.abandon_worker();
            }
            WorkerState::Unkillable | WorkerState::Dying => return Ok(()),
            WorkerState::Running => {}
        }
        let keeps_waiting = self.vms.check_neglected(self.options.stuck_after);
        if keeps_waiting || self.workers.is_start_overdue() {
            self.workers.kill_stuck();
        }
        Ok(())
    }

    /// Kills VMs on which one worker after another gets stuck.
    fn kill_vms_stuck_repeatedly(&mut self) {
        for id in self.vms.stuck_repeatedly(self.options.stuck_after) {
            let Some(service) = self.vms.get(id).map(super::vm::VmRecord::service) else {
                continue;
            };
            let what = self.services.snapshots(&[service].into());
            let why =
                format!("{what}: several workers in a row hung while the VM waited for a page");
            self.drop_active(id, SessionEnd::Killed(why));
        }
    }

    /// Abandons a worker that was killed and doesn't exit: kills all its VMs, and starts another
    /// worker.
    fn abandon_worker(&mut self) -> Result<(), RunError> {
        self.read_worker()?;
        let hung = self.vms.hung_services();
        let files = self.services.files(&self.vms.layers_being_read(&hung));
        let what = match self.services.snapshots(&hung) {
            snapshots if files.is_empty() || files == snapshots => snapshots,
            snapshots => format!("{files} for {snapshots}"),
        };
        let why = format!(
            "its worker hangs reading {what} and cannot be killed: {}",
            self.workers.blocked_in()
        );
        let mut services = Vec::new();
        for id in self.vms.active() {
            if let Some(record) = self.vms.take_active(id) {
                services.push(record.service());
                self.drop_vm(record, SessionEnd::Killed(why.clone()));
            }
        }
        let cause = ExitCause {
            description: "can't be killed".to_owned(),
            is_own_fault: true,
            stuck: true,
        };
        self.log_replacement(&cause);
        self.log_lost_recordings();
        self.workers.abandon(&cause, hung)?;
        for service in services {
            self.drop_service_if_unused(service);
        }
        self.brief_worker();
        Ok(())
    }

    /// Serves the snapshots again that abandoned workers have waited for.
    fn check_unkillable(&mut self) {
        for hung in self.workers.take_readable_again() {
            let what = self.services.snapshots(&hung);
            self.journal
                .info(format_args!("{what}: readable again; new VMs are served"));
            for service in hung {
                self.drop_service_if_unused(service);
            }
        }
    }
}
