//! Tests of scrapes.

use snaprestore_engine::stats::{FaultKinds, FaultSources, PageCounts};

use super::*;
use crate::api::types::VmStatus;

fn vm(service: &str, state: VmState) -> VmStats {
    VmStats {
        vm: VmStatus {
            id: 1,
            service: service.into(),
            pid: 7,
            state,
            reason: None,
            age_ms: 0,
        },
        session: Stats {
            pages: 1000,
            missing: 400,
            faults: 7,
            fault_kinds: FaultKinds {
                stored: 5,
                fill: 2,
                ..FaultKinds::default()
            },
            sources: FaultSources {
                // A little more than 5 us, so not in the bucket that ends there.
                read: Durations::new(
                    vec![(4_900, 2), (5_100, 2), (9_000_000_000, 1)],
                    Duration::from_secs(9),
                    Duration::from_secs(9),
                ),
                ..FaultSources::default()
            },
            demand: PageCounts {
                copied: 40,
                filled: 2,
                zeroed: 1,
            },
            bytes_read: 4096,
            ..Stats::default()
        },
    }
}

fn daemon() -> DaemonStats {
    DaemonStats {
        worker_restarts: 3,
        ended: ["web", "idle"]
            .map(|name| (name.into(), BTreeMap::new()))
            .into(),
        ..DaemonStats::default()
    }
}

#[track_caller]
fn has(text: &str, lines: &[&str]) {
    for line in lines {
        assert!(text.lines().any(|l| l == *line), "no {line:?} in:\n{text}");
    }
}

#[test]
fn vms_of_a_service_are_added_up() {
    let totals = Totals::default();
    let live = [vm("web", VmState::Serving), vm("web", VmState::Completing)];
    let text = totals.render(&live, &daemon());
    has(
        &text,
        &[
            "snaprestore_faults_total{service=\"web\",kind=\"stored\"} 10",
            "snaprestore_faults_total{service=\"web\",kind=\"outside\"} 0",
            "snaprestore_faults_total{service=\"idle\",kind=\"stored\"} 0",
            "snaprestore_demand_pages_total{service=\"web\",content=\"frame\"} 80",
            "snaprestore_read_bytes_total{service=\"web\"} 8192",
            "snaprestore_vms{service=\"web\",state=\"serving\"} 1",
            "snaprestore_vms{service=\"web\",state=\"completing\"} 1",
            "snaprestore_vms_ended_total{service=\"web\",ending=\"killed\"} 0",
            "snaprestore_missing_pages{service=\"web\"} 800",
            "snaprestore_worker_restarts_total 3",
            "snaprestore_draining 0",
            concat!(
                "snaprestore_build_info{version=\"",
                env!("CARGO_PKG_VERSION"),
                "\"} 1"
            ),
            "# EOF",
        ],
    );
}

#[test]
fn buckets_hold_durations_up_to_their_bound() {
    let text = Totals::default().render(&[vm("web", VmState::Serving)], &daemon());
    let bucket = |le: &str, count: u64| {
        format!(
            "snaprestore_fault_seconds_bucket{{le=\"{le}\",service=\"web\",source=\"read\"}} {count}"
        )
    };
    let lines = [
        bucket("0.000005", 2),
        bucket("0.00001", 4),
        bucket("5.0", 4),
        bucket("+Inf", 5),
        "snaprestore_fault_seconds_count{service=\"web\",source=\"read\"} 5".to_owned(),
        "snaprestore_fault_seconds_sum{service=\"web\",source=\"read\"} 9.0".to_owned(),
    ];
    has(&text, &lines.each_ref().map(String::as_str));
}

#[test]
fn counters_keep_ended_vms_and_gauges_drop_them() {
    let totals = Totals::default();
    totals.add(&vm("web", VmState::Exited));
    totals.add(&vm("web", VmState::Killed));
    let mut daemon = daemon();
    let ended = [(VmState::Exited, 1), (VmState::Killed, 1)];
    daemon.ended.insert("web".into(), ended.into());
    let text = totals.render(&[vm("web", VmState::Serving)], &daemon);
    has(
        &text,
        &[
            "snaprestore_faults_total{service=\"web\",kind=\"stored\"} 15",
            "snaprestore_vms_ended_total{service=\"web\",ending=\"exited\"} 1",
            "snaprestore_vms_ended_total{service=\"web\",ending=\"killed\"} 1",
            "snaprestore_vms{service=\"web\",state=\"serving\"} 1",
            "snaprestore_pages{service=\"web\"} 1000",
            "snaprestore_missing_pages{service=\"web\"} 400",
            "snaprestore_fault_seconds_count{service=\"web\",source=\"read\"} 15",
        ],
    );
    // Rendering doesn't change the totals.
    let again = totals.render(&[vm("web", VmState::Serving)], &daemon);
    assert_eq!(text, again);
    totals.forget("web");
    let text = totals.render(&[], &DaemonStats::default());
    assert!(!text.contains("web"), "{text}");
}

#[test]
fn frame_cache_is_scraped() {
    let mut daemon = DaemonStats::default();
    (daemon.frame_cache.hits, daemon.frame_cache.bytes) = (5, 1 << 20);
    let text = Totals::default().render(&[], &daemon);
    has(
        &text,
        &[
            "snaprestore_frame_cache_hits_total 5",
            "snaprestore_frame_cache_bytes 1048576",
        ],
    );
}

