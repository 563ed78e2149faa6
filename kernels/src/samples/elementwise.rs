//! Samples of the primitives that compute or move an element at a time, and of products and convolutions.

#![expect(clippy::type_complexity, reason = "tables of samples: a row is read against the loop below it")]

use planfile::DType::{self, BF16, Bool, F16, F32, F64, I8, I32, I64, U8, U16};
use planfile::op::{Coordinates, IndexOrder, NearestRounding, PadMode, PoolKind, Real, ResizeMode, Window};
use planfile::{Binary, Dim, Expr, Op, RankScalar, Scalar, Unary};

use super::{List, ty};

fn dims(sizes: &[u64]) -> Vec<Dim> {
    sizes.iter().copied().map(Dim::Static).collect()
}

pub(super) fn pointwise(list: &mut List) {
    let [x, y, z] = [0, 1, 2].map(Expr::operand);
    let unaries = [
        Unary::Abs,
        Unary::Exp,
        Unary::Tanh,
        Unary::Sigmoid,
        Unary::Erf,
        Unary::Floor,
        Unary::Round,
        Unary::Cos,
        Unary::Neg,
        Unary::Atan,
    ];
    for (unary, dtype) in unaries.into_iter().zip([F32, F16, BF16, F64, F32, F16, F32, BF16, I8, F32]) {
        list.one(Op::Pointwise { expr: x.clone().unary(unary), dims: dims(&[7, 33]) }, vec![ty(dtype, &[7, 33])]);
    }
    let binaries = [
        (Binary::Add, F32),
        (Binary::Sub, F16),
        (Binary::Mul, BF16),
        (Binary::Div, I32),
        (Binary::Mod, I64),
        (Binary::Mod, F32),
        (Binary::Mod, F16),
        (Binary::Mod, F64),
        (Binary::Rem, F32),
        (Binary::Max, F16),
        (Binary::Min, U8),
        (Binary::Xor, Bool),
        (Binary::ShiftRight, U16),
        (Binary::ShiftRight, I8),
        (Binary::ShiftLeft, I32),
        (Binary::Div, F64),
    ];
    for (binary, dtype) in binaries {
        let op = Op::Pointwise { expr: x.clone().binary(binary, y.clone()), dims: dims(&[3, 40]) };
        list.one(op.clone(), vec![ty(dtype, &[3, 40]), ty(dtype, &[40])]);
        list.one(op, vec![ty(dtype, &[3, 1]), ty(dtype, &[])]);
    }
    for (from, to) in [(F32, F16), (F16, F32), (F32, I8), (I64, BF16), (Bool, F32), (F64, Bool), (I32, U8)] {
        list.one(Op::Pointwise { expr: x.clone().cast(to), dims: dims(&[513]) }, vec![ty(from, &[513])]);
    }
    // The sign turned by its bit.
    for (integer, float) in [(I32, F32), (I64, F64)] {
        let sign = Expr::constant(Scalar { dtype: integer, bits: 1 << (8 * integer.bytes() - 1) });
        let turned = x.clone().unary(Unary::Bits).binary(Binary::Xor, sign).unary(Unary::FromBits);
        list.one(Op::Pointwise { expr: turned, dims: dims(&[5, 9]) }, vec![ty(float, &[5, 9])]);
    }
    let chain = x.clone().binary(Binary::Mul, y.clone()).binary(Binary::Add, z).unary(Unary::Tanh);
    let shapes: [&[u64]; 3] = [&[4, 6, 16], &[6, 1], &[16]];
    list.one(Op::Pointwise { expr: chain, dims: dims(shapes[0]) }, shapes.iter().map(|sizes| ty(F16, sizes)).collect());
    // A difference of squares is 0 where both are equal: no product may keep more digits than the other.
    let square = |own: &Expr| own.clone().binary(Binary::Mul, own.clone());
    let root = square(&x).binary(Binary::Sub, square(&y)).unary(Unary::Sqrt);
    for dtype in [F32, F64] {
        let op = Op::Pointwise { expr: root.clone(), dims: dims(&[61, 61]) };
        list.one(op, vec![ty(dtype, &[61, 61]), ty(dtype, &[61, 61])]);
    }
    let below = Expr::index(1).compare(planfile::Compare::Le, Expr::index(0));
    let triangle = below.select(x, Expr::constant(Scalar::f32(0.0)));
    list.one(Op::Pointwise { expr: triangle, dims: dims(&[9, 9]) }, vec![ty(F32, &[9, 9])]);
    list.one(Op::Pointwise { expr: y, dims: dims(&[0, 3]) }, vec![ty(F32, &[3]), ty(F32, &[0, 3])]);
}

