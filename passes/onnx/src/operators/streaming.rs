//! Operators that carry a state from call to call: linear attention, and convolution over the past.

use ir::ValueId;
use planfile::op::Window;
use planfile::{DType, Expr, Op, Unary};

use super::activation::{add, mul, sub};
use super::convolution::add_bias;
use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("CausalConvWithState", 27, causal_conv),
    row("LinearAttention",     27, linear_attention),
];

/// Steps that are unrolled at most.
const STEPS_MAX: u64 = 2048;

/// A convolution of each channel with the `k - 1` positions before it, which the state holds.
fn causal_conv(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, w) = (ctx.operand(0)?, ctx.operand(1)?);
    let (&[batch, channels, length], &[_, 1, width]) = (&ctx.sizes(x)[..], &ctx.sizes(w)[..]) else {
        return Err(ctx.invalid(&format!("input {} and weights {}", ctx.ty(x), ctx.ty(w))));
    };
    let Some(before) = width.checked_sub(1) else { return Err(ctx.invalid("the weights are empty")) };
    let dtype = ctx.dtype(x);
    let past = match ctx.optional(3) {
        Some(past) => past,
        None => {
            let zero = ctx.scalar(dtype, 0.0);
            ctx.broadcast(zero, &[batch, channels, before])?
        }
    };
    let padded = ctx.concat(&[past, x], 2)?;
    let window = Window { sizes: vec![width], strides: vec![1], dilations: vec![1], pads: vec![(0, 0)] };
    let op = Op::Conv { window, groups: channels, transposed: false, output_pads: vec![0] };
    let y = ctx.emit(op, &[padded, w])?;
    let bias = ctx.optional(2);
    let y = add_bias(ctx, y, bias)?;
    let y = match ctx.string("activation", "none")?.as_str() {
        "none" => y,
        "silu" | "swish" => {
            let wide = || Expr::operand(0).cast(dtype.accumulator());
            ctx.pointwise(mul(wide(), wide().unary(Unary::Sigmoid)).cast(dtype), &[y])?
        }
        other => return Err(ctx.invalid(&format!("`activation` is `{other}`"))),
    };
    Ok(vec![y, ctx.slice_axis(padded, 2, length, before)?])
}

/// Heads and features of a linear attention; `groups` query heads share a key head.
struct Heads {
    batch: u64,
    heads: u64,
    groups: u64,
    key: u64,
    value: u64,
}

/// A matrix of keys by values per head, updated at each step and read by the query. In `f32`.
///
/// ```text
/// state ← exp(decay) state;  value ← beta (value - stateᵀ key);  state ← state + key valueᵀ
/// output = scale · stateᵀ query
/// ```
fn linear_attention(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (query, key, value) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let positive = |name| ctx.required_int(name).map(|heads| u64::try_from(heads).ok().filter(|&heads| heads > 0));
    let (Some(query_heads), Some(heads)) = (positive("q_num_heads")?, positive("kv_num_heads")?) else {
        return Err(ctx.invalid("numbers of heads must be positive"));
    };
    let (&[batch, steps, width], &[_, _, keys], &[_, _, values]) =
        (&ctx.sizes(query)[..], &ctx.sizes(key)[..], &ctx.sizes(value)[..])
    else {
        return Err(ctx.invalid("query, key and value must have three dimensions"));
    };
    let fits = query_heads % heads == 0 && keys % heads == 0 && values % heads == 0;
    if !fits || width != keys / heads * query_heads {
        return Err(ctx.invalid(&format!("{query_heads} and {heads} heads for {} and {}", ctx.ty(query), ctx.ty(key))));
    }
    if steps > STEPS_MAX {
        return Err(ctx.unsupported(&format!("{steps} steps; sequences of at most {STEPS_MAX} steps are unrolled")));
    }
    let sizes = Heads { batch, heads, groups: query_heads / heads, key: keys / heads, value: values / heads };
    let rule = ctx.string("update_rule", "gated_delta")?;
    if !["linear", "gated", "delta", "gated_delta"].contains(&rule.as_str()) {
        return Err(ctx.invalid(&format!("`update_rule` is `{rule}`")));
    }
    let decay = if rule.starts_with("gated") { Some(ctx.operand(4)?) } else { None };
    let beta = if rule.ends_with("delta") { Some(ctx.operand(5)?) } else { None };
    let scale = match ctx.float("scale", 0.0)? {
        0.0 => 1.0 / (sizes.key as f64).sqrt(),
        scale => f64::from(scale),
    };
    let dtype = ctx.dtype(query);
    let state_dtype = ctx.optional(3).map_or(dtype, |past| ctx.dtype(past));
    let mut state = match ctx.optional(3) {
        Some(past) => ctx.cast(past, DType::F32)?,
        None => {
            let zero = ctx.scalar(DType::F32, 0.0);
            ctx.broadcast(zero, &[batch, heads, sizes.key, sizes.value])?
        }
    };
    let mut outputs = Vec::new();
    for step in 0..steps {
        let mut at = |value: ValueId, shape: &[u64]| {
            let value = ctx.slice_axis(value, 1, step, 1)?;
            let value = ctx.reshape(value, shape)?;
            ctx.cast(value, DType::F32)
        };
        let q = at(query, &[batch, heads, sizes.groups, sizes.key])?;
        let k = at(key, &[batch, heads, sizes.key, 1])?;
        let v = at(value, &[batch, heads, 1, sizes.value])?;
        let last = |ctx: &Context<'_>, value: ValueId| ctx.sizes(value).get(2).copied().unwrap_or(0);
        let decay = match decay {
            Some(decay) if last(ctx, decay) == heads => Some((decay, 1)),
            Some(decay) => Some((decay, sizes.key)),
            None => None,
        };
        if let Some((decay, keys)) = decay {
            let decay = step_of(ctx, decay, step, &[batch, heads, keys, 1])?;
            state = ctx.pointwise(mul(Expr::operand(0), Expr::operand(1).unary(Unary::Exp)), &[state, decay])?;
        }
        let v = match beta {
            Some(beta) => {
                let shared = last(ctx, beta);
                let beta = step_of(ctx, beta, step, &[batch, shared, 1, 1])?;
                correction(ctx, &sizes, state, k, v, beta)?
            }
            None => v,
        };
        let update = add(Expr::operand(0), mul(Expr::operand(1), Expr::operand(2)));
        state = ctx.pointwise(update, &[state, k, v])?;
        let read = product(ctx, q, 3, state)?;
        let read = ctx.pointwise(mul(number(DType::F32, scale), Expr::operand(0)).cast(dtype), &[read])?;
        outputs.push(ctx.reshape(read, &[batch, 1, query_heads * sizes.value])?);
    }
    let output = if outputs.is_empty() {
        let zero = ctx.scalar(dtype, 0.0);
        ctx.broadcast(zero, &[batch, 0, query_heads * sizes.value])?
    } else {
        ctx.concat(&outputs, 1)?
    };
    Ok(vec![output, ctx.cast(state, state_dtype)?])
}

