//! Samples of the primitives whose kernels let threads work together.

#![expect(clippy::type_complexity, reason = "tables of samples: a row is read against the loop below it")]

use planfile::DType::{self, BF16, Bool, F16, F32, F64, I8, I32, I64, U8, U64};
use planfile::op::{Causal, Combine, NormKind, Real, ReduceKind};
use planfile::{Op, Spec, SpecNode};

use super::{List, ty};

pub(super) fn reduce(list: &mut List) {
    use Combine::{Max, Min, Prod, Sum};
    let all = |kind: Combine| ReduceKind::Combine(kind);
    let cases: &[(ReduceKind, &[u8], bool, DType, &[u64])] = &[
        (all(Sum), &[1], false, F32, &[64, 1024]),
        (all(Sum), &[1], true, F16, &[7, 1000]),
        (all(Sum), &[1], false, BF16, &[5, 333]),
        (all(Sum), &[0], false, F32, &[1000, 64]),
        (all(Sum), &[0], false, F16, &[37, 129]),
        (all(Sum), &[1], false, F32, &[4, 50, 30]),
        (all(Sum), &[0, 2], false, F32, &[3, 17, 40]),
        (all(Sum), &[0, 2, 3], true, F32, &[2, 16, 14, 14]),
        (all(Sum), &[1, 3], false, I32, &[2, 3, 4, 5]),
        (all(Sum), &[0, 1], false, F64, &[33, 65]),
        (all(Sum), &[0], false, F32, &[100_000]),
        (all(Sum), &[0], false, F32, &[400_000]),
        (ReduceKind::Mean, &[0], false, F32, &[65_536, 3]),
        (all(Sum), &[], false, F32, &[3, 5]),
        (all(Sum), &[1], false, Bool, &[9, 70]),
        (all(Prod), &[1], false, Bool, &[9, 3]),
        (all(Prod), &[1], false, Bool, &[3, 0]),
        (all(Min), &[0], false, Bool, &[0, 3]),
        (all(Min), &[0], false, Bool, &[2, 3]),
        (all(Sum), &[1], false, U8, &[4, 300]),
        (all(Sum), &[1], false, I64, &[4, 31]),
        (all(Sum), &[1], false, F32, &[3, 0]),
        (all(Max), &[1], false, F32, &[3, 0]),
        (all(Sum), &[1], false, F32, &[0, 4]),
        (all(Prod), &[1], false, F32, &[40, 5]),
        (all(Prod), &[0], false, I32, &[5, 40]),
        (all(Max), &[1], false, F16, &[20, 4096]),
        (all(Max), &[0], true, I8, &[20, 33]),
        (all(Min), &[2], false, U64, &[2, 3, 77]),
        (all(Min), &[1], false, F64, &[2, 3, 77]),
        (all(Min), &[0, 1, 2], false, BF16, &[6, 7, 8]),
        (ReduceKind::Mean, &[2, 3], true, F16, &[2, 32, 7, 7]),
        (ReduceKind::Mean, &[2, 3], false, F32, &[1, 2048, 7, 7]),
        (ReduceKind::Mean, &[1], false, I32, &[8, 9]),
        (ReduceKind::Mean, &[0], false, F32, &[0, 2]),
        (ReduceKind::Mean, &[0], false, I8, &[0, 2]),
        (ReduceKind::ArgMax { last: false }, &[1], false, F32, &[10, 3000]),
        (ReduceKind::ArgMax { last: true }, &[1], true, I8, &[10, 300]),
        (ReduceKind::ArgMax { last: false }, &[0], false, F16, &[100, 48]),
        (ReduceKind::ArgMin { last: false }, &[1], false, BF16, &[3, 50, 8]),
        (ReduceKind::ArgMin { last: true }, &[2], false, F64, &[3, 5, 100]),
        (ReduceKind::ArgMin { last: true }, &[0], false, Bool, &[77]),
    ];
    for &(kind, axes, keep, dtype, sizes) in cases {
        list.one(Op::Reduce { kind, axes: axes.to_vec(), keep }, vec![ty(dtype, sizes)]);
    }
}

