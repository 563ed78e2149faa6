//! What libraries can do to a product before they store it: scale it, add a bias and a residual, cut it off at zero or
//! take its GELU.
//!
//! `max((%product * 0.5 + %bias) + %residual, 0)`: libraries compute in `f32` and round once, to the type of the result,
//! where the expressions may round to that type in between, too.

use planfile::plan::Activation;
use planfile::{Binary, DType, Expr, ExprOp, Op, Spec, TensorType, Unary};

use super::curve::Curve;
use super::view::producer;

/// What is done to a product: `activation(scale · product + bias + residual)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Epilogue {
    pub(super) scale: f64,
    /// Input of the specification, one element for each position along the channels.
    pub(super) bias: Option<u32>,
    /// Input of the specification, as large as the product.
    pub(super) residual: Option<u32>,
    pub(super) activation: Activation,
}

impl Epilogue {
    /// Stores the product as it is.
    pub(super) const PLAIN: Self = Self { scale: 1.0, bias: None, residual: None, activation: Activation::None };

    fn is_scaled_only(&self) -> bool {
        *self == Self { scale: self.scale, ..Self::PLAIN }
    }
}

/// What stands on the stack of the expression.
#[derive(Clone, Copy)]
enum Term {
    Product(Epilogue),
    /// A function of what this epilogue makes of the product.
    Curve(Epilogue, Curve),
    Input(u32),
    Constant(f64),
}

/// What follows `value`, a product, up to the only result: element-wise functions, and reshapes where channels are
/// the innermost dimension. Also the positions of the nodes that it takes. `channel` is the dimension of the channels
/// in `value`.
pub(super) fn epilogue(
    spec: &Spec,
    types: &[TensorType],
    value: u32,
    channel: usize,
) -> Option<(Epilogue, Vec<usize>)> {
    let &[result] = spec.results.as_slice() else { return None };
    let dtype = types.get(result as usize)?.dtype;
    let innermost = channel + 1 == types[value as usize].rank();
    // From the result back to the product; all else that is read comes from outside.
    let mut chain = Vec::new();
    let mut at = result;
    while at != value {
        let node = producer(spec, at)?;
        chain.push(node);
        let mut inside = spec.nodes[node].operands.iter().filter(|&&operand| producer(spec, operand).is_some());
        at = *inside.next()?;
        if inside.any(|&other| other != at) {
            return None;
        }
    }
    let mut how = Epilogue::PLAIN;
    let mut at = value;
    for &position in chain.iter().rev() {
        let node = &spec.nodes[position];
        let ty = &types[at as usize];
        how = match &node.op {
            Op::Reshape { .. } if innermost => how,
            // What is broadcast is more than the library stores.
            Op::Pointwise { expr, dims } if ty.dims == *dims => {
                let channel = if innermost { ty.rank().checked_sub(1)? } else { channel };
                let reader = Reader { spec, product: at, sizes: ty.sizes(), channel, dtype };
                reader.read(expr, &node.operands, how)?
            }
            _ => return None,
        };
        at = (spec.inputs.len() + position) as u32;
    }
    // A factor of zero or beyond `f32` means something else to a library than to the expression.
    (how.scale as f32).is_normal().then_some((how, chain))
}

/// Reads the expression of a node that has the product among its operands.
struct Reader<'a> {
    spec: &'a Spec,
    product: u32,
    sizes: Vec<u64>,
    channel: usize,
    /// Of what is stored in the end.
    dtype: DType,
}

