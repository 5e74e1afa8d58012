//! `snaprestore serve`: serves the memory of VMs that run in other processes.

use std::path::absolute;
use std::time::Duration;

use anyhow::{Context as _, Result};
use snaprestore_daemon::api::config::{Config, MetricsAddress, check_output_folder};
use snaprestore_daemon::log::LogFormat;
use snaprestore_daemon::{Console, Endpoint, Options, Supervisor};

use crate::args;
use crate::exit::Exit;
use crate::layers;
use crate::names;
use crate::output::Output;
use crate::signals::Cancel;

pub(crate) fn run(args: &args::Serve, output: Output, cancel: &Cancel) -> Result<Exit> {
    let config = config(args)?;
    let options = Options {
        stuck_after: Duration::from_secs(args.stuck_after),
        layers: layers::folders(&args.layers, &config.layers)?
            .iter()
            .map(absolute)
            .collect::<Result<_, _>>()?,
        frame_cache: args.frame_cache,
        run_json: config.run_json.clone(),
        log_format: args.log_format,
        confine: !args.no_confine,
        user: args.user.clone(),
    };
    let console: Option<Box<dyn Console>> = match args.log_format {
        LogFormat::Text => Some(Box::new(output)),
        LogFormat::Json => None,
    };
    cancel.count_signals();
    let mut supervisor = Supervisor::new(options, console, Box::new(cancel.clone()))?;
    if let Some(control) = &config.control {
        supervisor.open(Endpoint::Control, &MetricsAddress::Socket(control.clone()))?;
    }
    if let Some(metrics) = &config.metrics {
        supervisor.open(Endpoint::Metrics, metrics)?;
    }
    for service in config.services {
        supervisor.add(service)?;
    }
    let summary = supervisor.run()?;
    output.report(&summary)?;
    Ok(match summary.incomplete {
        0 => Exit::Done,
        _ => Exit::Failed,
    })
}

/// Builds the configuration from the file and the arguments; arguments take precedence.
fn config(args: &args::Serve) -> Result<Config> {
    let mut config = match &args.config {
        Some(file) => Config::load(file)?,
        None => Config::default(),
    };
    if let (Some(snapshot), Some(socket)) = (&args.snapshot, &args.socket) {
        let (snapshot, socket) = (absolute(snapshot)?, absolute(socket)?);
        let service = args
            .options
            .service("default".to_owned(), snapshot, socket)?;
        config.services.push(service);
    }
    if let Some(control) = &args.control {
        config.control = Some(absolute(control)?);
    }
    if let Some(folder) = &args.run_json {
        config.run_json = Some(absolute(folder)?);
    }
    if let Some(folder) = &config.run_json {
        let named = || format!("{}: cannot write statistics to it", names::path(folder));
        check_output_folder(folder).with_context(named)?;
    }
    config.metrics = args.metrics.clone().or(config.metrics);
    if let Some(MetricsAddress::Socket(path)) = &mut config.metrics {
        *path = absolute(&*path)?;
    }
    config.check()?;
    Ok(config)
}
