//! The log of the program, as text or JSON, on standard error.
//!
//! Libraries log through `tracing`; `SNAPRESTORE_LOG` selects what is shown, such as `debug` or
//! `snaprestore_engine=trace`. A guest can cause any number of some events (failures, discards). So
//! for each place in the code that logs, a few events per second are shown and the others counted.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Instant;

use clap::ValueEnum;
use indicatif::HumanCount;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tracing::callsite::Identifier;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Json, Writer};
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::policy::{self, Counter};

/// The variable that selects what is shown.
const VARIABLE: &str = "SNAPRESTORE_LOG";

/// How events are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// One line an event, for people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// The limiter of the whole process.
static LIMITER: LazyLock<Limiter> = LazyLock::new(Limiter::default);

/// Formats a number with the noun that it counts: `1 page`, `2,000 pages`.
pub fn count(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", HumanCount(number))
}

/// Starts logging. A daemon, which passes a format, logs what an operator should know unless the
/// variable selects otherwise; other commands log only what the variable selects.
pub fn start(daemon: Option<LogFormat>) {
    let wanted = std::env::var(VARIABLE).ok().filter(|text| !text.is_empty());
    let wrong = |error| {
        let text = format!("snaprestore: {VARIABLE} is ignored: {error}\n");
        let _ = io::stderr().lock().write_all(text.as_bytes());
    };
    let filter = match (wanted.map(EnvFilter::try_new), daemon) {
        (Some(Ok(filter)), _) => filter,
        (Some(Err(error)), None) => return wrong(error),
        (Some(Err(error)), Some(_)) => {
            wrong(error);
            EnvFilter::new("info")
        }
        (None, Some(_)) => EnvFilter::new("info"),
        (None, None) => return,
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    match daemon.unwrap_or_default() {
        LogFormat::Text => builder
            .event_format(Limited {
                inner: Format::default(),
                json: false,
                limiter: &LIMITER,
            })
            .init(),
        LogFormat::Json => builder
            .json()
            .event_format(Limited {
                inner: json(),
                json: true,
                limiter: &LIMITER,
            })
            .init(),
    }
}

/// Logs the number of suppressed events of places that have been silent since. A process that may
/// wait long for the next event calls this at intervals.
pub(crate) fn log_suppressed(format: LogFormat) {
    let mut text = String::new();
    for suppressed in LIMITER.due(Instant::now()) {
        let _ = suppressed.write(&mut Writer::new(&mut text), format == LogFormat::Json);
    }
    if !text.is_empty() {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }
}

/// Formats events with another formatter, but limits their number.
struct Limited<F> {
    inner: F,
    json: bool,
    limiter: &'static Limiter,
}

impl<S, N, F> FormatEvent<S, N> for Limited<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let now = Instant::now();
        for suppressed in self.limiter.due(now) {
            suppressed.write(&mut writer, self.json)?;
        }
        if !self.limiter.admits(event.metadata(), now) {
            return Ok(());
        }
        if !self.json {
            return self.inner.format_event(context, writer, event);
        }
        let mut line = String::new();
        self.inner
            .format_event(context, Writer::new(&mut line), event)?;
        writeln!(
            writer,
            "{}",
            with_fields_of_span(&line)
                .as_deref()
                .unwrap_or(line.trim_end())
        )
    }
}

/// Returns the format with one JSON object per event.
fn json() -> Format<Json> {
    Format::default()
        .json()
        .flatten_event(false)
        .with_span_list(false)
}

/// Moves the fields of an event's span among the event's own, so that all fields of a VM are
/// together.
fn with_fields_of_span(line: &str) -> Option<String> {
    let mut object: Map<String, Value> = serde_json::from_str(line).ok()?;
    if let Some(Value::Object(mut span)) = object.remove("span") {
        span.remove("name");
        object.get_mut("fields")?.as_object_mut()?.append(&mut span);
    }
    serde_json::to_string(&object).ok()
}

/// Counts events by the place that logs them.
#[derive(Default)]
struct Limiter {
    places: Mutex<HashMap<Identifier, Place>>,
}

/// A place in the code that logs.
struct Place {
    metadata: &'static Metadata<'static>,
    /// The events of the current window that were shown.
    shown: Counter,
    suppressed: u64,
}

/// Events of one place that were not shown.
struct Suppressed {
    metadata: &'static Metadata<'static>,
    events: u64,
}

impl Limiter {
    /// Returns whether an event should be shown.
    fn admits(&self, metadata: &'static Metadata<'static>, now: Instant) -> bool {
        let mut places = self.lock();
        let place = places.entry(metadata.callsite()).or_insert(Place {
            metadata,
            shown: Counter::default(),
            suppressed: 0,
        });
        let is_shown = place.shown.admit(&policy::LOG_EVENTS, now);
        place.suppressed += u64::from(!is_shown);
        is_shown
    }

