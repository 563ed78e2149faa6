//! What ONNX says of its operators, version by version: inputs, outputs, attributes and element types.
//!
//! `schema/operators.txt` has a line for each version; `passes/onnx/schemas.py` makes it from onnx's own schemas. Lines
//! are found by name, and read when a model has such a node for the first time.

pub(crate) mod check;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{LazyLock, OnceLock};

use planfile::DType;

const TABLE: &str = include_str!("schema/operators.txt");

/// One version of an operator: it holds from the opset `since` up to the next version.
#[derive(Debug)]
pub(crate) struct Schema {
    pub(crate) since: i64,
    /// ONNX has removed the operator.
    pub(crate) is_deprecated: bool,
    pub(crate) inputs: Vec<Formal>,
    pub(crate) outputs: Vec<Formal>,
    /// The numbers of outputs that are allowed; empty where `outputs` says it all.
    pub(crate) output_counts: Vec<usize>,
    pub(crate) attributes: Vec<AttributeRule>,
}

/// A formal input or output.
#[derive(Debug)]
pub(crate) struct Formal {
    pub(crate) name: &'static str,
    pub(crate) places: Places,
    /// What all places of the same variable have in common; `None` where each is on its own.
    pub(crate) variable: Option<&'static str>,
    pub(crate) types: Types,
}

/// How many actual ones stand for a formal input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Places {
    One,
    OneOrNone,
    /// At least so many; the last of its list.
    Many {
        least: usize,
    },
}

/// Element types that are allowed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Types {
    /// Of ours, a bit each.
    bits: u32,
    /// As the table has them, types and containers that we have not included.
    words: &'static str,
}

#[derive(Debug)]
pub(crate) struct AttributeRule {
    pub(crate) name: &'static str,
    /// In ONNX's words: `int`, `floats`, `graph`...
    pub(crate) kind: &'static str,
    pub(crate) is_required: bool,
}

/// A line of the table.
#[derive(Debug)]
struct Row {
    since: i64,
    line: &'static str,
    schema: OnceLock<Option<Schema>>,
}

/// The lines of the table, in its order: by domain, name and version.
#[derive(Debug, Default)]
struct Index {
    rows: Vec<Row>,
    /// The rows of one operator, by domain and name. Looked up, never walked.
    by_name: HashMap<(&'static str, &'static str), Range<usize>>,
    sets: Vec<(&'static str, u32)>,
}

static INDEX: LazyLock<Index> = LazyLock::new(|| index(TABLE));

/// The version of the operator that holds at `opset`; `None` where ONNX has no such operator.
pub(crate) fn find(domain: &str, name: &str, opset: i64) -> Option<&'static Schema> {
    versions(domain, name).iter().rev().find(|row| row.since <= opset)?.schema()
}

/// All versions of an operator, the oldest first.
pub(crate) fn history(domain: &str, name: &str) -> impl DoubleEndedIterator<Item = &'static Schema> {
    versions(domain, name).iter().filter_map(Row::schema)
}

fn versions(domain: &str, name: &str) -> &'static [Row] {
    let by_name: &HashMap<(&str, &str), Range<usize>> = &INDEX.by_name;
    by_name.get(&(domain, name)).and_then(|range| INDEX.rows.get(range.clone())).unwrap_or_default()
}

impl Row {
    /// A test reads every line, so `None` is a line that is not there.
    fn schema(&'static self) -> Option<&'static Schema> {
        self.schema.get_or_init(|| parse(self.line, &INDEX.sets)).as_ref()
    }
}

impl Types {
    pub(crate) fn contains(self, dtype: DType) -> bool {
        self.bits & bit(dtype) != 0
    }
}

impl std::fmt::Display for Types {
    /// Those of ours; all of the table where we have none of them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> =
            DType::ALL.into_iter().filter(|&dtype| self.contains(dtype)).map(|dtype| dtype.name()).collect();
        match names.as_slice() {
            [] => f.write_str(self.words),
            [only] => f.write_str(only),
            [names @ .., last] => write!(f, "{} or {last}", names.join(", ")),
        }
    }
}

const fn bit(dtype: DType) -> u32 {
    1 << (dtype as u32)
}

/// The bit of one of our element types by its name; none for any other word.
fn bit_named(word: &str) -> u32 {
    DType::ALL.into_iter().find(|dtype| dtype.name() == word).map_or(0, bit)
}

