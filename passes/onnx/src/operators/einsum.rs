//! Einstein summation, as a chain of products of two.
//!
//! Each step sums out what only one side has and nobody needs later; labels that both sides have are batch
//! dimensions of a `Dot` if still needed, contracted otherwise. Without contracted labels the step is a `Pointwise`
//! product. A label that a term repeats is a diagonal, which is a strided slice of both dimensions flattened.

use std::collections::BTreeMap;

use ir::ValueId;
use planfile::op::ReduceKind;
use planfile::{Binary, Combine, Expr, Op};

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Einsum", 12, einsum),
];

/// Name of a dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Letter(char),
    /// Of the ellipsis, counted from its last dimension.
    Ellipsis(usize),
}

/// A value and the labels of its dimensions, all different.
struct Term {
    value: ValueId,
    labels: Vec<Label>,
}

fn einsum(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let equation: String = ctx.string("equation", "")?.chars().filter(|c| *c != ' ').collect();
    let (left, right) = match equation.split_once("->") {
        Some((left, right)) => (left, Some(right)),
        None => (equation.as_str(), None),
    };
    let operands = ctx.variadic()?;
    let texts: Vec<&str> = left.split(',').collect();
    if texts.len() != operands.len() {
        return Err(ctx.invalid(&format!(
            "equation `{equation}` has {} terms for {} inputs",
            texts.len(),
            operands.len()
        )));
    }
    let mut terms = Vec::new();
    let mut ellipsis = 0;
    for (text, value) in texts.into_iter().zip(operands) {
        let (letters, dims) = (text.chars().filter(|c| *c != '.').count(), ctx.rank(value));
        let hidden = dims.checked_sub(letters).filter(|&hidden| hidden == 0 || text.contains("..."));
        let hidden = hidden.ok_or_else(|| ctx.invalid(&format!("term `{text}` for {}", ctx.ty(value))))?;
        ellipsis = ellipsis.max(hidden);
        terms.push(diagonal(ctx, value, parse(ctx, text, hidden)?)?);
    }
    let sizes = label_sizes(ctx, &terms)?;
    let output = match right {
        Some(text) => parse(ctx, text, ellipsis)?,
        None => implicit_output(left, ellipsis),
    };
    if let Some(label) = repeated(&output) {
        return Err(ctx.invalid(&format!("the result of `{equation}` names {label:?} twice")));
    }
    if let Some(label) = output.iter().find(|label| !sizes.contains_key(label)) {
        return Err(ctx.invalid(&format!("`{equation}` does not say what {label:?} of the result is")));
    }
    for term in &mut terms {
        drop_ones(ctx, term, &sizes)?;
    }
    Ok(vec![contract_all(ctx, terms, &output)?])
}

/// Labels of a term, in order; letters may repeat.
fn parse(ctx: &Context<'_>, text: &str, ellipsis: usize) -> Result<Vec<Label>, OpError> {
    let hidden = || (0..ellipsis).rev().map(Label::Ellipsis);
    let letters = |text: &str| -> Vec<Label> { text.chars().map(Label::Letter).collect() };
    let labels = match text.split_once("...") {
        Some((before, after)) => letters(before).into_iter().chain(hidden()).chain(letters(after)).collect(),
        None => letters(text),
    };
    let strange = labels.iter().any(|label| matches!(label, Label::Letter(c) if !c.is_ascii_alphabetic()));
    if strange {
        return Err(ctx.invalid(&format!("term `{text}` of the equation has characters other than letters")));
    }
    Ok(labels)
}

/// A label that occurs again further on.
fn repeated(labels: &[Label]) -> Option<Label> {
    labels.iter().enumerate().find(|(position, label)| labels[position + 1..].contains(label)).map(|(_, &label)| label)
}

/// Merges dimensions of one label: moved to the end and flattened, their diagonal is every `n + 1`-th element.
fn diagonal(ctx: &mut Context<'_>, mut value: ValueId, mut labels: Vec<Label>) -> Result<Term, OpError> {
    while let Some(label) = repeated(&labels) {
        let own: Vec<usize> = (0..labels.len()).filter(|&axis| labels[axis] == label).take(2).collect();
        let others: Vec<usize> = (0..labels.len()).filter(|axis| !own.contains(axis)).collect();
        let sizes = ctx.sizes(value);
        let size = sizes[own[0]];
        if sizes[own[1]] != size {
            return Err(ctx.invalid(&format!("{label:?} has two sizes in {}", ctx.ty(value))));
        }
        let permutation: Vec<u8> = others.iter().chain(&own).map(|&axis| axis as u8).collect();
        let moved = ctx.transpose(value, &permutation)?;
        let mut kept: Vec<u64> = others.iter().map(|&axis| sizes[axis]).collect();
        kept.push(ctx.count(&[size, size])?);
        let flat = ctx.reshape(moved, &kept)?;
        kept[others.len()] = size;
        let mut steps = vec![1; kept.len()];
        steps[others.len()] = i64::try_from(size).unwrap_or(i64::MAX).saturating_add(1);
        value = ctx.slice(flat, &vec![0; kept.len()], &steps, &kept)?;
        labels = others.iter().map(|&axis| labels[axis]).chain([label]).collect();
    }
    Ok(Term { value, labels })
}