/// One step of `[batch, steps, …]`, as `f32` of this shape.
fn step_of(ctx: &mut Context<'_>, value: ValueId, step: u64, shape: &[u64]) -> Result<ValueId, OpError> {
    let value = ctx.slice_axis(value, 1, step, 1)?;
    let value = ctx.reshape(value, shape)?;
    ctx.cast(value, DType::F32)
}

/// Contracts an axis of `a: [batch, heads, …]` with the keys of the state.
fn product(ctx: &mut Context<'_>, a: ValueId, axis: u8, state: ValueId) -> Result<ValueId, OpError> {
    let batch = vec![(0, 0), (1, 1)];
    let op = Op::Dot { batch, contract: vec![(axis, 2)], accumulate: DType::F32, out: DType::F32 };
    ctx.emit(op, &[a, state])
}

/// `beta (value - stateᵀ key)`
fn correction(
    ctx: &mut Context<'_>,
    sizes: &Heads,
    state: ValueId,
    key: ValueId,
    value: ValueId,
    beta: ValueId,
) -> Result<ValueId, OpError> {
    let known = product(ctx, key, 2, state)?;
    let known = ctx.reshape(known, &[sizes.batch, sizes.heads, 1, sizes.value])?;
    ctx.pointwise(mul(Expr::operand(2), sub(Expr::operand(0), Expr::operand(1))), &[value, known, beta])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn convolution_sees_the_past() {
        let case = Case::new("CausalConvWithState", 27).input(tensor(&[1, 1, 3], &[1f32, 2.0, 3.0]));
        let case = case.constant(tensor(&[1, 1, 2], &[10f32, 1.0])).without();
        let found = case.clone().input(tensor(&[1, 1, 1], &[5f32])).outputs(2).run();
        assert_close(&found[0], &[1, 1, 3], &[51.0, 12.0, 23.0]);
        assert_close(&found[1], &[1, 1, 1], &[3.0]);
        assert_close(&case.outputs(2).run()[0], &[1, 1, 3], &[1.0, 12.0, 23.0]);
    }

    #[test]
    fn the_state_sums_what_was_said() {
        let sequence = |elements: &[f32]| tensor(&[1, 2, 1], elements);
        let case = |rule| {
            let case = Case::new("LinearAttention", 27).string("update_rule", rule);
            let case = case.int("q_num_heads", 1).int("kv_num_heads", 1);
            case.input(sequence(&[1.0, 2.0])).input(sequence(&[1.0, 3.0])).input(sequence(&[5.0, 7.0]))
        };
        let found = case("linear").outputs(2).run();
        assert_close(&found[0], &[1, 2, 1], &[5.0, 52.0]);
        assert_close(&found[1], &[1, 1, 1, 1], &[26.0]);
        // The second value is half of what the state does not say yet: 7 - 3 · 2.5.
        let delta = case("delta").without().without().input(sequence(&[0.5, 0.5])).outputs(2).run();
        assert_close(&delta[1], &[1, 1, 1, 1], &[2.5 + 3.0 * 0.5 * (7.0 - 7.5)]);
        let gated = case("gated").without().input(sequence(&[0.0, 2f32.ln()])).outputs(2).run();
        assert_close(&gated[1], &[1, 1, 1, 1], &[31.0]);
        assert!(case("other").outputs(2).error().contains("update_rule"));
    }
}