pub(super) fn softmax(list: &mut List) {
    let cases: &[(u8, bool, DType, &[u64])] = &[
        (1, false, F32, &[5, 128]),
        (1, false, F16, &[64, 1024]),
        (1, true, BF16, &[3, 1000]),
        (1, false, F32, &[9, 1]),
        (1, false, F32, &[33, 3]),
        (1, true, F32, &[4, 4097]),
        (1, false, F16, &[2, 50_257]),
        (1, true, F32, &[2, 40_000]),
        (1, false, F64, &[6, 100]),
        (1, true, F64, &[2, 20_001]),
        (0, false, F32, &[10, 7]),
        (0, false, F32, &[65_536, 3]),
        (1, false, F32, &[2, 100, 33]),
        (1, true, F16, &[3, 9, 65]),
        (1, false, F64, &[3, 200, 2]),
        (3, false, F16, &[2, 4, 16, 77]),
        (0, false, F32, &[0]),
        (1, false, F32, &[0, 4]),
    ];
    for &(axis, log, dtype, sizes) in cases {
        list.one(Op::Softmax { axis, log }, vec![ty(dtype, sizes)]);
    }
}

pub(super) fn norm(list: &mut List) {
    use NormKind::{Layer, Rms};
    type Beside<'a> = Option<(DType, &'a [u64])>;
    let cases: &[(NormKind, u8, DType, &[u64], Beside<'_>, Beside<'_>)] = &[
        (Layer, 1, F32, &[10, 768], Some((F32, &[768])), Some((F32, &[768]))),
        (Layer, 2, F16, &[2, 5, 1024], Some((F16, &[1024])), Some((F16, &[1024]))),
        (Layer, 2, BF16, &[2, 5, 300], Some((BF16, &[300])), None),
        (Rms, 1, F16, &[7, 4096], Some((F16, &[4096])), None),
        (Rms, 1, BF16, &[3, 128], None, None),
        (Rms, 1, F32, &[3, 5], None, Some((F32, &[5]))),
        (Layer, 1, F32, &[4, 3, 7, 5], None, None),
        (Layer, 1, F32, &[4, 3, 7, 5], Some((F32, &[3, 1, 1])), Some((F32, &[3, 1, 1]))),
        (Layer, 1, F64, &[4, 6, 8], Some((F64, &[8])), Some((F64, &[1]))),
        (Layer, 1, F16, &[4, 512], Some((F32, &[512])), Some((F32, &[512]))),
        (Layer, 0, F32, &[40_001], Some((F32, &[40_001])), None),
        (Layer, 1, F16, &[2, 65_536], None, Some((F16, &[65_536]))),
        (Layer, 1, F32, &[3, 1], Some((F32, &[1])), None),
        (Rms, 1, F32, &[0, 16], Some((F32, &[16])), None),
        (Layer, 1, F32, &[2, 300_000], None, None),
    ];
    for &(kind, axis, dtype, sizes, scale, bias) in cases {
        let beside = [scale, bias].into_iter().flatten().map(|(dtype, sizes)| ty(dtype, sizes));
        let inputs = std::iter::once(ty(dtype, sizes)).chain(beside).collect();
        let op = Op::Norm { kind, axis, epsilon: Real(1e-5), scale: scale.is_some(), bias: bias.is_some() };
        list.one(op, inputs);
    }
    sharp_norm(list);
}

/// Normalisations of an epsilon that leaves nothing of what rows of equals are wrongly spread by.
fn sharp_norm(list: &mut List) {
    for (dtype, length) in [(F32, 768), (F32, 40_000), (F16, 130)] {
        let op = Op::Norm { kind: NormKind::Layer, axis: 1, epsilon: Real(1e-12), scale: false, bias: false };
        list.one(op, vec![ty(dtype, &[5, length])]);
    }
}

/// What differs from one attention to the next.
struct Attend<'a> {
    dtype: DType,
    /// Batch, heads, groups, queries, keys, features, values.
    sizes: [u64; 7],
    causal: Option<Causal>,
    softcap: f64,
    mask: Option<(DType, &'a [u64])>,
}

