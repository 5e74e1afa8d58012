//! The sections of a page.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write as _};
use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount};
use serde_json::{Value, json};
use snaprestore_engine::stats::{Durations, FaultSources, TimelineBucket, whole_micros};
use snapshot_format::layout::PAGE_SIZE_U64;

use super::charts::{Chart, Series, bytes, number};
use super::facts::{PLOT_ROWS, ReportFacts, RunFacts, TouchFacts, region_name};
use super::html::{self, Column, figure, foreign, label, table, text};
use super::map;
use crate::map::{Counts, RATIO_LIMITS};
use crate::output::{count, percent, ratio};

/// Maximum number of regions in the tables of the compression.
const MAX_LISTED_REGIONS: usize = 100;
/// Maximum number of bars of a timeline.
const MAX_TIMELINE_BARS: usize = 128;

/// CSS classes of the sources of content, in the order of [`FaultSources::LABELS`].
const SOURCE_CLASSES: [&str; 5] = ["c1", "c2", "c3", "c4", "c5"];

/// Figures of the snapshot: keys of `info --json`, with their labels and kinds.
const FIGURES: [(&str, &str, Unit); 15] = [
    ("logical_bytes", "memory", Unit::Bytes),
    ("file_bytes", "file", Unit::Bytes),
    ("pages", "pages", Unit::Count),
    ("zero_pages", "zero", Unit::Pages),
    ("fill_pages", "other fill", Unit::Pages),
    ("stored_pages", "stored", Unit::Pages),
    ("duplicate_pages", "identical", Unit::Pages),
    ("ancestor_pages", "in ancestors", Unit::Pages),
    ("unavailable_pages", "unavailable", Unit::Pages),
    ("frames", "frames", Unit::Count),
    ("frame_bytes", "memory of a frame", Unit::Bytes),
    ("stored_bytes", "all frames", Unit::Bytes),
    ("index_bytes", "index", Unit::Bytes),
    ("page_size", "page size", Unit::Bytes),
    ("format_version", "format version", Unit::Count),
];

#[derive(Clone, Copy)]
enum Unit {
    Bytes,
    Count,
    /// A number of pages, with its share of all.
    Pages,
}

/// Returns the page.
pub(super) fn write(facts: &ReportFacts) -> String {
    let mut out = String::with_capacity(512 << 10);
    // Writing to a string never fails.
    let _ = write_page(&mut out, facts);
    out
}

fn write_page(out: &mut String, facts: &ReportFacts) -> fmt::Result {
    write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\
         <title>Snapshot report: {}</title>\n<style>\n{}</style></head>\n<body>",
        foreign(&facts.info.file),
        include_str!("page.css")
    )?;
    write_header(out, facts)?;
    out.write_str("<main>")?;
    section(out, "memory", "Memory by address")?;
    map::write(out, facts)?;
    write_compression(out, facts)?;
    write_working_set(out, facts)?;
    if let Some(run) = &facts.run {
        write_run(out, run)?;
    }
    write_details(out, facts)?;
    write!(
        out,
        "</main><footer><p>Written by snaprestore {}. This page loads nothing from the network, \
         and holds no content of memory.</p></footer>",
        env!("CARGO_PKG_VERSION")
    )?;
    write!(
        out,
        "\n<script type=\"application/json\" id=\"snapshot-data\">{}</script>\n\
         <script type=\"application/json\" id=\"cells-data\">{}</script>\n\
         <script>\n{}</script>\n</body></html>\n",
        html::json(&snapshot_data(facts)),
        html::json(&cells_data(facts)),
        include_str!("page.js")
    )
}

fn section(out: &mut String, id: &str, title: &str) -> fmt::Result {
    write!(out, "<h2 id=\"{id}\">{}</h2>", text(title))
}

