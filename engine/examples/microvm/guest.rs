//! The guest from the launcher's point of view: the layout of its memory, and the initial state of
//! its CPU.
//!
//! ```text
//! 0x0000_1000   page tables: the first GiB and the one at 4 GiB, each address mapped to itself
//! 0x0000_5000   segment descriptors
//! 0x0000_8000   the program (guest.s)
//! 0x0001_0000   the stack ends, the pages that are filled begin
//! ...           the first half of the memory ends: the gap
//! 0x1_0000_0000 the second half
//! ```
//!
//! The memory of any PC has a gap below 4 GiB, where devices have their addresses. Therefore a
//! snapshot of a VM has more than one region, and the regions can be anywhere in the launcher's own
//! memory.

use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the guest of this example is x86-64 code");

/// The port of the guest's serial device: that of COM1.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// The port to which the guest writes its requests, one of the values below.
pub(crate) const REQUEST_PORT: u16 = 0xf4;
/// The guest can be paused.
pub(crate) const REQUEST_PAUSE: u8 = 1;
/// The guest has verified its memory and is finished.
pub(crate) const REQUEST_GOOD: u8 = 2;
/// The guest has found wrong memory or registers, and is finished.
pub(crate) const REQUEST_BAD: u8 = 3;

const PAGE: u64 = 4096;
const PAGE_TABLES: u64 = 0x1000;
const DESCRIPTORS: u64 = 0x5000;
const PROGRAM: Range<u64> = 0x8000..0xa000;
const STACK_END: u64 = 0x1_0000;
const LOW_PAGES: u64 = 0x1_0000;
const HIGH_PAGES: u64 = 4 << 30;
/// Maximum size of the memory in MiB: the page tables map one GiB for each half.
const MAX_MIB: u64 = 2048;

std::arch::global_asm!(
    include_str!("guest.s"),
    SERIAL = const SERIAL_PORT,
    REQUEST = const REQUEST_PORT,
    PAUSE = const REQUEST_PAUSE,
    GOOD = const REQUEST_GOOD,
    BAD = const REQUEST_BAD,
    STRIDE = const 2_654_435_761_u32,
    LOW_PAGES = const LOW_PAGES,
    HIGH_PAGES = const HIGH_PAGES,
);

unsafe extern "C" {
    static microvm_guest_start: u8;
    static microvm_guest_end: u8;
}

/// Returns the bytes of guest.s.
fn program() -> &'static [u8] {
    let (start, end) = (&raw const microvm_guest_start, &raw const microvm_guest_end);
    // SAFETY: guest.s defines both symbols, in this order, around bytes of one read-only section of
    // this program. These bytes exist, and don't change, as long as it runs.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Returns the guest addresses and lengths in bytes of a memory of `mib` MiB.
pub(crate) fn layout(mib: u64) -> Result<[(GuestAddress, usize); 2]> {
    ensure!(
        (2..=MAX_MIB).contains(&mib),
        "the guest's memory can have 2 to {MAX_MIB} MiB, not {mib}"
    );
    let low = mib / 2;
    let bytes = |mib: u64| usize::try_from(mib << 20);
    Ok([
        (GuestAddress(0), bytes(low)?),
        (GuestAddress(HIGH_PAGES), bytes(mib - low)?),
    ])
}

/// Writes everything into new memory that the guest needs to start.
pub(crate) fn load(memory: &GuestMemoryMmap) -> Result<()> {
    let program = program();
    let room = PROGRAM.end - PROGRAM.start;
    ensure!(
        program.len() as u64 <= room,
        "the guest's program is too long"
    );
    memory
        .write_slice(program, GuestAddress(PROGRAM.start))
        .context("copying the guest's program")?;
    write_words(
        memory,
        DESCRIPTORS,
        [0, CODE.descriptor(), DATA.descriptor()],
    )?;
    write_page_tables(memory)
}

fn write_words(
    memory: &GuestMemoryMmap,
    start: u64,
    words: impl IntoIterator<Item = u64>,
) -> Result<()> {
    for (n, word) in (0..).zip(words) {
        memory
            .write_obj(word.to_le(), GuestAddress(start + 8 * n))
            .context("writing the guest's tables")?;
    }
    Ok(())
}

