//! Leaves a cgroup that may be killed as a whole.
//!
//! A service manager or a container runtime ends a service by killing its cgroup, in the hierarchy
//! of version 2 or systemd's own of version 1. The other hierarchies of version 1 limit resources,
//! and leaving them would only escape the service's limits.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use snapshot_format::names::escape_path;

/// Moves this process out of its cgroup: to the parent, else to the root, else to a new one beside
/// it. Does nothing in a root, which can't be killed from within.
pub(crate) fn leave() -> io::Result<()> {
    let mounts = fs::read("/proc/self/mountinfo")?;
    // Names of other mounts may be any bytes.
    let mounts = String::from_utf8_lossy(&mounts);
    let mut result = Ok(());
    for line in fs::read_to_string("/proc/self/cgroup")?.lines() {
        let Some((root, path)) =
            hierarchy(line).and_then(|(v2, path)| Some((mount_point(&mounts, v2)?, path)))
        else {
            continue;
        };
        if let Err(error) = leave_one(&root, path) {
            let place = root.join(path.trim_start_matches('/'));
            result = Err(io::Error::new(
                error.kind(),
                format!("{}: {error}", escape_path(&place)),
            ));
        }
    }
    result
}

fn leave_one(root: &Path, path: &str) -> io::Result<()> {
    let path = Path::new(path.trim_start_matches('/'));
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

/// Returns whether a line of `/proc/self/cgroup` is of version 2, and its path. Returns `None` for
/// hierarchies that aren't used for killing.
fn hierarchy(line: &str) -> Option<(bool, &str)> {
    let (number, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    match (number, controllers) {
        ("0", "") => Some((true, path)),
        (_, "name=systemd") => Some((false, path)),
        _ => None,
    }
}

/// Returns the mount point of the whole hierarchy of version 2, or of systemd's of version 1.
fn mount_point(mounts: &str, v2: bool) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let mut source = source.split(' ');
        let right = match source.next()? {
            "cgroup2" => v2,
            "cgroup" => {
                !v2 && source
                    .nth(1)?
                    .split(',')
                    .any(|option| option == "name=systemd")
            }
            _ => false,
        };
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        (right && root == "/").then(|| point.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_that_are_killed_are_found_with_their_mounts() {
        let mounts = "\
            30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            31 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            32 25 0:28 /some /bound rw - cgroup2 cgroup2 rw\n\
            33 25 0:28 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw\n";
        let at = |v2| mount_point(mounts, v2).unwrap();
        assert_eq!(at(true), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(at(false), Path::new("/sys/fs/cgroup/systemd"));
        assert_eq!(hierarchy("0::/a:b"), Some((true, "/a:b")));
        assert_eq!(hierarchy("9:name=systemd:/x"), Some((false, "/x")));
        assert_eq!(hierarchy("4:memory:/x"), None);
    }
}