impl Attend<'_> {
    fn op(&self) -> Op {
        let scale = Real(1.0 / (self.sizes[5].max(1) as f64).sqrt());
        Op::Attention { scale, causal: self.causal, softcap: Real(self.softcap), mask: self.mask.is_some() }
    }

    fn inputs(&self) -> Vec<planfile::TensorType> {
        let [b, h, g, s, t, d, e] = self.sizes;
        let operands = [[b, h, s, d], [b, g, t, d], [b, g, t, e]].map(|sizes| ty(self.dtype, &sizes));
        operands.into_iter().chain(self.mask.map(|(dtype, sizes)| ty(dtype, sizes))).collect()
    }
}

pub(super) fn attention(list: &mut List) {
    let start = Some(Causal::FromStart);
    let end = Some(Causal::FromEnd);
    let case = |dtype, sizes, causal, softcap, mask| Attend { dtype, sizes, causal, softcap, mask };
    let cases = [
        case(F16, [2, 4, 4, 128, 128, 64, 64], None, 0.0, None),
        case(BF16, [1, 8, 2, 200, 200, 128, 128], start, 0.0, None),
        case(F16, [1, 4, 1, 70, 300, 64, 64], end, 0.0, None),
        case(F16, [1, 2, 2, 300, 70, 64, 64], end, 0.0, None),
        case(BF16, [2, 2, 2, 65, 129, 80, 96], None, 0.0, None),
        case(F16, [1, 2, 1, 33, 47, 20, 36], start, 0.0, None),
        case(F16, [1, 2, 1, 33, 47, 33, 7], None, 0.0, None),
        case(F16, [1, 2, 1, 100, 100, 256, 256], start, 0.0, None),
        case(BF16, [1, 2, 2, 64, 64, 192, 128], None, 0.0, None),
        case(F16, [2, 2, 2, 50, 60, 64, 64], None, 20.0, None),
        case(F16, [2, 2, 2, 50, 60, 64, 64], None, 0.0, Some((Bool, &[50, 60]))),
        case(F16, [2, 2, 2, 50, 60, 64, 64], None, 0.0, Some((Bool, &[2, 1, 1, 60]))),
        case(BF16, [2, 2, 2, 50, 60, 64, 64], start, 5.0, Some((BF16, &[2, 2, 50, 60]))),
        case(F16, [1, 2, 2, 50, 61, 64, 64], None, 0.0, Some((F16, &[1, 1, 50, 61]))),
        case(F16, [1, 1, 1, 5, 0, 64, 64], None, 0.0, None),
        case(BF16, [4, 8, 2, 1, 500, 128, 128], end, 0.0, None),
        case(F32, [2, 4, 4, 128, 128, 64, 64], None, 0.0, None),
        case(F32, [1, 4, 2, 50, 77, 40, 33], end, 0.0, None),
        case(F32, [1, 2, 2, 20, 30, 16, 16], start, 2.0, Some((Bool, &[20, 30]))),
        case(F32, [1, 2, 2, 20, 30, 300, 300], None, 0.0, Some((F32, &[2, 1, 30]))),
        case(F64, [1, 2, 1, 20, 30, 16, 24], end, 0.0, None),
        case(F32, [1, 2, 1, 9, 0, 16, 24], None, 0.0, None),
        case(F16, [1, 1, 1, 20, 50, 320, 288], None, 0.0, None),
        case(F32, [1, 2, 1, 9, 40, 0, 24], None, 0.0, None),
        case(F16, [1, 2, 1, 9, 40, 0, 24], start, 0.0, None),
        case(BF16, [1, 2, 2, 9, 70, 64, 64], None, 0.0, Some((BF16, &[9, 70]))),
        case(F16, [1, 2, 2, 9, 70, 64, 64], None, 0.0, Some((F16, &[9, 70]))),
        case(F32, [1, 2, 2, 9, 70, 64, 64], None, 0.0, Some((F32, &[9, 70]))),
        // What windows and the lengths of samples hide: other keys for each sample and query.
        case(F16, [2, 4, 2, 70, 200, 64, 64], None, 0.0, Some((Bool, &[2, 1, 70, 200]))),
        case(BF16, [3, 4, 2, 2, 300, 64, 64], None, 0.0, Some((Bool, &[3, 1, 2, 300]))),
        case(F32, [2, 4, 2, 40, 90, 32, 32], None, 3.0, Some((Bool, &[2, 1, 40, 90]))),
    ];
    for attend in &cases {
        list.one(attend.op(), attend.inputs());
    }
    for attend in &cases[..3] {
        list.spec(heads_last(attend));
    }
    list.spec(packed(&cases[0], 0));
    list.spec(packed(&cases[0], 3));
    list.spec(packed(&cases[0], 8));
    list.spec(packed(&cases[5], 0));
    list.spec(heads_last(&cases[16]));
}

