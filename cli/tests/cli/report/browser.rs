//! Pages of `report` in Chromium.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use snaprestore_fixtures::host::{ensure_program, skipped};

use super::{FIGURES, data, page, write_hostile, write_trace};
use crate::common::{Folder, number, run};
use crate::layers::{base, create, write_diff};

/// Time limit for one start of the browser, which takes a second or two.
const TIMEOUT: &str = "120";

/// A script that uses the page as people do, and leaves what it saw in attributes of the body.
const PROBE: &str = r##"<script>
addEventListener("load", () => {
  const body = document.body.dataset, map = document.getElementById("map");
  body.scripts = document.scripts.length;
  body.title = document.title;
  body.width = document.documentElement.scrollWidth;
  body.inner = innerWidth;
  body.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const cell = () => document.getElementById("cell").textContent;
  const press = (key) => map.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  map.focus();
  body.first = cell();
  press("ArrowRight");
  body.second = cell();
  press("End");
  press("ArrowRight");
  press("ArrowLeft");
  body.last = cell();
  const shown = (view) => {
    document.getElementById("view-" + view)?.click();
    return [...document.querySelectorAll("#map g.v")].filter((g) => g.getBoundingClientRect().width > 0)
      .map((g) => g.classList[1]).filter((name, i, all) => all.indexOf(name) === i).join();
  };
  body.views = ["ratio", "layer", "hot", "kind"].map(shown).join(" ");
  body.focusable = [...document.querySelectorAll("a, input, summary, [tabindex]")].every((e) => e.tabIndex >= 0);
  body.described = [...document.querySelectorAll("svg[role=img]")].every((svg) =>
    svg.getAttribute("aria-labelledby").split(" ").every((id) => document.getElementById(id)?.textContent));
  const outside = performance.getEntriesByType("resource").map((entry) => entry.name);
  body.loaded = outside.join(" ");
});
</script></body>"##;

/// A browser, and the folder for what it writes.
struct Browser {
    program: PathBuf,
    folder: Folder,
}

/// Output of one start.
struct Seen {
    dom: String,
    log: String,
}

impl Browser {
    /// Returns Chromium, which is installed if it is missing; reports if that is not possible.
    fn find(test: &str) -> Option<Self> {
        match ensure_program("chromium", "chromium") {
            Ok(program) => Some(Self {
                program,
                folder: Folder::new(),
            }),
            Err(why) => {
                skipped(test, &why);
                None
            }
        }
    }

    fn start(&self, page: &Path, options: &[String]) -> Seen {
        let profile = tempfile::tempdir_in(self.folder.path()).unwrap();
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", TIMEOUT])
            .arg(&self.program)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
            ])
            .args(["--no-first-run", "--disable-background-networking"])
            .args(["--disable-component-update", "--disable-sync"])
            .args(["--disable-dev-shm-usage", "--hide-scrollbars"])
            .args(["--enable-logging=stderr", "--v=0"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .args(options)
            .arg(format!("file://{}", page.display()))
            .env("HOME", self.folder.path())
            .stdin(Stdio::null());
        let output = command.output().expect("cannot start the browser");
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{}\n{log}", output.status);
        Seen {
            dom: String::from_utf8_lossy(&output.stdout).into_owned(),
            log,
        }
    }

    /// Returns the document after its scripts, with the probe's attributes, at this width.
    #[track_caller]
    fn probe(&self, html: &str, width: u32, options: &[&str]) -> Seen {
        let probed = html.replace("</body>", PROBE);
        assert_ne!(probed, html);
        let page = self.folder.file("probe.html");
        fs::write(&page, probed).unwrap();
        let mut all = vec![
            format!("--window-size={width},1000"),
            "--dump-dom".to_owned(),
        ];
        all.extend(options.iter().map(|&option| option.to_owned()));
        let seen = self.start(&page, &all);
        // Chromium logs console messages and policy violations with this word.
        let console: Vec<_> = seen
            .log
            .lines()
            .filter(|line| line.contains("CONSOLE"))
            .collect();
        assert!(console.is_empty(), "{console:#?}");
        seen
    }

    /// Returns a picture of a page, as a PNG file.
    fn picture(&self, html: &str, width: u32, options: &[&str]) -> Vec<u8> {
        let (page, png) = (self.folder.file("page.html"), self.folder.file("page.png"));
        fs::write(&page, html).unwrap();
        let mut all = vec![
            format!("--window-size={width},1600"),
            format!("--screenshot={}", png.display()),
        ];
        all.extend(options.iter().map(|&option| option.to_owned()));
        self.start(&page, &all);
        let bytes = fs::read(&png).expect("no picture");
        fs::remove_file(png).unwrap();
        bytes
    }
}

