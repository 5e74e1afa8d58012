//! `snaprestore ctl` with a control socket of the test's own.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use snaprestore_fixtures::host::skipped;

use crate::common::{Folder, Run, as_nobody, command, run};
use crate::working_sets::trace_of;

/// A server that answers each line of successive connections, and records the requests.
struct Daemon {
    asked: Arc<Mutex<Vec<Value>>>,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Listens in `folder`; answers each request with the next of `replies`, and exits after the
    /// last.
    fn start(folder: &Folder, replies: Vec<Value>) -> Self {
        let path = folder.file("control");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&asked);
        let thread = std::thread::spawn(move || {
            let mut replies = replies.into_iter().peekable();
            while replies.peek().is_some() {
                let (stream, _) = listener.accept().unwrap();
                let mut lines = BufReader::new(&stream).lines();
                while replies.peek().is_some()
                    && let Some(Ok(line)) = lines.next()
                {
                    kept.lock()
                        .unwrap()
                        .push(serde_json::from_str(&line).unwrap());
                    let reply = replies.next().unwrap();
                    writeln!(&stream, "{reply}").unwrap();
                }
            }
        });
        Self {
            asked,
            thread: Some(thread),
        }
    }

    /// Returns the recorded requests, once all replies were sent.
    fn asked(mut self) -> Vec<Value> {
        self.thread.take().unwrap().join().unwrap();
        self.asked.lock().unwrap().clone()
    }
}

fn ctl(folder: &Folder, args: &[&str]) -> Run {
    let args = ["ctl", "--control", "control"].iter().chain(args);
    run(folder, &args.copied().collect::<Vec<_>>())
}

/// Serves one reply to a command with `args`. Returns the finished command, and its request.
fn once(folder: &Folder, reply: Value, args: &[&str]) -> (Run, Value) {
    let daemon = Daemon::start(folder, vec![reply]);
    let run = ctl(folder, args);
    let asked = daemon.asked();
    (run, asked[0].clone())
}

fn times(count: u64, p99: f64) -> Value {
    json!({"count": count, "p50": 20.0, "p90": 80.5, "p99": p99, "max": 1234.5, "sum": 9000.0,
        "buckets": [[20_000, count]]})
}

fn vm(faults: u64, missing: u64) -> Value {
    json!({
        "id": 3, "service": "web", "pid": 77, "state": "serving", "age_ms": 61_500,
        "pages": 1000, "missing": missing, "faults": faults,
        "fault_kinds": {"stored": faults, "fill": 0, "removed": 0, "present": 0, "poisoned": 0,
            "outside": 0},
        "fault_us": times(faults, 99.9),
        "sources": {"fill": times(0, 0.0), "read": times(faults, 88.8), "cached": times(0, 0.0),
            "waited": times(0, 0.0), "none": times(0, 0.0)},
        "demand": {"copied": 10 * faults, "filled": 0, "zeroed": 0},
        "prefetch": {"copied": 7, "filled": 0, "zeroed": 0},
        "poisoned": 0, "discards": 2, "retries": 0, "bytes_read": 4096, "bytes_decoded": 16384,
        "failures": 1, "shortages": {"memory": 0, "hugepages-2048kB": 0},
    })
}

#[test]
fn services_are_added_with_whole_paths_and_removed() {
    let folder = Folder::new();
    let (added, asked) = once(
        &folder,
        json!({"ok": {}}),
        &[
            "add",
            "web",
            "--snapshot",
            "web.snap",
            "--socket",
            "/run/w",
            "--prefetch",
            "all",
            "--on-error",
            "poison",
            "--allow-uid",
            "7",
            "--threads",
            "3",
            "--patience",
            "5",
        ],
    );
    assert!(added.exits(0).text().contains("web is served"));
    let snapshot = folder.path().canonicalize().unwrap().join("web.snap");
    assert_eq!(
        asked,
        json!({"op": "add", "service": {
            "name": "web", "snapshot": snapshot, "socket": "/run/w", "prefetch": "all",
            "on_error": "poison", "allow_uid": [7], "threads": 3, "patience": 5,
            "retry_timeout": 5,
        }})
    );
    let (removed, asked) = once(&folder, json!({"ok": {}}), &["remove", "web", "--json"]);
    assert_eq!(removed.exits(0).json(), json!({"service": "web"}));
    assert_eq!(asked, json!({"op": "remove", "name": "web"}));
    let bad = json!({"error": "web.snap is damaged", "bad_snapshot": true});
    let add = ["add", "web", "--snapshot", "web.snap", "--socket", "/run/w"];
    let (refused, _) = once(&folder, bad, &add);
    refused.exits(3).says(&["web.snap is damaged"]);
    // A request that can't be right isn't sent.
    ctl(&folder, &["list"]).exits(1);
    let _daemon = Daemon::start(&folder, Vec::new());
    let listener = UnixListener::bind(folder.file("other")).unwrap();
    let args = [
        "ctl",
        "--control",
        "other",
        "add",
        "a b",
        "--snapshot",
        "s",
        "--socket",
        "s",
    ];
    run(&folder, &args).exits(1).says(&["a b", "letters"]);
    drop(listener);
}

