//! The processes that a daemon starts from its own program, by hidden subcommands.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nix::errno::Errno;

use crate::fd_store::guardian;
use crate::log;
use crate::signals::block_file_size_signal;
use crate::worker::{self, WorkerError, WorkerOptions};

/// The role in a daemon that a process was started for.
#[derive(Debug)]
pub struct Role(Hidden);

/// The command line of such a process.
#[derive(Debug, Parser)]
struct CommandLine {
    #[command(subcommand)]
    hidden: Hidden,
}

/// The hidden subcommands.
#[derive(Debug, Subcommand)]
enum Hidden {
    Worker(WorkerOptions),
    Guardian {
        /// Whether it is the process that stays; without it another is started that does.
        #[arg(long)]
        stay: bool,
    },
}

/// Why a process could not play its role.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoleError {
    /// The signal for files that grow too large could not be blocked.
    #[error("cannot block SIGXFSZ")]
    Signals(#[source] Errno),
    /// The worker failed.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

impl Role {
    /// Returns the role that this process was started for, or `None` if no daemon started it.
    pub fn of_this_process() -> Option<Self> {
        let command_line = CommandLine::try_parse().ok()?;
        Some(Self(command_line.hidden))
    }

    /// Runs the role to its end.
    ///
    /// The process must have no other thread yet, and must not have changed its handling of
    /// signals.
    ///
    /// # Errors
    ///
    /// Returns an error if the worker can't continue; the supervisor then starts another one.
    pub fn run(self) -> Result<ExitCode, RoleError> {
        // The mask is inherited from the supervisor, which another program may have started.
        block_file_size_signal().map_err(RoleError::Signals)?;
        match self.0 {
            Hidden::Worker(options) => {
                log::start(Some(options.log_format));
                Ok(worker::run(&options)?)
            }
            Hidden::Guardian { stay } => Ok(guardian::run(stay)),
        }
    }
}
