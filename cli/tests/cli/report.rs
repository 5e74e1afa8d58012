//! Pages of `report`, records of runs, and the map of `info`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use serde_json::{Value, json};
use snaprestore_fixtures::images::Mix;
use snapshot_format::{RegionSpec, WorkingSetRun, Writer, WriterOptions};

use crate::common::{Folder, noise, number, run};
use crate::layers::{base, create, write_diff};
use crate::restore::possible;
use crate::working_sets::write_trace;

mod browser;

const PAGE: usize = 4096;
/// Figures that the page shows, and `info --json` has.
const FIGURES: [&str; 13] = [
    "pages",
    "zero_pages",
    "fill_pages",
    "stored_pages",
    "duplicate_pages",
    "ancestor_pages",
    "unavailable_pages",
    "frames",
    "frame_bytes",
    "stored_bytes",
    "index_bytes",
    "logical_bytes",
    "file_bytes",
];
/// The text of a script that names of a hostile snapshot try to smuggle in.
const HOSTILE: &str = "</title></svg></script><script>document.title='owned'</script><img src=x \
                       onerror=alert(1)>\"'&lt;";

/// Writes a report and returns the page.
#[track_caller]
fn page(folder: &Folder, file: &str, options: &[&str]) -> String {
    let args = ["report", file, "-o", "report.html", "--force", "--quiet"];
    run(folder, &[&args[..], options].concat()).exits(0);
    String::from_utf8(folder.read("report.html")).unwrap()
}

/// Returns the numbers that a page shows, by their keys.
#[track_caller]
fn figures(page: &str) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for part in page.split("data-figure=\"").skip(1) {
        let (key, rest) = part.split_once('"').unwrap();
        let Some(rest) = rest.strip_prefix(" data-value=\"") else {
            continue;
        };
        let (value, rest) = rest.split_once("\">").unwrap();
        let (shown, _) = rest.split_once('<').unwrap();
        assert!(!shown.is_empty(), "{key}");
        let value: u64 = value.parse().unwrap();
        if key.ends_with("pages") {
            // The number that people read is the same.
            let digits = shown.split(' ').next().unwrap().replace(',', "");
            assert_eq!(digits, value.to_string(), "{key}");
        }
        found.insert(key.to_owned(), value);
    }
    found
}

/// Returns the JSON data of a script element.
#[track_caller]
fn data(page: &str, id: &str) -> Value {
    let begin = format!("<script type=\"application/json\" id=\"{id}\">");
    let (_, rest) = page.split_once(&begin).expect("a script element");
    let (text, _) = rest.split_once("</script>").unwrap();
    serde_json::from_str(text).unwrap()
}

/// Asserts that the figures of a page are those of `info --json`, and that its map counts the same.
#[track_caller]
fn agrees_with_info(folder: &Folder, file: &str, page: &str) {
    let info = run(folder, &["info", file, "--json"]).exits(0).json();
    let shown = figures(page);
    for key in FIGURES {
        assert_eq!(shown.get(key), Some(&number(&info, key)), "{key}");
    }
    let mut expected = info.clone();
    let lists = |_: &String, value: &mut Value| !value.is_array() && !value.is_object();
    expected.as_object_mut().unwrap().retain(lists);
    assert_eq!(data(page, "snapshot-data"), expected);
    let mut sums = [0; 8];
    let cells = data(page, "cells-data");
    let mut count = 0;
    for group in cells["groups"].as_array().unwrap() {
        for cell in group["cells"].as_array().unwrap() {
            count += 1;
            for (sum, value) in sums.iter_mut().zip(cell.as_array().unwrap()) {
                *sum += value.as_u64().unwrap();
            }
        }
    }
    assert!(count <= 4000, "{count}");
    let keys = [
        "zero_pages",
        "fill_pages",
        "stored_pages",
        "duplicate_pages",
        "ancestor_pages",
        "unavailable_pages",
    ];
    for (key, sum) in keys.into_iter().zip(sums) {
        assert_eq!(sum, number(&info, key), "{key}");
    }
    assert_eq!(sums[..6].iter().sum::<u64>(), number(&info, "pages"));
}

