//! Executes a kernel's specification: its primitives one after the other, on host memory.

use cpu::{View, ViewMut, execute};
use planfile::{Buffer, Spec, TensorType};

use crate::error::StepError;
use crate::memory::byte_len;

/// Where a value of a specification lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// An operand of the step, by position.
    Operand(usize),
    /// A result of the step, by position: written there directly.
    Result(usize),
    /// Between primitives, by position among the scratch buffers.
    Scratch(usize),
}

fn contradiction(what: impl Into<String>) -> StepError {
    StepError::Contradiction { what: what.into() }
}

/// Runs `spec` on the stage's `rank`-th device.
///
/// Scratch lives from the primitive that writes it to the last one that reads it.
pub(crate) fn run_spec(
    spec: &Spec,
    rank: usize,
    operands: &[View<'_>],
    results: &mut [ViewMut<'_>],
) -> Result<(), StepError> {
    let types = spec.types().map_err(contradiction)?;
    if operands.len() != spec.inputs.len() || results.len() != spec.results.len() {
        return Err(contradiction("a step has another number of operands or results than its kernel"));
    }
    if let Some(done) = cpu::panels::execute(spec, operands, results) {
        return Ok(done?);
    }
    let mut slots: Vec<Slot> = (0..spec.inputs.len()).map(Slot::Operand).collect();
    for number in slots.len()..types.len() {
        let result = spec.results.iter().position(|&result| result as usize == number);
        slots.push(result.map_or(Slot::Scratch(number), Slot::Result));
    }
    let last_reads = last_reads(spec, types.len());
    let mut scratch: Vec<Buffer> = vec![Buffer::default(); types.len()];
    let mut next = spec.inputs.len();
    for (position, node) in spec.nodes.iter().enumerate() {
        let count = planfile::infer(&node.op, &operand_types(&types, &node.operands)).map_err(contradiction)?.len();
        let numbers = next..next + count;
        next += count;
        // Taken out while they are written, so that what others read can be borrowed.
        let mut written = Vec::with_capacity(count);
        for number in numbers.clone() {
            written.push(match slots[number] {
                Slot::Result(result) => Target::Result(std::mem::take(&mut results[result].bytes)),
                Slot::Operand(_) | Slot::Scratch(_) => Target::Scratch(scratch_for(&types[number])?),
            });
        }
        let inputs: Vec<View<'_>> = node
            .operands
            .iter()
            .map(|&operand| {
                let number = operand as usize;
                let bytes = match slots[number] {
                    Slot::Operand(operand) => operands[operand].bytes,
                    Slot::Result(result) => &*results[result].bytes,
                    Slot::Scratch(scratched) => scratch[scratched].bytes(),
                };
                View { ty: &types[number], bytes }
            })
            .collect();
        let mut outputs: Vec<ViewMut<'_>> = written
            .iter_mut()
            .zip(numbers.clone())
            .map(|(target, number)| ViewMut { ty: &types[number], bytes: target.bytes_mut() })
            .collect();
        execute(&node.op, rank, &inputs, &mut outputs)?;
        for (target, number) in written.into_iter().zip(numbers) {
            match (target, slots[number]) {
                (Target::Result(bytes), Slot::Result(result)) => results[result].bytes = bytes,
                (Target::Scratch(buffer), _) => scratch[number] = buffer,
                (Target::Result(_), Slot::Operand(_) | Slot::Scratch(_)) => {}
            }
        }
        for &operand in &node.operands {
            if last_reads[operand as usize] == Some(position) {
                scratch[operand as usize] = Buffer::default();
            }
        }
    }
    copy_rest(spec, &slots, operands, results)
}

fn scratch_for(ty: &TensorType) -> Result<Buffer, StepError> {
    let bytes = byte_len(ty)?;
    Buffer::try_zeroed(bytes).ok_or(StepError::Memory { bytes })
}

/// Results that are an operand, or the same value as an earlier result.
fn copy_rest(spec: &Spec, slots: &[Slot], operands: &[View<'_>], results: &mut [ViewMut<'_>]) -> Result<(), StepError> {
    for (position, &number) in spec.results.iter().enumerate() {
        let (before, rest) = results.split_at_mut(position);
        let Some(target) = rest.first_mut() else { continue };
        let source = match slots[number as usize] {
            Slot::Operand(operand) => operands[operand].bytes,
            Slot::Result(first) if first < position => &*before[first].bytes,
            Slot::Result(_) | Slot::Scratch(_) => continue,
        };
        if source.len() != target.bytes.len() {
            return Err(contradiction("a result of a kernel has another size than its value"));
        }
        target.bytes.copy_from_slice(source);
    }
    Ok(())
}

enum Target<'a> {
    Result(&'a mut [u8]),
    Scratch(Buffer),
}

impl Target<'_> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Result(bytes) => bytes,
            Self::Scratch(buffer) => buffer.bytes_mut(),
        }
    }
}

