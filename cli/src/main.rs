//! The `snaprestore` command: what was typed (`args`) becomes what was meant in `commands`, one
//! file a command; memory comes in through `source`, results go out through `output`, and `exit`
//! says with which code.

mod args;
mod blocks;
mod commands;
mod exit;
mod facts;
mod output;
mod progress;
mod signals;
mod source;
mod target;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = args::Args::parse();
    let output = output::Output::new(args.common);
    start_log();
    let cancel = match signals::watch() {
        Ok(cancel) => cancel,
        Err(error) => return output.fail(&error).into(),
    };
    match commands::run(args.command, output, &cancel) {
        Ok(exit) => exit.into(),
        Err(_) if cancel.requested() => {
            // Everything that needed undoing was undone while the error passed through its
            // owners: now the signal may have its usual effect, so that shells see it.
            output.warn("interrupted; nothing was left behind");
            cancel.die()
        }
        Err(error) => output.fail(&error).into(),
    }
}

/// Libraries log through `tracing`; the variable chooses what is shown, as `debug` or
/// `snaprestore_engine=trace`.
fn start_log() {
    if let Ok(filter) = tracing_subscriber::EnvFilter::try_from_env("SNAPRESTORE_LOG") {
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .init();
    }
}
