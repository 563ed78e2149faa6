//! What rounding may make of a plan's results: the default tolerance of comparisons.
//!
//! A primitive that computes floating-point numbers rounds its results, by up to the unit roundoff `u` of their type, and
//! the terms that it sums up, `n` of them, in an accumulator of unit roundoff `a`. Such errors are about independent and
//! zero on average, so that squares add up: a sum is off by about `√n · a`, not by `n · a` (N. Higham and T. Mary, "A new
//! approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). Over all primitives of a model,
//!
//! `ε = √(Σ (u² + n · a²))`
//!
//! is how far its results are expected to be off, as a share of their Euclidean norm. Models of `fixtures` are off by 0.01
//! to 1.5 times that in `f32`, `f16` and `bf16`: what one layer is off, later ones pass on at about its size.
//!
//! All results must be within [`WHOLE`] times `ε` of the reference, and each part of them (a row, the elements at one
//! index of one dimension, one element) within [`PART`] times `ε`, see [`crate::compare`]: a fault in a part does not
//! hide behind what is right elsewhere.

use planfile::op::{PoolKind, ReduceKind};
use planfile::plan::{Action, Call, Implementation, Kernel, Plan, PlanEntry, Step};
use planfile::{Combine, DType, Op, Spec, TensorType, infer};

/// Errors of all results, in the norm, may be so many times what is expected.
pub const WHOLE: f64 = 4.0;
/// Errors of a part may be so many times what is expected: of many parts one is off by more than most.
pub const PART: f64 = 16.0;
/// However much is expected: errors of this share are no rounding.
const WHOLE_MOST: f64 = 0.25;
const PART_MOST: f64 = 0.5;

/// How far off rounding is expected to bring results.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounding {
    /// The floating-point type of results with the fewest digits; none where nothing is rounded.
    pub coarsest: Option<DType>,
    /// Primitives that round.
    pub primitives: u64,
    /// Terms of the longest sum.
    pub longest_sum: u64,
    /// The `ε` of the module's documentation.
    pub expected: f64,
    /// Whether elements are chosen (`TopK`, `ArgMax`) after they were rounded to a half type: some may be chosen
    /// otherwise, and what follows is then another result, not a rounded one.
    pub chooses: bool,
}

impl Rounding {
    /// Of what rounds nothing.
    pub const NONE: Self = Self { coarsest: None, primitives: 0, longest_sum: 0, expected: 0.0, chooses: false };

    /// Of all steps of an entry, as one rank of each stage executes them.
    pub fn of(plan: &Plan, entry: &PlanEntry) -> Self {
        let programs = entry.programs.iter().filter_map(|&program| plan.programs.get(program as usize));
        let mut sum = Sum::default();
        for step in programs.flat_map(|program| &program.steps) {
            sum.add_step(plan, step);
        }
        sum.rounding()
    }

    /// Of one step.
    pub fn of_step(plan: &Plan, step: &Step) -> Self {
        let mut sum = Sum::default();
        sum.add_step(plan, step);
        sum.rounding()
    }

    /// What all results may be off, as a share of their norm.
    pub fn whole(&self) -> f64 {
        (WHOLE * self.expected).min(WHOLE_MOST)
    }

    /// What a part of the results may be off.
    pub fn part(&self) -> f64 {
        (PART * self.expected).min(PART_MOST)
    }

    /// What a row may be off where elements before it were chosen otherwise.
    pub fn elsewhere(&self) -> Option<f64> {
        self.chooses.then_some(PART_MOST)
    }
}

/// Squares that add up.
#[derive(Default)]
struct Sum {
    coarsest: Option<DType>,
    primitives: u64,
    longest_sum: u64,
    squares: f64,
    chooses: bool,
}

impl Sum {
    fn rounding(&self) -> Rounding {
        let half = self.coarsest.is_some_and(|dtype| matches!(dtype, DType::F16 | DType::BF16));
        Rounding {
            coarsest: self.coarsest,
            primitives: self.primitives,
            longest_sum: self.longest_sum,
            expected: self.squares.sqrt(),
            chooses: self.chooses && half,
        }
    }

    fn add_step(&mut self, plan: &Plan, step: &Step) {
        let kernels: Vec<u32> = match &step.action {
            Action::Launch { kernel, .. } | Action::Library { kernel, .. } => vec![*kernel],
            Action::Persistent { tasks, .. } => tasks.iter().map(|task| task.kernel).collect(),
            Action::Copy { .. } => Vec::new(),
            Action::Collective { op, operands, results, .. } => {
                let [operands, results] =
                    [operands, results].map(|places| places.iter().map(|place| &place.ty).collect::<Vec<_>>());
                self.add(op, &operands, &results);
                Vec::new()
            }
        };
        for kernel in kernels.iter().filter_map(|&kernel| plan.kernels.get(kernel as usize)) {
            self.add_spec(&kernel.spec, allows_tf32(kernel));
        }
    }

