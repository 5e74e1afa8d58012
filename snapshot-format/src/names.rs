//! Conversion of names to a form that a snapshot can store and a terminal can show safely.
//!
//! Names of files and processes are arbitrary bytes. A snapshot's names are UTF-8 without control
//! characters, and a terminal obeys control characters. Both get an escaped form from which the
//! original bytes can be recovered: two different names stay different.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Escapes a name for a snapshot. `\xNN` is a byte that is not UTF-8 or is a control character,
/// `\u{N}` another character that [`escape_text`] would escape, and `\\` a backslash.
pub fn escape(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character == '\\' {
                text.push_str("\\\\");
            } else {
                push_escaped(&mut text, character);
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// Escapes a path for a message, as [`escape`] does.
pub fn escape_path(path: &Path) -> String {
    escape(path.as_os_str().as_bytes())
}

/// Escapes every character that a terminal could interpret as more than a letter, but not the
/// backslash.
pub fn escape_text(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        push_escaped(&mut escaped, character);
    }
    Cow::Owned(escaped)
}

fn push_escaped(text: &mut String, character: char) {
    let number = u32::from(character);
    let _ = match is_hidden(character) {
        false => text.write_char(character),
        true if number < 0x80 => write!(text, "\\x{number:02x}"),
        true => write!(text, "\\u{{{number:x}}}"),
    };
}

/// Returns whether a character moves the cursor, ends a line, or changes the order of its
/// neighbours.
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

    /// Converts an escaped name back to its bytes.
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
        let escaped: Vec<String> = names.iter().map(|name| escape(name)).collect();
        assert_eq!(escaped.iter().collect::<HashSet<_>>().len(), names.len());
        for (name, escaped) in names.iter().zip(&escaped) {
            assert_eq!(bytes_of(escaped), *name, "{escaped}");
            assert!(!escaped.contains(is_hidden), "{escaped}");
            assert_eq!(escape_text(escaped), *escaped);
        }
        assert_eq!(escaped[1], "/tmp/a\\x1b[31m");
        assert_eq!(escaped[4], "/tmp/\\xff");
        assert_eq!(escape_text("a\nb"), "a\\x0ab");
    }
}
