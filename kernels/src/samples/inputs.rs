//! Operands for a specification: pseudo-random numbers, and indices that point inside.

use planfile::op::{Combine, ReduceKind};
use planfile::{Binary, DType, ExprOp, Op, Scalar, Spec, Tensor, TensorType};

/// A tensor for each input, the same for the same seed. Numbers are small, with ties among them; indices are within
/// bounds, some of them negative. Seed 1 puts NaN, infinities, zeros of both signs and extremes among the numbers where
/// [`Special::of`] allows them; with seed 2 numbers are positive, so that sums of many grow.
///
/// # Panics
/// Where an input does not fit in memory.
pub fn inputs(spec: &Spec, seed: u64) -> Vec<Tensor> {
    let special = if seed == 1 { Special::of(spec) } else { Special::default() };
    let mut random = Random { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 };
    let types = spec.types().unwrap_or_default();
    let fill = |(position, ty): (usize, &TensorType)| {
        if let Some(part) = recurrent(spec, &types, position) {
            return part_of_layer(ty, part, &mut random);
        }
        match bounds_of(spec, &types, position) {
            Some(bounds) => indices(ty, &bounds, &mut random),
            None if seed == 1 && is_mask(spec, position) => mask(ty, &mut random),
            None if seed == 1 && is_of_equals(spec, position) => equals(ty, &mut random),
            None => numbers(ty, seed == 2, special, &mut random),
        }
    };
    spec.inputs.iter().enumerate().map(fill).collect()
}

/// The bound of each component where the input is an operand of indices: of the last dimension's, in turn.
fn bounds_of(spec: &Spec, types: &[TensorType], input: usize) -> Option<Vec<u64>> {
    spec.nodes.iter().find_map(|node| {
        if node.operands.get(1).copied() != Some(input as u32) {
            return None;
        }
        let into = types.get(*node.operands.first()? as usize)?;
        match &node.op {
            Op::Gather { axis } | Op::GatherElements { axis } | Op::ScatterElements { axis, .. } => {
                Some(vec![into.size(usize::from(*axis))])
            }
            Op::GatherNd { .. } | Op::ScatterNd { .. } => {
                let batch = if let Op::GatherNd { batch } = node.op { usize::from(batch) } else { 0 };
                Some(into.sizes().get(batch..)?.to_vec())
            }
            _ => None,
        }
    })
}

/// Operands of a recurrent layer that are not just any numbers.
#[derive(Clone, Copy)]
enum Recurrent {
    /// Of states of this width.
    Weights { width: u64 },
    /// Of samples of so many steps at most.
    Lengths { steps: u64 },
}

fn recurrent(spec: &Spec, types: &[TensorType], input: usize) -> Option<Recurrent> {
    spec.nodes.iter().find_map(|node| {
        let Op::Recurrence { lengths, .. } = node.op else { return None };
        let is = |operand: Option<&u32>| operand == Some(&(input as u32));
        let of = |operand: usize| types.get(*node.operands.get(operand)? as usize);
        if is(node.operands.get(1)) {
            return Some(Recurrent::Weights { width: of(1)?.size(2) });
        }
        (lengths && is(node.operands.last())).then_some(Recurrent::Lengths { steps: of(0)?.size(0) })
    })
}

/// Weights under which a difference fades from step to step, rather than grow until devices no longer agree; lengths
/// from nothing to all steps, and a little beyond on either side.
fn part_of_layer(ty: &TensorType, part: Recurrent, random: &mut Random) -> Tensor {
    tensor(ty, |_| match part {
        Recurrent::Weights { width } => {
            let value = (random.next() % 4001) as f64 / 1000.0 - 2.0;
            Scalar::from_f64(ty.dtype, value / (4.0 * width.max(1) as f64).sqrt())
        }
        Recurrent::Lengths { steps } => Scalar::from_i64(ty.dtype, (random.next() % (steps + 3)) as i64 - 1),
    })
}