#[test]
fn served_vms_are_listed() {
    let folder = Folder::new();
    let list = json!({
        "version": "0.1.0", "pid": 42, "worker_restarts": 2, "draining": false,
        "services": [{"serving": 1, "ended": 5, "service": {
            "name": "web", "snapshot": "/srv/web.snap", "socket": "/run/web"}}],
        "vms": [
            {"id": 3, "service": "web", "pid": 77, "state": "serving", "age_ms": 61_500},
            {"id": 2, "service": "web", "pid": 70, "state": "killed", "age_ms": 99_000,
                "reason": "page 5 is bad"},
        ],
    });
    let (run, asked) = once(&folder, json!({"ok": list}), &["list"]);
    let text = run.exits(0).text();
    for part in [
        "process 42",
        "2 worker restarts",
        "/srv/web.snap",
        "/run/web",
        "1 min 1 s",
        "page 5 is bad",
    ] {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
    assert_eq!(asked, json!({"op": "list"}));
    let (run, _) = once(&folder, json!({"ok": list}), &["list", "--json"]);
    let report = run.exits(0).json();
    assert_eq!(report["vms"], list["vms"]);
    assert_eq!(report["services"][0]["service"]["prefetch"], "working-set");
}

#[test]
fn statistics_are_shown_with_percentiles() {
    let folder = Folder::new();
    let (run, asked) = once(&folder, json!({"ok": [vm(12, 250)]}), &["stats", "3"]);
    let text = run.exits(0).text();
    for part in [
        "VM 3 (pid 77, service web)",
        "75.0 % done",
        "12 on stored pages",
        "20.0 us at p50, 80.5 p90, 99.9 p99, 1234.5 at most",
        "88.8 p99",
        "120 pages by faults",
        "4.00 KiB, decoded to 16.00 KiB",
        "2 discards",
        "1 failure,",
    ] {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
    assert!(!text.contains("waited"), "nothing has: {text}");
    assert_eq!(asked, json!({"op": "stats", "vm": 3, "buckets": false}));
    let reply = json!({"ok": [vm(12, 250)]});
    let (run, asked) = once(&folder, reply, &["stats", "--json", "--buckets"]);
    assert_eq!(run.exits(0).json()["vms"][0], vm(12, 250));
    assert_eq!(asked, json!({"op": "stats", "buckets": true}));
    let (run, _) = once(&folder, json!({"ok": []}), &["stats"]);
    assert_eq!(run.exits(0).text(), "no VM is served\n");
}

#[test]
fn vms_are_released_and_a_refusal_is_a_failure() {
    let folder = Folder::new();
    let done = json!([{"vm": 3, "done": true}]);
    let (run, asked) = once(&folder, json!({"ok": done}), &["complete", "3"]);
    assert!(run.exits(0).text().contains("VM 3"));
    assert_eq!(asked, json!({"op": "complete", "vm": 3, "all": false}));
    let half =
        json!([{"vm": 3, "done": true}, {"vm": 4, "done": false, "reason": "page 5 is bad"}]);
    let (run, asked) = once(&folder, json!({"ok": half}), &["complete", "--all"]);
    let text = run.exits(1).text();
    assert!(
        text.contains("cannot complete VM 4: page 5 is bad"),
        "{text}"
    );
    assert_eq!(asked, json!({"op": "complete", "all": true}));
    let (run, asked) = once(&folder, json!({"ok": half}), &["drain", "--json"]);
    assert_eq!(run.exits(1).json()["vms"], half);
    assert_eq!(asked, json!({"op": "drain"}));
}

#[test]
fn upgrade_replaces_the_running_program() {
    let folder = Folder::new();
    let reply = json!({"ok": {"from": "0.1.0", "to": "0.2.0"}});
    let (run, asked) = once(&folder, reply.clone(), &["upgrade", "new"]);
    assert!(run.exits(0).text().contains("upgraded from 0.1.0 to 0.2.0"));
    let program = folder.path().canonicalize().unwrap().join("new");
    assert_eq!(asked, json!({"op": "upgrade", "program": program}));
    let (_, asked) = once(&folder, reply, &["upgrade"]);
    assert_eq!(asked, json!({"op": "upgrade"}));
}

#[test]
fn top_shows_rates_and_outlives_a_worker() {
    let folder = Folder::new();
    // The second request comes over another connection, since the first one's daemon has hung up.
    let first = Daemon::start(&folder, vec![json!({"ok": [vm(10, 900)]})]);
    let control = folder.file("control");
    let top = command(["ctl", "top", "--once", "--json", "--control"])
        .arg(&control)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(first.asked(), [json!({"op": "stats", "buckets": true})]);
    let second = Daemon::start(&folder, vec![json!({"ok": [vm(30, 700)]})]);
    let frame = crate::common::finish(top).exits(0).json();
    second.asked();
    let seconds = frame["seconds"].as_f64().unwrap();
    let row = &frame["vms"][0];
    let rate = |key: &str| (row[key].as_f64().unwrap() * seconds).round();
    assert!((rate("faults") - 20.0).abs() < 0.5, "{frame}");
    assert!((rate("demand_pages") - 200.0).abs() < 0.5, "{frame}");
    assert!(rate("prefetch_pages").abs() < 0.5, "{frame}");
    assert_eq!(
        (&row["missing"], &row["failures"]),
        (&json!(700), &json!(1))
    );
    // Without a terminal, one frame of text is printed.
    let daemon = Daemon::start(
        &folder,
        vec![json!({"ok": [vm(1, 9)]}), json!({"ok": [vm(1, 9)]})],
    );
    let text = ctl(&folder, &["top"]).exits(0).text();
    daemon.asked();
    assert!(
        text.contains("1 VM, 0 faults/s") && text.contains("99.1 %"),
        "{text}"
    );
    assert!(!text.contains('\x1b'), "{text:?}");
}

#[test]
fn errors_name_the_cause_and_the_remedy() {
    let folder = Folder::new();
    ctl(&folder, &["list"]).exits(1).says(&[
        "no daemon listens on ",
        "serve --control",
        "SNAPRESTORE_CONTROL",
    ]);
    let reply = json!({"error": "no VM 9; `snaprestore ctl list` lists the VMs"});
    let (run, _) = once(&folder, reply, &["stats", "9", "--json"]);
    let failure = run.exits(1).says(&["no VM 9"]).json();
    assert_eq!(failure["exit_code"], 1);
    // The socket of an exited daemon was left behind.
    ctl(&folder, &["list"])
        .exits(1)
        .says(&["the daemon exited"]);
    let (run, _) = once(&folder, json!("hello"), &["list"]);
    run.exits(1).says(&["may be of another version"]);
    let listener = UnixListener::bind(folder.file("mute")).unwrap();
    let hang_up = std::thread::spawn(move || drop(listener.accept().unwrap()));
    run_at(&folder, "mute")
        .exits(1)
        .says(&["closed the connection"]);
    hang_up.join().unwrap();
}

/// Runs `ctl list` with the socket named by the environment variable.
fn run_at(folder: &Folder, control: &str) -> Run {
    let mut list: Command = command(["ctl", "list"]);
    Run::to_end(
        list.env("SNAPRESTORE_CONTROL", control)
            .current_dir(folder.path()),
    )
}

#[test]
fn user_without_access_gets_an_explanation() {
    if !nix::unistd::geteuid().is_root() {
        let name = "user_without_access_gets_an_explanation";
        return skipped(name, &"only root becomes another user");
    }
    let folder = Folder::new();
    let _listener = UnixListener::bind(folder.file("control")).unwrap();
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(folder.file("control"), mode).unwrap();
    as_nobody(&folder, &["ctl", "--control", "control", "list"])
        .exits(4)
        .says(&["only root and the daemon's user may"]);
}

#[test]
fn stopped_recording_is_written_or_kept() {
    let folder = Folder::new();
    folder.write("raw", &[7; 4096]);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let bytes = trace_of(&folder, "s", &[0]).to_bytes().unwrap();
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let reply = json!({"ok": {"vm": 7, "trace": digits.concat()}});
    let stop = |path| once(&folder, reply.clone(), &["record", "7", "stop", "-o", path]).0;
    stop("t").exits(0);
    assert!(folder.read("t") == bytes, "another trace was written");
    let piped = stop("-").exits(0);
    assert!(piped.out == bytes, "another trace was written");
    piped.says(&["recorded    1 page to standard output"]);
    stop("/dev/full").exits(1).says(&[
        "`snaprestore ctl record 7 stop -o FILE` fetches it again",
        "/dev/full",
        "No space left",
    ]);
    let exists = ctl(&folder, &["record", "7", "stop", "-o", "t"]);
    assert_eq!(exists.code, Some(1), "{}", exists.err);
}
