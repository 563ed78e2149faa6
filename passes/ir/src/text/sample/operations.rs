//! Random operations with operands that fit them.

use planfile::op::{
    Causal, Cell, Coordinates, IndexOrder, NearestRounding, NormKind, PadMode, PoolKind, ReduceKind, ResizeMode, Window,
};
use planfile::{Binary, Compare, DType, Dim, Expr, ExprOp, Op, Real, TensorType, Unary};

use super::Choices;

/// A well-typed expression over these operands, grown on a stack.
pub(crate) fn expr(c: &mut Choices<'_>, operands: &[DType], rank: usize, ranks: usize) -> Expr {
    let mut ops = Vec::new();
    let mut stack: Vec<DType> = Vec::new();
    let mut slots: Vec<(u8, DType)> = Vec::new();
    let mut steps = c.below(24);
    while steps > 0 || stack.len() != 1 {
        steps = steps.saturating_sub(1);
        let top = stack.last().copied();
        let pair = stack.len() >= 2 && stack[stack.len() - 1] == stack[stack.len() - 2];
        if steps == 0 && stack.len() > 1 {
            // Make the two on top alike and join them.
            let below = stack[stack.len() - 2];
            if top != Some(below) {
                ops.push(ExprOp::Cast(below));
            }
            let join =
                if below == DType::Bool { Binary::Xor } else { c.pick(&[Binary::Sub, Binary::Div, Binary::Max]) };
            ops.push(ExprOp::Binary(join));
            stack.pop();
            continue;
        }
        match (c.below(9), top) {
            (1, Some(_)) => {
                let dtype = c.dtype();
                ops.push(ExprOp::Cast(dtype));
                stack.pop();
                stack.push(dtype);
            }
            (2, Some(dtype)) if dtype.is_float() => {
                ops.push(ExprOp::Unary(c.pick(&[Unary::Neg, Unary::Sigmoid, Unary::Round, Unary::Reciprocal])));
            }
            (2, Some(dtype)) => {
                ops.push(ExprOp::Unary(if dtype == DType::Bool { Unary::Not } else { Unary::Neg }));
            }
            (3, Some(dtype)) => {
                let slot = c.below(256) as u8;
                slots.retain(|(known, _)| *known != slot);
                slots.push((slot, dtype));
                ops.push(ExprOp::Set(slot));
            }
            (4 | 5, Some(dtype)) if pair && dtype != DType::Bool => {
                ops.push(ExprOp::Binary(c.pick(&[Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Rem])));
                stack.pop();
            }
            (6, Some(_)) if pair => {
                ops.push(ExprOp::Compare(c.pick(&[Compare::Eq, Compare::Lt, Compare::Ge, Compare::Ne])));
                stack.truncate(stack.len() - 2);
                stack.push(DType::Bool);
            }
            (7, Some(_)) if stack.len() >= 3 && stack[stack.len() - 3] == DType::Bool => {
                let yes = stack[stack.len() - 2];
                if !pair {
                    ops.push(ExprOp::Cast(yes));
                }
                ops.push(ExprOp::Select);
                stack.truncate(stack.len() - 3);
                stack.push(yes);
            }
            (8, _) if rank > 0 => {
                ops.push(ExprOp::Index { axis: c.axis(rank), base: c.rank_scalar(ranks, 9) });
                stack.push(DType::I64);
            }
            (0, _) if !operands.is_empty() => {
                let operand = c.below(operands.len() as u64) as usize;
                ops.push(ExprOp::Operand(operand as u16));
                stack.push(operands[operand]);
            }
            (5, _) if !slots.is_empty() => {
                let (slot, dtype) = c.pick(&slots);
                ops.push(ExprOp::Get(slot));
                stack.push(dtype);
            }
            _ => {
                let dtype = c.dtype();
                ops.push(ExprOp::Const(c.scalar(dtype)));
                stack.push(dtype);
            }
        }
    }
    Expr { ops }
}

fn window(c: &mut Choices<'_>, spatial: usize) -> (Window, Vec<u64>) {
    let mut window = Window { sizes: vec![], strides: vec![], dilations: vec![], pads: vec![] };
    let mut inputs = Vec::new();
    for _ in 0..spatial {
        let (size, dilation) = (c.size(), c.size());
        window.sizes.push(size);
        window.dilations.push(if c.flag() { dilation } else { 1 });
        window.strides.push(if c.flag() { c.size() } else { 1 });
        window.pads.push((c.below(3) as i64, c.below(2) as i64));
        inputs.push(dilation * size + 3 + c.size());
    }
    (window, inputs)
}

