//! The configuration of a daemon: the file of `serve --config`, and the services that `ctl add`
//! sends.
//!
//! ```toml
//! control = "/run/snaprestore/control.socket"
//! metrics = "127.0.0.1:9100"
//! layers = ["/var/lib/snaprestore/bases"]
//!
//! [[service]]
//! name = "web"
//! snapshot = "/var/lib/snaprestore/web.snap"
//! socket = "/run/snaprestore/web.socket"
//! ```
//!
//! Nothing here opens a snapshot or creates a socket.

mod error;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{Permissions, set_permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;
use nix::unistd::{AccessFlags, Group, eaccess};
use serde::{Deserialize, Serialize};
use snapshot_format::FileStore;

use snapshot_format::names::escape_path;

pub use self::error::{ConfigError, LoadError, ServiceError, SettingError, ShareError};

/// The maximum size of a `--config` file: room for ten thousand services.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// The maximum length of a service's name, which is part of log lines, metrics and tables.
const MAX_SERVICE_NAME_BYTES: usize = 64;
/// The maximum length of a Unix socket's path, without the terminating zero byte.
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// The values that `--threads` takes.
const THREADS: std::ops::RangeInclusive<u64> = 1..=512;
/// The values that `--handshake-timeout` takes.
const HANDSHAKE_TIMEOUTS: std::ops::RangeInclusive<u64> = 1..=3600;
/// The values that `--retry-timeout` takes.
const RETRY_TIMEOUTS: std::ops::RangeInclusive<u64> = 0..=3600;

/// The default of `retry_timeout`, in seconds.
pub const RETRY_TIMEOUT: u64 = 5;

/// A snapshot that is served at a socket, under a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// The name of the service: letters, digits, dots, dashes and underscores.
    pub name: String,
    /// The absolute path of the snapshot.
    pub snapshot: PathBuf,
    /// The absolute path of the socket to create, to which VMs connect.
    pub socket: PathBuf,
    /// Pages to fetch before they are touched.
    #[serde(default = "default_prefetch")]
    pub prefetch: Prefetch,
    /// The working set to fetch; all of them if `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<String>,
    /// The policy for a VM that waits for a page that can't be restored.
    #[serde(default = "default_on_error")]
    pub on_error: FailurePolicy,
    /// Users whose processes are served; if empty, every user who may connect.
    #[serde(default)]
    pub allow_uid: Vec<u32>,
    /// Number of threads that serve the faults of one VM.
    #[serde(default = "default_threads")]
    pub threads: usize,
    /// Seconds that a VMM may take to hand over its memory after connecting.
    #[serde(
        default = "default_handshake_timeout",
        rename(serialize = "patience"),
        alias = "patience"
    )]
    pub handshake_timeout: u64,
    /// Seconds to retry reading a page before `on_error` applies.
    #[serde(default = "default_retry_timeout")]
    pub retry_timeout: u64,
    /// The permission bits of the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<SocketMode>,
    /// The group of the socket, by name or number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,
    /// The absolute path of a folder in which the first touches of each VM are recorded, in a trace
    /// file of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<PathBuf>,
}

/// Pages that are fetched before they are touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefetch {
    /// Nothing
    Off,
    /// The recorded working sets, in their order; nothing if the snapshot has none
    WorkingSet,
    /// Working sets, then everything else
    All,
}

/// The consequence for a VM that waits for a page which can't be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailurePolicy {
    /// The VM's process is killed
    Kill,
    /// The page is poisoned; not for VMs, since KVM can read poison as zeros
    Poison,
}

/// Checks that `path` is a folder in which this process may create files.
///
/// # Errors
///
/// Returns the error that creating a file would meet, as far as it is known beforehand.
pub fn check_output_folder(path: &Path) -> io::Result<()> {
    if !std::fs::metadata(path)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    Ok(eaccess(path, AccessFlags::W_OK | AccessFlags::X_OK)?)
}

fn group_number(group: &str) -> Result<u32, ShareError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let owned = || group.to_owned();
    let found = Group::from_name(group).map_err(|source| ShareError::LookUp {
        group: owned(),
        source,
    })?;
    let found = found.ok_or_else(|| ShareError::NoGroup { group: owned() })?;
    Ok(found.gid.as_raw())
}

