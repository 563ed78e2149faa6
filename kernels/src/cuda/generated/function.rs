//! Expressions of one operand as functions, for kernels that are not generated.

use planfile::{DType, Expr, Op, Spec, TensorType};

use super::kernel::{Kernel, Operand};
use super::literal::value;

/// `value name(value x)`: the expression of operand 0, in the type that elements of `dtype` are computed in. `None` where
/// it needs more than that operand.
pub(in super::super) fn function(name: &str, expr: &Expr, dtype: DType) -> Option<String> {
    let spec =
        Spec::of(Op::Pointwise { expr: expr.clone(), dims: Vec::new() }, vec![TensorType::new(dtype, &[])]).ok()?;
    let mut kernel = Kernel::new(&spec, spec.types().ok()?, 1, 1, false)?;
    kernel.remember(0, Vec::new(), &Operand::uniform("x".to_owned()));
    let result = kernel.value(1, Vec::new())?;
    let ty = value(dtype);
    Some(format!("DEVICE {ty} {name}({ty} x) {{\n{}    return {};\n}}", kernel.text, result.name))
}

#[cfg(test)]
mod tests {
    use planfile::{Scalar, Unary};

    use super::*;

    #[test]
    fn an_expression_is_a_function_of_its_operand() {
        let expr = Expr::operand(0).unary(Unary::Tanh).binary(planfile::Binary::Add, Expr::constant(Scalar::f32(1.0)));
        let text = function("shifted", &expr, DType::F32).unwrap();
        assert!(text.starts_with("DEVICE f32 shifted(f32 x) {"), "{text}");
        assert!(text.contains("scalar::tanh(x)") && text.contains("1.0f"), "{text}");
        let same = function("same", &Expr::operand(0), DType::F64).unwrap();
        assert_eq!(same, "DEVICE f64 same(f64 x) {\n    return x;\n}");
    }

    #[test]
    fn positions_and_further_operands_are_refused() {
        assert!(function("at", &Expr::index(0).cast(DType::F32), DType::F32).is_none());
        assert!(function("of", &Expr::operand(1), DType::F32).is_none());
    }
}
