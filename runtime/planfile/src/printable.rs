//! Text from files of others on its way to a terminal: control characters are shown, not obeyed.

use std::borrow::Cow;
use std::fmt::Write;

/// The text with each control character as Rust writes it in a literal: `\n`, `\u{1b}`. A name made so stays on its
/// line and cannot colour, move or erase anything.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, char::is_control, |letter, shown| shown.extend(letter.escape_debug()))
}

/// As [`printable`], for text of many lines: line ends and tabs stay.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, is_no_layout, |letter, shown| shown.extend(letter.escape_debug()))
}

/// As [`printable_lines`], for JSON, which then says the same: only inside of its strings is there anything else.
pub fn printable_json(text: &str) -> Cow<'_, str> {
    escaped(text, is_no_layout, |letter, shown| {
        // Control characters are below U+10000, so four digits hold each; writing to a string does not fail.
        let _ = write!(shown, "\\u{:04x}", u32::from(letter));
    })
}

fn is_no_layout(letter: char) -> bool {
    letter.is_control() && !matches!(letter, '\n' | '\t')
}

fn escaped(text: &str, is_shown: fn(char) -> bool, show: impl Fn(char, &mut String)) -> Cow<'_, str> {
    if !text.contains(is_shown) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for letter in text.chars() {
        if is_shown(letter) { show(letter, &mut shown) } else { shown.push(letter) }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_all_else_stays() {
        assert_eq!(printable("a\u{1b}[2J\r\nb\u{9b}c\u{7f}\0"), "a\\u{1b}[2J\\r\\nb\\u{9b}c\\u{7f}\\0");
        for text in ["", "/layer.0/Add_1", "größe \\n → 大小"] {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text));
        }
        assert_eq!(printable_lines("a\u{1b}\n\tb\r"), "a\\u{1b}\n\tb\\r");
        assert!(matches!(printable_lines("a\n"), Cow::Borrowed("a\n")));
        assert_eq!(printable_json("{\n\"a\u{9b}\u{7f}\"}"), "{\n\"a\\u009b\\u007f\"}");
    }
}
