//! Parts of a tensor.

use ir::ValueId;

use super::reshape::unsigned;
use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Slice", 1,  slice_by_attributes),
    row("Slice", 10, slice_by_inputs),
    row("Split", 2,  split),
];

fn slice_by_attributes(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (starts, ends) = (ctx.ints("starts")?.unwrap_or_default(), ctx.ints("ends")?.unwrap_or_default());
    let axes = ctx.ints("axes")?;
    slice(ctx, &starts, &ends, axes, None)
}

fn slice_by_inputs(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (starts, ends) = (ctx.operand(1)?, ctx.operand(2)?);
    let (starts, ends) = (ctx.constant_i64s(starts)?, ctx.constant_i64s(ends)?);
    let axes = ctx.optional(3).map(|axes| ctx.constant_i64s(axes)).transpose()?;
    let steps = ctx.optional(4).map(|steps| ctx.constant_i64s(steps)).transpose()?;
    slice(ctx, &starts, &ends, axes, steps)
}

fn slice(
    ctx: &mut Context<'_>,
    starts: &[i64],
    ends: &[i64],
    axes: Option<Vec<i64>>,
    steps: Option<Vec<i64>>,
) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let axes = axes.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = steps.unwrap_or_else(|| vec![1; starts.len()]);
    if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
        return Err(ctx.invalid("starts, ends, axes and steps differ in length"));
    }
    let axes = ctx.axes(&axes, ctx.rank(x))?;
    let mut sizes = ctx.sizes(x);
    let mut from = vec![0i64; sizes.len()];
    let mut by = vec![1i64; sizes.len()];
    for (position, &axis) in axes.iter().enumerate() {
        let axis = usize::from(axis);
        let range = clamp(starts[position], ends[position], steps[position], sizes[axis]);
        (from[axis], by[axis], sizes[axis]) = range.ok_or_else(|| ctx.invalid("a step is 0"))?;
    }
    let whole = sizes == ctx.sizes(x) && from.iter().all(|&start| start == 0);
    Ok(vec![if whole { x } else { ctx.slice(x, &from, &by, &sizes)? }])
}

/// Start, step and number of elements on an axis of `size`, by ONNX's rules: negative positions count from the end, then
/// all clamp to what a step in that direction may reach. `None` for a step of 0.
fn clamp(start: i64, end: i64, step: i64, size: u64) -> Option<(i64, i64, u64)> {
    let size = i128::from(size);
    let from_front = |position: i64| i128::from(position) + if position < 0 { size } else { 0 };
    let (start, end, step) = (from_front(start), from_front(end), i128::from(step));
    let (start, distance) = match step {
        0 => return None,
        1.. => {
            let start = start.clamp(0, size);
            (start, end.clamp(0, size) - start)
        }
        _ => {
            let start = start.clamp(0, (size - 1).max(0));
            (start, start - end.clamp(-1, size - 1))
        }
    };
    let count = if distance <= 0 || size == 0 { 0 } else { (distance - 1) / step.abs() + 1 };
    if count == 0 {
        return Some((0, 1, 0));
    }
    // A single element needs no step, and a step as large as i64::MIN must not be multiplied.
    let step = if count == 1 { 1 } else { step };
    Some((i64::try_from(start).ok()?, i64::try_from(step).ok()?, u64::try_from(count).ok()?))
}

