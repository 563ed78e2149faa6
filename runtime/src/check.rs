//! Compares what steps did on GPUs with what their specification says, on the same operands, on the CPU.

use std::collections::BTreeMap;

use cpu::{View, ViewMut};
use planfile::plan::{Action, Plan, Step};
use planfile::{Buffer, DType, Op, Tensor};

use crate::compare::{Comparison, Elements, Tolerance, compare, to_f64s};
use crate::error::{RuntimeError, StepError};
use crate::gpus::StepRecord;
use crate::rounding::{Rounding, WHOLE};
use crate::spec::run_spec;
use crate::virtual_devices::{combined, receive};

/// How far a step's results are from its specification's. The largest over its results, and over the ranks so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Deviation {
    /// `max |actual - expected| / max |expected|`; infinite where one is not a number and the other is.
    pub largest: f64,
    /// `‖actual - expected‖ / ‖expected‖` over elements that are finite in both.
    pub relative: f64,
    /// What `largest` may be: see [`tolerance`]. Nothing where elements are judged by themselves.
    pub allowed: Option<f64>,
    /// Whether every result is within the tolerance.
    pub passes: bool,
    /// Of the first result that is not.
    pub failure: Option<Comparison>,
}

/// What a step's result of that type may be off, as a share of the largest expected value: [`WHOLE`] times what rounding
/// is expected to do in its primitives, operands rounded to TF32 and the length of sums included. Functions that round
/// otherwise are let pass by a least share. Integers and booleans are exact.
pub fn tolerance(dtype: DType, rounding: &Rounding) -> f64 {
    let least = match dtype {
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        DType::F32 => 1e-4,
        DType::F64 => 1e-10,
        _ => return 0.0,
    };
    (WHOLE * rounding.expected).max(least)
}

/// Collects records of a run and compares them, those of exchanges once all ranks' are there.
pub struct Checker<'a> {
    plan: &'a Plan,
    /// Judges each element by itself instead.
    elements: Option<Elements>,
    /// Exchanges that wait for other ranks.
    waiting: BTreeMap<(usize, usize), Vec<StepRecord>>,
    /// By program and step.
    found: BTreeMap<(usize, usize), Deviation>,
}

impl<'a> Checker<'a> {
    pub fn new(plan: &'a Plan, elements: Option<Elements>) -> Self {
        Self { plan, elements, waiting: BTreeMap::new(), found: BTreeMap::new() }
    }

