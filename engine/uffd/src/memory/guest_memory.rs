//! Regions under restore as `vm-memory` guest memory.

use vm_memory::{
    GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use super::RawRegion;

/// Why regions are no guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestMemoryError {
    /// A region does not fit where it should be in the guest.
    #[error("a region of {len:#x} bytes does not fit at guest address {guest:#x}")]
    Region {
        /// Guest address.
        guest: u64,
        /// Bytes.
        len: u64,
    },
    /// There is no region, or they overlap or are not in the order of their guest addresses.
    #[error("the regions cannot be put together as guest memory")]
    Regions(#[source] GuestRegionCollectionError),
}

/// Guest memory over these regions, each at its address in the guest, in ascending order.
///
/// Accesses through it are volatile, and wait where a page is missing, as any other access does.
///
/// # Safety
///
/// `vm-memory` doesn't own the memory and its types are cloned freely: every region must stay
/// mapped, readable and writable, as long as the result or any clone of it, or of a part of it, is
/// used. In particular a restore that is given up may take access away only when they are gone.
pub unsafe fn guest_memory(
    regions: &[(u64, &RawRegion)],
) -> Result<GuestMemoryMmap, GuestMemoryError> {
    let mut parts = Vec::with_capacity(regions.len());
    for (guest, region) in regions {
        let (len, protection) = (region.len(), libc::PROT_READ | libc::PROT_WRITE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let refused = || GuestMemoryError::Region { guest: *guest, len };
        // SAFETY: a RawRegion is a mapped range, by the contract of its making, and stays so by
        // this function's.
        let mapped = unsafe {
            MmapRegion::build_raw(region.as_ptr(), crate::to_usize(len), protection, flags)
        };
        let mapped = mapped.map_err(|_| refused())?;
        parts.push(GuestRegionMmap::new(mapped, GuestAddress(*guest)).ok_or_else(refused)?);
    }
    GuestMemoryMmap::from_regions(parts).map_err(GuestMemoryError::Regions)
}
