//! Operations on a daemon: query, add, remove, release, upgrade, drain.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{self, Run, snaprestore};

use crate::scene::{HANG_TIMEOUT, PAGES, Scene, endings, within};

/// Runs `ctl`, asserts that it succeeds, and returns its output.
fn ctl(scene: &Scene, args: &[&str]) -> Value {
    Run::to_end(&mut command(scene, args)).exits(0).json()
}

fn command(scene: &Scene, args: &[&str]) -> std::process::Command {
    let mut command = snaprestore(["ctl", "--json"]);
    command.env("SNAPRESTORE_CONTROL", scene.folder.path().join("control"));
    command.args(args);
    command
}

fn serve(scene: &mut Scene) {
    let folder = scene.folder.path().to_owned();
    let path = |name: &str| folder.join(name).display().to_string();
    let (control, metrics) = (path("control"), path("metrics"));
    let options = [
        "--prefetch",
        "off",
        "--control",
        &control,
        "--metrics",
        &metrics,
    ];
    scene.serve(&options);
}

fn scrape(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).expect("cannot connect");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\n\r\n")
        .expect("cannot reach the process");
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .expect("cannot reach the daemon");
    text
}

/// Returns a number of the metrics, summed over all services.
fn metric(scene: &Scene, name: &str) -> u64 {
    let text = scrape(&scene.folder.path().join("metrics"));
    let lines = text.lines().filter(|line| line.starts_with(name));
    let values: Vec<u64> = lines
        .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
        .collect();
    assert!(!values.is_empty(), "no {name} in {text}");
    values.iter().sum()
}

#[test]
fn vms_of_one_snapshot_share_decoded_frames() {
    let mut scene = Scene::new(Shares::MIXED);
    serve(&mut scene);
    let mut decoded = Vec::new();
    for number in 0..4 {
        let run = Run::to_end(&mut scene.vmm(&[])).exits(0);
        assert_eq!(run.out, format!("{PAGES} pages right\n").as_bytes());
        scene.wait_for("pages installed", number + 1);
        decoded.push(metric(&scene, "snaprestore_decoded_bytes_total"));
    }
    // The first VM may have been the only one; the second shares the frames that it decodes.
    assert!(decoded[0] < decoded[1], "{decoded:?}");
    assert_eq!(decoded[1..], [decoded[1]; 3]);
    assert!(metric(&scene, "snaprestore_frame_cache_hits_total") > 0);
    assert!(metric(&scene, "snaprestore_frame_cache_frames") > 0);
    assert_eq!(endings(&scene.stop()).len(), 4);
}

/// The VMs of two services touch the same tenth of their memory, one after the other. The snapshots
/// are children of one base.
#[test]
fn services_of_one_base_share_decoded_frames() {
    let mut scene = Scene::new(Shares::MIXED);
    let (base, base_raw) = (scene.snapshot.clone(), scene.raw().to_owned());
    scene.branch("one", (0..PAGES).step_by(100));
    serve(&mut scene);
    // The second child is another one of the base.
    let one_raw = scene.raw().to_owned();
    scene.base_on(&base, &base_raw);
    scene.branch("two", (50..PAGES).step_by(100));
    let path = |name: &str| scene.path(name).display().to_string();
    for (name, snapshot) in [("two", &scene.snapshot), ("base", &base)] {
        let (snapshot, socket) = (snapshot.display().to_string(), path(&format!("at-{name}")));
        let options = [
            "--prefetch",
            "off",
            "--snapshot",
            &snapshot,
            "--socket",
            &socket,
        ];
        ctl(&scene, &[&["add", name][..], &options].concat());
    }
    let list = ctl(&scene, &["list"]);
    let layers: Vec<_> = (0..3)
        .map(|n| list["services"][n]["layers"].clone())
        .collect();
    assert_eq!(layers, [2, 2, 1], "{list}");

    let tenth = (PAGES / 10).to_string();
    let only = ["--only", &tenth];
    let mut decoded = Vec::new();
    for (number, mut vmm) in [
        scene.vmm_of(&one_raw, &only),
        scene.vmm_at(&scene.path("at-two"), &only),
        scene.vmm_to(&scene.path("at-base"), &base_raw, &only),
    ]
    .into_iter()
    .enumerate()
    {
        let run = Run::to_end(&mut vmm).exits(0);
        assert_eq!(run.out, format!("{tenth} pages right\n").as_bytes());
        scene.wait_for("pages installed", number + 1);
        decoded.push(metric(&scene, "snaprestore_decoded_bytes_total"));
    }
    let [one, two, all] = decoded[..] else {
        panic!("{decoded:?}");
    };
    assert!(two * 100 <= one * 115, "{decoded:?}");
    // The base is a service, too, and its file is open already.
    assert!(all * 100 <= one * 115, "{decoded:?}");
    assert_eq!(endings(&scene.stop()), ["exited"; 3]);
}

