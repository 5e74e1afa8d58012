//! `FORMAT.md` is normative: its tables must agree with `layout.rs`, whose structs have the same
//! names with `Raw` before them.

use std::collections::BTreeMap;
use std::mem::offset_of;

use snapshot_format::layout::{self, SectionKind};
use zstd::zstd_safe;

const FORMAT: &str = include_str!("../FORMAT.md");

/// Returns the rows of the table whose header row begins with `first`, without the header and the
/// rule below it.
fn table<'a>(text: &'a str, first: &str) -> Vec<Vec<&'a str>> {
    let rows: Vec<&str> = text
        .lines()
        .skip_while(|line| !line.starts_with(&format!("| {first} |")))
        .take_while(|line| line.starts_with('|'))
        .collect();
    assert!(rows.len() > 2, "no table of {first:?}");
    rows[2..]
        .iter()
        .map(|row| row.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// Returns the text between the heading of a struct and the next heading, and the size that the
/// heading states.
fn section(name: &str) -> (&'static str, usize) {
    let name = name.trim_start_matches("Raw");
    let heading = format!("### `{name}`: ");
    let from = FORMAT
        .find(&heading)
        .unwrap_or_else(|| panic!("FORMAT.md has no heading for {name}"));
    let text = &FORMAT[from + heading.len()..];
    let (size, text) = text.split_once(" bytes\n").expect("a size");
    let end = text.find("\n#").unwrap_or(text.len());
    (&text[..end], size.parse().expect("not a number"))
}

/// Compares a struct's table with (field, offset, bytes), which must be all of it.
fn check(name: &str, size: usize, fields: &[(&str, usize, usize)]) {
    let (text, stated) = section(name);
    assert_eq!(stated, size, "size of {name}");
    let rows = table(text, "offset");
    let stated: Vec<(String, usize, usize)> = rows
        .iter()
        .map(|row| {
            let number = |i: usize| row[i].parse().unwrap_or_else(|_| panic!("{name}: {row:?}"));
            (row[2].trim_matches('`').to_owned(), number(0), number(1))
        })
        .collect();
    let real: Vec<(String, usize, usize)> = fields
        .iter()
        .map(|(field, offset, bytes)| ((*field).to_owned(), *offset, *bytes))
        .collect();
    assert_eq!(stated, real, "fields of {name}");
    let mut end = 0;
    for (field, offset, bytes) in real {
        assert_eq!(offset, end, "{name}.{field} follows the field before");
        end += bytes;
    }
    assert_eq!(end, size, "the fields are all of {name}");
}

macro_rules! structs {
    ($($name:ident { $($field:ident),+ $(,)? })+) => {
        const STRUCTS: &[&str] = &[$(stringify!($name)),+];

        #[test]
        fn structs_are_as_documented() {
            $({
                fn bytes<T>(_: fn(&layout::$name) -> &T) -> usize {
                    size_of::<T>()
                }
                check(
                    stringify!($name),
                    size_of::<layout::$name>(),
                    &[$((
                        stringify!($field),
                        offset_of!(layout::$name, $field),
                        bytes(|of| &of.$field),
                    )),+],
                );
            })+
        }
    };
}

structs! {
    RawHeader {
        magic, version, page_size, required_features, optional_features, snapshot_id, reserved, crc,
    }
    RawTrailer {
        version, section_count, required_features, optional_features, snapshot_id, file_bytes,
        summary, strong_root, unused, reserved, sections, crc, magic,
    }
    RawSummary {
        pages, zero_pages, fill_pages, stored_pages, duplicate_pages, unavailable_pages, frames,
        frame_bytes, stored_bytes, index_bytes, content_digest, state_digest,
    }
    RawSectionEntry { kind, crc, offset, len, count, reserved }
    RawRegionEntry {
        space, flags, start, pages, first_page, page_shift, name_len, name_offset, reserved,
        unused,
    }
    RawTopEntry { kind, codec, layer, stored_len, decoded_len, word_or_offset, crc, ancestor_block }
    RawIndexHeader {
        magic, page_count, frame_count, fill_count, reserved, first_page, reserved2,
    }
    RawFrameRef { offset, stored_len, crc, slots, layer, dictionary, codec, reserved }
    RawPageEntry { frame, slot }
    RawFrameHeader {
        magic, slots, run_count, dictionary, codec, reserved, payload_len, base_page,
    }
    RawPageRun { page, slot, count }
    RawFillRun { first_page, pages, word }
    RawBlobEntry { offset, len, crc, tag, name_offset, name_len }
    RawWorkingSetRun { first_page, pages }
    RawAncestorEntry { snapshot_id, file_bytes, reserved, trailer_hash }
    RawTraceHeader {
        magic, version, flags, content_digest, page_slots, begun, present_at_start, count, end,
        reserved,
    }
    RawTraceTouch { page, at, reason, reserved }
}

#[test]
fn every_struct_and_constant_of_the_layout_is_documented() {
    let source = include_str!("../src/layout.rs");
    let after = |line: &str, word: &str| {
        let rest = line.strip_prefix(word)?;
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_')?;
        Some(rest[..end].to_owned())
    };
    let structs: Vec<String> = source
        .lines()
        .filter_map(|line| after(line, "pub struct "))
        .collect();
    assert_eq!(structs.len(), STRUCTS.len());
    for name in &structs {
        assert!(
            STRUCTS.contains(&name.as_str()),
            "{name} is not compared with FORMAT.md"
        );
    }
    let limits = limits();
    for name in source.lines().filter_map(|line| after(line, "pub const ")) {
        let elsewhere = name.ends_with("_MAGIC") || name.ends_with("_VERSION");
        let same = name.strip_suffix("_U64").unwrap_or(&name);
        assert!(
            elsewhere || limits.contains_key(same),
            "{name} is not in FORMAT.md's table of limits"
        );
    }
}

fn limits() -> BTreeMap<&'static str, u64> {
    table(FORMAT, "limit")
        .iter()
        .map(|row| {
            (
                row[0].trim_matches('`'),
                row[1].parse().expect("not a number"),
            )
        })
        .collect()
}

