//! Evaluates nodes whose operands are constants, where operands and results are small.
//!
//! before  %s = concat %batch, %minus_one    after  %s = weight "/Concat" of 16 bytes in the module
//!
//! This is what removes the exporters' shape arithmetic. Large constants become recipes (see `recipes`).

use cpu::evaluate;
use ir::ValueId;
use planfile::{Op, TensorType, infer};

use super::sweep::{Call, Step, Sweep};
use crate::error::PassError;

/// Results up to this size are kept in the module.
pub(super) const INLINE_BYTES: u64 = 16 << 10;

pub(super) fn apply(sweep: &mut Sweep<'_, '_, '_>, call: &Call) -> Result<Option<Step>, PassError> {
    let Call { op, operands, origin } = call;
    let Some(weights) = operands.iter().map(|&operand| sweep.as_weight(operand)).collect::<Option<Vec<_>>>() else {
        return Ok(None);
    };
    let types: Vec<&TensorType> = operands.iter().map(|&operand| sweep.ty(operand)).collect();
    let small = infer(op, &types).is_ok_and(|results| {
        !results.is_empty() && results.iter().all(|ty| ty.bytes().is_some_and(|bytes| bytes <= INLINE_BYTES))
    });
    if !small || op.is_collective() || matches!(op, Op::Append { .. }) {
        return Ok(None);
    }
    let mut tensors = Vec::new();
    for weight in weights {
        match sweep.weights.read(weight)? {
            Some(tensor) => tensors.push(tensor),
            None => return Ok(None),
        }
    }
    // What the CPU refuses, such as an index out of bounds, is reported when the weight is written.
    let Ok(results) = evaluate(op, &tensors.iter().map(AsRef::as_ref).collect::<Vec<_>>()) else {
        return Ok(None);
    };
    let mut values: Vec<ValueId> = Vec::new();
    for result in results {
        let weight = sweep.weights.add_inline(result, origin, op.name());
        values.push(sweep.weight(weight)?);
    }
    Ok(Some(Step::Values(values)))
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn small_constants_are_evaluated() {
        check(
            "%x: f32[2, 2]
             %w: f32[2, 2] = weight [1, 2, 3, 4]
             %t = transpose %w [1, 0]
             %y = dot %x, %t {contract [1]x[0]}
             return %y",
            "%x: f32[2, 2]
             %t: f32[2, 2] = weight [1, 3, 2, 4]
             %y = dot %x, %t {contract [1]x[0]}
             return %y",
        );
    }

    #[test]
    fn a_range_is_evaluated() {
        check(
            "%x: f32[3]
             %i: i64[3] = pointwise {index(0)}
             %y = gather %x, %i {axis 0}
             %j: i64[2, 2] = pointwise {index(0) * index(1)}
             %z = gather %x, %j {axis 0}
             return %y, %z",
            "%x: f32[3]
             %j: i64[2, 2] = weight [0, 0, 0, 1]
             %z = gather %x, %j {axis 0}
             return %x, %z",
        );
    }

    #[test]
    fn what_is_large_when_repeated_stays() {
        check_unchanged(
            "%i: f32[128, 128] = pointwise {f32(index(0) * index(1))}
             return %i",
        );
    }

    #[test]
    fn what_the_cpu_refuses_is_left_to_whoever_reads_the_weight() {
        let text = "%w: f32[2] = weight [1, 2]
             %i: i64[1] = weight [5]
             %y = gather %w, %i {axis 0}
             return %y";
        let module = crate::simplify::simplify(ir::text::parse_lines(text).unwrap(), &cpu::recipe::NoFiles).unwrap();
        let error = cpu::recipe::read_all(&module.weights[0].recipe, &cpu::recipe::NoFiles).unwrap_err();
        assert!(error.to_string().contains("index 5"), "{error}");
    }
}
