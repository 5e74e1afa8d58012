//! Metrics for Prometheus: statistics of the sessions by service, rendered as text for each scrape.
//!
//! Sessions come and go, and a counter must not fall. So [`Totals`] keeps the statistics of ended
//! sessions, and adds those of the current ones. [`snaprestore_engine::stats`] defines the metrics
//! of sessions; those that only the daemon knows are defined here. The names are part of the
//! interface: `docs/operations.md` lists them.

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

use snaprestore_engine::stats::{
    Durations, FRAME_CACHE_METRICS, FrameCacheStats, METRICS, Metric, Metrics, Numbers, Stats,
};

use crate::api::types::{VmState, VmStats};

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
    /// Counts of ended VMs by service and state: all that the daemon has seen, whichever worker
    /// served them. Includes the services without a VM.
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
    session: Stats,
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
        totals.session += &vm.session;
    }

    /// Drops a service that was removed and whose VMs have ended.
    pub(crate) fn forget(&self, service: &str) {
        self.lock().remove(service);
    }

    /// Renders the metrics, including those of the VMs being served.
    pub(crate) fn render(&self, live: &[VmStats], daemon: &DaemonStats) -> String {
        let mut services = self.lock().clone();
        for (name, ended) in &daemon.ended {
            let totals = services.entry(name.clone()).or_default();
            totals.states.clone_from(ended);
        }
        for vm in live {
            let totals = services.entry(vm.vm.service.clone()).or_default();
            totals.session += &vm.session;
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

/// The label values of VMs that are served and of those that are not, with their descriptions.
const SERVED_STATES: &[(&str, &str)] = &[
    (VmState::Connecting.name(), ""),
    (VmState::Serving.name(), ""),
    (VmState::Completing.name(), ""),
];
const ENDED_STATES: &[(&str, &str)] = &[
    (VmState::Complete.name(), "Has all its memory"),
    (VmState::Exited.name(), "By itself"),
    (VmState::Killed.name(), "A page could not be restored"),
    (VmState::Refused.name(), "Never served"),
];

/// The metrics of a service that only the daemon knows.
const SERVICE_METRICS: Metrics<ServiceTotals> = Metrics {
    counters: &[Metric {
        name: "vms_ended",
        help: "VMs that are no longer served, by outcome",
        label: Some(("ending", ENDED_STATES)),
        get: |totals| totals.counts(ENDED_STATES),
    }],
    gauges: &[Metric {
        name: "vms",
        help: "VMs that are served, by state",
        label: Some(("state", SERVED_STATES)),
        get: |totals| totals.counts(SERVED_STATES),
    }],
    histograms: &[],
};

/// The metrics of the daemon as a whole.
const DAEMON_METRICS: Metrics<DaemonStats> = Metrics {
    counters: &[Metric {
        name: "worker_restarts",
        help: "Workers that exited or hung and were replaced",
        label: None,
        get: |daemon| vec![daemon.worker_restarts],
    }],
    gauges: &[Metric {
        name: "draining",
        help: "1 while draining: no new VMs are accepted",
        label: None,
        get: |daemon| vec![u64::from(daemon.draining)],
    }],
    histograms: &[],
};

/// The name, description and label of the metric that names the program.
const BUILD: (&str, &str, &str) = ("build", "The program that serves", "version");

impl ServiceTotals {
    /// Returns the number of VMs in each of these states.
    fn counts(&self, states: &[(&str, &str)]) -> Vec<u64> {
        let count = |name: &str| {
            let found = self.states.iter().find(|(state, _)| state.name() == name);
            found.map_or(0, |(_, count)| *count)
        };
        states.iter().map(|(name, _)| count(name)).collect()
    }
}

impl Collector for Render {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let services = || {
            self.services
                .iter()
                .map(|(name, totals)| (Some(&**name), totals))
        };
        let sessions: Vec<_> = services()
            .map(|(name, totals)| (name, &totals.session))
            .collect();
        encode(&mut encoder, &METRICS, &sessions)?;
        encode(
            &mut encoder,
            &SERVICE_METRICS,
            &services().collect::<Vec<_>>(),
        )?;
        encode(&mut encoder, &DAEMON_METRICS, &[(None, &self.daemon)])?;
        let cache = &self.daemon.frame_cache;
        encode(&mut encoder, &FRAME_CACHE_METRICS, &[(None, cache)])?;
        let (name, help, label) = BUILD;
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Info)?;
        metric.encode_info(&[(label, env!("CARGO_PKG_VERSION"))])
    }
}

/// Renders the metrics of each of `sources`, with the name of its service.
fn encode<S>(
    encoder: &mut DescriptorEncoder<'_>,
    metrics: &Metrics<S>,
    sources: &[(Option<&str>, &S)],
) -> fmt::Result {
    let mut numbers = |metric: &Metric<Numbers<S>>, kind: MetricType| {
        let mut encoder = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
        each(metric, sources, metric.get, |labels, number| {
            // An empty family would be rendered with empty braces.
            if labels.is_empty() {
                return encode_number(&mut encoder, kind, number);
            }
            encode_number(&mut encoder.encode_family(labels)?, kind, number)
        })
    };
    for metric in metrics.counters {
        numbers(metric, MetricType::Counter)?;
    }
    for metric in metrics.gauges {
        numbers(metric, MetricType::Gauge)?;
    }
    for metric in metrics.histograms {
        let kind = MetricType::Histogram;
        let mut encoder = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
        each(metric, sources, metric.get, |labels, times| {
            let (sum, buckets) = (times.sum.as_secs_f64(), coarse(times));
            let mut encoder = encoder.encode_family(labels)?;
            encoder.encode_histogram::<NoLabelSet>(sum, times.count, &buckets, None)
        })?;
    }
    Ok(())
}

fn encode_number(encoder: &mut MetricEncoder<'_>, kind: MetricType, number: u64) -> fmt::Result {
    match kind {
        MetricType::Counter => encoder.encode_counter::<NoLabelSet, _, u64>(&number, None),
        _ => encoder.encode_gauge(&number),
    }
}

/// Calls a function for each value of a metric of each source, with its labels.
fn each<'a, S, Get, T>(
    metric: &Metric<Get>,
    sources: &[(Option<&'a str>, &'a S)],
    get: impl Fn(&'a S) -> Vec<T>,
    mut encode: impl FnMut(&Vec<(&str, &str)>, T) -> fmt::Result,
) -> fmt::Result {
    for (service, source) in sources {
        for (position, value) in get(source).into_iter().enumerate() {
            let service = service.map(|service| ("service", service));
            let label = metric
                .label
                .map(|(name, values)| (name, values[position].0));
            encode(&service.into_iter().chain(label).collect(), value)?;
        }
    }
    Ok(())
}

/// Sorts durations into the buckets of the metrics. A duration is never counted as shorter than it
/// was, and as longer by at most a sixteenth.
fn coarse(times: &Durations) -> Vec<(f64, u64)> {
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

/// Returns whether the head of a request is complete.
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
