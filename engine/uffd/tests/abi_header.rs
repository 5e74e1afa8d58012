//! Comparison of the userfaultfd ABI with the header of this system, by ctest: it generates a C and
//! a Rust program from `abi.rs`, which compare every constant, size, alignment, offset and round
//! trip.
//!
//! A distribution's header is often older than its kernel (Debian 12 has that of Linux 6.1).
//! Definitions that are not in the header can't be compared; they are counted in the output, and
//! must be among those known to be newer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use snaprestore_fixtures::host::{skipped, told};

/// Everything that was introduced after the header of Linux 6.1.
const NEWER_THAN_6_1: &[&str] = &[
    "_UFFDIO_MOVE",
    "_UFFDIO_POISON",
    "UFFDIO_MOVE",
    "UFFDIO_POISON",
    "UFFD_FEATURE_WP_UNPOPULATED",
    "UFFD_FEATURE_POISON",
    "UFFD_FEATURE_WP_ASYNC",
    "UFFD_FEATURE_MOVE",
    "UFFDIO_CONTINUE_MODE_WP",
    "UFFDIO_POISON_MODE_DONTWAKE",
    "UFFDIO_MOVE_MODE_DONTWAKE",
    "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES",
    "uffdio_poison",
    "uffdio_move",
];

/// Names for types that are anonymous in the header.
const INNER_TYPES: &str = "
#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
typedef __typeof__(((struct uffd_msg *)0)->arg) uffd_msg_arg;
typedef __typeof__(((struct uffd_msg *)0)->arg.pagefault) uffd_msg_pagefault;
typedef __typeof__(((struct uffd_msg *)0)->arg.fork) uffd_msg_fork;
typedef __typeof__(((struct uffd_msg *)0)->arg.remap) uffd_msg_remap;
typedef __typeof__(((struct uffd_msg *)0)->arg.remove) uffd_msg_remove;
";

/// Returns the preprocessed header, or `None` without a compiler or header.
fn preprocess(options: &[&str]) -> Option<String> {
    let output = Command::new("cc")
        .args([
            "-E",
            "-include",
            "linux/userfaultfd.h",
            "-x",
            "c",
            "/dev/null",
        ])
        .args(options)
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn run(command: &mut Command) -> String {
    let output = command.output().expect("cannot start the command");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn abi() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/uffd/abi.rs")
}

/// Returns the compiler's target triple, which is this machine's because the generated program runs
/// here.
fn host() -> String {
    let version = run(Command::new("rustc").arg("-vV"));
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.expect("rustc names its host").to_owned()
}

#[test]
fn abi_agrees_with_this_systems_header() {
    let (Some(macros), Some(text)) = (preprocess(&["-dM"]), preprocess(&[])) else {
        return skipped(
            "abi_agrees_with_this_systems_header",
            &"no cc, or no linux/userfaultfd.h",
        );
    };
    let defined: BTreeSet<String> = macros
        .lines()
        .filter_map(|line| line.strip_prefix("#define ")?.split([' ', '(']).next())
        .map(str::to_owned)
        .collect();
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("inner_types.h"), INNER_TYPES).expect("written");

    let source = std::fs::read_to_string(abi()).expect("abi.rs");
    let has_struct = move |name: &str| {
        name.starts_with("uffd_msg") || text.contains(&format!("struct {name} {{"))
    };
    let names = source.lines().filter_map(|line| {
        let constant = line
            .strip_prefix("pub const ")
            .and_then(|rest| rest.split(':').next());
        constant.or_else(|| line.strip_prefix("pub struct ")?.split(' ').next())
    });
    let absent: Vec<&str> = names
        .filter(|name| !defined.contains(*name) && !has_struct(name))
        .collect();
    told(&format_args!(
        "not in this system's header, so not compared: {absent:?}"
    ));
    for name in &absent {
        assert!(
            NEWER_THAN_6_1.contains(name),
            "{name} is missing from the header"
        );
    }

    let mut generator = ctest::TestGenerator::new();
    let known_structs = has_struct.clone();
    generator
        .header("inner_types.h")
        .include(folder.path())
        .target(&host())
        .out_dir(folder.path())
        .edition(2024)
        .skip_private(true)
        .skip_const(move |constant| !defined.contains(constant.ident()))
        .skip_struct(move |item| !known_structs(item.ident()))
        .rename_struct_ty(|name| (name.starts_with("uffd_msg_")).then(|| name.to_owned()))
        .rename_union_ty(|name| (name == "uffd_msg_arg").then(|| name.to_owned()))
        .rename_struct_field(|item, field| match (item.ident(), field.ident()) {
            ("uffd_msg_pagefault", "ptid") => Some("feat.ptid".to_owned()),
            (_, "move_") => Some("move".to_owned()),
            _ => None,
        });
    generator
        .generate_files(abi(), "generated")
        .expect("generated");

    let at = |name: &str| folder.path().join(name);
    // The header's __u64 is `long long`, u64 is `long` to ctest: the same width, but another type
    // in C.
    run(Command::new("cc")
        .args([
            "-Wall",
            "-Werror",
            "-Wno-address-of-packed-member",
            "-Wno-type-limits",
            "-Wno-incompatible-pointer-types",
            "-c",
        ])
        .arg("-I")
        .arg(folder.path())
        .arg(at("generated.c"))
        .arg("-o")
        .arg(at("generated.o")));
    let main = format!(
        "#[path = {:?}] mod abi;\nuse abi::*;\nuse core::ffi::c_ulong;\ninclude!({:?});\n",
        abi(),
        at("generated.rs")
    );
    std::fs::write(at("main.rs"), main).expect("written");
    run(Command::new("rustc")
        .args(["--edition", "2024", "-Awarnings"])
        .arg(at("main.rs"))
        .arg(format!("-Clink-arg={}", at("generated.o").display()))
        .arg("-o")
        .arg(at("check")));
    let report = run(&mut Command::new(at("check")));
    let passed = report
        .lines()
        .find_map(|line| line.strip_prefix("PASSED ")?.split(' ').next());
    let passed: u32 = passed
        .and_then(|number| number.parse().ok())
        .expect(&report);
    told(&format_args!(
        "{passed} comparisons with this system's header"
    ));
    // The header of 6.1 provides 197 of them; many fewer would mean that the generator no longer
    // sees the file.
    assert!(passed >= 190, "{report}");
}