/// Sizes from the attribute or input `split`; otherwise even, the last part smaller where the version allows.
fn split(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let axis = ctx.axis(ctx.int("axis", 0)?, ctx.rank(x))?;
    let size = ctx.sizes(x)[usize::from(axis)];
    let given = match ctx.optional(1) {
        Some(sizes) => Some(ctx.constant_i64s(sizes)?),
        None => ctx.ints("split")?,
    };
    let parts = ctx.node().outputs.len() as u64;
    let sizes = match given {
        Some(sizes) => unsigned(ctx, &sizes)?,
        None => {
            let count = u64::try_from(ctx.int("num_outputs", parts as i64)?).unwrap_or(0);
            if count != parts || parts == 0 {
                return Err(ctx.invalid(&format!("`num_outputs` is {count} for {parts} outputs")));
            }
            if ctx.opset() < 18 && !size.is_multiple_of(parts) {
                return Err(ctx.invalid(&format!("size {size} does not split into {parts} equal parts")));
            }
            let chunk = size.div_ceil(parts);
            (0..parts).map(|part| size.saturating_sub(part * chunk).min(chunk)).collect()
        }
    };
    let total = sizes.iter().try_fold(0u64, |sum, &part| sum.checked_add(part));
    if sizes.len() as u64 != parts || total != Some(size) {
        return Err(ctx.invalid(&format!("size {size} does not split into {sizes:?} for {parts} outputs")));
    }
    let mut start = 0;
    let mut results = Vec::with_capacity(sizes.len());
    for part in sizes {
        results.push(ctx.slice_axis(x, axis, start, part)?);
        start += part;
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, tensor};

    fn sliced(start: i64, end: i64, step: i64) -> Vec<f32> {
        let one = |value| tensor(&[1], &[value]);
        let case = Case::new("Slice", 13).input(tensor(&[5], &[0f32, 1., 2., 3., 4.]));
        let case = case.constant(one(start)).constant(one(end)).constant(one(0)).constant(one(step));
        case.one().elements().unwrap().to_vec()
    }

    #[test]
    fn positions_clamp_as_in_python() {
        assert_eq!(sliced(1, 3, 1), [1., 2.]);
        assert_eq!(sliced(-2, i64::MAX, 1), [3., 4.]);
        assert_eq!(sliced(i64::MIN, -3, 1), [0., 1.]);
        assert_eq!(sliced(0, 5, 2), [0., 2., 4.]);
        assert_eq!(sliced(i64::MAX, i64::MIN, -1), [4., 3., 2., 1., 0.]);
        assert_eq!(sliced(-1, 0, -2), [4., 2.]);
        assert_eq!(sliced(3, 1, 1), [0f32; 0]);
        assert_eq!(sliced(7, 9, 1), [0f32; 0]);
        assert_eq!(sliced(2, i64::MIN, i64::MIN), [2.]);
    }

    #[test]
    fn slices_by_attributes() {
        let x = tensor(&[2, 3], &[0f32, 1., 2., 3., 4., 5.]);
        let case = Case::new("Slice", 9).input(x).ints("starts", &[1, -2]).ints("ends", &[2, 9]);
        assert_eq!(case.one(), tensor(&[1, 2], &[4f32, 5.]));
        assert_eq!(case.clone().ints("axes", &[1, 0]).one(), tensor(&[2, 1], &[1f32, 4.]));
        assert!(case.clone().ints("axes", &[1]).error().contains("differ in length"));
        assert!(case.ints("axes", &[1, 2]).error().contains("axis 2"));
    }

    #[test]
    fn a_whole_slice_is_no_node_and_a_step_of_zero_is_refused() {
        let case =
            Case::new("Slice", 9).input(tensor(&[2], &[0f32, 1.])).ints("starts", &[0]).ints("ends", &[i64::MAX]);
        assert!(case.import().unwrap().graphs[0].nodes().is_empty());
        let one = |value| tensor(&[1], &[value]);
        let zero = Case::new("Slice", 13).input(tensor(&[1], &[0f32])).constant(one(0i64)).constant(one(1i64));
        assert!(zero.without().constant(one(0i64)).error().contains("step is 0"));
    }

    #[test]
    fn splits_by_attribute_input_or_evenly() {
        let x = tensor(&[5], &[0f32, 1., 2., 3., 4.]);
        let expected = [tensor(&[3], &[0f32, 1., 2.]), tensor(&[2], &[3f32, 4.])];
        let case = |opset| Case::new("Split", opset).input(x.clone()).outputs(2);
        assert_eq!(case(11).ints("split", &[3, 2]).run(), expected);
        assert_eq!(case(13).constant(tensor(&[2], &[3i64, 2])).run(), expected);
        assert_eq!(case(18).int("num_outputs", 2).run(), expected);
        assert!(case(13).error().contains("equal parts"));
        assert!(case(11).ints("split", &[3, 3]).error().contains("does not split"));
        assert!(case(18).int("num_outputs", 3).error().contains("`num_outputs` is 3"));
    }
}
