//! Elements of a page.

use std::fmt::{self, Display, Write};

use crate::names;

/// Maximum length of a name or value on the page, in bytes.
const MAX_TEXT_BYTES: usize = 400;
/// Maximum number of rows of a table.
pub(super) const MAX_ROWS: usize = 400;

/// Text that is escaped for the content of an element and for an attribute in double quotes.
struct Escaped<T>(T);

/// A writer that escapes what passes through it.
struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            match character {
                '&' => self.0.write_str("&amp;")?,
                '<' => self.0.write_str("&lt;")?,
                '>' => self.0.write_str("&gt;")?,
                '"' => self.0.write_str("&quot;")?,
                '\'' => self.0.write_str("&#39;")?,
                other => self.0.write_char(other)?,
            }
        }
        Ok(())
    }
}

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{}", self.0)
    }
}

/// Returns text, such as a number with its unit, in escaped form.
pub(super) fn text(text: impl Display) -> impl Display {
    Escaped(text)
}

/// Returns text that comes from a file in escaped form: without control characters, and not longer
/// than a page can show.
pub(super) fn foreign(text: &str) -> impl Display + use<> {
    let shown = names::shown(text).into_owned();
    Escaped(names::shortened(shown, MAX_TEXT_BYTES))
}

/// Returns text that comes from a file as a label of at most `characters` characters. The label of
/// a path is the name of its file. The caller must still escape it with [`text`].
pub(super) fn label(name: &str, characters: usize) -> String {
    let name = names::shown(name);
    let file = name.rsplit('/').next().filter(|file| !file.is_empty());
    let name = file.unwrap_or(&name);
    if name.chars().count() <= characters {
        return name.to_owned();
    }
    let begin: String = name.chars().take(characters - 1).collect();
    format!("{begin}\u{2026}")
}

/// Returns a JSON value as the content of a `script` element, in which `<` could end the element.
pub(super) fn json(value: &serde_json::Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

/// Writes one number with its label. The page's data and `data-value` have the number itself.
pub(super) fn figure(
    out: &mut String,
    key: &str,
    label: &str,
    value: u64,
    shown: impl Display,
) -> fmt::Result {
    write!(
        out,
        "<div><dt>{}</dt><dd data-figure=\"{}\" data-value=\"{value}\">{}</dd></div>",
        text(label),
        text(key),
        text(shown)
    )
}

/// A column of a table.
#[derive(Clone, Copy, Debug)]
pub(super) enum Column {
    /// Text from a file.
    Name(&'static str),
    /// A number, right-aligned.
    Number(&'static str),
}

/// Writes a table of at most [`MAX_ROWS`] rows; a last line says how many were left out.
pub(super) fn table(
    out: &mut String,
    caption: &str,
    columns: &[Column],
    rows: impl IntoIterator<Item = Vec<String>>,
) -> fmt::Result {
    write!(
        out,
        "<div class=\"scroll\" role=\"region\" tabindex=\"0\" aria-label=\"{0}\">\
         <table><caption>{0}</caption><thead><tr>",
        text(caption)
    )?;
    for column in columns {
        let (class, name) = match column {
            Column::Name(name) => ("", name),
            Column::Number(name) => (" class=\"n\"", name),
        };
        write!(out, "<th scope=\"col\"{class}>{}</th>", text(name))?;
    }
    out.write_str("</tr></thead><tbody>")?;
    let mut left_out = 0;
    for (number, row) in rows.into_iter().enumerate() {
        if number >= MAX_ROWS {
            left_out += 1;
            continue;
        }
        out.write_str("<tr>")?;
        for (column, cell) in columns.iter().zip(row) {
            match column {
                Column::Name(_) => write!(out, "<td>{}</td>", foreign(&cell))?,
                Column::Number(_) => write!(out, "<td class=\"n\">{}</td>", text(cell))?,
            }
        }
        out.write_str("</tr>")?;
    }
    out.write_str("</tbody></table></div>")?;
    if left_out > 0 {
        write!(out, "<p class=\"note\">... and {left_out} more rows</p>")?;
    }
    Ok(())
}

/// Writes a table that is folded up behind a picture.
pub(super) fn folded_table(
    out: &mut String,
    caption: &str,
    columns: &[Column],
    rows: impl IntoIterator<Item = Vec<String>>,
) -> fmt::Result {
    out.write_str("<details><summary>Data</summary>")?;
    table(out, caption, columns, rows)?;
    out.write_str("</details>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_stays_text() {
        let hostile = "</title><script>alert(\"x\")</script>'&\u{202e}\u{0}";
        let escaped = foreign(hostile).to_string();
        assert_eq!(
            escaped,
            "&lt;/title&gt;&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&#39;&amp;\
             \\u{202e}\\x00"
        );
        let long = foreign(&"<".repeat(5000)).to_string();
        assert!(long.len() < 4 * MAX_TEXT_BYTES + 100, "{}", long.len());
        let json = json(&serde_json::json!({ "a": "</script><!--" }));
        assert!(!json.contains('<'), "{json}");
        let back: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(back["a"], "</script><!--");
    }

    #[test]
    fn table_says_how_many_rows_it_left_out() {
        let mut out = String::new();
        let rows = (0..MAX_ROWS + 3).map(|n| vec![n.to_string()]);
        table(&mut out, "numbers", &[Column::Number("number")], rows).unwrap();
        assert_eq!(out.matches("<tr>").count(), 1 + MAX_ROWS);
        assert!(out.contains("... and 3 more rows"), "{out}");
    }

    #[test]
    fn label_is_the_beginning_of_a_file_name() {
        let path = "/usr/lib/libcrypto.so.3";
        assert_eq!(label(path, 14), "libcrypto.so.3");
        assert_eq!(label(path, 10), "libcrypto\u{2026}");
        assert_eq!(
            (&label("[heap]", 10)[..], &label("/", 10)[..]),
            ("[heap]", "/")
        );
    }
}
