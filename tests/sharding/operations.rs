//! One primitive at a time, on values that exist; each function returns `None` where its operation does not fit.

use planfile::op::{PadMode, PoolKind, ReduceKind, Window};
use planfile::{Binary, Combine, Compare, DType, Dim, Expr, Op, RankScalar, Scalar, Unary};

use super::modules::{Drawing, Known};

type Draw = fn(&mut Drawing) -> Option<Known>;

const ALL: [Draw; 25] = [
    dot_weight, dot_weight, dot_weight, dot_values, conv, conv, unary, binary, binary, indexed, part, merge, ungroup,
    transpose, slice, split, concat, reduce, reduce, softmax, scan, gather, pad, pool, sort,
];

/// Appends a random operation.
pub(crate) fn draw(drawing: &mut Drawing) -> Option<Known> {
    if drawing.below(12) == 0 {
        let sizes = drawing.any();
        let sizes = drawing.sizes(sizes);
        drawing.know_weight(&sizes);
    }
    let draw = drawing.pick(&ALL);
    draw(drawing)
}

fn statics(sizes: &[u64]) -> Vec<Dim> {
    sizes.iter().copied().map(Dim::Static).collect()
}

pub(crate) fn reshape(sizes: &[u64]) -> Op {
    Op::Reshape { dims: statics(sizes) }
}

fn float(value: f64) -> Expr {
    Expr::constant(Scalar::from_f64(DType::F32, value))
}

/// Values that grew too large, brought back: their remainder where they are exact, their hyperbolic tangent else.
pub(crate) fn tame(drawing: &mut Drawing, value: Known) -> Option<Known> {
    let dims = statics(&drawing.sizes(value));
    let (expr, range) = if value.exact {
        (Expr::operand(0).binary(Binary::Mod, float(5.0)), 5.0)
    } else {
        (Expr::operand(0).binary(Binary::Mul, float(1.0 / value.range)).unary(Unary::Tanh), 1.0)
    };
    let id = drawing.node(Op::Pointwise { expr, dims }, &[value.id])?[0];
    Some(drawing.know(id, range, value.exact, false))
}

pub(crate) fn dot(batch: &[(u8, u8)], contract: &[(u8, u8)]) -> Op {
    Op::Dot { batch: batch.to_vec(), contract: contract.to_vec(), accumulate: DType::F32, out: DType::F32 }
}

/// The product over one axis with a weight, which may have its columns first.
pub(crate) fn product(drawing: &mut Drawing, x: Known, axis: usize, columns: u64) -> Option<Known> {
    let size = drawing.sizes(x)[axis];
    let flipped = drawing.below(3) == 0;
    let w = drawing.weight(&if flipped { [columns, size] } else { [size, columns] });
    let like = Known { positive: false, ..x };
    let op = dot(&[], &[(axis as u8, u8::from(flipped))]);
    drawing.value(op, &[x.id, w.id], like, x.range * w.range * size as f64)
}

fn dot_weight(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let rank = drawing.sizes(x).len();
    let axis = if drawing.below(4) == 0 { drawing.axis(rank) } else { rank - 1 };
    let columns = drawing.size();
    product(drawing, x, axis, columns)
}

/// A product of two values over their last axes, batched over as many leading ones as agree.
fn dot_values(drawing: &mut Drawing) -> Option<Known> {
    let (a, b) = (drawing.any_of_rank(2)?, drawing.any_of_rank(2)?);
    let (x, y) = (drawing.sizes(a), drawing.sizes(b));
    let alike = x.iter().zip(&y).take(x.len().min(y.len()) - 1).take_while(|(a, b)| a == b).count();
    let last = [x.len() - 1, y.len() - 1];
    let batch: Vec<(u8, u8)> = (0..alike as u8).map(|axis| (axis, axis)).collect();
    let op = dot(&batch, &[(last[0] as u8, last[1] as u8)]);
    let like = Known { exact: a.exact && b.exact, positive: false, ..a };
    drawing.value(op, &[a.id, b.id], like, a.range * b.range * x[last[0]] as f64)
}

fn window(spatial: usize, size: u64, stride: u64, pad: i64) -> Window {
    let same = |number| vec![number; spatial];
    Window { sizes: same(size), strides: same(stride), dilations: same(1), pads: vec![(pad, pad); spatial] }
}