/// Few query rows, whose keys are split: one and several queries, groups of one head and of many, many keys and few.
pub(super) fn attention_of_few(list: &mut List) {
    let start = Some(Causal::FromStart);
    let end = Some(Causal::FromEnd);
    let case = |dtype, sizes, causal, softcap, mask| Attend { dtype, sizes, causal, softcap, mask };
    let cases = [
        case(BF16, [1, 32, 8, 1, 2048, 128, 128], None, 0.0, None),
        case(F16, [1, 16, 4, 1, 2049, 128, 128], end, 0.0, None),
        case(F32, [1, 8, 2, 1, 1100, 128, 128], end, 0.0, None),
        case(F64, [1, 4, 2, 3, 700, 64, 72], end, 0.0, None),
        case(BF16, [2, 3, 3, 1, 777, 64, 64], None, 0.0, None),
        case(F16, [1, 71, 1, 1, 600, 64, 64], None, 0.0, None),
        case(BF16, [1, 16, 2, 5, 333, 128, 128], end, 0.0, None),
        case(F16, [1, 4, 2, 16, 515, 256, 256], end, 0.0, None),
        case(F16, [3, 6, 2, 7, 300, 20, 36], start, 0.0, None),
        case(F16, [1, 3, 1, 2, 1300, 33, 7], None, 0.0, None),
        case(BF16, [1, 2, 1, 4, 1030, 192, 40], end, 30.0, None),
        case(F16, [20, 8, 8, 1, 45, 64, 64], None, 0.0, None),
        case(F16, [1, 2, 1, 12, 3, 64, 64], end, 0.0, None),
        case(F16, [2, 4, 2, 1, 530, 64, 64], None, 0.0, Some((Bool, &[2, 1, 1, 530]))),
        case(BF16, [2, 4, 2, 3, 530, 64, 64], end, 5.0, Some((BF16, &[2, 4, 3, 530]))),
        case(F16, [1, 4, 2, 9, 700, 64, 64], None, 0.0, Some((F16, &[9, 700]))),
        case(F32, [1, 4, 2, 9, 1100, 64, 64], None, 0.0, Some((F32, &[9, 1100]))),
        case(F32, [2, 6, 2, 7, 310, 40, 33], end, 2.0, Some((Bool, &[7, 310]))),
        case(F32, [1, 2, 1, 2, 600, 256, 256], None, 0.0, None),
        case(F64, [1, 3, 1, 2, 300, 256, 256], None, 0.0, None),
    ];
    for attend in &cases {
        list.one(attend.op(), attend.inputs());
    }
    for index in [1, 2, 6, 9] {
        list.spec(heads_last(&cases[index]));
    }
}

/// Operands and result as `[batch, sequence, heads, features]`.
fn heads_last(attend: &Attend<'_>) -> Spec {
    let [b, h, g, s, t, d, e] = attend.sizes;
    let swap = |operand| SpecNode { op: Op::Transpose { permutation: vec![0, 2, 1, 3] }, operands: vec![operand] };
    Spec {
        inputs: [[b, s, h, d], [b, t, g, d], [b, t, g, e]].map(|sizes| ty(attend.dtype, &sizes)).into(),
        nodes: vec![
            swap(0),
            swap(1),
            swap(2),
            SpecNode { op: attend.op(), operands: vec![3, 4, 5] },
            swap(6),
            SpecNode { op: Op::Reshape { dims: [b, s, h * e].map(planfile::Dim::Static).into() }, operands: vec![7] },
        ],
        results: vec![8],
    }
}

