//! The command line: wrong usage, help, completions, manual pages.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;

use crate::common::{Folder, Run, command, run};

#[test]
fn wrong_usage_exits_2_with_a_hint() {
    let folder = Folder::new();
    folder.write("raw", &[1; 4096]);
    folder.write("note", b"x");
    let wrong: &[(&[&str], &str)] = &[
        (&[], "Usage"),
        (&["fetch"], "fetch"),
        (&["create"], "--output"),
        (&["create", "-o", "s"], "<SOURCE"),
        (&["create", "raw"], "--output"),
        (&["create", "raw", "--pid", "1", "-o", "s"], "--pid"),
        (
            &["create", "raw", "-o", "s", "--frame-size", "96"],
            "power of two",
        ),
        (&["create", "raw", "-o", "s", "--level", "23"], "23"),
        (&["create", "raw", "-o", "s", "--threads", "0"], "0"),
        (
            &["create", "raw", "-o", "s", "--attach", "note"],
            "NAME=PATH",
        ),
        (
            &[
                "create", "raw", "-o", "s", "--attach", "a=note", "--attach", "a=note",
            ],
            "named \"a\"",
        ),
        (&["create", "raw", "-o", "-", "--json"], "--json"),
        (&["extract", "s"], "--output"),
        (&["extract", "s", "-o", "-", "--json"], "--json"),
        (
            &["extract", "s", "-o", "r", "--unavailable", "guess"],
            "guess",
        ),
        (
            &[
                "extract",
                "s",
                "-o",
                "r",
                "--attachment",
                "a",
                "--region",
                "0",
            ],
            "--region",
        ),
        (&["info"], "<FILE>"),
        (&["verify", "s", "--threads", "many"], "many"),
        (&["restore", "s", "--touch", "twice"], "twice"),
        (
            &["restore", "s", "--touch", "none", "--check", "raw"],
            "--touch none touches none",
        ),
        (&["demo", "--force"], "--keep"),
        (&["man", "--force"], "--output"),
        (&["restore", "s", "--prefetch", "some"], "some"),
        (&["completions", "cobol"], "cobol"),
        (&["man", "fetch"], "fetch"),
        (&["serve"], "--snapshot"),
        (&["serve", "--snapshot", "s"], "--socket"),
        (
            &["serve", "--config", "c", "--snapshot", "s", "--socket", "k"],
            "--config",
        ),
        (
            &[
                "serve",
                "--snapshot",
                "s",
                "--socket",
                "k",
                "--metrics",
                "0.0.0.0:1",
            ],
            "127.0.0.1:9100",
        ),
        (&["ctl"], "add"),
        (&["ctl", "start"], "start"),
        (&["ctl", "complete"], "<VM"),
        (&["ctl", "complete", "1", "--all"], "--all"),
        (&["ctl", "complete", "web"], "web"),
        (&["ctl", "add", "web", "--snapshot", "s"], "--socket"),
    ];
    for (args, says) in wrong {
        let run = run(&folder, args);
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.err);
        assert!(
            run.err.contains(says),
            "{args:?}: no {says:?} in {}",
            run.err
        );
        if args.contains(&"--json") {
            let failure = run.json();
            assert_eq!(failure["exit_code"], 2, "{failure}");
            assert!(failure["error"].as_str().unwrap().contains(says));
        } else {
            assert!(run.out.is_empty(), "{args:?}: {}", run.text());
        }
    }
    assert_eq!(folder.names(), ["note", "raw"]);
}

