//! Convolutions by cuDNN, with bias, residual and ReLU done before the result is stored.
//!
//! before  %u = transpose %x [0, 3, 1, 2]          after  Convolution { channels_last, sizes, bias %b, relu }
//!         %f = transpose %w [0, 3, 1, 2]                 of %x: [N, H, W, C] and %w: [M, R, S, C]
//!         %h = conv %u, %f
//!         %t = transpose %h [0, 2, 3, 1]
//!         %y = pointwise %t, %b {max($0 + $1, 0.0)}
//!
//! Without the transpositions, memory has channels first. Padding must be the same on both sides; what else is asked
//! for, generated kernels compute.

use planfile::op::Window;
use planfile::plan::{Activation, Call, Convolution, Library};
use planfile::{DType, Op, Spec};

use super::epilogue::{Epilogue, epilogue};
use super::view::producer;
use super::{CudaTarget, Selected};

/// What the library may use beside operands and result.
const WORKSPACE_BYTES: u64 = 64 << 20;

/// A convolution, alone or with transpositions around it and an epilogue after it.
pub(super) fn select(spec: &Spec, target: &CudaTarget) -> Option<Selected> {
    let types = spec.types().ok()?;
    let conv = spec.nodes.iter().position(|node| matches!(node.op, Op::Conv { .. }))?;
    let Op::Conv { window, groups, transposed, .. } = &spec.nodes[conv].op else { return None };
    let &[x, w] = spec.nodes[conv].operands.as_slice() else { return None };
    let value = (spec.inputs.len() + conv) as u32;
    let rank = types[value as usize].sizes().len();
    let [to_last, from_last] = [channels_last(rank)?, channels_first(rank)?];
    let mut used = vec![conv];

    // Operands are inputs, or inputs whose channels are last.
    let mut operand = |operand: u32| match producer(spec, operand) {
        None => Some((operand, false)),
        Some(position) => {
            let node = &spec.nodes[position];
            used.push(position);
            let last = matches!(&node.op, Op::Transpose { permutation } if *permutation == from_last);
            let input = *node.operands.first()?;
            (last && producer(spec, input).is_none()).then_some((input, true))
        }
    };
    let ((input, last), (filter, filter_last)) = (operand(x)?, operand(w)?);
    if last != filter_last {
        return None;
    }
    // The result the same way, then what is done to it.
    let &[result] = spec.results.as_slice() else { return None };
    let mut at = value;
    if last {
        let after = spec.nodes.iter().position(|node| node.operands == [value])?;
        used.push(after);
        if !matches!(&spec.nodes[after].op, Op::Transpose { permutation } if *permutation == to_last) {
            return None;
        }
        at = (spec.inputs.len() + after) as u32;
    }
    let channel = if last { rank - 1 } else { 1 };
    let mut how = Epilogue::PLAIN;
    if result != at {
        let (found, nodes) = epilogue(spec, &types, at, channel)?;
        how = found;
        used.extend(nodes);
    }
    used.sort_unstable();
    used.dedup();
    if used.len() != spec.nodes.len() || types[result as usize].elements()? == 0 {
        return None;
    }
    // The library's fused call takes a bias always, and knows no transposed convolution.
    let fused = how != Epilogue::PLAIN;
    if fused && (*transposed || how.bias.is_none() || how.scale != 1.0 || how.activation == Activation::GeluTanh) {
        return None;
    }
    let dtype = types[value as usize].dtype;
    let same = spec.inputs.iter().chain([&types[result as usize]]).all(|ty| ty.dtype == dtype);
    if !same || !matches!(dtype, DType::F16 | DType::BF16 | DType::F32) {
        return None;
    }
    let (xs, ws, ys) = (types[x as usize].sizes(), types[w as usize].sizes(), types[value as usize].sizes());
    let shape = Shape::new(window, &xs, &ws, &ys)?;
    let call = Call::Convolution(Convolution {
        input,
        filter,
        bias: how.bias,
        residual: how.residual,
        relu: how.activation == Activation::Relu,
        channels_last: last,
        batch: xs[0],
        input_channels: xs[1],
        output_channels: ys[1],
        input_sizes: shape.input,
        output_sizes: shape.output,
        window: shape.window,
        pads: shape.pads,
        strides: shape.strides,
        dilations: shape.dilations,
        groups: *groups,
        transposed: *transposed,
        allow_tf32: target.allow_tf32,
    });
    call.check(&spec.inputs, std::slice::from_ref(&types[result as usize])).ok()?;
    Some(Selected::Library { library: Library::Cudnn, call, workspace_bytes: WORKSPACE_BYTES })
}

/// The permutation that puts the channels of `[N, C, spatial…]` last.
pub fn channels_last(rank: usize) -> Option<Vec<u8>> {
    (rank >= 3).then(|| [vec![0], (2..rank as u8).collect(), vec![1]].concat())
}

/// The permutation that undoes [`channels_last`].
pub fn channels_first(rank: usize) -> Option<Vec<u8>> {
    (rank >= 3).then(|| [vec![0, rank as u8 - 1], (1..rank as u8 - 1).collect()].concat())
}

/// Lists by spatial dimension, at least two: the library knows no fewer.
struct Shape {
    input: Vec<u64>,
    output: Vec<u64>,
    window: Vec<u64>,
    pads: Vec<u64>,
    strides: Vec<u64>,
    dilations: Vec<u64>,
}

