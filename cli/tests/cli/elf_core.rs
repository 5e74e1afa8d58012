//! ELF cores made by hand, by gcore and by QEMU.

use std::io::Write as _;
use std::process::{Command, Stdio};

use snaprestore_fixtures::host::{Unavailable, ensure_program, skipped};

use crate::common::{Folder, number, remarks, run, wait_until};
use crate::owner::Owner;

/// A core to write. Its parts are packed as closely as they fit, so nothing is aligned.
#[derive(Default)]
pub(crate) struct Core {
    pub(crate) loads: Vec<Load>,
    /// Start, end and name of each mapped file.
    pub(crate) files: Vec<(u64, u64, Vec<u8>)>,
    /// Whether to write it like QEMU: with physical addresses, and a note that tells so.
    pub(crate) qemu: bool,
    /// Write it like a machine: with physical addresses, and this virtual one for all segments.
    pub(crate) machine: Option<u64>,
    /// Name of an additional note.
    pub(crate) note: &'static [u8],
    /// Whether to leave out the format version, as VirtualBox does.
    pub(crate) no_version: bool,
    /// Whether to write it with 32 bits, big-endian.
    pub(crate) other_machine: bool,
}

/// A loadable segment.
pub(crate) struct Load {
    pub(crate) start: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) memory_bytes: u64,
}

impl Load {
    /// Returns pages filled with one byte each, all of them in the file.
    fn pages(start: u64, bytes: &[u8]) -> Self {
        Self {
            start,
            bytes: bytes.iter().flat_map(|&byte| [byte; 4096]).collect(),
            memory_bytes: bytes.len() as u64 * 4096,
        }
    }
}

/// A buffer for numbers in a machine's format.
struct Numbers {
    bytes: Vec<u8>,
    other_machine: bool,
}

impl Numbers {
    fn put(&mut self, value: u64, width: usize) {
        if self.other_machine {
            self.bytes.extend(&value.to_be_bytes()[8 - width..]);
        } else {
            self.bytes.extend(&value.to_le_bytes()[..width]);
        }
    }

    fn half(&mut self, value: usize) {
        self.put(value as u64, 2);
    }

    fn word(&mut self, value: u64) {
        self.put(value, 4);
    }

    /// Appends an address, offset or size.
    fn long(&mut self, value: u64) {
        self.put(value, if self.other_machine { 4 } else { 8 });
    }
}

impl Core {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let numbers = || Numbers {
            bytes: Vec::new(),
            other_machine: self.other_machine,
        };
        let (header, program, section) = if self.other_machine {
            (52, 32, 40)
        } else {
            (64, 56, 64)
        };
        let notes = self.notes(numbers());
        let count = self.loads.len() + 1;
        let many = count >= 0xffff;
        let sections = header + count * program;
        let mut offset = sections + usize::from(many) * section + 3;