#[test]
fn operator_lists_and_completes_vms() {
    let mut scene = Scene::new(Shares::MIXED);
    serve(&mut scene);
    let mut vmm = scene.vmm(&["--hold"]).spawn().expect("cannot start a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("no pipe to the child")).lines();
    assert_eq!(
        said.next()
            .expect("no line was written")
            .expect("cannot read the file"),
        "right so far"
    );
    let list = ctl(&scene, &["list"]);
    assert_eq!(list["services"][0]["service"]["name"], "default");
    assert_eq!(list["vms"][0]["state"], "complete", "{list}");
    drop(vmm.stdin.take());
    assert!(vmm.wait().expect("cannot wait for the process").success());

    let mut vmm = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    scene.wait_for("served", 2);
    let stats = ctl(&scene, &["stats"]);
    let stats = &stats["vms"][0];
    assert_eq!(
        (&stats["state"], &stats["missing"]),
        (&"serving".into(), &PAGES.into()),
        "{stats}"
    );
    let metrics = scrape(&scene.folder.path().join("metrics"));
    assert!(metrics.starts_with("HTTP/1.1 200 OK"), "{metrics}");
    let of_one = "snaprestore_vms{service=\"default\",state=\"serving\"} 1\n";
    assert!(metrics.contains(of_one), "{metrics}");

    // Another program file of the same version takes over while a VM is being served.
    let copy = scene.folder.path().join("copy");
    fs::copy(program::program(), &copy).expect("cannot copy the program");
    let program = copy.display().to_string();
    let upgraded = ctl(&scene, &["upgrade", &program]);
    assert_eq!(upgraded["from"], upgraded["to"]);
    scene.wait_for("upgraded to a worker", 1);
    // A program that can't take over changes nothing.
    let run = Run::to_end(&mut command(&scene, &["upgrade", "/bin/false"]));
    assert_ne!(run.code, Some(0));
    run.says(&["the old worker keeps serving"]);

    scene.wait_for("served", 3);
    let list = ctl(&scene, &["list"]);
    let vms = list["vms"].as_array().expect("report has no VMs");
    let served = vms.iter().find(|vm| vm["state"] == "serving");
    let id = served.expect("cannot start a VM")["id"].to_string();
    // Repeated, because the first upgrade has only just completed.
    for _ in 0..2 {
        let done = ctl(&scene, &["complete", &id]);
        assert_eq!(done["vms"][0]["done"], true, "{done}");
    }
    let run = Run::to_end(&mut command(&scene, &["complete", "99"])).exits(1);
    run.says(&["no VM 99"]);
    // A new worker knows it as well.
    kill(scene.worker().expect("no worker runs"), Signal::SIGKILL)
        .expect("cannot kill the process");
    scene.wait_for("started a new one", 1);
    let done = ctl(&scene, &["complete", &id]);
    assert_eq!(done["vms"][0]["done"], true, "{done}");
    drop(vmm.stdin.take());
    let run = Run::finish(vmm).exits(0);
    assert!(String::from_utf8_lossy(&run.out).ends_with("pages right\n"));
    assert_eq!(endings(&scene.stop()), ["exited"; 2]);
}

/// Each VM is counted once, however it ended and whichever process decided it, and the counts
/// survive a change of the worker.
#[test]
fn metrics_count_each_ended_vm_once() {
    let mut scene = Scene::new(Shares::MIXED);
    serve(&mut scene);
    let misfit = scene.folder.path().join("misfit");
    fs::write(&misfit, vec![0; 7 * 4096]).expect("cannot write the file");
    for _ in 0..2 {
        let _ = Run::to_end(&mut scene.vmm(&["--discard"])).exits(0);
        let _ = Run::to_end(&mut scene.vmm(&["--only", "10"])).exits(0);
        let _ = Run::to_end(&mut scene.vmm(&["--send", "half", "--hang-up"])).exits(0);
        let run = Run::to_end(&mut scene.vmm_of(&misfit, &[]));
        assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    }
    let told = |scene: &Scene| {
        let text = scrape(&scene.folder.path().join("metrics"));
        let of = |ending: &str| {
            let line =
                format!("snaprestore_vms_ended_total{{service=\"default\",ending=\"{ending}\"}} ");
            let value = text.lines().find_map(|other| other.strip_prefix(&line));
            value
                .expect(&text)
                .parse::<u64>()
                .expect("number out of range")
        };
        [of("complete") + of("exited"), of("killed"), of("refused")]
    };
    let expected = [4, 0, 4];
    assert!(
        within(HANG_TIMEOUT, || told(&scene) == expected),
        "{:?}",
        told(&scene)
    );
    kill(scene.worker().expect("no worker runs"), Signal::SIGKILL)
        .expect("cannot kill the process");
    scene.wait_for("started a new one", 1);
    assert_eq!(told(&scene), expected);
    let list = ctl(&scene, &["list"]);
    assert_eq!(list["services"][0]["ended"], 8, "{list}");
    assert_eq!(list["vms"].as_array().expect("VMs").len(), 6, "{list}");
    kill(scene.supervisor(), Signal::SIGTERM).expect("asked");
    let summary = scene.exits(0);
    let counts = (&summary["served"], &summary["refused"]);
    assert_eq!(counts, (&4.into(), &4.into()), "{summary}");
    assert_eq!(summary["vms"].as_array().expect("VMs").len(), 8);
}

/// Each VM leaves a file with the statistics of its session, which `report` reads.
#[test]
fn ended_vms_leave_records_of_their_runs() {
    let mut scene = Scene::new(Shares::MIXED);
    let runs = scene.path("runs");
    let folder = runs.display().to_string();
    let mut refused = scene.daemon(&["--run-json", &folder]);
    Run::to_end(&mut refused)
        .exits(1)
        .says(&["runs", "No such file"]);
    fs::create_dir(&runs).expect("cannot create the folder");
    scene.serve(&["--prefetch", "off", "--run-json", &folder]);
    for number in 1..=2 {
        let run = Run::to_end(&mut scene.vmm(&[])).exits(0);
        assert_eq!(run.out, format!("{PAGES} pages right\n").as_bytes());
        scene.wait_for("pages installed", number);
    }
    kill(scene.supervisor(), Signal::SIGTERM).expect("asked");
    let summary = scene.exits(0);
    let entries = fs::read_dir(&runs).expect("cannot list the folder");
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 2, "{files:?}");
    for ((number, file), vm) in (1..)
        .zip(&files)
        .zip(summary["vms"].as_array().expect("VMs"))
    {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        assert!(name.starts_with(&format!("default-{number}-")), "{name}");
        let text = fs::read(file).expect("cannot read the file");
        let record: Value = serde_json::from_slice(&text).expect("no JSON");
        let faults = &record["statistics"]["faults"];
        assert_eq!(*faults, vm["faults"], "{record}");
        let timeline = record["timeline"]["faults"].as_array().expect("a list");
        let sum: u64 = timeline.iter().map(|count| count.as_u64().unwrap()).sum();
        assert_eq!(*faults, sum, "{record}");
        let buckets = record["statistics"]["fault_us"]["buckets"].as_array();
        assert!(!buckets.expect("a histogram").is_empty(), "{record}");
        let page = scene.path("report.html");
        let mut report = snaprestore(["report", "--force"]);
        report.arg(&scene.snapshot).arg("--run").arg(file);
        report.arg("--output").arg(&page);
        let _ = Run::to_end(&mut report).exits(0);
        let page = fs::read_to_string(page).expect("cannot read the file");
        assert!(page.contains(&format!("VM {number} (pid ")), "{record}");
    }
}

