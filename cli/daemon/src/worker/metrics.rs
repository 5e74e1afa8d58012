//! Metrics for Prometheus: statistics of the sessions by service, rendered as text for each scrape.
//!
//! Sessions come and go, and a counter must not fall. So [`Totals`] keeps the statistics of ended
//! sessions, and adds those of the current ones. The names are part of the interface:
//! `docs/operations.md` lists them.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::{collector::Collector, encoding::text, registry::Registry};

use snaprestore_engine::stats::FrameCacheStats;

use crate::api::types::{SessionStats, Times, VmState, VmStats};

/// The maximum size of a request's head.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// Time limit of a scrape, even with the slowest reader.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(10);
/// Upper bounds of the histograms' buckets, in seconds. They separate faults that are resolved from
/// memory, from a disk, from far away, or too late.
const BUCKET_BOUNDS: [f64; 20] = [
    5e-6,
    1e-5,
    2e-5,
    5e-5,
    1e-4,
    2e-4,
    5e-4,
    1e-3,
    2e-3,
    5e-3,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    f64::INFINITY,
];

/// Statistics of the daemon as a whole.
#[derive(Clone, Debug, Default)]
pub(crate) struct DaemonStats {
    /// Number of times that a new worker replaced one that had exited.
    pub(crate) worker_restarts: u64,
    /// Whether no more VMs are accepted.
    pub(crate) draining: bool,
    /// The names of all services, so that those without a VM are included.
    pub(crate) services: Vec<String>,
    /// Counts of ended VMs by service and state: all that the daemon has seen, whichever worker
    /// served them.
    pub(crate) ended: BTreeMap<String, BTreeMap<VmState, u64>>,
    /// Statistics of the cache of frames that the sessions share.
    pub(crate) frame_cache: FrameCacheStats,
}

/// Totals of the ended sessions, by service.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    services: Mutex<BTreeMap<String, ServiceTotals>>,
}

/// The totals of one service.
#[derive(Clone, Debug, Default)]
struct ServiceTotals {
    session: SessionStats,
    /// Number of VMs by state, filled in when rendered.
    states: BTreeMap<VmState, u64>,
}

impl Totals {
    /// Adds an ended VM. It must no longer be among those that are served.
    pub(crate) fn add(&self, vm: &VmStats) {
        let mut vm = vm.clone();
        // None of its memory is present, and none will be.
        (vm.session.pages, vm.session.missing) = (0, 0);
        let mut services = self.lock();
        let totals = services.entry(vm.vm.service.clone()).or_default();
        totals.session.add(&vm.session);
    }

    /// Drops a service that was removed and whose VMs have ended.
    pub(crate) fn forget(&self, service: &str) {
        self.lock().remove(service);
    }

    /// Renders the metrics, including those of the VMs being served.
    pub(crate) fn render(&self, live: &[VmStats], daemon: &DaemonStats) -> String {
        let mut services = self.lock().clone();
        for name in &daemon.services {
            services.entry(name.clone()).or_default();
        }
        for (name, ended) in &daemon.ended {
            let totals = services.entry(name.clone()).or_default();
            totals.states.clone_from(ended);
        }
        for vm in live {
            let totals = services.entry(vm.vm.service.clone()).or_default();
            totals.session.add(&vm.session);
            *totals.states.entry(vm.vm.state).or_default() += 1;
        }
        let mut registry = Registry::with_prefix("snaprestore");
        registry.register_collector(Box::new(Render {
            services,
            daemon: daemon.clone(),
        }));
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = text::encode(&mut text, &registry);
        text
    }