        let mut out = numbers();
        let class = [[2, 1], [1, 2]][usize::from(self.other_machine)];
        out.bytes.extend(b"\x7fELF");
        let version = u8::from(!self.no_version);
        out.bytes
            .extend([class[0], class[1], version, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        out.half(4);
        out.half(if self.other_machine { 20 } else { 62 });
        out.word(1);
        out.long(0);
        out.long(header as u64);
        out.long(if many { sections as u64 } else { 0 });
        out.word(0);
        out.half(header);
        out.half(program);
        out.half(if many { 0xffff } else { count });
        out.half(if many { section } else { 0 });
        out.half(usize::from(many));
        out.half(0);

        let mut data = vec![0xee; 3];
        let mut segment = |out: &mut Numbers, kind, address, bytes: &[u8], memory| {
            // In a core by QEMU, the virtual addresses may hold anything.
            let virt = match self.machine {
                Some(virt) => virt,
                None if self.qemu => address ^ 0xfff_0000,
                None => address,
            };
            let is_physical = self.qemu || self.machine.is_some();
            out.word(kind);
            if !self.other_machine {
                out.word(6);
            }
            out.long(offset as u64);
            out.long(virt);
            out.long(if is_physical { address } else { 0 });
            out.long(bytes.len() as u64);
            out.long(memory);
            if self.other_machine {
                out.word(6);
            }
            out.long(1);
            offset += bytes.len();
            data.extend(bytes);
        };
        segment(&mut out, 4, 0, &notes, 0);
        for load in &self.loads {
            segment(&mut out, 1, load.start, &load.bytes, load.memory_bytes);
        }
        if many {
            // This section has the number of program headers if it needs more than 16 bits.
            out.bytes.resize(out.bytes.len() + section, 0);
            let at = out.bytes.len() - section + if self.other_machine { 28 } else { 44 };
            let info = u32::try_from(count).unwrap();
            let info = if self.other_machine {
                info.to_be_bytes()
            } else {
                info.to_le_bytes()
            };
            out.bytes[at..at + 4].copy_from_slice(&info);
        }
        out.bytes.extend(data);
        out.bytes
    }

    fn notes(&self, mut out: Numbers) -> Vec<u8> {
        let note = |out: &mut Numbers, name: &[u8], kind, desc: &[u8]| {
            out.word(name.len() as u64 + 1);
            out.word(desc.len() as u64);
            out.word(kind);
            out.bytes.extend(name);
            out.bytes
                .resize((out.bytes.len() + 1).next_multiple_of(4), 0);
            out.bytes.extend(desc);
            out.bytes.resize(out.bytes.len().next_multiple_of(4), 0);
        };
        note(&mut out, b"CORE", 1, &[0; 12]);
        if self.qemu {
            note(&mut out, b"QEMU", 0, &[0; 16]);
        }
        if !self.note.is_empty() {
            note(&mut out, self.note, 0xb00, &[0; 24]);
        }
        if !self.files.is_empty() {
            let mut desc = Numbers {
                bytes: Vec::new(),
                ..out
            };
            desc.long(self.files.len() as u64);
            desc.long(4096);
            for (start, end, _) in &self.files {
                desc.long(*start);
                desc.long(*end);
                desc.long(0);
            }
            for (_, _, name) in &self.files {
                desc.bytes.extend(name);
                desc.bytes.push(0);
            }
            note(&mut out, b"CORE", 0x4649_4c45, &desc.bytes);
        }
        out.bytes
    }
}

/// Returns the name, start and bytes of each region.
fn regions(folder: &Folder, snapshot: &str) -> Vec<(String, u64, u64)> {
    let info = run(folder, &["info", snapshot, "--json"]).exits(0).json();
    let regions = info["regions"].as_array().unwrap();
    regions
        .iter()
        .map(|region| {
            let name = region["name"].as_str().unwrap().to_owned();
            (name, number(region, "start"), number(region, "bytes"))
        })
        .collect()
}

/// Returns the bytes of a region.
fn region(folder: &Folder, snapshot: &str, number: usize) -> Vec<u8> {
    let number = number.to_string();
    let args = ["extract", snapshot, "-o", "-", "--region", &number];
    run(folder, &args).exits(0).out
}

#[test]
fn segments_are_sorted_named_and_taken_once() {
    let folder = Folder::new();
    for other_machine in [false, true] {
        let core = Core {
            loads: vec![
                Load::pages(0x9000, &[7, 8, 9]),
                Load::pages(0x2000, &[1, 2]),
                // The first page is known from the previous segment.
                Load::pages(0x3000, &[2, 3]),
                Load {
                    start: 0x20000,
                    bytes: vec![5; 4096],
                    memory_bytes: 0x4000,
                },
            ],
            files: vec![
                (0x9000, 0xc000, "/lib/b".into()),
                (0x1000, 0x4000, "/bin/a".into()),
            ],
            other_machine,
            ..Core::default()
        };
        folder.write("core", &core.bytes());
        run(&folder, &["create", "core", "-o", "s", "--force"]).exits(0);
        run(&folder, &["verify", "s"]).exits(0);
        assert_eq!(
            regions(&folder, "s"),
            [
                ("/bin/a".into(), 0x2000, 0x2000),
                (String::new(), 0x4000, 0x1000),
                ("/lib/b".into(), 0x9000, 0x3000),
                (String::new(), 0x20000, 0x4000),
            ]
        );
        assert_eq!(region(&folder, "s", 0), [[1; 4096], [2; 4096]].concat());
        assert_eq!(region(&folder, "s", 1), [3; 4096]);
        assert_eq!(
            region(&folder, "s", 2),
            [[7; 4096], [8; 4096], [9; 4096]].concat()
        );
        // Memory that was not dumped is unknown, not zero.
        let info = run(&folder, &["info", "s", "--json"]).json();
        assert_eq!(number(&info, "unavailable_pages"), 3);
    }
}

#[test]
fn adjacent_guest_memory_is_one_physical_region() {
    let folder = Folder::new();
    let core = Core {
        loads: vec![
            Load::pages(0x10_0000, &[4, 5]),
            Load::pages(0, &[1, 2]),
            // The same memory under another virtual address.
            Load::pages(0x10_1000, &[5, 6]),
            Load::pages(0x2000, &[3]),
        ],
        qemu: true,
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    run(&folder, &["create", "core", "-o", "s"]).exits(0);
    assert_eq!(
        regions(&folder, "s"),
        [
            ("memory".into(), 0, 0x3000),
            ("memory".into(), 0x10_0000, 0x3000)
        ]
    );
    let expected: Vec<u8> = (1..=6).flat_map(|byte| [byte; 4096]).collect();
    assert_eq!(run(&folder, &["extract", "s", "-o", "-"]).out, expected);
    let info = run(&folder, &["info", "s", "--json"]).json();
    assert_eq!(info["properties"]["source"], "elf core of a guest");
}

/// Returns the properties of a snapshot.
fn properties(folder: &Folder, snapshot: &str) -> serde_json::Value {
    run(folder, &["info", snapshot, "--json"]).exits(0).json()["properties"].take()
}

/// Dumps of machines whose virtual addresses are meaningless: by VirtualBox, and by a kernel.
#[test]
fn machine_cores_use_physical_addresses() {
    let folder = Folder::new();
    for (note, virt, no_version, source) in [
        (&b"VBCORE"[..], 0, false, "elf core of a guest"),
        (b"VBCORE", 0, true, "elf core of a guest"),
        (b"VMCOREINFO", 0, false, "elf core of a machine"),
        (b"VMCOREINFO", u64::MAX, false, "elf core of a machine"),
        // No note tells, but the virtual addresses contradict each other.
        (b"", 0, false, "elf core of a machine"),
        (b"", u64::MAX, false, "elf core of a machine"),
    ] {
        let core = Core {
            loads: vec![
                Load::pages(0xe000_0000, &[3, 4, 5]),
                Load::pages(0x1000, &[1, 2]),
                Load::pages(0xffff_0000, &[6]),
            ],
            machine: Some(virt),
            note,
            no_version,
            ..Core::default()
        };
        folder.write("core", &core.bytes());
        let made = run(&folder, &["create", "core", "-o", "s", "--force", "--json"])
            .exits(0)
            .json();
        assert_eq!(
            regions(&folder, "s"),
            [
                ("memory".into(), 0x1000, 0x2000),
                ("memory".into(), 0xe000_0000, 0x3000),
                ("memory".into(), 0xffff_0000, 0x1000)
            ]
        );
        let expected: Vec<u8> = (1..=6).flat_map(|byte| [byte; 4096]).collect();
        assert_eq!(run(&folder, &["extract", "s", "-o", "-"]).out, expected);
        let properties = properties(&folder, "s");
        assert_eq!(properties["source"], source);
        let by_addresses = note.is_empty().then_some("physical");
        assert_eq!(properties["source.addresses"].as_str(), by_addresses);
        assert_eq!(made["remarks"][0]["value"].as_str(), by_addresses);
    }
}

#[test]
fn contradicting_segments_are_named_by_number_and_address() {
    let folder = Folder::new();
    let core = Core {
        loads: vec![
            Load::pages(0x40_0000, &[1, 2, 3]),
            Load::pages(0x40_1000, &[2, 9, 9]),
        ],
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    let refused = run(&folder, &["create", "core", "-o", "s"])
        .exits(1)
        .says(&[
            "segments 1 and 2",
            "0x401000",
            "differ at 0x402000",
            "--raw",
        ]);
    assert!(!refused.err.contains("damaged"), "{}", refused.err);
    assert_eq!(folder.names(), ["core"]);
}

/// The summary, the JSON object, a property and a warning report what is not taken as it is.
#[test]
fn incomplete_input_is_remarked_everywhere() {
    let folder = Folder::new();
    let load = |start, bytes: usize, memory_bytes| Load {
        start,
        bytes: vec![7; bytes],
        memory_bytes,
    };
    let memory = || Load::pages(0, &[1, 2]);
    let cases: [(&str, Core, &str, u64, u64); 4] = [
        // Memory of a TPM, as QEMU dumps it.
        (
            "source.filled_bytes",
            Core {
                loads: vec![memory(), load(0xfed4_0080, 3968, 3968)],
                qemu: true,
                ..Core::default()
            },
            "0xfed40000",
            128,
            0,
        ),
        (
            "source.partly_known_bytes",
            Core {
                loads: vec![memory(), load(0x9000, 0x1800, 0x4000)],
                ..Core::default()
            },
            "0xa000",
            0x800,
            3,
        ),
        (
            "source.beyond_bytes",
            Core {
                loads: vec![memory(), load(0x9000, 0x2000, 0)],
                ..Core::default()
            },
            "segment 2",
            0x2000,
            0,
        ),
        (
            "source.unaddressed_bytes",
            Core {
                loads: vec![memory(), load(u64::MAX, 0x1000, 0x1000)],
                machine: Some(0xffff_c900_0000_0000),
                note: b"VMCOREINFO",
                ..Core::default()
            },
            "0xffffc90000000000",
            0x1000,
            0,
        ),
    ];
    for (key, core, place, bytes, unavailable) in cases {
        folder.write("core", &core.bytes());
        let create = ["create", "core", "-o", "s", "--force"];
        let told = run(&folder, &create).exits(0).says(&["warning: ", place]);
        assert!(told.text().contains("WARNING"), "{}", told.text());
        assert!(told.text().contains(place), "{}", told.text());
        assert_eq!(properties(&folder, "s")[key], bytes.to_string());
        let told = run(&folder, &[&create[..], &["--json"]].concat()).json();
        assert_eq!(told["remarks"][0]["key"], key);
        assert_eq!(told["remarks"][0]["value"], bytes.to_string());
        assert_eq!(number(&told, "unavailable_pages"), unavailable);
        run(&folder, &["verify", "s"]).exits(0);
    }
    // The part of the page is there, and the rest is zero.
    let core = Core {
        loads: vec![
            load(0xfed4_0080, 0x780, 0x780),
            load(0xfed4_0800, 0x7c0, 0x7c0),
        ],
        qemu: true,
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    run(&folder, &["create", "core", "-o", "s", "--force"]).exits(0);
    let parts = [vec![0; 0x80], vec![7; 0xf40], vec![0; 0x40]];
    assert_eq!(region(&folder, "s", 0), parts.concat());
    // Without anything to report, there is no remark.
    let core = Core {
        loads: vec![memory()],
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    let quiet = run(&folder, &["create", "core", "-o", "s", "--force", "--json"]).exits(0);
    assert_eq!(quiet.json()["remarks"], serde_json::json!([]));
    assert_eq!(quiet.err, "");
}

/// Sanitizers reserve terabytes of address space, of which the kernel dumps nothing.
#[test]
fn vast_missing_memory_is_omitted_and_the_snapshot_opens() {
    let folder = Folder::new();
    let lacking = |start, pages: u64| Load {
        start,
        bytes: Vec::new(),
        memory_bytes: pages * 4096,
    };
    let core = Core {
        loads: vec![
            Load::pages(0x1000, &[1, 2]),
            lacking(0x8000, 3),
            lacking(0x10_0000, 1 << 34),
            Load::pages(0x7f00_0000_0000, &[3]),
        ],
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    let told = run(&folder, &["create", "core", "-o", "s", "--json"])
        .exits(0)
        .says(&["warning: 17,179,869,184 pages of its memory are not in the dump"]);
    assert!(!told.err.contains("mapped files"), "{}", told.err);
    let keys = [
        ("source.absent_bytes".to_owned(), 3 * 4096),
        ("source.left_out_bytes".to_owned(), 1 << 46),
    ];
    assert_eq!(remarks(&told.json()), keys);
    for (key, bytes) in keys {
        assert_eq!(properties(&folder, "s")[key], bytes.to_string());
    }
    run(&folder, &["verify", "s"]).exits(0);
    let starts: Vec<_> = regions(&folder, "s").iter().map(|r| (r.1, r.2)).collect();
    assert_eq!(
        starts,
        [
            (0x1000, 0x2000),
            (0x8000, 0x3000),
            (0x7f00_0000_0000, 0x1000)
        ]
    );
    // A core with nothing but such memory has no memory at all.
    let core = Core {
        loads: vec![lacking(0x10_0000, 1 << 34)],
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    run(&folder, &["create", "core", "-o", "t"])
        .exits(1)
        .says(&["holds no memory", "not in the dump"]);
}

#[test]
fn truncated_core_is_packed_on_request() {
    let folder = Folder::new();
    let core = Core {
        loads: vec![Load::pages(0x1000, &[1, 2, 3, 4])],
        ..Core::default()
    };
    let bytes = core.bytes();
    folder.write("core", &bytes[..bytes.len() - 0x1800]);
    run(&folder, &["create", "core", "-o", "s"])
        .exits(1)
        .says(&["cut short", "--incomplete"]);
    let told = run(
        &folder,
        &["create", "core", "-o", "s", "--incomplete", "--json"],
    )
    .exits(0)
    .says(&["warning: ", "6,144 bytes are missing"])
    .json();
    assert_eq!(number(&told, "unavailable_pages"), 2);
    let properties = properties(&folder, "s");
    assert_eq!(properties["source.cut_bytes"], "6144");
    assert_eq!(properties["source.partly_known_bytes"], "2048");
    let all = ["extract", "s", "-o", "-", "--unavailable", "zero"];
    let taken = run(&folder, &all).exits(0).out;
    assert_eq!(taken[..0x2000], [[1; 4096], [2; 4096]].concat());
}

#[test]
fn names_of_mapped_files_stay_different_and_can_be_shown() {
    let folder = Folder::new();
    let names: [&[u8]; 3] = [
        b"/lib/\xfe\x1b[2J",
        b"/lib/\xff\x1b[2J",
        b"/lib/\\xff\\x1b[2J",
    ];
    let core = Core {
        loads: (0..3).map(|n| Load::pages(0x1000 << n, &[1])).collect(),
        files: (0..3)
            .map(|n| (0x1000 << n, (0x1000 << n) + 0x1000, names[n].to_vec()))
            .collect(),
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    run(&folder, &["create", "core", "-o", "s"]).exits(0);
    let stored: Vec<_> = regions(&folder, "s").into_iter().map(|r| r.0).collect();
    assert_eq!(
        stored,
        [
            r"/lib/\xfe\x1b[2J",
            r"/lib/\xff\x1b[2J",
            r"/lib/\\xff\\x1b[2J"
        ]
    );
    let shown = run(&folder, &["info", "s"]).exits(0).text();
    assert!(
        shown.contains(&stored[0]) && !shown.contains('\x1b'),
        "{shown}"
    );
    let args = ["extract", "s", "-o", "-", "--region", &stored[1]];
    assert_eq!(run(&folder, &args).exits(0).out, [1; 4096]);
}

#[test]
fn core_with_more_than_65535_segments_is_read() {
    let folder = Folder::new();
    let loads: Vec<_> = (0..70_000_u32)
        .map(|n| Load {
            start: 0x10000 + u64::from(n) * 0x2000,
            bytes: n.to_le_bytes().repeat(1024),
            memory_bytes: 4096,
        })
        .collect();
    let core = Core {
        loads,
        ..Core::default()
    };
    folder.write("core", &core.bytes());
    run(&folder, &["create", "core", "-o", "s"]).exits(0);
    let regions = regions(&folder, "s");
    assert_eq!(regions.len(), 70_000);
    assert_eq!(regions[69_999].1, 0x10000 + 69_999 * 0x2000);
    assert_eq!(
        region(&folder, "s", 69_999),
        69_999_u32.to_le_bytes().repeat(1024)
    );
}

#[test]
fn damaged_cores_are_refused_with_a_reason() {
    let folder = Folder::new();
    let core = Core {
        loads: vec![Load::pages(0x1000, &[1, 2, 3])],
        files: vec![(0x1000, 0x4000, "/bin/a".into())],
        ..Core::default()
    };
    let good = core.bytes();
    let refuse = |bytes: &[u8], says: &str| {
        folder.write("core", bytes);
        run(&folder, &["create", "core", "-o", "s"])
            .exits(1)
            .says(&["core", says]);
        assert_eq!(folder.names(), ["core"]);
    };
    refuse(&good[..good.len() - 1], "cut short");
    refuse(&good[..100], "damaged ELF core");
    refuse(&good[..40], "damaged ELF core");
    // More program headers than 16 bits can count, and more than are read. Their number is in a
    // section header.
    let mut many = good.clone();
    let at = many.len() as u64;
    many[40..48].copy_from_slice(&at.to_le_bytes());
    many[56..62].copy_from_slice(&[0xff, 0xff, 64, 0, 1, 0]);
    let mut section = [0; 64];
    section[44..48].copy_from_slice(&((1_u32 << 20) + 1).to_le_bytes());
    many.extend(section);
    refuse(&many, "1048577 program headers; at most 1048576");
    let nothing = Core::default().bytes();
    refuse(&nothing, "no memory");
    // However it is damaged, it is refused or packed; nothing panics.
    for at in (16..240).step_by(2) {
        for value in [0, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            folder.write("core", &bytes);
            let run = run(
                &folder,
                &[
                    "create",
                    "core",
                    "-o",
                    "s",
                    "--force",
                    "--dictionary",
                    "off",
                ],
            );
            assert!(
                matches!(run.code, Some(0 | 1)),
                "byte {at}: {:?} {}",
                run.code,
                run.err
            );
            assert!(!run.err.contains("panicked"), "byte {at}: {}", run.err);
        }
    }
}

#[test]
fn gcore_core_equals_the_process_memory() {
    let name = "gcore_core_equals_the_process_memory";
    let gcore = match ensure_program("gcore", "gdb") {
        Ok(gcore) => gcore,
        Err(why) => return skipped(name, &why),
    };
    let folder = Folder::new();
    let owner = Owner::small();
    let prefix = folder.file("core");
    let made = Command::new(gcore)
        .arg("-o")
        .arg(&prefix)
        .arg(owner.pid().to_string())
        .output()
        .unwrap();
    let core = format!("core.{}", owner.pid());
    if !folder.file(&core).exists() {
        let why = format!(
            "gcore made no core: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        return skipped(name, &Unavailable { why });
    }
    run(&folder, &["create", &core, "-o", "s"]).exits(0);
    run(&folder, &["verify", "s"]).exits(0);
    let regions = regions(&folder, "s");
    let pattern = owner.place("pattern");
    let index = regions
        .iter()
        .position(|(_, start, bytes)| (*start..start + bytes).contains(&pattern))
        .expect("region is missing");
    let bytes = region(&folder, "s", index);
    let at = usize::try_from(pattern - regions[index].1).unwrap();
    assert!(bytes[at..].starts_with(&Owner::pattern()));
    assert!(
        regions.iter().any(|(name, _, _)| name.contains("libc")),
        "{regions:?}"
    );
}

#[test]
fn qemu_dump_equals_the_guest_memory() {
    let name = "qemu_dump_equals_the_guest_memory";
    let qemu = match ensure_program("qemu-system-x86_64", "qemu-system-x86") {
        Ok(qemu) => qemu,
        Err(why) => return skipped(name, &why),
    };
    let folder = Folder::new();
    let mut qemu = Command::new(qemu)
        .args([
            "-machine",
            "pc,accel=tcg",
            "-m",
            "32",
            "-display",
            "none",
            "-net",
            "none",
        ])
        .args(["-monitor", "stdio", "-serial", "none"])
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut monitor = qemu.stdin.take().unwrap();
    // The firmware may or may not run meanwhile; its memory is there in either case.
    std::thread::sleep(std::time::Duration::from_millis(500));
    write!(
        monitor,
        "stop\npmemsave 0xc0000 0x1f40000 ram\ndump-guest-memory dump\nquit\n"
    )
    .unwrap();
    let mut ended = false;
    wait_until("QEMU ends", || {
        ended = ended || qemu.try_wait().unwrap().is_some();
        ended
    });
    run(&folder, &["create", "dump", "-o", "s"]).exits(0);
    let regions = regions(&folder, "s");
    assert_eq!(regions[0], ("memory".into(), 0, 0xa0000));
    assert_eq!(regions[1], ("memory".into(), 0xc0000, 0x1f4_0000));
    assert!(region(&folder, "s", 1) == folder.read("ram"));
}
