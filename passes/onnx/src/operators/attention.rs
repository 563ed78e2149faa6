//! Attention and rotary embeddings, as the composite primitives.

mod sight;

use ir::ValueId;
use planfile::op::{Causal, Combine, ReduceKind};
use planfile::text::count;
use planfile::{Binary, Compare, DType, Expr, Op, Real, Scalar, Unary};

use super::quantization::element_type;
use super::{Operator, row};
use crate::context::{Context, OpError, number};
use sight::Sight;

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Attention",       23, attention),
    row("RotaryEmbedding", 23, rotary),
];

fn attention(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (q, k, v) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let flat = ctx.rank(q) == 3;
    if !flat && ctx.opset() >= 25 && (ctx.has("q_num_heads") || ctx.has("kv_num_heads")) {
        return Err(ctx.invalid("`q_num_heads` and `kv_num_heads` are for operands of 3 dimensions"));
    }
    let q = split_heads(ctx, q, "q_num_heads")?;
    let k = split_heads(ctx, k, "kv_num_heads")?;
    let v = split_heads(ctx, v, "kv_num_heads")?;
    let (past, k, v) = match (ctx.optional(4), ctx.optional(5)) {
        (None, None) => (None, k, v),
        (Some(past_k), Some(past_v)) => {
            let past = ctx.sizes(past_k).get(2).copied();
            (past, ctx.concat(&[past_k, k], 2)?, ctx.concat(&[past_v, v], 2)?)
        }
        _ => return Err(ctx.invalid("past keys and past values come together")),
    };
    let scores = Scores::new(ctx, q, k, past)?;
    let sizes = ctx.sizes(q);
    let dtype = ctx.dtype(q);
    // The primitive computes in `f32` at least, which covers what else `softmax_precision` can ask for.
    let double = element_type(ctx, "softmax_precision")? == Some(DType::F64);
    let wide = if double { DType::F64 } else { dtype };
    let mut operands = vec![ctx.cast(q, wide)?, ctx.cast(k, wide)?, ctx.cast(v, wide)?];
    if let Some(mask) = scores.mask {
        operands.push(if ctx.dtype(mask) == DType::Bool { mask } else { ctx.cast(mask, wide)? });
    }
    let op = Op::Attention {
        scale: Real(scores.scale),
        causal: scores.causal,
        softcap: Real(scores.softcap),
        mask: scores.mask.is_some(),
    };
    let y = ctx.emit(op, &operands)?;
    let y = ctx.cast(y, dtype)?;
    let y = if flat { merge_heads(ctx, y)? } else { y };
    let mut results = vec![y, k, v];
    if ctx.wants(3) {
        results.push(scores.observed(ctx, q, k, &sizes)?);
    }
    Ok(results)
}

/// `[B, S, H * D]` as `[B, H, S, D]`; four dimensions already are.
fn split_heads(ctx: &mut Context<'_>, x: ValueId, heads: &str) -> Result<ValueId, OpError> {
    match ctx.sizes(x).as_slice() {
        [_, _, _, _] => Ok(x),
        &[batch, length, features] => {
            let heads = u64::try_from(ctx.required_int(heads)?).unwrap_or(0);
            if heads == 0 || !features.is_multiple_of(heads) {
                return Err(ctx.invalid(&format!("{} cannot be divided by {}", ctx.ty(x), count(heads, "head"))));
            }
            let split = ctx.reshape(x, &[batch, length, heads, features / heads])?;
            ctx.transpose(split, &[0, 2, 1, 3])
        }
        _ => Err(ctx.invalid(&format!("{} has neither 3 nor 4 dimensions", ctx.ty(x)))),
    }
}

/// `[B, H, S, D]` as `[B, S, H * D]`.
fn merge_heads(ctx: &mut Context<'_>, x: ValueId) -> Result<ValueId, OpError> {
    let x = ctx.transpose(x, &[0, 2, 1, 3])?;
    let sizes = ctx.sizes(x);
    let features = ctx.count(&sizes[2..])?;
    ctx.reshape(x, &[sizes[0], sizes[1], features])
}