/// Plain, grouped, depthwise and transposed convolutions.
fn conv(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(3)?;
    let sizes = drawing.sizes(x);
    let (spatial, channels) = (sizes.len() - 2, sizes[1]);
    let divisors: Vec<u64> = (1..=channels).filter(|groups| channels.is_multiple_of(*groups)).collect();
    let groups = match drawing.below(3) {
        0 => 1,
        1 => channels,
        _ => drawing.pick(&divisors),
    };
    let transposed = drawing.below(4) == 0;
    let size = drawing.pick(&[1, 3]);
    let outputs = if groups == 1 { drawing.size() } else { groups * drawing.pick(&[1, 1, 2, 3]) };
    let lead = if transposed { [channels, outputs / groups] } else { [outputs, channels / groups] };
    let w = drawing.weight(&[lead.as_slice(), &vec![size; spatial]].concat());
    let window = window(spatial, size, drawing.pick(&[1, 2]), (size / 2) as i64);
    let op = Op::Conv { window, groups, transposed, output_pads: vec![0; spatial] };
    let terms = channels / groups * size.pow(spatial as u32);
    drawing.value(op, &[x.id, w.id], Known { positive: false, ..x }, x.range * w.range * terms as f64)
}

fn unary(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any();
    let operand = Expr::operand(0);
    let (expr, range, exact, positive) = match drawing.below(5) {
        0 if x.positive => (operand.unary(Unary::Reciprocal), 1.0, false, false),
        1 if x.positive => (operand.unary(Unary::Log), x.range, false, false),
        2 => (operand.unary(Unary::Tanh), 1.0, false, false),
        3 => (operand.unary(Unary::Abs).binary(Binary::Add, float(1.0)), x.range + 1.0, x.exact, true),
        _ => (operand.binary(Binary::Sub, float(1.0)), x.range + 1.0, x.exact, false),
    };
    let op = Op::Pointwise { expr, dims: statics(&drawing.sizes(x)) };
    drawing.value(op, &[x.id], Known { exact, positive, ..x }, range)
}

/// With another value that broadcasts, or with a weight that does.
fn binary(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any();
    let mut y = drawing.any();
    let mut sizes = drawing.sizes(x);
    let dims = statics(&sizes);
    if y.id == x.id || drawing.sizes(y).iter().rev().zip(sizes.iter().rev()).any(|(a, b)| a != b && *a != 1) {
        for size in &mut sizes {
            if drawing.below(3) == 0 {
                *size = 1;
            }
        }
        let lead = drawing.axis(sizes.len() + 1);
        y = drawing.weight(&sizes[lead..]);
    }
    let (op, range) = match drawing.below(3) {
        0 => (Binary::Mul, x.range * y.range),
        1 => (Binary::Max, x.range.max(y.range)),
        _ => (Binary::Add, x.range + y.range),
    };
    let like = Known { exact: x.exact && y.exact, positive: x.positive && y.positive, ..x };
    let expr = Expr::operand(0).binary(op, Expr::operand(1));
    drawing.value(Op::Pointwise { expr, dims }, &[x.id, y.id], like, range)
}

/// Reads the index along an axis: as a number, or to mask.
fn indexed(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let sizes = drawing.sizes(x);
    let [a, b] = [drawing.axis(sizes.len()), drawing.axis(sizes.len())].map(|axis| Expr::index(axis as u8));
    let expr = if drawing.flag() {
        Expr::operand(0).binary(Binary::Add, a.cast(DType::F32))
    } else {
        a.compare(Compare::Le, b).select(Expr::operand(0), float(1.0))
    };
    drawing.value(Op::Pointwise { expr, dims: statics(&sizes) }, &[x.id], x, x.range + 12.0)
}

/// A dimension becomes two.
fn part(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let mut sizes = drawing.sizes(x);
    let axis = drawing.axis(sizes.len());
    let divisors: Vec<u64> = (1..=sizes[axis]).filter(|outer| sizes[axis].is_multiple_of(*outer)).collect();
    let outer = drawing.pick(&divisors);
    sizes[axis] /= outer;
    sizes.insert(axis, outer);
    (sizes.len() < 6).then_some(())?;
    drawing.value(reshape(&sizes), &[x.id], x, x.range)
}