    /// Every step that was compared, in the plan's order.
    pub fn found(&self) -> impl Iterator<Item = ((usize, usize), Deviation)> + '_ {
        self.found.iter().map(|(&at, found)| (at, found.clone()))
    }

    /// Steps that were recorded but not compared: exchanges of which a rank's record is missing.
    pub fn uncompared(&self) -> usize {
        self.waiting.len()
    }

    /// Compares a step on one rank, or keeps it until the other ranks have recorded it.
    ///
    /// # Errors
    /// [`RuntimeError::Step`] when the CPU cannot execute the step.
    pub fn add(&mut self, record: StepRecord) -> Result<(), RuntimeError> {
        let at = (record.program, record.step);
        let step = self.plan.programs.get(at.0).and_then(|program| program.steps.get(at.1));
        let step = step.ok_or_else(|| RuntimeError::Contradiction { what: format!("there is no step {at:?}") })?;
        let ranks = &self.plan.programs[at.0].ranks;
        if let Action::Collective { op, .. } = &step.action {
            let waiting = self.waiting.entry(at).or_default();
            waiting.push(record);
            if waiting.len() == ranks.len() {
                let mut records = self.waiting.remove(&at).unwrap_or_default();
                records.sort_by_key(|record| record.rank);
                let expected = exchanged(op, &records).map_err(|source| self.failed(step, &records[0], source))?;
                for (record, expected) in records.iter().zip(expected) {
                    self.compare(at, record, &expected);
                }
            }
            return Ok(());
        }
        let position = ranks.iter().position(|&rank| rank == record.rank).unwrap_or_default();
        let expected = self.expected(step, position, &record);
        let expected = expected.map_err(|source| self.failed(step, &record, source))?;
        self.compare(at, &record, &expected);
        Ok(())
    }

    fn failed(&self, step: &Step, record: &StepRecord, source: StepError) -> RuntimeError {
        let names = &self.plan.explanations.names;
        let origin = step.origin.iter().filter_map(|&name| names.get(name as usize)).cloned().collect();
        RuntimeError::Step { rank: record.rank, program: record.program, step: record.step, origin, source }
    }

    /// What the CPU makes of a step's operands.
    fn expected(&self, step: &Step, position: usize, record: &StepRecord) -> Result<Vec<Tensor>, StepError> {
        let kernel = match &step.action {
            Action::Launch { kernel, .. } | Action::Library { kernel, .. } => self.plan.kernels.get(*kernel as usize),
            Action::Copy { .. } => return Ok(record.operands.clone()),
            Action::Collective { .. } | Action::Persistent { .. } => {
                return Err(StepError::Unsupported { what: "a persistent kernel" });
            }
        };
        let what = || StepError::Contradiction { what: "its kernel is not in the plan".to_owned() };
        let kernel = kernel.ok_or_else(what)?;
        let operands: Vec<View<'_>> = record.operands.iter().map(View::from).collect();
        let mut expected = Vec::with_capacity(record.results.len());
        for result in &record.results {
            let bytes = result.data.len();
            let data = Buffer::try_zeroed(bytes).ok_or(StepError::Memory { bytes })?;
            expected.push(Tensor { ty: result.ty.clone(), data });
        }
        let mut results: Vec<ViewMut<'_>> =
            expected.iter_mut().map(|tensor| ViewMut { ty: &tensor.ty, bytes: tensor.data.bytes_mut() }).collect();
        run_spec(&kernel.spec, position, &operands, &mut results)?;
        Ok(expected)
    }

    fn compare(&mut self, at: (usize, usize), record: &StepRecord, expected: &[Tensor]) {
        let nothing = Deviation { largest: 0.0, relative: 0.0, allowed: None, passes: true, failure: None };
        let step = self.plan.programs.get(at.0).and_then(|program| program.steps.get(at.1));
        let rounding = step.map_or(Rounding::NONE, |step| Rounding::of_step(self.plan, step));
        // Where terms cancel, what is left is rounding of the size of the terms.
        let terms = record.operands.iter().filter(|operand| operand.ty.dtype.is_float()).flat_map(to_f64s);
        let largest_term =
            terms.filter(|term| term.is_finite()).fold(0.0, |largest: f64, term| largest.max(term.abs()));
        let found = self.found.entry(at).or_insert(nothing);
        for (actual, expected) in record.results.iter().zip(expected) {
            let (largest, relative) = deviation(actual, expected, largest_term * CANCELLATION);
            found.largest = found.largest.max(largest);
            found.relative = found.relative.max(relative);
            let allowed = tolerance(expected.ty.dtype, &rounding);
            let judged = compare(actual, expected, Tolerance { rounding, elements: self.elements });
            let passes = match (&self.elements, &judged) {
                (Some(_), Ok(judged)) => judged.passes(),
                (Some(_), Err(_)) => false,
                // NaN passes nothing.
                (None, _) => largest <= allowed,
            };
            if self.elements.is_none() {
                found.allowed = Some(found.allowed.map_or(allowed, |other| other.max(allowed)));
            }
            if !passes && found.passes {
                found.failure = judged.ok();
            }
            found.passes &= passes;
        }
    }
}

/// Results are compared with this share of the largest operand, where they are smaller than it.
const CANCELLATION: f64 = 1e-2;

/// The largest difference over the largest expected value, and the relative difference in the Euclidean norm. Infinite
/// where types differ, or integers.
pub fn distance(actual: &Tensor, expected: &Tensor) -> (f64, f64) {
    deviation(actual, expected, 0.0)
}

/// As [`distance`], with a least size that values are compared with.
fn deviation(actual: &Tensor, expected: &Tensor, floor: f64) -> (f64, f64) {
    if actual.ty != expected.ty || (!expected.ty.dtype.is_float() && actual.data.bytes() != expected.data.bytes()) {
        return (f64::INFINITY, f64::INFINITY);
    }
    if actual.data.bytes() == expected.data.bytes() {
        return (0.0, 0.0);
    }
    let (mut worst, mut largest, mut differences, mut squares) = (0f64, 0f64, 0f64, 0f64);
    for (a, b) in to_f64s(actual).into_iter().zip(to_f64s(expected)) {
        if a == b || (a.is_nan() && b.is_nan()) {
            let finite = if b.is_finite() { b.abs() } else { 0.0 };
            (largest, squares) = (largest.max(finite), squares + finite * finite);
        } else if a.is_finite() && b.is_finite() {
            (worst, largest) = (worst.max((a - b).abs()), largest.max(b.abs()));
            (differences, squares) = (differences + (a - b) * (a - b), squares + b * b);
        } else {
            worst = f64::INFINITY;
        }
    }
    let over =
        |difference: f64, size: f64| if difference == 0.0 { 0.0 } else { difference / size.max(f64::MIN_POSITIVE) };
    let whole = floor * (expected.ty.elements().unwrap_or(0) as f64).sqrt();
    (over(worst, largest.max(floor)), over(differences.sqrt(), squares.sqrt().max(whole)))
}