    /// Locks the totals, also after a panic: they are consistent after every statement.
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, ServiceTotals>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clone for Totals {
    fn clone(&self) -> Self {
        Self {
            services: Mutex::new(self.lock().clone()),
        }
    }
}

/// The content of one scrape.
#[derive(Debug)]
struct Render {
    services: BTreeMap<String, ServiceTotals>,
    daemon: DaemonStats,
}

/// Counters or gauges of a service: one value, or one for each value of a further label.
type Values = fn(&ServiceTotals) -> Vec<(&'static str, u64)>;

/// The counters: name, description, further label.
const COUNTERS: &[(&str, &str, &str, Values)] = &[
    (
        "faults",
        "Page faults, by state of the page",
        "kind",
        |totals| {
            let kinds = totals.session.fault_kinds;
            vec![
                ("stored", kinds.stored),
                ("fill", kinds.fill),
                ("removed", kinds.removed),
                ("present", kinds.present),
                ("poisoned", kinds.poisoned),
                ("outside", kinds.outside),
            ]
        },
    ),
    (
        "demand_pages",
        "Pages installed on demand, by content",
        "content",
        |totals| pages(totals.session.demand),
    ),
    (
        "prefetch_pages",
        "Pages installed by prefetch, by content",
        "content",
        |totals| pages(totals.session.prefetch),
    ),
    (
        "poisoned_pages",
        "Pages poisoned because they could not be restored",
        "",
        |totals| vec![("", totals.session.poisoned)],
    ),
    (
        "read_bytes",
        "Bytes of frames read from snapshots",
        "",
        |totals| vec![("", totals.session.bytes_read)],
    ),
    ("decoded_bytes", "Bytes decoded from frames", "", |totals| {
        vec![("", totals.session.bytes_decoded)]
    }),
    (
        "discards",
        "Events that report discarded, unmapped or moved memory",
        "",
        |totals| vec![("", totals.session.discards)],
    ),
    (
        "retries",
        "Installs repeated because the mappings were changing",
        "",
        |totals| vec![("", totals.session.retries)],
    ),
    (
        "shortages",
        "Installs that failed because memory ran out, by memory pool",
        "source",
        |totals| {
            let shortages = totals.session.shortages;
            vec![
                ("memory", shortages.memory),
                ("hugepages-2048kB", shortages.huge_pages),
            ]
        },
    ),
    ("failures", "Failures to restore a page", "", |totals| {
        vec![("", totals.session.failures)]
    }),
    (
        "vms_ended",
        "VMs that are no longer served, by outcome",
        "ending",
        |totals| states(totals, true),
    ),
];

const GAUGES: &[(&str, &str, &str, Values)] = &[
    ("vms", "VMs that are served, by state", "state", |totals| {
        states(totals, false)
    }),
    (
        "pages",
        "Pages of the memory of VMs that are served",
        "",
        |totals| vec![("", totals.session.pages)],
    ),
    (
        "missing_pages",
        "Pages still missing from VMs that are served",
        "",
        |totals| vec![("", totals.session.missing)],
    ),
];

fn pages(pages: crate::api::types::Pages) -> Vec<(&'static str, u64)> {
    vec![
        ("frame", pages.copied),
        ("fill", pages.filled),
        ("zero", pages.zeroed),
    ]
}

fn states(totals: &ServiceTotals, ended: bool) -> Vec<(&'static str, u64)> {
    let states = VmState::ALL
        .into_iter()
        .filter(|state| state.is_ended() == ended);
    states
        .map(|state| {
            let count = totals.states.get(&state).copied();
            (state.name(), count.unwrap_or(0))
        })
        .collect()
}

impl Collector for Render {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, label, values) in COUNTERS {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.each(label, *values, |labels, value| {
                one_counter(metric.encode_family(labels)?, value)
            })?;
        }
        for (name, help, label, values) in GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            self.each(label, *values, |labels, value| {
                metric.encode_family(labels)?.encode_gauge(&value)
            })?;
        }
        let help = "Time from reading a fault to resolving it, by source of the content";
        let kind = MetricType::Histogram;
        let mut metric = encoder.encode_descriptor("fault_seconds", help, None, kind)?;
        for (service, totals) in &self.services {
            for (source, times) in sources(&totals.session) {
                let labels = vec![("service", service.as_str()), ("source", source)];
                let buckets = coarse(times);
                metric
                    .encode_family(&labels)?
                    .encode_histogram::<NoLabelSet>(times.sum / 1e6, times.count, &buckets, None)?;
            }
        }
        self.encode_daemon(encoder)
    }
}

impl Render {
    /// Calls a function for each value of each service, with its labels.
    fn each(
        &self,
        label: &'static str,
        values: Values,
        mut encode: impl FnMut(&Vec<(&str, &str)>, u64) -> fmt::Result,
    ) -> fmt::Result {
        for (service, totals) in &self.services {
            for (name, value) in values(totals) {
                let mut labels = vec![("service", service.as_str())];
                if !label.is_empty() {
                    labels.push((label, name));
                }
                encode(&labels, value)?;
            }
        }
        Ok(())
    }

