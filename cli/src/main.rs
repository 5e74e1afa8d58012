//! The `snaprestore` command: saves the memory of microVMs and processes in small files with
//! checksums, and restores it lazily.
//!
//! ```text
//!  arguments ──▶ args ──▶ commands/ ──▶ snapshot-format   create, info, verify, extract
//!                           │   ├─────▶ engine            restore
//!  memory ─────▶ source/ ───┘   ├─────▶ daemon            serve, ctl
//!  (file, core, process)        └─────▶ compare           bench
//!                           │
//!                           ├──▶ output: text for people, or JSON
//!                           └──▶ exit: the exit code, from the error
//! ```
//!
//! # Example
//!
//! ```text
//! $ snaprestore create guest.raw -o guest.snap
//! $ snaprestore verify guest.snap
//! $ snaprestore restore guest.snap --touch random --check guest.raw
//! ```
//!
//! # Where to start
//!
//! | to change | look at |
//! | --- | --- |
//! | an option or its help | `args`, then the command's file in `commands/` |
//! | what can be packed | `source/`: one file or folder for each kind of memory |
//! | exit codes | `exit` |
//! | text, tables, warnings, JSON | `output` |
//! | how a target file is chosen and replaced | `target`, and `SnapshotFile` of the format |
//! | Ctrl-C and other signals | `signals` |
//!
//! The processes of `serve` (supervisor, worker, guardian) are this program, too: `main` asks the
//! daemon first whether this process is one of them.
//!
//! # Features
//!
//! - `fail-points`: places where the project's own tests kill the process; not for use.

#![forbid(unsafe_code)]

mod args;
mod blocks;
mod commands;
mod counterparts;
mod exit;
mod facts;
mod layers;
mod map;
mod names;
mod output;
mod progress;
mod signals;
mod source;
mod target;
mod trace_file;

use std::process::ExitCode;

use snaprestore_daemon::{Role, log};

fn main() -> ExitCode {
    if let Some(role) = Role::of_this_process() {
        // A role handles signals and threads in its own way.
        return role
            .run()
            .unwrap_or_else(|error| output::failed(&error.into()).into());
    }
    let args = match args::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(error) => return not_understood(&error),
    };
    let output = output::Output::new(args.common);
    if let Err(error) = signals::outlive_file_limit() {
        return output.fail(&error).into();
    }
    // A chain may have more files than the usual limit.
    snaprestore_uffd::os::limits::raise_descriptor_limit();
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