pub(super) fn movement(list: &mut List) {
    list.one(Op::Reshape { dims: dims(&[6, 4]) }, vec![ty(F16, &[2, 3, 4])]);
    list.one(Op::Broadcast { dims: dims(&[3, 2, 5, 4]) }, vec![ty(F32, &[2, 1, 4])]);
    list.one(Op::Broadcast { dims: dims(&[7]) }, vec![ty(I8, &[])]);
    let slices: &[(DType, &[u64], &[i64], &[i64], &[u64])] = &[
        (F32, &[10, 20], &[2, 0], &[1, 1], &[5, 20]),
        (F16, &[10, 21], &[9, 1], &[-2, 3], &[5, 6]),
        (I64, &[4, 5, 6], &[0, 4, 0], &[1, -1, 2], &[4, 5, 3]),
        (Bool, &[4, 5], &[0, 0], &[1, 1], &[0, 5]),
    ];
    for &(dtype, from, starts, steps, sizes) in slices {
        let starts = starts.iter().copied().map(RankScalar::Uniform).collect();
        list.one(Op::Slice { starts, steps: steps.to_vec(), sizes: sizes.to_vec() }, vec![ty(dtype, from)]);
    }
    for (mode, low, high) in [
        (PadMode::Constant, [1, 2], [0, 3]),
        (PadMode::Constant, [-1, 2], [2, -2]),
        (PadMode::Reflect, [2, 1], [1, 3]),
        (PadMode::Edge, [3, 0], [0, 9]),
        (PadMode::Wrap, [2, 3], [1, 2]),
    ] {
        for dtype in [F32, U8] {
            let mut inputs = vec![ty(dtype, &[4, 6])];
            inputs.extend((mode == PadMode::Constant).then(|| ty(dtype, &[])));
            list.one(Op::Pad { low: low.to_vec(), high: high.to_vec(), mode }, inputs);
        }
    }
    list.one(Op::Concat { axis: 1 }, vec![ty(F16, &[3, 5]), ty(F16, &[3, 8]), ty(F16, &[3, 0]), ty(F16, &[3, 1])]);
    list.one(Op::Concat { axis: 0 }, vec![ty(F32, &[3, 8]), ty(F32, &[2, 8])]);
    list.one(Op::Concat { axis: 2 }, vec![ty(I64, &[2, 3, 1]); 4]);
}

pub(super) fn gather(list: &mut List) {
    let gathers: &[(u8, DType, DType, &[u64], &[u64])] = &[
        (0, F16, I64, &[1000, 64], &[2, 17]),
        (1, F32, I32, &[3, 40, 5], &[6]),
        (2, U8, I64, &[3, 4, 50], &[]),
        (0, F32, I64, &[10, 3], &[0]),
    ];
    for &(axis, dtype, index, sizes, own) in gathers {
        list.one(Op::Gather { axis }, vec![ty(dtype, sizes), ty(index, own)]);
    }
    list.one(Op::GatherElements { axis: 1 }, vec![ty(F32, &[4, 9]), ty(I64, &[3, 20])]);
    list.one(Op::GatherElements { axis: 0 }, vec![ty(BF16, &[4, 9]), ty(I32, &[7, 9])]);
    list.one(Op::GatherNd { batch: 0 }, vec![ty(F32, &[4, 5, 6]), ty(I64, &[7, 2])]);
    list.one(Op::GatherNd { batch: 1 }, vec![ty(F16, &[4, 5, 6]), ty(I64, &[4, 3, 1])]);
    for (interleaved, rotary, dtype, batch) in [(false, 64, F16, 1), (true, 32, BF16, 2), (false, 10, F32, 2)] {
        let table = ty(dtype, &[batch, 9, rotary / 2]);
        list.one(Op::Rotary { interleaved, rotary }, vec![ty(dtype, &[2, 3, 9, 64]), table.clone(), table]);
    }
}

fn window(sizes: &[u64], strides: &[u64], dilations: &[u64], pads: &[(i64, i64)]) -> Window {
    Window { sizes: sizes.to_vec(), strides: strides.to_vec(), dilations: dilations.to_vec(), pads: pads.to_vec() }
}

