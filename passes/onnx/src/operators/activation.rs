//! Activation functions: compositions in the operand's own type.

use ir::ValueId;
use planfile::{Binary, Compare, DType, Expr, Unary};

use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Affine",          1,  affine),
    row("Celu",            12, celu),
    row("Clip",            6,  clip_by_attributes),
    row("Clip",            11, clip),
    row("Elu",             6,  elu),
    row("Gelu",            20, gelu),
    row("HardSigmoid",     6,  hard_sigmoid),
    row("HardSwish",       14, hard_swish),
    row("LeakyRelu",       6,  leaky_relu),
    row("Mish",            18, mish),
    row("PRelu",           7,  prelu),
    row("Relu",            6,  relu),
    row("Selu",            6,  selu),
    row("Shrink",          9,  shrink),
    row("Softplus",        1,  softplus),
    row("Softsign",        1,  softsign),
    row("SwiGLU",          28, swiglu),
    row("Swish",           24, swish),
    row("ThresholdedRelu", 10, thresholded_relu),
];

/// The operand, and constants of its type.
struct Of(DType);

impl Of {
    fn x(&self) -> Expr {
        Expr::operand(0)
    }

    fn n(&self, value: f32) -> Expr {
        number(self.0, f64::from(value))
    }

    /// `yes` where the operand is below `bound`, else `no`.
    fn below(&self, bound: f32, yes: Expr, no: Expr) -> Expr {
        self.x().compare(Compare::Lt, self.n(bound)).select(yes, no)
    }

    /// `yes` where the operand is above `bound`, else `no`.
    fn above(&self, bound: f32, yes: Expr, no: Expr) -> Expr {
        self.x().compare(Compare::Gt, self.n(bound)).select(yes, no)
    }
}

pub(super) fn add(a: Expr, b: Expr) -> Expr {
    a.binary(Binary::Add, b)
}

pub(super) fn sub(a: Expr, b: Expr) -> Expr {
    a.binary(Binary::Sub, b)
}

pub(super) fn mul(a: Expr, b: Expr) -> Expr {
    a.binary(Binary::Mul, b)
}

pub(super) fn max(a: Expr, b: Expr) -> Expr {
    a.binary(Binary::Max, b)
}

pub(super) fn min(a: Expr, b: Expr) -> Expr {
    a.binary(Binary::Min, b)
}

fn activation(ctx: &mut Context<'_>, build: impl FnOnce(&Of) -> Expr) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let expr = build(&Of(ctx.dtype(x)));
    Ok(vec![ctx.pointwise(expr, &[x])?])
}

fn relu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    activation(ctx, |of| max(of.x(), of.n(0.0)))
}

fn affine(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (alpha, beta) = (ctx.float("alpha", 1.0)?, ctx.float("beta", 0.0)?);
    activation(ctx, |of| add(mul(of.n(alpha), of.x()), of.n(beta)))
}

fn leaky_relu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let alpha = ctx.float("alpha", 0.01)?;
    activation(ctx, |of| of.below(0.0, mul(of.n(alpha), of.x()), of.x()))
}

/// The slope broadcasts to the data, never the other way.
fn prelu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, slope) = (ctx.operand(0)?, ctx.operand(1)?);
    if ctx.broadcast_sizes(&[x, slope])? != ctx.sizes(x) {
        return Err(ctx.invalid(&format!("slope {} does not broadcast to {}", ctx.ty(slope), ctx.ty(x))));
    }
    let of = Of(ctx.dtype(x));
    let expr = of.below(0.0, mul(Expr::operand(1), of.x()), of.x());
    Ok(vec![ctx.pointwise(expr, &[x, slope])?])
}

fn elu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let alpha = ctx.float("alpha", 1.0)?;
    activation(ctx, |of| of.below(0.0, mul(of.n(alpha), sub(of.x().unary(Unary::Exp), of.n(1.0))), of.x()))
}

fn celu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let alpha = ctx.float("alpha", 1.0)?;
    activation(ctx, |of| {
        let scaled = of.x().binary(Binary::Div, of.n(alpha));
        of.below(0.0, mul(of.n(alpha), sub(scaled.unary(Unary::Exp), of.n(1.0))), of.x())
    })
}

/// Defaults as the specification rounds them to `f32`.
fn selu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let alpha = ctx.float("alpha", 1.673_263_2)?;
    let gamma = ctx.float("gamma", 1.050_701)?;
    activation(ctx, |of| {
        let negative = sub(mul(of.n(alpha), of.x().unary(Unary::Exp)), of.n(alpha));
        mul(of.n(gamma), of.above(0.0, of.x(), negative))
    })
}

fn thresholded_relu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let alpha = ctx.float("alpha", 1.0)?;
    activation(ctx, |of| of.above(alpha, of.x(), of.n(0.0)))
}

/// `max(0, min(1, alpha x + beta))`
fn hard_sigmoid_of(of: &Of, alpha: f32, beta: f32) -> Expr {
    max(of.n(0.0), min(of.n(1.0), add(mul(of.n(alpha), of.x()), of.n(beta))))
}