impl Seen {
    /// Returns what the probe saw.
    #[track_caller]
    fn attribute(&self, name: &str) -> &str {
        let (_, body) = self.dom.split_once("<body").expect("a body");
        let (body, _) = body.split_once('>').unwrap();
        let (_, value) = body
            .split_once(&format!("data-{name}=\""))
            .unwrap_or_else(|| panic!("no {name} in {body}"));
        value.split_once('"').unwrap().0
    }
}

const DARK: &str = "--blink-settings=preferredColorScheme=0";
const LIGHT: &str = "--blink-settings=preferredColorScheme=1";

/// The page of a chain with a trace renders at both widths and in both colour schemes, can be used
/// by keyboard, loads nothing, and shows the figures of `info --json`.
#[test]
fn page_works_in_a_browser() {
    let Some(browser) = Browser::find("page_works_in_a_browser") else {
        return;
    };
    let folder = Folder::new();
    let mut memory = base(&folder);
    write_diff(&folder, "diff", &mut memory, (2, 60, 1));
    create(&folder, "diff", "base.snap", "1.snap", &[]);
    let pages: Vec<u64> = (0..500).map(|n| n * 3).collect();
    write_trace(&folder, "t", "1.snap", &pages);
    let html = page(&folder, "1.snap", &["--trace", "t"]);
    let info = run(&folder, &["info", "1.snap", "--json"]).exits(0).json();
    for (width, scheme) in [(1280, LIGHT), (400, DARK)] {
        let seen = browser.probe(&html, width, &[scheme]);
        assert_eq!(seen.attribute("scripts"), "4");
        assert_eq!(seen.attribute("dark"), (scheme == DARK).to_string());
        // Nothing is wider than the window.
        assert_eq!(seen.attribute("width"), seen.attribute("inner"));
        assert_eq!(seen.attribute("views"), "v-ratio v-layer v-hot v-kind");
        assert_eq!(
            (seen.attribute("focusable"), seen.attribute("described")),
            ("true", "true")
        );
        assert_eq!(seen.attribute("loaded"), "");
        let cells = data(&html, "cells-data");
        let cell_bytes = number(&cells, "cell_pages") * 4096;
        let first = seen.attribute("first");
        assert!(
            first.contains(&format!("0x0\u{2013}{cell_bytes:#x}")),
            "{first}"
        );
        let second = seen.attribute("second");
        assert!(
            second.contains(&format!("{cell_bytes:#x}\u{2013}")),
            "{second}"
        );
        let last = seen.attribute("last");
        assert!(last.contains(": 1 pages"), "{last}");
        let shown = super::figures(&seen.dom);
        for key in FIGURES {
            assert_eq!(shown.get(key), Some(&number(&info, key)), "{key}");
        }
        let embedded: Value = data(&seen.dom, "snapshot-data");
        assert_eq!(embedded["content_digest"], info["content_digest"]);
    }
    let blank = "<!DOCTYPE html><title>blank</title><body></body>";
    let blank = browser.picture(blank, 1280, &[]).len();
    let light = browser.picture(&html, 1280, &[LIGHT]);
    let dark = browser.picture(&html, 1280, &[DARK]);
    let narrow = browser.picture(&html, 400, &[LIGHT]);
    assert!(light != dark);
    for picture in [light, dark, narrow] {
        assert!(picture.len() > 4 * blank, "{} and {blank}", picture.len());
    }
}

#[test]
fn hostile_names_run_nothing_in_a_browser() {
    let Some(browser) = Browser::find("hostile_names_run_nothing_in_a_browser") else {
        return;
    };
    let folder = Folder::new();
    write_hostile(&folder, "hostile");
    let html = page(&folder, "hostile", &[]);
    let seen = browser.probe(&html, 400, &[]);
    assert_eq!(seen.attribute("scripts"), "4");
    assert_eq!(seen.attribute("title"), "Snapshot report: hostile");
    assert_eq!(seen.attribute("width"), seen.attribute("inner"));
    assert!(!seen.dom.contains("<img"));
}
