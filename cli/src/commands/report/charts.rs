//! Bars, curves and scatter plots, each with a description, and a table behind it.
//!
//! Coordinates are integers in a box of 4000 by 2000.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use indicatif::{BinaryBytes, HumanCount};

use super::facts::{PLOT_COLUMNS, PLOT_ROWS};
use super::html::{Column, folded_table, text};

const WIDTH: u64 = 4000;
const HEIGHT: u64 = 2000;
/// The area of the data. A label such as "1023.99 MiB" fits to its left.
const LEFT: u64 = 820;
const RIGHT: u64 = 3960;
const TOP: u64 = 60;
const BOTTOM: u64 = 1760;

/// The text of a chart.
pub(super) struct Chart<'a> {
    /// The end of the names of its elements.
    pub(super) id: &'a str,
    pub(super) title: &'a str,
    /// A description in words.
    pub(super) description: &'a str,
    /// Labels below the axis: at its start and at its end.
    pub(super) ends: (String, String),
    /// Format of the values.
    pub(super) shown: fn(u64) -> String,
}

/// Formats a value that is a number of things.
pub(super) fn number(value: u64) -> String {
    HumanCount(value).to_string()
}

/// Formats a value that is a number of bytes.
pub(super) fn bytes(value: u64) -> String {
    BinaryBytes(value).to_string()
}

/// A part of each bar: its class, its name, and its heights.
pub(super) struct Series<'a> {
    pub(super) class: &'a str,
    pub(super) name: &'static str,
    pub(super) values: Vec<u64>,
}

/// Scales `value` of 0 to `max` to 0 to `length`.
fn scale(value: u64, max: u64, length: u64) -> u64 {
    let scaled = u128::from(value.min(max)) * u128::from(length) / u128::from(max.max(1));
    u64::try_from(scaled).unwrap_or(length)
}