fn hard_sigmoid(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (alpha, beta) = (ctx.float("alpha", 0.2)?, ctx.float("beta", 0.5)?);
    activation(ctx, |of| hard_sigmoid_of(of, alpha, beta))
}

fn hard_swish(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    activation(ctx, |of| mul(of.x(), hard_sigmoid_of(of, 1.0 / 6.0, 0.5)))
}

/// `log(1 + exp(x))`, without overflow: `max(x, 0) + log(1 + exp(-|x|))`.
fn softplus_of(of: &Of) -> Expr {
    let small = of.x().unary(Unary::Abs).unary(Unary::Neg).unary(Unary::Exp);
    add(max(of.x(), of.n(0.0)), add(of.n(1.0), small).unary(Unary::Log))
}

fn softplus(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    activation(ctx, softplus_of)
}

fn mish(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    activation(ctx, |of| mul(of.x(), softplus_of(of).unary(Unary::Tanh)))
}

fn softsign(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    activation(ctx, |of| of.x().binary(Binary::Div, add(of.n(1.0), of.x().unary(Unary::Abs))))
}

fn swish(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let alpha = ctx.float("alpha", 1.0)?;
    activation(ctx, |of| mul(of.x(), mul(of.n(alpha), of.x()).unary(Unary::Sigmoid)))
}

/// `swish(a) * b`, without broadcasting.
fn swiglu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (gate, linear) = (ctx.operand(0)?, ctx.operand(1)?);
    if ctx.sizes(gate) != ctx.sizes(linear) {
        return Err(ctx.invalid(&format!("gate {} and linear input {} differ", ctx.ty(gate), ctx.ty(linear))));
    }
    let (alpha, of) = (ctx.float("alpha", 1.0)?, Of(ctx.dtype(gate)));
    let swish = mul(of.x(), mul(of.n(alpha), of.x()).unary(Unary::Sigmoid));
    Ok(vec![ctx.pointwise(mul(swish, Expr::operand(1)), &[gate, linear])?])
}

fn shrink(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (bias, lambd) = (ctx.float("bias", 0.0)?, ctx.float("lambd", 0.5)?);
    activation(ctx, |of| {
        let positive = of.above(lambd, sub(of.x(), of.n(bias)), of.n(0.0));
        of.below(-lambd, add(of.x(), of.n(bias)), positive)
    })
}

fn gelu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let approximate = ctx.string("approximate", "none")?;
    let inner: fn(&Of) -> Expr = match approximate.as_str() {
        "none" => |of| mul(of.x(), of.n(std::f32::consts::FRAC_1_SQRT_2)).unary(Unary::Erf),
        "tanh" => |of| {
            // sqrt(2 / pi) (x + 0.044715 x³), in Horner's form
            let root = (2.0 / std::f32::consts::PI).sqrt();
            let cubic = add(of.n(1.0), mul(of.n(0.044_715), mul(of.x(), of.x())));
            mul(mul(of.n(root), of.x()), cubic).unary(Unary::Tanh)
        },
        other => return Err(ctx.invalid(&format!("attribute `approximate` is `{other}`, not `none` or `tanh`"))),
    };
    activation(ctx, |of| mul(mul(of.n(0.5), of.x()), add(of.n(1.0), inner(of))))
}

fn clip_by_attributes(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (low, high) = (ctx.float("min", f32::NEG_INFINITY)?, ctx.float("max", f32::INFINITY)?);
    activation(ctx, |of| {
        let raised = if low > f32::NEG_INFINITY { max(of.x(), of.n(low)) } else { of.x() };
        if high < f32::INFINITY { min(raised, of.n(high)) } else { raised }
    })
}