#[test]
fn options_that_have_no_effect_are_refused() {
    let folder = Folder::new();
    for (args, says) in [
        (&["man", "--output", "-"][..], "names a folder"),
        (&["demo", "--keep", "-"], "name a file"),
        (
            &["serve", "--config", "c", "--prefetch", "all"],
            "no effect without --snapshot: --prefetch;",
        ),
    ] {
        run(&folder, args).exits(2).says(&[says]);
    }
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn help_documents_the_exit_codes() {
    let help = Run::to_end(&mut command(["--help"])).exits(0).text();
    for line in [
        "3  the file, or one of its ancestors, is damaged",
        "\"exit_code\": N",
        "4  this machine does not permit it",
        "130",
    ] {
        assert!(help.contains(line), "{help}");
    }
    let version = Run::to_end(&mut command(["--version"])).exits(0).text();
    assert_eq!(
        version,
        concat!("snaprestore ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn every_command_has_help_and_a_manual_page() {
    let folder = Folder::new();
    let report = run(&folder, &["man", "--output", "pages", "--json"])
        .exits(0)
        .json();
    let pages = report["pages"].as_array().unwrap();
    assert!(pages.len() >= 10, "{report}");
    for page in pages {
        let name = page["name"].as_str().unwrap();
        let text = String::from_utf8(folder.read(page["file"].as_str().unwrap())).unwrap();
        assert!(
            text.contains(".TH") && text.contains(&name.replace('-', "\\-")),
            "{name}"
        );
        if let Some(command) = name.strip_prefix("snaprestore-") {
            // `ctl-add` is a command of `ctl`.
            let words: Vec<_> = command.split('-').chain(["--help"]).collect();
            run(&folder, &words).exits(0);
            let printed = run(&folder, &["man", command]).exits(0).text();
            assert_eq!(printed, text);
        }
    }
    let hidden = pages
        .iter()
        .any(|page| page["name"].as_str().unwrap().contains("owner"));
    assert!(!hidden, "{report}");
}

#[test]
fn manual_pages_are_written_over_by_force_only() {
    let folder = Folder::new();
    folder.write("snaprestore-info.1", b"mine");
    run(&folder, &["man", "-o", "."]).exits(1).says(&[
        "snaprestore-info.1",
        "exists already",
        "--force",
    ]);
    assert_eq!(folder.names(), ["snaprestore-info.1"]);
    assert_eq!(folder.read("snaprestore-info.1"), b"mine");
    run(&folder, &["man", "-o", ".", "--force"]).exits(0);
    assert_ne!(folder.read("snaprestore-info.1"), b"mine");
}

#[test]
fn json_failure_is_an_object() {
    let folder = Folder::new();
    folder.write("text", b"hello");
    let cases: &[(&[&str], i32, &str)] = &[
        (&["info", "none", "--json"], 1, "No such file"),
        (&["verify", "none", "--json"], 1, "No such file"),
        (&["info", "text", "--json"], 3, "not a snapshot"),
        (&["restore", "text", "--json"], 3, "not a snapshot"),
        (&["create", "none", "-o", "s", "--json"], 1, "No such file"),
        (
            &["extract", "text", "-o", "r", "--json"],
            3,
            "not a snapshot",
        ),
        (&["fetch", "--json"], 2, "fetch"),
        (&["info", "--json"], 2, "required"),
    ];
    for (args, code, says) in cases {
        let run = run(&folder, args).exits(*code).says(&[says]);
        let failure = run.json();
        assert_eq!(failure["exit_code"], *code, "{args:?}");
        let error = failure["error"].as_str().unwrap();
        assert!(error.contains(says), "{args:?}: {error}");
    }
}

#[test]
fn full_standard_output_is_named() {
    let folder = Folder::new();
    folder.write("raw", &[1; 4096]);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut info = command(["info", "s"]);
    info.current_dir(folder.path())
        .stdout(full)
        .stderr(Stdio::piped());
    Run::to_end(&mut info)
        .exits(1)
        .says(&["cannot write to standard output", "No space left"]);
}

#[test]
fn completions_know_the_commands() {
    let folder = Folder::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&folder, &["completions", shell]).exits(0).text();
        assert!(script.contains("verify"), "{shell}");
    }
    let report = run(&folder, &["completions", "bash", "--json"])
        .exits(0)
        .json();
    assert_eq!(report["shell"], "bash");
    assert!(report["script"].as_str().unwrap().contains("verify"));
}

#[test]
fn closed_pipe_reader_is_not_a_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let run = Run::to_end(command(["man"]).stdout(writer).stderr(Stdio::piped()));
    assert_eq!((run.code, run.err.as_str()), (Some(0), ""));
}