impl Reader<'_> {
    fn read(&self, expr: &Expr, operands: &[u32], before: Epilogue) -> Option<Epilogue> {
        let mut stack: Vec<Term> = Vec::new();
        let mut slots: Vec<Option<Term>> = Vec::new();
        for op in &expr.ops {
            let term = match op {
                ExprOp::Operand(index) => match *operands.get(usize::from(*index))? {
                    operand if operand == self.product => Term::Product(before),
                    operand => Term::Input(operand),
                },
                ExprOp::Const(scalar) => Term::Constant(scalar.to_f64()),
                ExprOp::Cast(DType::F32) => stack.pop()?,
                // Rounding to another type than the result's is not made up for by rounding the result.
                ExprOp::Cast(dtype @ (DType::F16 | DType::BF16)) if *dtype == self.dtype => stack.pop()?,
                ExprOp::Set(slot) => {
                    let slot = usize::from(*slot);
                    slots.resize(slots.len().max(slot + 1), None);
                    slots[slot] = stack.last().copied();
                    continue;
                }
                ExprOp::Get(slot) => slots.get(usize::from(*slot)).copied()??,
                ExprOp::Unary(unary) => {
                    let (base, curve) = curve(stack.pop()?)?;
                    let curve = match unary {
                        Unary::Tanh => curve.tanh()?,
                        Unary::Sigmoid => curve.sigmoid()?,
                        Unary::Neg => curve.mul(Curve::constant(-1.0))?,
                        _ => return None,
                    };
                    Term::Curve(base?, curve)
                }
                ExprOp::Binary(binary) => {
                    let (right, left) = (stack.pop()?, stack.pop()?);
                    match self.linear(*binary, left, right) {
                        Some(epilogue) => Term::Product(epilogue),
                        None => curved(*binary, left, right)?,
                    }
                }
                _ => return None,
            };
            stack.push(term);
        }
        match *stack.as_slice() {
            [Term::Product(epilogue)] => Some(epilogue),
            [Term::Curve(base, curve)] => {
                let scale = curve.gelu()?;
                // The scale of a sum is none of its product.
                let fits = scale == 1.0 || base.is_scaled_only();
                fits.then_some(Epilogue { scale: base.scale * scale, activation: Activation::GeluTanh, ..base })
            }
            _ => None,
        }
    }

    /// A sum, a multiple or the larger one of zero and what no activation was applied to.
    fn linear(&self, binary: Binary, left: Term, right: Term) -> Option<Epilogue> {
        let (mut epilogue, other, product_first) = match (left, right) {
            (Term::Product(epilogue), other) => (epilogue, other, true),
            (other, Term::Product(epilogue)) => (epilogue, other, false),
            _ => return None,
        };
        if epilogue.activation != Activation::None {
            return None;
        }
        match (binary, other) {
            (Binary::Mul, Term::Constant(factor)) if epilogue.is_scaled_only() => epilogue.scale *= factor,
            (Binary::Div, Term::Constant(divisor)) if epilogue.is_scaled_only() && product_first => {
                epilogue.scale /= divisor;
            }
            (Binary::Max, Term::Constant(0.0)) => epilogue.activation = Activation::Relu,
            (Binary::Add, Term::Input(input)) => {
                let given = self.spec.inputs.get(input as usize)?.sizes();
                let could_be_bias = is_bias(&given, &self.sizes, self.channel);
                // Of one row, an operand may be either.
                let added = if could_be_bias && epilogue.bias.is_none() {
                    &mut epilogue.bias
                } else if given == self.sizes && given.len() > 1 {
                    &mut epilogue.residual
                } else {
                    return None;
                };
                if added.replace(input).is_some() {
                    return None;
                }
            }
            _ => return None,
        }
        Some(epilogue)
    }
}

/// The term as a function of what is made of the product; nothing of the product in a constant.
fn curve(term: Term) -> Option<(Option<Epilogue>, Curve)> {
    match term {
        Term::Product(epilogue) if epilogue.is_scaled_only() => {
            Some((Some(Epilogue::PLAIN), Curve::line(epilogue.scale)))
        }
        Term::Product(epilogue) if epilogue.activation == Activation::None => Some((Some(epilogue), Curve::line(1.0))),
        Term::Curve(base, curve) => Some((Some(base), curve)),
        Term::Constant(value) => Some((None, Curve::constant(value))),
        Term::Product(_) | Term::Input(_) => None,
    }
}

fn curved(binary: Binary, left: Term, right: Term) -> Option<Term> {
    let ((left_base, left_curve), (right_base, right_curve)) = (curve(left)?, curve(right)?);
    let base = match (left_base, right_base) {
        (Some(left), Some(right)) if left != right => return None,
        (left, right) => left.or(right)?,
    };
    let curve = match (binary, right) {
        (Binary::Add, _) => left_curve.add(right_curve)?,
        (Binary::Sub, _) => left_curve.add(right_curve.mul(Curve::constant(-1.0))?)?,
        (Binary::Mul, _) => left_curve.mul(right_curve)?,
        (Binary::Div, Term::Constant(divisor)) => left_curve.mul(Curve::constant(1.0 / divisor))?,
        (Binary::Pow, Term::Constant(exponent)) => left_curve.pow(exponent)?,
        _ => return None,
    };
    Some(Term::Curve(base, curve))
}

/// Whether an operand of sizes `given`, broadcast to `sizes`, varies along `channel` alone, and fully.
fn is_bias(given: &[u64], sizes: &[u64], channel: usize) -> bool {
    let Some(missing) = sizes.len().checked_sub(given.len()) else { return false };
    let size = |dim: usize| dim.checked_sub(missing).map_or(1, |dim| given[dim]);
    (0..sizes.len()).all(|dim| size(dim) == if dim == channel { sizes[dim] } else { 1 })
}

#[cfg(test)]
mod tests {
    use planfile::{Dim, Scalar, SpecNode};

    use super::*;