fn index(table: &'static str) -> Index {
    let mut index = Index::default();
    let mut domain = "";
    for line in table.lines() {
        if let Some(name) = line.strip_prefix("domain ") {
            domain = crate::inline::canonical_domain(name);
        } else if let Some((name, words)) = line.strip_prefix("set ").and_then(|set| set.split_once(": ")) {
            index.sets.push((name, words.split(' ').map(bit_named).fold(0, |bits, bit| bits | bit)));
        } else if let [name, since, ..] = line.splitn(3, ' ').collect::<Vec<_>>().as_slice()
            && let Ok(since) = since.parse()
        {
            let position = index.rows.len();
            index.by_name.entry((domain, name)).or_insert(position..position).end = position + 1;
            index.rows.push(Row { since, line, schema: OnceLock::new() });
        }
    }
    index
}

/// Reads a line: `NAME SINCE (INPUTS) -> (OUTPUTS) [ATTRIBUTES] where VARIABLE: TYPES, ...`.
fn parse(line: &'static str, sets: &[(&'static str, u32)]) -> Option<Schema> {
    let (head, rest) = line.split_once(" (")?;
    let mut head = head.split(' ').skip(1);
    let since = head.next()?.parse().ok()?;
    let is_deprecated = head.next() == Some("deprecated");
    let (inputs, rest) = rest.split_once(") -> (")?;
    let (outputs, rest) = rest.split_once(')')?;
    let (rest, variables) = rest.split_once(" where ").unwrap_or((rest, ""));
    let (counts, attributes) = rest.split_once(" [").unwrap_or((rest, ""));
    let types = |words: &'static str| {
        let of =
            |word: &str| sets.iter().find(|(name, _)| *name == word).map_or_else(|| bit_named(word), |(_, bits)| *bits);
        Types { bits: words.split(' ').map(of).fold(0, |bits, bit| bits | bit), words }
    };
    let variables: Vec<(&str, Types)> = list(variables)
        .map(|text| text.split_once(": ").map(|(name, words)| (name, types(words))))
        .collect::<Option<_>>()?;
    let formals = |text| list(text).map(|text| formal(text, &variables, types)).collect::<Option<Vec<_>>>();
    let counts = counts.strip_prefix(" outputs ").map(|counts| counts.split('|').map(str::parse).collect());
    Some(Schema {
        since,
        is_deprecated,
        inputs: formals(inputs)?,
        outputs: formals(outputs)?,
        output_counts: counts.unwrap_or(Ok(Vec::new())).ok()?,
        attributes: list(attributes.trim_end_matches(']')).map(rule).collect::<Option<_>>()?,
    })
}

fn list(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.split(", ").filter(|part| !part.is_empty())
}