fn is_mask(spec: &Spec, input: usize) -> bool {
    let is_mask = |op: &Op, operands: &[u32]| {
        matches!(op, Op::Attention { mask: true, .. }) && operands.get(3) == Some(&(input as u32))
    };
    spec.nodes.iter().any(|node| is_mask(&node.op, &node.operands))
}

/// Rows that hide all, by infinity or by the lowest number, some of the lowest number, or nothing. Of booleans: rows that
/// hide all, all but the second half of the keys, all but the last, or some.
fn mask(ty: &TensorType, random: &mut Random) -> Tensor {
    let keys = ty.sizes().last().copied().unwrap_or(1).max(1);
    if ty.dtype == DType::Bool {
        return tensor(ty, |position| {
            let (row, key) = (position as u64 / keys, position as u64 % keys);
            let from = [keys, keys / 2, keys - 1, 0][(row % 4) as usize];
            Scalar::bool(key >= from && (from > 0 || random.next().is_multiple_of(2)))
        });
    }
    tensor(ty, |position| {
        let (hides, own) = (random.next().is_multiple_of(2), (random.next() % 401) as f64 / 100.0 - 2.0);
        let value = match position as u64 / keys % 4 {
            0 => f64::NEG_INFINITY,
            1 => -highest(ty.dtype),
            2 if hides => -highest(ty.dtype),
            _ => own,
        };
        Scalar::from_f64(ty.dtype, value)
    })
}

/// Whether rows of equals go to a normalisation of so small an epsilon that any other mean than theirs shows.
fn is_of_equals(spec: &Spec, input: usize) -> bool {
    let shows = |op: &Op| matches!(op, Op::Norm { epsilon, .. } if epsilon.0 < 1e-9);
    spec.nodes.iter().any(|node| shows(&node.op) && node.operands.first() == Some(&(input as u32)))
}

fn equals(ty: &TensorType, random: &mut Random) -> Tensor {
    let width = ty.sizes().last().copied().unwrap_or(1).max(1);
    let rows: Vec<f64> = (0..8).map(|_| (random.next() % 4001) as f64 / 1000.0 - 2.0).collect();
    tensor(ty, |position| Scalar::from_f64(ty.dtype, rows[(position as u64 / width % 8) as usize]))
}

/// The highest finite number of a type of floats.
fn highest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 65504.0,
        // The upper half of the bits of the largest `f32`.
        DType::BF16 => f64::from(f32::from_bits(0x7f7f_0000)),
        DType::F32 => f64::from(f32::MAX),
        _ => f64::MAX,
    }
}

fn indices(ty: &TensorType, bounds: &[u64], random: &mut Random) -> Tensor {
    let depth = if bounds.len() == 1 { 1 } else { ty.sizes().last().copied().unwrap_or(1).max(1) };
    tensor(ty, |position| {
        let bound = bounds.get((position as u64 % depth) as usize).copied().unwrap_or(1).max(1);
        let index = (random.next() % bound) as i64;
        let negative = random.next().is_multiple_of(4);
        Scalar::from_i64(ty.dtype, if negative { index - bound as i64 } else { index })
    })
}

/// Which numbers beside small ones a specification is tried on.
#[derive(Clone, Copy, Default)]
struct Special {
    /// One number of so many, about; 0 for none.
    one_of: u64,
    /// The lowest and highest finite numbers of floats too.
    extremes: bool,
}