#[test]
fn limits_are_as_documented() {
    let real = BTreeMap::from([
        ("PAGE_SIZE", layout::PAGE_SIZE as u64),
        ("PAGES_PER_BLOCK", layout::PAGES_PER_BLOCK as u64),
        ("HEADER_BYTES", layout::HEADER_BYTES as u64),
        ("TRAILER_BYTES", layout::TRAILER_BYTES as u64),
        ("MAX_SECTIONS", layout::MAX_SECTIONS as u64),
        ("MAX_FRAME_SLOTS", layout::MAX_FRAME_SLOTS as u64),
        (
            "MAX_LISTED_PAGES_PER_SLOT",
            layout::MAX_LISTED_PAGES_PER_SLOT as u64,
        ),
        (
            "MIN_FRAME_RECORD_BYTES",
            layout::MIN_FRAME_RECORD_BYTES as u64,
        ),
        (
            "MAX_FRAME_RECORD_BYTES",
            layout::MAX_FRAME_RECORD_BYTES as u64,
        ),
        (
            "MAX_INDEX_BLOCK_BYTES",
            layout::MAX_INDEX_BLOCK_BYTES as u64,
        ),
        ("MAX_PAGES", layout::MAX_PAGES),
        ("MAX_REGIONS", layout::MAX_REGIONS),
        ("MAX_NAME_BYTES", layout::MAX_NAME_BYTES as u64),
        ("MAX_FILL_RUNS", layout::MAX_FILL_RUNS as u64),
        ("MAX_DICTIONARIES", layout::MAX_DICTIONARIES as u64),
        ("MAX_DICTIONARY_BYTES", layout::MAX_DICTIONARY_BYTES as u64),
        ("MAX_ANCESTORS", layout::MAX_ANCESTORS as u64),
        ("MAX_BLOBS", layout::MAX_BLOBS as u64),
        ("MAX_SECTION_BYTES", layout::MAX_SECTION_BYTES),
        ("MAX_PROPERTIES_BYTES", layout::MAX_PROPERTIES_BYTES),
        ("TAIL_BYTES", layout::TAIL_BYTES as u64),
        ("MAX_TRACE_TOUCHES", layout::MAX_TRACE_TOUCHES),
    ]);
    assert_eq!(limits(), real);
    assert_eq!(layout::PAGE_SIZE_U64, layout::PAGE_SIZE as u64);
    assert_eq!(layout::PAGES_PER_BLOCK_U64, layout::PAGES_PER_BLOCK as u64);
}

