//! The table of ONNX operators that can be imported, a family per file.
//!
//! A family lists its operators as rows: name, lowest opset, lowering. To add an operator: one function, one row and
//! one test in the file of its family.

mod activation;
mod arithmetic;
mod attention;
mod cast;
mod comparison;
mod constant;
mod convolution;
mod cumulative;
mod einsum;
mod elementwise;
mod gathering;
mod logic;
mod matmul;
mod movement;
mod normalization;
mod pooling;
mod quantization;
mod recurrent;
mod reduction;
mod reshape;
mod resize;
mod sampling;
mod scatter;
mod shape;
mod slicing;
mod softmax;
mod sorting;
mod spectral;
mod streaming;

use std::collections::HashMap;
use std::sync::LazyLock;

use ir::ValueId;

use crate::advice;
use crate::context::{Context, OpError};

/// Adds the primitives that compute one node. Gives one value per output of the ONNX operator, in order; optional
/// outputs at the end may be left off.
pub(crate) type Lower = fn(&mut Context<'_>) -> Result<Vec<ValueId>, OpError>;

/// A row of the table.
#[derive(Clone, Copy)]
pub(crate) struct Operator {
    pub(crate) name: &'static str,
    /// Lowest version of the domain that has this form of the operator; it holds until a row with a higher one.
    pub(crate) since: i64,
    pub(crate) lower: Lower,
}

/// A row: name, lowest opset, lowering.
const fn row(name: &'static str, since: i64, lower: Lower) -> Operator {
    Operator { name, since, lower }
}

/// ONNX's own operators.
const FAMILIES: &[&[Operator]] = &[
    activation::OPERATORS,
    arithmetic::OPERATORS,
    attention::OPERATORS,
    cast::OPERATORS,
    comparison::OPERATORS,
    constant::OPERATORS,
    convolution::OPERATORS,
    cumulative::OPERATORS,
    einsum::OPERATORS,
    elementwise::OPERATORS,
    gathering::OPERATORS,
    logic::OPERATORS,
    matmul::OPERATORS,
    movement::OPERATORS,
    normalization::OPERATORS,
    pooling::OPERATORS,
    quantization::OPERATORS,
    recurrent::OPERATORS,
    reduction::OPERATORS,
    reshape::OPERATORS,
    resize::OPERATORS,
    sampling::OPERATORS,
    scatter::OPERATORS,
    shape::OPERATORS,
    slicing::OPERATORS,
    softmax::OPERATORS,
    sorting::OPERATORS,
    spectral::OPERATORS,
    streaming::OPERATORS,
];

/// Families by domain.
const DOMAINS: &[(&str, &[&[Operator]])] = &[("", FAMILIES)];

/// The operator's lowering in force at `opset`.
///
/// # Errors
/// What to tell the user when there is none.
pub(crate) fn find(domain: &str, name: &str, opset: i64) -> Result<Lower, String> {
    let rows = named(domain, name);
    if let Some(row) = rows.iter().filter(|row| row.since <= opset).max_by_key(|row| row.since) {
        return Ok(row.lower);
    }
    match rows.iter().map(|row| row.since).min() {
        Some(since) => Err(format!("the operator is supported from opset {since} on: export the model for that opset")),
        None => Err(match advice::for_operator(domain, name) {
            Some(advice) => format!("no such operator is supported: {advice}"),
            None => "no such operator is supported".to_owned(),
        }),
    }
}

/// First version of the row in force at `opset`.
pub(crate) fn since(domain: &str, name: &str, opset: i64) -> Option<i64> {
    named(domain, name).iter().map(|row| row.since).filter(|&since| since <= opset).max()
}

/// The rows of each operator, by domain and name: every node of a model asks for its own.
static ROWS: LazyLock<HashMap<&str, HashMap<&str, Vec<Operator>>>> = LazyLock::new(|| {
    let mut rows: HashMap<&str, HashMap<&str, Vec<Operator>>> = HashMap::new();
    for (domain, families) in DOMAINS {
        for row in families.iter().copied().flatten() {
            rows.entry(domain).or_default().entry(row.name).or_default().push(*row);
        }
    }
    rows
});

fn named(domain: &str, name: &str) -> &'static [Operator] {
    ROWS.get(domain).and_then(|rows| rows.get(name)).map(Vec::as_slice).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Case;

    #[test]
    fn no_row_is_listed_twice() {
        for (domain, families) in DOMAINS {
            let mut rows: Vec<(&str, i64)> =
                families.iter().copied().flatten().map(|row| (row.name, row.since)).collect();
            let count = rows.len();
            rows.sort_unstable();
            rows.dedup();
            assert_eq!(rows.len(), count, "domain `{domain}`");
        }
    }

    /// Versions of ONNX's schemas that a row stands for, as opsets.
    fn opsets(row: &Operator) -> Vec<i64> {
        let later = crate::schema::history("", row.name).map(|schema| schema.since).filter(|&since| since > row.since);
        std::iter::once(row.since).chain(later).collect()
    }

    #[test]
    fn every_row_is_an_operator_of_onnx() {
        for row in FAMILIES.iter().copied().flatten() {
            let schema = crate::schema::find("", row.name, row.since);
            let schema = schema.unwrap_or_else(|| panic!("{} {} is not in schema/operators.txt", row.name, row.since));
            assert!(!schema.is_deprecated || schema.since == row.since, "{} {} is deprecated", row.name, row.since);
        }
    }

    #[test]
    fn an_attribute_that_an_operator_does_not_have_is_refused_by_name() {
        let mut count = 0;
        for (row, opset) in
            FAMILIES.iter().copied().flatten().flat_map(|row| opsets(row).into_iter().map(move |opset| (row, opset)))
        {
            let text = Case::new(row.name, opset).int("invented", 1).error();
            let expected = format!("`/{name}`: {name} (opset {opset}): ", name = row.name);
            assert!(text.contains(&expected), "{text}");
            // A version that ONNX has removed is refused altogether.
            let removed = format!("ONNX has removed the operator from opset {opset} on");
            assert!(text.contains("it has no attribute `invented`") || text.contains(&removed), "{text}");
            count += 1;
        }
        assert!(count > 400, "{count} versions of operators");
    }

    #[test]
    fn the_latest_row_up_to_the_opset_holds() {
        let row = |since| {
            let rows = FAMILIES.iter().copied().flatten();
            rows.copied().find(|row| row.name == "Slice" && row.since == since).unwrap().lower
        };
        assert!(std::ptr::fn_addr_eq(find("", "Slice", 9).unwrap(), row(1)));
        assert!(std::ptr::fn_addr_eq(find("", "Slice", 10).unwrap(), row(10)));
        assert!(std::ptr::fn_addr_eq(find("", "Slice", 23).unwrap(), row(10)));
        assert!(find("", "Trilu", 13).unwrap_err().contains("opset 14"));
        assert!(find("com.example", "Slice", 13).is_err());
    }
}
