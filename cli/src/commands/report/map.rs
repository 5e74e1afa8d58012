//! The picture of the memory: one SVG for each group of regions, with a view for each question.
//!
//! The views are layers of the same SVG, of which the style sheet shows the chosen one. Cells are
//! drawn by one path for each row and class, which keeps a page of thousands of cells small.

use std::fmt::{self, Write as _};

use indicatif::{BinaryBytes, HumanCount};
use snapshot_format::layout::PAGE_SIZE_U64;

use super::facts::ReportFacts;
use super::html::{Column, folded_table, foreign, label, text};
use crate::map::{Cell, Counts, Group};
use crate::output::percent;

/// Cells in a row.
const COLUMNS: usize = 64;
/// Length of a cell's side, and the part of it that is drawn.
const SIDE: u64 = 20;
const DRAWN: u64 = 18;
/// Maximum number of ancestors with a colour of their own.
pub(super) const MAX_COLOURED_LAYERS: usize = 5;

/// A way to colour the cells.
struct View {
    /// The end of the names of classes and elements.
    name: &'static str,
    label: &'static str,
    /// CSS classes with their meaning.
    legend: Vec<(&'static str, String)>,
}

/// Returns the shares of a cell's classes, as numbers of pages.
fn shares(view: &str, cell: &Cell, layers: &[u16]) -> Vec<(&'static str, u64)> {
    let counts = &cell.counts;
    match view {
        "kind" => vec![
            ("k-stored", counts.stored),
            ("k-ancestor", counts.ancestor),
            ("k-duplicate", counts.duplicate),
            ("k-fill", counts.fill),
            ("k-unavailable", counts.unavailable),
            ("k-zero", counts.zero),
        ],
        "ratio" => {
            let class = ratio_class(counts);
            vec![(class, counts.pages())]
        }
        "layer" => {
            let mut shares: Vec<(&'static str, u64)> = Vec::new();
            for (layer, pages) in &cell.layers {
                let place = layers.iter().position(|known| known == layer);
                let class = LAYER_CLASSES[place.unwrap_or(LAYER_CLASSES.len() - 1)];
                shares.push((class, *pages));
            }
            shares.push(("k-zero", counts.pages() - counts.in_frames()));
            shares
        }
        _ => vec![
            ("k-hot", counts.hot),
            (
                "k-cold",
                counts.in_frames().saturating_sub(counts.hot_in_frames),
            ),
            (
                "k-zero",
                (counts.pages() - counts.in_frames()) - (counts.hot - counts.hot_in_frames),
            ),
        ],
    }
}

/// The classes of the file itself, of the ancestors that hold most pages, and of all others.
const LAYER_CLASSES: [&str; MAX_COLOURED_LAYERS + 2] = ["l0", "l1", "l2", "l3", "l4", "l5", "l9"];

/// Classes of a cell's compression with their upper limits, in tenths.
const RATIO_CLASSES: [(&str, u64, &str); 5] = [
    ("r0", 12, "below 1.2"),
    ("r1", 20, "1.2 to 2"),
    ("r2", 40, "2 to 4"),
    ("r3", 80, "4 to 8"),
    ("r4", u64::MAX, "8 and more"),
];

fn ratio_class(counts: &Counts) -> &'static str {
    let (decoded, stored) = (counts.distinct * PAGE_SIZE_U64, counts.stored_bytes());
    if stored == 0 {
        return "k-zero";
    }
    let tenths = decoded.saturating_mul(10) / stored;
    let class = RATIO_CLASSES.iter().find(|(_, limit, _)| tenths < *limit);
    class.map_or("r4", |(class, ..)| class)
}

/// Writes the map with its views, legends and table.
pub(super) fn write(out: &mut String, facts: &ReportFacts) -> fmt::Result {
    let views = views(facts);
    out.write_str("<div class=\"views\">")?;
    for (number, view) in views.iter().enumerate() {
        let checked = if number == 0 { " checked" } else { "" };
        write!(
            out,
            "<input type=\"radio\" name=\"view\" id=\"view-{0}\"{checked}>\
             <label for=\"view-{0}\">{1}</label>",
            view.name, view.label
        )?;
    }
    for view in &views {
        write!(out, "<ul class=\"legend v v-{}\">", view.name)?;
        for (class, meaning) in &view.legend {
            write!(out, "<li><svg viewBox=\"0 0 20 20\" aria-hidden=\"true\">")?;
            write!(
                out,
                "<rect width=\"20\" height=\"20\" class=\"{class}\"/></svg>"
            )?;
            write!(out, "{}</li>", text(meaning))?;
        }
        out.write_str("</ul>")?;
    }
    let bytes = facts.map.cell_pages * PAGE_SIZE_U64;
    write!(
        out,
        "<p class=\"note\">Each cell shows {} of memory ({}), in the order of addresses from left \
         to right and top to bottom; a full row is {}. The colours of a mixed cell show the shares \
         of its pages.</p>",
        text(BinaryBytes(bytes)),
        text(crate::output::count(facts.map.cell_pages, "page")),
        text(BinaryBytes(bytes * COLUMNS as u64))
    )?;
    out.write_str(
        "<output id=\"cell\" class=\"readout\" hidden>Point at a cell, or focus the map and use the \
         arrow keys.</output>",
    )?;
    out.write_str("<div class=\"map\" id=\"map\">")?;
    for (number, group) in facts.map.groups.iter().enumerate() {
        write_group(out, facts, &views, number, group)?;
    }
    out.write_str("</div></div>")?;
    write_table(out, facts)
}

fn views(facts: &ReportFacts) -> Vec<View> {
    let total = &facts.map.total;
    let mut kinds = Vec::new();
    let mut add = |class, pages: u64, what: &str| {
        if pages > 0 {
            let share = percent(pages, total.pages());
            kinds.push((class, format!("{what}: {} ({share})", HumanCount(pages))));
        }
    };
    add("k-stored", total.stored, "stored");
    add("k-ancestor", total.ancestor, "stored in ancestors");
    add(
        "k-duplicate",
        total.duplicate,
        "identical to an earlier page",
    );
    add("k-fill", total.fill, "other fill");
    add("k-zero", total.zero, "zero");
    add("k-unavailable", total.unavailable, "unavailable");
    if total.hot > 0 {
        add("k-hot", total.hot, "hot (square)");
    }
    let mut views = vec![View {
        name: "kind",
        label: "Content",
        legend: kinds,
    }];
    let none = ("k-zero", "nothing stored".to_owned());
    let ratios = RATIO_CLASSES.iter();
    let ratios = ratios.map(|(class, _, label)| (*class, format!("{label} times smaller")));
    views.push(View {
        name: "ratio",
        label: "Compression",
        legend: ratios.chain([none.clone()]).collect(),
    });
    if facts.map.layers.len() > 1 {
        let mut legend: Vec<_> = (0..)
            .zip(&facts.shown_layers)
            .map(|(number, &layer): (usize, &u16)| {
                let pages = HumanCount(facts.map.layers[usize::from(layer)]);
                let name = facts.layer_name(layer);
                (LAYER_CLASSES[number], format!("{name}: {pages}"))
            })
            .collect();
        if facts.map.layers.len() > facts.shown_layers.len() {
            legend.push(("l9", "other ancestors".to_owned()));
        }
        legend.push(none.clone());
        views.push(View {
            name: "layer",
            label: "Layers",
            legend,
        });
    }
    if total.hot > 0 {
        views.push(View {
            name: "hot",
            label: "Working set",
            legend: vec![
                ("k-hot", "hot".to_owned()),
                ("k-cold", "other stored pages".to_owned()),
                none,
            ],
        });
    }
    views
}

fn write_group(
    out: &mut String,
    facts: &ReportFacts,
    views: &[View],
    number: usize,
    group: &Group,
) -> fmt::Result {
    let columns = group.cells.len().min(COLUMNS);
    let rows = group.cells.len().div_ceil(COLUMNS);
    let class = if columns == COLUMNS { " wide" } else { "" };
    write!(
        out,
        "<figure class=\"group{class}\" style=\"--columns:{columns}\"><figcaption>"
    )?;
    let name = facts.group_name(group);
    let short = label(&name, if class.is_empty() { 22 } else { 100 });
    write!(out, "<b title=\"{}\">{}</b> ", foreign(&name), text(short))?;
    if let Some(region) = facts.single_region(group) {
        let end = region.start.saturating_add(region.bytes);
        write!(out, "<code>{:#x}", region.start)?;
        if !class.is_empty() {
            write!(out, "\u{2013}{end:#x}")?;
        }
        out.write_str("</code> ")?;
    }
    write!(
        out,
        "<span>{}</span></figcaption>",
        text(BinaryBytes(group.pages * PAGE_SIZE_U64))
    )?;
    let (width, height) = (columns as u64 * SIDE, rows as u64 * SIDE);
    write!(
        out,
        "<svg class=\"cells\" data-group=\"{number}\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-labelledby=\"t{number} d{number}\"><title id=\"t{number}\">Map of {}</title>\
         <desc id=\"d{number}\">{}</desc>",
        foreign(&name),
        text(sentence(&sum(&group.cells)))
    )?;
    for view in views {
        write!(out, "<g class=\"v v-{}\">", view.name)?;
        for (row, cells) in group.cells.chunks(COLUMNS).enumerate() {
            write_row(out, facts, view.name, row as u64, cells)?;
        }
        out.write_str("</g>")?;
    }
    out.write_str("</svg></figure>")
}

/// Writes the cells of one row: a path for each class.
fn write_row(
    out: &mut String,
    facts: &ReportFacts,
    view: &str,
    row: u64,
    cells: &[Cell],
) -> fmt::Result {
    let mut paths: Vec<(&'static str, String)> = Vec::new();
    let mut path = |class, x: u64, y: u64, width: u64, height: u64| {
        let place = paths.iter().position(|(known, _)| *known == class);
        let place = place.unwrap_or_else(|| {
            paths.push((class, String::new()));
            paths.len() - 1
        });
        write!(paths[place].1, "M{x} {y}h{width}v{height}h-{width}z")
    };
    let top = row * SIDE + 1;
    for (column, cell) in (0..).zip(cells) {
        let x = column * SIDE + 1;
        let shares = shares(view, cell, &facts.shown_layers);
        // The last share is at the bottom.
        let mut y = top;
        for (class, height) in divide(&shares) {
            path(class, x, y, DRAWN, height)?;
            y += height;
        }
        if view == "kind" && cell.counts.hot > 0 {
            let side = hot_side(&cell.counts);
            let margin = (DRAWN - side) / 2;
            path("k-hot", x + margin, top + margin, side, side)?;
        }
    }
    // Squares are above everything else.
    paths.sort_by_key(|(class, _)| *class == "k-hot");
    for (class, path) in &paths {
        write!(out, "<path class=\"{class}\" d=\"{path}\"/>")?;
    }
    Ok(())
}

/// Returns the side of the square that shows the share of hot pages.
fn hot_side(counts: &Counts) -> u64 {
    let area = counts.hot * (DRAWN - 4) * (DRAWN - 4) / counts.pages().max(1);
    // Even numbers are centred.
    (area.isqrt() / 2 * 2).clamp(6, DRAWN - 4)
}

/// Divides the height of a cell among classes by their shares. Each class that has a page gets some
/// of it.
fn divide(shares: &[(&'static str, u64)]) -> Vec<(&'static str, u64)> {
    let total: u64 = shares.iter().map(|(_, pages)| pages).sum();
    let present = shares.iter().filter(|(_, pages)| *pages > 0);
    let mut heights: Vec<(&'static str, u64)> = present
        .map(|(class, pages)| {
            let height = u128::from(*pages) * u128::from(DRAWN) / u128::from(total.max(1));
            (*class, u64::try_from(height).unwrap_or(DRAWN).max(1))
        })
        .collect();
    loop {
        let sum: u64 = heights.iter().map(|(_, height)| height).sum();
        let Some(largest) = heights.iter_mut().max_by_key(|(_, height)| *height) else {
            return heights;
        };
        if sum <= DRAWN {
            largest.1 += DRAWN - sum;
            return heights;
        }
        largest.1 -= 1;
    }
}

/// Returns the numbers of a cell, in the order of the table and of the page's data.
pub(super) fn figures(counts: &Counts) -> [u64; 8] {
    [
        counts.zero,
        counts.fill,
        counts.stored,
        counts.duplicate,
        counts.ancestor,
        counts.unavailable,
        counts.hot,
        counts.stored_bytes(),
    ]
}

/// Returns the sum of all cells.
fn sum(cells: &[Cell]) -> Counts {
    let mut sum = Counts::default();
    for cell in cells {
        sum += &cell.counts;
    }
    sum
}

/// Describes pages in words.
fn sentence(counts: &Counts) -> String {
    let kinds = [
        (counts.stored, "stored"),
        (counts.ancestor, "stored in ancestors"),
        (counts.duplicate, "identical to an earlier page"),
        (counts.fill, "other fill"),
        (counts.zero, "zero"),
        (counts.unavailable, "unavailable"),
        (counts.hot, "hot"),
    ];
    let mut text = format!("{} pages", HumanCount(counts.pages()));
    for (pages, what) in kinds.into_iter().filter(|(pages, _)| *pages > 0) {
        let _ = write!(text, ", {} {what}", percent(pages, counts.pages()));
    }
    text
}

/// Writes the numbers behind the map: a line for each row of cells.
fn write_table(out: &mut String, facts: &ReportFacts) -> fmt::Result {
    let rows = facts.map.groups.iter().flat_map(|group| {
        let name = facts.group_name(group);
        let start = facts.single_region(group).map(|region| region.start);
        let row_bytes = COLUMNS as u64 * facts.map.cell_pages * PAGE_SIZE_U64;
        (0..)
            .zip(group.cells.chunks(COLUMNS))
            .map(move |(row, cells)| {
                let counts = sum(cells);
                let start = start.map(|start| start.saturating_add(row * row_bytes));
                let first = [
                    name.clone(),
                    start.map_or(String::new(), |at| format!("{at:#x}")),
                ];
                let numbers = [counts.pages()].into_iter().chain(figures(&counts));
                let numbers = numbers.map(|number| HumanCount(number).to_string());
                first.into_iter().chain(numbers).collect()
            })
    });
    folded_table(
        out,
        "Pages by address, one line for each row of cells",
        &[
            Column::Name("region"),
            Column::Number("from"),
            Column::Number("pages"),
            Column::Number("zero"),
            Column::Number("other fill"),
            Column::Number("stored"),
            Column::Number("identical"),
            Column::Number("in ancestors"),
            Column::Number("unavailable"),
            Column::Number("hot"),
            Column::Number("bytes in file"),
        ],
        rows,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heights_fill_the_cell_and_show_every_class() {
        for shares in [
            vec![("a", 1)],
            vec![("a", 1), ("b", 1_000_000)],
            vec![("a", 0), ("b", 5), ("c", 5)],
            vec![("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 500), ("f", 1)],
            vec![("a", u64::MAX / 2), ("b", 1)],
        ] {
            let heights = divide(&shares);
            let sum: u64 = heights.iter().map(|(_, height)| height).sum();
            assert_eq!(sum, DRAWN, "{shares:?}");
            assert!(heights.iter().all(|(_, height)| *height > 0), "{shares:?}");
            let present = shares.iter().filter(|(_, pages)| *pages > 0).count();
            assert_eq!(heights.len(), present);
        }
        assert_eq!(divide(&[("a", 0)]), []);
    }
}