/// Returns (name, number) of each row of the table that begins with `first`.
fn numbers(first: &str) -> Vec<(&'static str, u64)> {
    table(FORMAT, first)
        .iter()
        .map(|row| {
            let number = match row[1].strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => row[1].parse(),
            };
            (row[0].trim_matches('`'), number.expect("not a number"))
        })
        .collect()
}

#[test]
fn numbers_are_as_documented() {
    use layout::{
        codec, optional, page_kind, region_flags, required, top_kind, touch_reason, trace_end,
    };

    let kinds = numbers("kind");
    assert_eq!(kinds.len(), SectionKind::ALL.len());
    for ((name, number), kind) in kinds.into_iter().zip(SectionKind::ALL) {
        assert_eq!(number, u64::from(kind as u32), "{name}");
        let words = name.to_lowercase().replace('_', "");
        assert_eq!(words, format!("{kind:?}").to_lowercase());
    }
    assert_eq!(
        numbers("top kind"),
        [
            ("FILL", u64::from(top_kind::FILL)),
            ("BLOCK", u64::from(top_kind::BLOCK)),
            ("UNAVAILABLE", u64::from(top_kind::UNAVAILABLE)),
        ]
    );
    assert_eq!(
        numbers("codec"),
        [
            ("RAW", u64::from(codec::RAW)),
            ("ZSTD", u64::from(codec::ZSTD)),
            ("ZSTD_DICTIONARY", u64::from(codec::ZSTD_DICTIONARY)),
        ]
    );
    assert_eq!(
        numbers("page kind"),
        [
            ("FILL", u64::from(page_kind::FILL)),
            ("UNAVAILABLE", u64::from(page_kind::UNAVAILABLE)),
        ]
    );
    assert_eq!(
        numbers("trace end"),
        [
            ("STOPPED", u64::from(trace_end::STOPPED)),
            ("SETTLED", u64::from(trace_end::SETTLED)),
            ("TIME_LIMIT", u64::from(trace_end::TIME_LIMIT)),
            ("PAGE_LIMIT", u64::from(trace_end::PAGE_LIMIT)),
            ("COMPLETED", u64::from(trace_end::COMPLETED)),
            ("OWNER_ENDED", u64::from(trace_end::OWNER_ENDED)),
            ("MERGED", u64::from(trace_end::MERGED)),
        ]
    );
    assert_eq!(
        numbers("touch reason"),
        [
            ("DEMAND", u64::from(touch_reason::DEMAND)),
            ("PRESENT", u64::from(touch_reason::PRESENT)),
        ]
    );
    let bit = |mask: u64| u64::from(mask.trailing_zeros());
    assert_eq!(
        numbers("region flag"),
        [
            ("READ", bit(region_flags::READ.into())),
            ("WRITE", bit(region_flags::WRITE.into())),
            ("EXECUTE", bit(region_flags::EXECUTE.into())),
            ("SHARED", bit(region_flags::SHARED.into())),
        ]
    );
    assert_eq!(region_flags::KNOWN.count_ones(), 4);
    assert_eq!(region_flags::HINTS, 0xffff_0000);
    assert!(FORMAT.contains("Bits 16 to 31 are set aside for hints"));
    assert_eq!(
        numbers("required feature"),
        [("ANCESTORS", bit(required::ANCESTORS))]
    );
    assert_eq!(required::KNOWN.count_ones(), 1);
    assert_eq!(
        numbers("optional feature"),
        [
            ("DICTIONARIES", bit(optional::DICTIONARIES)),
            ("STRONG_HASHES", bit(optional::STRONG_HASHES)),
        ]
    );
}