/// Writes a snapshot whose names are hostile.
fn write_hostile(folder: &Folder, name: &str) {
    let options = WriterOptions {
        properties: vec![(HOSTILE.replace('=', ":"), HOSTILE.to_owned())],
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(Vec::new(), options).unwrap();
    for (number, suffix) in (0..).zip(["", "--><!--", "]]>"]) {
        let region = RegionSpec {
            start: number << 30,
            name: format!("{HOSTILE}{suffix}"),
            ..RegionSpec::default()
        };
        writer.begin_region(&region).unwrap();
        writer.write_pages(&noise(20 * PAGE)).unwrap();
        writer.write_fill(700, 0).unwrap();
    }
    let set = WorkingSetRun {
        first_page: 3,
        pages: 9,
    };
    writer
        .add_working_set(&HOSTILE.replace('/', "|"), [set])
        .unwrap();
    let name_of_file = HOSTILE.replace('/', "|");
    writer.attach(&name_of_file, &mut &b"x"[..]).unwrap();
    let (bytes, _) = writer.finish().unwrap();
    folder.write(name, &bytes);
}

#[test]
fn figures_of_the_page_equal_those_of_info() {
    let folder = Folder::new();
    folder.write("raw", &Mix::new(20_000, 5).bytes());
    run(&folder, &["create", "raw", "-o", "s", "--attach", "a=raw"]).exits(0);
    agrees_with_info(&folder, "s", &page(&folder, "s", &[]));
    base(&folder);
    agrees_with_info(&folder, "base.snap", &page(&folder, "base.snap", &[]));
}

#[test]
fn page_of_a_chain_shows_its_layers() {
    let folder = Folder::new();
    let mut memory = base(&folder);
    let mut before = "base.snap".to_owned();
    for layer in 1..9 {
        write_diff(&folder, "diff", &mut memory, (2, 60 + layer, layer));
        let child = format!("{layer}.snap");
        create(&folder, "diff", &before, &child, &[]);
        before = child;
    }
    let page = page(&folder, &before, &[]);
    agrees_with_info(&folder, &before, &page);
    assert!(page.contains("id=\"view-layer\"") && page.contains("other ancestors"));
    assert!(page.contains("0: 8.snap") && page.contains("base.snap"));
    // Ancestors in another folder are found as by other commands.
    std::fs::create_dir(folder.file("bases")).unwrap();
    std::fs::rename(folder.file("base.snap"), folder.file("bases/b")).unwrap();
    let args = ["report", &before, "-o", "again.html"];
    run(&folder, &args).exits(1).says(&["ancestor", "--layers"]);
    assert!(!folder.file("again.html").exists());
    run(&folder, &[&args[..], &["--layers", "bases"]].concat()).exits(0);
}

#[test]
fn trace_decides_what_is_hot() {
    let folder = Folder::new();
    base(&folder);
    let hot = || (0..300).map(|n| n * 7);
    write_trace(&folder, "t", "base.snap", &hot().collect::<Vec<u64>>());
    let with_trace = page(&folder, "base.snap", &["--trace", "t"]);
    agrees_with_info(&folder, "base.snap", &with_trace);
    let shown = figures(&with_trace);
    assert_eq!((shown["hot_pages"], shown["present_at_start"]), (300, 7));
    for part in [
        "300 first touches in 300 ms",
        "settled",
        "id=\"ct-touches\"",
    ] {
        assert!(with_trace.contains(part), "no {part:?}");
    }
    let cells = data(&with_trace, "cells-data");
    let cells = cells["groups"][0]["cells"].as_array().unwrap();
    let pages = cells.len() as u64;
    // Each cell is one page here, and the seventh ones are hot.
    assert_eq!(pages, 2100);
    for page in [0, 1, 7, 2093, 2099] {
        let at = usize::try_from(page).unwrap();
        let expected = u64::from(page % 7 == 0 && page < 2100);
        assert_eq!(cells[at][6], expected, "{page}");
    }
    // Without a trace nothing is hot, as the snapshot has no working set.
    let without = page(&folder, "base.snap", &[]);
    assert!(!figures(&without).contains_key("hot_pages"));
    assert!(without.contains("no working set"));
}

#[test]
fn hostile_names_stay_text() {
    let folder = Folder::new();
    write_hostile(&folder, "hostile");
    let page = page(&folder, "hostile", &[]);
    assert_eq!(page.matches("<script").count(), 3);
    assert_eq!(page.matches("</script").count(), 3);
    assert!(!page.contains("<img") && !page.contains("<!--"));
    assert!(page.contains("&lt;script&gt;document.title=&#39;owned&#39;"));
    agrees_with_info(&folder, "hostile", &page);
    assert_eq!(figures(&page)["hot_pages"], 9);
    // The name of the file is as hostile as its content.
    let name = "<b onclick=x>&.snap";
    std::fs::rename(folder.file("hostile"), folder.file(name)).unwrap();
    let page = self::page(&folder, name, &[]);
    assert!(
        page.contains("<h1>&lt;b onclick=x&gt;&amp;.snap</h1>"),
        "{}",
        &page[..400]
    );
}

/// Neither a huge memory nor many regions make a page that cannot be sent.
#[test]
fn pages_about_huge_memory_are_small() {
    let folder = Folder::new();
    let raw = File::create(folder.file("raw")).unwrap();
    raw.set_len(64 << 30).unwrap();
    let content = Mix::new(512, 9).bytes();
    for piece in 0..64_u64 {
        // Pieces begin within cells.
        raw.write_all_at(&content, (piece << 30) + piece * 0x3_1000)
            .unwrap();
    }
    drop(raw);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let report = run(&folder, &["report", "s", "-o", "r.html", "--json"])
        .exits(0)
        .json();
    assert!(number(&report, "report_bytes") < 2_000_000, "{report}");
    assert!(number(&report, "cells") > 1000, "{report}");
    let html = String::from_utf8(folder.read("r.html")).unwrap();
    assert_eq!(html.len() as u64, number(&report, "report_bytes"));
    agrees_with_info(&folder, "s", &html);

    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
    let content = noise(3 * PAGE);
    for number in 0..20_000_u64 {
        let region = RegionSpec {
            start: number << 20,
            name: format!("/usr/lib/a/long/name/of/a/library/number-{number}.so"),
            ..RegionSpec::default()
        };
        writer.begin_region(&region).unwrap();
        let pages = 1 + usize::try_from(number % 3).unwrap();
        writer.write_pages(&content[..pages * PAGE]).unwrap();
    }
    let (bytes, _) = writer.finish().unwrap();
    folder.write("many", &bytes);
    let page = page(&folder, "many", &[]);
    assert!(page.len() < 2_000_000, "{}", page.len());
    assert!(page.contains("19,801 smaller regions") || page.contains("19801 smaller regions"));
    agrees_with_info(&folder, "many", &page);
}

#[test]
fn trace_and_run_of_other_memory_are_refused() {
    let folder = Folder::new();
    base(&folder);
    folder.write("other.raw", &Mix::new(600, 77).bytes());
    run(&folder, &["create", "other.raw", "-o", "other.snap"]).exits(0);
    let pages: Vec<u64> = (0..9).collect();
    write_trace(&folder, "other.trace", "other.snap", &pages);
    write_trace(&folder, "t", "base.snap", &pages);
    let trace = folder.read("t");
    folder.write("cut.trace", &trace[..trace.len() - 3]);
    let info = run(&folder, &["info", "base.snap", "--json"])
        .exits(0)
        .json();
    let digest = info["content_digest"].as_str().unwrap();
    let run_of = |version: u64, digest: &str| {
        let record = json!({ "run_version": version, "content_digest": digest });
        record.to_string()
    };
    folder.write("new.json", run_of(2, digest).as_bytes());
    folder.write("short.json", run_of(1, digest).as_bytes());
    folder.write("no.json", b"no json");
    folder.write("list.json", b"[]");
    let refused: &[(&[&str], i32, &[&str])] = &[
        (&["--trace", "other.trace"], 1, &["other.trace", digest]),
        (&["--trace", "cut.trace"], 3, &["cut.trace"]),
        (&["--trace", "none"], 1, &["none", "No such file"]),
        (&["--trace", "base.snap"], 3, &["base.snap"]),
        (
            &["--run", "new.json"],
            1,
            &["new.json", "version 2", "version 1"],
        ),
        (&["--run", "short.json"], 1, &["short.json", "--run-json"]),
        (&["--run", "no.json"], 1, &["no.json", "--run-json"]),
        (&["--run", "list.json"], 1, &["list.json", "--run-json"]),
        (&["--run", "base.raw"], 1, &["base.raw", "too large"]),
        (&["--run", "/"], 1, &["folder"]),
    ];
    for (options, code, says) in refused {
        let args = ["report", "base.snap", "-o", "r.html"];
        run(&folder, &[&args[..], options].concat())
            .exits(*code)
            .says(says);
        assert!(!folder.file("r.html").exists(), "{options:?}");
    }
    // The output must not replace what it is made of.
    for target in ["base.snap", "t"] {
        let args = ["report", "base.snap", "--trace", "t", "-f", "-o", target];
        run(&folder, &args).exits(2).says(&["would be lost"]);
    }
    folder.write("r.html", b"mine");
    let args = ["report", "base.snap", "-o", "r.html"];
    run(&folder, &args)
        .exits(1)
        .says(&["exists already", "--force"]);
    let stdout = run(&folder, &["report", "base.snap", "-o", "-"]).exits(0);
    assert!(stdout.text().ends_with("</html>\n"));
    let args = ["report", "base.snap", "-o", "-", "--json"];
    run(&folder, &args).exits(2).says(&["--json"]);
}

#[test]
fn run_of_a_restore_is_on_the_page() {
    let folder = Folder::new();
    if !possible(&folder, "run_of_a_restore_is_on_the_page") {
        return;
    }
    base(&folder);
    let args = ["restore", "base.snap", "--touch", "random", "--json"];
    for prefetch in ["off", "all"] {
        let options = ["--prefetch", prefetch, "--run-json", "run.json"];
        let report = run(&folder, &[&args[..], &options].concat())
            .exits(0)
            .json();
        let record: Value = serde_json::from_slice(&folder.read("run.json")).unwrap();
        let info = run(&folder, &["info", "base.snap", "--json"])
            .exits(0)
            .json();
        for key in ["snapshot_id", "content_digest"] {
            assert_eq!(record[key], info[key]);
        }
        let stats = &record["statistics"];
        for key in ["faults", "bytes_read", "bytes_decoded"] {
            assert_eq!(stats[key], report[key], "{key}");
        }
        assert_eq!(stats["fault_us"]["p99"], report["fault_us"]["p99"]);
        let pages = |reason: &str| {
            let by_kind = stats[reason].as_object().unwrap().values();
            by_kind.map(|count| count.as_u64().unwrap()).sum::<u64>()
        };
        assert_eq!(pages("prefetch"), number(&report, "prefetched_pages"));
        let timeline = &record["timeline"];
        let sum = |key: &str| {
            let list = timeline[key].as_array().unwrap();
            assert!(list.len() <= 512, "{}", list.len());
            list.iter()
                .map(|count| count.as_u64().unwrap())
                .sum::<u64>()
        };
        assert_eq!(sum("faults"), number(stats, "faults"));
        assert_eq!(sum("demand_pages"), pages("demand"));
        assert_eq!(sum("prefetch_pages"), pages("prefetch"));
        assert_eq!(sum("bytes_read"), number(stats, "bytes_read"));

        let page = page(&folder, "base.snap", &["--run", "run.json"]);
        agrees_with_info(&folder, "base.snap", &page);
        let shown = figures(&page);
        for key in ["faults", "bytes_read", "bytes_decoded"] {
            assert_eq!(shown[key], number(&report, key), "{key}");
        }
        assert_eq!(shown["demand_pages"], pages("demand"));
        assert_eq!(shown["prefetch_pages"], pages("prefetch"));
        assert!(page.contains("restore of base.snap") && page.contains("id=\"ct-pages\""));
    }
    // Another file with the same memory: the page says so.
    run(&folder, &["create", "base.raw", "-o", "again.snap"]).exits(0);
    let page = page(&folder, "again.snap", &["--run", "run.json"]);
    assert!(page.contains("from another file with the same memory"));
    write_diff(&folder, "diff", &mut folder.read("base.raw"), (1, 500, 0));
    create(&folder, "diff", "base.snap", "child.snap", &[]);
    let args = ["report", "child.snap", "-o", "r.html", "--run", "run.json"];
    run(&folder, &args)
        .exits(1)
        .says(&["run.json", "of other memory", "content digest"]);
}

#[test]
fn map_of_info_is_plain_text_in_a_pipe() {
    let folder = Folder::new();
    folder.write("raw", &Mix::new(40_000, 5).bytes());
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let text = run(&folder, &["info", "s", "--map"]).exits(0).text();
    let (_, map) = text.split_once("\nmap ").expect("a map");
    assert!(map.contains("# stored") && map.contains(". zero"), "{map}");
    let lines: Vec<&str> = map
        .lines()
        .skip(2)
        .filter(|line| line.contains("0x"))
        .collect();
    assert!((4..=16).contains(&lines.len()), "{map}");
    assert!(
        map.is_ascii() && map.lines().all(|line| line.len() <= 80),
        "{map}"
    );
    let cells: String = lines.iter().map(|line| &line[18..]).collect();
    // A cell has 64 pages, as 40,000 pages must fit 16 lines of 62 cells.
    assert_eq!(cells.len(), 40_000_usize.div_ceil(64));
    assert!(cells.contains('.') && cells.contains('#'), "{map}");
    run(&folder, &["info", "s", "--map", "--json"]).exits(2);

    write_hostile(&folder, "hostile");
    let text = run(&folder, &["info", "hostile", "--map"]).exits(0).text();
    assert!(text.contains("@ working set"), "{text}");
    let mut memory = base(&folder);
    write_diff(&folder, "diff", &mut memory, (1, 40, 3));
    create(&folder, "diff", "base.snap", "1.snap", &[]);
    let text = run(&folder, &["info", "1.snap", "--map"]).exits(0).text();
    assert!(text.contains("% in ancestors"), "{text}");

    // A long legend takes two lines.
    write_trace(&folder, "t", "1.snap", &(5..30).collect::<Vec<u64>>());
    let optimize = ["optimize", "1.snap", "--trace", "t", "-o", "1.snap"];
    run(&folder, &optimize).exits(0);
    let text = run(&folder, &["info", "1.snap", "--map"]).exits(0).text();
    let (_, map) = text.split_once("\nmap ").expect("a map");
    for kind in ["% in ancestors", "@ working set", "+ partly working set"] {
        assert!(map.contains(kind), "{map}");
    }
    assert!(map.lines().all(|line| line.len() <= 80), "{map}");
}
