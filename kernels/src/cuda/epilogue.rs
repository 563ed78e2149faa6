//! What libraries can do to a product before they store it: scale it, add a bias and a residual, cut it off at zero.
//!
//! `max((%product * 0.5 + %bias) + %residual, 0)`, casts between floating-point types included: libraries compute in
//! `f32` and round once, where the expression may round between.

use planfile::plan::Activation;
use planfile::{Binary, DType, Expr, ExprOp, TensorType};

/// The recognised expression: `activation(scale · product + bias + residual)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Epilogue {
    pub(super) scale: f64,
    /// Operand of the expression, one element for each position along one dimension of the product.
    pub(super) bias: Option<u16>,
    /// Operand of the expression, as large as the product.
    pub(super) residual: Option<u16>,
    pub(super) activation: Activation,
}

impl Epilogue {
    /// Stores the product as it is.
    pub(super) const PLAIN: Self = Self { scale: 1.0, bias: None, residual: None, activation: Activation::None };
}

/// What stands on the stack of the expression.
#[derive(Clone, Copy)]
enum Term {
    Product(Epilogue),
    Operand(u16),
    Constant(f64),
}

/// Reads an expression in which `product` is the operand that a library computes, of sizes `sizes`, and `operands` are the
/// types of all. `channel` is the dimension that a bias goes along.
pub(super) fn epilogue(
    expr: &Expr,
    product: u16,
    operands: &[&TensorType],
    sizes: &[u64],
    channel: usize,
) -> Option<Epilogue> {
    let mut stack: Vec<Term> = Vec::new();
    for op in &expr.ops {
        let term = match op {
            ExprOp::Operand(index) if *index == product => Term::Product(Epilogue::PLAIN),
            ExprOp::Operand(index) => Term::Operand(*index),
            ExprOp::Const(scalar) => Term::Constant(scalar.to_f64()),
            ExprOp::Cast(DType::F16 | DType::BF16 | DType::F32) => stack.pop()?,
            ExprOp::Binary(binary) => {
                let (right, left) = (stack.pop()?, stack.pop()?);
                combined(*binary, left, right, operands, sizes, channel)?
            }
            _ => return None,
        };
        stack.push(term);
    }
    match stack.as_slice() {
        // A factor of zero or beyond `f32` means something else to a library than to the expression.
        [Term::Product(epilogue)] if (epilogue.scale as f32).is_normal() => Some(*epilogue),
        _ => None,
    }
}

fn combined(
    binary: Binary,
    left: Term,
    right: Term,
    operands: &[&TensorType],
    sizes: &[u64],
    channel: usize,
) -> Option<Term> {
    let (mut epilogue, other, product_first) = match (left, right) {
        (Term::Product(epilogue), other) => (epilogue, other, true),
        (other, Term::Product(epilogue)) => (epilogue, other, false),
        _ => return None,
    };
    if epilogue.activation != Activation::None {
        return None;
    }
    let scaled_only = epilogue.bias.is_none() && epilogue.residual.is_none();
    match (binary, other) {
        (Binary::Mul, Term::Constant(factor)) if scaled_only => epilogue.scale *= factor,
        (Binary::Div, Term::Constant(divisor)) if scaled_only && product_first => epilogue.scale /= divisor,
        (Binary::Max, Term::Constant(0.0)) => epilogue.activation = Activation::Relu,
        (Binary::Add, Term::Operand(operand)) => {
            let given = operands.get(usize::from(operand))?.sizes();
            if given == sizes && sizes.len() > 1 {
                if epilogue.residual.replace(operand).is_some() {
                    return None;
                }
            } else if is_bias(&given, sizes, channel) {
                if epilogue.bias.replace(operand).is_some() {
                    return None;
                }
            } else {
                return None;
            }
        }
        _ => return None,
    }
    Some(Term::Product(epilogue))
}

/// Whether an operand of sizes `given`, broadcast to `sizes`, varies along `channel` alone, and fully.
fn is_bias(given: &[u64], sizes: &[u64], channel: usize) -> bool {
    let Some(missing) = sizes.len().checked_sub(given.len()) else { return false };
    let size = |dim: usize| dim.checked_sub(missing).map_or(1, |dim| given[dim]);
    (0..sizes.len()).all(|dim| size(dim) == if dim == channel { sizes[dim] } else { 1 })
}

#[cfg(test)]
mod tests {
    use planfile::Scalar;

    use super::*;

    fn read(expr: &Expr) -> Option<Epilogue> {
        let types = [[4, 6].as_slice(), &[6], &[4, 6], &[4, 1]].map(|sizes| TensorType::new(DType::F32, sizes));
        epilogue(expr, 0, &types.iter().collect::<Vec<_>>(), &[4, 6], 1)
    }

    #[test]
    fn bias_residual_and_relu_are_read() {
        let half = Expr::constant(Scalar::f32(0.5));
        let zero = Expr::constant(Scalar::f32(0.0));
        let sum = Expr::operand(0).binary(Binary::Mul, half).binary(Binary::Add, Expr::operand(1));
        let expr = Expr::operand(2).binary(Binary::Add, sum).binary(Binary::Max, zero);
        let expected = Epilogue { scale: 0.5, bias: Some(1), residual: Some(2), activation: Activation::Relu };
        assert_eq!(read(&expr), Some(expected));
    }

    #[test]
    fn what_no_library_does_is_refused() {
        let add = |left: Expr, right: u16| left.binary(Binary::Add, Expr::operand(right));
        let zero = Expr::operand(0).binary(Binary::Mul, Expr::constant(Scalar::f32(0.0)));
        assert_eq!(read(&zero), None, "NaN times zero is NaN");
        assert_eq!(read(&add(Expr::operand(0), 3)), None, "varies along rows");
        assert_eq!(read(&add(add(Expr::operand(0), 2), 2)), None, "two residuals");
        assert_eq!(read(&Expr::operand(0).binary(Binary::Mul, Expr::operand(1))), None, "scaled by a tensor");
        assert_eq!(read(&Expr::operand(0).unary(planfile::Unary::Exp)), None, "another function");
        let relu = Expr::operand(0).binary(Binary::Max, Expr::constant(Scalar::f32(0.0)));
        assert_eq!(read(&add(relu, 1)), None, "a bias after the activation");
    }
}
