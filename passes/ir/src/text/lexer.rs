//! Words, numbers, strings and signs of the text form, each with its line and column.

use crate::error::IrError;

/// One token. Numbers stay text: what they mean depends on the type they are read as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind<'a> {
    Word(&'a str),
    /// What follows `%`.
    Value(&'a str),
    /// Without sign.
    Number(&'a str),
    /// A string, unescaped.
    Text(String),
    Sign(&'static str),
    /// What follows `#`, to the end of the line.
    Comment(&'a str),
    End,
}

#[derive(Clone, Debug)]
pub(super) struct Token<'a> {
    pub(super) kind: Kind<'a>,
    pub(super) line: usize,
    pub(super) column: usize,
}

/// Longest first, so that `<=` is not read as `<`.
const SIGNS: &[&str] = &[
    "->", "..", ":=", "<=", ">=", "==", "!=", "(", ")", "{", "}", "[", "]", ",", ":", "=", "<", ">", "+", "-", "*",
    "/", "@", "$", ".",
];

pub(super) fn is_word_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_'
}

pub(super) fn is_word_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    column: usize,
}

impl<'a> Lexer<'a> {
    fn error(&self, why: &str) -> IrError {
        IrError::Parse { line: self.line, column: self.column, why: why.to_owned() }
    }

    /// Takes the first `bytes` bytes, which end at a character's boundary.
    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        for c in taken.chars() {
            (self.line, self.column) = if c == '\n' { (self.line + 1, 1) } else { (self.line, self.column + 1) };
        }
        self.rest = rest;
        taken
    }

    fn take_while(&mut self, keep: impl Fn(char) -> bool) -> &'a str {
        self.take(self.rest.find(|c| !keep(c)).unwrap_or(self.rest.len()))
    }

    fn next_kind(&mut self) -> Result<Kind<'a>, IrError> {
        let Some(first) = self.rest.chars().next() else { return Ok(Kind::End) };
        if is_word_start(first) {
            return Ok(Kind::Word(self.take_while(is_word_part)));
        }
        if first.is_ascii_digit() {
            return Ok(Kind::Number(self.take(number_len(self.rest))));
        }
        match first {
            '#' => {
                let comment = self.take_while(|c| c != '\n');
                return Ok(Kind::Comment(comment[1..].trim()));
            }
            '"' => return self.string(),
            '%' => {
                self.take(1);
                let name = self.take_while(|c| is_word_part(c) || c == '.');
                return if name.is_empty() { Err(self.error("`%` without a name")) } else { Ok(Kind::Value(name)) };
            }
            _ => {}
        }
        match SIGNS.iter().find(|sign| self.rest.starts_with(**sign)) {
            Some(sign) => {
                self.take(sign.len());
                Ok(Kind::Sign(sign))
            }
            None => Err(self.error(&format!("`{}` does not belong here", first.escape_debug()))),
        }
    }

    fn string(&mut self) -> Result<Kind<'a>, IrError> {
        self.take(1);
        let mut text = String::new();
        loop {
            text.push_str(self.take_while(|c| !matches!(c, '"' | '\\' | '\n')));
            if self.rest.starts_with('"') {
                self.take(1);
                return Ok(Kind::Text(text));
            }
            let escape = self.rest.strip_prefix('\\').ok_or_else(|| self.error("the string does not end"))?;
            let (c, len) = unescape(escape).ok_or_else(|| self.error("unknown escape"))?;
            text.push(c);
            self.take(1 + len);
        }
    }
}

/// Bytes of the number at the front: decimal with fraction and exponent, or hexadecimal after `0x`.
fn number_len(text: &str) -> usize {
    let digits = |from: usize| text[from..].bytes().take_while(u8::is_ascii_digit).count();
    if let Some(hex) = text.strip_prefix("0x") {
        let len = hex.bytes().take_while(u8::is_ascii_hexdigit).count();
        if len > 0 {
            return 2 + len;
        }
    }
    let mut len = digits(0);
    if text[len..].starts_with('.') && digits(len + 1) > 0 {
        len += 1 + digits(len + 1);
    }
    if text[len..].starts_with(['e', 'E']) {
        let signed = usize::from(text[len + 1..].starts_with(['+', '-']));
        let exponent = digits(len + 1 + signed);
        if exponent > 0 {
            len += 1 + signed + exponent;
        }
    }
    len
}