/// Number of kinds that [`op`] draws from; those from [`COLLECTIVE`] on need ranks.
pub(super) const KINDS: u64 = 29;
pub(super) const COLLECTIVE: u64 = 25;

/// An operation of this kind with operands that fit it.
pub(crate) fn op(c: &mut Choices<'_>, kind: u64, ranks: &[u32]) -> (Op, Vec<TensorType>) {
    let index = c.pick(&[DType::I32, DType::I64]);
    let x = c.ty(1);
    let sizes = x.sizes();
    let rank = x.rank();
    let axis = c.axis(rank);
    let at = usize::from(axis);
    match kind {
        0 => {
            let dims = c.bounded(x.clone()).dims;
            let operands: Vec<TensorType> = (0..c.below(4))
                .map(|_| {
                    let from = c.below(rank as u64 + 1) as usize;
                    let dims = dims[from..].iter().map(|dim| if c.flag() { Dim::Static(1) } else { *dim }).collect();
                    TensorType { dtype: c.dtype(), dims }
                })
                .collect();
            let dtypes: Vec<DType> = operands.iter().map(|ty| ty.dtype).collect();
            (Op::Pointwise { expr: expr(c, &dtypes, rank, ranks.len()), dims }, operands)
        }
        1 => {
            let (b, k, m, n) = (c.below(3), c.below(3), c.below(2), c.below(2));
            let shared: Vec<u64> = (0..b + k).map(|_| c.size()).collect();
            let left: Vec<u64> = shared.iter().copied().chain((0..m).map(|_| c.size())).collect();
            let right: Vec<u64> = shared.iter().copied().chain((0..n).map(|_| c.size())).collect();
            let pairs = |range: std::ops::Range<u64>| range.map(|dim| (dim as u8, dim as u8)).collect();
            let dot = Op::Dot { batch: pairs(0..b), contract: pairs(b..b + k), accumulate: c.dtype(), out: c.dtype() };
            (dot, vec![TensorType::new(x.dtype, &left), TensorType::new(x.dtype, &right)])
        }
        2 => {
            let spatial = c.below(3) as usize;
            let (window, inputs) = window(c, spatial);
            let (groups, per_group, outs, transposed) = (c.size(), c.size(), c.size(), c.flag());
            let output_pads = (0..spatial).map(|_| c.below(2)).collect();
            let x = [vec![c.size(), groups * per_group], inputs].concat();
            let (rows, columns) = if transposed { (groups * per_group, outs) } else { (groups * outs, per_group) };
            let w = [vec![rows, columns], window.sizes.clone()].concat();
            let types = [x, w].map(|sizes| TensorType::new(DType::F32, &sizes));
            (Op::Conv { window, groups, transposed, output_pads }, types.to_vec())
        }
        3 => {
            let (window, inputs) = window(c, 2);
            let lp = PoolKind::Lp { p: c.size() };
            let average = PoolKind::Average { count_pads: c.flag() };
            let kind = c.pick(&[PoolKind::Max, average, lp]);
            let order = Some(c.pick(&[IndexOrder::RowMajor, IndexOrder::ColumnMajor]));
            let indices = if kind == PoolKind::Max { c.pick(&[None, order]) } else { None };
            let x = [vec![c.size(), c.size()], inputs].concat();
            (Op::Pool { kind, window, ceil: c.flag(), indices }, vec![TensorType::new(DType::F32, &x)])
        }
        4 => {
            let combine = ReduceKind::Combine(c.combine());
            let (max, min) = (ReduceKind::ArgMax { last: c.flag() }, ReduceKind::ArgMin { last: c.flag() });
            (
                Op::Reduce { kind: c.pick(&[combine, ReduceKind::Mean, max, min]), axes: vec![axis], keep: c.flag() },
                vec![x],
            )
        }
        5 => (Op::Scan { combine: c.combine(), axis, exclusive: c.flag(), reverse: c.flag() }, vec![x]),
        6 => (Op::Gather { axis }, vec![x, TensorType::new(index, &c.sizes(0))]),
        7 => (Op::GatherElements { axis }, vec![x, TensorType::new(index, &sizes)]),
        8 => {
            let batch = c.below(rank as u64);
            let depth = c.below(rank as u64 - batch + 1);
            let indices = [&sizes[..batch as usize], &[depth]].concat();
            (Op::GatherNd { batch: batch as u8 }, vec![x, TensorType::new(index, &indices)])
        }
        9 => {
            let combine = Some(c.combine());
            let op = Op::ScatterElements { axis, combine: c.pick(&[None, combine]) };
            (op, vec![x.clone(), TensorType::new(index, &sizes), x])
        }
        10 => {
            let combine = Some(c.combine());
            let updates = TensorType::new(x.dtype, &[&[3], &sizes[1..]].concat());
            let op = Op::ScatterNd { combine: c.pick(&[None, combine]) };
            (op, vec![x, TensorType::new(index, &[3, 1]), updates])
        }
        11 => (Op::Reshape { dims: vec![Dim::Static(1), Dim::Static(sizes.iter().product())] }, vec![x]),
        12 => {
            let mut permutation: Vec<u8> = (0..rank as u8).collect();
            permutation.rotate_left(at);
            (Op::Transpose { permutation }, vec![x])
        }
        13 => {
            let starts = sizes.iter().map(|&size| c.rank_scalar(ranks.len(), size)).collect();
            let steps = sizes.iter().map(|_| c.pick(&[1, 1, -1, 2])).collect();
            (Op::Slice { starts, steps, sizes: vec![1; rank] }, vec![x])
        }
        14 => {
            let mode = c.pick(&[PadMode::Constant, PadMode::Reflect, PadMode::Edge, PadMode::Wrap]);
            let (low, high) = sizes.iter().map(|_| (c.below(4) as i64, c.below(2) as i64 - 1)).unzip();
            let value = (mode == PadMode::Constant).then(|| TensorType::new(x.dtype, &[]));
            (Op::Pad { low, high, mode }, [Some(x), value].into_iter().flatten().collect())
        }
        15 => (Op::Concat { axis }, vec![x; c.size() as usize]),
        16 => {
            let dims = [c.bounded(x.clone()).dims, x.dims.clone()].concat();
            (Op::Broadcast { dims }, vec![x])
        }
        17 => {
            use NearestRounding::{Ceil, Floor, PreferCeil, PreferFloor};
            let nearest = ResizeMode::Nearest(c.pick(&[PreferFloor, PreferCeil, Floor, Ceil]));
            let linear = ResizeMode::Linear { antialias: c.flag() };
            let cubic = ResizeMode::Cubic { a: c.real(), exclude_outside: c.flag(), antialias: c.flag() };
            let coordinates = [
                Coordinates::HalfPixel,
                Coordinates::HalfPixelSymmetric,
                Coordinates::PytorchHalfPixel,
                Coordinates::AlignCorners,
                Coordinates::Asymmetric,
                Coordinates::TfCropAndResize { extrapolation: c.real() },
            ];
            let drawn = sizes.iter().map(|_| (c.real(), c.real())).collect();
            let mode = c.pick(&[nearest, linear, cubic]);
            let resized: Vec<u64> = sizes.iter().map(|_| c.size()).collect();
            let mut scales: Vec<Real> = sizes.iter().map(|_| c.real()).collect();
            if matches!(mode, ResizeMode::Linear { antialias: true } | ResizeMode::Cubic { antialias: true, .. }) {
                // The scale decides how many elements are averaged, so it must fit the sizes.
                let implied = |(&to, &from): (&u64, &u64)| Real(to as f64 / from.max(1) as f64);
                scales = resized.iter().zip(&sizes).map(implied).collect();
            }
            let resize = Op::Resize {
                mode,
                coordinates: c.pick(&coordinates),
                scales,
                region: c.pick(&[vec![(Real(0.0), Real(1.0)); rank], drawn]),
                sizes: resized,
            };
            (resize, vec![x])
        }
        18 => (Op::TopK { axis, k: 1 + c.below(sizes[at]), largest: c.flag(), sorted: c.flag() }, vec![x]),
        19 => (Op::Append { axis }, vec![c.bounded(x.clone()), x]),
        20 => (Op::Softmax { axis, log: c.flag() }, vec![x]),
        21 => {
            let x = x.with_dtype(c.float());
            let tail = TensorType { dtype: x.dtype, dims: x.dims[at..].to_vec() };
            let kind = c.pick(&[NormKind::Layer, NormKind::Rms]);
            let (scale, bias) = (c.flag(), c.flag());
            let affine = vec![tail; usize::from(scale) + usize::from(bias)];
            (Op::Norm { kind, axis, epsilon: c.real(), scale, bias }, [vec![x], affine].concat())
        }
        22 => {
            let (dtype, [b, h, g, s, t, d, e]) = (c.float(), std::array::from_fn(|_| c.size()));
            let causal = c.pick(&[None, Some(Causal::FromStart), Some(Causal::FromEnd)]);
            let mask = c.flag();
            let shapes = [[b, h * g, s, d], [b, g, t, d], [b, g, t, e], [1, 1, s, t]];
            let shapes = &shapes[..3 + usize::from(mask)];
            let types = shapes.iter().map(|sizes| TensorType::new(dtype, sizes)).collect();
            (Op::Attention { scale: c.real(), causal, softcap: c.real(), mask }, types)
        }
        23 => {
            let (dtype, [b, h, s, r]) = (c.float(), std::array::from_fn(|_| c.size()));
            let table = TensorType::new(dtype, &[b, s, r]);
            let x = TensorType::new(dtype, &[b, h, s, 2 * r + c.below(2)]);
            (Op::Rotary { interleaved: c.flag(), rotary: 2 * r }, vec![x, table.clone(), table])
        }
        24 => recurrence(c),
        25 => (Op::AllReduce { combine: c.combine(), groups: c.groups(ranks) }, vec![x]),
        26 => (Op::AllGather { axis, groups: c.groups(ranks) }, vec![x]),
        27 => {
            let (combine, groups) = (c.combine(), c.groups(ranks));
            let mut x = x;
            x.dims[at] = Dim::Static(sizes[at] * groups[0].len() as u64);
            (Op::ReduceScatter { combine, axis, groups }, vec![x])
        }
        _ => {
            let groups = c.groups(ranks);
            let mut x = x;
            x.dims[at] = Dim::Static(sizes[at] * groups[0].len() as u64);
            (Op::AllToAll { split: axis, concat: c.axis(rank), groups }, vec![x])
        }
    }
}

