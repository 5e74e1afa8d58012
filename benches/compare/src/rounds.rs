//! Trials in rounds: every contender once, then all again, so that changes on the machine affect
//! all of them. Each round begins with another contender.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::BenchError;
use crate::contender::Contender;
use crate::prepare::Images;
use crate::trial::{Outcome, RestoreTrial, Runner, Trial};
use crate::workload::{Limit, Order, Workload};

/// One measured trial.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// The workload's name.
    pub workload: String,
    /// The contender's name.
    pub contender: String,
    /// The round; 0 is the one for proof.
    pub round: u32,
    /// Measured values.
    pub outcome: Outcome,
}

/// A contender that could not take part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absent {
    /// The workload's name.
    pub workload: String,
    /// The contender's name.
    pub contender: String,
    /// The reason.
    pub why: String,
}

/// Results of a run of workloads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Samples {
    /// Every trial.
    pub samples: Vec<Sample>,
    /// Contenders that could not take part.
    pub absent: Vec<Absent>,
}

/// Progress callback, with a description of the current step; returning false ends the run.
pub type OnStep<'a> = &'a mut dyn FnMut(&str) -> bool;

/// Runs one workload: a round of proof, then `rounds` measured ones.
pub fn run(
    workload: &Workload,
    images: &mut Images,
    runner: &Runner,
    rounds: u32,
    on_step: OnStep<'_>,
    into: &mut Samples,
) -> Result<(), BenchError> {
    workload.check()?;
    let mut here = Vec::new();
    for contender in &workload.contenders {
        step(
            on_step,
            &format!("{}: preparing {contender}", workload.name),
        )?;
        match trial(workload, contender, images) {
            Ok(trial) => here.push((contender.to_string(), Trial::Restore(trial))),
            Err(BenchError::Unavailable(why)) => {
                into.leave_out(workload, &contender.to_string(), why);
            }
            Err(error) => return Err(error),
        }
    }
    for limit in &workload.limits {
        let snapshot = match limit {
            Limit::DecodeChain => images.chain()?,
            Limit::Decode | Limit::Copy | Limit::DecodeEach | Limit::WorkingSet => {
                images.snapshot(&workload.snapshot())?
            }
        };
        here.push((limit.name().into(), limit_trial(workload, *limit, snapshot)));
    }
    for round in 0..=rounds {
        let mut left = Vec::new();
        for turn in 0..here.len() {
            let (name, trial) = &here[(turn + round as usize) % here.len()];
            step(
                on_step,
                &format!("{}: round {round} of {rounds}: {name}", workload.name),
            )?;
            let mut trial = trial.clone();
            if let Trial::Restore(trial) = &mut trial {
                trial.proof = round == 0;
            }
            match runner.run(&trial) {
                Ok(outcome) => into.samples.push(Sample {
                    workload: workload.name.clone(),
                    contender: name.clone(),
                    round,
                    outcome,
                }),
                Err(BenchError::Unavailable(why)) => {
                    into.leave_out(workload, name, why);
                    left.push(name.clone());
                }
                Err(error) => return Err(error),
            }
        }
        here.retain(|(name, _)| !left.contains(name));
        if here.is_empty() {
            break;
        }
        check(workload, round, &into.samples)?;
    }
    Ok(())
}

fn step(on_step: OnStep<'_>, what: &str) -> Result<(), BenchError> {
    if on_step(what) {
        Ok(())
    } else {
        Err(BenchError::Unavailable("interrupted".into()))
    }
}

/// Returns the trial of a limit.
fn limit_trial(workload: &Workload, limit: Limit, snapshot: PathBuf) -> Trial {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    match limit {
        Limit::Decode | Limit::DecodeChain => Trial::Decode { snapshot, threads },
        Limit::Copy => Trial::Copy { snapshot, threads },
        Limit::WorkingSet => Trial::WorkingSet { snapshot, threads },
        Limit::DecodeEach => Trial::DecodeEach {
            snapshot,
            most: workload.most_pages.unwrap_or(u64::MAX),
            seed: workload.seed,
        },
    }
}

