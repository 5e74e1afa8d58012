use super::*;

fn load(start: u64, file_bytes: u64, memory_bytes: u64, offset: u64) -> Load {
    Load {
        number: 0,
        vaddr: start,
        paddr: start,
        file_bytes,
        memory_bytes,
        offset,
        flags: 6,
    }
}

fn plan_of(loads: &[Load], kind: Kind, incomplete: bool) -> Result<Plan> {
    let notes = Notes {
        kind,
        ..Notes::default()
    };
    let mut plan = Plan::default();
    plan.make(loads, &notes, 1 << 30, incomplete)?;
    Ok(plan)
}

/// Returns the start, the page count, and the offset (if known) of each segment.
fn planned(loads: &[Load]) -> Vec<(u64, u64, Option<u64>)> {
    let plan = plan_of(loads, Kind::Process, false).unwrap();
    let segments = plan.segments.iter().map(|segment| {
        let offset = match &segment.content {
            Content::At(offset) => Some(*offset),
            Content::Pieces(pieces) => Some(pieces[0].offset),
            Content::Unknown => None,
        };
        (segment.start, segment.pages, offset)
    });
    segments.collect()
}

#[test]
fn overlapping_memory_is_read_once_and_compared() {
    let loads = [
        load(0x5000, 0x3000, 0x3000, 0x9003),
        load(0x1000, 0x2000, 0x2000, 0x100),
        load(0x6000, 0x4000, 0x4000, 0x20000),
        load(0x1000, 0, 0x2000, 0),
    ];
    assert_eq!(
        planned(&loads),
        [
            (0x1000, 2, Some(0x100)),
            (0x5000, 3, Some(0x9003)),
            (0x8000, 2, Some(0x22000))
        ]
    );
    let plan = plan_of(&loads, Kind::Process, false).unwrap();
    assert_eq!(
        plan.overlaps,
        [Overlap {
            start: 0x6000,
            len: 0x2000,
            taken: (0, 0xa003),
            dropped: (0, 0x20000),
        }]
    );
    // Segments that name the same bytes of the file need no comparison.
    let loads = [
        load(0x1000, 0x4000, 0x4000, 0x100),
        load(0x2000, 0x4000, 0x4000, 0x1100),
        load(0x3000, 0x1000, 0x1000, 0x2100),
    ];
    assert_eq!(
        planned(&loads),
        [(0x1000, 4, Some(0x100)), (0x5000, 1, Some(0x4100))]
    );
    let plan = plan_of(&loads, Kind::Process, false).unwrap();
    assert_eq!(plan.overlaps, []);
}

#[test]
fn overlaps_with_several_segments_are_all_found() {
    let loads = [
        load(0x1000, 0x2000, 0x2000, 0x100),
        load(0x2000, 0x2000, 0x2000, 0x10000),
        load(0x2800, 0x1000, 0x1000, 0x20000),
    ];
    let plan = plan_of(&loads, Kind::Process, false).unwrap();
    let overlaps: Vec<_> = plan.overlaps.iter().map(|o| (o.start, o.len)).collect();
    assert_eq!(
        overlaps,
        [(0x2000, 0x1000), (0x2800, 0x800), (0x3000, 0x800)]
    );
}

#[test]
fn what_was_not_dumped_is_not_present() {
    assert_eq!(planned(&[load(0, 0, 0x4000, 0)]), [(0, 4, None)]);
    assert_eq!(
        planned(&[load(0, 0x1800, 0x4000, 7)]),
        [(0, 1, Some(7)), (0x1000, 1, None), (0x2000, 2, None)]
    );
    let plan = plan_of(&[load(0, 0x1800, 0x4000, 7)], Kind::Process, false).unwrap();
    assert_eq!(plan.partly_known.bytes, 0x800);
}

#[test]
fn memory_is_no_longer_than_its_segment_says() {
    assert_eq!(planned(&[load(0, 0x3000, 0x1000, 7)]), [(0, 1, Some(7))]);
    let loads = [load(0, 0x3000, 0x1000, 7), load(0x5000, 0x100, 0, 7)];
    let plan = plan_of(&loads, Kind::Process, false).unwrap();
    assert_eq!(plan.segments.len(), 1);
    assert_eq!(plan.beyond.bytes, 0x2100);
    let remarks = plan.remarks();
    assert_eq!(remarks[0].key, "source.beyond_bytes");
    assert!(remarks[0].warning && remarks[0].text.contains("8,448 bytes"));
}

