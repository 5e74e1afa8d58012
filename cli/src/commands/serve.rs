//! `snaprestore serve`: the memory of VMs that run in other processes.

use std::fmt;
use std::path::absolute;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::args;
use crate::daemon::{Keeper, Options, Service, Vm};
use crate::exit::Exit;
use crate::output::Output;
use crate::signals::Cancel;

/// What became of all VMs.
#[derive(Serialize)]
struct Report {
    snapshot: String,
    socket: String,
    /// How many there were.
    served: u64,
    vms: Vec<Vm>,
}

pub(crate) fn run(args: &args::Serve, output: Output, cancel: &Cancel) -> Result<Exit> {
    let options = Options {
        stuck_after: Duration::from_secs(args.stuck_after),
    };
    let mut keeper = Keeper::new(options, output, cancel)?;
    keeper.add(Service {
        name: "default".to_owned(),
        snapshot: absolute(&args.snapshot)?,
        socket: absolute(&args.socket)?,
        prefetch: args.prefetch,
        on_error: args.on_error,
        allow_uid: args.allow_uid.clone(),
        threads: args.threads,
        patience: args.patience,
    })?;
    output.say(format_args!(
        "serving {} at {}",
        args.snapshot.display(),
        args.socket.display()
    ));
    let (vms, served) = keeper.run()?;
    output.report(&Report {
        snapshot: args.snapshot.display().to_string(),
        socket: args.socket.display().to_string(),
        served,
        vms,
    })?;
    Ok(Exit::Done)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "served {} VMs from {}", self.served, self.snapshot)
    }
}