/// An older program does not know the options that came later.
#[test]
fn upgrade_to_a_program_with_fewer_options_succeeds() {
    let mut scene = Scene::new(Shares::MIXED);
    let files = scene.path("files");
    fs::create_dir(&files).expect("cannot create the folder");
    let (folder, control) = (files.display().to_string(), scene.path("control"));
    let control = control.display().to_string();
    let options = ["--control", &control, "--run-json", &folder];
    scene.serve(&[&options[..], &["--record", &folder]].concat());
    let older = scene.path("older");
    let real = program::program().display();
    let script = format!(
        "#!/bin/sh\nfor option; do case $option in\n\
         worker | --log-format | text | --frame-cache | 64 | --confine) ;;\n\
         *) exit 2 ;;\nesac; done\nexec {real} \"$@\"\n"
    );
    fs::write(&older, script).expect("cannot write the script");
    fs::set_permissions(&older, fs::Permissions::from_mode(0o755)).expect("cannot change the mode");
    let _ = ctl(&scene, &["upgrade", &older.display().to_string()]);
    scene.wait_for("upgraded to a worker", 1);
    let _ = Run::to_end(&mut scene.vmm(&["--only", "100"])).exits(0);
    scene.wait_for("recorded 100 touches to ", 1);
    assert_eq!(endings(&scene.stop()), ["exited"]);
    // This one knows the settings that come with the services.
    let entries = fs::read_dir(&files).expect("cannot list the folder");
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut kinds: Vec<_> = names
        .filter_map(|name| name.split_once('.').map(|(_, kind)| kind.to_owned()))
        .collect();
    kinds.sort();
    assert_eq!(kinds, ["run.json", "trace"]);
}

