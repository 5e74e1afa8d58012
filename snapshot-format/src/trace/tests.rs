use super::*;

fn touch(page: u64, micros: u64) -> Touch {
    Touch {
        page,
        at: Duration::from_micros(micros),
        reason: TouchReason::Demand,
    }
}

fn trace(pages: &[u64]) -> Trace {
    Trace {
        content_digest: [7; 32],
        page_slots: 1024,
        begun: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_234_567_890_123_456_789),
        present_at_start: 3,
        end: TraceEnd::Settled,
        touches: (1..)
            .zip(pages)
            .map(|(at, page)| touch(*page, at))
            .collect(),
    }
}

/// Returns the bytes of a trace after a change of its parts, with the right CRC.
fn changed(change: impl FnOnce(&mut RawTraceHeader, &mut [RawTraceTouch])) -> Vec<u8> {
    let mut bytes = trace(&[5, 1023, 0]).to_bytes().unwrap();
    let end = bytes.len() - CRC_BYTES;
    let (header, touches) = RawTraceHeader::mut_from_prefix(&mut bytes[..end]).unwrap();
    change(header, <[RawTraceTouch]>::mut_from_bytes(touches).unwrap());
    let crc = crc32fast::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn traces_survive_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.trace");
    for end in TraceEnd::ALL {
        let mut trace = trace(&[5, 1023, 0]);
        trace.end = end;
        trace.touches[1].reason = TouchReason::Present;
        trace.write_path(&path, true).unwrap();
        assert_eq!(Trace::read_path(&path).unwrap(), trace);
    }
    let empty = trace(&[]);
    empty.write_path(&path, true).unwrap();
    assert_eq!(Trace::read_path(&path).unwrap(), empty);
    let error = empty.write_path(&path, false).unwrap_err();
    assert!(matches!(error, TraceError::File(FileError::Exists { .. })));
}

#[test]
fn times_beyond_the_format_are_the_nearest_ones() {
    let mut long = trace(&[5]);
    long.touches[0].at = Duration::from_secs(7201);
    long.begun = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
    let read = Trace::from_bytes(&long.to_bytes().unwrap()).unwrap();
    assert_eq!(read.touches[0].at, Duration::from_micros(u32::MAX.into()));
    assert_eq!(read.begun, SystemTime::UNIX_EPOCH);
}

#[test]
fn every_flipped_bit_is_damage() {
    let bytes = trace(&[5, 1023, 0]).to_bytes().unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            let error = Trace::from_bytes(&flipped).unwrap_err();
            let is_version = matches!(error, TraceError::UnsupportedVersion { .. });
            assert!(error.is_damage() || is_version, "byte {at}: {error}");
        }
    }
}

#[test]
fn every_other_length_is_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.trace");
    let mut bytes = trace(&[5, 1023, 0]).to_bytes().unwrap();
    for len in 0..bytes.len() {
        let error = Trace::from_bytes(&bytes[..len]).unwrap_err();
        assert!(error.is_damage(), "{len} bytes: {error}");
        std::fs::write(&path, &bytes[..len]).unwrap();
        let error = Trace::read_path(&path).unwrap_err();
        assert!(error.is_damage(), "{len} bytes: {error}");
        let text = error.to_string();
        assert!(text.contains("a.trace"), "{text}");
    }
    bytes.push(0);
    let error = Trace::from_bytes(&bytes).unwrap_err();
    let text = "the trace: damaged trace: 181 bytes where 180 are expected";
    assert_eq!(error.to_string(), text);
}

/// A sparse file of any length costs nothing to make.
#[test]
fn claimed_lengths_are_refused_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.trace");
    for count in [MAX_TRACE_TOUCHES + 1, u64::MAX / 16, u64::MAX] {
        std::fs::write(&path, changed(|header, _| header.count.set(count))).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(1 << 40).unwrap();
        let text = Trace::read_path(&path).unwrap_err().to_string();
        assert!(text.contains("at byte 72: count is"), "{text}");
    }
    std::fs::write(&path, trace(&[1]).to_bytes().unwrap()).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    let text = Trace::read_path(&path).unwrap_err().to_string();
    assert!(text.contains("where 148 are expected"), "{text}");
}