/// The character that an escape stands for, and the escape's bytes after the backslash.
fn unescape(escape: &str) -> Option<(char, usize)> {
    match escape.chars().next()? {
        'n' => Some(('\n', 1)),
        't' => Some(('\t', 1)),
        'r' => Some(('\r', 1)),
        c @ ('"' | '\\') => Some((c, 1)),
        'u' => {
            let digits = escape.strip_prefix("u{")?.split('}').next()?;
            let code = u32::from_str_radix(digits, 16).ok()?;
            escape[2 + digits.len()..].starts_with('}').then_some(())?;
            Some((char::from_u32(code)?, digits.len() + 3))
        }
        _ => None,
    }
}

/// The string in quotes, control characters escaped: one line.
pub(super) fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            '\r' => quoted.push_str("\\r"),
            c if c.is_control() => quoted.push_str(&format!("\\u{{{:x}}}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// The name as it is where it reads as one word, in quotes otherwise.
pub(super) fn name(text: &str) -> String {
    let word = text.starts_with(is_word_start) && text.chars().all(is_word_part);
    if word { text.to_owned() } else { quote(text) }
}

/// All tokens of the text; the last is [`Kind::End`].
///
/// # Errors
/// [`IrError::Parse`] at a character that starts no token, or a string that does not end.
pub(super) fn tokens(text: &str) -> Result<Vec<Token<'_>>, IrError> {
    let mut lexer = Lexer { rest: text, line: 1, column: 1 };
    let mut tokens = Vec::new();
    loop {
        lexer.take_while(char::is_whitespace);
        let (line, column) = (lexer.line, lexer.column);
        let kind = lexer.next_kind()?;
        let last = kind == Kind::End;
        tokens.push(Token { kind, line, column });
        if last {
            return Ok(tokens);
        }
    }
}

/// The names in an origin comment: bare words or strings, joined by `+`.
pub(super) fn origin_names(comment: &str) -> Option<Vec<String>> {
    let mut lexer = Lexer { rest: comment, line: 1, column: 1 };
    let mut names = Vec::new();
    loop {
        lexer.take_while(char::is_whitespace);
        if lexer.rest.starts_with('"') {
            let Ok(Kind::Text(name)) = lexer.string() else { return None };
            names.push(name);
        } else {
            names.push(lexer.take_while(|c| !c.is_whitespace()).to_owned());
        }
        lexer.take_while(char::is_whitespace);
        match lexer.rest.strip_prefix('+') {
            Some(_) => lexer.take(1),
            None => return lexer.rest.is_empty().then_some(names),
        };
    }
}

/// The comment that [`origin_names`] reads back.
pub(super) fn origin_comment<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let bare = |name: &str| {
        !name.is_empty() && name != "+" && !name.contains(|c: char| c.is_whitespace() || c.is_control() || c == '"')
    };
    let names: Vec<String> = names.map(|name| if bare(name) { name.to_owned() } else { quote(name) }).collect();
    names.join(" + ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_origins_come_back() {
        for text in ["", "a b", "\"", "\\u{41}", "é\u{7}\n\t\r\0", "+", "a+b", "# x", "\u{85}\u{2028}"] {
            let quoted = quote(text);
            let read = tokens(&quoted).unwrap();
            assert_eq!(read[0].kind, Kind::Text(text.to_owned()), "{quoted}");
            let comment = origin_comment([text, "/fc1/MatMul", text].into_iter());
            assert!(!comment.contains('\n'));
            assert_eq!(origin_names(&comment).unwrap(), [text, "/fc1/MatMul", text], "{comment}");
        }
    }

    #[test]
    fn numbers_end_where_they_should() {
        let read = |text| match &tokens(text).unwrap()[0].kind {
            Kind::Number(number) => (*number).to_owned(),
            other => panic!("{other:?}"),
        };
        let cases = [
            ("0..8", "0"),
            ("1.5e-7]", "1.5e-7"),
            ("1e20", "1e20"),
            ("2x2", "2"),
            ("0x7fz", "0x7f"),
            ("1.x", "1"),
            ("3e", "3"),
        ];
        for (text, number) in cases {
            assert_eq!(read(text), number);
        }
    }

    #[test]
    fn errors_say_where() {
        let error = tokens("a\n  \"abc").unwrap_err();
        assert_eq!(error, IrError::Parse { line: 2, column: 7, why: "the string does not end".to_owned() });
        assert!(tokens("a ~").is_err() && tokens("%").is_err() && tokens("\"\\u{d800}\"").is_err());
    }
}