#[test]
fn services_are_added_removed_and_drained() {
    let mut scene = Scene::new(Shares::MIXED);
    serve(&mut scene);
    let folder = scene.folder.path().to_owned();
    let path = |name: &str| folder.join(name).display().to_string();
    let (snapshot, second) = (scene.snapshot.display().to_string(), path("second"));
    let add = [
        "add",
        "second",
        "--snapshot",
        &snapshot,
        "--socket",
        &second,
    ];
    let _ = ctl(&scene, &add);
    let run = Run::to_end(&mut command(&scene, &add));
    assert_ne!(run.code, Some(0));
    run.says(&["already"]);
    // As by every command, a file that is no usable snapshot is told apart from other failures.
    let (cut, absent, third) = (path("cut"), path("absent"), path("third"));
    let whole = fs::read(&scene.snapshot).expect("read");
    fs::write(&cut, &whole[..whole.len() / 2]).expect("written");
    for (file, code) in [(&cut, 3), (&absent, 1)] {
        let add = ["add", "third", "--snapshot", file, "--socket", &third];
        Run::to_end(&mut command(&scene, &add))
            .exits(code)
            .says(&[file]);
    }
    assert!(!Path::new(&third).exists(), "the socket is left");
    let mut vmm = scene
        .vmm_at(Path::new(&second), &["--wait"])
        .spawn()
        .expect("cannot start a VMM");
    scene.wait_for("served", 1);
    let _ = ctl(&scene, &["remove", "second"]);
    assert!(!Path::new(&second).exists(), "the socket is left");
    let run = Run::to_end(&mut command(&scene, &["remove", "second"]));
    assert_ne!(run.code, Some(0));
    // The VM is still served, and then released.
    let drained = ctl(&scene, &["drain"]);
    assert_eq!(drained["vms"][0]["done"], true, "{drained}");
    drop(vmm.stdin.take());
    let run = Run::finish(vmm).exits(0);
    assert!(String::from_utf8_lossy(&run.out).ends_with("pages right\n"));
    assert_eq!(endings(&scene.ended()), ["exited"]);
}