    /// Returns the suppressed events of windows that are over, once.
    fn due(&self, now: Instant) -> Vec<Suppressed> {
        let mut places = self.lock();
        let over = |place: &&mut Place| {
            let since = place.shown.since();
            let is_over = since
                .is_none_or(|since| now.saturating_duration_since(since) >= policy::LOG_WINDOW);
            place.suppressed > 0 && is_over
        };
        let tell = |place: &mut Place| Suppressed {
            metadata: place.metadata,
            events: std::mem::take(&mut place.suppressed),
        };
        places.values_mut().filter(over).map(tell).collect()
    }

    /// Locks the table, also after a panic: it is consistent after every statement.
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Identifier, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Suppressed {
    /// Writes a line about the suppressed events.
    fn write(&self, writer: &mut Writer<'_>, json: bool) -> fmt::Result {
        let (level, target) = (self.metadata.level(), self.metadata.target());
        let place = format_args!(
            "{}:{}",
            self.metadata.file().unwrap_or("?"),
            self.metadata.line().unwrap_or(0)
        )
        .to_string();
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        if json {
            let line = serde_json::json!({
                "timestamp": time,
                "level": level.as_str(),
                "fields": {
                    "message": "events were suppressed",
                    "suppressed": self.events,
                    "place": place,
                },
                "target": target,
            });
            writeln!(writer, "{line}")
        } else {
            let events = self.events;
            writeln!(
                writer,
                "{time} {level:>5} {target}: events were suppressed suppressed={events} place={place:?}"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tracing_subscriber::fmt::MakeWriter;

    const MAX_EVENTS: u32 = 10;

    /// A writer that keeps the log.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Kept {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    impl Kept {
        fn lines(&self) -> Vec<String> {
            let bytes = self.0.lock().unwrap().clone();
            let text = String::from_utf8(bytes).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    fn limiter() -> &'static Limiter {
        Box::leak(Box::default())
    }

    /// Logs an event, always from this place.
    fn log(number: u32) {
        tracing::warn!(number, "a guest did it again");
    }

    /// Moves the windows of all places a second into the past.
    fn let_time_pass(limiter: &Limiter) {
        for place in limiter.lock().values_mut() {
            let since = place.shown.since().expect("the place has logged");
            let earlier = since.checked_sub(policy::LOG_WINDOW);
            place
                .shown
                .set_since(earlier.expect("the clock starts at 0"));
        }
    }

    #[test]
    fn count_of_one_is_singular() {
        assert_eq!(count(1, "page"), "1 page");
        assert_eq!(count(2000, "page"), "2,000 pages");
    }

    #[test]
    fn place_that_logs_too_much_is_counted() {
        let (kept, limiter) = (Kept::default(), limiter());
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .event_format(Limited {
                inner: Format::default(),
                json: false,
                limiter,
            })
            .with_writer(kept.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            // The window doesn't end during the loop, however slow this machine is.
            for number in 0..MAX_EVENTS + 25 {
                log(number);
                for place in limiter.lock().values_mut() {
                    place.shown.set_since(Instant::now());
                }
            }
            assert_eq!(
                kept.lines().len(),
                MAX_EVENTS as usize,
                "{:?}",
                kept.lines()
            );
            tracing::warn!("another place is not concerned");
            assert_eq!(kept.lines().len(), MAX_EVENTS as usize + 1);
            let_time_pass(limiter);
            log(99);
        });
        let lines = kept.lines();
        let [.., suppressed, last] = &lines[..] else {
            panic!("{lines:?}");
        };
        assert!(
            suppressed.contains("WARN") && suppressed.contains("suppressed=25"),
            "{lines:?}"
        );
        assert!(last.contains("number=99"), "{lines:?}");
        assert_eq!(lines.len(), MAX_EVENTS as usize + 3, "{lines:?}");
        assert!(limiter.due(Instant::now() + policy::LOG_WINDOW).is_empty());
    }

    #[test]
    fn json_log_has_one_object_per_line() {
        let (kept, limiter) = (Kept::default(), limiter());
        let subscriber = tracing_subscriber::fmt()
            .json()
            .event_format(Limited {
                inner: json(),
                json: true,
                limiter,
            })
            .with_writer(kept.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..=MAX_EVENTS {
                log(number);
                for place in limiter.lock().values_mut() {
                    place.shown.set_since(Instant::now());
                }
            }
            let_time_pass(limiter);
            let span = tracing::error_span!("vm", vm = 3, pid = 77, service = "web");
            span.in_scope(|| log(99));
        });
        let lines: Vec<serde_json::Value> = kept
            .lines()
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), MAX_EVENTS as usize + 2, "{lines:?}");
        assert_eq!(lines[0]["fields"]["number"], 0, "{lines:?}");
        assert_eq!(lines[0]["level"], "WARN");
        let suppressed = &lines[MAX_EVENTS as usize];
        assert_eq!(suppressed["fields"]["suppressed"], 1, "{suppressed}");
        assert_eq!(suppressed["level"], "WARN");
        assert!(suppressed["timestamp"].is_string(), "{suppressed}");
        // The fields of the VM are beside those of the event.
        let fields = &lines[MAX_EVENTS as usize + 1]["fields"];
        let of = (
            &fields["number"],
            &fields["vm"],
            &fields["pid"],
            &fields["service"],
        );
        assert_eq!(of, (&99.into(), &3.into(), &77.into(), &"web".into()));
    }
}