#[test]
fn odd_pieces_become_whole_pages() {
    // All memory is present; it just doesn't fill its last page.
    assert_eq!(
        planned(&[load(0, 0x1800, 0x1800, 7)]),
        [(0, 1, Some(7)), (0x1000, 1, Some(0x1007))]
    );
    // Two segments meet inside a page, and one holds the middle of a page.
    let loads = [
        load(0x1080, 0x1000, 0x1000, 0x100),
        load(0x2080, 0xf80, 0xf80, 0x8000),
        load(0x5100, 0x10, 0x10, 0x9000),
    ];
    let plan = plan_of(&loads, Kind::Guest, false).unwrap();
    let pieces: Vec<_> = plan
        .segments
        .iter()
        .map(|segment| match &segment.content {
            Content::Pieces(pieces) => {
                let pieces = pieces.iter().map(|p| (p.at, p.len, p.offset));
                (segment.start, pieces.collect::<Vec<_>>())
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        pieces,
        [
            (0x1000, vec![(0x80, 0xf80, 0x100)]),
            (0x2000, vec![(0, 0x80, 0x1080), (0x80, 0xf80, 0x8000)]),
            (0x5000, vec![(0x100, 0x10, 0x9000)]),
        ]
    );
    assert_eq!(plan.filled.bytes, 0x80 + 0xff0);
    assert_eq!(plan.filled.first.as_deref(), Some("at 0x1000"));
    // The data is at the start, so the zeros follow it.
    let plan = plan_of(&[load(0x1000, 0x1800, 0x1800, 7)], Kind::Guest, false).unwrap();
    assert_eq!(plan.filled.first.as_deref(), Some("at 0x2800"));
}

#[test]
fn bytes_of_one_segment_fill_gaps_of_another() {
    let loads = [
        load(0, 0, 0x8000, 0),
        load(0x2000, 0x1000, 0x1000, 9),
        load(0x4000, 0x1000, 0x2000, 99),
    ];
    assert_eq!(
        planned(&loads),
        [
            (0, 2, None),
            (0x2000, 1, Some(9)),
            (0x3000, 1, None),
            (0x4000, 1, Some(99)),
            (0x5000, 3, None),
        ]
    );
}

#[test]
fn impossible_segments_are_refused() {
    for (bad, says) in [
        (load(VSYSCALL - 0x1000, 0x1000, 1 << 40, 0), "address space"),
        (load(u64::MAX, 0x1000, 0x1000, 0), "address space"),
        (load(0, 0x1000, 0x1000, 1 << 30), "--incomplete"),
        (load(0, 0x1000, 0x1000, u64::MAX), "--incomplete"),
    ] {
        let error = plan_of(&[bad], Kind::Process, false).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn truncated_core_leaves_the_rest_unavailable() {
    let cut = load(0x1000, 0x4000, 0x4000, (1 << 30) - 0x2000);
    let plan = plan_of(&[cut], Kind::Process, true).unwrap();
    let pages: Vec<_> = plan
        .segments
        .iter()
        .map(|s| (s.start, s.pages, s.content == Content::Unknown))
        .collect();
    assert_eq!(pages, [(0x1000, 2, false), (0x3000, 2, true)]);
    assert_eq!(plan.cut.bytes, 0x2000);
}

#[test]
fn consistent_addresses_are_chosen() {
    let at = |vaddr, paddr, offset| Load {
        vaddr,
        paddr,
        ..load(0, 0x2000, 0x2000, offset)
    };
    // Several segments at one virtual address, or at the end of the address space.
    let physical = [at(0, 0, 0x1000), at(0, 0x10000, 0x3000)];
    let beyond = [at(u64::MAX, 0x1000, 0x1000), at(0x8000, 0x8000, 0x3000)];
    for (loads, of_virtual, says) in [
        (physical, Flaw::Contradict, "contradict each other"),
        (beyond, Flaw::PassEnd, "pass the end"),
    ] {
        assert_eq!(flaw(&loads, false), Some(of_virtual));
        assert_eq!(flaw(&loads, true), None);
        let plan = Plan {
            virtual_flaw: Some(of_virtual),
            ..Plan::default()
        };
        assert!(plan.remarks()[0].text.contains(says));
    }
    // A process, which has no physical addresses.
    let process = [at(0x1000, 0, 0x1000), at(0x8000, 0, 0x3000)];
    assert_eq!(flaw(&process, false), None);
    assert_eq!(flaw(&process, true), Some(Flaw::Contradict));
    // Two names for the same bytes of the file are no contradiction.
    let twice = [at(0x1000, 0, 0x1000), at(0x2000, 0, 0x2000)];
    assert_eq!(flaw(&twice, false), None);
}

#[test]
fn memory_without_physical_address_is_omitted_with_a_warning() {
    let mapped = Load {
        paddr: u64::MAX,
        ..load(0x1000, 0x1000, 0x1000, 0)
    };
    let loads = [mapped, load(0x8000, 0x1000, 0x1000, 0x1000)];
    let plan = plan_of(&loads, Kind::Machine, false).unwrap();
    assert_eq!(plan.segments.len(), 1);
    assert_eq!(plan.unaddressed.bytes, 0x1000);
    assert!(plan.remarks()[0].text.contains("virtual address 0x1000"));
}

/// Checks that memory next to the page for obsolete system calls belongs to the process.
#[test]
fn only_the_vsyscall_page_is_skipped() {
    let loads = [
        load(VSYSCALL, 0x1000, 0x1000, 0),
        load(VSYSCALL + 0x1000, 0x1000, 0x1000, 0x1000),
    ];
    assert_eq!(planned(&loads), [(VSYSCALL + 0x1000, 1, Some(0x1000))]);
    // A segment that begins there and is longer than the page.
    let longer = [load(VSYSCALL, 0x3000, 0x4000, 7)];
    assert_eq!(
        planned(&longer),
        [
            (VSYSCALL + 0x1000, 2, Some(0x1007)),
            (VSYSCALL + 0x3000, 1, None)
        ]
    );
}

#[test]
fn vast_memory_without_bytes_is_omitted_with_a_remark() {
    let vast = VAST * PAGE;
    let plan = |loads: &[Load], incomplete| plan_of(loads, Kind::Process, incomplete).unwrap();
    let some = load(0x1000, 0x1000, 0x2000, 7);
    let left_out = plan(&[some, load(0x10_0000, 0, vast, 0)], false);
    let starts: Vec<_> = left_out.segments.iter().map(|s| s.start).collect();
    assert_eq!(starts, [0x1000, 0x2000]);
    assert_eq!(
        (left_out.left_out_pages, left_out.absent.bytes),
        (VAST, 0x1000)
    );
    let remarks = left_out.remarks();
    assert_eq!(remarks[0].key, "source.absent_bytes");
    assert!(!remarks[0].warning && remarks[0].text.contains("at 0x2000"));
    assert_eq!(remarks[1].key, "source.left_out_bytes");
    assert_eq!(remarks[1].value, vast.to_string());
    assert!(remarks[1].warning);
    // With one page less, the memory is recorded as unavailable.
    let recorded = plan(&[some, load(0x10_0000, 0, vast - PAGE, 0)], false);
    assert_eq!((recorded.left_out_pages, recorded.segments.len()), (0, 3));
    // Memory that should be in the file keeps its place, however much of it is missing.
    let cut = plan(&[load(0x1000, vast, vast, (1 << 30) - PAGE)], true);
    assert_eq!((cut.left_out_pages, cut.absent.bytes), (0, 0));
    assert_eq!(cut.cut.bytes, vast - PAGE);
    assert_eq!(cut.segments.iter().map(|s| s.pages).sum::<u64>(), VAST);
    // A machine's core should contain all memory.
    let machine = plan_of(&[some], Kind::Machine, false).unwrap();
    assert!(machine.remarks()[0].warning);
}