/// Returns the trial of a contender.
fn trial(
    workload: &Workload,
    contender: &Contender,
    images: &mut Images,
) -> Result<RestoreTrial, BenchError> {
    let file = images.file_for(contender)?;
    let listed = match workload.order {
        Order::Frames => Some(images.page_of_each_frame(&workload.snapshot())?),
        Order::Trace => workload.trace.clone(),
        Order::WorkingSet => Some(images.working_set()?.touches),
        Order::Others => Some(images.working_set()?.others),
        Order::None | Order::Sequential | Order::Random => None,
    };
    Ok(RestoreTrial {
        contender: contender.clone(),
        file,
        program: images.program().to_owned(),
        bytes: images.bytes(),
        order: workload.order,
        seed: workload.seed,
        share: workload.share,
        most_pages: workload.most_pages,
        listed,
        access: workload.access,
        threads: workload.threads,
        cache: workload.cache,
        latencies: workload.latencies,
        proof: false,
    })
}

/// Checks that all contenders of a round touched the same number of pages and read the same bytes.
fn check(workload: &Workload, round: u32, samples: &[Sample]) -> Result<(), BenchError> {
    let mut here = samples.iter().filter(|sample| {
        sample.workload == workload.name
            && sample.round == round
            && !sample.contender.starts_with("limit:")
    });
    let Some(first) = here.next() else {
        return Ok(());
    };
    let seen = |sample: &Sample| {
        (
            sample.outcome.count,
            sample.outcome.sum,
            sample.outcome.checksum,
        )
    };
    match here.find(|other| seen(other) != seen(first)) {
        Some(other) => Err(BenchError::WrongBytes {
            workload: workload.name.clone(),
            contender: other.contender.clone(),
            other: first.contender.clone(),
        }),
        None => Ok(()),
    }
}

impl Samples {
    fn leave_out(&mut self, workload: &Workload, contender: &str, why: String) {
        self.absent.push(Absent {
            workload: workload.name.clone(),
            contender: contender.to_owned(),
            why,
        });
    }

    /// Returns the measured values of a contender in a workload.
    pub fn values<'a>(
        &'a self,
        workload: &'a str,
        contender: &'a str,
        value: impl Fn(&Outcome) -> f64 + 'a,
    ) -> impl Iterator<Item = f64> + 'a {
        self.samples
            .iter()
            .filter(move |sample| {
                sample.round > 0 && sample.workload == workload && sample.contender == contender
            })
            .map(move |sample| value(&sample.outcome))
    }

    /// Returns the contenders of a workload, in the order of their first runs.
    pub fn contenders(&self, workload: &str) -> Vec<String> {
        let mut names = Vec::new();
        for sample in self
            .samples
            .iter()
            .filter(|sample| sample.workload == workload)
        {
            if !names.contains(&sample.contender) {
                names.push(sample.contender.clone());
            }
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload {
            name: "w".into(),
            title: String::new(),
            image: "guest".into(),
            order: Order::Random,
            seed: 1,
            trace: None,
            share: 1.0,
            most_pages: None,
            access: crate::workload::Access::Read,
            threads: 1,
            cache: crate::workload::Cache::Warm,
            latencies: false,
            contenders: vec![Contender::Mmap],
            limits: Vec::new(),
        }
    }

    fn sample(contender: &str, round: u32, sum: u64) -> Sample {
        Sample {
            workload: "w".into(),
            contender: contender.into(),
            round,
            outcome: Outcome {
                sum: Some(sum),
                total_ms: crate::stats::float(sum),
                ..Outcome::default()
            },
        }
    }

    #[test]
    fn contender_with_wrong_bytes_fails_the_run() {
        let good = [sample("a", 0, 7), sample("b", 0, 7), sample("b", 1, 9)];
        assert!(check(&workload(), 0, &good).is_ok());
        let bad = [sample("a", 0, 7), sample("b", 0, 8)];
        let error = check(&workload(), 0, &bad).unwrap_err().to_string();
        assert!(
            error.contains('b') && error.contains("other bytes than a"),
            "{error}"
        );
    }

    #[test]
    fn proof_round_is_not_measured() {
        let samples = Samples {
            samples: vec![sample("a", 0, 1000), sample("a", 1, 3), sample("a", 2, 4)],
            absent: Vec::new(),
        };
        let values: Vec<f64> = samples
            .values("w", "a", |outcome| outcome.total_ms)
            .collect();
        assert_eq!(values, [3.0, 4.0]);
        assert_eq!(samples.contenders("w"), ["a"]);
    }

    #[test]
    fn invalid_workloads_are_refused() {
        assert!(workload().check().is_ok());
        let changes: [fn(&mut Workload); 4] = [
            |w| w.share = 0.0,
            |w| w.threads = 0,
            |w| w.contenders.clear(),
            |w| w.order = Order::Trace,
        ];
        for change in changes {
            let mut workload = workload();
            change(&mut workload);
            assert!(workload.check().is_err());
        }
    }
}
