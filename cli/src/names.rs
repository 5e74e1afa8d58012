//! Names as a snapshot can hold them and a terminal can show them.
//!
//! A name of a file or a process is any bytes. A snapshot's names are UTF-8 without control
//! characters, and a terminal obeys control characters. Both get an escaped form, from which the
//! bytes can be had back: two different names stay different.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Escapes a name for a snapshot: `\xNN` is a byte that is no UTF-8 or a control character,
/// `\u{N}` another character that [`shown`] would escape, and `\\` a backslash.
pub(crate) fn stored(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character == '\\' {
                text.push_str("\\\\");
            } else {
                push_shown(&mut text, character);
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// Shortens an escaped name to `limit` bytes. The hash at the end keeps two long names apart.
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

/// A path in a message.
pub(crate) fn path(path: &Path) -> String {
    stored(path.as_os_str().as_bytes())
}

/// A path in JSON, where nothing needs to be escaped but bytes that are no UTF-8.
pub(crate) fn exact(path: &Path) -> String {
    match path.to_str() {
        Some(text) => text.to_owned(),
        None => self::path(path),
    }
}

/// Text as it can be shown: whatever a terminal could take for more than a letter is escaped.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    escaped(text, is_hidden)
}

/// As [`shown`], for text of several lines.
pub(crate) fn shown_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |character| character != '\n' && is_hidden(character))
}

fn escaped(text: &str, hidden: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&hidden) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        if hidden(character) {
            push_shown(&mut escaped, character);
        } else {
            escaped.push(character);
        }
    }
    Cow::Owned(escaped)
}

fn push_shown(text: &mut String, character: char) {
    let number = u32::from(character);
    let _ = match is_hidden(character) {
        false => text.write_char(character),
        true if number < 0x80 => write!(text, "\\x{number:02x}"),
        true => write!(text, "\\u{{{number:x}}}"),
    };
}

/// Whether a character moves the cursor, ends a line, or changes the order of its neighbours.
fn is_hidden(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Takes an escaped name back to its bytes.
    fn bytes_of(name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut rest = name;
        while let Some((before, after)) = rest.split_once('\\') {
            bytes.extend(before.as_bytes());
            if let Some(after) = after.strip_prefix('\\') {
                bytes.push(b'\\');
                rest = after;
            } else if let Some(after) = after.strip_prefix('x') {
                bytes.push(u8::from_str_radix(&after[..2], 16).unwrap());
                rest = &after[2..];
            } else {
                let (number, after) = after[2..].split_once('}').unwrap();
                let number = u32::from_str_radix(number, 16).unwrap();
                bytes.extend(char::from_u32(number).unwrap().to_string().as_bytes());
                rest = after;
            }
        }
        bytes.extend(rest.as_bytes());
        bytes
    }

    #[test]
    fn escaped_names_differ_as_the_names_do() {
        let names: [&[u8]; 10] = [
            b"/lib/libc.so.6",
            b"/tmp/a\x1b[31m",
            b"/tmp/a\\x1b[31m",
            b"/tmp/a\\\\x1b[31m",
            b"/tmp/\xff",
            b"/tmp/\xfe",
            b"/tmp/\\xff",
            "/tmp/\u{ff}".as_bytes(),
            "/tmp/\u{85}\u{202e}".as_bytes(),
            b"a\nb\tc\x7f",
        ];
        let stored: Vec<String> = names.iter().map(|name| stored(name)).collect();
        assert_eq!(stored.iter().collect::<HashSet<_>>().len(), names.len());
        for (name, stored) in names.iter().zip(&stored) {
            assert_eq!(bytes_of(stored), *name, "{stored}");
            assert!(!stored.contains(is_hidden), "{stored}");
            assert_eq!(shown(stored), *stored);
        }
        assert_eq!(stored[1], "/tmp/a\\x1b[31m");
        assert_eq!(stored[4], "/tmp/\\xff");
    }

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
        assert_eq!(shown("a\nb"), "a\\x0ab");
    }
}