/// One operand of queries, keys and values side by side, behind `skipped` others.
fn packed(attend: &Attend<'_>, skipped: u64) -> Spec {
    let [b, h, _, s, _, d, _] = attend.sizes;
    let part = |index: u64| SpecNode {
        op: Op::Slice {
            starts: [0, 0, (skipped + index * h * d) as i64].map(planfile::RankScalar::Uniform).into(),
            steps: vec![1; 3],
            sizes: vec![b, s, h * d],
        },
        operands: vec![0],
    };
    let split = |operand| SpecNode {
        op: Op::Reshape { dims: [b, s, h, d].map(planfile::Dim::Static).into() },
        operands: vec![operand],
    };
    let swap = |operand| SpecNode { op: Op::Transpose { permutation: vec![0, 2, 1, 3] }, operands: vec![operand] };
    Spec {
        inputs: vec![ty(attend.dtype, &[b, s, skipped + 3 * h * d])],
        nodes: vec![
            part(0),
            part(1),
            part(2),
            split(1),
            split(2),
            split(3),
            swap(4),
            swap(5),
            swap(6),
            SpecNode { op: attend.op(), operands: vec![7, 8, 9] },
        ],
        results: vec![10],
    }
}

pub(super) fn transpose(list: &mut List) {
    let cases: &[(&[u8], DType, &[u64])] = &[
        (&[1, 0], F32, &[100, 70]),
        (&[1, 0], F16, &[129, 260]),
        (&[1, 0], U8, &[65, 200]),
        (&[1, 0], F64, &[40, 33]),
        (&[0, 2, 1], F32, &[3, 50, 60]),
        (&[0, 2, 1, 3], F16, &[2, 50, 4, 64]),
        (&[0, 2, 1, 3], F32, &[2, 5, 4, 3]),
        (&[0, 2, 1, 3], I8, &[2, 5, 4, 7]),
        (&[0, 2, 3, 1], F16, &[2, 64, 7, 9]),
        (&[0, 3, 1, 2], F32, &[2, 20, 20, 3]),
        (&[3, 2, 1, 0], I32, &[4, 5, 6, 7]),
        (&[2, 0, 1], Bool, &[8, 9, 10]),
        (&[2, 1, 0], BF16, &[33, 2, 47]),
        (&[4, 1, 3, 0, 2], F32, &[3, 4, 5, 6, 7]),
        (&[0, 1], F32, &[3, 4]),
        (&[1, 0], F32, &[1, 9]),
        (&[1, 0], F32, &[0, 9]),
        (&[], F32, &[]),
        (&[7, 6, 5, 4, 3, 2, 1, 0], F16, &[2, 3, 2, 3, 2, 3, 2, 3]),
    ];
    for &(permutation, dtype, sizes) in cases {
        list.one(Op::Transpose { permutation: permutation.to_vec() }, vec![ty(dtype, sizes)]);
    }
}

