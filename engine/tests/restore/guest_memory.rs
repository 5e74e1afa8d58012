//! The restored regions as `vm-memory` guest memory.

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::Restore;
use snaprestore_uffd::memory::guest_memory;
use snapshot_format::{RegionSpec, Writer, WriterOptions};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::common::{PAGE, open, random_bytes};

#[test]
fn guest_memory_reads_as_the_source() {
    let bytes = random_bytes(1024, 1);
    let (low, high) = bytes.split_at(300 * PAGE);
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
    // The regions are in the order of the file, which need not be that of the addresses.
    for (start, part) in [(1 << 32, high), (0x10_0000, low)] {
        let region = RegionSpec {
            start,
            ..RegionSpec::default()
        };
        writer.begin_region(&region).unwrap();
        writer.write_pages(part).unwrap();
    }
    let snapshot = open(writer.finish().unwrap().0);
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let restored = Restore::new(snapshot.clone())
            .prefetch(prefetch)
            .start()
            .unwrap();
        // SAFETY: the guest memory is dropped before the restore.
        let memory = unsafe { guest_memory(&restored.guest_regions()) }.unwrap();
        assert_eq!(memory.num_regions(), 2);
        assert_eq!(
            memory.iter().map(GuestMemoryRegion::len).sum::<u64>(),
            1024 * 4096
        );
        for (start, part) in [(1 << 32, high), (0x10_0000, low)] {
            let mut seen = vec![0; part.len()];
            memory.read_slice(&mut seen, GuestAddress(start)).unwrap();
            assert!(seen == part);
        }
        memory
            .write_obj(0x1234_5678_u32, GuestAddress(0x10_0ffe))
            .unwrap();
        let mut written = [0; 4];
        restored.read_at(1, 0xffe, &mut written).unwrap();
        assert_eq!(written, 0x1234_5678_u32.to_le_bytes());
        assert!(memory.read_obj::<u8>(GuestAddress(0)).is_err());
    }
}