pub(super) fn windows(list: &mut List) {
    let square = window(&[3, 3], &[2, 2], &[1, 1], &[(1, 1), (1, 1)]);
    let line = window(&[4], &[3], &[2], &[(1, 2)]);
    for (kind, dtype) in [
        (PoolKind::Max, F32),
        (PoolKind::Max, F16),
        (PoolKind::Max, I8),
        (PoolKind::Average { count_pads: true }, F32),
        (PoolKind::Average { count_pads: false }, BF16),
        (PoolKind::Lp { p: 2 }, F32),
    ] {
        list.one(
            Op::Pool { kind, window: square.clone(), ceil: false, indices: None },
            vec![ty(dtype, &[2, 3, 13, 14])],
        );
        list.one(Op::Pool { kind, window: line.clone(), ceil: true, indices: None }, vec![ty(dtype, &[1, 5, 31])]);
    }
    for order in [IndexOrder::RowMajor, IndexOrder::ColumnMajor] {
        let op = Op::Pool { kind: PoolKind::Max, window: square.clone(), ceil: false, indices: Some(order) };
        list.one(op, vec![ty(F32, &[2, 3, 9, 8])]);
    }
    let modes = [
        (ResizeMode::Nearest(NearestRounding::PreferFloor), Coordinates::HalfPixel),
        (ResizeMode::Nearest(NearestRounding::Floor), Coordinates::Asymmetric),
        (ResizeMode::Linear { antialias: false }, Coordinates::HalfPixel),
        (ResizeMode::Linear { antialias: false }, Coordinates::AlignCorners),
        (ResizeMode::Linear { antialias: true }, Coordinates::HalfPixel),
        (ResizeMode::Cubic { a: Real(-0.75), exclude_outside: false, antialias: false }, Coordinates::PytorchHalfPixel),
    ];
    for (mode, coordinates) in modes {
        for (from, to) in [([1, 2, 6, 5], [1, 2, 12, 10]), ([1, 1, 12, 8], [1, 1, 6, 6])] {
            let scales = from.iter().zip(&to).map(|(&from, &to)| Real(to as f64 / from as f64)).collect();
            let region = vec![(Real(0.0), Real(1.0)); 4];
            let op = Op::Resize { mode, coordinates, scales, region, sizes: to.to_vec() };
            for dtype in [F32, U8, F16] {
                list.one(op.clone(), vec![ty(dtype, &from)]);
            }
        }
    }
}

pub(super) fn products(list: &mut List) {
    type Pairs<'a> = &'a [(u8, u8)];
    let dots: &[(Pairs<'_>, Pairs<'_>, DType, &[u64], &[u64])] = &[
        (&[], &[(1, 0)], F32, &[17, 40], &[40, 23]),
        (&[], &[(1, 1)], F16, &[64, 128], &[96, 128]),
        (&[], &[(2, 0)], BF16, &[2, 5, 64], &[64, 32]),
        (&[(0, 0)], &[(2, 1)], F16, &[4, 16, 32], &[4, 32, 8]),
        (&[(0, 0), (1, 1)], &[(3, 2)], F32, &[2, 3, 7, 9], &[2, 3, 9, 5]),
        (&[], &[(0, 0)], F64, &[30], &[30]),
        (&[], &[(1, 0)], F32, &[3, 0], &[0, 4]),
    ];
    for &(batch, contract, dtype, a, b) in dots {
        let op =
            Op::Dot { batch: batch.to_vec(), contract: contract.to_vec(), accumulate: dtype.accumulator(), out: dtype };
        list.one(op, vec![ty(dtype, a), ty(dtype, b)]);
    }
    let int = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate: I32, out: I32 };
    list.one(int, vec![ty(I8, &[9, 32]), ty(I8, &[32, 12])]);
    let convs: &[(DType, Window, u64, bool, &[u64], &[u64])] = &[
        (F32, window(&[3, 3], &[1, 1], &[1, 1], &[(1, 1), (1, 1)]), 1, false, &[2, 4, 9, 10], &[6, 4, 3, 3]),
        (F16, window(&[1, 1], &[2, 2], &[1, 1], &[(0, 0), (0, 0)]), 1, false, &[1, 16, 8, 8], &[8, 16, 1, 1]),
        (F32, window(&[3, 3], &[2, 2], &[1, 1], &[(1, 1), (1, 1)]), 6, false, &[1, 6, 9, 9], &[6, 1, 3, 3]),
        (F32, window(&[4], &[2], &[1], &[(1, 1)]), 1, true, &[2, 3, 10], &[3, 5, 4]),
        (F32, window(&[3], &[1], &[2], &[(2, 2)]), 2, false, &[1, 4, 20], &[6, 2, 3]),
    ];
    for (dtype, window, groups, transposed, x, w) in convs {
        let output_pads = vec![0; window.sizes.len()];
        let op = Op::Conv { window: window.clone(), groups: *groups, transposed: *transposed, output_pads };
        list.one(op, vec![ty(*dtype, x), ty(*dtype, w)]);
    }
}
