//! Samples of products and convolutions with what a library does to them before they are stored.

use planfile::DType::{self, BF16, F16, F32, F64};
use planfile::op::Window;
use planfile::{Binary, Dim, Expr, Op, Scalar, Spec, SpecNode, TensorType, Unary};

use super::{List, ty};

/// What follows a product, in this order.
#[derive(Clone, Copy, Default)]
struct Follows {
    scale: Option<f32>,
    bias: bool,
    residual: bool,
    activation: Option<fn(Expr, DType) -> Expr>,
}

fn dims(sizes: &[u64]) -> Vec<Dim> {
    sizes.iter().copied().map(Dim::Static).collect()
}

fn n(dtype: DType, value: f64) -> Expr {
    Expr::constant(Scalar::from_f64(dtype, value))
}

fn relu(x: Expr, dtype: DType) -> Expr {
    x.binary(Binary::Max, n(dtype, 0.0))
}

/// `x · 0.5 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))`
fn gelu(x: Expr, dtype: DType) -> Expr {
    let cube = x.clone().binary(Binary::Pow, n(dtype, 3.0)).binary(Binary::Mul, n(dtype, 0.044715));
    let inner = x.clone().binary(Binary::Add, cube).binary(Binary::Mul, n(dtype, 0.797_884_560_8));
    let shifted = inner.unary(Unary::Tanh).binary(Binary::Add, n(dtype, 1.0)).binary(Binary::Mul, n(dtype, 0.5));
    x.binary(Binary::Mul, shifted)
}

impl Follows {
    /// One node that computes in `f32`, or in `f64`, after `nodes`, the last of which is the product.
    fn spec(self, mut inputs: Vec<TensorType>, nodes: &[SpecNode], channel: usize) -> Option<Spec> {
        let whole = Spec { inputs: inputs.clone(), nodes: nodes.to_vec(), results: vec![] };
        let product = whole.types().ok()?.pop()?;
        let (dtype, sizes) = (product.dtype, product.sizes());
        let computing = if dtype == F64 { F64 } else { F32 };
        let mut expr = Expr::operand(0).cast(computing);
        if let Some(scale) = self.scale {
            expr = expr.binary(Binary::Mul, n(computing, f64::from(scale)));
        }
        let mut added = Vec::new();
        let mut add = |expr: Expr, sizes: &[u64]| {
            added.push(ty(dtype, sizes));
            expr.binary(Binary::Add, Expr::operand(added.len() as u16).cast(computing))
        };
        if self.bias {
            let mut bias = vec![1; sizes.len() - channel];
            bias[0] = sizes[channel];
            expr = add(expr, &bias);
        }
        if self.residual {
            expr = add(expr, &sizes);
        }
        if let Some(activation) = self.activation {
            expr = activation(expr, computing);
        }
        // Numbers of the specification: its inputs, then its nodes.
        let (outer, extra) = (inputs.len() as u32, added.len() as u32);
        let shifted = |value: &u32| if *value < outer { *value } else { value + extra };
        let mut all: Vec<SpecNode> = nodes
            .iter()
            .map(|node| SpecNode { op: node.op.clone(), operands: node.operands.iter().map(shifted).collect() })
            .collect();
        inputs.extend(added);
        let last = (inputs.len() + all.len()) as u32;
        let dims = dims(&sizes);
        let operands = std::iter::once(last - 1).chain(outer..outer + extra).collect();
        all.push(SpecNode { op: Op::Pointwise { expr: expr.cast(dtype), dims }, operands });
        Some(Spec { inputs, nodes: all, results: vec![last] })
    }
}

pub(super) fn products(list: &mut List) {
    let cases: &[(DType, Follows)] = &[
        (F32, Follows { bias: true, ..Follows::default() }),
        (F16, Follows { bias: true, activation: Some(relu), ..Follows::default() }),
        (BF16, Follows { scale: Some(0.125), residual: true, ..Follows::default() }),
        (F32, Follows { scale: Some(0.5), bias: true, residual: true, activation: Some(relu) }),
        (F32, Follows { activation: Some(relu), ..Follows::default() }),
        (F16, Follows { bias: true, activation: Some(gelu), ..Follows::default() }),
        (BF16, Follows { bias: true, residual: true, activation: Some(gelu), ..Follows::default() }),
        (F32, Follows { bias: true, activation: Some(gelu), ..Follows::default() }),
        (F16, Follows { scale: Some(0.25), activation: Some(gelu), ..Follows::default() }),
        (F64, Follows { bias: true, activation: Some(gelu), ..Follows::default() }),
    ];
    for &(dtype, follows) in cases {
        for [m, k, n] in [[24, 64, 32], [5, 33, 7], [1, 48, 40]] {
            let accumulate = dtype.accumulator();
            let dot = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate, out: dtype };
            let dot = SpecNode { op: dot, operands: vec![0, 1] };
            let inputs = vec![ty(dtype, &[m, k]), ty(dtype, &[k, n])];
            list.made(follows.spec(inputs.clone(), std::slice::from_ref(&dot), 1));
            // As exporters write linear layers of sequences: a product of all rows, then its own shape again.
            let reshape = SpecNode { op: Op::Reshape { dims: dims(&[1, m, n]) }, operands: vec![2] };
            list.made(follows.spec(inputs, &[dot, reshape], 2));
        }
    }
}