/// The permission bits of a socket, written in octal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SocketMode(u32);

impl FromStr for SocketMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mode = u32::from_str_radix(text, 8)
            .ok()
            .filter(|mode| *mode <= 0o777);
        let mode = mode.ok_or_else(|| {
            format!(
                "{text:?} is not an octal mode such as 0660 (write permission lets a VMM connect)"
            )
        })?;
        Ok(Self(mode))
    }
}

impl TryFrom<String> for SocketMode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SocketMode> for String {
    fn from(SocketMode(mode): SocketMode) -> Self {
        format!("{mode:04o}")
    }
}

fn default_prefetch() -> Prefetch {
    Prefetch::WorkingSet
}

fn default_on_error() -> FailurePolicy {
    FailurePolicy::Kill
}

fn default_threads() -> usize {
    2
}

fn default_handshake_timeout() -> u64 {
    10
}

fn default_retry_timeout() -> u64 {
    RETRY_TIMEOUT
}

impl Service {
    /// Creates a service that serves `snapshot` to the VMs that connect to `socket`, with the
    /// defaults of a configuration file. Both paths must be absolute.
    pub fn new(
        name: impl Into<String>,
        snapshot: impl Into<PathBuf>,
        socket: impl Into<PathBuf>,
    ) -> Self {
        Self {
            name: name.into(),
            snapshot: snapshot.into(),
            socket: socket.into(),
            prefetch: default_prefetch(),
            working_set: None,
            on_error: default_on_error(),
            allow_uid: Vec::new(),
            threads: default_threads(),
            handshake_timeout: default_handshake_timeout(),
            retry_timeout: default_retry_timeout(),
            socket_mode: None,
            socket_group: None,
            record: None,
        }
    }

    /// Gives the socket the requested permissions; the umask and the daemon's user have determined
    /// the rest.
    pub(crate) fn share_socket(&self) -> Result<(), ShareError> {
        let path = &self.socket;
        let socket = || escape_path(path);
        if let Some(group) = &self.socket_group {
            let number = group_number(group)?;
            lchown(path, None, Some(number)).map_err(|source| ShareError::Group {
                socket: socket(),
                group: group.clone(),
                source,
            })?;
        }
        if let Some(SocketMode(mode)) = self.socket_mode {
            let set = set_permissions(path, Permissions::from_mode(mode));
            set.map_err(|source| ShareError::Mode {
                socket: socket(),
                source,
            })?;
        }
        Ok(())
    }

    /// Checks the service on its own.
    ///
    /// # Errors
    ///
    /// Returns the first setting that is wrong, with the right values.
    pub fn check(&self) -> Result<(), ServiceError> {
        let name = &self.name;
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > MAX_SERVICE_NAME_BYTES || !name.chars().all(good) {
            return Err(ServiceError::Name { name: name.clone() });
        }
        self.check_settings()
            .map_err(|source| ServiceError::Setting {
                service: name.clone(),
                source,
            })
    }

    fn check_settings(&self) -> Result<(), SettingError> {
        absolute("snapshot", &self.snapshot)?;
        check_socket("socket", &self.socket)?;
        if self.prefetch == Prefetch::Off
            && let Some(name) = &self.working_set
        {
            return Err(SettingError::WorkingSetOff { name: name.clone() });
        }
        if let Some(folder) = &self.record {
            absolute("record", folder)?;
        }
        let seconds = " s";
        for (setting, value, range, unit) in [
            ("threads", self.threads as u64, THREADS, ""),
            (
                "handshake_timeout",
                self.handshake_timeout,
                HANDSHAKE_TIMEOUTS,
                seconds,
            ),
            ("retry_timeout", self.retry_timeout, RETRY_TIMEOUTS, seconds),
        ] {
            if !range.contains(&value) {
                return Err(SettingError::Range {
                    setting,
                    value,
                    min: *range.start(),
                    max: *range.end(),
                    unit,
                });
            }
        }
        Ok(())
    }
}

fn absolute(setting: &'static str, path: &Path) -> Result<(), SettingError> {
    if path.as_os_str().is_empty() {
        return Err(SettingError::Empty { setting });
    }
    if !path.is_absolute() {
        let path = escape_path(path);
        return Err(SettingError::Relative { setting, path });
    }
    Ok(())
}