fn write_header(out: &mut String, facts: &ReportFacts) -> fmt::Result {
    let info = &facts.info;
    let value = serde_json::to_value(&info.facts).unwrap_or_default();
    let figure_of = |key: &str| value[key].as_u64().unwrap_or(0);
    let whole = figure_of("pages");
    write!(
        out,
        "<header><h1>{}</h1><p>{} of memory in {}; the file is {} times smaller.</p>",
        foreign(&info.file),
        text(BinaryBytes(figure_of("logical_bytes"))),
        text(count(info.facts.regions.len() as u64, "region")),
        text(ratio(figure_of("logical_bytes"), figure_of("file_bytes")))
    )?;
    out.write_str("<nav aria-label=\"Sections\"><ul><li><a href=\"#memory\">Memory</a></li>")?;
    out.write_str("<li><a href=\"#compression\">Compression</a></li>")?;
    out.write_str("<li><a href=\"#working-set\">Working set</a></li>")?;
    if facts.run.is_some() {
        out.write_str("<li><a href=\"#run\">Restore</a></li>")?;
    }
    out.write_str("<li><a href=\"#details\">Details</a></li></ul></nav>")?;
    out.write_str("<dl class=\"figures\">")?;
    for (key, label, unit) in FIGURES {
        let n = figure_of(key);
        match unit {
            Unit::Bytes => figure(out, key, label, n, BinaryBytes(n))?,
            Unit::Count => figure(out, key, label, n, HumanCount(n))?,
            Unit::Pages => {
                let shown = format!("{} ({})", HumanCount(n), percent(n, whole));
                figure(out, key, label, n, shown)?;
            }
        }
    }
    out.write_str("</dl><dl class=\"ids\">")?;
    for (key, label) in [
        ("snapshot_id", "ID"),
        ("content_digest", "content digest"),
        ("state_digest", "state digest"),
    ] {
        let id = value[key].as_str().unwrap_or_default();
        write!(
            out,
            "<dt>{label}</dt><dd><code data-figure=\"{key}\">{}</code></dd>",
            text(id)
        )?;
    }
    out.write_str("</dl></header>")
}

/// Describes how well pages compress: distinct pages, and how many times smaller they are in
/// frames.
fn compression_of(counts: &Counts) -> [String; 4] {
    let memory = counts.distinct * PAGE_SIZE_U64;
    [
        HumanCount(counts.in_frames()).to_string(),
        HumanCount(counts.distinct).to_string(),
        BinaryBytes(counts.stored_bytes()).to_string(),
        ratio(memory, counts.stored_bytes()),
    ]
}

fn write_compression(out: &mut String, facts: &ReportFacts) -> fmt::Result {
    section(out, "compression", "What compresses, and what does not")?;
    let (total, ratios) = (&facts.map.total, &facts.map.ratios);
    write!(
        out,
        "<p>{} are zero or repeat one word, and take no frame. {} repeat the content of others. The \
         {} distinct pages are in {}, which take {} and decode to {}: {} times more. {} of these \
         frames {} stored uncompressed, because compression did not help.</p>",
        text(count(total.zero + total.fill, "page")),
        text(HumanCount(total.in_frames() - total.distinct)),
        text(HumanCount(total.distinct)),
        text(count(ratios.frames, "frame")),
        text(BinaryBytes(ratios.stored_bytes)),
        text(BinaryBytes(ratios.decoded_bytes)),
        text(ratio(ratios.decoded_bytes, ratios.stored_bytes)),
        text(HumanCount(ratios.raw)),
        if ratios.raw == 1 { "is" } else { "are" },
    )?;
    out.write_str("<div class=\"charts\">")?;
    write_ratios(out, facts)?;
    let mut largest: Vec<usize> = (0..facts.map.regions.len()).collect();
    largest.sort_by_key(|&region| std::cmp::Reverse(facts.map.regions[region].stored_bytes()));
    if largest.len() > 1 {
        write_largest(out, facts, &largest)?;
    }
    out.write_str("</div>")?;
    let left_out = largest.len().saturating_sub(MAX_LISTED_REGIONS);
    let rows = largest.iter().take(MAX_LISTED_REGIONS).map(|&number| {
        let (region, counts) = (
            &facts.info.facts.regions[number],
            &facts.map.regions[number],
        );
        let first = [
            region_name(region, number),
            format!("{:#x}", region.start),
            BinaryBytes(region.bytes).to_string(),
            percent(counts.zero, counts.pages()),
        ];
        first.into_iter().chain(compression_of(counts)).collect()
    });
    let columns = [
        Column::Name("region"),
        Column::Number("start"),
        Column::Number("size"),
        Column::Number("zero"),
        Column::Number("pages in frames"),
        Column::Number("distinct"),
        Column::Number("bytes in frames"),
        Column::Number("times smaller"),
    ];
    table(
        out,
        "Regions by the bytes that they take in frames",
        &columns,
        rows,
    )?;
    if left_out > 0 {
        let more = count(left_out as u64, "smaller region");
        write!(out, "<p class=\"note\">... and {}</p>", text(more))?;
    }
    Ok(())
}

