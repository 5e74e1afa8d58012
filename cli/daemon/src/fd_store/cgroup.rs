//! Leaves a cgroup that may be killed as a whole.
//!
//! A service manager or a container runtime ends a service by killing its cgroup, in the hierarchy
//! of version 2 or systemd's own of version 1. The other hierarchies of version 1 limit resources,
//! and leaving them would only escape the service's limits.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path};

use snapshot_format::names::escape_path;

/// Moves this process out of its cgroup: to the parent, else to the root, else to a new one beside
/// it. Does nothing in a root, which can't be killed from within.
pub(crate) fn leave() -> io::Result<()> {
    // Names of mounts and cgroups may be any bytes.
    let mounts = fs::read("/proc/self/mountinfo")?;
    let cgroups = fs::read("/proc/self/cgroup")?;
    let mut result = Ok(());
    for line in cgroups.split(|byte| *byte == b'\n') {
        let Some((root, path)) =
            hierarchy(line).and_then(|(v2, path)| Some((mount_point(&mounts, v2)?, path)))
        else {
            continue;
        };
        if let Err(error) = leave_one(root, path) {
            result = Err(io::Error::new(
                error.kind(),
                format!("{}: {error}", escape_path(&root.join(path))),
            ));
        }
    }
    result
}

fn leave_one(root: &Path, path: &Path) -> io::Result<()> {
    // The cgroup is above the mounted part, as in a container that shows the host's names.
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(ErrorKind::NotFound.into());
    }
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    let parent = root.join(parent);
    let beside = parent.join(format!("snaprestore-guardian-{}", std::process::id()));
    let first = match enter(&parent) {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    // A parent that limits its children can't have processes itself, unless it is the root.
    if enter(root).is_ok() {
        return Ok(());
    }
    fs::create_dir(&beside)?;
    enter(&beside).map_err(|_| {
        let _ = fs::remove_dir(&beside);
        first
    })
}

fn enter(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
}

/// Returns whether a line of `/proc/self/cgroup` is of version 2, and its path below the root.
/// Returns `None` for hierarchies that aren't used for killing.
fn hierarchy(line: &[u8]) -> Option<(bool, &Path)> {
    let mut parts = line.splitn(3, |byte| *byte == b':');
    let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let path = Path::new(OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path)));
    match (number, controllers) {
        (b"0", b"") => Some((true, path)),
        (_, b"name=systemd") => Some((false, path)),
        _ => None,
    }
}

/// Returns the mount point of the whole hierarchy of version 2, or of systemd's of version 1.
fn mount_point(mounts: &[u8], v2: bool) -> Option<&Path> {
    mounts.split(|byte| *byte == b'\n').find_map(|line| {
        let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let separator = words.iter().position(|word| *word == b"-")?;
        let (mount, source) = words.split_at(separator);
        let is_right = match *source.get(1)? {
            b"cgroup2" => v2,
            b"cgroup" => {
                let options = source.get(3)?.split(|byte| *byte == b',');
                !v2 && options.into_iter().any(|option| option == b"name=systemd")
            }
            _ => false,
        };
        let (root, point) = (*mount.get(3)?, *mount.get(4)?);
        (is_right && root == b"/").then(|| Path::new(OsStr::from_bytes(point)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn killable_hierarchies_are_found_with_their_mounts() {
        let mounts = b"\
            30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            31 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            32 25 0:28 /some /bound\xff rw - cgroup2 cgroup2 rw\n\
            33 25 0:28 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw\n";
        let at = |v2| mount_point(mounts, v2).unwrap();
        assert_eq!(at(true), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(at(false), Path::new("/sys/fs/cgroup/systemd"));
        let path = |line| hierarchy(line).map(|(v2, path)| (v2, path.as_os_str().as_bytes()));
        assert_eq!(path(b"0::/a:b"), Some((true, &b"a:b"[..])));
        assert_eq!(path(b"0::/caf\xe9"), Some((true, &b"caf\xe9"[..])));
        assert_eq!(path(b"9:name=systemd:/x"), Some((false, &b"x"[..])));
        assert_eq!(path(b"4:memory:/x"), None);
    }
}