/// Ellipsis first, then the letters that occur once, in alphabetical order.
fn implicit_output(terms: &str, ellipsis: usize) -> Vec<Label> {
    let mut counts: BTreeMap<char, usize> = BTreeMap::new();
    for letter in terms.chars().filter(char::is_ascii_alphabetic) {
        *counts.entry(letter).or_default() += 1;
    }
    let letters = counts.into_iter().filter(|(_, count)| *count == 1);
    (0..ellipsis).rev().map(Label::Ellipsis).chain(letters.map(|(letter, _)| Label::Letter(letter))).collect()
}

/// Size of each label; a size of 1 gives way to another.
fn label_sizes(ctx: &Context<'_>, terms: &[Term]) -> Result<BTreeMap<Label, u64>, OpError> {
    let mut sizes: BTreeMap<Label, u64> = BTreeMap::new();
    for term in terms {
        for (&label, size) in term.labels.iter().zip(ctx.sizes(term.value)) {
            let known = sizes.entry(label).or_insert(size);
            if *known == 1 {
                *known = size;
            } else if size != 1 && size != *known {
                return Err(ctx.invalid(&format!("{label:?} has sizes {known} and {size}")));
            }
        }
    }
    Ok(sizes)
}

/// Removes dimensions of size 1 that stand for a larger one: broadcasting is absence.
fn drop_ones(ctx: &mut Context<'_>, term: &mut Term, sizes: &BTreeMap<Label, u64>) -> Result<(), OpError> {
    let own = ctx.sizes(term.value);
    let stays = |label: &Label, size: u64| size != 1 || sizes.get(label) == Some(&1);
    let kept: Vec<(Label, u64)> =
        term.labels.iter().copied().zip(own).filter(|(label, size)| stays(label, *size)).collect();
    let (labels, sizes): (Vec<Label>, Vec<u64>) = kept.into_iter().unzip();
    *term = Term { value: ctx.reshape(term.value, &sizes)?, labels };
    Ok(())
}

fn contract_all(ctx: &mut Context<'_>, terms: Vec<Term>, output: &[Label]) -> Result<ValueId, OpError> {
    let mut rest = terms.into_iter();
    let Some(mut product) = rest.next() else { return Err(ctx.invalid("the equation has no terms")) };
    while let Some(next) = rest.next() {
        let later = rest.as_slice().iter().flat_map(|term| &term.labels);
        let needed: Vec<Label> = output.iter().chain(later).copied().collect();
        product = multiply(ctx, product, next, &needed)?;
    }
    let product = sum_out(ctx, product, |label| output.contains(&label))?;
    ctx.transpose(product.value, &order(&product.labels, output))
}

/// For each of `wanted` that is in `labels`, where.
fn order(labels: &[Label], wanted: &[Label]) -> Vec<u8> {
    let place = |label| labels.iter().position(|other| other == label);
    wanted.iter().filter_map(place).map(|axis| axis as u8).collect()
}

fn sum_out(ctx: &mut Context<'_>, term: Term, stays: impl Fn(Label) -> bool) -> Result<Term, OpError> {
    let gone: Vec<Label> = term.labels.iter().copied().filter(|&label| !stays(label)).collect();
    if gone.is_empty() {
        return Ok(term);
    }
    let axes = order(&term.labels, &gone);
    let kind = ReduceKind::Combine(Combine::Sum);
    let value = ctx.emit(Op::Reduce { kind, axes, keep: false }, &[term.value])?;
    Ok(Term { value, labels: term.labels.into_iter().filter(|&label| stays(label)).collect() })
}