/// What happens to the scores between the two products.
struct Scores {
    scale: f64,
    softcap: f64,
    causal: Option<Causal>,
    /// Boolean, or of the type of the queries.
    mask: Option<ValueId>,
}

impl Scores {
    /// `k` includes the `past` keys.
    fn new(ctx: &mut Context<'_>, q: ValueId, k: ValueId, past: Option<u64>) -> Result<Self, OpError> {
        let (q_sizes, k_sizes) = (ctx.sizes(q), ctx.sizes(k));
        let (&[batch, _, queries, features], &[_, _, keys, _]) = (q_sizes.as_slice(), k_sizes.as_slice()) else {
            return Err(ctx.invalid(&format!("queries {} and keys {}", ctx.ty(q), ctx.ty(k))));
        };
        let scale = if ctx.has("scale") { f64::from(ctx.float("scale", 1.0)?) } else { 1.0 / (features as f64).sqrt() };
        let mut mask = given_mask(ctx, q, keys)?;
        let sight = Sight::new(ctx, past)?;
        let causal = sight.causal(queries, keys);
        if let Some(visible) = sight.mask(ctx, causal.is_some(), [batch, queries, keys])? {
            mask = Some(restrict(ctx, mask, visible)?);
        }
        Ok(Self { scale, softcap: f64::from(ctx.float("softcap", 0.0)?).max(0.0), causal, mask })
    }

    /// The scores at the stage that `qk_matmul_output_mode` names, `[B, H, S, T]`.
    fn observed(&self, ctx: &mut Context<'_>, q: ValueId, k: ValueId, sizes: &[u64]) -> Result<ValueId, OpError> {
        let mode = ctx.int("qk_matmul_output_mode", 0)?;
        if !(0..=3).contains(&mode) {
            return Err(ctx.invalid(&format!("`qk_matmul_output_mode` is {mode}")));
        }
        let (dtype, k_sizes) = (ctx.dtype(q), ctx.sizes(k));
        let &[batch, heads, queries, features] = sizes else { return Err(ctx.invalid("queries need 4 dimensions")) };
        let (groups, keys) = (k_sizes[1], k_sizes[2]);
        if groups == 0 || !heads.is_multiple_of(groups) {
            return Err(ctx.invalid(&format!("{heads} query heads for {}", count(groups, "key head"))));
        }
        let q = ctx.reshape(q, &[batch, groups, heads / groups, queries, features])?;
        let contract = vec![(4, 3)];
        let op = Op::Dot { batch: vec![(0, 0), (1, 1)], contract, accumulate: dtype.accumulator(), out: dtype };
        let scores = ctx.emit(op, &[q, k])?;
        let scores = ctx.reshape(scores, &[batch, heads, queries, keys])?;
        let mut expr = Expr::operand(0).binary(Binary::Mul, number(dtype, self.scale));
        if mode >= 1 && self.softcap > 0.0 {
            let cap = || number(dtype, self.softcap);
            expr = expr.binary(Binary::Div, cap()).unary(Unary::Tanh).binary(Binary::Mul, cap());
        }
        if mode <= 1 {
            return ctx.pointwise(expr, &[scores]);
        }
        let hidden = || number(dtype, f64::NEG_INFINITY);
        if let Some(causal) = self.causal {
            let shift = match causal {
                Causal::FromStart => 0,
                Causal::FromEnd => (keys as i64).saturating_sub(queries as i64),
            };
            let last = Expr::index(2).binary(Binary::Add, Expr::constant(Scalar::i64(shift)));
            expr = Expr::index(3).compare(Compare::Le, last).select(expr, hidden());
        }
        let mut operands = vec![scores];
        if let Some(mask) = self.mask {
            operands.push(mask);
            expr = match ctx.dtype(mask) {
                DType::Bool => Expr::operand(1).select(expr, hidden()),
                _ => expr.binary(Binary::Add, Expr::operand(1)),
            };
        }
        let masked = ctx.pointwise(expr, &operands)?;
        if mode == 2 {
            return Ok(masked);
        }
        let weights = ctx.emit(Op::Softmax { axis: 3, log: false }, &[masked])?;
        if self.mask.is_none() {
            return Ok(weights);
        }
        // A query that sees nothing has weights of 0; its softmax is NaN.
        let most =
            ctx.emit(Op::Reduce { kind: ReduceKind::Combine(Combine::Max), axes: vec![3], keep: true }, &[masked])?;
        let hides_all = Expr::operand(1).compare(Compare::Eq, hidden());
        ctx.pointwise(hides_all.select(number(dtype, 0.0), Expr::operand(0)), &[weights, most])
    }
}

