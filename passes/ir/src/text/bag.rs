//! Attributes as they are written, before an operation takes them: `{key value…, key value…}`.

use planfile::attributes::COMBINES;
use planfile::op::{Groups, Window};
use planfile::{Combine, DType, RankScalar, Real};

use super::cursor::{Cursor, Mark, integer};
use super::lexer::Kind;
use super::scalar::read_real;
use crate::error::IrError;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Attribute {
    Number(String),
    Word(String),
    List(Vec<Attribute>),
    /// `rank(…)`.
    ByRank(Vec<Attribute>),
}

/// Deepest nesting of lists in any attribute.
const MAX_DEPTH: usize = 3;

/// Keys with their values; what nobody takes is an error in the end.
#[derive(Debug)]
pub(super) struct Bag {
    items: Vec<(String, Vec<Attribute>)>,
    /// What has no attribute at all may stand for more than one with empty braces.
    pub(super) given: bool,
}

type Taken<T> = Result<T, String>;

impl Bag {
    /// The attributes at the cursor, if there are any. A list without braces gets the key `bare`.
    pub(super) fn read(cursor: &mut Cursor<'_>, bare: &str) -> Result<Self, IrError> {
        let mut items = Vec::new();
        let given = cursor.is_sign("{");
        if given {
            items = cursor.list("{", "}", |cursor| {
                let key = cursor.word("an attribute")?.to_owned();
                let mut values = Vec::new();
                while !cursor.is_sign(",") && !cursor.is_sign("}") {
                    values.push(attribute(cursor, MAX_DEPTH)?);
                }
                Ok((key, values))
            })?;
        } else if cursor.is_sign("[") {
            items.push((bare.to_owned(), vec![attribute(cursor, MAX_DEPTH)?]));
        }
        Ok(Self { items, given })
    }

    /// Fails on what the operation did not take.
    pub(super) fn finish(self, cursor: &Cursor<'_>, mark: Mark) -> Result<(), IrError> {
        match self.items.first() {
            Some((key, _)) => Err(cursor.error_at(mark, format!("`{key}` is no attribute here, or given twice"))),
            None => Ok(()),
        }
    }

    fn take(&mut self, key: &str) -> Option<Vec<Attribute>> {
        let index = self.items.iter().position(|(known, _)| known == key)?;
        Some(self.items.remove(index).1)
    }