/// Neighbouring dimensions become one; sometimes all of them.
fn merge(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(2)?;
    let mut sizes = drawing.sizes(x);
    let axis = drawing.axis(sizes.len() - 1);
    let last = if drawing.below(4) == 0 { sizes.len() - 1 } else { axis + 1 };
    let product = sizes[axis..=last].iter().product();
    sizes.splice(axis..=last, [product]);
    drawing.value(reshape(&sizes), &[x.id], x, x.range)
}

/// The factors of the whole in another order: blocks of several dimensions on both sides.
fn ungroup(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(2)?;
    let mut sizes = drawing.sizes(x);
    let axis = drawing.axis(sizes.len() - 1);
    sizes.swap(axis, axis + 1);
    drawing.value(reshape(&sizes), &[x.id], x, x.range)
}

fn transpose(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(2)?;
    let permutation = drawing.permutation(drawing.sizes(x).len());
    drawing.value(Op::Transpose { permutation }, &[x.id], x, x.range)
}

fn slice_op(starts: &[i64], steps: Vec<i64>, sizes: Vec<u64>) -> Op {
    Op::Slice { starts: starts.iter().copied().map(RankScalar::Uniform).collect(), steps, sizes }
}

/// `size` elements from `start` along an axis.
pub(crate) fn range(sizes: &[u64], axis: usize, start: u64, size: u64) -> Op {
    let mut starts = vec![0; sizes.len()];
    let mut taken = sizes.to_vec();
    (starts[axis], taken[axis]) = (start as i64, size);
    slice_op(&starts, vec![1; sizes.len()], taken)
}

/// A range, every other element, or all in reverse.
fn slice(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let mut sizes = drawing.sizes(x);
    let axis = drawing.axis(sizes.len());
    let (mut starts, mut steps) = (vec![0; sizes.len()], vec![1; sizes.len()]);
    match drawing.below(3) {
        0 => {
            (starts[axis], steps[axis]) = (sizes[axis] as i64 - 1, -1);
        }
        1 => {
            sizes[axis] = sizes[axis].div_ceil(2);
            steps[axis] = 2;
        }
        _ => {
            let start = drawing.below(sizes[axis]);
            starts[axis] = start as i64;
            sizes[axis] = 1 + drawing.below(sizes[axis] - start);
        }
    }
    drawing.value(slice_op(&starts, steps, sizes), &[x.id], x, x.range)
}

/// Takes a dimension apart in parts of equal or unequal sizes.
fn split(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let sizes = drawing.sizes(x);
    let axis = drawing.axis(sizes.len());
    let count = drawing.pick(&[2, 3]);
    (sizes[axis] >= count).then_some(())?;
    let first = if drawing.flag() { sizes[axis] / count } else { 1 };
    let mut last = drawing.value(range(&sizes, axis, 0, first), &[x.id], x, x.range);
    let rest = sizes[axis] - first;
    if rest > 1 && drawing.flag() {
        last = drawing.value(range(&sizes, axis, first, rest - 1), &[x.id], x, x.range);
        return drawing.value(range(&sizes, axis, sizes[axis] - 1, 1), &[x.id], x, x.range).and(last);
    }
    drawing.value(range(&sizes, axis, first, rest), &[x.id], x, x.range).and(last)
}

fn concat(drawing: &mut Drawing) -> Option<Known> {
    let (a, b) = (drawing.any_of_rank(1)?, drawing.any());
    let b = if drawing.sizes(b).len() == drawing.sizes(a).len() { b } else { a };
    let axis = drawing.axis(drawing.sizes(a).len()) as u8;
    let like = Known { exact: a.exact && b.exact, positive: a.positive && b.positive, ..a };
    let op = Op::Concat { axis };
    drawing
        .value(op.clone(), &[a.id, b.id], like, a.range.max(b.range))
        .or_else(|| drawing.value(op, &[a.id, a.id], a, a.range))
}

