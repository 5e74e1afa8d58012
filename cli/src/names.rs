//! Names as the command prints them: escaped, so that a terminal cannot interpret them.

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;

pub(crate) use snapshot_format::names::{
    escape as stored, escape_path as path, escape_text as shown,
};

/// Shortens an escaped name to `limit` bytes. A hash at the end distinguishes two long names.
pub(crate) fn shortened(mut name: String, limit: usize) -> String {
    if name.len() <= limit {
        return name;
    }
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let end = format!("...{:016x}", hasher.finish());
    let mut cut = limit - end.len();
    while !name.is_char_boundary(cut) {
        cut -= 1;
    }
    name.truncate(cut);
    name + &end
}

/// Formats a path for JSON, which needs no escaping except for bytes that are not UTF-8.
pub(crate) fn exact(path: &Path) -> String {
    match path.to_str() {
        Some(text) => text.to_owned(),
        None => self::path(path),
    }
}

/// Escapes text of several lines, each as [`shown`] does.
pub(crate) fn shown_lines(text: &str) -> String {
    let lines: Vec<Cow<'_, str>> = text.split('\n').map(shown).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_cut_and_stay_different() {
        let [one, other] = ['a', 'b'].map(|end| "\u{e9}".repeat(3000) + &end.to_string());
        let [one, other] = [one, other].map(|name| shortened(name, 4096));
        assert_ne!(one, other);
        assert!(one.len() <= 4096 && one.len() > 4090, "{}", one.len());
        assert_eq!(shortened("short".into(), 4096), "short");
    }

    #[test]
    fn lines_stay_lines() {
        assert_eq!(shown_lines("a\u{1b}[2J\nb\r\n"), "a\\x1b[2J\nb\\x0d\n");
    }
}
