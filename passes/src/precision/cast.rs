//! Conversions inside expressions, and constants that do not fit.

use planfile::{Binary, DType, Expr, ExprOp, Scalar, Unary};

/// Whether a finite value becomes infinite in `dtype`.
pub(super) fn exceeds(value: f64, dtype: DType) -> bool {
    value.is_finite() && Scalar::from_f64(dtype, value).to_f64().is_infinite()
}

/// Whether the expression has a floating-point constant that is finite, but not in `dtype`.
pub(super) fn has_large_constant(expr: &Expr, dtype: DType) -> bool {
    let large = |op: &ExprOp| match op {
        ExprOp::Const(scalar) => scalar.dtype.is_float() && exceeds(scalar.to_f64(), dtype),
        _ => false,
    };
    expr.ops.iter().any(large)
}

/// Largest finite number of a floating-point type.
fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half_largest(10, 15),
        DType::BF16 => half_largest(7, 127),
        DType::F32 => f64::from(f32::MAX),
        _ => f64::MAX,
    }
}

/// `(2 - 2^-fraction) · 2^exponent`.
fn half_largest(fraction: i32, exponent: i32) -> f64 {
    (2.0 - 2f64.powi(-fraction)) * 2f64.powi(exponent)
}

/// The expression, an `f32`, stored as a half type: rounded; where `saturate`, finite numbers stay finite.
pub(super) fn store(expr: Expr, dtype: DType, saturate: bool) -> Expr {
    let slot = free_slot(&expr);
    let Expr { mut ops } = expr;
    if let (true, Some(slot)) = (saturate, slot) {
        let [lowest, highest] = [-largest(dtype), largest(dtype)].map(|limit| Scalar::f32(limit as f32));
        ops.extend([ExprOp::Set(slot), ExprOp::Unary(Unary::IsInf), ExprOp::Get(slot), ExprOp::Get(slot)]);
        ops.extend([ExprOp::Const(lowest), ExprOp::Binary(Binary::Max)]);
        ops.extend([ExprOp::Const(highest), ExprOp::Binary(Binary::Min), ExprOp::Select]);
    }
    ops.push(ExprOp::Cast(dtype));
    Expr { ops }
}

/// A slot that the expression does not use, which [`store`] needs to saturate.
pub(super) fn free_slot(expr: &Expr) -> Option<u8> {
    u8::try_from(expr.slots()).ok()
}

/// The operand converted between `f32` and the half types, from one half type to the other by way of `f32`; where
/// `saturate`, finite numbers stay finite.
pub(crate) fn convert(from: DType, to: DType, saturate: bool) -> Expr {
    let value = Expr::operand(0);
    let single = if from == DType::F32 { value } else { value.cast(DType::F32) };
    if to == DType::F32 { single } else { store(single, to, saturate) }
}

/// The same expression in `f32`: operands of the types `from` are converted where they are half types, and what was of
/// a half type inside becomes `f32`.
pub(super) fn in_single(expr: &Expr, from: &[DType]) -> Expr {
    let half = |dtype: DType| matches!(dtype, DType::F16 | DType::BF16);
    let mut ops = Vec::with_capacity(expr.ops.len());
    for op in &expr.ops {
        match op {
            ExprOp::Operand(index) => {
                ops.push(op.clone());
                if from.get(usize::from(*index)).copied().is_some_and(half) {
                    ops.push(ExprOp::Cast(DType::F32));
                }
            }
            ExprOp::Const(scalar) if half(scalar.dtype) => {
                ops.push(ExprOp::Const(Scalar::from_f64(DType::F32, scalar.to_f64())));
            }
            ExprOp::Cast(dtype) if half(*dtype) => ops.push(ExprOp::Cast(DType::F32)),
            other => ops.push(other.clone()),
        }
    }
    Expr { ops }
}

#[cfg(test)]
mod tests {
    use cpu::evaluate;
    use planfile::{Dim, Op, Tensor};

    use super::*;

    fn converted(values: &[f32], through: Option<DType>, to: DType, saturate: bool) -> Vec<f64> {
        let dims = vec![Dim::Static(values.len() as u64)];
        let step = |from, to, saturate| Op::Pointwise { expr: convert(from, to, saturate), dims: dims.clone() };
        let mut x = Tensor::from_elements(&[values.len() as u64], values).unwrap();
        if let Some(half) = through {
            x = evaluate(&step(DType::F32, half, false), &[&x]).unwrap().remove(0);
        }
        let y = evaluate(&step(through.unwrap_or(DType::F32), to, saturate), &[&x]).unwrap().remove(0);
        y.data.bytes().chunks_exact(2).map(|bytes| Scalar::from_bytes(to, bytes).unwrap().to_f64()).collect()
    }

    #[test]
    fn finite_numbers_stay_finite_and_infinities_stay() {
        let values = [f32::MIN, -70000.0, 1.5, 65519.0, 65520.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY];
        let f16 = converted(&values, None, DType::F16, true);
        let inf = f64::INFINITY;
        assert_eq!(f16, [-65504.0, -65504.0, 1.5, 65504.0, 65504.0, 65504.0, inf, -inf]);
        let bf16 = converted(&[f32::MIN, f32::NEG_INFINITY], None, DType::BF16, true);
        assert_eq!(bf16, [-largest(DType::BF16), -inf]);
        assert_eq!(converted(&[f32::MIN], None, DType::BF16, false), [-inf]);
        assert!(converted(&[f32::NAN], None, DType::F16, true)[0].is_nan());
    }

    #[test]
    fn one_half_type_becomes_the_other() {
        let values = [-3.0e38, -70000.0, 1.5, f32::NEG_INFINITY];
        let inf = f64::INFINITY;
        let f16 = converted(&values, Some(DType::BF16), DType::F16, true);
        assert_eq!(f16, [-65504.0, -65504.0, 1.5, -inf]);
        let infinite = converted(&values, Some(DType::BF16), DType::F16, false);
        assert_eq!(infinite, [-inf, -inf, 1.5, -inf]);
        for saturate in [false, true] {
            let bf16 = converted(&[65504.0, 1.5, f32::INFINITY], Some(DType::F16), DType::BF16, saturate);
            assert_eq!(bf16, [65536.0, 1.5, inf]);
        }
    }

    #[test]
    fn the_largest_numbers_are_those_of_the_types() {
        assert_eq!(largest(DType::F16), 65504.0);
        for dtype in [DType::F16, DType::BF16] {
            assert!(!exceeds(largest(dtype), dtype) && exceeds(largest(dtype) * 1.01, dtype));
            assert!(!exceeds(f64::INFINITY, dtype));
        }
    }
}