/// Checks that a path is possible for a Unix socket.
fn check_socket(setting: &'static str, path: &Path) -> Result<(), SettingError> {
    absolute(setting, path)?;
    let len = path.as_os_str().len();
    if len > MAX_SOCKET_PATH_BYTES {
        let path = escape_path(path);
        return Err(SettingError::SocketPath { setting, path, len });
    }
    Ok(())
}

/// The address at which metrics are served: a Unix socket, or a loopback address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MetricsAddress {
    /// The path of a Unix socket to create.
    Socket(PathBuf),
    /// An address of the loopback interface.
    Loopback(SocketAddr),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const RIGHT: &str = "must be the path of a socket, such as ./metrics.socket or \
            /run/snaprestore/metrics.socket, or a loopback address, such as 127.0.0.1:9100 or [::1]:9100";
        if text.contains('/') {
            return Ok(Self::Socket(text.into()));
        }
        let address: SocketAddr = text.parse().map_err(|_| format!("{text:?} {RIGHT}"))?;
        if !address.ip().is_loopback() {
            return Err(format!(
                "{text:?} is reachable from other machines, and metrics have no access control: it {RIGHT}"
            ));
        }
        Ok(Self::Loopback(address))
    }
}

impl TryFrom<String> for MetricsAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Loopback(address) => address.fmt(f),
        }
    }
}

impl From<MetricsAddress> for String {
    fn from(address: MetricsAddress) -> Self {
        address.to_string()
    }
}

/// A checked `serve --config` file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The path of the control socket to create.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<PathBuf>,
    /// The address at which metrics are served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<MetricsAddress>,
    /// Folders in which the ancestors of layered snapshots are looked for, after the folder of the
    /// snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<PathBuf>,
    /// Folder in which the statistics of each VM are written when it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_json: Option<PathBuf>,
    /// The services.
    #[serde(default, rename = "service")]
    pub services: Vec<Service>,
}

impl Config {
    /// Reads and checks a file. Relative paths in it are relative to the file's folder.
    ///
    /// # Errors
    ///
    /// Returns an error if the file can't be read, or what is wrong in it, with its line if
    /// possible and the right values.
    pub fn load(file: &Path) -> Result<Self, LoadError> {
        let name = || escape_path(file);
        let failed = |source| LoadError::Read {
            file: name(),
            source,
        };
        let text = read(file).map_err(failed)?;
        let text = text.ok_or_else(|| LoadError::TooLarge { file: name() })?;
        let folder = std::path::absolute(file).map_err(failed)?;
        let folder = folder.parent().unwrap_or(Path::new("/"));
        Self::parse(&text, folder).map_err(|source| LoadError::Invalid {
            file: name(),
            source,
        })
    }

    fn parse(text: &str, folder: &Path) -> Result<Self, ConfigError> {
        // The error shows the line and, for an unknown key, the known ones.
        let mut config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            message: error.to_string().trim_end().to_owned(),
        })?;
        let resolve = |path: &mut PathBuf| {
            if !path.as_os_str().is_empty() {
                *path = folder.join(&*path);
            }
        };
        config.control.iter_mut().for_each(resolve);
        config.layers.iter_mut().for_each(resolve);
        config.run_json.iter_mut().for_each(resolve);
        if let Some(MetricsAddress::Socket(path)) = &mut config.metrics {
            resolve(path);
        }
        for service in &mut config.services {
            resolve(&mut service.snapshot);
            resolve(&mut service.socket);
            service.record.iter_mut().for_each(resolve);
        }
        config.check()?;
        Ok(config)
    }

    /// Checks that all services and sockets can be served together.
    ///
    /// # Errors
    ///
    /// Returns the first setting that is wrong, with the right values, or the services that are in
    /// each other's way.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mut names = BTreeSet::new();
        let mut sockets = BTreeSet::new();
        for folder in &self.layers {
            absolute("layers", folder)?;
        }
        if let Some(folder) = &self.run_json {
            absolute("run_json", folder)?;
        }
        if let Some(control) = &self.control {
            check_socket("control", control)?;
            sockets.insert(control);
        }
        if let Some(MetricsAddress::Socket(path)) = &self.metrics {
            check_socket("metrics", path)?;
            if !sockets.insert(path) {
                let socket = escape_path(path);
                return Err(ConfigError::MetricsSocket { socket });
            }
        }
        for service in &self.services {
            service.check()?;
            let name = &service.name;
            if !names.insert(name) {
                return Err(ConfigError::SameName { name: name.clone() });
            }
            if !sockets.insert(&service.socket) {
                return Err(ConfigError::SameSocket {
                    service: name.clone(),
                    socket: escape_path(&service.socket),
                });
            }
        }
        if self.services.is_empty() && self.control.is_none() {
            return Err(ConfigError::Nothing);
        }
        Ok(())
    }
}