#[test]
fn quiet_prints_errors_only() {
    let folder = Folder::new();
    folder.write("raw", &[1; 8192]);
    let made = run(&folder, &["create", "raw", "-o", "s", "--quiet"]).exits(0);
    assert_eq!((made.out.len(), made.err.len()), (0, 0));
    for args in [
        &["info", "s", "-q"][..],
        &["verify", "s", "-q"],
        &["extract", "s", "-o", "r", "-q"],
    ] {
        let run = run(&folder, args).exits(0);
        assert_eq!(
            (run.text(), run.err),
            (String::new(), String::new()),
            "{args:?}"
        );
    }
    run(&folder, &["extract", "s", "-o", "r", "-q"])
        .exits(1)
        .says(&["exists already", "--force"]);
}

/// Regression: a socket without a listener was removed, and so was any other file.
#[test]
fn regular_file_at_the_socket_path_is_kept() {
    let folder = Folder::new();
    folder.write("raw", &[7; 4096]);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let content = fs::read(folder.file("s")).unwrap();
    let control = ["--socket", "socket", "--control", "s"];
    let metrics = ["--socket", "socket", "--metrics", "./s"];
    for options in [&["--socket", "s"][..], &control, &metrics] {
        let serve = [&["serve", "--snapshot", "s"][..], options].concat();
        let failed = run(&folder, &serve).exits(1);
        failed.says(&["cannot listen on ", "another path"]);
        assert_eq!(fs::read(folder.file("s")).unwrap(), content);
    }
    // A socket left by a killed daemon is replaced, so the next step fails.
    drop(UnixListener::bind(folder.file("old")).unwrap());
    let serve = [
        "serve",
        "--snapshot",
        "s",
        "--control",
        "old",
        "--socket",
        "s",
    ];
    run(&folder, &serve).exits(1).says(&["cannot listen on "]);
    assert!(!folder.file("old").exists());
}

/// A terminal obeys escape sequences, and a line feed would begin a forged line.
#[test]
fn names_of_any_bytes_are_escaped_in_messages() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt as _;
    let folder = Folder::new();
    folder.write("raw", &[1; 4096]);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    for end in [b'\xfe', b'\xff'] {
        let name = [&b"a\\\n\x1b[31m"[..], &[end]].concat();
        let name = OsStr::from_bytes(&name);
        fs::write(folder.file("").join(name), [1; 8192]).unwrap();
        let missing = Path::new(name).join("s");
        let os = |text: &str| OsString::from(text);
        let all: [Vec<OsString>; 12] = [
            vec![os("info"), name.into()],
            vec![os("info"), missing.clone().into()],
            vec![os("verify"), name.into()],
            vec![os("restore"), name.into()],
            vec![os("restore"), os("s"), os("--check"), name.into()],
            vec![os("create"), os("raw"), os("-o"), name.into()],
            vec![os("create"), os("raw"), os("-o"), missing.clone().into()],
            vec![os("create"), missing.into(), os("-o"), os("t")],
            vec![os("extract"), os("s"), os("-o"), name.into()],
            vec![os("man"), os("-o"), name.into()],
            vec![os("man"), name.into()],
            vec![os("serve"), os("--config"), name.into()],
        ];
        for args in all {
            let said = Run::to_end(command(&args).current_dir(folder.path()));
            assert_ne!(said.code, Some(0), "{args:?}");
            let shown = format!("a\\\\\\x0a\\x1b[31m\\x{end:02x}");
            let said = said.text() + &said.err;
            assert!(said.contains(&shown), "{args:?}: {said}");
            assert!(!said.contains('\u{1b}'), "{args:?}: {said}");
        }
    }
    // Text that JSON can hold as it is.
    let name = "b\n\u{1b}[31mc";
    fs::copy(folder.file("s"), folder.file(name)).unwrap();
    for args in [["verify", name], ["info", name]] {
        let said = run(&folder, &args).exits(0).text();
        assert!(!said.contains("b\n") && !said.contains('\u{1b}'), "{said}");
    }
    // Unexpected arguments are repeated as typed, or as a shell made them from file names.
    let args = ["info", "s", "\u{1b}[31m"];
    let said = Run::to_end(command(args).current_dir(folder.path())).exits(2);
    assert!(!said.err.contains('\u{1b}'), "{}", said.err);
}
