//! The exit codes, and the mapping from errors to them.

use std::process::ExitCode;

use snaprestore_daemon::api::control::{ClientError, ConnectError};
use snaprestore_uffd::uffd;
use snapshot_format::trace::TraceError;
use snapshot_format::{FrameError, OpenError, ReadError, WriteError};

/// The documented exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The command succeeded.
    Done = 0,
    /// The operation failed.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The file is damaged, incomplete, not a snapshot, or readable only by a newer program.
    Damaged = 3,
    /// This machine does not permit the operation; the message names a remedy.
    NotPermitted = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Text about the exit codes in `--help` and the manual page.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  the operation failed; also if an ancestor of a layered snapshot is missing or was replaced
  2  wrong usage
  3  the file, or one of its ancestors, is damaged, incomplete or not a snapshot, or the file has
     a version or features that this program doesn't know
  4  this machine does not permit it (the message says what would)
A command interrupted by Ctrl-C or SIGTERM removes its partial output, lets the process that it
stopped continue, and dies from that signal: a shell shows 130 or 143.

With --json, a command that fails before it has a result prints the object
{\"error\": \"...\", \"exit_code\": N} in its place.";

/// An error that determines its own exit code.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// Options that clap accepts one by one but that contradict each other.
    #[error("{0}")]
    Usage(String),
    /// A refusal by the kernel or its settings.
    #[error("{0}")]
    NotPermitted(String),
}

/// Adds the remedies that would permit a userfaultfd to the error, one per line.
pub(crate) fn name_the_remedies(error: anyhow::Error) -> anyhow::Error {
    let refused = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<uffd::OpenError>());
    if !matches!(refused, Some(uffd::OpenError::NotPermitted { .. })) {
        return error;
    }
    let text = "\
no permission to create a userfaultfd; any one of these grants it:\n  access to /dev/userfaultfd (Linux 6.1 or later; as root: chgrp and chmod it)\
         \n  sysctl vm.unprivileged_userfaultfd=1\
         \n  the capability CAP_SYS_PTRACE\
         \nIn a container its system call filter must let userfaultfd through.";
    Refusal::NotPermitted(text.to_owned()).into()
}

/// Returns the remedy for files of a chain that are missing or damaged, to follow the error's text.
pub(crate) fn layers_remedy(error: &anyhow::Error) -> &'static str {
    const NAME_FOLDER: &str = "; restore that file, or name the folder that has it with --layers \
                               DIR or SNAPRESTORE_LAYERS";
    let remedies = error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<OpenError>() {
            return error.lacks_ancestor().then_some(NAME_FOLDER);
        }
        match cause.downcast_ref::<WriteError>()? {
            WriteError::NotInBase { .. } => Some(NAME_FOLDER),
            error if error.is_base_damage() => {
                Some("; restore the base from a copy, or take a full snapshot")
            }
            _ => None,
        }
    });
    remedies.unwrap_or_default()
}

impl Exit {
    /// Returns the exit code for an error, from the first of its causes that has one.
    pub(crate) fn from_error(error: &anyhow::Error) -> Self {
        error
            .chain()
            .find_map(|cause| {
                if let Some(refusal) = cause.downcast_ref::<Refusal>() {
                    return Some(match refusal {
                        Refusal::Usage(_) => Self::Usage,
                        Refusal::NotPermitted(_) => Self::NotPermitted,
                    });
                }
                let damage = |damage| if damage { Self::Damaged } else { Self::Failed };
                if let Some(error) = cause.downcast_ref::<OpenError>() {
                    return Some(damage(error.is_unusable()));
                }
                if let Some(error) = cause.downcast_ref::<ReadError>() {
                    return Some(damage(error.is_damage()));
                }
                if let Some(error) = cause.downcast_ref::<TraceError>() {
                    return Some(damage(error.is_damage()));
                }
                if let Some(ClientError::Refused(error)) = cause.downcast_ref() {
                    return Some(damage(error.bad_snapshot));
                }
                if let Some(ConnectError::NotPermitted { .. }) = cause.downcast_ref() {
                    return Some(Self::NotPermitted);
                }
                // The restore's own error has this error as its cause.
                if let Some(error) = cause.downcast_ref() {
                    return Some(match error {
                        uffd::OpenError::Failed { .. } => Self::Failed,
                        _ => Self::NotPermitted,
                    });
                }
                cause
                    .downcast_ref::<FrameError>()
                    .map(|error| damage(error.is_damage()))
            })
            .unwrap_or(Self::Failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn exit_code_follows_the_cause_through_contexts() {
        let error = Err::<(), _>(Refusal::NotPermitted("no".into()))
            .context("while doing this")
            .context("and that")
            .unwrap_err();
        assert_eq!(Exit::from_error(&error), Exit::NotPermitted);
        assert_eq!(Exit::from_error(&anyhow::anyhow!("other")), Exit::Failed);
    }
}