#[test]
fn magics_and_version_are_as_documented() {
    let hex = |bytes: &[u8]| {
        let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("`{}`", bytes.join(" "))
    };
    for (name, magic) in [
        ("Header", hex(&layout::HEADER_MAGIC)),
        ("Trailer", hex(&layout::TRAILER_MAGIC)),
        ("IndexHeader", hex(&layout::INDEX_MAGIC.to_le_bytes())),
        ("FrameHeader", hex(&layout::FRAME_MAGIC.to_le_bytes())),
        ("TraceHeader", hex(&layout::TRACE_MAGIC)),
    ] {
        let (text, _) = section(name);
        let rows = table(text, "offset");
        let row = rows
            .iter()
            .find(|row| row[2] == "`magic`")
            .expect("a magic");
        assert!(row[3].starts_with(&magic), "{name}: {}", row[3]);
    }
    let (header, _) = section("Header");
    let rows = table(header, "offset");
    assert_eq!(rows[1][3], layout::FORMAT_VERSION.to_string());
    assert_eq!(rows[2][3], layout::PAGE_SIZE.to_string());
    let (trace, _) = section("TraceHeader");
    assert_eq!(
        table(trace, "offset")[1][3],
        layout::TRACE_VERSION.to_string()
    );
    assert!(FORMAT.starts_with("# The snaprestore file format, version 1\n"));
}

fn chapter(heading: &str) -> &'static str {
    let from = FORMAT
        .find(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("FORMAT.md has no {heading}"));
    let text = &FORMAT[from + heading.len() + 2..];
    let end = text.find("\n## ").unwrap_or(text.len());
    &text[..end]
}

const EXAMPLE: &[u8] = include_bytes!("../../fixtures/golden/v1/good-tiny.snap");

/// Returns the bytes of the example's dump blocks, each placed by the line above it; all other
/// bytes are zero.
fn dumps(text: &str, decoded: bool, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let (mut above, mut inside) = ("", false);
    for line in text.lines() {
        match line {
            "```text" => inside = true,
            "```" => inside = false,
            "" => {}
            row if inside => {
                if above.starts_with("The same, decoded") != decoded {
                    continue;
                }
                let (offset, rest) = row.split_once("  ").expect("an offset");
                let at = usize::from_str_radix(offset, 16).expect("an offset");
                let hex = rest.split("  ").next().expect("bytes");
                for (i, byte) in hex.split(' ').enumerate() {
                    bytes[at + i] = u8::from_str_radix(byte, 16).expect("a byte");
                }
            }
            text => above = text,
        }
    }
    bytes
}

#[test]
fn example_is_the_golden_file() {
    use snapshot_format::layout::RawTopEntry;
    use zerocopy::FromBytes;

    let text = chapter("## A worked example");
    assert!(text.contains(&format!("has {} bytes", EXAMPLE.len())));
    let shown = dumps(text, false, EXAMPLE.len());
    for (at, (shown, real)) in shown.iter().zip(EXAMPLE).enumerate() {
        assert_eq!(shown, real, "byte {at:#x}");
    }
    // The index block, which is compressed in the file.
    let top = FORMAT
        .lines()
        .find_map(|line| line.strip_prefix("Top table, at byte "))
        .and_then(|rest| rest.trim_end_matches(':').parse::<usize>().ok())
        .expect("where the top table lies");
    let (entry, _) = RawTopEntry::read_from_prefix(&EXAMPLE[top..]).expect("an entry");
    let at = usize::try_from(entry.word_or_offset.get()).expect("in the file");
    let stored = &EXAMPLE[at..at + usize::from(entry.stored_len.get())];
    let mut decoded = vec![0; entry.decoded_len.get().into()];
    zstd_safe::decompress(&mut decoded[..], stored).expect("a zstd frame");
    assert_eq!(dumps(text, true, decoded.len()), decoded);
}