pub(super) fn scatter(list: &mut List) {
    use Combine::{Max, Min, Prod, Sum};
    let elements: &[(u8, Option<Combine>, DType, DType, &[u64], &[u64])] = &[
        (0, None, F32, I64, &[10], &[20]),
        (0, None, F16, I32, &[10, 33], &[7, 33]),
        (0, Some(Sum), F16, I64, &[10, 33], &[50, 20]),
        (1, Some(Sum), F32, I64, &[5, 100], &[3, 250]),
        (1, Some(Prod), I32, I32, &[5, 10], &[5, 12]),
        (1, Some(Max), F32, I64, &[2, 30, 5], &[2, 30, 4]),
        (2, Some(Min), BF16, I64, &[2, 3, 40], &[2, 3, 17]),
        (0, Some(Sum), Bool, I64, &[20], &[9]),
        (0, None, U8, I64, &[3, 4], &[0, 4]),
        (0, Some(Sum), F64, I64, &[10_000], &[5000]),
        (1, None, I64, I64, &[3000, 4], &[3000, 2]),
    ];
    for &(axis, combine, dtype, index, sizes, own) in elements {
        let inputs = vec![ty(dtype, sizes), ty(index, own), ty(dtype, own)];
        list.one(Op::ScatterElements { axis, combine }, inputs);
    }
    let slices: &[(Option<Combine>, DType, &[u64], &[u64], &[u64])] = &[
        (None, F32, &[8, 16], &[3, 1], &[3, 16]),
        (None, F16, &[2, 30, 4, 64], &[2, 5, 2], &[2, 5, 4, 64]),
        (Some(Sum), F16, &[6, 5, 7], &[40, 2], &[40, 7]),
        (Some(Sum), F32, &[50, 20], &[300, 2], &[300]),
        (Some(Max), I32, &[9, 3], &[20, 1], &[20, 3]),
        (Some(Prod), F32, &[9, 3], &[1, 20, 1], &[1, 20, 3]),
        (Some(Min), U8, &[9, 3], &[2, 0], &[2, 9, 3]),
        (None, Bool, &[9, 3], &[0, 1], &[0, 3]),
        (None, I64, &[20_000], &[700, 1], &[700]),
    ];
    for &(combine, dtype, sizes, own, updates) in slices {
        let inputs = vec![ty(dtype, sizes), ty(I64, own), ty(dtype, updates)];
        list.one(Op::ScatterNd { combine }, inputs);
    }
}

pub(super) fn scan(list: &mut List) {
    use Combine::{Max, Min, Prod, Sum};
    let cases: &[(Combine, u8, bool, bool, DType, &[u64])] = &[
        (Sum, 1, false, false, F32, &[4, 1000]),
        (Sum, 1, true, false, F32, &[4, 10_000]),
        (Sum, 1, false, true, F16, &[3, 77]),
        (Sum, 1, true, true, I64, &[3, 2049]),
        (Sum, 0, false, false, F32, &[50, 100]),
        (Sum, 1, true, true, I32, &[2, 20, 33]),
        (Sum, 0, false, false, Bool, &[20]),
        (Prod, 1, false, false, F64, &[2, 20]),
        (Prod, 1, false, false, U8, &[2, 20]),
        (Max, 1, false, true, BF16, &[5, 300]),
        (Max, 1, true, false, I32, &[5, 30]),
        (Min, 0, false, false, F32, &[30, 5]),
        (Sum, 0, false, false, F32, &[0]),
    ];
    for &(combine, axis, exclusive, reverse, dtype, sizes) in cases {
        list.one(Op::Scan { combine, axis, exclusive, reverse }, vec![ty(dtype, sizes)]);
    }
}

pub(super) fn top_k(list: &mut List) {
    let cases: &[(u8, u64, bool, DType, &[u64])] = &[
        (1, 5, true, F32, &[3, 100]),
        (1, 2, true, F16, &[200, 8]),
        (1, 10, false, BF16, &[4, 1000]),
        (0, 3, true, I32, &[20, 7]),
        (1, 4, false, I64, &[3, 30, 5]),
        (1, 1, true, U64, &[3, 300]),
        (0, 50, true, F32, &[20_000]),
        (0, 9000, false, F16, &[10_000]),
        (0, 7, true, F64, &[9000]),
        (0, 20, true, F64, &[5000]),
        (1, 1500, false, I64, &[2, 5000]),
        (0, 3000, true, I64, &[9000]),
        (1, 300, true, Bool, &[2, 300]),
        (1, 0, true, F32, &[2, 3]),
        (0, 1, true, I8, &[1]),
        (1, 4, true, F32, &[0, 9]),
    ];
    for &(axis, k, largest, dtype, sizes) in cases {
        list.one(Op::TopK { axis, k, largest, sorted: true }, vec![ty(dtype, sizes)]);
    }
}
