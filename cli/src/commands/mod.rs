//! The commands, one per file. Each first checks its arguments and opens its files, then does its
//! work, then reports.

mod bench;
mod completions;
mod create;
mod ctl;
mod demo;
mod doctor;
mod extract;
mod flatten;
mod info;
mod man;
mod optimize;
mod rebase;
mod report;
mod restore;
mod serve;
mod trace;
mod tree;
mod verify;

use anyhow::Result;

use crate::args::Command;
use crate::exit::Exit;
use crate::output::Output;
use crate::signals::Cancel;

/// Runs a command. The exit code tells whether its findings are good.
pub(crate) fn run(command: Command, output: Output, cancel: &Cancel) -> Result<Exit> {
    match command {
        Command::Create(args) => create::run(&args, output, cancel),
        Command::Info(args) => info::run(&args, output, cancel),
        Command::Report(args) => report::run(&args, output, cancel),
        Command::Verify(args) => verify::run(&args, output, cancel),
        Command::Extract(args) => extract::run(&args, output, cancel),
        Command::Flatten(args) => flatten::run(&args, output, cancel),
        Command::Rebase(args) => rebase::run(&args, output, cancel),
        Command::Optimize(args) => optimize::run(&args, output, cancel),
        Command::Trace(args) => trace::run(&args, output, cancel),
        Command::Tree(args) => tree::run(&args, output),
        Command::Restore(args) => restore::run(&args, output, cancel),
        Command::Serve(args) => serve::run(&args, output, cancel),
        Command::Ctl(args) => ctl::run(&args, output, cancel),
        Command::Bench(args) => bench::run(&args, output, cancel),
        Command::BenchTrial => bench::run_trial(cancel),
        Command::Doctor => doctor::run(output),
        Command::Completions(args) => completions::run(&args, output),
        Command::Man(args) => man::run(&args, output),
        Command::Demo(args) => demo::run(&args, output, cancel),
        Command::DemoOwner(args) => demo::run_owner(&args, cancel),
    }
}
