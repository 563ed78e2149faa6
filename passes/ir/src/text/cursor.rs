//! A position in the tokens of a text, and the smallest things read there.

use super::lexer::{Kind, Token, tokens};
use crate::error::IrError;

/// Reads tokens from front to back, comments left out.
pub(super) struct Cursor<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
}

/// Where a token is, for errors found after it was read.
#[derive(Clone, Copy)]
pub(super) struct Mark(usize);

impl<'a> Cursor<'a> {
    pub(super) fn new(text: &'a str) -> Result<Self, IrError> {
        Ok(Self { tokens: tokens(text)?, at: 0 })
    }

    fn index(&self, ahead: usize) -> usize {
        let real = (self.at..self.tokens.len()).filter(|&i| !matches!(self.tokens[i].kind, Kind::Comment(_)));
        real.into_iter().nth(ahead).unwrap_or(self.tokens.len() - 1)
    }

    pub(super) fn mark(&self) -> Mark {
        Mark(self.index(0))
    }

    pub(super) fn peek(&self) -> &Kind<'a> {
        &self.tokens[self.index(0)].kind
    }

    /// The token `ahead` places after the next one.
    pub(super) fn peek_after(&self, ahead: usize) -> &Kind<'a> {
        &self.tokens[self.index(ahead)].kind
    }

    /// The next token; the end stays the next for ever.
    pub(super) fn next(&mut self) -> Kind<'a> {
        let index = self.index(0);
        self.at = (index + 1).min(self.tokens.len() - 1);
        self.tokens[index].kind.clone()
    }

    /// The comment behind the last token read, on its line.
    pub(super) fn trailing_comment(&mut self) -> Option<&'a str> {
        let before = self.at.checked_sub(1)?;
        match self.tokens[self.at] {
            Token { kind: Kind::Comment(text), line, .. } if line == self.tokens[before].line => Some(text),
            _ => None,
        }
    }

    pub(super) fn error_at(&self, mark: Mark, why: impl Into<String>) -> IrError {
        let token = &self.tokens[mark.0];
        IrError::Parse { line: token.line, column: token.column, why: why.into() }
    }

    pub(super) fn error(&self, why: impl Into<String>) -> IrError {
        self.error_at(self.mark(), why)
    }

    /// That something else is expected than what is there.
    pub(super) fn expected(&self, what: &str) -> IrError {
        let found = match self.peek() {
            Kind::Word(text) | Kind::Number(text) => format!("`{text}`"),
            Kind::Value(name) => format!("`%{name}`"),
            Kind::Text(_) => "a string".to_owned(),
            Kind::Sign(sign) => format!("`{sign}`"),
            Kind::Comment(_) => "a comment".to_owned(),
            Kind::End => "the end".to_owned(),
        };
        self.error(format!("expected {what}, found {found}"))
    }

    pub(super) fn is_sign(&self, sign: &str) -> bool {
        matches!(self.peek(), Kind::Sign(found) if *found == sign)
    }

    pub(super) fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Kind::Word(found) if *found == word)
    }

    /// Whether the sign was there, and is read.
    pub(super) fn accept(&mut self, sign: &str) -> bool {
        let there = self.is_sign(sign);
        if there {
            self.next();
        }
        there
    }

    /// Whether the word was there, and is read.
    pub(super) fn accept_word(&mut self, word: &str) -> bool {
        let there = self.is_word(word);
        if there {
            self.next();
        }
        there
    }

    pub(super) fn sign(&mut self, sign: &str) -> Result<(), IrError> {
        if self.accept(sign) { Ok(()) } else { Err(self.expected(&format!("`{sign}`"))) }
    }

    pub(super) fn keyword(&mut self, word: &str) -> Result<(), IrError> {
        if self.accept_word(word) { Ok(()) } else { Err(self.expected(&format!("`{word}`"))) }
    }

    pub(super) fn word(&mut self, what: &str) -> Result<&'a str, IrError> {
        match *self.peek() {
            Kind::Word(word) => {
                self.next();
                Ok(word)
            }
            _ => Err(self.expected(what)),
        }
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String, IrError> {
        match self.peek() {
            Kind::Text(text) => {
                let text = text.clone();
                self.next();
                Ok(text)
            }
            _ => Err(self.expected(what)),
        }
    }

    /// A word or a string.
    pub(super) fn name(&mut self, what: &str) -> Result<String, IrError> {
        match *self.peek() {
            Kind::Word(word) => {
                self.next();
                Ok(word.to_owned())
            }
            _ => self.string(what),
        }
    }

    /// The name after a `%`.
    pub(super) fn value(&mut self) -> Result<&'a str, IrError> {
        match *self.peek() {
            Kind::Value(name) => {
                self.next();
                Ok(name)
            }
            _ => Err(self.expected("a value such as `%0`")),
        }
    }

    /// A number's text, with its sign; `inf` counts as one.
    pub(super) fn number(&mut self) -> Result<String, IrError> {
        let sign = if self.accept("-") { "-" } else { "" };
        match *self.peek() {
            Kind::Number(text) | Kind::Word(text @ "inf") => {
                self.next();
                Ok(format!("{sign}{text}"))
            }
            _ => Err(self.expected("a number")),
        }
    }

    /// An integer that fits the type.
    pub(super) fn integer<T: TryFrom<i128>>(&mut self, what: &str) -> Result<T, IrError> {
        let mark = self.mark();
        if !matches!(self.peek(), Kind::Number(_) | Kind::Sign("-")) {
            return Err(self.expected(what));
        }
        let text = self.number()?;
        integer(&text).ok_or_else(|| self.error_at(mark, format!("`{text}` is no {what}")))
    }

    /// Items between two signs, separated by commas; a comma may follow the last one.
    pub(super) fn list<T>(
        &mut self,
        open: &str,
        close: &str,
        mut item: impl FnMut(&mut Self) -> Result<T, IrError>,
    ) -> Result<Vec<T>, IrError> {
        self.sign(open)?;
        let mut items = Vec::new();
        while !self.accept(close) {
            items.push(item(self)?);
            if !self.is_sign(close) {
                self.sign(",")?;
            }
        }
        Ok(items)
    }
}

/// An integer of decimal digits.
pub(super) fn integer<T: TryFrom<i128>>(text: &str) -> Option<T> {
    T::try_from(text.parse::<i128>().ok()?).ok()
}
