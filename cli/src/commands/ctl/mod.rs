//! `snaprestore ctl`: talks to a running `serve` over its control socket.

mod report;
mod top;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::de::IgnoredAny;

use crate::args::{self, CtlOp};
use crate::exit::Exit;
use crate::names;
use crate::output::Output;
use crate::signals::Cancel;
use snaprestore_daemon::api::control::{Client, Request};
use snaprestore_daemon::api::types::Completed;

use report::{CompleteReport, ListReport, ServiceReport, StatsReport};

pub(crate) fn run(args: &args::Ctl, output: Output, cancel: &Cancel) -> Result<Exit> {
    // The daemon finishes a request even if this command is interrupted.
    cancel.end_at_once();
    let client = Client::connect(&args.control)?;
    match &args.op {
        CtlOp::Add(add) => {
            let (snapshot, socket) = (absolute(&add.snapshot)?, absolute(&add.socket)?);
            let service = add.options.service(add.name.clone(), snapshot, socket);
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