    /// Of `%0: [4, 6]`, with a bias `%1`, a residual `%2` and a column `%3`; each expression follows the one before.
    fn read(exprs: &[Expr]) -> Option<Epilogue> {
        let inputs =
            [[4, 5].as_slice(), &[5, 6], &[6], &[4, 6], &[4, 1]].map(|sizes| TensorType::new(DType::F32, sizes));
        let dot = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate: DType::F32, out: DType::F32 };
        let mut nodes = vec![SpecNode { op: dot, operands: vec![0, 1] }];
        for (product, expr) in (5u32..).zip(exprs) {
            let op = Op::Pointwise { expr: expr.clone(), dims: vec![Dim::Static(4), Dim::Static(6)] };
            nodes.push(SpecNode { op, operands: vec![product, 2, 3, 4] });
        }
        let spec = Spec { inputs: inputs.to_vec(), results: vec![4 + nodes.len() as u32], nodes };
        Some(epilogue(&spec, &spec.types().unwrap(), 5, 1)?.0)
    }

    fn n(value: f32) -> Expr {
        Expr::constant(Scalar::f32(value))
    }

    /// `x · (0.5 · (1 + tanh(0.797885 · (x + 0.044715 · x³))))`
    fn gelu(x: &Expr) -> Expr {
        let cube = x.clone().binary(Binary::Pow, n(3.0)).binary(Binary::Mul, n(0.044715));
        let inner = x.clone().binary(Binary::Add, cube).binary(Binary::Mul, n(0.797_884_6));
        let shifted = inner.unary(Unary::Tanh).binary(Binary::Add, n(1.0)).binary(Binary::Mul, n(0.5));
        x.clone().binary(Binary::Mul, shifted)
    }

    #[test]
    fn bias_residual_and_relu_are_read() {
        let sum = Expr::operand(0).binary(Binary::Mul, n(0.5)).binary(Binary::Add, Expr::operand(1));
        let expr = Expr::operand(2).binary(Binary::Add, sum).binary(Binary::Max, n(0.0));
        let expected = Epilogue { scale: 0.5, bias: Some(2), residual: Some(3), activation: Activation::Relu };
        assert_eq!(read(&[expr]), Some(expected));
    }

    #[test]
    fn a_gelu_by_tanh_is_read_in_the_same_node_or_in_another() {
        let sum = Expr::operand(0).binary(Binary::Mul, n(0.5)).binary(Binary::Add, Expr::operand(1));
        let expected = Epilogue { scale: 0.5, bias: Some(2), residual: None, activation: Activation::GeluTanh };
        assert_eq!(read(&[gelu(&sum)]), Some(expected));
        assert_eq!(read(&[sum, gelu(&Expr::operand(0))]), Some(expected));
        let scaled = gelu(&Expr::operand(0).binary(Binary::Div, n(4.0)));
        let expected = Epilogue { scale: 0.25, activation: Activation::GeluTanh, ..Epilogue::PLAIN };
        assert_eq!(read(&[scaled]), Some(expected));
    }

    #[test]
    fn what_no_library_does_is_refused() {
        let add = |left: Expr, right: u16| left.binary(Binary::Add, Expr::operand(right));
        let zero = Expr::operand(0).binary(Binary::Mul, n(0.0));
        assert_eq!(read(&[zero]), None, "NaN times zero is NaN");
        assert_eq!(read(&[add(Expr::operand(0), 3)]), None, "varies along rows");
        assert_eq!(read(&[add(add(Expr::operand(0), 2), 2)]), None, "two residuals");
        assert_eq!(read(&[Expr::operand(0).binary(Binary::Mul, Expr::operand(1))]), None, "scaled by a tensor");
        assert_eq!(read(&[Expr::operand(0).unary(Unary::Exp)]), None, "another function");
        let relu = Expr::operand(0).binary(Binary::Max, n(0.0));
        assert_eq!(read(&[add(relu.clone(), 1)]), None, "a bias after the activation");
        assert_eq!(read(&[relu, gelu(&Expr::operand(0))]), None, "two activations");
        assert_eq!(read(&[add(gelu(&Expr::operand(0)), 1)]), None, "a bias after the GELU");
        let mixed = gelu(&add(Expr::operand(0), 1)).binary(Binary::Mul, Expr::operand(0));
        assert_eq!(read(&[mixed]), None, "two functions of the product");
        let half = gelu(&add(Expr::operand(0), 1).binary(Binary::Mul, n(0.5)));
        assert_eq!(read(&[half]), None, "half of a sum");
        let rounded = Expr::operand(0).cast(DType::BF16);
        assert_eq!(read(&[rounded, Expr::operand(0).cast(DType::F32)]), None, "rounded to another type than is stored");
    }
}
