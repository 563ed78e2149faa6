//! Functions of one value, element by element.

use ir::ValueId;
use planfile::{Binary, Compare, Expr, Unary};

use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Abs",        6,  |ctx| unary(ctx, Unary::Abs)),
    row("Acos",       7,  |ctx| unary(ctx, Unary::Acos)),
    row("Acosh",      9,  |ctx| unary(ctx, Unary::Acosh)),
    row("Asin",       7,  |ctx| unary(ctx, Unary::Asin)),
    row("Asinh",      9,  |ctx| unary(ctx, Unary::Asinh)),
    row("Atan",       7,  |ctx| unary(ctx, Unary::Atan)),
    row("Atanh",      9,  |ctx| unary(ctx, Unary::Atanh)),
    row("Ceil",       6,  |ctx| unary(ctx, Unary::Ceil)),
    row("Cos",        7,  |ctx| unary(ctx, Unary::Cos)),
    row("Cosh",       9,  |ctx| unary(ctx, Unary::Cosh)),
    row("Erf",        9,  |ctx| unary(ctx, Unary::Erf)),
    row("Exp",        6,  |ctx| unary(ctx, Unary::Exp)),
    row("Floor",      6,  |ctx| unary(ctx, Unary::Floor)),
    row("Identity",   1,  identity),
    row("IsInf",      10, is_inf),
    row("IsNaN",      9,  |ctx| unary(ctx, Unary::IsNan)),
    row("Log",        6,  |ctx| unary(ctx, Unary::Log)),
    row("Neg",        6,  |ctx| unary(ctx, Unary::Neg)),
    row("Reciprocal", 6,  |ctx| unary(ctx, Unary::Reciprocal)),
    row("Round",      11, |ctx| unary(ctx, Unary::Round)),
    row("Sigmoid",    6,  |ctx| unary(ctx, Unary::Sigmoid)),
    row("Sign",       9,  |ctx| unary(ctx, Unary::Sign)),
    row("Sin",        7,  |ctx| unary(ctx, Unary::Sin)),
    row("Sinh",       9,  |ctx| unary(ctx, Unary::Sinh)),
    row("Sqrt",       6,  |ctx| unary(ctx, Unary::Sqrt)),
    row("Tan",        7,  |ctx| unary(ctx, Unary::Tan)),
    row("Tanh",       6,  |ctx| unary(ctx, Unary::Tanh)),
    row("Dropout",    7,  dropout),
];

fn unary(ctx: &mut Context<'_>, op: Unary) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    Ok(vec![ctx.pointwise(Expr::operand(0).unary(op), &[x])?])
}

fn identity(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    Ok(vec![ctx.operand(0)?])
}

fn is_inf(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let (negative, positive) = (ctx.flag("detect_negative", true)?, ctx.flag("detect_positive", true)?);
    let infinite = Expr::operand(0).unary(Unary::IsInf);
    let side = |compare| Expr::operand(0).compare(compare, number(ctx.dtype(x), 0.0));
    let expr = match (negative, positive) {
        (true, true) => infinite,
        (true, false) => infinite.binary(Binary::And, side(Compare::Lt)),
        (false, true) => infinite.binary(Binary::And, side(Compare::Gt)),
        (false, false) => Expr::constant(planfile::Scalar::bool(false)),
    };
    Ok(vec![ctx.pointwise(expr, &[x])?])
}

/// Dropout as it is at inference: nothing is dropped.
fn dropout(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    if let Some(training) = ctx.optional(2)
        && ctx.constant_i64(training)? != 0
    {
        return Err(ctx.unsupported("training mode; export the model for inference"));
    }
    if !ctx.wants(1) {
        return Ok(vec![x]);
    }
    // The mask had the type of the data before it was boolean.
    let dtype = if ctx.opset() < 10 { ctx.dtype(x) } else { planfile::DType::Bool };
    let kept = ctx.scalar(dtype, 1.0);
    let mask = ctx.broadcast(kept, &ctx.sizes(x))?;
    Ok(vec![x, mask])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, bools, tensor};

    #[test]
    fn functions_of_one_value() {
        let cases: [(&str, f32, f32); 26] = [
            ("Abs", -1.5, 1.5),
            ("Acos", 0.25, 1.318_116),
            ("Acosh", 2.0, 1.316_957_8),
            ("Asin", 0.25, 0.252_680_25),
            ("Asinh", 0.5, 0.481_211_8),
            ("Atan", 0.5, 0.463_647_6),
            ("Atanh", 0.5, 0.549_306_15),
            ("Ceil", -1.5, -1.0),
            ("Cos", 0.5, 0.877_582_55),
            ("Cosh", 0.5, 1.127_626),
            ("Erf", 0.5, 0.520_499_9),
            ("Exp", 0.5, 1.648_721_3),
            ("Floor", -1.5, -2.0),
            ("Identity", 3.5, 3.5),
            ("Log", 0.25, -1.386_294_4),
            ("Neg", 0.5, -0.5),
            ("Reciprocal", 4.0, 0.25),
            ("Round", 2.5, 2.0),
            ("Sigmoid", 0.5, 0.622_459_3),
            ("Sign", -0.5, -1.0),
            ("Sin", 0.5, 0.479_425_55),
            ("Sinh", 0.5, 0.521_095_3),
            ("Sqrt", 2.25, 1.5),
            ("Tan", 0.5, 0.546_302_5),
            ("Tanh", 0.5, 0.462_117_16),
            ("Dropout", 0.5, 0.5),
        ];
        for (op, x, y) in cases {
            assert_close(&Case::new(op, 13).input(tensor(&[1, 1], &[x])).one(), &[1, 1], &[y]);
        }
    }

    #[test]
    fn integers_stay_integers() {
        let found = Case::new("Abs", 13).input(tensor(&[2], &[-3i64, 4])).one();
        assert_eq!(found, tensor(&[2], &[3i64, 4]));
    }

    #[test]
    fn infinities_by_sign() {
        let x = tensor(&[3], &[f32::NEG_INFINITY, 1.0, f32::INFINITY]);
        let both = Case::new("IsInf", 10).input(x.clone());
        assert_eq!(both.one(), bools(&[3], &[true, false, true]));
        assert_eq!(both.clone().int("detect_negative", 0).one(), bools(&[3], &[false, false, true]));
        assert_eq!(both.int("detect_positive", 0).one(), bools(&[3], &[true, false, false]));
        let nan = Case::new("IsNaN", 13).input(tensor(&[2], &[f32::NAN, f32::INFINITY]));
        assert_eq!(nan.one(), bools(&[2], &[true, false]));
    }

    #[test]
    fn dropout_keeps_everything() {
        let case = Case::new("Dropout", 13).input(tensor(&[2], &[1f32, 2.0])).outputs(2);
        assert_eq!(case.run(), [tensor(&[2], &[1f32, 2.0]), bools(&[2], &[true, true])]);
        let training = Case::new("Dropout", 13).input(tensor(&[1], &[1f32])).without().constant(bools(&[], &[true]));
        assert!(training.error().contains("training mode"));
    }
}