    fn add_spec(&mut self, spec: &Spec, allow_tf32: bool) {
        // A specification that does not type is found out elsewhere.
        let types = spec.types().unwrap_or_default();
        let mut known = spec.inputs.len();
        for node in &spec.nodes {
            let operands: Option<Vec<&TensorType>> =
                node.operands.iter().map(|&operand| types.get(operand as usize)).collect();
            let Some(operands) = operands else { return };
            let count = infer(&node.op, &operands).map_or(0, |results| results.len());
            let results: Vec<&TensorType> = types.iter().skip(known).take(count).collect();
            self.add(&node.op, &operands, &results);
            if allow_tf32 && matches!(node.op, Op::Dot { .. } | Op::Conv { .. }) {
                // Both operands are rounded.
                self.squares += 2.0 * TF32_ROUNDOFF * TF32_ROUNDOFF;
            }
            known += count;
        }
    }

    fn add(&mut self, op: &Op, operands: &[&TensorType], results: &[&TensorType]) {
        self.chooses |= matches!(
            op,
            Op::TopK { .. } | Op::Reduce { kind: ReduceKind::ArgMax { .. } | ReduceKind::ArgMin { .. }, .. }
        );
        let Some(result) = results.first() else { return };
        let Some(roundoff) = unit_roundoff(result.dtype) else { return };
        let Some((times, terms)) = summed(op, operands) else { return };
        let accumulator = match op {
            Op::Dot { accumulate, .. } => *accumulate,
            // Devices round what they receive.
            Op::AllReduce { .. } | Op::ReduceScatter { .. } => result.dtype,
            _ => result.dtype.accumulator(),
        };
        let accumulated = unit_roundoff(accumulator).unwrap_or(0.0);
        self.primitives += times;
        self.longest_sum = self.longest_sum.max(terms);
        self.squares += times as f64 * (terms as f64).mul_add(accumulated * accumulated, roundoff * roundoff);
        let known = self.coarsest.and_then(unit_roundoff).unwrap_or(0.0);
        if roundoff > known {
            self.coarsest = Some(result.dtype);
        }
    }
}

/// Of TF32, which has 10 bits behind the point.
const TF32_ROUNDOFF: f64 = 4.882_812_5e-4;

/// Whether a library may round a kernel's operands to TF32.
pub(crate) fn allows_tf32(kernel: &Kernel) -> bool {
    match &kernel.implementation {
        Implementation::Library { call: Call::Matmul(call), .. } => call.allow_tf32,
        Implementation::Library { call: Call::Convolution(call), .. } => call.allow_tf32,
        Implementation::Reference | Implementation::Cuda { .. } => false,
    }
}

/// Half the distance from 1 to the next larger number: what rounding to nearest changes at most, relatively. None for
/// what is no floating-point number.
pub fn unit_roundoff(dtype: DType) -> Option<f64> {
    match dtype {
        DType::F16 => Some(f64::powi(2.0, -11)),
        DType::BF16 => Some(f64::powi(2.0, -8)),
        DType::F32 => Some(f64::powi(2.0, -24)),
        DType::F64 => Some(f64::powi(2.0, -53)),
        _ => None,
    }
}