    fn encode_daemon(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let daemon = &self.daemon;
        let cache = &daemon.frame_cache;
        let counters = [
            (
                "worker_restarts",
                "Workers that exited or hung and were replaced",
                daemon.worker_restarts,
            ),
            (
                "frame_cache_hits",
                "Frames found decoded in the shared cache",
                cache.hits,
            ),
            (
                "frame_cache_misses",
                "Frames not found in the shared cache",
                cache.misses,
            ),
            (
                "frame_cache_evictions",
                "Frames evicted from the shared cache",
                cache.evictions,
            ),
        ];
        let gauges = [
            (
                "draining",
                "1 while draining: no new VMs are accepted",
                u64::from(daemon.draining),
            ),
            (
                "frame_cache_frames",
                "Frames in the shared cache",
                cache.frames,
            ),
            (
                "frame_cache_bytes",
                "Bytes used by the shared cache",
                cache.bytes,
            ),
        ];
        for (name, help, value) in counters {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            one_counter(metric, value)?;
        }
        for (name, help, value) in gauges {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            metric.encode_gauge(&value)?;
        }
        let help = "Version of the running program";
        let mut metric = encoder.encode_descriptor("build", help, None, MetricType::Info)?;
        metric.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])
    }
}

fn one_counter(mut metric: MetricEncoder<'_>, value: u64) -> fmt::Result {
    metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

/// Returns the histograms, by source of the content.
fn sources(session: &SessionStats) -> [(&'static str, &Times); 5] {
    let sources = &session.sources;
    [
        ("read", &sources.read),
        ("cached", &sources.cached),
        ("waited", &sources.waited),
        ("fill", &sources.fill),
        ("none", &sources.none),
    ]
}

/// Sorts durations into the buckets of the metrics. A duration is never counted as shorter than it
/// was, and as longer by at most a sixteenth.
fn coarse(times: &Times) -> Vec<(f64, u64)> {
    let mut coarse: Vec<(f64, u64)> = BUCKET_BOUNDS.iter().map(|upper| (*upper, 0)).collect();
    for (nanos, count) in &times.buckets {
        #[expect(clippy::cast_precision_loss, reason = "compared with round numbers")]
        let seconds = *nanos as f64 / 1e9;
        if let Some((_, total)) = coarse.iter_mut().find(|(upper, _)| seconds <= *upper) {
            *total += count;
        }
    }
    coarse
}

/// A stream with time limits for single reads and writes.
pub(crate) trait TimedStream: Read + Write {
    /// Limits each read and write from now on.
    fn set_timeouts(&self, time: Duration) -> io::Result<()>;
}

impl TimedStream for UnixStream {
    fn set_timeouts(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

impl TimedStream for TcpStream {
    fn set_timeouts(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

/// Answers one HTTP request, `GET /metrics`, with the text that `metrics` returns.
pub(crate) fn scrape(mut stream: impl TimedStream, metrics: impl FnOnce() -> String) {
    if let Err(error) = respond(&mut stream, metrics) {
        tracing::debug!(%error, "cannot serve a metrics request");
    }
}

fn respond(stream: &mut impl TimedStream, metrics: impl FnOnce() -> String) -> io::Result<()> {
    let until = Instant::now() + SCRAPE_TIMEOUT;
    let mut head = Vec::new();
    while !has_ended(&head) {
        if head.len() >= MAX_HEAD_BYTES {
            return reply(stream, until, "431 Request Header Fields Too Large", "");
        }
        wait_until(stream, until)?;
        let mut chunk = [0; 1024];
        let room = chunk.len().min(MAX_HEAD_BYTES - head.len());
        match stream.read(&mut chunk[..room]) {
            Ok(0) => return Ok(()),
            Ok(read) => head.extend_from_slice(&chunk[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let words: Vec<_> = line.split_ascii_whitespace().collect();
    let [method, target, version] = words[..] else {
        return reply(stream, until, "400 Bad Request", "");
    };
    if !version.starts_with("HTTP/1.") {
        return reply(stream, until, "505 HTTP Version Not Supported", "");
    }
    if target.split('?').next() != Some("/metrics") {
        return reply(stream, until, "404 Not Found", "metrics are at /metrics\n");
    }
    match method {
        "GET" => reply(stream, until, "200 OK", &metrics()),
        "HEAD" => reply(stream, until, "200 OK", ""),
        _ => reply(stream, until, "405 Method Not Allowed", ""),
    }
}

/// Whether the head of a request is complete.
fn has_ended(head: &[u8]) -> bool {
    let ends = |end: &[u8]| head.windows(end.len()).any(|window| window == end);
    ends(b"\r\n\r\n") || ends(b"\n\n")
}

fn wait_until(stream: &impl TimedStream, until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    stream.set_timeouts(left)
}

fn reply(
    stream: &mut impl TimedStream,
    until: Instant,
    status: &str,
    body: &str,
) -> io::Result<()> {
    let kind = if status.starts_with("200") {
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    } else {
        "text/plain; charset=utf-8"
    };
    let len = body.len();
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\n\
         Connection: close\r\n\r\n{body}"
    );
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        wait_until(stream, until)?;
        match stream.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(done) => rest = &rest[done..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    stream.flush()
}

#[cfg(test)]
mod tests;
