use std::fs::File;

use snaprestore_uffd::os::open_pidfd;

use super::stored::RecoverError;
use super::*;
use crate::fd_store::tests::FakeGuardian;

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn message(text: &str, descriptors: usize) -> (String, usize) {
    (text.to_owned(), descriptors)
}

/// Returns VM 7 of this process, with the other end of its connection.
fn connecting(fd_store: &mut FdStore) -> (VmRecord, UnixStream) {
    let (stream, other) = UnixStream::pair().unwrap();
    let snapshot = SnapshotRef {
        service: Arc::new(Service::new("web", "/snap", "/socket")),
        file: "file-1-1".into(),
        ancestors: Arc::default(),
    };
    let pid = std::process::id();
    let pidfd = open_pidfd(pid).unwrap();
    let peer = Peer { pid, uid: 0, pidfd };
    let record = VmRecord::accept(7, (1, snapshot), peer, stream, fd_store);
    (record.unwrap(), other)
}

fn handshake() -> Handshake {
    Handshake {
        userfaultfd: null(),
        regions: Vec::new(),
    }
}

#[test]
fn each_transition_stores_before_it_returns() {
    let (mut fd_store, guardian) = FakeGuardian::pair();
    let (mut vm, _connection) = connecting(&mut fd_store);
    assert_eq!(guardian.read_all(), [message("hold vm-7 web", 1)]);
    assert!(vm.is_connecting() && !vm.is_active());
    let handed_over = vm.hand_over(handshake(), &mut fd_store);
    assert!(matches!(handed_over, Ok(Ok(()))), "{handed_over:?}");
    assert_eq!(guardian.read_all(), [message("hold vm-7 web", 2)]);
    assert!(vm.is_active() && vm.message().is_some());
    vm.await_exit();
    assert!(vm.is_exiting() && vm.message().is_none());
    assert!(guardian.read_all().is_empty());
    // Another guardian gets what is still held.
    let (mut other_store, other_guardian) = FakeGuardian::pair();
    vm.store(&mut other_store).unwrap();
    assert_eq!(other_guardian.read_all(), [message("hold vm-7 web", 1)]);
    vm.release_exited(&mut fd_store).unwrap();
    assert_eq!(guardian.read_all(), [message("release vm-7", 0)]);
}

#[test]
fn refused_connection_is_removed_and_not_stored_again() {
    let (mut fd_store, guardian) = FakeGuardian::pair();
    let (mut vm, _connection) = connecting(&mut fd_store);
    let _ = guardian.read_all();
    vm.refuse(&mut fd_store).unwrap();
    assert_eq!(guardian.read_all(), [message("release vm-7", 0)]);
    vm.store(&mut fd_store).unwrap();
    assert!(guardian.read_all().is_empty());
    assert!(vm.is_closed() && vm.closing_since().is_some());
}

#[test]
fn vm_without_tables_never_counts_as_served() {
    let (mut fd_store, _guardian) = FakeGuardian::pair();
    let (mut vm, _connection) = connecting(&mut fd_store);
    let stored = vm.hand_over(handshake(), &mut fd_store).unwrap();
    stored.unwrap();
    vm.serve();
    assert!(vm.check_neglected(Duration::ZERO));
    vm.count_stuck(Duration::from_secs(1));
    assert!(vm.is_stuck());
    vm.detach();
    assert!(!vm.is_stuck());
}

#[test]
fn part_of_a_stored_vm_is_enough_to_kill_it() {
    let pidfd = || open_pidfd(std::process::id()).unwrap();
    let part = |roles: Vec<(&str, OwnedFd)>| {
        let roles = roles.into_iter().map(|(role, fd)| (role.to_owned(), fd));
        StoredVm::recover(7, roles.collect())
    };
    let handshake = part(vec![(OWNER, pidfd())]);
    let unreadable = part(vec![
        (OWNER, pidfd()),
        (UFFD, null()),
        (DESCRIPTION, null()),
    ]);
    for stored in [handshake, unreadable] {
        let Ok(StoredVm::Partial(vm, why)) = stored else {
            panic!("{stored:?}");
        };
        assert!(vm.is_exiting(), "{why}");
        assert_eq!(vm.pid(), std::process::id());
    }
    let ownerless = part(vec![(UFFD, null())]);
    assert!(matches!(ownerless, Err(RecoverError::NoOwner)));
}
