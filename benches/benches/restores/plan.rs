//! The selection of workloads and images to run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use snaprestore_compare::layers::{self, ChainKind, ChildSizes};
use snaprestore_compare::prepare::{Images, run};
use snaprestore_compare::rounds::Samples;
use snaprestore_compare::workload::Workload;
use snaprestore_compare::{PAGE, create, crowd, wide, working_set};
use snaprestore_fixtures::guest;

use crate::Args;

/// The wide image: its number of pages, and of distinct ones.
const WIDE_PAGES: u64 = (64 << 30) / PAGE;
const WIDE_DISTINCT: u64 = (1 << 30) / PAGE;

/// Returns the workloads of the data files, restricted to the selected workloads and contenders.
pub(crate) fn workloads(only: &[String], contenders: &[String]) -> Result<Vec<Workload>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("workloads");
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let workload: Workload =
            toml::from_str(&text).with_context(|| path.display().to_string())?;
        workload
            .check()
            .with_context(|| path.display().to_string())?;
        ensure!(
            path.file_stem()
                .is_some_and(|stem| stem == workload.name.as_str()),
            "{}: calls itself {:?}",
            path.display(),
            workload.name
        );
        all.insert(workload.name.clone(), workload);
    }
    let mut chosen: Vec<Workload> = if only.is_empty() {
        all.into_values().collect()
    } else {
        let others = [create::NAME, crowd::NAME, layers::NAME, working_set::NAME];
        let names = only.iter().filter(|name| !others.contains(&name.as_str()));
        names
            .map(|name| {
                all.remove(name)
                    .with_context(|| format!("there is no workload {name:?}"))
            })
            .collect::<Result<_>>()?
    };
    if !contenders.is_empty() {
        for workload in &mut chosen {
            workload.contenders.retain(|contender| {
                let name = contender.to_string();
                contenders
                    .iter()
                    .any(|wanted| name.starts_with(wanted.as_str()))
            });
        }
        chosen.retain(|workload| !workload.contenders.is_empty());
    }
    Ok(chosen)
}

/// The images of a run, made at the first request.
pub(crate) struct Setup {
    folder: PathBuf,
    program: PathBuf,
    image: Option<PathBuf>,
    images: BTreeMap<String, Images>,
}

impl Setup {
    pub(crate) fn new(args: &Args, folder: PathBuf) -> Result<Self> {
        let program = match &args.program {
            Some(program) => program.clone(),
            None => build()?,
        };
        Ok(Self {
            folder,
            program,
            image: args.image.clone(),
            images: BTreeMap::new(),
        })
    }

    pub(crate) fn images(&mut self, name: &str) -> Result<&mut Images> {
        if !self.images.contains_key(name) {
            let folder = self
                .folder
                .join(if name.contains('/') { "file" } else { name });
            fs::create_dir_all(&folder)?;
            let images = match name {
                "wide" => self.wide(&folder)?,
                "guest" => Images::new(&self.raw()?, &folder, &self.program)?,
                "roomy" => self.roomy(&folder)?,
                name if let Some(kind) = ChainKind::named(name) => {
                    eprintln!("writing the snapshots of the {name}");
                    layers::chain(kind, &self.raw()?, &folder, &self.program)?
                }
                path => Images::new(Path::new(path), &folder, &self.program)?,
            };
            self.images.insert(name.to_owned(), images);
        }
        self.images.get_mut(name).context("it was made just now")
    }

    /// Measures writing of children and chains.
    pub(crate) fn compare_layers(
        &mut self,
        rounds: u32,
        samples: &mut Samples,
    ) -> Result<ChildSizes> {
        self.images("chain")?;
        let (raw, folder) = (self.raw()?, self.folder.join(layers::NAME));
        let chain = self
            .images
            .get_mut("chain")
            .context("it was made just now")?;
        let program = &self.program;
        Ok(layers::compare(
            &raw, chain, &folder, program, rounds, samples,
        )?)
    }

    /// Returns the memory of the guest.
    fn raw(&self) -> Result<PathBuf> {
        match &self.image {
            Some(raw) => Ok(raw.clone()),
            None => Ok(guest::memory()?.raw),
        }
    }

    /// Returns images of the guest's memory with as much empty memory behind it.
    fn roomy(&self, folder: &Path) -> Result<Images> {
        let (raw, roomy) = (self.raw()?, folder.join("roomy.raw"));
        run(Command::new("cp").arg("--sparse=auto").arg(raw).arg(&roomy))?;
        let file = fs::File::options().write(true).open(&roomy)?;
        file.set_len(file.metadata()?.len() * 2)?;
        Ok(Images::new(&roomy, folder, &self.program)?)
    }

    fn wide(&self, folder: &Path) -> Result<Images> {
        let snapshot = folder.join("wide.snap");
        if !snapshot.is_file() {
            eprintln!("writing a snapshot of 64 GiB, which takes a minute");
            let making = folder.join("wide.making");
            wide::write(&making, WIDE_PAGES, WIDE_DISTINCT)?;
            fs::rename(&making, &snapshot)?;
        }
        Ok(Images::of_snapshot(
            &snapshot,
            WIDE_PAGES * PAGE,
            folder,
            &self.program,
        ))
    }
}

/// Builds the `snaprestore` to be measured.
fn build() -> Result<PathBuf> {
    eprintln!("building snaprestore");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let output = Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args([
            "build",
            "--release",
            "--package",
            "snaprestore",
            "--bin",
            "snaprestore",
        ])
        .args(["--message-format", "json-render-diagnostics"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("snaprestore can't be built");
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo doesn't say where the program lies")
}