/// Input `attn_mask`: boolean or of the type of the queries. From opset 24 on it may end before the last key; what it
/// does not mention is hidden.
fn given_mask(ctx: &mut Context<'_>, q: ValueId, keys: u64) -> Result<Option<ValueId>, OpError> {
    let Some(mask) = ctx.optional(3) else { return Ok(None) };
    let boolean = ctx.dtype(mask) == DType::Bool;
    let mask = if boolean { mask } else { ctx.cast(mask, ctx.dtype(q))? };
    let sizes = ctx.sizes(mask);
    let Some(&width) = sizes.last() else { return Ok(Some(mask)) };
    let repeats = width == 1 && ctx.opset() < 24;
    if width >= keys || repeats {
        return Ok(Some(mask));
    }
    let dtype = ctx.dtype(mask);
    let hidden = ctx.scalar(dtype, if boolean { 0.0 } else { f64::NEG_INFINITY });
    let rest = [&sizes[..sizes.len() - 1], &[keys - width]].concat();
    let rest = ctx.broadcast(hidden, &rest)?;
    Ok(Some(ctx.concat(&[mask, rest], (sizes.len() - 1) as u8)?))
}

/// `mask`, and hidden where not `visible`.
fn restrict(ctx: &mut Context<'_>, mask: Option<ValueId>, visible: ValueId) -> Result<ValueId, OpError> {
    let Some(mask) = mask else { return Ok(visible) };
    let expr = match ctx.dtype(mask) {
        DType::Bool => Expr::operand(0).binary(Binary::And, Expr::operand(1)),
        dtype => Expr::operand(1).select(Expr::operand(0), number(dtype, f64::NEG_INFINITY)),
    };
    ctx.pointwise(expr, &[mask, visible])
}

fn rotary(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, cos, sin) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let (flat, dtype) = (ctx.rank(x) == 3, ctx.dtype(x));
    let x = split_heads(ctx, x, "num_heads")?;
    let rotary = match ctx.int("rotary_embedding_dim", 0)? {
        0 => ctx.sizes(x)[3],
        stated => u64::try_from(stated).map_err(|_| ctx.invalid(&format!("`rotary_embedding_dim` is {stated}")))?,
    };
    let table = |ctx: &mut Context<'_>, table: ValueId| -> Result<ValueId, OpError> {
        let rows = match ctx.optional(3) {
            Some(positions) => ctx.emit(Op::Gather { axis: 0 }, &[table, positions])?,
            None => table,
        };
        ctx.cast(rows, dtype)
    };
    let (cos, sin) = (table(ctx, cos)?, table(ctx, sin)?);
    let interleaved = ctx.flag("interleaved", false)?;
    let y = ctx.emit(Op::Rotary { interleaved, rotary }, &[x, cos, sin])?;
    Ok(vec![if flat { merge_heads(ctx, y)? } else { y }])
}

#[cfg(test)]
mod tests {
    use planfile::Tensor;

    use crate::harness::{Case, assert_close, bools, tensor};

    /// `[1, 1, n, 1]`: with keys of 0 all visible values weigh the same.
    fn column(elements: &[f32]) -> Tensor {
        tensor(&[1, 1, elements.len() as u64, 1], elements)
    }

    fn averages(opset: i64, queries: usize, values: &[f32]) -> Case {
        let zeros = column(&vec![0.0; values.len()]);
        Case::new("Attention", opset).input(column(&vec![1.0; queries])).input(zeros).input(column(values))
    }