/// `NAME: TYPE`, `NAME?: TYPE`, `NAME+: each TYPE`...
fn formal(
    text: &'static str,
    variables: &[(&'static str, Types)],
    types: impl Fn(&'static str) -> Types,
) -> Option<Formal> {
    let (name, ty) = text.split_once(": ")?;
    let (name, places) = match name.as_bytes().last()? {
        b'?' => (&name[..name.len() - 1], Places::OneOrNone),
        b'*' => (&name[..name.len() - 1], Places::Many { least: 0 }),
        b'+' => (&name[..name.len() - 1], Places::Many { least: 1 }),
        _ => (name, Places::One),
    };
    let (ty, is_free) = ty.strip_prefix("each ").map_or((ty, false), |ty| (ty, true));
    let variable = variables.iter().find(|(name, _)| *name == ty);
    Some(Formal {
        name,
        places,
        variable: variable.filter(|_| !is_free).map(|(name, _)| *name),
        types: variable.map_or_else(|| types(ty), |(_, types)| *types),
    })
}

/// `NAME: KIND`, or `NAME!: KIND` where it has to be given.
fn rule(text: &'static str) -> Option<AttributeRule> {
    let (name, kind) = text.split_once(": ")?;
    let bare = name.strip_suffix('!');
    Some(AttributeRule { name: bare.unwrap_or(name), kind, is_required: bare.is_some() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{IR_VERSIONS, OPSETS};

    #[test]
    fn every_line_is_read_and_in_order() {
        let lines = TABLE.lines().filter(|line| line.contains(" -> (") && !line.starts_with('#')).count();
        assert_eq!(INDEX.rows.len(), lines, "a line of the table is not found");
        let mut unread: Vec<&str> =
            INDEX.rows.iter().filter(|row| row.schema().is_none()).map(|row| row.line).collect();
        unread.extend(INDEX.rows.iter().filter(|row| row.schema().unwrap().since != row.since).map(|row| row.line));
        assert!(unread.is_empty(), "{unread:#?}");
        // Versions of an operator follow each other, and rise.
        let name = |row: &Row| row.line.split(' ').next().unwrap();
        let (same, new): (Vec<&[Row]>, Vec<&[Row]>) =
            INDEX.rows.windows(2).partition(|pair| name(&pair[0]) == name(&pair[1]));
        assert_eq!(INDEX.by_name.len(), new.len() + 1);
        let misplaced: Vec<&str> =
            same.iter().filter(|pair| pair[0].since >= pair[1].since).map(|pair| pair[1].line).collect();
        assert!(misplaced.is_empty(), "{misplaced:#?}");
    }

    #[test]
    fn every_word_of_the_table_means_something() {
        const KINDS: [&str; 10] =
            ["float", "floats", "graph", "int", "ints", "sparse_tensor", "string", "strings", "tensor", "type_proto"];
        for row in &INDEX.rows {
            let schema = row.schema().unwrap();
            for rule in &schema.attributes {
                assert!(KINDS.contains(&rule.kind), "{}: {}", row.line, rule.kind);
            }
            for formals in [&schema.inputs, &schema.outputs] {
                let many = formals.iter().position(|formal| matches!(formal.places, Places::Many { .. }));
                assert!(many.is_none_or(|position| position + 1 == formals.len()), "{}", row.line);
                for formal in formals {
                    let ours = DType::ALL.into_iter().any(|dtype| formal.types.contains(dtype));
                    let others = ["string", "complex", "f8", "(", "map"];
                    assert!(ours || others.iter().any(|word| formal.types.words.contains(word)), "{}", row.line);
                }
            }
        }
        for dtype in DType::ALL {
            assert!(find("", "Identity", 28).unwrap().inputs[0].types.contains(dtype), "{dtype}");
        }
    }

    #[test]
    fn the_table_is_of_the_versions_that_are_read() {
        let head = TABLE.lines().nth(1).unwrap();
        let expected = format!("(IR {}, opset {})", IR_VERSIONS.end(), OPSETS.end());
        assert!(head.contains(&expected), "{head} is not of {expected}");
        let newest = INDEX.rows.iter().map(|row| row.since).max();
        assert_eq!(newest, Some(*OPSETS.end()));
    }

    #[test]
    fn the_version_in_force_is_found() {
        let since = |name, opset| find("", name, opset).map(|schema| schema.since);
        assert_eq!(since("SpaceToDepth", 12), Some(1));
        assert_eq!(since("SpaceToDepth", 27), Some(13));
        assert_eq!(since("SpaceToDepth", 28), Some(28));
        assert_eq!((since("Trilu", 13), since("Fancy", 28)), (None, None));
        assert_eq!(find("ai.onnx.ml", "Scaler", 3).map(|schema| schema.since), Some(1));
        assert!(find("", "Upsample", 10).unwrap().is_deprecated && !find("", "Upsample", 9).unwrap().is_deprecated);
        assert_eq!(find("", "BatchNormalization", 9).unwrap().output_counts, [1, 5]);
    }

    #[test]
    fn a_line_says_places_types_and_attributes() {
        let conv = find("", "Conv", 11).unwrap();
        let places: Vec<(&str, Places)> = conv.inputs.iter().map(|formal| (formal.name, formal.places)).collect();
        assert_eq!(places, [("X", Places::One), ("W", Places::One), ("B", Places::OneOrNone)]);
        assert_eq!(conv.inputs[0].types.to_string(), "f16, f32 or f64");
        assert!(!conv.inputs[0].types.contains(DType::BF16));
        let concat = find("", "Concat", 13).unwrap();
        assert_eq!(concat.inputs[0].places, Places::Many { least: 1 });
        assert_eq!((concat.attributes[0].name, concat.attributes[0].kind), ("axis", "int"));
        assert!(concat.attributes[0].is_required && !conv.attributes[0].is_required);
        let condition = find("", "If", 25).unwrap();
        assert_eq!((condition.outputs[0].variable, condition.inputs[0].variable), (None, Some("B")));
        assert_eq!(find("", "StringConcat", 20).unwrap().inputs[0].types.to_string(), "string");
    }
}
