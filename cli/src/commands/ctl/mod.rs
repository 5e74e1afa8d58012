//! `snaprestore ctl`: talks to a running `serve` over its control socket.

mod report;
mod top;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::de::IgnoredAny;

use crate::args::{self, CtlOp};
use crate::exit::{Exit, Refusal};
use crate::names;
use crate::output::Output;
use crate::signals::Cancel;
use crate::target;
use crate::trace_file::TraceFile;
use snaprestore_daemon::api::control::{Client, RecordAction, Request};
use snaprestore_daemon::api::types::{Completed, Recorded};

use report::{CompleteReport, ListReport, ServiceReport, StatsReport};

pub(crate) fn run(args: &args::Ctl, output: Output, cancel: &Cancel) -> Result<Exit> {
    // The daemon finishes a request even if this command is interrupted.
    cancel.end_at_once();
    let client = Client::connect(&args.control)?;
    match &args.op {
        CtlOp::Add(add) => {
            let (snapshot, socket) = (absolute(&add.snapshot)?, absolute(&add.socket)?);
            let service = add.options.service(add.name.clone(), snapshot, socket)?;
            service.check()?;
            let name = service.name.clone();
            client.send(&Request::Add { service })?;
            let _: IgnoredAny = client.receive(true)?;
            output.report(&ServiceReport::added(name))?;
        }
        CtlOp::Remove(remove) => {
            let name = remove.name.clone();
            client.send(&Request::Remove { name: name.clone() })?;
            let _: IgnoredAny = client.receive(false)?;
            output.report(&ServiceReport::removed(name))?;
        }
        CtlOp::List => {
            client.send(&Request::List {})?;
            output.report(&ListReport(client.receive(false)?))?;
        }
        CtlOp::Stats(stats) => {
            let (vm, buckets) = (stats.vm, stats.buckets);
            client.send(&Request::Stats { vm, buckets })?;
            let vms = client.receive(false)?;
            output.report(&StatsReport { vms })?;
        }
        CtlOp::Complete(complete) => {
            let (vm, all) = (complete.vm, complete.all);
            client.send(&Request::Complete { vm, all })?;
            return report_completed(client.receive(true)?, output);
        }
        CtlOp::Record(record) => record_vm(record, &client, output)?,
        CtlOp::Drain => {
            client.send(&Request::Drain {})?;
            return report_completed(client.receive(true)?, output);
        }
        CtlOp::Top(top) => return top::run(top, &args.control, client, output),
        CtlOp::Upgrade(upgrade) => {
            let program = upgrade.program.as_deref().map(absolute).transpose()?;
            client.send(&Request::Upgrade { program })?;
            output.report(&report::UpgradeReport(client.receive(true)?))?;
        }
    }
    Ok(Exit::Done)
}

/// Starts or stops a recording. The file is created first, so that a bad path ends no recording.
fn record_vm(record: &args::CtlRecord, client: &Client, output: Output) -> Result<()> {
    let (vm, action) = (record.vm, record.action);
    let to_stdout = match &record.output {
        Some(path) => target::is_stdout_without_json(path, output)?,
        None => false,
    };
    let file = match (action, &record.output) {
        (RecordAction::Stop, Some(path)) => Some(TraceFile::create(path)?),
        (RecordAction::Start, Some(_)) => {
            let why = "`ctl record VM start` writes no file: name it for `stop`";
            return Err(Refusal::Usage(why.into()).into());
        }
        (_, None) => None,
    };
    client.send(&Request::Record { vm, action })?;
    let Some(file) = file else {
        let _: IgnoredAny = client.receive(false)?;
        return output.report(&report::RecordReport { vm });
    };
    let recorded: Recorded = client.receive(false)?;
    let trace = recorded.trace();
    let trace = trace.context("the daemon did not send a trace; it may be of another version")?;
    let written = file.write(&trace).with_context(|| {
        format!(
            "cannot write the trace of VM {vm}, which the daemon keeps until the VM is recorded \
             again or ends; `snaprestore ctl record {vm} stop -o FILE` fetches it again"
        )
    })?;
    output.report_beside(to_stdout, &written)
}

/// Reports the VMs that were to be released; fails if one could not be.
fn report_completed(vms: Vec<Completed>, output: Output) -> Result<Exit> {
    let all = vms.iter().all(|vm| vm.done);
    output.report(&CompleteReport { vms })?;
    Ok(if all { Exit::Done } else { Exit::Failed })
}

/// Returns an absolute path, since the daemon runs in another folder.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| names::path(path))
}