/// The product of two terms, summed over what is not needed.
fn multiply(ctx: &mut Context<'_>, a: Term, b: Term, needed: &[Label]) -> Result<Term, OpError> {
    let (a_labels, b_labels) = (a.labels.clone(), b.labels.clone());
    let a = sum_out(ctx, a, |label| b_labels.contains(&label) || needed.contains(&label))?;
    let b = sum_out(ctx, b, |label| a_labels.contains(&label) || needed.contains(&label))?;
    let shared = |label: &&Label| a.labels.contains(label) && b.labels.contains(label);
    let contract: Vec<Label> =
        a.labels.iter().filter(shared).filter(|label| !needed.contains(label)).copied().collect();
    if contract.is_empty() {
        return spread_product(ctx, a, b);
    }
    // In the order they are needed in, so that mostly no transpose follows.
    let mut batch: Vec<Label> = Vec::new();
    for label in needed.iter().filter(shared) {
        if !batch.contains(label) {
            batch.push(*label);
        }
    }
    let free = |term: &Term| -> Vec<Label> { term.labels.iter().filter(|label| !shared(label)).copied().collect() };
    let swapped = [&batch[..], &free(&b), &free(&a)].concat() == needed;
    let (a, b) = if swapped { (b, a) } else { (a, b) };
    let labels = {
        let free = |term: &Term, other: &Term| -> Vec<Label> {
            term.labels.iter().filter(|label| !other.labels.contains(label)).copied().collect()
        };
        [&batch[..], &free(&a, &b), &free(&b, &a)].concat()
    };
    let pairs = |shared: &[Label]| order(&a.labels, shared).into_iter().zip(order(&b.labels, shared)).collect();
    let dtype = ctx.dtype(a.value);
    let op = Op::Dot { batch: pairs(&batch), contract: pairs(&contract), accumulate: dtype.accumulator(), out: dtype };
    Ok(Term { value: ctx.emit(op, &[a.value, b.value])?, labels })
}

/// The product with nothing to sum: dimensions of `a`, then those that only `b` has.
fn spread_product(ctx: &mut Context<'_>, a: Term, b: Term) -> Result<Term, OpError> {
    let own = b.labels.iter().filter(|label| !a.labels.contains(label));
    let labels: Vec<Label> = a.labels.iter().chain(own).copied().collect();
    let missing = |term: &Term| -> Vec<u8> {
        labels
            .iter()
            .enumerate()
            .filter(|(_, label)| !term.labels.contains(label))
            .map(|(axis, _)| axis as u8)
            .collect()
    };
    let left = ctx.unsqueeze(a.value, &missing(&a))?;
    let right = ctx.transpose(b.value, &order(&b.labels, &labels))?;
    let right = ctx.unsqueeze(right, &missing(&b))?;
    let value = ctx.pointwise(Expr::operand(0).binary(Binary::Mul, Expr::operand(1)), &[left, right])?;
    Ok(Term { value, labels })
}

#[cfg(test)]
mod tests {
    use planfile::Tensor;

    use crate::harness::{Case, assert_close, tensor};

    fn einsum(equation: &str, operands: Vec<Tensor>) -> Case {
        operands.into_iter().fold(Case::new("Einsum", 12).string("equation", equation), Case::input)
    }

    fn counted(sizes: &[u64]) -> Tensor {
        let elements: Vec<f32> = (1..=sizes.iter().product::<u64>()).map(|x| x as f32).collect();
        tensor(sizes, &elements)
    }

    #[test]
    fn contracts_in_the_order_of_the_result() {
        let case = einsum("ij,jk->ki", vec![counted(&[2, 2]), counted(&[2, 2])]);
        assert_close(&case.one(), &[2, 2], &[7.0, 15.0, 10.0, 22.0]);
        let module = case.import().unwrap();
        assert_eq!(module.graphs[0].nodes().len(), 1, "one product, no transpose");
    }

    #[test]
    fn attention_scores_are_one_batched_product() {
        let case = einsum("bqhd,bkhd->bhqk", vec![counted(&[1, 1, 2, 2]), counted(&[1, 2, 2, 2])]);
        assert_close(&case.one(), &[1, 2, 1, 2], &[5.0, 17.0, 25.0, 53.0]);
        assert_eq!(case.import().unwrap().graphs[0].nodes().len(), 1);
    }

    #[test]
    fn sums_diagonals_and_outer_products() {
        assert_close(&einsum("ij->j", vec![counted(&[2, 2])]).one(), &[2], &[4.0, 6.0]);
        assert_close(&einsum("ii->i", vec![counted(&[2, 2])]).one(), &[2], &[1.0, 4.0]);
        assert_close(&einsum("ii", vec![counted(&[2, 2])]).one(), &[], &[5.0]);
        assert_close(&einsum("i,j->ji", vec![counted(&[2]), counted(&[2])]).one(), &[2, 2], &[1.0, 2.0, 2.0, 4.0]);
    }

    #[test]
    fn the_ellipsis_broadcasts() {
        let case = einsum("...ij,...jk", vec![counted(&[2, 1, 1]), counted(&[1, 1, 2])]);
        assert_close(&case.one(), &[2, 1, 2], &[1.0, 2.0, 2.0, 4.0]);
    }

    #[test]
    fn refuses_labels_that_do_not_fit() {
        let sizes = einsum("ij,jk->ik", vec![counted(&[2, 2]), counted(&[3, 2])]).error();
        assert!(sizes.contains("has sizes 2 and 3"), "{sizes}");
        let unknown = einsum("ij->ik", vec![counted(&[2, 2])]).error();
        assert!(unknown.contains("does not say"), "{unknown}");
        let rank = einsum("ijk->i", vec![counted(&[2, 2])]).error();
        assert!(rank.contains("term `ijk`"), "{rank}");
    }
}