/// With bounds as inputs; when the low one is above the high one, the high one wins.
fn clip(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let mut operands = vec![x];
    let mut expr = Expr::operand(0);
    for (bound, op) in [(ctx.optional(1), Binary::Max), (ctx.optional(2), Binary::Min)] {
        let Some(bound) = bound else { continue };
        if ctx.count(&ctx.sizes(bound))? != 1 {
            return Err(ctx.invalid(&format!("bound {} is not a scalar", ctx.ty(bound))));
        }
        // Some exporters write `[1]`, which must not add a dimension to a scalar.
        let bound = ctx.reshape(bound, &[])?;
        expr = expr.binary(op, Expr::operand(operands.len() as u16));
        operands.push(bound);
    }
    if operands.len() == 1 {
        return Ok(vec![x]);
    }
    Ok(vec![ctx.pointwise(expr, &operands)?])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    fn check(case: Case, expected: [f32; 4]) {
        assert_close(&case.input(tensor(&[4], &[-2f32, -0.5, 0.5, 2.0])).one(), &[4], &expected);
    }

    #[test]
    fn rectifiers() {
        check(Case::new("Relu", 14), [0.0, 0.0, 0.5, 2.0]);
        check(Case::new("LeakyRelu", 16).float("alpha", 0.1), [-0.2, -0.05, 0.5, 2.0]);
        check(Case::new("ThresholdedRelu", 10), [0.0, 0.0, 0.0, 2.0]);
        check(Case::new("Shrink", 9).float("bias", 0.25), [-1.75, 0.0, 0.0, 1.75]);
        check(Case::new("Affine", 7).float("alpha", 2.0).float("beta", 1.0), [-3.0, 0.0, 2.0, 5.0]);
        let integers = Case::new("Relu", 14).input(tensor(&[2], &[-3i32, 3])).one();
        assert_eq!(integers, tensor(&[2], &[0i32, 3]));
    }

    #[test]
    fn exponential_units() {
        check(Case::new("Elu", 6).float("alpha", 2.0), [-1.729_329_4, -0.786_938_7, 0.5, 2.0]);
        check(Case::new("Celu", 12).float("alpha", 2.0), [-1.264_241_1, -0.442_398_43, 0.5, 2.0]);
        check(Case::new("Selu", 6), [-1.520_166_4, -0.691_758_2, 0.525_350_5, 2.101_402]);
    }

    #[test]
    fn sigmoids_and_their_relatives() {
        check(Case::new("HardSigmoid", 6), [0.1, 0.4, 0.6, 0.9]);
        check(Case::new("HardSwish", 14), [-0.333_333_34, -0.208_333_33, 0.291_666_66, 1.666_666_6]);
        check(Case::new("Swish", 24), [-0.238_405_84, -0.188_770_33, 0.311_229_65, 1.761_594_2]);
        check(Case::new("Softplus", 1), [0.126_928, 0.474_077, 0.974_077, 2.126_928]);
        check(Case::new("Softsign", 1), [-0.666_666_7, -0.333_333_34, 0.333_333_34, 0.666_666_7]);
        check(Case::new("Mish", 18), [-0.252_501_5, -0.220_743_5, 0.375_245_8, 1.943_959]);
        check(Case::new("Gelu", 20), [-0.045_500_26, -0.154_268_77, 0.345_731_23, 1.954_499_8]);
        let tanh = Case::new("Gelu", 20).string("approximate", "tanh");
        check(tanh, [-0.045_402_3, -0.154_286, 0.345_714, 1.954_597_8]);
        let wrong = Case::new("Gelu", 20).string("approximate", "cubic").input(tensor(&[1], &[0f32]));
        assert!(wrong.error().contains("`cubic`"));
    }

    #[test]
    fn a_gate_multiplies_what_is_of_its_shape() {
        let x = || tensor(&[2], &[-2f32, 2.0]);
        let case = Case::new("SwiGLU", 28).input(x()).input(tensor(&[2], &[3f32, 0.5]));
        assert_close(&case.one(), &[2], &[-0.715_217_5, 0.880_797_1]);
        assert_close(&case.float("alpha", 0.5).one(), &[2], &[-1.613_648_5, 0.731_058_6]);
        let wrong = Case::new("SwiGLU", 28).input(x()).input(tensor(&[1], &[3f32]));
        assert!(wrong.error().contains("gate f32[2] and linear input f32[1] differ"), "{}", wrong.error());
    }

    #[test]
    fn softplus_does_not_overflow() {
        let case = Case::new("Softplus", 1).input(tensor(&[2], &[1000f32, -1000.0]));
        assert_close(&case.one(), &[2], &[1000.0, 0.0]);
    }

    #[test]
    fn a_slope_broadcasts_to_the_data() {
        let x = tensor(&[2, 2], &[-1f32, 1.0, -2.0, 2.0]);
        let case = Case::new("PRelu", 16).input(x.clone()).constant(tensor(&[2, 1], &[0.5f32, 0.25]));
        assert_close(&case.one(), &[2, 2], &[-0.5, 1.0, -0.5, 2.0]);
        let wrong = Case::new("PRelu", 16).input(x).constant(tensor(&[2, 1, 1], &[0.5f32, 0.25]));
        assert!(wrong.error().contains("does not broadcast"));
    }

    #[test]
    fn clips_by_attributes_or_inputs() {
        check(Case::new("Clip", 6).float("min", -1.0).float("max", 1.0), [-1.0, -0.5, 0.5, 1.0]);
        check(Case::new("Clip", 6), [-2.0, -0.5, 0.5, 2.0]);
        let x = tensor(&[4], &[-2f32, -0.5, 0.5, 2.0]);
        let low = Case::new("Clip", 13).input(x.clone()).constant(tensor(&[], &[-1f32]));
        assert_close(&low.one(), &[4], &[-1.0, -0.5, 0.5, 2.0]);
        let high = Case::new("Clip", 13).input(x.clone()).without().constant(tensor(&[1], &[0f32]));
        assert_close(&high.one(), &[4], &[-2.0, -0.5, 0.0, 0.0]);
        let integers = Case::new("Clip", 12).input(tensor(&[], &[9i64])).without().constant(tensor(&[1], &[5i64]));
        assert_eq!(integers.one(), tensor(&[], &[5i64]));
    }
}
