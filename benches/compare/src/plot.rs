//! Charts of the results, as hand-written SVG: bars with their spread, and curves of percentiles.

use std::fmt::Write as _;

use crate::report::{rows, short};
use crate::rounds::Samples;
use crate::stats::{Latencies, Spread};
use crate::workload::Workload;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 230.0;
const RIGHT: f64 = 90.0;
const BAR: f64 = 22.0;
const OURS: &str = "#1f6feb";
const OTHERS: &str = "#8c959f";
const LINES: [&str; 6] = [
    "#1f6feb", "#d29922", "#cf222e", "#2da44e", "#8250df", "#57606a",
];

/// Draws the total times of a workload's contenders: medians, with whiskers from the shortest to
/// the longest.
pub fn bars(samples: &Samples, workload: &Workload) -> String {
    let bars: Vec<(String, Spread)> = rows(samples, workload)
        .into_iter()
        .filter(|row| !row.contender.starts_with("limit:"))
        .map(|row| (row.contender, row.total_ms))
        .collect();
    let largest = bars
        .iter()
        .map(|(_, spread)| spread.max)
        .fold(0.0, f64::max);
    let smallest = bars
        .iter()
        .map(|(_, spread)| spread.min)
        .fold(f64::MAX, f64::min);
    // If the slowest takes a hundred times as long as the fastest, a linear axis shows only the
    // slowest.
    let log = largest > smallest * 30.0;
    let scale = |value: f64| {
        let part = if log {
            let from = (smallest / 2.0).max(1e-6).ln();
            (value.max(1e-6).ln() - from) / (largest.ln() - from)
        } else {
            value / largest
        };
        part.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    };
    let height = 64.0 + BAR * 1.5 * crate::stats::float(bars.len() as u64);
    let mut svg = head(height, &workload.title);
    for (place, (name, spread)) in (0_u32..).zip(&bars) {
        let y = 44.0 + BAR * 1.5 * f64::from(place);
        let colour = if name.starts_with("ours") || name.starts_with("serve") {
            OURS
        } else {
            OTHERS
        };
        let (median, low, high) = (scale(spread.median), scale(spread.min), scale(spread.max));
        let middle = y + BAR / 2.0;
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{median:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n\
             <path d=\"M{:.1} {middle:.1}H{:.1}\" stroke=\"#24292f\" stroke-width=\"2\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\">{} ms</text>",
            LEFT - 8.0,
            middle + 4.0,
            escaped(name),
            LEFT + low,
            LEFT + high,
            LEFT + high.max(median) + 6.0,
            middle + 4.0,
            short(spread.median),
        );
    }
    let axis = if log {
        "milliseconds, logarithmic"
    } else {
        "milliseconds"
    };
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#57606a\">{axis}; medians, whiskers from shortest to longest</text>",
        height - 8.0
    );
    svg + "</svg>\n"
}

/// Draws the percentiles of single touches in the first measured round; none if nothing was timed.
pub fn percentiles(samples: &Samples, workload: &Workload) -> Option<String> {
    let curves: Vec<(&str, &Latencies)> = samples
        .samples
        .iter()
        .filter(|sample| sample.round == 1 && sample.workload == workload.name)
        .filter_map(|sample| {
            Some((
                sample.contender.as_str(),
                sample.outcome.latencies.as_ref()?,
            ))
        })
        .filter(|(_, latencies)| latencies.curve.len() == 101)
        .collect();
    let largest = curves.iter().map(|(_, l)| l.p99).fold(f64::NAN, f64::max);
    let smallest = curves
        .iter()
        .map(|(_, l)| l.curve[1])
        .fold(f64::NAN, f64::min);
    if !(largest > smallest && smallest > 0.0) {
        return None;
    }
    let height = 420.0;
    let (top, bottom) = (44.0, height - 46.0);
    let place = |percent: f64, micros: f64| {
        let x = 60.0 + percent / 100.0 * (WIDTH - 280.0);
        let part = (micros.max(smallest).ln() - smallest.ln()) / (largest.ln() - smallest.ln());
        (x, bottom - part.clamp(0.0, 1.0) * (bottom - top))
    };
    let mut svg = head(height, &workload.title);
    let mut line = smallest;
    while line <= largest * 1.01 {
        let (_, y) = place(0.0, line);
        let _ = writeln!(
            svg,
            "<path d=\"M60 {y:.1}H{:.1}\" stroke=\"#d0d7de\"/><text x=\"54\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - 220.0,
            y + 4.0,
            short(line)
        );
        line *= 2.0;
    }
    for percent in [0.0, 25.0, 50.0, 75.0, 99.0] {
        let (x, _) = place(percent, smallest);
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">p{percent}</text>",
            bottom + 18.0
        );
    }
    for (number, (name, latencies)) in curves.iter().enumerate() {
        let colour = LINES[number % LINES.len()];
        let mut path = String::new();
        for (percent, micros) in (0_u32..=99).zip(&latencies.curve) {
            let (x, y) = place(f64::from(percent), *micros);
            let _ = write!(
                path,
                "{}{x:.1} {y:.1}",
                if percent == 0 { 'M' } else { 'L' }
            );
        }
        let y = top + 20.0 * crate::stats::float(number as u64) + 10.0;
        let x = WIDTH - 205.0;
        let _ = writeln!(
            svg,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n\
             <rect x=\"{x}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
            y - 10.0,
            x + 18.0,
            escaped(name)
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"60\" y=\"{:.1}\" fill=\"#57606a\">microseconds of one touch, logarithmic, by percentile</text>",
        height - 8.0
    );
    Some(svg + "</svg>\n")
}

fn head(height: f64, title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#24292f\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{}</text>\n",
        escaped(title)
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_the_picture() {
        assert_eq!(escaped("a<b>&c"), "a&lt;b&gt;&amp;c");
        assert!(head(10.0, "x & y").contains("x &amp; y"));
    }
}