fn write_ratios(out: &mut String, facts: &ReportFacts) -> fmt::Result {
    let tenths = |limit: u64| match limit % 10 {
        0 => format!("{}", limit / 10),
        tenth => format!("{}.{tenth}", limit / 10),
    };
    let mut labels = vec![format!("below {}", tenths(RATIO_LIMITS[0]))];
    for pair in RATIO_LIMITS.windows(2) {
        labels.push(format!("{} to {}", tenths(pair[0]), tenths(pair[1])));
    }
    labels.push(format!(
        "{} and more",
        tenths(RATIO_LIMITS[RATIO_LIMITS.len() - 1])
    ));
    let classes = facts.map.ratios.classes.iter();
    let series = Series {
        class: "c1",
        name: "frames",
        values: classes.map(|(frames, _)| *frames).collect(),
    };
    let chart = Chart {
        id: "ratios",
        title: "Frames by how many times smaller they are",
        description: "A histogram of the ratio between the memory and the record of each frame, \
                      from incompressible frames on the left to the most compressible ones.",
        ends: ("1".into(), "32 and more".into()),
        shown: number,
    };
    chart.bars(out, &labels, "times smaller", &[series])
}

/// Draws the regions that take most bytes. The others are one bar.
fn write_largest(out: &mut String, facts: &ReportFacts, largest: &[usize]) -> fmt::Result {
    const BARS: usize = 12;
    let taken = |region: usize| facts.map.regions[region].stored_bytes();
    let shown = largest.iter().take(BARS);
    let name = |&region: &usize| region_name(&facts.info.facts.regions[region], region);
    let mut labels: Vec<String> = shown.clone().map(name).collect();
    let mut values: Vec<u64> = shown.map(|&region| taken(region)).collect();
    if largest.len() > BARS {
        labels.push(count((largest.len() - BARS) as u64, "other region"));
        values.push(largest.iter().skip(BARS).map(|&region| taken(region)).sum());
    }
    let mut ends = (String::new(), String::new());
    if let Some(first) = labels.first() {
        ends.0 = label(first, 24);
    }
    if let Some(last) = labels.last().filter(|_| labels.len() > 1) {
        ends.1 = label(last, 24);
    }
    let labels: Vec<String> = labels.iter().map(|name| label(name, 80)).collect();
    let series = Series {
        class: "c1",
        name: "bytes in frames",
        values,
    };
    let chart = Chart {
        id: "largest",
        title: "Regions that take most bytes",
        description: "Bytes of frames that the pages of each region take; content that several \
                      regions share counts for the first.",
        ends,
        shown: bytes,
    };
    chart.bars(out, &labels, "region", &[series])
}

fn write_working_set(out: &mut String, facts: &ReportFacts) -> fmt::Result {
    section(out, "working-set", "Working set")?;
    let total = &facts.map.total;
    if total.hot == 0 {
        return out.write_str(if facts.trace.is_some() {
            "<p>The trace has no touch.</p>"
        } else {
            "<p>The snapshot has no working set, and no trace was given. Record one with \
             <code>restore --record</code> or <code>serve --record</code>.</p>"
        });
    }
    let source = match &facts.trace {
        Some(_) => "in the trace".to_owned(),
        None => format!(
            "in {} of the snapshot",
            count(facts.info.working_sets.len() as u64, "working set")
        ),
    };
    out.write_str("<dl class=\"figures\">")?;
    let hot = |n| format!("{} ({})", HumanCount(n), percent(n, total.pages()));
    figure(out, "hot_pages", &source, total.hot, hot(total.hot))?;
    let stored = total.hot_in_frames;
    let shown = format!(
        "{} ({})",
        HumanCount(stored),
        percent(stored, total.in_frames())
    );
    figure(
        out,
        "hot_stored_pages",
        "of them in frames, of all in frames",
        stored,
        shown,
    )?;
    if let Some(trace) = &facts.trace {
        let present = trace.present_at_start;
        figure(
            out,
            "present_at_start",
            "present before",
            present,
            HumanCount(present),
        )?;
    }
    out.write_str("</dl>")?;
    if let Some(trace) = &facts.trace {
        write_trace(out, facts, trace)?;
    }
    Ok(())
}