impl Chart<'_> {
    fn begin(&self, out: &mut String) -> fmt::Result {
        let Self { id, title, .. } = self;
        write!(
            out,
            "<figure class=\"chart\"><figcaption>{1}</figcaption>\
             <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             aria-labelledby=\"ct-{0} cd-{0}\"><title id=\"ct-{0}\">{1}</title>\
             <desc id=\"cd-{0}\">{2}</desc>",
            id,
            text(title),
            text(self.description)
        )
    }

    /// Draws the axes, with the largest value and the ends of the horizontal axis.
    fn axes(&self, out: &mut String, highest: &str, lowest: &str) -> fmt::Result {
        let (start, end) = &self.ends;
        let below = BOTTOM + 150;
        write!(
            out,
            "<path class=\"axis\" d=\"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}\"/>\
             <text x=\"{x}\" y=\"{y}\" text-anchor=\"end\">{}</text>\
             <text x=\"{x}\" y=\"{BOTTOM}\" text-anchor=\"end\">{}</text>\
             <text x=\"{LEFT}\" y=\"{below}\">{}</text>\
             <text x=\"{RIGHT}\" y=\"{below}\" text-anchor=\"end\">{}</text>",
            text(highest),
            text(lowest),
            text(start),
            text(end),
            x = LEFT - 40,
            y = TOP + 80,
        )
    }

    /// Draws bars, each the sum of its parts. `labels` are those of the bars.
    pub(super) fn bars(
        &self,
        out: &mut String,
        labels: &[String],
        label_name: &'static str,
        series: &[Series<'_>],
    ) -> fmt::Result {
        self.begin(out)?;
        let bars = labels.len().max(1) as u64;
        let height = |bar: usize| series.iter().map(|part| part.values[bar]).sum::<u64>();
        let max = (0..labels.len()).map(height).max().unwrap_or(0);
        let width = (RIGHT - LEFT) / bars;
        // A gap between bars, unless there are many.
        let drawn = width.saturating_sub(width / 8).clamp(1, 400);
        for (bar, label) in labels.iter().enumerate() {
            if height(bar) == 0 {
                continue;
            }
            let x = LEFT + scale(bar as u64, bars, RIGHT - LEFT) + 6;
            write!(out, "<g><title>{}", text(label))?;
            for part in series.iter().filter(|part| part.values[bar] > 0) {
                let shown = (self.shown)(part.values[bar]);
                write!(out, ", {}: {}", text(part.name), text(shown))?;
            }
            out.write_str("</title>")?;
            let mut below = 0;
            for part in series {
                let value = part.values[bar];
                let from = scale(below, max, BOTTOM - TOP);
                below += value;
                let to = scale(below, max, BOTTOM - TOP);
                // Even a single fault among a million is seen.
                let tall = if value > 0 { (to - from).max(12) } else { 0 };
                if tall > 0 {
                    let y = BOTTOM - from - tall;
                    write!(out, "<path class=\"{}\" ", part.class)?;
                    write!(out, "d=\"M{x} {y}h{drawn}v{tall}h-{drawn}z\"/>")?;
                }
            }
            out.write_str("</g>")?;
        }
        self.axes(out, &(self.shown)(max), "0")?;
        out.write_str("</svg>")?;
        if series.len() > 1 {
            legend(out, series.iter().map(|part| (part.class, part.name)))?;
        }
        let names = series.iter().map(|part| Column::Number(part.name));
        let columns: Vec<_> = [Column::Name(label_name)]
            .into_iter()
            .chain(names)
            .collect();
        let rows = labels.iter().enumerate().map(|(bar, label)| {
            let values = series.iter().map(|part| part.values[bar]);
            let values = values.map(self.shown);
            [label.clone()].into_iter().chain(values).collect()
        });
        folded_table(out, self.title, &columns, rows)?;
        out.write_str("</figure>")
    }

    /// Draws a curve through points of time and number, both rising. `label` formats a time.
    pub(super) fn curve(
        &self,
        out: &mut String,
        points: &[(u64, u64)],
        names: (&'static str, &'static str),
        label: impl Fn(u64) -> String,
    ) -> fmt::Result {
        self.begin(out)?;
        let (max_x, max_y) = points.last().copied().unwrap_or_default();
        let mut line = String::new();
        for (number, (x, y)) in points.iter().enumerate() {
            let x = LEFT + scale(*x, max_x, RIGHT - LEFT);
            let y = BOTTOM - scale(*y, max_y, BOTTOM - TOP);
            let step = if number == 0 { "M" } else { "L" };
            write!(line, "{step}{x} {y}")?;
        }
        write!(
            out,
            "<path class=\"area\" d=\"{line}V{BOTTOM}H{LEFT}z\"/><path class=\"line\" d=\"{line}\"/>"
        )?;
        self.axes(out, &(self.shown)(max_y), "0")?;
        out.write_str("</svg>")?;
        let columns = [Column::Number(names.0), Column::Number(names.1)];
        let rows = points.iter();
        let rows = rows.map(|(x, y)| vec![label(*x), (self.shown)(*y)]);
        folded_table(out, self.title, &columns, rows)?;
        out.write_str("</figure>")
    }

    /// Draws how many points lie in each field of a grid.
    pub(super) fn scatter(
        &self,
        out: &mut String,
        fields: &BTreeMap<(usize, usize), u64>,
        (row_name, row_label): (&'static str, impl Fn(usize) -> String),
        vertical: (&str, &str),
    ) -> fmt::Result {
        self.begin(out)?;
        let (columns, rows) = (PLOT_COLUMNS as u64, PLOT_ROWS as u64);
        let max = fields.values().copied().max().unwrap_or(1);
        let mut paths: [String; 3] = Default::default();
        // Few, some, many: from a twentieth and from a third of the largest number on.
        let from = [1, max.div_ceil(20), max.div_ceil(3), max + 1];
        for (&(column, row), &points) in fields {
            let class = (1..3).rev().find(|class| points >= from[*class]);
            let class = class.unwrap_or(0);
            let edge = |column: u64| LEFT + scale(column, columns, RIGHT - LEFT);
            let (x, right) = (edge(column as u64), edge(column as u64 + 1));
            let level = |row: u64| BOTTOM - scale(row, rows, BOTTOM - TOP);
            let (y, low) = (level(row as u64 + 1), level(row as u64));
            let (wide, tall) = (right - x, low - y);
            write!(paths[class], "M{x} {y}h{wide}v{tall}h-{wide}z")?;
        }
        let mut shades = Vec::new();
        for (class, path) in paths
            .iter()
            .enumerate()
            .filter(|(_, path)| !path.is_empty())
        {
            write!(out, "<path class=\"p{class}\" d=\"{path}\"/>")?;
            let range = match (from[class], from[class + 1] - 1) {
                (low, high) if low == high => (self.shown)(low),
                (low, high) => format!("{} to {}", (self.shown)(low), (self.shown)(high)),
            };
            shades.push((format!("p{class}"), format!("{range} at one place")));
        }
        self.axes(out, vertical.0, vertical.1)?;
        out.write_str("</svg>")?;
        legend(
            out,
            shades.iter().map(|(class, name)| (&class[..], &name[..])),
        )?;
        let mut by_row = BTreeMap::<usize, u64>::new();
        for ((_, row), points) in fields {
            *by_row.entry(*row).or_default() += points;
        }
        let rows = by_row.iter();
        let rows = rows.map(|(row, points)| vec![row_label(*row), (self.shown)(*points)]);
        let columns = [Column::Name(row_name), Column::Number("first touches")];
        folded_table(out, self.title, &columns, rows)?;
        out.write_str("</figure>")
    }
}

/// Writes the meaning of colors, each given by its class.
fn legend<'a>(out: &mut String, entries: impl Iterator<Item = (&'a str, &'a str)>) -> fmt::Result {
    out.write_str("<ul class=\"legend\">")?;
    for (class, name) in entries {
        write!(
            out,
            "<li><svg viewBox=\"0 0 20 20\" aria-hidden=\"true\"><rect width=\"20\" height=\"20\" \
             class=\"{class}\"/></svg>{}</li>",
            text(name)
        )?;
    }
    out.write_str("</ul>")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> Chart<'static> {
        Chart {
            id: "x",
            title: "title",
            description: "description",
            ends: ("a".into(), "b".into()),
            shown: number,
        }
    }

    #[test]
    fn scale_covers_the_whole_length_and_does_not_overflow() {
        assert_eq!(scale(0, 0, 100), 0);
        assert_eq!(scale(7, 7, 100), 100);
        assert_eq!(scale(u64::MAX, u64::MAX, 4000), 4000);
        assert_eq!(scale(9, 7, 100), 100);
    }

    #[test]
    fn single_count_is_seen_beside_a_million() {
        let chart = chart();
        let mut out = String::new();
        let series = Series {
            class: "c",
            name: "count",
            values: vec![1_000_000, 1, 0],
        };
        let labels = ["one", "two", "three"].map(str::to_owned);
        chart.bars(&mut out, &labels, "bar", &[series]).unwrap();
        assert_eq!(out.matches("<path class=\"c\"").count(), 2, "{out}");
        assert!(out.contains("two, count: 1<"), "{out}");
        assert!(out.contains("<td>three</td>"), "{out}");
    }

    #[test]
    fn shades_of_a_scatter_plot_are_explained() {
        let chart = chart();
        let plot = |counts: &[u64]| {
            let mut out = String::new();
            let fields = (0..)
                .zip(counts)
                .map(|(column, count)| ((column, 0), *count));
            let row = ("row", |row: usize| row.to_string());
            chart
                .scatter(&mut out, &fields.collect(), row, ("high", "low"))
                .unwrap();
            let (_, legend) = out.split_once("legend").unwrap();
            let (legend, _) = legend.split_once("</ul>").unwrap();
            let entries = legend.split("</svg>").skip(1);
            let names = entries.map(|entry| entry.split_once('<').unwrap().0.to_owned());
            names.collect::<Vec<_>>()
        };
        let all = ["1 to 4", "5 to 33", "34 to 100"];
        let all = all.map(|range| format!("{range} at one place"));
        assert_eq!(plot(&[100, 34, 33, 5, 4, 1]), all);
        assert_eq!(plot(&[1, 1]), ["1 at one place"]);
        assert_eq!(
            plot(&[9, 1]),
            ["1 to 2 at one place", "3 to 9 at one place"]
        );
    }
}
