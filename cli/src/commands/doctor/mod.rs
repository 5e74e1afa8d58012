//! `snaprestore doctor`: checks what this machine permits, and names remedies.

mod checks;

use std::fmt;

use anyhow::Result;
use serde::Serialize;
use snaprestore_uffd::uffd::Probe;

use crate::exit::Exit;
use crate::output::Output;
use checks::{Check, State};

#[derive(Serialize)]
struct DoctorReport {
    /// Whether memory can be restored lazily on this machine.
    ok: bool,
    /// Whether it can be restored only if no system call or virtual CPU touches missing memory.
    user_mode_only: bool,
    kernel: String,
    checks: Vec<Check>,
}

pub(crate) fn run(output: Output) -> Result<Exit> {
    let probe = Probe::take();
    let checks = checks::all(&probe, &checks::Surroundings::look());
    let ok = checks.iter().all(|check| check.state != State::Missing);
    let refused = probe.open.as_ref().err();
    output.report(&DoctorReport {
        ok,
        user_mode_only: ok && refused.is_some_and(checks::needs_user_mode_only),
        kernel: probe.kernel_release.clone(),
        checks,
    })?;
    Ok(if ok { Exit::Done } else { Exit::NotPermitted })
}

impl fmt::Display for DoctorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let mark = match check.state {
                State::Good => "good   ",
                State::Limited => "limited",
                State::Missing => "MISSING",
            };
            writeln!(f, "{mark}  {:<22} {}", check.name, check.detail)?;
            if let Some(remedy) = &check.remedy {
                writeln!(f, "{:32} -> {remedy}", "")?;
            }
        }
        writeln!(
            f,
            "\n{}",
            if self.user_mode_only {
                "Memory can be restored lazily here, but only for user mode: by restore, demo and bench, and \
                 not for virtual CPUs."
            } else if self.ok {
                "Memory can be restored lazily here."
            } else {
                "Memory cannot be restored lazily here; each MISSING check names its remedy."
            }
        )
    }
}