fn write_trace(out: &mut String, facts: &ReportFacts, trace: &TouchFacts) -> fmt::Result {
    let TouchFacts { span, end, .. } = trace;
    write!(
        out,
        "<p>{} first touches in {}; the recording ended: {}.</p><div class=\"charts\">",
        text(HumanCount(trace.touches)),
        text(duration(*span)),
        text(end)
    )?;
    let ends = || ("0".to_owned(), duration(*span));
    let points: Vec<_> = trace
        .curve
        .iter()
        .map(|(at, pages)| (whole_micros(*at), *pages))
        .collect();
    let chart = Chart {
        id: "touched",
        title: "Pages touched so far, by time",
        description: "The number of different pages that the owner had touched, by the time since \
                      the recording began.",
        ends: ends(),
        shown: number,
    };
    let at = |us| duration(Duration::from_micros(us));
    chart.curve(out, &points, ("time", "pages touched"), at)?;
    let pages = facts.map.total.pages();
    let row = |row: usize| {
        let from = |row: usize| row as u64 * pages / PLOT_ROWS as u64;
        format!(
            "pages {} to {}",
            HumanCount(from(row)),
            HumanCount(from(row + 1))
        )
    };
    let chart = Chart {
        id: "touches",
        title: "First touches by time and address",
        description: "First touches of pages: the time since the recording began from left to \
                      right, and the regions in the order of addresses from bottom to top.",
        ends: ends(),
        shown: number,
    };
    let vertical = ("last page", "first page");
    chart.scatter(out, &trace.plot, ("memory", row), vertical)?;
    out.write_str("</div>")
}

fn write_run(out: &mut String, run: &RunFacts) -> fmt::Result {
    section(out, "run", "Restore")?;
    let record = &run.record;
    let stats = &record.statistics;
    write!(out, "<p>{}", foreign(&record.what))?;
    if run.other_file {
        write!(
            out,
            " <span class=\"note\">(from another file with the same memory, with ID <code>{}\
             </code>)</span>",
            foreign(&record.snapshot_id)
        )?;
    }
    out.write_str("</p><dl class=\"figures\">")?;
    let us = |us: u64| duration(Duration::from_micros(us));
    if let Some(map) = record.map_us {
        figure(out, "map_us", "mapped after", map, us(map))?;
    }
    match record.complete_us {
        Some(complete) => figure(out, "complete_us", "complete after", complete, us(complete))?,
        None => out.write_str("<div><dt>complete</dt><dd>no</dd></div>")?,
    }
    let (demand, prefetch) = (stats.demand.total(), stats.prefetch.total());
    for (key, label, n) in [
        ("faults", "faults", stats.faults),
        ("demand_pages", "pages by demand", demand),
        ("prefetch_pages", "pages by prefetch", prefetch),
        (
            "pages_left_to_kernel",
            "left to the kernel",
            record.pages_left_to_kernel,
        ),
        ("failures", "failures", stats.failures),
    ] {
        figure(out, key, label, n, HumanCount(n))?;
    }
    figure(
        out,
        "bytes_read",
        "read",
        stats.bytes_read,
        BinaryBytes(stats.bytes_read),
    )?;
    let decoded = stats.bytes_decoded;
    figure(
        out,
        "bytes_decoded",
        "decoded",
        decoded,
        BinaryBytes(decoded),
    )?;
    out.write_str("</dl><div class=\"charts\">")?;
    write_latencies(out, run)?;
    write_timeline(out, run)?;
    out.write_str("</div>")?;
    let columns = [
        Column::Name("source of the content"),
        Column::Number("faults"),
        Column::Number("p50"),
        Column::Number("p90"),
        Column::Number("p99"),
        Column::Number("longest"),
    ];
    let row = |name: String, times: &Durations| {
        let percentiles = [times.p50, times.p90, times.p99, times.max].map(duration);
        let first = [name, HumanCount(times.count).to_string()];
        first.into_iter().chain(percentiles).collect()
    };
    let sources = FaultSources::LABELS.iter().zip(stats.sources.values());
    let sources = sources.filter(|(_, times)| times.count > 0);
    let rows = sources.map(|((label, help), times)| {
        row(format!("{label}: {}", help.trim_end_matches('.')), times)
    });
    let all = [row("all".to_owned(), &stats.fault_time)];
    table(out, "Latencies of faults", &columns, rows.chain(all))
}