    #[test]
    fn causal_queries_start_at_the_first_key() {
        let case = averages(23, 2, &[1.0, 3.0, 8.0]).int("is_causal", 1);
        assert_close(&case.one(), &[1, 1, 2, 1], &[1.0, 2.0]);
    }

    #[test]
    fn causal_queries_follow_the_past() {
        let case = averages(23, 2, &[6.0, 8.0]).int("is_causal", 1).outputs(3).without();
        let results = case.input(column(&[0.0, 0.0])).input(column(&[1.0, 2.0])).run();
        assert_close(&results[0], &[1, 1, 2, 1], &[3.0, 4.25]);
        assert_close(&results[2], &[1, 1, 4, 1], &[1.0, 2.0, 6.0, 8.0]);
    }

    #[test]
    fn causal_queries_follow_the_past_beside_more_new_keys() {
        let case = averages(23, 1, &[6.0, 8.0]).int("is_causal", 1).outputs(3).without();
        let results = case.input(column(&[0.0])).input(column(&[2.0])).run();
        assert_close(&results[0], &[1, 1, 1, 1], &[4.0]);
    }

    #[test]
    fn masks_hide_or_add() {
        let boolean = averages(23, 1, &[1.0, 3.0, 8.0]).input(bools(&[1, 3], &[true, true, false]));
        assert_close(&boolean.one(), &[1, 1, 1, 1], &[2.0]);
        let third = (0.5f32).ln();
        let additive = averages(23, 1, &[1.0, 4.0]).input(tensor(&[1, 2], &[0.0, third]));
        assert_close(&additive.one(), &[1, 1, 1, 1], &[2.0]);
    }

    #[test]
    fn a_short_mask_hides_the_rest() {
        let case = averages(24, 1, &[1.0, 3.0, 8.0]).input(tensor(&[1, 2], &[0f32, 0.0]));
        assert_close(&case.one(), &[1, 1, 1, 1], &[2.0]);
    }

    #[test]
    fn lengths_hide_padding() {
        let case = averages(24, 1, &[1.0, 3.0, 8.0]).without().without().without().input(tensor(&[1], &[2i64]));
        assert_close(&case.one(), &[1, 1, 1, 1], &[2.0]);
        let both = averages(24, 1, &[1.0, 3.0, 8.0]).input(bools(&[1, 3], &[false, true, true]));
        let both = both.without().without().input(tensor(&[1], &[2i64]));
        assert_close(&both.one(), &[1, 1, 1, 1], &[3.0]);
    }

    /// Lengths after queries, keys and values alone.
    fn valid(case: Case, lengths: &[i64]) -> Case {
        case.without().without().without().input(tensor(&[lengths.len() as u64], lengths))
    }

    #[test]
    fn causal_queries_end_at_the_last_valid_key() {
        // Two queries at the second and third of three valid keys; more queries than valid keys; no valid key.
        let case = |length| valid(averages(24, 2, &[1.0, 3.0, 8.0, 100.0]).int("is_causal", 1), &[length]).one();
        assert_close(&case(3), &[1, 1, 2, 1], &[2.0, 4.0]);
        assert_close(&case(4), &[1, 1, 2, 1], &[4.0, 28.0]);
        assert_close(&case(1), &[1, 1, 2, 1], &[0.0, 1.0]);
        assert_close(&case(0), &[1, 1, 2, 1], &[0.0, 0.0]);
    }

    #[test]
    fn each_sample_has_its_own_length() {
        let two = |elements: &[f32]| tensor(&[2, 1, elements.len() as u64 / 2, 1], elements);
        let case = Case::new("Attention", 24).int("is_causal", 1).input(two(&[1.0; 2])).input(two(&[0.0; 6]));
        let case = valid(case.input(two(&[1.0, 3.0, 8.0, 1.0, 3.0, 8.0])), &[2, 3]);
        assert_close(&case.one(), &[2, 1, 1, 1], &[2.0, 4.0]);
    }

