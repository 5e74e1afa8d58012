//! `snaprestore man`: prints the manual pages, generated from the same definitions as `--help`.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::CommandFactory as _;
use clap_mangen::Man;
use serde::Serialize;

use crate::args::{self, Args};
use crate::exit::{Exit, Refusal};
use crate::names;
use crate::output::Output;
use crate::target;

/// Manual pages that were printed or written.
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
                (None, Some(file)) => writeln!(f, "wrote {}", names::path(file))?,
                (None, None) => {}
            }
        }
        Ok(())
    }
}

pub(crate) fn run(args: &args::Man, output: Output) -> Result<Exit> {
    let mut root = Args::command();
    // Sets the full names of the commands, such as snaprestore-create.
    root.build();
    if args.output.as_deref().is_some_and(target::is_stdout) {
        let text = "--output names a folder for all pages; without it, one page goes to standard \
                    output";
        return Err(Refusal::Usage(text.into()).into());
    }
    let pages = if let Some(folder) = &args.output {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("{}: creating the folder", names::path(folder)))?;
        let pages: Vec<_> = std::iter::once(&root)
            .chain(all_below(&root))
            .map(page)
            .collect::<Result<_>>()?;
        write_pages(pages, folder, args.force)?
    } else {
        let command = match &args.command {
            None => &root,
            Some(name) => all_below(&root)
                .into_iter()
                .find(|command| page_name(command).strip_prefix("snaprestore-") == name.to_str())
                .ok_or_else(|| {
                    Refusal::Usage(format!(
                        "no command {}; `snaprestore --help` lists them, and a subcommand is named like ctl-add",
                        names::path(name.as_ref())
                    ))
                })?,
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

/// Returns the public commands below `command`, each followed by its own subcommands.
fn all_below(command: &clap::Command) -> Vec<&clap::Command> {
    let shown = |command: &&clap::Command| !command.is_hide_set() && command.get_name() != "help";
    let mut all = Vec::new();
    for below in command.get_subcommands().filter(shown) {
        all.push(below);
        all.extend(all_below(below));
    }
    all
}

/// Returns the name of a command's page, such as `snaprestore-ctl-add`.
fn page_name(command: &clap::Command) -> &str {
    command
        .get_display_name()
        .unwrap_or_else(|| command.get_name())
}

/// Writes pages, given by name and text. Without `force`, writes none if one of them exists.
fn write_pages(pages: Vec<(String, String)>, folder: &Path, force: bool) -> Result<Vec<Page>> {
    let file = |name: &str| folder.join(format!("{name}.1"));
    let mut files = pages.iter().map(|(name, _)| file(name));
    if let Some(file) = files.find(|file| !force && file.symlink_metadata().is_ok()) {
        bail!(
            "{}: exists already; --force replaces it",
            names::path(&file)
        );
    }
    let write = |(name, text): (String, String)| {
        let file = file(&name);
        std::fs::write(&file, text).with_context(|| format!("{}: writing", names::path(&file)))?;
        Ok(Page {
            name,
            file: Some(file),
            text: None,
        })
    };
    pages.into_iter().map(write).collect()
}

/// Returns the name of a command's page and its text.
fn page(command: &clap::Command) -> Result<(String, String)> {
    let name = page_name(command).to_owned();
    let mut text = Vec::new();
    Man::new(command.clone())
        .source(concat!("snaprestore ", env!("CARGO_PKG_VERSION")))
        .render(&mut text)?;
    Ok((name, String::from_utf8(text)?))
}