    fn take_one<T>(&mut self, key: &str, read: impl Fn(&Attribute) -> Option<T>) -> Taken<Option<T>> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some([value]) => read(value).map(Some).ok_or_else(|| format!("the value of `{key}` does not fit")),
            Some(values) => Err(format!("`{key}` takes one value, not {}", values.len())),
        }
    }

    pub(super) fn flag(&mut self, key: &str) -> Taken<bool> {
        match self.take(key) {
            None => Ok(false),
            Some(values) if values.is_empty() => Ok(true),
            Some(_) => Err(format!("`{key}` takes no value")),
        }
    }

    pub(super) fn int<T: TryFrom<i128>>(&mut self, key: &str) -> Taken<Option<T>> {
        self.take_one(key, int)
    }

    /// An integer that must be given.
    pub(super) fn need<T: TryFrom<i128>>(&mut self, key: &str) -> Taken<T> {
        self.int(key)?.ok_or_else(|| missing(key))
    }

    pub(super) fn real(&mut self, key: &str) -> Taken<Option<Real>> {
        self.take_one(key, real)
    }

    pub(super) fn dtype(&mut self, key: &str) -> Taken<Option<DType>> {
        self.take_one(key, |value| word(value)?.parse().ok())
    }

    pub(super) fn word(&mut self, key: &str) -> Taken<Option<String>> {
        self.take_one(key, |value| word(value).map(str::to_owned))
    }

    pub(super) fn words(&mut self, key: &str) -> Taken<Option<Vec<String>>> {
        let Some(values) = self.take(key) else { return Ok(None) };
        let words: Option<Vec<String>> = values.iter().map(|value| word(value).map(str::to_owned)).collect();
        words.map(Some).ok_or_else(|| format!("the values of `{key}` do not fit"))
    }

    pub(super) fn ints<T: TryFrom<i128>>(&mut self, key: &str) -> Taken<Option<Vec<T>>> {
        self.take_one(key, |value| list(value, int))
    }

    /// Integers that must be given.
    pub(super) fn need_ints<T: TryFrom<i128>>(&mut self, key: &str) -> Taken<Vec<T>> {
        self.ints(key)?.ok_or_else(|| missing(key))
    }

    pub(super) fn reals(&mut self, key: &str) -> Taken<Option<Vec<Real>>> {
        self.take_one(key, |value| list(value, real))
    }

    pub(super) fn real_pairs(&mut self, key: &str) -> Taken<Option<Vec<(Real, Real)>>> {
        self.take_one(key, |value| list(value, |value| pair(value, real)))
    }

    pub(super) fn rank_scalars(&mut self, key: &str) -> Taken<Vec<RankScalar>> {
        let read = |value: &Attribute| match value {
            Attribute::ByRank(table) => table.iter().map(int).collect::<Option<_>>().map(RankScalar::ByRank),
            value => int(value).map(RankScalar::Uniform),
        };
        self.take_one(key, |value| list(value, read))?.ok_or_else(|| missing(key))
    }

    pub(super) fn groups(&mut self) -> Taken<Groups> {
        self.take_one("groups", |value| list(value, |value| list(value, int)))?.ok_or_else(|| missing("groups"))
    }

    /// `key [0, 1]x[2, 3]`: dimensions of the left operand, each beside one of the right.
    pub(super) fn dim_pairs(&mut self, key: &str) -> Taken<Option<Vec<(u8, u8)>>> {
        let Some(values) = self.take(key) else { return Ok(None) };
        let pairs = match values.as_slice() {
            [left, Attribute::Word(x), right] if x == "x" => list(left, int).zip(list(right, int)),
            _ => None,
        };
        match pairs {
            Some((left, right)) if left.len() == right.len() => Ok(Some(left.into_iter().zip(right).collect())),
            _ => Err(format!("`{key}` takes dimensions such as `[0, 1]x[2, 3]`")),
        }
    }

    /// The flag among the four that says how values combine.
    pub(super) fn combine(&mut self) -> Taken<Option<Combine>> {
        for (combine, name) in COMBINES {
            if self.flag(name)? {
                return Ok(Some(combine));
            }
        }
        Ok(None)
    }

    pub(super) fn need_combine(&mut self) -> Taken<Combine> {
        self.combine()?.ok_or_else(|| missing("sum`, `prod`, `max` or `min"))
    }

    /// What of the table is named as a flag.
    pub(super) fn choice<T: Copy>(&mut self, table: &[(T, &str)]) -> Taken<Option<T>> {
        for (value, name) in table {
            if self.flag(name)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// A window; strides, dilations and pads are 1, 1 and 0 where they are not given.
    pub(super) fn window(&mut self) -> Taken<Window> {
        let sizes: Vec<u64> = self.need_ints("window")?;
        let spatial = sizes.len();
        Ok(Window {
            sizes,
            strides: self.ints("strides")?.unwrap_or_else(|| vec![1; spatial]),
            dilations: self.ints("dilations")?.unwrap_or_else(|| vec![1; spatial]),
            pads: self
                .take_one("pads", |value| list(value, |value| pair(value, int)))?
                .unwrap_or_else(|| vec![(0, 0); spatial]),
        })
    }
}

pub(super) fn missing(key: &str) -> String {
    format!("`{key}` is missing")
}

fn attribute(cursor: &mut Cursor<'_>, depth: usize) -> Result<Attribute, IrError> {
    if depth == 0 {
        return Err(cursor.error("lists nest deeper than any attribute's"));
    }
    match *cursor.peek() {
        Kind::Sign("[") => cursor.list("[", "]", |cursor| attribute(cursor, depth - 1)).map(Attribute::List),
        Kind::Sign("(") => cursor.list("(", ")", |cursor| attribute(cursor, depth - 1)).map(Attribute::List),
        Kind::Number(_) | Kind::Sign("-") | Kind::Word("inf") => cursor.number().map(Attribute::Number),
        Kind::Word("rank") if matches!(cursor.peek_after(1), Kind::Sign("(")) => {
            cursor.next();
            cursor.list("(", ")", |cursor| attribute(cursor, depth - 1)).map(Attribute::ByRank)
        }
        Kind::Word(word) => {
            cursor.next();
            Ok(Attribute::Word(word.to_owned()))
        }
        _ => Err(cursor.expected("a value of the attribute, `,` or `}`")),
    }
}

fn int<T: TryFrom<i128>>(value: &Attribute) -> Option<T> {
    match value {
        Attribute::Number(text) => integer(text),
        _ => None,
    }
}

fn real(value: &Attribute) -> Option<Real> {
    match value {
        Attribute::Number(text) => read_real(text),
        _ => None,
    }
}

fn word(value: &Attribute) -> Option<&str> {
    match value {
        Attribute::Word(word) => Some(word),
        _ => None,
    }
}

fn list<T>(value: &Attribute, item: impl Fn(&Attribute) -> Option<T>) -> Option<Vec<T>> {
    match value {
        Attribute::List(items) => items.iter().map(item).collect(),
        _ => None,
    }
}

fn pair<T>(value: &Attribute, item: impl Fn(&Attribute) -> Option<T>) -> Option<(T, T)> {
    match value {
        Attribute::List(items) => match items.as_slice() {
            [first, second] => item(first).zip(item(second)),
            _ => None,
        },
        _ => None,
    }
}