#[test]
fn each_wrong_field_is_named_with_its_place() {
    type Change = fn(&mut RawTraceHeader, &mut [RawTraceTouch]);
    let cases: [(Change, &str); 10] = [
        (
            |header, _| header.flags.set(1),
            "at byte 12: flags must be zero",
        ),
        (
            |header, _| header.page_slots.set(1025),
            "at byte 48: page_slots is 1025",
        ),
        (
            |header, _| header.page_slots.set(2 * MAX_PAGES),
            "at byte 48: page_slots is 137438953472, more than the limit",
        ),
        (
            |header, _| header.present_at_start.set(1025),
            "at byte 64: present_at_start is 1025",
        ),
        (|header, _| header.end.set(0), "at byte 80: end is 0"),
        (
            |header, _| header.reserved[43] = 1,
            "at byte 84: reserved must be zero",
        ),
        (
            |_, touches| touches[0].page.set(1024),
            "at byte 128: page is 1024",
        ),
        (
            |_, touches| touches[2].page.set(5),
            "at byte 160: page is 5; accepted: each page once",
        ),
        (
            |_, touches| touches[1].reason = 2,
            "at byte 156: reason is 2",
        ),
        (
            |_, touches| touches[1].reserved[2] = 1,
            "at byte 157: reserved must be zero",
        ),
    ];
    for (change, expected) in cases {
        let text = Trace::from_bytes(&changed(change)).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
}

/// [`Trace::to_bytes`] and [`Trace::write_path`] accept what [`Trace::from_bytes`] does.
#[test]
fn trace_that_no_reader_accepts_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.trace");
    let cases = [
        (trace(&[1, 1]), "page is 1; accepted: each page once"),
        (trace(&[1024]), "page is 1024; accepted: below 1024"),
        (
            Trace {
                page_slots: 1000,
                ..trace(&[1])
            },
            "page_slots is 1000; accepted: multiples of 512",
        ),
        (
            Trace {
                page_slots: 2 * MAX_PAGES,
                ..trace(&[1])
            },
            "page_slots is 137438953472, more than the limit",
        ),
        (
            Trace {
                present_at_start: 1025,
                ..trace(&[1])
            },
            "present_at_start is 1025, more than the limit",
        ),
    ];
    for (trace, expected) in cases {
        let error = trace.to_bytes().unwrap_err();
        assert!(matches!(error, TraceError::Invalid { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(expected), "{text}");
        let error = trace.write_path(&path, true).unwrap_err();
        assert!(!error.is_damage(), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(expected) && text.contains("a.trace"),
            "{text}"
        );
        assert!(!path.exists());
    }
}

#[test]
fn merged_traces_have_the_pages_of_half_by_median_rank() {
    let merged = |traces: &[&[u64]], min_share| {
        let traces: Vec<Trace> = traces.iter().map(|pages| trace(pages)).collect();
        merge(&traces, &MergeOptions { min_share })
    };
    assert_eq!(merged(&[], 0.5), [0; 0]);
    assert_eq!(merged(&[&[9, 4, 7]], 0.5), [9, 4, 7]);
    assert_eq!(merged(&[&[9, 4], &[4, 7]], 0.5), [9, 4, 7]);
    assert_eq!(merged(&[&[9, 4], &[4, 7]], 0.51), [4]);
    assert_eq!(merged(&[&[9, 4], &[4, 7], &[8, 7]], 0.5), [4, 7]);
    assert_eq!(merged(&[&[9, 4], &[4, 7], &[8, 7]], 0.0), [8, 9, 4, 7]);
    assert_eq!(merged(&[&[9, 4], &[4, 7], &[8, 7]], 1.0), [0; 0]);
    // Ranks of 3: 0, 2, 3. Ranks of 6: 1, 1, 0.
    let three: [&[u64]; 3] = [&[3, 6, 1], &[5, 6, 3], &[6, 5, 1, 3]];
    assert_eq!(merged(&three, 0.5), [5, 6, 1, 3]);
}

#[test]
fn merged_trace_has_median_times_and_one_memory() {
    let options = MergeOptions::default();
    let mut traces = [trace(&[5, 6]), trace(&[6, 5]), trace(&[7, 8, 5])];
    traces[1].present_at_start = 9;
    let merged = Trace::merged(&traces, &options).unwrap();
    assert_eq!(merged.touches, [touch(6, 1), touch(5, 2)]);
    assert_eq!((merged.end, merged.present_at_start), (TraceEnd::Merged, 9));
    traces[2].content_digest[0] = 1;
    let text = Trace::merged(&traces, &options).unwrap_err().to_string();
    let (one, other) = (hex(&traces[2].content_digest), hex(&[7; 32]));
    assert!(text.contains(&one) && text.contains(&other), "{text}");
    traces[2].content_digest = [7; 32];
    traces[2].page_slots *= 2;
    let text = Trace::merged(&traces, &options).unwrap_err().to_string();
    assert!(
        text.contains("with 2048 page numbers") && text.contains("with 1024"),
        "{text}"
    );
    assert!(matches!(
        Trace::merged(&[], &options),
        Err(TraceError::NoTraces)
    ));
}

#[test]
fn comparison_counts_and_correlates() {
    let numbers = |a: &[u64], b: &[u64]| {
        let c = compare(a, b);
        (c.common, c.only_a, c.only_b, c.precision, c.recall, c.order)
    };
    assert_eq!(numbers(&[], &[]), (0, 0, 0, None, None, None));
    assert_eq!(numbers(&[1, 2], &[]), (0, 2, 0, Some(0.0), None, None));
    assert_eq!(
        numbers(&[3], &[3, 4]),
        (1, 0, 1, Some(1.0), Some(0.5), None)
    );
    let (a, b) = ([1, 2, 3, 4], [9, 1, 2, 3]);
    assert_eq!(
        numbers(&a, &b),
        (3, 1, 1, Some(0.75), Some(0.75), Some(1.0))
    );
    let reversed = [4, 3, 2, 1];
    assert_eq!(numbers(&a, &reversed).5, Some(-1.0));
    // Squares of the differences: 1, 1, 1, 1.
    assert_eq!(numbers(&a, &[2, 1, 4, 3]).5, Some(1.0 - 24.0 / 60.0));
}