impl Special {
    /// What is the same on all devices whatever is given. Not norms, convolutions, pools and resizes, whose
    /// sums overflow in `f32` where those of `f64` do not; nor attention, which does not read what nobody sees.
    fn of(spec: &Spec) -> Self {
        let elements = spec.inputs.iter().filter_map(TensorType::elements).max().unwrap_or_default();
        // A few on a line leave other lines without.
        let few = elements.div_ceil(6).max(8);
        let cut_off =
            |op: &Op| matches!(op, Op::Pointwise { expr, .. } if expr.ops.contains(&ExprOp::Binary(Binary::Max)));
        let is_cut_off = spec.nodes.iter().any(|node| cut_off(&node.op));
        let each =
            spec.nodes.iter().map(|node| match node.op {
                // Of NaN the library makes NaN or 0, see `planfile::plan::Activation::Relu`.
                Op::Dot { .. } if is_cut_off => Self::default(),
                Op::Pointwise { .. }
                | Op::TopK { .. }
                | Op::Reshape { .. }
                | Op::Broadcast { .. }
                | Op::Slice { .. }
                | Op::Pad { .. }
                | Op::Concat { .. }
                | Op::Transpose { .. }
                | Op::Gather { .. }
                | Op::GatherElements { .. }
                | Op::GatherNd { .. } => Self { one_of: 6, extremes: true },
                Op::Softmax { .. }
                | Op::Reduce {
                    kind:
                        ReduceKind::Combine(Combine::Max | Combine::Min)
                        | ReduceKind::ArgMax { .. }
                        | ReduceKind::ArgMin { .. },
                    ..
                }
                | Op::Scan { combine: Combine::Max | Combine::Min, .. } => Self { one_of: few, extremes: true },
                // Sums and products of extremes depend on their order.
                Op::Reduce { .. } | Op::Scan { .. } | Op::Dot { .. } => Self { one_of: few, extremes: false },
                _ => Self::default(),
            });
        let both = |a: Self, b: Self| match (a.one_of, b.one_of) {
            (0, _) | (_, 0) => Self::default(),
            (a_of, b_of) => Self { one_of: a_of.max(b_of), extremes: a.extremes && b.extremes },
        };
        each.reduce(both).unwrap_or_default()
    }

    fn number(self, dtype: DType, random: &mut Random) -> Scalar {
        let pick = random.next();
        if dtype.is_float() {
            let highest = highest(dtype);
            let all = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, highest, -highest];
            let count = if self.extremes { 7 } else { 5 };
            return Scalar::from_f64(dtype, all[(pick % count) as usize]);
        }
        let bits = 8 * dtype.bytes() as u32;
        let (lowest, highest) =
            if dtype.is_signed_integer() { (i64::MIN >> (64 - bits), i64::MAX >> (64 - bits)) } else { (0, -1) };
        Scalar::from_i64(dtype, [lowest, highest, 0, -1, 1][(pick % 5) as usize])
    }
}

fn numbers(ty: &TensorType, positive: bool, special: Special, random: &mut Random) -> Tensor {
    tensor(ty, |_| match ty.dtype {
        DType::Bool => Scalar::bool(random.next().is_multiple_of(2)),
        dtype if special.one_of > 0 && random.next().is_multiple_of(special.one_of) => special.number(dtype, random),
        dtype if positive && dtype.is_float() => Scalar::from_f64(dtype, (random.next() % 1001) as f64 / 1000.0 + 0.1),
        dtype if dtype.is_float() => Scalar::from_f64(dtype, (random.next() % 4001) as f64 / 1000.0 - 2.0),
        dtype => {
            let magnitude = (random.next() % 61) as i64;
            let is_signed = dtype.is_signed_integer() && !positive;
            Scalar::from_i64(dtype, if is_signed { magnitude - 30 } else { magnitude })
        }
    })
}

#[expect(clippy::expect_used, reason = "samples are small: their bytes fit and are as many as their types say")]
fn tensor(ty: &TensorType, mut element: impl FnMut(usize) -> Scalar) -> Tensor {
    let count = ty.elements().expect("a sample's elements can be counted") as usize;
    let bytes: Vec<u8> = (0..count).flat_map(|position| element(position).to_bytes()).collect();
    Tensor::from_bytes(ty.clone(), &bytes).expect("as many bytes as the type says")
}

/// Xorshift (Marsaglia, 2003): enough to vary inputs.
struct Random {
    state: u64,
}

impl Random {
    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state >> 11
    }
}