/// Writes the page tables. Pages of 4 KiB would need four levels; the third level can map 2 MiB
/// itself.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<()> {
    const OF_USER: u64 = 0b111;
    const LARGE: u64 = 1 << 7;
    let [pml4, pdpt, low, high] = [0, 1, 2, 3].map(|n| PAGE_TABLES + n * PAGE);
    write_words(memory, pml4, [pdpt | OF_USER])?;
    let gibs = [low | OF_USER, 0, 0, 0, high | OF_USER];
    write_words(memory, pdpt, gibs)?;
    for (table, start) in [(low, 0), (high, HIGH_PAGES)] {
        let entries = (0..512).map(|n| (start + (n << 21)) | LARGE | OF_USER);
        write_words(memory, table, entries)?;
    }
    Ok(())
}

/// Returns the initial general registers, including those that guest.s expects.
pub(crate) fn start_registers(memory: [(GuestAddress, usize); 2], seed: u64) -> kvm_regs {
    const ALWAYS_SET: u64 = 1 << 1;
    const PORTS_FOR_USERS: u64 = 3 << 12;
    let [low, high] = memory.map(|(_, bytes)| bytes as u64 / PAGE);
    let low = low - LOW_PAGES / PAGE;
    kvm_regs {
        rip: PROGRAM.start,
        rsp: STACK_END,
        r12: seed,
        r13: low + high,
        r14: low,
        rflags: ALWAYS_SET | PORTS_FOR_USERS,
        ..kvm_regs::default()
    }
}

/// Converts the system registers with which KVM starts into those of 64-bit mode.
pub(crate) fn enter_long_mode(sregs: &mut kvm_sregs) {
    const PROTECTED: u64 = 1 << 0;
    const COPROCESSOR: u64 = 1 << 1;
    const EXTENSION_TYPE: u64 = 1 << 4;
    const NUMERIC_ERRORS: u64 = 1 << 5;
    const WRITE_PROTECT: u64 = 1 << 16;
    const PAGING: u64 = 1 << 31;
    const PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
    const SSE: u64 = 0b11 << 9;
    const SYSTEM_CALLS: u64 = 1 << 0;
    const LONG_MODE_ENABLED: u64 = 1 << 8;
    const LONG_MODE_ACTIVE: u64 = 1 << 10;

    sregs.cr0 = PROTECTED | COPROCESSOR | EXTENSION_TYPE | NUMERIC_ERRORS | WRITE_PROTECT | PAGING;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = PHYSICAL_ADDRESS_EXTENSION | SSE;
    sregs.efer = SYSTEM_CALLS | LONG_MODE_ENABLED | LONG_MODE_ACTIVE;
    sregs.gdt.base = DESCRIPTORS;
    sregs.gdt.limit = 3 * 8 - 1;
    sregs.cs = CODE.segment(1);
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = DATA.segment(2);
    }
}

/// A segment that covers all addresses, with user privilege.
struct Segment {
    kind: u8,
    long: u8,
    wide: u8,
}

/// Execute and read, 64-bit.
const CODE: Segment = Segment {
    kind: 0b1011,
    long: 1,
    wide: 0,
};
/// Read and write.
const DATA: Segment = Segment {
    kind: 0b0011,
    long: 0,
    wide: 1,
};

impl Segment {
    /// Returns its entry for the descriptor table, for a guest that loads it.
    fn descriptor(&self) -> u64 {
        let limit = 0xffff | 0xf << 48;
        let (code_or_data, user, present, by_pages) = (1 << 44, 3 << 45, 1 << 47, 1 << 55);
        let kind = u64::from(self.kind) << 40;
        let (long, wide) = (u64::from(self.long) << 53, u64::from(self.wide) << 54);
        limit | kind | code_or_data | user | present | long | wide | by_pages
    }

    /// Returns its representation in a segment register, as if already loaded.
    fn segment(&self, number: u16) -> kvm_segment {
        const USER: u16 = 3;
        kvm_segment {
            selector: number * 8 + USER,
            limit: u32::MAX,
            type_: self.kind,
            s: 1,
            dpl: 3,
            present: 1,
            l: self.long,
            db: self.wide,
            g: 1,
            ..kvm_segment::default()
        }
    }
}
