//! `snaprestore completions`: the completion script of a shell.

use std::fmt;

use anyhow::Result;
use clap::CommandFactory as _;
use serde::Serialize;

use crate::args::{Args, Completions};
use crate::exit::Exit;
use crate::output::Output;

#[derive(Serialize)]
struct Script {
    shell: String,
    script: String,
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.script)
    }
}

pub(crate) fn run(args: &Completions, output: Output) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "snaprestore", &mut script);
    output.report(&Script {
        shell: args.shell.to_string(),
        script: String::from_utf8(script)?,
    })?;
    Ok(Exit::Done)
}