fn recurrence(c: &mut Choices<'_>) -> (Op, Vec<TensorType>) {
    let (dtype, [t, b, h]) = (c.float(), std::array::from_fn(|_| c.size()));
    let coupled = c.flag();
    let cells = [Cell::Rnn, Cell::Gru { resets_late: false }, Cell::Gru { resets_late: true }, Cell::Lstm { coupled }];
    let cell = c.pick(&cells);
    let reverse: Vec<bool> = (0..1 + c.below(2)).map(|_| c.flag()).collect();
    let (lstm, lengths) = (matches!(cell, Cell::Lstm { .. }), c.flag());
    let (bias, peepholes) = (c.flag() && matches!(cell, Cell::Gru { resets_late: true }), c.flag() && lstm);
    let (d, gates) = (reverse.len() as u64, cell.gates() * h);
    let unary = [Unary::Tanh, Unary::Sigmoid, Unary::Abs];
    let function = |c: &mut Choices<'_>| {
        let limit = Expr::constant(c.scalar(dtype.accumulator()));
        Expr::operand(0).binary(Binary::Min, limit).unary(c.pick(&unary))
    };
    let functions = (0..cell.functions() * reverse.len()).map(|_| function(c)).collect();
    let mut shapes = vec![vec![t, b, d, gates], vec![d, gates, h], vec![d, b, h]];
    shapes.extend(lstm.then(|| vec![d, b, h]));
    shapes.extend(bias.then(|| vec![d, h]));
    shapes.extend(peepholes.then(|| vec![d, 3 * h]));
    let mut types: Vec<TensorType> = shapes.iter().map(|sizes| TensorType::new(dtype, sizes)).collect();
    types.extend(lengths.then(|| TensorType::new(c.pick(&[DType::I32, DType::I64]), &[b])));
    (Op::Recurrence { cell, reverse, functions, bias, peepholes, lengths }, types)
}
