//! Adapter that presents regions under restore as `vm-memory` guest memory.

use vm_memory::{
    GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use super::RawRegion;

/// The reason why regions can't be used as guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestMemoryError {
    /// A region does not fit at its guest address.
    #[error("a region of {len:#x} bytes does not fit at guest address {guest:#x}")]
    Region {
        /// Guest address of the region.
        guest: u64,
        /// Length of the region in bytes.
        len: u64,
    },
    /// There is no region, or the regions overlap or are not sorted by guest address.
    #[error("the regions cannot be put together as guest memory")]
    Regions(#[source] GuestRegionCollectionError),
}

/// Creates guest memory from these regions, each with its guest address, in ascending order.
///
/// Accesses through it are volatile, and wait for a missing page like any other access.
///
/// # Safety
///
/// `vm-memory` doesn't own the memory, and its types are cloned freely: every region must stay
/// mapped, readable and writable as long as the result, or a clone of it or of a part of it, is
/// used. In particular, a restore that is given up may make memory inaccessible only after they are
/// gone.
pub unsafe fn guest_memory(
    regions: &[(u64, &RawRegion)],
) -> Result<GuestMemoryMmap, GuestMemoryError> {
    let mut parts = Vec::with_capacity(regions.len());
    for (guest, region) in regions {
        let (len, protection) = (region.len(), libc::PROT_READ | libc::PROT_WRITE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let refused = || GuestMemoryError::Region { guest: *guest, len };
        // SAFETY: a RawRegion is a mapped range by the contract of its constructor, and stays so by
        // the contract of this function.
        let mapped = unsafe {
            MmapRegion::build_raw(region.as_ptr(), crate::to_usize(len), protection, flags)
        };
        let mapped = mapped.map_err(|_| refused())?;
        parts.push(GuestRegionMmap::new(mapped, GuestAddress(*guest)).ok_or_else(refused)?);
    }
    GuestMemoryMmap::from_regions(parts).map_err(GuestMemoryError::Regions)
}