#[test]
fn every_state_is_counted() {
    let counted = [SERVED_STATES, ENDED_STATES].concat();
    let counted: Vec<_> = counted.iter().map(|(name, _)| *name).collect();
    assert_eq!(counted, VmState::ALL.map(VmState::name));
}

/// Returns a row of the documentation.
fn row(name: &str, help: &str, label: Option<(&str, &[(&str, &str)])>) -> String {
    let plain = |text: &str| {
        let text = text.trim_end_matches('.');
        let (first, rest) = text.split_at(1.min(text.len()));
        // Abbreviations stay as they are.
        let is_word = !rest.starts_with(char::is_uppercase);
        let first = if is_word {
            first.to_lowercase()
        } else {
            first.to_owned()
        };
        first + rest
    };
    let label = label.map(|(name, values)| {
        let values = values.iter().map(|(value, help)| match plain(help) {
            help if help.is_empty() => format!("`{value}`"),
            help => format!("`{value}` ({help})"),
        });
        let values: Vec<_> = values.collect();
        let colon = if values.is_empty() { "" } else { ": " };
        format!("`{name}`{colon}{} ", values.join(", "))
    });
    let (help, label) = (plain(help), label.unwrap_or_default());
    format!("| `snaprestore_{name}` | {help} | {label}|")
}

/// Returns the rows of the documentation for some metrics.
fn rows<S>(metrics: &Metrics<S>) -> Vec<String> {
    let mut rows = Vec::new();
    for metric in metrics.counters {
        let name = format!("{}_total", metric.name);
        rows.push(row(&name, metric.help, metric.label));
    }
    for metric in metrics.gauges {
        rows.push(row(metric.name, metric.help, metric.label));
    }
    for metric in metrics.histograms {
        rows.push(row(metric.name, metric.help, metric.label));
    }
    rows
}

/// The documentation has the rows of the definitions, and no others.
#[test]
fn documentation_has_the_defined_metrics() {
    let mut expected = rows(&METRICS);
    expected.extend(rows(&SERVICE_METRICS));
    expected.extend(rows(&DAEMON_METRICS));
    expected.extend(rows(&FRAME_CACHE_METRICS));
    let (name, help, label) = BUILD;
    expected.push(row(&format!("{name}_info"), help, Some((label, &[]))));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/operations.md");
    let page = std::fs::read_to_string(path).unwrap();
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| `snaprestore_"));
    let documented: Vec<_> = rows.collect();
    let table = expected.join("\n");
    assert!(documented == expected, "the table must be:\n{table}\n");
}

/// Every defined metric is scraped, under its documented name.
#[test]
fn every_documented_metric_is_scraped() {
    let text = Totals::default().render(&[], &daemon());
    let scraped = text.lines().filter_map(|line| {
        let mut words = line.strip_prefix("# TYPE snaprestore_")?.split(' ');
        let (name, kind) = (words.next()?, words.next()?);
        Some(match kind {
            "counter" => format!("{name}_total"),
            "info" => format!("{name}_info"),
            _ => name.to_owned(),
        })
    });
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/operations.md");
    let page = std::fs::read_to_string(path).unwrap();
    let documented = page.lines().filter_map(|line| {
        let (name, _) = line.strip_prefix("| `snaprestore_")?.split_once('`')?;
        Some(name.to_owned())
    });
    let mut scraped: Vec<String> = scraped.collect();
    let mut documented: Vec<String> = documented.collect();
    scraped.sort();
    documented.sort();
    assert_eq!(scraped, documented);
}

/// Returns the answer to `request`, whose sender then waits.
fn answered(request: &[u8]) -> String {
    let (mut here, there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || scrape(there, || "the text\n".to_owned()));
        // A request that is too long is not read completely.
        let _ = here.write_all(request);
        let mut reply = Vec::new();
        let _ = here.read_to_end(&mut reply);
        String::from_utf8(reply).unwrap()
    })
}

#[test]
fn only_a_scrape_of_metrics_is_answered() {
    let reply = answered(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(reply.starts_with("HTTP/1.1 200 OK\r\n"), "{reply}");
    assert!(reply.contains("Content-Length: 9\r\n"), "{reply}");
    assert!(reply.ends_with("\r\n\r\nthe text\n"), "{reply}");
    let head = answered(b"HEAD /metrics HTTP/1.0\n\n");
    assert!(
        head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"GET /metrics HTTP/2\r\n\r\n", "505"),
        (b"\x16\x03\x01\r\n\r\n", "400"),
    ] {
        let reply = answered(request);
        assert!(reply.starts_with(&format!("HTTP/1.1 {status} ")), "{reply}");
        assert!(!reply.contains("the text"), "{reply}");
    }
    let query = answered(b"GET /metrics?a=b HTTP/1.1\r\n\r\n");
    assert!(query.contains("200 OK"), "{query}");
}

#[test]
fn a_request_without_end_is_refused() {
    let request = vec![b'x'; MAX_HEAD_BYTES];
    let reply = answered(&request);
    assert!(reply.starts_with("HTTP/1.1 431 "), "{reply}");
}
