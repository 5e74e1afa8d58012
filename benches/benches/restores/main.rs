//! Runs the workloads and reports which targets are met.
//!
//! ```sh
//! cargo bench -p snaprestore-benches --bench restores -- --rounds 5
//! cargo bench -p snaprestore-benches --bench restores -- --only random-reads,complete \
//!     --contenders ours
//! ```
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]

mod plan;

use std::collections::BTreeMap;
use std::fs;
use std::io::{stdin, stdout};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;
use serde::Serialize;
use snaprestore_compare::create::{self, Sizes};
use snaprestore_compare::crowd;
use snaprestore_compare::layers::{self, ChildSizes};
use snaprestore_compare::machine::Machine;
use snaprestore_compare::rounds::{self, Samples};
use snaprestore_compare::targets::{self, Target};
use snaprestore_compare::trial::{Runner, run_child};
use snaprestore_compare::working_set;
use snaprestore_compare::workload::Workload;
use snaprestore_compare::{plot, report};

/// Compares restores with the other ways to do it.
#[derive(Debug, Parser)]
struct Args {
    /// Workloads to run, by name [default: all of `workloads/`, `create`, `crowd`, `layers` and
    /// `working-set`]
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Contenders to run: those whose names begin so [default: all]
    #[arg(long, value_delimiter = ';')]
    contenders: Vec<String>,
    /// Rounds that count
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Raw memory to use in place of the real guest's
    #[arg(long)]
    image: Option<PathBuf>,
    /// Folder for the images that are made, on a disk; kept if named [default: a temporary one]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Folder for results: results.json, targets.md, pictures [default: nothing is written]
    #[arg(long)]
    out: Option<PathBuf>,
    /// The `snaprestore` to measure [default: built now]
    #[arg(long, env = "SNAPRESTORE_BIN")]
    program: Option<PathBuf>,
    /// Lists the workloads and ends
    #[arg(long)]
    list: bool,
    /// One trial, from standard input
    #[arg(long, hide = true)]
    trial: bool,
    /// Cargo says this
    #[arg(long, hide = true)]
    bench: bool,
}

/// All results of a run.
#[derive(Serialize)]
struct Results {
    machine: Machine,
    command: Vec<String>,
    rounds: u32,
    sizes: Option<Sizes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    child_sizes: Option<ChildSizes>,
    targets: Vec<Target>,
    workloads: Vec<Workload>,
    #[serde(flatten)]
    samples: Samples,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.trial {
        return Ok(run_child(&mut stdin().lock(), &mut stdout().lock())?);
    }
    let workloads = plan::workloads(&args.only, &args.contenders)?;
    if args.list {
        for workload in &workloads {
            println!("{:<18} {}", workload.name, workload.title);
        }
        return Ok(());
    }
    let machine = Machine::describe();
    println!(
        "{} x {}, Linux {}, revision {}",
        machine.cores, machine.cpu, machine.kernel, machine.revision
    );
    let temporary;
    let folder = if let Some(dir) = &args.dir {
        dir.clone()
    } else {
        // The folder is beside the build, because /tmp may be in memory.
        let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        temporary = tempfile::tempdir_in(&target).context("a folder for images")?;
        temporary.path().to_owned()
    };
    let mut setup = plan::Setup::new(&args, folder)?;
    let runner = Runner::new(std::env::current_exe()?, ["--trial"]);
    let mut samples = Samples::default();
    let mut sizes = None;
    let mut child_sizes = None;
    let mut done = BTreeMap::new();
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    if wanted(create::NAME) {
        eprintln!("create: {} rounds", args.rounds);
        let images = setup.images("guest")?;
        create::compare(images, args.rounds, &mut samples)?;
        sizes = Some(create::sizes(images)?);
    }
    if wanted(crowd::NAME) {
        eprintln!("crowd: {} rounds", args.rounds);
        crowd::compare(setup.images("guest")?, &runner, args.rounds, &mut samples)?;
        let table = crowd::table(&samples);
        println!("\n{table}");
        done.insert(crowd::NAME.to_owned(), table);
    }
    if wanted(layers::NAME) {
        eprintln!("layers: {} rounds", args.rounds);
        child_sizes = Some(setup.compare_layers(args.rounds, &mut samples)?);
        let table = layers::table(&samples);
        println!("\n{table}");
        done.insert(layers::NAME.to_owned(), table);
    }
    if wanted(working_set::NAME) {
        eprintln!("working-set: {} rounds", args.rounds);
        let images = setup.images("guest")?;
        working_set::compare(images, &runner, args.rounds, &mut samples)?;
        let table = working_set::table(&samples);
        println!("\n{table}");
        done.insert(working_set::NAME.to_owned(), table);
    }
    for workload in &workloads {
        let images = setup.images(&workload.image)?;
        let mut say = |step: &str| {
            eprintln!("{step}");
            true
        };
        rounds::run(
            workload,
            images,
            &runner,
            args.rounds,
            &mut say,
            &mut samples,
        )
        .with_context(|| workload.name.clone())?;
        let table = report::table(&samples, workload);
        println!("\n{table}");
        done.insert(workload.name.clone(), table);
    }
    let mut targets = targets::all(&samples, sizes.as_ref(), child_sizes.as_ref());
    if !args.only.is_empty() {
        targets.retain(|target| target.value.is_some());
    }
    println!("\n{}", targets::table(&targets));
    if let Some(out) = &args.out {
        let results = Results {
            machine,
            command: std::env::args().skip(1).collect(),
            rounds: args.rounds,
            sizes,
            child_sizes,
            targets,
            workloads,
            samples,
        };
        write(out, &results, &done)
            .with_context(|| format!("writing results to {}", out.display()))?;
    }
    Ok(())
}

fn write(
    out: &std::path::Path,
    results: &Results,
    tables: &BTreeMap<String, String>,
) -> Result<()> {
    fs::create_dir_all(out)?;
    let mut text = serde_json::to_string_pretty(results)?;
    text.push('\n');
    fs::write(out.join("results.json"), text)?;
    fs::write(out.join("targets.md"), targets::table(&results.targets))?;
    let workloads = results.workloads.iter();
    let names = workloads.map(|workload| workload.name.as_str());
    let in_order: Vec<&str> = [crowd::NAME, layers::NAME, working_set::NAME]
        .into_iter()
        .chain(names)
        .filter_map(|name| tables.get(name).map(String::as_str))
        .collect();
    fs::write(out.join("tables.txt"), in_order.join("\n"))?;
    let workload = layers::workload();
    if tables.contains_key(&workload.name) {
        let svg = plot::bars(&results.samples, &workload);
        fs::write(out.join(format!("{}.svg", workload.name)), svg)?;
    }
    for workload in &results.workloads {
        let name = |kind: &str| out.join(format!("{}{kind}.svg", workload.name));
        if workload.latencies {
            if let Some(svg) = plot::percentiles(&results.samples, workload) {
                fs::write(name("-percentiles"), svg)?;
            }
        } else if workload.most_pages.is_none() {
            fs::write(name(""), plot::bars(&results.samples, workload))?;
        }
    }
    Ok(())
}