fn reduce(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let sizes = drawing.sizes(x);
    let mut axes: Vec<u8> = (0..sizes.len() as u8).filter(|_| drawing.below(3) == 0).collect();
    if axes.is_empty() {
        axes.push(drawing.axis(sizes.len()) as u8);
    }
    let count = axes.iter().map(|&axis| sizes[usize::from(axis)]).product::<u64>() as f64;
    let keep = drawing.flag();
    let choices = [
        (ReduceKind::Combine(Combine::Sum), count),
        (ReduceKind::Combine(Combine::Max), 1.0),
        (ReduceKind::Combine(Combine::Min), 1.0),
        (ReduceKind::Mean, 1.0),
        (ReduceKind::ArgMax { last: drawing.flag() }, 1.0),
    ];
    let (kind, growth) = drawing.pick(&choices);
    if let ReduceKind::ArgMax { .. } = kind {
        x.exact.then_some(())?;
        axes.truncate(1);
        let id = drawing.node(Op::Reduce { kind, axes, keep }, &[x.id])?[0];
        drawing.integers.push(id);
        return None;
    }
    let like = Known { exact: x.exact && kind != ReduceKind::Mean, ..x };
    drawing.value(Op::Reduce { kind, axes, keep }, &[x.id], like, x.range * growth)
}

fn softmax(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let axis = drawing.axis(drawing.sizes(x).len()) as u8;
    (x.range < 50.0).then_some(())?;
    drawing.value(Op::Softmax { axis, log: false }, &[x.id], Known { exact: false, positive: false, ..x }, 1.0)
}

fn scan(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let sizes = drawing.sizes(x);
    let axis = drawing.axis(sizes.len());
    let op = Op::Scan { combine: Combine::Sum, axis: axis as u8, exclusive: drawing.flag(), reverse: drawing.flag() };
    drawing.value(op, &[x.id], Known { positive: false, ..x }, x.range * sizes[axis] as f64)
}

/// Looks up in a value, in a table of weights, or element by element.
fn gather(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let sizes = drawing.sizes(x);
    let axis = drawing.axis(sizes.len());
    let batch = sizes[0];
    match drawing.below(3) {
        0 => {
            let indices = drawing.pick(&[vec![], vec![3], vec![batch, 2]]);
            let indices = drawing.indices(&indices, sizes[axis]);
            drawing.value(Op::Gather { axis: axis as u8 }, &[x.id, indices], x, x.range)
        }
        1 => {
            let (rows, columns) = (drawing.size(), drawing.size());
            let table = drawing.weight(&[rows, columns]);
            let indices = drawing.indices(&[batch, 3], rows);
            drawing.value(Op::Gather { axis: 0 }, &[table.id, indices], table, table.range)
        }
        _ => {
            let mut taken = sizes.clone();
            taken[axis] = drawing.size();
            let indices = drawing.indices(&taken, sizes[axis]);
            drawing.value(Op::GatherElements { axis: axis as u8 }, &[x.id, indices], x, x.range)
        }
    }
}

fn pad(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    let sizes = drawing.sizes(x);
    let axis = drawing.axis(sizes.len());
    let (mut low, mut high) = (vec![0; sizes.len()], vec![0; sizes.len()]);
    (low[axis], high[axis]) = (drawing.below(2) as i64, drawing.below(2) as i64);
    let like = Known { positive: false, ..x };
    if drawing.flag() {
        return drawing.value(Op::Pad { low, high, mode: PadMode::Edge }, &[x.id], like, x.range);
    }
    let value = drawing.weight(&[]);
    drawing.value(Op::Pad { low, high, mode: PadMode::Constant }, &[x.id, value.id], like, x.range)
}

fn pool(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(3)?;
    let spatial = drawing.sizes(x).len() - 2;
    let kind = drawing.pick(&[PoolKind::Max, PoolKind::Average { count_pads: false }]);
    let window = window(spatial, drawing.pick(&[1, 2]), drawing.pick(&[1, 2]), 0);
    let op = Op::Pool { kind, window, ceil: false, indices: None };
    drawing.value(op, &[x.id], Known { exact: x.exact && kind == PoolKind::Max, ..x }, x.range)
}

/// The largest along an axis, and where they are.
fn sort(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(1)?;
    x.exact.then_some(())?;
    let sizes = drawing.sizes(x);
    let axis = drawing.axis(sizes.len());
    let k = 1 + drawing.below(sizes[axis]);
    let op = Op::TopK { axis: axis as u8, k, largest: drawing.flag(), sorted: true };
    let results = drawing.node(op, &[x.id])?;
    drawing.integers.push(results[1]);
    Some(drawing.know(results[0], x.range, true, x.positive))
}