/// Reads a configuration file. Returns `None` if it is too large: a size limit guards against a
/// disk image named by mistake.
fn read(file: &Path) -> io::Result<Option<String>> {
    use std::io::Read as _;

    let file = FileStore::open(file)?.into_file();
    let mut text = String::new();
    file.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text)?;
    Ok((text.len() as u64 <= MAX_CONFIG_BYTES).then_some(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Chain;

    const WHOLE: &str = r#"
control = "/run/control.socket"
metrics = "127.0.0.1:9100"
layers = ["bases", "/srv/bases"]
run_json = "runs"

[[service]]
name = "web"
snapshot = "web.snap"
socket = "/run/web.socket"

[[service]]
name = "db-1.2_x"
snapshot = "/srv/db.snap"
socket = "db.socket"
prefetch = "all"
working_set = "boot"
on_error = "poison"
allow_uid = [1000, 1001]
threads = 4
handshake_timeout = 60
retry_timeout = 0
socket_mode = "0660"
socket_group = "kvm"
"#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/snaprestore"))
    }

    #[track_caller]
    fn refused(text: &str, says: &[&str]) {
        let error = Chain(&parse(text).unwrap_err()).to_string();
        for part in says {
            assert!(error.contains(part), "no {part:?} in: {error}");
        }
    }

    #[test]
    fn relative_paths_start_at_the_file() {
        let config = parse(WHOLE).unwrap();
        assert_eq!(config.control, Some("/run/control.socket".into()));
        let address = "127.0.0.1:9100".parse().unwrap();
        assert_eq!(config.metrics, Some(MetricsAddress::Loopback(address)));
        let layers = ["/etc/snaprestore/bases", "/srv/bases"];
        assert_eq!(config.layers, layers.map(PathBuf::from));
        assert_eq!(config.run_json, Some("/etc/snaprestore/runs".into()));
        let [web, db] = &config.services[..] else {
            panic!("{config:?}");
        };
        assert_eq!(web.snapshot, Path::new("/etc/snaprestore/web.snap"));
        assert_eq!(web.socket, Path::new("/run/web.socket"));
        assert_eq!(
            (web.prefetch, web.on_error),
            (Prefetch::WorkingSet, FailurePolicy::Kill)
        );
        assert_eq!(
            (web.threads, web.handshake_timeout, web.retry_timeout),
            (2, 10, 5)
        );
        assert!(web.allow_uid.is_empty());
        assert_eq!((web.socket_mode, &web.socket_group), (None, &None));
        assert_eq!(db.socket_mode, Some(SocketMode(0o660)));
        assert_eq!(db.socket_group.as_deref(), Some("kvm"));
        assert_eq!(db.socket, Path::new("/etc/snaprestore/db.socket"));
        assert_eq!(
            (db.prefetch, db.on_error),
            (Prefetch::All, FailurePolicy::Poison)
        );
        assert_eq!(
            (&web.working_set, db.working_set.as_deref()),
            (&None, Some("boot"))
        );
        assert_eq!(db.allow_uid, [1000, 1001]);
        assert_eq!(
            (db.threads, db.handshake_timeout, db.retry_timeout),
            (4, 60, 0)
        );
    }

    #[test]
    fn new_service_has_the_defaults_of_a_file() {
        let config = parse(WHOLE).unwrap();
        let (folder, socket) = (Path::new("/etc/snaprestore"), "/run/web.socket");
        let service = Service::new("web", folder.join("web.snap"), socket);
        assert_eq!(config.services[0], service);
    }

    #[test]
    fn written_configuration_parses_alike() {
        let config = parse(WHOLE).unwrap();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);
    }

    #[test]
    fn old_name_of_the_handshake_timeout_is_accepted_and_written() {
        let config = parse(&WHOLE.replace("handshake_timeout", "patience")).unwrap();
        assert_eq!(config, parse(WHOLE).unwrap());
        let json = serde_json::to_value(&config).unwrap();
        assert_eq!(json["service"][1]["patience"], 60);
    }

    #[test]
    fn wrong_setting_is_named_with_right_values() {
        refused("contrl = \"/x\"", &["line 1", "contrl", "control"]);
        let service = "[[service]]\nname = \"a\"\nsnapshot = \"s\"\nsocket = \"/run/a\"\n";
        refused(
            &format!("{service}thread = 1"),
            &["line 5", "thread", "threads"],
        );
        refused(
            &format!("{service}prefetch = \"some\""),
            &["line 5", "working-set"],
        );
        refused(
            &format!("{service}prefetch = \"off\"\nworking_set = \"boot\""),
            &["\"a\"", "\"boot\"", "prefetch"],
        );
        refused(&format!("{service}threads = 0"), &["\"a\"", "1 to 512"]);
        refused(
            &format!("{service}handshake_timeout = 0"),
            &["\"a\"", "3600"],
        );
        refused(
            &format!("{service}retry_timeout = 3601"),
            &["\"a\"", "0 to 3600"],
        );
        for mode in ["0o660", "999", "1777", ""] {
            refused(
                &format!("{service}socket_mode = \"{mode}\""),
                &["octal", "0660"],
            );
        }
        refused(&format!("{service}{service}"), &["two services", "\"a\""]);
        refused(
            &format!("{service}{}", service.replace("\"a\"", "\"b\"")),
            &["\"b\"", "own socket"],
        );
        refused(
            &format!("control = \"/run/a\"\n{service}"),
            &["\"a\"", "own socket"],
        );
        refused(
            "control = \"/c\"\nmetrics = \"/c\"",
            &["metrics", "control"],
        );
        refused(&service.replace("\"a\"", "\"a b\""), &["a b", "letters"]);
        refused(&service.replace("\"a\"", "\"\""), &["letters"]);
        refused(
            &service.replace("/run/a", &"/x".repeat(60)),
            &["107", "120"],
        );
        refused(&service.replace("\"s\"", "\"\""), &["snapshot", "empty"]);
        refused(&format!("layers = [\"\"]\n{service}"), &["layers", "empty"]);
        refused(
            &format!("run_json = \"\"\n{service}"),
            &["run_json", "empty"],
        );
        refused("[[service]]\nname = \"a\"", &["snapshot"]);
        refused("", &["nothing to serve"]);
    }

    #[test]
    fn metrics_address_must_be_local() {
        for good in ["127.0.0.1:1", "127.1.2.3:9100", "[::1]:9100"] {
            let address = good.parse::<MetricsAddress>().unwrap();
            assert!(matches!(address, MetricsAddress::Loopback(_)), "{good}");
            assert_eq!(address.to_string(), good);
        }
        for bad in [
            "0.0.0.0:9100",
            "[::]:9100",
            "192.168.0.1:9100",
            "localhost:9100",
            "9100",
            "",
        ] {
            let error = bad.parse::<MetricsAddress>().unwrap_err();
            assert!(error.contains("127.0.0.1:9100"), "{error}");
        }
        let path = "./m".parse::<MetricsAddress>().unwrap();
        assert_eq!(path, MetricsAddress::Socket("./m".into()));
        refused(
            "control = \"/c\"\nmetrics = \"0.0.0.0:9100\"",
            &["line 2", "other machines"],
        );
    }

    #[test]
    fn file_that_is_no_configuration_is_refused() {
        for (path, says) in [
            ("/none", "No such file"),
            ("/dev/zero", "character device"),
            ("/", "folder"),
        ] {
            let error = Chain(&Config::load(Path::new(path)).unwrap_err()).to_string();
            assert!(error.contains(says) && error.contains(path), "{error}");
        }
    }
}