/// Operands were checked against the values defined before.
fn operand_types<'a>(types: &'a [TensorType], operands: &[u32]) -> Vec<&'a TensorType> {
    operands.iter().map(|&operand| &types[operand as usize]).collect()
}

/// For each value, the last primitive that reads it.
fn last_reads(spec: &Spec, values: usize) -> Vec<Option<usize>> {
    let mut last = vec![None; values];
    for (position, node) in spec.nodes.iter().enumerate() {
        for &operand in &node.operands {
            last[operand as usize] = Some(position);
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use planfile::expr::{Binary, Unary};
    use planfile::{DType, Dim, Expr, Op, SpecNode, Tensor};

    use super::*;

    fn pointwise(expr: Expr) -> Op {
        Op::Pointwise { expr, dims: vec![Dim::Static(2)] }
    }

    fn run(spec: &Spec, operands: &[&Tensor]) -> Result<Vec<Vec<f32>>, StepError> {
        let mut results: Vec<Tensor> =
            spec.result_types().unwrap().into_iter().map(|ty| Tensor::zeroed(ty).unwrap()).collect();
        let operands: Vec<View<'_>> = operands.iter().map(|&tensor| View::from(tensor)).collect();
        let mut views: Vec<ViewMut<'_>> = results.iter_mut().map(ViewMut::from).collect();
        run_spec(spec, 0, &operands, &mut views)?;
        Ok(results.iter().map(|tensor| tensor.elements::<f32>().unwrap().to_vec()).collect())
    }

    fn vector(elements: &[f32]) -> Tensor {
        Tensor::from_elements(&[2], elements).unwrap()
    }

    #[test]
    fn values_flow_through_scratch_and_results() {
        let ty = TensorType::new(DType::F32, &[2]);
        let negate = SpecNode { op: pointwise(Expr::operand(0).unary(Unary::Neg)), operands: vec![0] };
        let add = |a, b| SpecNode {
            op: pointwise(Expr::operand(0).binary(Binary::Add, Expr::operand(1))),
            operands: vec![a, b],
        };
        // 2 = -x (scratch), 3 = 2 + y (a result that is read again), 4 = 3 + 3.
        let spec =
            Spec { inputs: vec![ty.clone(), ty], nodes: vec![negate, add(2, 1), add(3, 3)], results: vec![4, 3, 1, 4] };
        let results = run(&spec, &[&vector(&[1.0, 2.0]), &vector(&[10.0, 20.0])]).unwrap();
        assert_eq!(results, [[18.0, 36.0], [9.0, 18.0], [10.0, 20.0], [18.0, 36.0]]);
    }

    #[test]
    fn a_spec_without_primitives_copies() {
        let spec = Spec::identity(TensorType::new(DType::F32, &[2]));
        assert_eq!(run(&spec, &[&vector(&[3.0, 4.0])]).unwrap(), [[3.0, 4.0]]);
    }

    #[test]
    fn wrong_counts_are_refused() {
        let spec = Spec::identity(TensorType::new(DType::F32, &[2]));
        assert!(matches!(run(&spec, &[]), Err(StepError::Contradiction { .. })));
    }
}