    #[test]
    fn a_mask_of_heads_joins_lengths_of_samples() {
        let case = averages(24, 2, &[1.0, 3.0, 8.0, 100.0]).int("is_causal", 1);
        let mask = bools(&[1, 2, 4], &[true, false, true, true, false, true, true, true]);
        let case = case.input(mask).without().without().input(tensor(&[1], &[3i64]));
        assert_close(&case.one(), &[1, 1, 2, 1], &[1.0, 5.5]);
    }

    #[test]
    fn lengths_do_not_go_with_past_keys() {
        let case = averages(24, 1, &[1.0]).without().input(column(&[0.0])).input(column(&[1.0]));
        let error = case.input(tensor(&[1], &[1i64])).error();
        assert!(error.contains("`nonpad_kv_seqlen` does not go together with past keys"), "{error}");
    }

    #[test]
    fn windows_bound_what_is_seen_on_either_side() {
        let case = |left, right, causal| {
            let case = averages(25, 4, &[1.0, 3.0, 8.0, 12.0]).int("is_causal", causal);
            case.int("left_window_size", left).int("right_window_size", right).one()
        };
        assert_close(&case(1, -1, 1), &[1, 1, 4, 1], &[1.0, 2.0, 5.5, 10.0]);
        assert_close(&case(1, 0, 0), &[1, 1, 4, 1], &[1.0, 2.0, 5.5, 10.0]);
        assert_close(&case(1, 3, 1), &[1, 1, 4, 1], &[1.0, 2.0, 5.5, 10.0]);
        assert_close(&case(-1, 1, 0), &[1, 1, 4, 1], &[2.0, 4.0, 6.0, 6.0]);
        assert_close(&case(0, 1, 0), &[1, 1, 4, 1], &[2.0, 5.5, 10.0, 12.0]);
        assert_close(&case(0, 0, 0), &[1, 1, 4, 1], &[1.0, 3.0, 8.0, 12.0]);
        assert_close(&case(i64::MAX, i64::MAX, 0), &[1, 1, 4, 1], &[6.0; 4]);
        assert_close(&case(-1, -1, 0), &[1, 1, 4, 1], &[6.0; 4]);
        let error = averages(25, 1, &[1.0]).int("left_window_size", -2).error();
        assert!(error.contains("`left_window_size` is -2"), "{error}");
    }

    #[test]
    fn windows_follow_the_past_and_lengths() {
        let past = averages(25, 1, &[8.0]).int("left_window_size", 1).int("is_causal", 1).outputs(3).without();
        let past = past.input(column(&[0.0, 0.0])).input(column(&[1.0, 2.0])).run();
        assert_close(&past[0], &[1, 1, 1, 1], &[5.0]);
        let case = |left, right, length| {
            let case = averages(25, 2, &[1.0, 3.0, 8.0, 100.0]).int("left_window_size", left);
            valid(case.int("right_window_size", right), &[length]).one()
        };
        // The queries are at the second and third key, of which the last is not valid.
        assert_close(&case(0, -1, 3), &[1, 1, 2, 1], &[5.5, 8.0]);
        assert_close(&case(0, 1, 3), &[1, 1, 2, 1], &[5.5, 8.0]);
        assert_close(&case(1, 0, 3), &[1, 1, 2, 1], &[2.0, 5.5]);
        // One valid key: the first query is before it.
        assert_close(&case(1, 0, 1), &[1, 1, 2, 1], &[0.0, 1.0]);
        assert_close(&case(0, 1, 1), &[1, 1, 2, 1], &[1.0, 1.0]);
    }

