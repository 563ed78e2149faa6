//! How a failure looks: a mark before its first line, a rule before the others, lines of a terminal's width.
//!
//! ```text
//!   × model.onnx is not an ONNX model: field 15, which models do not begin with
//!   │ at byte 0; give the `.onnx` file that an exporter wrote
//! ```

use std::io::{self, IsTerminal};

use console::{Term, style};

/// Columns of a terminal that does not say.
const COLUMNS: u16 = 80;
/// Columns before the text of each line.
const INDENT: usize = 4;
/// Columns of text that even the narrowest terminal gets.
const TEXT_MIN: usize = 20;

/// What stands before the lines of a message.
#[derive(Clone, Copy, Debug)]
struct Marks {
    first: char,
    others: char,
    coloured: bool,
}

/// A message as standard error shows it. Lines are wrapped for people only: programs look for whole sentences.
pub(super) fn for_standard_error(message: &str) -> String {
    let columns = || Term::stderr().size_checked().map_or(COLUMNS, |(_, columns)| columns);
    let is_terminal = io::stderr().is_terminal();
    let columns = is_terminal.then(|| usize::from(columns()));
    let (first, others) =
        if !is_terminal || Term::stderr().features().wants_emoji() { ('×', '│') } else { ('x', '|') };
    framed(message, columns, Marks { first, others, coloured: is_terminal && console::colors_enabled_stderr() })
}

/// The message with marks, wrapped to so many columns if any, and an empty line behind it.
fn framed(message: &str, columns: Option<usize>, marks: Marks) -> String {
    let width = columns.map_or(usize::MAX, |columns| columns.saturating_sub(INDENT + 2).max(TEXT_MIN));
    let mut framed = String::new();
    for (number, line) in message.lines().flat_map(|line| wrapped(line, width)).enumerate() {
        let mark = if number == 0 { marks.first } else { marks.others };
        match marks.coloured {
            true => framed.push_str(&format!("  {} {line}\n", style(mark).red().force_styling(true))),
            false => framed.push_str(&format!("  {mark} {line}\n")),
        }
    }
    framed.push('\n');
    framed
}

/// A line in pieces of at most `width` characters, cut at blanks. A longer word stays whole: it may be a path to copy.
fn wrapped(line: &str, width: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = line;
    loop {
        // One character more than fits: a blank there is a cut too.
        let fits = rest.char_indices().nth(width).map(|(at, character)| at + character.len_utf8());
        let cut = fits.and_then(|fits| rest[..fits].rfind(' ').filter(|&at| at > 0).or_else(|| rest.find(' ')));
        let Some(cut) = cut else {
            pieces.push(rest);
            return pieces;
        };
        pieces.push(rest[..cut].trim_end());
        rest = rest[cut..].trim_start();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Marks = Marks { first: '×', others: '│', coloured: false };

    #[test]
    fn programs_get_lines_as_they_are() {
        let long = "word ".repeat(100);
        assert_eq!(framed(&long, None, PLAIN), format!("  × {long}\n\n"));
        assert_eq!(framed("a\nb\n", None, PLAIN), "  × a\n  │ b\n\n");
    }

    #[test]
    fn people_get_lines_cut_between_words() {
        let text = "cannot open größe.onnx: no such file";
        assert_eq!(framed(text, Some(28), PLAIN), "  × cannot open\n  │ größe.onnx: no such\n  │ file\n\n");
        let fits = "12345678901234567890 2";
        assert_eq!(wrapped(fits, 20), ["12345678901234567890", "2"]);
        assert_eq!(wrapped(fits, 22), [fits]);
        let path = "see /a/path/longer/than/the/terminal/is/wide and more";
        assert_eq!(wrapped(path, 20), ["see", "/a/path/longer/than/the/terminal/is/wide", "and more"]);
        assert_eq!(wrapped("", 20), [""]);
    }

    #[test]
    fn colours_are_around_the_marks_alone() {
        let coloured = framed("a", Some(80), Marks { coloured: true, ..PLAIN });
        assert_eq!(coloured, "  \u{1b}[31m×\u{1b}[0m a\n\n");
    }
}
