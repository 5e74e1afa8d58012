//! The stored form of a VM, and its recovery by the next supervisor.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use snaprestore_engine::pager::OwnerRegion;
use snaprestore_uffd::os::{Peer, pid_of};

use super::{
    DESCRIPTION, Held, Memory, PAGE_MAP, SnapshotRef, State, TABLES, Tables, UNKNOWN_SERVICE,
    VmRecord,
};
use crate::api::config::Service;
use crate::fd_store::{OWNER, UFFD};

/// Reason why a VM could not be recovered from the store.
#[derive(Debug, thiserror::Error)]
pub(in crate::supervisor) enum RecoverError {
    #[error("its pidfd is missing from the descriptor store")]
    NoOwner,
    #[error("cannot parse its stored description")]
    Description(#[source] io::Error),
    #[error("the previous supervisor died during its handshake")]
    Incomplete,
    #[error("cannot use the tables of a VM")]
    Tables(#[source] io::Error),
}

/// The description of a VM that is stored beside its descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Description {
    pub(super) pid: u32,
    pub(super) uid: u32,
    pub(super) regions: Vec<OwnerRegion>,
    pub(super) service: Service,
    /// The id under which the snapshot's open files are stored.
    pub(super) file: String,
    /// The names of its ancestors' files.
    #[serde(default)]
    pub(super) ancestors: Vec<String>,
}

impl Description {
    /// Writes the description to a new memory file.
    pub(super) fn write(&self) -> io::Result<OwnedFd> {
        let memfd = memfd_create(c"snaprestore vm", MFdFlags::MFD_CLOEXEC)?;
        let mut memfd = File::from(memfd);
        memfd.write_all(&serde_json::to_vec(self)?)?;
        Ok(memfd.into())
    }

    fn read(memfd: &OwnedFd) -> io::Result<Self> {
        let memfd = File::from(memfd.try_clone()?);
        let len = usize::try_from(memfd.metadata()?.len()).map_err(io::Error::other)?;
        let mut text = vec![0; len];
        memfd.read_exact_at(&mut text, 0)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// A VM recovered from the store.
#[derive(Debug)]
pub(in crate::supervisor) enum StoredVm {
    /// A complete VM, not assigned to a service yet.
    Whole(VmRecord, SnapshotRef),
    /// A part of a VM, which is enough to kill it, and the reason why it can't be served.
    Partial(VmRecord, RecoverError),
}

impl StoredVm {
    /// Rebuilds VM number `id` from the descriptors that were stored under its id.
    pub(in crate::supervisor) fn recover(
        id: u64,
        descriptors: Vec<(String, OwnedFd)>,
    ) -> Result<Self, RecoverError> {
        let mut by_role: BTreeMap<_, _> = descriptors.into_iter().collect();
        let pidfd = by_role.remove(OWNER).ok_or(RecoverError::NoOwner)?;
        let part = |pidfd: OwnedFd, held, why| {
            let pid = pid_of(pidfd.as_fd()).unwrap_or(0);
            let peer = Peer { pid, uid: 0, pidfd };
            let held = Held::Memory(held);
            Self::Partial(VmRecord::exiting(id, UNKNOWN_SERVICE, peer, held), why)
        };
        let description = match by_role.get(DESCRIPTION).map(Description::read) {
            Some(Ok(description)) => Ok(description),
            Some(Err(error)) => Err(RecoverError::Description(error)),
            None => Err(RecoverError::Incomplete),
        };
        let (description, userfaultfd) = match (description, by_role.remove(UFFD)) {
            (Ok(description), Some(userfaultfd)) => (description, userfaultfd),
            (description, userfaultfd) => {
                let held = userfaultfd.into_iter().chain(by_role.into_values());
                let why = description.err().unwrap_or(RecoverError::Incomplete);
                return Ok(part(pidfd, held.collect(), why));
            }
        };
        let peer = Peer {
            pid: description.pid,
            uid: description.uid,
            pidfd,
        };
        let snapshot = SnapshotRef {
            service: Arc::new(description.service),
            file: description.file.into(),
            ancestors: description.ancestors.into(),
        };
        let mut memory = Memory::new(userfaultfd, description.regions, snapshot.clone());
        memory.page_map = by_role.remove(PAGE_MAP);
        let state = match by_role.remove(TABLES).map(Tables::new) {
            None => State::HandedOver(memory),
            Some(Ok(tables)) => State::Tracked(memory, tables),
            Some(Err(error)) => {
                let why = RecoverError::Tables(error);
                return Ok(part(peer.pidfd, vec![memory.userfaultfd], why));
            }
        };
        let record = VmRecord {
            id,
            service: 0,
            service_name: snapshot.service.name.clone(),
            peer,
            connected: Instant::now(),
            state,
        };
        Ok(Self::Whole(record, snapshot))
    }
}
