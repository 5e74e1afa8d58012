//! `snaprestore man`: the manual pages, made from the same definitions as `--help`.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use clap_mangen::Man;
use serde::Serialize;

use crate::args::{self, Args};
use crate::exit::{Exit, Refusal};
use crate::output::Output;

/// Pages that were printed or written.
#[derive(Serialize)]
struct Pages {
    pages: Vec<Page>,
}

#[derive(Serialize)]
struct Page {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for page in &self.pages {
            match (&page.text, &page.file) {
                (Some(text), _) => f.write_str(text)?,
                (None, Some(file)) => writeln!(f, "wrote {}", file.display())?,
                (None, None) => {}
            }
        }
        Ok(())
    }
}

pub(crate) fn run(args: &args::Man, output: Output) -> Result<Exit> {
    let mut root = Args::command();
    // Gives the commands their full names, as snaprestore-create.
    root.build();
    let pages = if let Some(folder) = &args.output {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("{}: creating the folder", folder.display()))?;
        let commands = root
            .get_subcommands()
            .filter(|command| !command.is_hide_set() && command.get_name() != "help");
        std::iter::once(&root)
            .chain(commands)
            .map(|command| write_page(command, folder))
            .collect::<Result<_>>()?
    } else {
        let command = match &args.command {
            None => &root,
            Some(name) => root
                .find_subcommand(name)
                .ok_or_else(|| Refusal::Usage(format!("there is no command {}", name.display())))?,
        };
        let (name, text) = page(command)?;
        vec![Page {
            name,
            file: None,
            text: Some(text),
        }]
    };
    output.report(&Pages { pages })?;
    Ok(Exit::Done)
}

fn write_page(command: &clap::Command, folder: &Path) -> Result<Page> {
    let (name, text) = page(command)?;
    let file = folder.join(format!("{name}.1"));
    std::fs::write(&file, text).with_context(|| format!("{}: writing", file.display()))?;
    Ok(Page {
        name,
        file: Some(file),
        text: None,
    })
}

/// The name of a command's page and its text.
fn page(command: &clap::Command) -> Result<(String, String)> {
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name())
        .to_owned();
    let mut text = Vec::new();
    Man::new(command.clone()).render(&mut text)?;
    Ok((name, String::from_utf8(text)?))
}