/// Draws the histogram of latencies: two bars for each power of two.
fn write_latencies(out: &mut String, run: &RunFacts) -> fmt::Result {
    // The class of a duration in nanoseconds, and the start of a class.
    let class = |nanos: u64| {
        let power = nanos.max(2).ilog2();
        let upper_half = nanos >= 3 << (power - 1);
        power * 2 + u32::from(upper_half)
    };
    let start = |class: u32| match class % 2 {
        0 => 1_u64 << (class / 2),
        _ => 3 << (class / 2 - 1),
    };
    let sources = run.record.statistics.sources.values();
    let mut classes = vec![BTreeMap::<u32, u64>::new(); sources.len()];
    for (counts, times) in classes.iter_mut().zip(&sources) {
        for (upper, count) in &times.buckets {
            *counts.entry(class(*upper)).or_default() += count;
        }
    }
    let keys = classes.iter().flat_map(BTreeMap::keys).copied();
    let Some((first, last)) = keys.clone().min().zip(keys.max()) else {
        return out.write_str("<p>No faults were served.</p>");
    };
    let nanos = |class| duration(Duration::from_nanos(start(class)));
    let labels: Vec<String> = (first..=last)
        .map(|class| format!("{} to {}", nanos(class), nanos(class + 1)))
        .collect();
    let parts = classes.iter().zip(FaultSources::LABELS).zip(SOURCE_CLASSES);
    let series: Vec<_> = parts
        .filter(|((counts, _), _)| !counts.is_empty())
        .map(|((counts, (name, _)), class)| Series {
            class,
            name,
            values: (first..=last)
                .map(|key| counts.get(&key).copied().unwrap_or(0))
                .collect(),
        })
        .collect();
    let chart = Chart {
        id: "latencies",
        title: "Faults by latency and source of the content",
        description: "A histogram of the time from reading a fault to resolving it; the scale of \
                      the time is logarithmic.",
        ends: (nanos(first), nanos(last + 1)),
        shown: number,
    };
    chart.bars(out, &labels, "latency", &series)
}

fn write_timeline(out: &mut String, run: &RunFacts) -> fmt::Result {
    let timeline = &run.record.timeline;
    let merged = timeline.buckets.len().div_ceil(MAX_TIMELINE_BARS).max(1);
    let bars: Vec<&[TimelineBucket]> = timeline.buckets.chunks(merged).collect();
    let us = |bars: usize| (bars * merged) as u64 * timeline.bucket_us;
    let at = |bars: usize| duration(Duration::from_micros(us(bars)));
    let labels: Vec<String> = (0..bars.len())
        .map(|bar| format!("from {}", at(bar)))
        .collect();
    let sum = |get: fn(&TimelineBucket) -> u64| -> Vec<u64> {
        bars.iter().map(|bar| bar.iter().map(get).sum()).collect()
    };
    let ends = || ("0".to_owned(), at(bars.len()));
    let pages = [
        Series {
            class: "c5",
            name: "pages by demand",
            values: sum(|bucket| bucket.demand_pages),
        },
        Series {
            class: "c1",
            name: "pages by prefetch",
            values: sum(|bucket| bucket.prefetch_pages),
        },
    ];
    let chart = Chart {
        id: "pages",
        title: "Pages by demand and prefetch, over time",
        description: "The number of pages that faults and prefetch installed, by the time since \
                      the restore began.",
        ends: ends(),
        shown: number,
    };
    chart.bars(out, &labels, "time", &pages)?;
    for (id, title, name, values) in [
        (
            "faults",
            "Faults over time",
            "faults",
            sum(|bucket| bucket.faults),
        ),
        (
            "reads",
            "Bytes read over time",
            "bytes read",
            sum(|bucket| bucket.bytes_read),
        ),
    ] {
        let chart = Chart {
            id,
            title,
            description: "By the time since the restore began.",
            ends: ends(),
            shown: if id == "faults" { number } else { bytes },
        };
        let class = if id == "faults" { "c5" } else { "c2" };
        chart.bars(
            out,
            &labels,
            "time",
            &[Series {
                class,
                name,
                values,
            }],
        )?;
    }
    Ok(())
}

