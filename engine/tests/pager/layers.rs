//! Layered snapshots: what their sessions share, and which frame is quarantined.

use std::path::Path;
use std::sync::Arc;

use snaprestore_engine::pager::{FrameId, Pager, SessionEnd};
use snaprestore_engine::{Prefetch, Shared};
use snapshot_format::{
    Ancestor, Ancestors, FrameRef, Layer, MemoryStore, OpenError, RegionSpec, Snapshot,
    SnapshotOptions, Writer, WriterOptions,
};

use crate::common::{PAGE, frame_of, random_bytes};
use crate::owner::Owner;
use crate::uffd_support::Ended;
use crate::{PAGES, REGIONS};

/// A resolver that has these layers open.
#[derive(Debug)]
struct Given(Vec<Arc<Layer>>);

impl Ancestors for Given {
    fn find(&self, wanted: &Ancestor, _: Option<&Path>) -> Result<Option<Arc<Layer>>, OpenError> {
        let mut layers = self.0.iter();
        Ok(layers.find(|layer| layer.id() == wanted.id).cloned())
    }
}

/// Writes a snapshot in frames of 8 pages, and opens it with `layers`.
fn write(
    name: &str,
    bytes: &[u8],
    base: Option<&Arc<Snapshot>>,
    layers: &[Arc<Layer>],
) -> Arc<Snapshot> {
    let options = WriterOptions {
        frame_pages: 8,
        base: base.cloned(),
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(Vec::new(), options).unwrap();
    let region = RegionSpec {
        base_page: base.map(|_| 0),
        ..RegionSpec::default()
    };
    writer.begin_region(&region).unwrap();
    writer.write_pages(bytes).unwrap();
    let store = MemoryStore::named(writer.finish().unwrap().0, name);
    let options = SnapshotOptions::default().ancestors(Arc::new(Given(layers.to_vec())));
    Arc::new(Snapshot::open_with(Arc::new(store), &options).unwrap())
}

fn own(snapshot: &Arc<Snapshot>) -> Arc<Layer> {
    Arc::clone(snapshot.layer(0).unwrap())
}

/// Opens the same file as an ancestor once more.
fn again(layer: &Arc<Layer>) -> Arc<Layer> {
    Arc::new(Layer::open(layer.shared_store()).unwrap())
}

fn put(bytes: &mut [u8], page: usize, from: &[u8]) {
    bytes[page * PAGE..][..from.len()].copy_from_slice(from);
}

/// Serves an owner that compares all of its memory. Returns the number of bytes decoded for it.
fn decoded(snapshot: &Arc<Snapshot>, bytes: &[u8], shared: &Shared) -> u64 {
    let expected = Arc::new(bytes.to_vec());
    let owner = Owner::start(&REGIONS, move |memory| {
        memory.compare_in_threads(&expected, 2)
    });
    let paged = Pager::new(Arc::clone(snapshot))
        .prefetch(Prefetch::Off)
        .shared(shared)
        .attach(owner.handover())
        .unwrap();
    assert_eq!(owner.child.wait(), Ended::Exit(0));
    paged.wait();
    paged.stats().bytes_decoded
}

/// The base is the first ancestor of one child, and the second of a grandchild.
#[test]
fn children_share_frames_of_an_open_base() {
    let bytes = random_bytes(PAGES, 21);
    let other = random_bytes(64, 22);
    let base = write("base", &bytes, None, &[]);
    let (mut one, mut middle) = (bytes.clone(), bytes.clone());
    put(&mut one, 600, &other[..24 * PAGE]);
    put(&mut middle, 0, &other[24 * PAGE..40 * PAGE]);
    let mut two = middle.clone();
    put(&mut two, 1200, &other[40 * PAGE..]);
    let middle = write("middle", &middle, Some(&base), &[own(&base)]);
    let layers = |base| [own(&middle), base];
    let child = |base: Arc<Layer>| write("two", &two, Some(&middle), &layers(base));
    let one_shared = write("one", &one, Some(&base), &[own(&base)]);
    let two_shared = child(own(&base));
    assert_eq!(
        two_shared.layer(2).unwrap().id(),
        base.id(),
        "another number"
    );

    let shared = Shared::new(256 << 20);
    let first = decoded(&one_shared, &one, &shared);
    let second = decoded(&two_shared, &two, &shared);
    assert!(first > 0);
    assert!(
        (first + second) * 100 <= first * 115,
        "{second} after {first}"
    );
    // The base itself, too: each of its frames was decoded for one of the children.
    assert_eq!(decoded(&base, &bytes, &shared), 0);

    // A layer that claims to be the same file may be another one.
    let strange = child(again(&own(&base)));
    assert!(decoded(&strange, &two, &shared) * 2 > first);
}

#[test]
fn quarantine_is_of_a_frame_in_one_file() {
    let bytes = random_bytes(PAGES, 23);
    let base = write("base", &bytes, None, &[]);
    let mut new = bytes.clone();
    put(&mut new, 0, &random_bytes(8, 24));
    let child = write("child", &new, Some(&base), &[own(&base)]);
    let (here, there) = (frame_of(&child, 0), frame_of(&child, 800));
    let unused = frame_of(&base, 0);
    assert_eq!((here.layer(), there.layer()), (0, 1));
    assert_eq!(
        here.offset(),
        unused.offset(),
        "each is the first of its file"
    );

    let id = |layer: u16, frame: &FrameRef| FrameId {
        layer,
        offset: frame.offset(),
    };
    let end = |quarantined: FrameId| {
        let expected = Arc::new(new.clone());
        let owner = Owner::start(&REGIONS, move |memory| {
            memory.compare_in_threads(&expected, 1)
        });
        let pager = Pager::new(Arc::clone(&child)).prefetch(Prefetch::Off);
        let handover = owner.handover();
        let tables = pager.tables(&handover.regions).unwrap();
        let served = pager.resume(handover, tables, &[quarantined]).unwrap();
        (owner.child.wait(), served.wait())
    };
    let (ended, _) = end(id(1, &unused));
    assert_eq!(ended, Ended::Exit(0), "no page is in that frame");
    for (file, frame) in [("child", here), ("base", there)] {
        let (ended, end) = end(id(frame.layer(), &frame));
        assert_eq!(ended, Ended::Signal(libc::SIGKILL));
        let SessionEnd::Killed(why) = end else {
            panic!("{end:?}");
        };
        let at = format!("at offset {}: quarantined", frame.offset());
        assert!(
            why.contains(&format!("{file}: page")) && why.contains(&at),
            "{why}"
        );
    }
}