/// Computes the digests of the example from their definition in FORMAT.md alone.
#[test]
fn example_has_the_digests_that_follow() {
    let hash = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
    let page = |n: u64| -> Vec<u8> {
        let text = format!("page {n} of a golden file; ").into_bytes();
        text.into_iter().cycle().take(4096).collect()
    };
    let fill = [&b"snaprestore fill"[..], &[0; 8]].concat();
    let pages = [hash(&page(0)), hash(&page(1)), hash(&page(2)), hash(&fill)];
    let block = hash(&[&b"snaprestore block"[..], pages.as_flattened()].concat());
    let (four, eight) = (u32::to_le_bytes, u64::to_le_bytes);
    // Space 0, start 0, four pages; one region.
    let root = [
        &b"snaprestore content"[..],
        &block,
        &four(0),
        &eight(0),
        &eight(4),
        &eight(1),
    ];
    let content = hash(&root.concat());
    // Flags 3, pages of 2^12 bytes, a name of three bytes; one region, no attachment.
    let state = [
        &b"snaprestore state"[..],
        &content,
        &four(3),
        &four(12),
        &four(3),
        b"ram",
        &eight(1),
        &eight(0),
    ];
    let state = hash(&state.concat());
    let stated: BTreeMap<&str, &str> = table(chapter("## A worked example"), "digest of")
        .iter()
        .map(|row| (row[0], row[1].trim_matches('`')))
        .collect();
    let hex = |digest: [u8; 32]| blake3::Hash::from(digest).to_string();
    let all = [
        ("page 0", pages[0]),
        ("page 1", pages[1]),
        ("page 2", pages[2]),
        ("page 3, a fill of 0", pages[3]),
        ("block 0", block),
        ("the content", content),
        ("the state", state),
    ];
    let all: BTreeMap<&str, String> = all.map(|(of, digest)| (of, hex(digest))).into();
    for (of, digest) in &all {
        assert_eq!(stated.get(of), Some(&&digest[..]), "{of}: {all:#?}");
    }
    assert_eq!(stated.len(), all.len());
}

#[test]
fn properties_of_the_writer_are_documented() {
    use snapshot_format::{MemoryStore, Snapshot, Writer, WriterOptions};

    let writer = Writer::new(Vec::new(), WriterOptions::default()).expect("a writer");
    let (file, _) = writer.finish().expect("a file");
    let snapshot = Snapshot::open(std::sync::Arc::new(MemoryStore::new(file)))
        .expect("cannot open the snapshot");
    let properties = snapshot.properties().expect("cannot read the properties");
    let mut documented: Vec<&str> = table(FORMAT, "property")
        .iter()
        .filter(|row| row[1] == "library")
        .map(|row| row[0].trim_matches('`'))
        .collect();
    documented.sort_unstable();
    let keys: Vec<&str> = properties.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(documented, keys);
}

/// Each cell with a rule names the check behind it.
#[test]
fn every_field_says_who_checks_it() {
    for name in STRUCTS {
        let (text, _) = section(name);
        for row in table(text, "offset") {
            let by = *row.get(4).unwrap_or_else(|| panic!("{name}: {row:?}"));
            let known = ["reader", "verifier", "nobody", "see there"];
            assert!(known.contains(&by), "{name}: {row:?}");
        }
    }
}

/// Sizes of an ordinary file.
#[test]
fn tail_holds_the_documented_memory() {
    let room = layout::TAIL_BYTES - layout::TRAILER_BYTES;
    assert!(chapter("## Opening").contains(&format!("at most {room} bytes")));
    for row in table(chapter("## Opening"), "memory") {
        let gib: usize = row[0].trim_end_matches(" GiB").parse().expect("GiB");
        let top = gib * 512 * size_of::<layout::RawTopEntry>();
        assert_eq!(row[1], format!("{top} bytes"));
        let left = match room - top {
            0 => "none".to_owned(),
            left => format!("{left} bytes"),
        };
        assert_eq!(row[2], left);
    }
    let most =
        layout::MAX_PAGES / layout::PAGES_PER_BLOCK_U64 * size_of::<layout::RawTopEntry>() as u64;
    assert_eq!(most, 3 << 30);
    assert!(FORMAT.contains("the top table has at most 3 GiB"));
}
