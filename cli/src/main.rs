//! The `snaprestore` command. `args` parses the command line; `commands` has one file per command.
//! Memory comes in through `source`, results go out through `output`, and `exit` chooses the exit
//! code.

#![forbid(unsafe_code)]

mod args;
mod blocks;
mod commands;
mod exit;
mod facts;
mod input;
mod names;
mod output;
mod progress;
mod signals;
mod source;
mod target;

use std::process::ExitCode;

use clap::Parser;
use snaprestore_daemon::{Role, log};

fn main() -> ExitCode {
    if let Some(role) = Role::of_this_process() {
        // A role handles signals and threads in its own way.
        return role
            .run()
            .unwrap_or_else(|error| output::failed(&error.into()).into());
    }
    let args = match args::Args::try_parse() {
        Ok(args) => args,
        Err(error) => return not_understood(&error),
    };
    let output = output::Output::new(args.common);
    if let Err(error) = signals::outlive_file_limit() {
        return output.fail(&error).into();
    }
    let writes = args.command.writes();
    log::start(args.command.log_format());
    let cancel = match signals::watch() {
        Ok(cancel) => cancel,
        Err(error) => return output.fail(&error).into(),
    };
    match commands::run(args.command, output, &cancel) {
        Ok(exit) => exit.into(),
        Err(_) if cancel.requested() => {
            // The error has unwound through its owners, which undid everything that needed undoing.
            // The signal may now have its default effect, so that shells see it.
            let left = if writes {
                "; nothing was left behind"
            } else {
                ""
            };
            output.warn(format_args!("interrupted{left}"));
            output.failed("interrupted", cancel.exit_code());
            cancel.die()
        }
        Err(error) => output.fail(&error).into(),
    }
}

/// Prints the help, or the error in the command line.
fn not_understood(error: &clap::Error) -> ExitCode {
    if error.use_stderr() {
        // The message repeats the command line, which may contain file names that a shell inserted.
        output::to_stderr(&error.render().to_string());
    } else {
        let _ = error.print();
    }
    let code = error.exit_code();
    if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let first = text.lines().next().unwrap_or_default();
        let first = first.strip_prefix("error: ").unwrap_or(first);
        let common = args::Common {
            json: true,
            quiet: false,
        };
        output::Output::new(common).failed(first, code);
    }
    ExitCode::from(u8::try_from(code).unwrap_or(exit::Exit::Usage as u8))
}