/// How often one after the other a primitive rounds, and the terms of its longest sum; none for what only moves or
/// chooses numbers.
fn summed(op: &Op, operands: &[&TensorType]) -> Option<(u64, u64)> {
    let size =
        |operand: usize, dim: usize| operands.get(operand).and_then(|ty| ty.sizes().get(dim).copied()).unwrap_or(1);
    let product = |sizes: &[u64]| sizes.iter().fold(1u64, |product, &size| product.saturating_mul(size));
    let all = |operand: usize, from: usize| {
        operands.get(operand).map_or(1, |ty| product(ty.sizes().get(from..).unwrap_or_default()))
    };
    let once = |terms: u64| Some((1, terms));
    match op {
        Op::Pointwise { .. } | Op::Resize { .. } | Op::Rotary { .. } => once(0),
        Op::Dot { contract, .. } => {
            once(contract.iter().fold(1, |terms: u64, &(dim, _)| terms.saturating_mul(size(0, usize::from(dim)))))
        }
        // As many as a filter has weights for one output; of a transposed one, at most the channels it reads.
        Op::Conv { transposed: false, .. } => once(all(1, 1)),
        Op::Conv { transposed: true, .. } => once(size(1, 0).saturating_mul(all(1, 2))),
        Op::Pool { kind: PoolKind::Average { .. } | PoolKind::Lp { .. }, window, .. } => once(product(&window.sizes)),
        Op::Reduce { kind: ReduceKind::Mean | ReduceKind::Combine(Combine::Sum | Combine::Prod), axes, .. } => {
            once(axes.iter().fold(1, |terms: u64, &axis| terms.saturating_mul(size(0, usize::from(axis)))))
        }
        Op::Scan { combine: Combine::Sum | Combine::Prod, axis, .. } | Op::Softmax { axis, .. } => {
            once(size(0, usize::from(*axis)))
        }
        Op::Norm { axis, .. } => once(all(0, usize::from(*axis))),
        // Over features, then over keys.
        Op::Attention { .. } => once(size(0, 3).saturating_add(size(1, 2))),
        // Each step rounds the hidden state that the next one reads.
        Op::Recurrence { .. } => Some((size(0, 0), size(1, 2))),
        Op::AllReduce { combine: Combine::Sum | Combine::Prod, groups }
        | Op::ReduceScatter { combine: Combine::Sum | Combine::Prod, groups, .. } => {
            once(groups.first().map_or(1, Vec::len) as u64)
        }
        Op::ScatterElements { combine: Some(Combine::Sum | Combine::Prod), .. }
        | Op::ScatterNd { combine: Some(Combine::Sum | Combine::Prod) } => once(1),
        Op::Pool { .. }
        | Op::Reduce { .. }
        | Op::Scan { .. }
        | Op::Gather { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::ScatterElements { .. }
        | Op::ScatterNd { .. }
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::Broadcast { .. }
        | Op::TopK { .. }
        | Op::Append { .. }
        | Op::AllReduce { .. }
        | Op::ReduceScatter { .. }
        | Op::AllGather { .. }
        | Op::AllToAll { .. }
        | Op::Send { .. }
        | Op::Recv { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use planfile::Expr;

    use super::*;

    fn ty(dtype: DType, sizes: &[u64]) -> TensorType {
        TensorType::new(dtype, sizes)
    }

    fn of(specs: &[Spec]) -> Rounding {
        let mut sum = Sum::default();
        for spec in specs {
            sum.add_spec(spec, false);
        }
        sum.rounding()
    }

    fn product(dtype: DType, terms: u64) -> Spec {
        let op = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate: DType::F32, out: dtype };
        Spec::of(op, vec![ty(dtype, &[2, terms]), ty(dtype, &[terms, 3])]).unwrap()
    }

    #[test]
    fn squares_of_roundoffs_add_up() {
        let (u, a) = (f64::powi(2.0, -8), f64::powi(2.0, -24));
        let one = of(&[product(DType::BF16, 1 << 14)]);
        assert_eq!(one.expected, (u * u + 16384.0 * a * a).sqrt());
        assert_eq!((one.coarsest, one.primitives, one.longest_sum), (Some(DType::BF16), 1, 1 << 14));
        let four = of(&[(); 4].map(|()| product(DType::BF16, 1 << 14)));
        assert!((four.expected / one.expected - 2.0).abs() < 1e-12);
        // In f32 the length of sums decides.
        let [short, long] = [64, 64 * 256].map(|terms| of(&[product(DType::F32, terms)]).expected);
        assert!((long / short - 16.0).abs() < 0.2, "{long} {short}");
    }

    #[test]
    fn moves_and_integers_round_nothing() {
        let moved = Spec::of(Op::Transpose { permutation: vec![1, 0] }, vec![ty(DType::F16, &[2, 3])]).unwrap();
        let counted = Op::Pointwise { expr: Expr::operand(0), dims: ty(DType::I64, &[4]).dims };
        let found = of(&[moved, Spec::of(counted, vec![ty(DType::I64, &[4])]).unwrap()]);
        assert_eq!((found.coarsest, found.expected, found.whole(), found.part()), (None, 0.0, 0.0, 0.0));
    }

    #[test]
    fn no_plan_is_so_deep_that_anything_passes() {
        let deep = of(&vec![product(DType::BF16, 64); 10_000]);
        assert_eq!((deep.whole(), deep.part()), (WHOLE_MOST, PART_MOST));
    }

    #[test]
    fn choices_count_in_half_types_only() {
        let top = |dtype| {
            let op = Op::TopK { axis: 0, k: 1, largest: true, sorted: true };
            [Spec::of(op, vec![ty(dtype, &[4])]).unwrap(), product(dtype, 8)]
        };
        assert!(of(&top(DType::BF16)).chooses && !of(&top(DType::F32)).chooses);
        assert_eq!(of(&[product(DType::BF16, 8)]).elsewhere(), None);
    }
}
