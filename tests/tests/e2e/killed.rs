//! `create` killed at random moments: the old target or the new one, never anything else.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use snaprestore_tests::program::{done, snaprestore};
use snaprestore_tests::real::{guest, guest_piece};

const ROUNDS: u32 = 50;

/// Returns the unexpected files in the target's folder.
fn strangers(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| {
            name != "s" && !(name.starts_with(".snaprestore-") && name.ends_with(".partial"))
        })
        .collect()
}

#[test]
fn a_killed_create_leaves_the_old_target_or_the_new_one() {
    let Some(image) = guest("a_killed_create_leaves_the_old_target_or_the_new_one") else {
        return;
    };
    let sources = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (source, other) = (sources.path().join("piece"), sources.path().join("other"));
    guest_piece(&image, 48 << 20, &source);
    guest_piece(&image, 2 << 20, &other);
    let target = folder.path().join("s");
    let create = |from: &Path| {
        let mut command = snaprestore(["create", "--force", "--quiet", "--output"]);
        command.arg(&target).arg(from);
        command
    };
    // The target's content before each round, made once.
    assert!(create(&other).status().unwrap().success());
    let old = std::fs::read(&target).unwrap();
    let began = Instant::now();
    assert!(create(&source).status().unwrap().success());
    let whole = began.elapsed();

    let mut rng = SmallRng::seed_from_u64(11);
    let (mut stayed, mut replaced) = (0, 0);
    for round in 0..ROUNDS {
        let with_old = round % 2 == 0;
        if with_old {
            std::fs::write(&target, &old).unwrap();
        } else {
            std::fs::remove_file(&target).ok();
        }
        let mut child = create(&source)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The range extends a little beyond the end, because the last moments are the interesting
        // ones.
        let micros = u64::try_from(whole.as_micros()).unwrap();
        std::thread::sleep(Duration::from_micros(rng.random_range(0..micros * 11 / 10)));
        child.kill().unwrap();
        child.wait().unwrap();
        match std::fs::read(&target) {
            Ok(bytes) if with_old && bytes == old => stayed += 1,
            Err(_) if !with_old => stayed += 1,
            Ok(_) => {
                let report = done(["verify".as_ref(), target.as_os_str()]);
                assert_eq!(report["ok"], true, "round {round}");
                replaced += 1;
            }
            Err(error) => panic!("round {round}: the old target is gone: {error}"),
        }
        assert_eq!(strangers(folder.path()), [""; 0], "round {round}");
    }
    assert!(stayed > 5, "{stayed} stayed, {replaced} replaced");
}