fn write_details(out: &mut String, facts: &ReportFacts) -> fmt::Result {
    section(out, "details", "Details")?;
    let info = &facts.info;
    if !info.ancestors.is_empty() {
        let layers = (0..).zip(&facts.map.layers).map(|(layer, pages)| {
            let id = match usize::from(layer) {
                0 => &info.facts.snapshot_id,
                number => &info.ancestors[number - 1].snapshot_id,
            };
            vec![
                facts.layer_name(layer),
                id.clone(),
                HumanCount(*pages).to_string(),
            ]
        });
        let columns = [
            Column::Name("layer"),
            Column::Name("ID"),
            Column::Number("pages"),
        ];
        table(out, "Files of the chain", &columns, layers)?;
    }
    let sizes = |name: &String, size: String| vec![name.clone(), size];
    let names = [Column::Name("name"), Column::Number("size")];
    if !info.working_sets.is_empty() {
        let sets = info.working_sets.iter();
        let sets = sets.map(|set| sizes(&set.name, count(set.pages, "page")));
        table(out, "Working sets", &names, sets)?;
    }
    if !info.attachments.is_empty() {
        let files = info.attachments.iter();
        let files = files.map(|file| sizes(&file.name, BinaryBytes(file.bytes).to_string()));
        table(out, "Attachments", &names, files)?;
    }
    if info.properties.is_empty() {
        return Ok(());
    }
    let columns = [Column::Name("property"), Column::Name("value")];
    let rows = info.properties.iter();
    let rows = rows.map(|(key, value)| vec![key.clone(), value.clone()]);
    table(out, "Properties", &columns, rows)
}

/// Returns the figures of `info --json`: everything but its lists.
fn snapshot_data(facts: &ReportFacts) -> Value {
    let mut value = serde_json::to_value(&facts.info).unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.retain(|_, value| !value.is_array() && !value.is_object());
    }
    value
}

/// Returns the numbers of all cells, for the script.
fn cells_data(facts: &ReportFacts) -> Value {
    let groups = facts.map.groups.iter().map(|group| {
        let cells = group.cells.iter().map(|cell| map::figures(&cell.counts));
        let start = facts
            .single_region(group)
            .map(|region| region.start.to_string());
        json!({
            "name": label(&facts.group_name(group), 80),
            // A number of JavaScript is exact up to 2^53 only.
            "start": start,
            "cells": cells.collect::<Vec<_>>(),
        })
    });
    json!({
        "cell_pages": facts.map.cell_pages,
        "groups": groups.collect::<Vec<_>>(),
    })
}

/// Formats a duration for people.
fn duration(time: Duration) -> String {
    let nanos = time.as_nanos();
    let shown = |unit: u128, name: &dyn Display| {
        let tenths = nanos * 10 / unit;
        match (tenths % 10, tenths >= 1000) {
            (0, _) | (_, true) => format!("{} {name}", tenths / 10),
            (tenth, false) => format!("{}.{tenth} {name}", tenths / 10),
        }
    };
    match nanos {
        0 => "0".to_owned(),
        1..1000 => shown(1, &"ns"),
        1000..1_000_000 => shown(1000, &"\u{b5}s"),
        1_000_000..1_000_000_000 => shown(1_000_000, &"ms"),
        _ => shown(1_000_000_000, &"s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_the_unit_that_suits_them() {
        let nanos = [
            0,
            7,
            1500,
            999_949,
            12_000_000,
            3_250_000_000,
            250_000_000_000,
        ];
        let shown = nanos.map(|nanos| duration(Duration::from_nanos(nanos)));
        let expected = [
            "0",
            "7 ns",
            "1.5 \u{b5}s",
            "999 \u{b5}s",
            "12 ms",
            "3.2 s",
            "250 s",
        ];
        assert_eq!(shown, expected);
    }
}