    #[test]
    fn what_sees_nothing_has_no_weights() {
        let case = |mode| {
            let case = averages(23, 2, &[1.0, 3.0]).int("qk_matmul_output_mode", mode).outputs(4);
            case.input(bools(&[2, 2], &[false, false, true, false])).run()
        };
        let results = case(3);
        assert_close(&results[0], &[1, 1, 2, 1], &[0.0, 1.0]);
        assert_close(&results[3], &[1, 1, 2, 2], &[0.0, 0.0, 1.0, 0.0]);
        let hidden = f32::NEG_INFINITY;
        assert_close(&case(2)[3], &[1, 1, 2, 2], &[hidden, hidden, 0.0, hidden]);
        let case = averages(23, 1, &[1.0, 3.0]).int("qk_matmul_output_mode", 3).outputs(4);
        let added = case.input(tensor(&[1, 2], &[hidden, hidden])).run();
        assert_close(&added[3], &[1, 1, 1, 2], &[0.0, 0.0]);
        let case = averages(24, 2, &[1.0, 3.0]).int("qk_matmul_output_mode", 3).int("is_causal", 1).outputs(4);
        assert_close(&valid(case, &[1]).run()[3], &[1, 1, 2, 2], &[0.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn flat_heads_are_split_and_merged() {
        let flat = |elements: &[f32]| tensor(&[1, 2, 2], elements);
        let case = Case::new("Attention", 23).int("q_num_heads", 2).int("kv_num_heads", 1).input(flat(&[1.0; 4]));
        let case = case.input(tensor(&[1, 2, 1], &[0f32, 0.0])).input(tensor(&[1, 2, 2], &[1f32, 10.0, 3.0, 30.0]));
        assert_close(&case.one(), &[1, 2, 4], &[2.0, 20.0, 2.0, 20.0, 2.0, 20.0, 2.0, 20.0]);
    }

    #[test]
    fn heads_that_are_apart_are_not_counted_by_attributes() {
        let error = averages(25, 1, &[1.0]).int("kv_num_heads", 1).error();
        assert!(error.contains("`q_num_heads` and `kv_num_heads` are for operands of 3 dimensions"), "{error}");
        assert_close(&averages(24, 1, &[1.0]).int("kv_num_heads", 1).one(), &[1, 1, 1, 1], &[1.0]);
    }

    #[test]
    fn scores_can_be_watched() {
        let case = |mode| {
            let case = Case::new("Attention", 23).int("qk_matmul_output_mode", mode).float("scale", 2.0).outputs(4);
            let case = case.float("softcap", 4.0).input(column(&[1.0])).input(column(&[1.0, 2.0]));
            case.input(column(&[0.0, 0.0])).input(bools(&[1, 2], &[true, false])).run().remove(3)
        };
        assert_close(&case(0), &[1, 1, 1, 2], &[2.0, 4.0]);
        let capped = [4.0 * 0.5f32.tanh(), 4.0 * 1f32.tanh()];
        assert_close(&case(1), &[1, 1, 1, 2], &capped);
        assert_close(&case(2), &[1, 1, 1, 2], &[capped[0], f32::NEG_INFINITY]);
        assert_close(&case(3), &[1, 1, 1, 2], &[1.0, 0.0]);
    }

    #[test]
    fn rotation_gathers_its_tables_by_position() {
        let x = tensor(&[1, 1, 1, 3], &[1f32, 2.0, 5.0]);
        let case = Case::new("RotaryEmbedding", 23).int("rotary_embedding_dim", 2).input(x);
        // A quarter turn at position 1; the third feature stays.
        let case = case.constant(tensor(&[2, 1], &[1f32, 0.0])).constant(tensor(&[2, 1], &[0f32, 1.0]));
        assert_close(&case.input(tensor(&[1, 1], &[1i64])).one(), &[1, 1, 1, 3], &[-2.0, 1.0, 5.0]);
    }

    #[test]
    fn flat_rotation_needs_the_number_of_heads() {
        let case = || {
            let table = |value: f32| tensor(&[1, 1, 1], &[value]);
            let x = tensor(&[1, 1, 4], &[1f32, 2.0, 3.0, 4.0]);
            Case::new("RotaryEmbedding", 23).int("interleaved", 1).input(x).input(table(0.0)).input(table(1.0))
        };
        assert_close(&case().int("num_heads", 2).one(), &[1, 1, 4], &[-2.0, 1.0, -4.0, 3.0]);
        assert!(case().error().contains("`num_heads` is missing"), "{}", case().error());
    }
}
