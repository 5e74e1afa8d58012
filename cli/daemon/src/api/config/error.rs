//! Why a configuration, or a part of it, can't be served.

use std::io;

use nix::errno::Errno;

use super::{MAX_SERVICE_NAME_BYTES, MAX_SOCKET_PATH_BYTES};

/// Why a file can't be used as a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file can't be read.
    #[error("cannot read {file}")]
    Read {
        /// The path of the file, escaped.
        file: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The file is too large for a configuration.
    #[error("cannot read {file}: it is larger than 4 MiB")]
    TooLarge {
        /// The path of the file, escaped.
        file: String,
    },
    /// The content is wrong.
    #[error("{file}")]
    Invalid {
        /// The path of the file, escaped.
        file: String,
        /// The place, and the right values.
        source: ConfigError,
    },
}

/// Why a configuration can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not a configuration.
    #[error("{message}")]
    Parse {
        /// The line and, for an unknown key, the known ones.
        message: String,
    },
    /// The path of a socket is wrong.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// A service is wrong.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The control socket is also that of the metrics.
    #[error("metrics = {socket}: control already uses that socket")]
    MetricsSocket {
        /// The path of the socket, escaped.
        socket: String,
    },
    /// Two services have one name.
    #[error("two services are named {name:?}: give each its own name")]
    SameName {
        /// The name.
        name: String,
    },
    /// A service has the socket of another one, or of the daemon.
    #[error("service {service:?}: socket = {socket} is used above: give each its own socket")]
    SameSocket {
        /// The name of the later service.
        service: String,
        /// The path of the socket, escaped.
        socket: String,
    },
    /// There are neither services nor a control socket.
    #[error(
        "there is nothing to serve: add a [[service]], or control = \"PATH\" to add services later"
    )]
    Nothing,
}

/// Why a service can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// The name can't be that of a service.
    #[error(
        "the name {name:?} of a service must have 1 to {MAX_SERVICE_NAME_BYTES} letters, digits, \
         dots, dashes and underscores"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// A setting is wrong.
    #[error("service {service:?}")]
    Setting {
        /// The name of the service.
        service: String,
        /// The setting, and the right values.
        source: SettingError,
    },
}

/// Why a setting is wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingError {
    /// A path is empty.
    #[error("{setting} is empty: it must be a path")]
    Empty {
        /// The name of the setting.
        setting: &'static str,
    },
    /// A path is relative.
    #[error("{setting} = {path}: the path must begin with /")]
    Relative {
        /// The name of the setting.
        setting: &'static str,
        /// The path, escaped.
        path: String,
    },
    /// A path is too long for a socket.
    #[error(
        "{setting} = {path}: a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes, and this one {len}"
    )]
    SocketPath {
        /// The name of the setting.
        setting: &'static str,
        /// The path, escaped.
        path: String,
        /// Its length in bytes.
        len: usize,
    },
    /// A working set is selected, and none is fetched.
    #[error(
        "working_set = {name:?} has no effect with prefetch = \"off\"; set prefetch to \"working-set\" or \"all\""
    )]
    WorkingSetOff {
        /// The name of the working set.
        name: String,
    },
    /// A number is out of its range.
    #[error("{setting} = {value} must be from {min} to {max}{unit}")]
    Range {
        /// The name of the setting.
        setting: &'static str,
        /// The value.
        value: u64,
        /// The minimum.
        min: u64,
        /// The maximum.
        max: u64,
        /// The unit, after a space.
        unit: &'static str,
    },
}

/// Why a socket can't get the group or the mode that its service asks for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// The group could not be looked up.
    #[error("cannot look up group {group}")]
    LookUp {
        /// The name of the group.
        group: String,
        /// The error of the system call.
        source: Errno,
    },
    /// There is no such group.
    #[error("there is no group {group:?}")]
    NoGroup {
        /// The name of the group.
        group: String,
    },
    /// The group of the socket can't be changed.
    #[error(
        "{socket}: cannot give the socket to group {group}; this takes CAP_CHOWN, or a daemon whose user \
         owns the socket and is in the group"
    )]
    Group {
        /// The path of the socket, escaped.
        socket: String,
        /// The name of the group.
        group: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The mode of the socket can't be changed.
    #[error("{socket}: cannot set the mode of the socket")]
    Mode {
        /// The path of the socket, escaped.
        socket: String,
        /// The error of the system call.
        source: io::Error,
    },
}