/// What each record's rank should have got: by rank, ascending, as the records are.
fn exchanged(op: &Op, records: &[StepRecord]) -> Result<Vec<Vec<Tensor>>, StepError> {
    let contradiction = |what: &str| StepError::Contradiction { what: what.to_owned() };
    let Some(groups) = op.groups() else {
        // What was sent arrives with another stage: the receiver's next steps show it.
        return Ok(records.iter().map(|record| record.results.clone()).collect());
    };
    let mut expected = Vec::with_capacity(records.len());
    for record in records {
        let group = groups.iter().find(|group| group.contains(&record.rank));
        let group = group.ok_or_else(|| contradiction("a rank is in none of its groups"))?;
        let member = group.iter().position(|&rank| rank == record.rank).unwrap_or_default();
        let mut parts = Vec::with_capacity(group.len());
        for rank in group {
            let other = records.iter().find(|other| other.rank == *rank);
            let operand = other.and_then(|other| other.operands.first());
            parts.push(operand.ok_or_else(|| contradiction("a rank of a group has no record"))?.data.clone());
        }
        let [operand] = record.operands.as_slice() else {
            return Err(contradiction("a collective has one operand"));
        };
        let parts = match op {
            Op::AllReduce { combine, .. } | Op::ReduceScatter { combine, .. } => {
                vec![combined(*combine, &operand.ty, parts)?]
            }
            _ => parts,
        };
        let mut results = record.results.clone();
        let [result] = results.as_mut_slice() else { return Err(contradiction("a collective has one result")) };
        let mut outputs = [ViewMut { ty: &result.ty, bytes: result.data.bytes_mut() }];
        receive(op, &operand.ty, &parts, (member, group.len()), &mut outputs)?;
        expected.push(results);
    }
    Ok(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(elements: &[f32]) -> Tensor {
        Tensor::from_elements(&[elements.len() as u64], elements).unwrap()
    }

    fn record(rank: u32, operand: &[f32], result: &[f32]) -> StepRecord {
        StepRecord { rank, program: 0, step: 0, operands: vec![f32s(operand)], results: vec![f32s(result)] }
    }

    #[test]
    fn distances_are_relative_and_nan_passes_nothing() {
        let (largest, relative) = distance(&f32s(&[3.0, 4.5]), &f32s(&[3.0, 4.0]));
        assert_eq!((largest, relative), (0.125, 0.1));
        assert_eq!(distance(&f32s(&[f32::NAN]), &f32s(&[f32::NAN])), (0.0, 0.0));
        assert_eq!(distance(&f32s(&[f32::NAN, 1.0]), &f32s(&[1.0, 1.0])).0, f64::INFINITY);
        assert_eq!(distance(&f32s(&[1.0]), &f32s(&[0.0])).0, 1.0 / f64::MIN_POSITIVE);
        assert_eq!(deviation(&f32s(&[0.5]), &f32s(&[0.0]), 2.0), (0.25, 0.25));
        // Integers that f64 cannot tell apart.
        let large = |value: i64| Tensor::from_elements(&[1], &[value]).unwrap();
        assert_eq!(distance(&large((1 << 53) + 1), &large(1 << 53)).0, f64::INFINITY);
    }

    #[test]
    fn what_a_step_may_be_off_follows_its_type_and_the_length_of_its_sums() {
        let expected = |expected| Rounding { expected, ..Rounding::NONE };
        assert_eq!(tolerance(DType::F32, &expected(1e-7)), 1e-4);
        assert_eq!(tolerance(DType::F32, &expected(1e-3)), 4e-3);
        assert_eq!(tolerance(DType::BF16, &expected(f64::powi(2.0, -8))), 1.6e-2);
        assert_eq!(tolerance(DType::I64, &expected(1e-3)), 0.0);
    }

    #[test]
    fn exchanges_are_compared_with_all_ranks_operands() {
        let groups = vec![vec![1, 0]];
        let records = [record(0, &[1.0, 2.0], &[0.0; 2]), record(1, &[10.0, 20.0], &[0.0; 2])];
        let sum = Op::AllReduce { combine: planfile::Combine::Sum, groups: groups.clone() };
        let expected = exchanged(&sum, &records).unwrap();
        assert_eq!(expected, [vec![f32s(&[11.0, 22.0])], vec![f32s(&[11.0, 22.0])]]);
        // Rank 1 comes first in its group.
        let scatter = Op::ReduceScatter { combine: planfile::Combine::Sum, axis: 0, groups };
        let halves = [record(0, &[1.0, 2.0], &[0.0]), record(1, &[10.0, 20.0], &[0.0])];
        assert_eq!(exchanged(&scatter, &halves).unwrap(), [vec![f32s(&[22.0])], vec![f32s(&[11.0])]]);
    }
}