impl Shape {
    fn new(window: &Window, input: &[u64], filter: &[u64], output: &[u64]) -> Option<Self> {
        let spatial = input.len() - 2;
        if spatial > 3 || filter[2..] != window.sizes {
            return None;
        }
        let pad = |&(low, high): &(i64, i64)| (low == high).then_some(u64::try_from(low).ok()?);
        let pads: Vec<u64> = window.pads.iter().map(pad).collect::<Option<_>>()?;
        let with = |first: u64, list: &[u64]| {
            if spatial == 1 { [&[first], list].concat() } else { list.to_vec() }
        };
        Some(Self {
            input: with(1, &input[2..]),
            output: with(1, &output[2..]),
            window: with(1, &window.sizes),
            pads: with(0, &pads),
            strides: with(1, &window.strides),
            dilations: with(1, &window.dilations),
        })
    }
}

#[cfg(test)]
mod tests {
    use planfile::{Binary, Dim, Expr, Scalar, SpecNode, TensorType};

    use super::*;

    fn selected(inputs: &[&[u64]], nodes: Vec<SpecNode>) -> Option<Convolution> {
        let inputs: Vec<TensorType> = inputs.iter().map(|sizes| TensorType::new(DType::F16, sizes)).collect();
        let results = vec![(inputs.len() + nodes.len() - 1) as u32];
        let spec = Spec { inputs, nodes, results };
        spec.types().unwrap();
        match select(&spec, &CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false })? {
            Selected::Library { call: Call::Convolution(call), .. } => Some(call),
            other => panic!("{other:?}"),
        }
    }

    fn node(op: Op, operands: &[u32]) -> SpecNode {
        SpecNode { op, operands: operands.to_vec() }
    }

    fn conv(size: u64, pads: (i64, i64), rank: usize) -> Op {
        let window = Window {
            sizes: vec![size; rank],
            strides: vec![1; rank],
            dilations: vec![1; rank],
            pads: vec![pads; rank],
        };
        Op::Conv { window, groups: 1, transposed: false, output_pads: vec![0; rank] }
    }

    fn transpose(permutation: &[u8]) -> Op {
        Op::Transpose { permutation: permutation.to_vec() }
    }

    #[test]
    fn a_block_of_a_residual_network_is_one_call() {
        let zero = Expr::constant(Scalar::from_f64(DType::F16, 0.0));
        let sum = Expr::operand(0).binary(Binary::Add, Expr::operand(1)).binary(Binary::Add, Expr::operand(2));
        let dims = [2, 8, 8, 32].map(Dim::Static).to_vec();
        let nodes = vec![
            node(transpose(&[0, 3, 1, 2]), &[0]),
            node(transpose(&[0, 3, 1, 2]), &[1]),
            node(conv(3, (1, 1), 2), &[4, 5]),
            node(transpose(&[0, 2, 3, 1]), &[6]),
            node(Op::Pointwise { expr: sum.binary(Binary::Max, zero), dims }, &[7, 2, 3]),
        ];
        let call = selected(&[&[2, 8, 8, 16], &[32, 3, 3, 16], &[32], &[2, 8, 8, 32]], nodes).unwrap();
        assert_eq!((call.bias, call.residual, call.relu, call.channels_last), (Some(2), Some(3), true, true));
        assert_eq!((call.input_channels, call.output_channels, call.input_sizes), (16, 32, vec![8, 8]));
    }

    #[test]
    fn lines_are_images_of_one_row() {
        let call = selected(&[&[1, 4, 9], &[6, 4, 3]], vec![node(conv(3, (1, 1), 1), &[0, 1])]).unwrap();
        assert_eq!((call.input_sizes, call.window, call.pads), (vec![1, 9], vec![1, 3], vec![0, 1]));
        assert!(!call.channels_last);
    }

    #[test]
    fn what_the_fused_call_does_not_do_is_refused() {
        let number = |value: f64| Expr::constant(Scalar::from_f64(DType::F16, value));
        let with = |expr: Expr, sizes: &[u64]| {
            let dims = sizes.iter().copied().map(Dim::Static).collect();
            let nodes = vec![node(conv(3, (1, 1), 2), &[0, 1]), node(Op::Pointwise { expr, dims }, &[3, 2])];
            selected(&[&[2, 4, 5, 5], &[6, 4, 3, 3], &[6, 1, 1]], nodes)
        };
        let biased = Expr::operand(0).binary(Binary::Add, Expr::operand(1));
        assert!(with(biased.clone(), &[2, 6, 5, 5]).is_some());
        let relu = Expr::operand(0).binary(Binary::Max, number(0.0));
        assert_eq!(with(relu, &[2, 6, 5, 5]), None, "no bias");
        let scaled = Expr::operand(0).binary(Binary::Mul, number(0.5)).binary(Binary::Add, Expr::operand(1));
        assert_eq!(with(scaled, &[2, 6, 5, 5]), None, "a scale");
        assert_eq!(with(biased, &[3, 2, 6, 5, 5]), None, "broadcast afterwards");
    }

    #[test]
    fn uneven_padding_is_refused() {
        assert_eq!(selected(&[&[1, 4, 9], &[6, 4, 3]], vec![node(conv(3, (2, 0), 1), &[0, 1])]), None);
    }
}