/// A bias in a node of its own, a reshape, then what `follows`: as exporters write a linear layer before its activation.
pub(super) fn chains(list: &mut List) {
    let cases: &[(DType, Follows)] = &[
        (F16, Follows { activation: Some(gelu), ..Follows::default() }),
        (BF16, Follows { residual: true, activation: Some(relu), ..Follows::default() }),
        (F32, Follows { residual: true, ..Follows::default() }),
    ];
    for &(dtype, follows) in cases {
        let dot = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate: F32, out: dtype };
        let biased = Expr::operand(0).cast(F32).binary(Binary::Add, Expr::operand(1).cast(F32)).cast(dtype);
        let nodes = [
            SpecNode { op: dot, operands: vec![0, 1] },
            SpecNode { op: Op::Pointwise { expr: biased, dims: dims(&[24, 32]) }, operands: vec![3, 2] },
            SpecNode { op: Op::Reshape { dims: dims(&[2, 12, 32]) }, operands: vec![4] },
        ];
        let inputs = vec![ty(dtype, &[24, 40]), ty(dtype, &[40, 32]), ty(dtype, &[32])];
        list.made(follows.spec(inputs, &nodes, 2));
    }
}

pub(super) fn convolutions(list: &mut List) {
    let cases: &[(DType, Follows)] = &[
        (F32, Follows { bias: true, ..Follows::default() }),
        (F16, Follows { bias: true, activation: Some(relu), ..Follows::default() }),
        (BF16, Follows { bias: true, residual: true, activation: Some(relu), ..Follows::default() }),
        (F32, Follows { bias: true, residual: true, ..Follows::default() }),
    ];
    let pads = vec![(1, 1), (1, 1)];
    let window = Window { sizes: vec![3, 3], strides: vec![2, 2], dilations: vec![1, 1], pads };
    let conv = Op::Conv { window, groups: 1, transposed: false, output_pads: vec![0, 0] };
    let transpose = |permutation: [u8; 4], operand| SpecNode {
        op: Op::Transpose { permutation: permutation.to_vec() },
        operands: vec![operand],
    };
    for &(dtype, follows) in cases {
        let first = SpecNode { op: conv.clone(), operands: vec![0, 1] };
        let inputs = vec![ty(dtype, &[2, 16, 9, 10]), ty(dtype, &[24, 16, 3, 3])];
        list.made(follows.spec(inputs, &[first], 1));
        let inputs = vec![ty(dtype, &[2, 9, 10, 16]), ty(dtype, &[24, 3, 3, 16])];
        let last = SpecNode { op: conv.clone(), operands: vec![2, 3] };
        let nodes = [transpose([0, 3, 1, 2], 0), transpose([0, 3, 1, 2], 1), last, transpose([0, 2, 3, 1], 4)];
        list.made(follows.spec(inputs, &nodes, 3));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{CudaTarget, Selected, select};

    #[test]
    fn libraries_take_what_follows_along() {
        let mut list = List { samples: Vec::new() };
        products(&mut list);
        chains(&mut list);
        convolutions(&mut list);
        let target = CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false };
        for (name, spec) in &list.samples {
            let (_, selected) = select(spec, &target).unwrap();
            let is_call = matches!(selected, Selected::Library { .. });
            assert_eq!(is_call, spec.inputs[0].dtype != F64, "{name}");
        }
    }

    /// Whether a library takes `[4, 6]` from `[4, 5]` and `[5, 6]` along with the sum of its reshape and `added`.
    fn takes_sum(reshaped: &[u64], added: &[u64]) -> bool {
        let dot = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate: F32, out: F32 };
        let sum = Expr::operand(0).binary(Binary::Add, Expr::operand(1));
        let nodes = vec![
            SpecNode { op: dot, operands: vec![0, 1] },
            SpecNode { op: Op::Reshape { dims: dims(reshaped) }, operands: vec![3] },
            SpecNode { op: Op::Pointwise { expr: sum, dims: dims(reshaped) }, operands: vec![4, 2] },
        ];
        let spec = Spec { inputs: vec![ty(F32, &[4, 5]), ty(F32, &[5, 6]), ty(F32, added)], nodes, results: vec![5] };
        let target = CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false };
        matches!(select(&spec, &target).unwrap().1, Selected::Library { .. })
    }

    #[test]
    fn a_bias_goes_along_the_columns_of_the_product() {
        assert!(takes_sum(&[2, 2, 6], &[6]));
        assert!(takes_sum(&[2, 12], &[2, 12]));
        assert!(!takes_sum(&[2, 12], &[12]), "two rows of the product");
        assert!(!takes_sum(&[4, 2, 3], &[3]), "half of a row");
        assert!(!takes_sum(&[4, 2, 3], &[2, 3]), "a row, but over two dimensions");
    }
}
