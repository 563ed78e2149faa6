//! The same elements under other sizes.

use ir::ValueId;

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Expand",    8, expand),
    row("Flatten",   1, flatten),
    row("Reshape",   5, reshape),
    row("Squeeze",   1, squeeze),
    row("Unsqueeze", 1, unsqueeze),
];

/// Sizes that must not be negative.
pub(super) fn unsigned(ctx: &Context<'_>, sizes: &[i64]) -> Result<Vec<u64>, OpError> {
    let sizes: Result<Vec<u64>, _> = sizes.iter().map(|&size| u64::try_from(size)).collect();
    sizes.map_err(|_| ctx.invalid("a size is negative"))
}

/// Axes from the attribute `axes`, or, in later versions, from an input.
pub(super) fn given_axes(ctx: &mut Context<'_>, input: usize) -> Result<Option<Vec<i64>>, OpError> {
    match ctx.optional(input) {
        Some(axes) => ctx.constant_i64s(axes).map(Some),
        None => ctx.ints("axes"),
    }
}

/// 0 copies the operand's size (unless `allowzero`), -1 is what remains.
fn reshape(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, shape) = (ctx.operand(0)?, ctx.operand(1)?);
    let wanted = ctx.constant_i64s(shape)?;
    let sizes = ctx.sizes(x);
    let copy_zero = !ctx.flag("allowzero", false)?;
    let contradiction = || ctx.invalid(&format!("{} cannot be reshaped to {wanted:?}", ctx.ty(x)));
    let mut result = Vec::with_capacity(wanted.len());
    let mut open = None;
    for (axis, &size) in wanted.iter().enumerate() {
        result.push(match size {
            0 if copy_zero => *sizes.get(axis).ok_or_else(contradiction)?,
            -1 if open.is_none() => {
                open = Some(axis);
                1
            }
            size => u64::try_from(size).map_err(|_| contradiction())?,
        });
    }
    if let Some(axis) = open {
        let (all, rest) = (ctx.count(&sizes)?, ctx.count(&result)?);
        if rest == 0 || !all.is_multiple_of(rest) {
            return Err(contradiction());
        }
        result[axis] = all / rest;
    }
    if ctx.count(&result)? != ctx.count(&sizes)? {
        return Err(contradiction());
    }
    Ok(vec![ctx.reshape(x, &result)?])
}

/// To a matrix: dimensions before `axis` to rows, the others to columns.
fn flatten(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let sizes = ctx.sizes(x);
    let rank = sizes.len() as i64;
    let axis = ctx.int("axis", 1)?;
    // The rank itself is allowed; negative values count from it.
    let from_front = if axis < 0 { axis.saturating_add(rank) } else { axis };
    if !(0..=rank).contains(&from_front) {
        return Err(ctx.invalid(&format!("axis {axis} is out of range for rank {rank}")));
    }
    let axis = from_front as usize;
    let (rows, columns) = (ctx.count(&sizes[..axis])?, ctx.count(&sizes[axis..])?);
    Ok(vec![ctx.reshape(x, &[rows, columns])?])
}

fn squeeze(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let axes = match given_axes(ctx, 1)? {
        Some(axes) => ctx.axes(&axes, ctx.rank(x))?,
        None => {
            let ones = ctx.sizes(x).into_iter().zip(0u8..).filter(|(size, _)| *size == 1);
            ones.map(|(_, axis)| axis).collect()
        }
    };
    Ok(vec![ctx.squeeze(x, &axes)?])
}

fn unsqueeze(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let axes = given_axes(ctx, 1)?.ok_or_else(|| ctx.invalid("`axes` are missing"))?;
    let axes = ctx.axes(&axes, ctx.rank(x) + axes.len())?;
    Ok(vec![ctx.unsqueeze(x, &axes)?])
}

/// Broadcasts both ways: a size of 1 in the shape keeps the operand's.
fn expand(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, shape) = (ctx.operand(0)?, ctx.operand(1)?);
    let shape = ctx.constant_i64s(shape)?;
    let shape = unsigned(ctx, &shape)?;
    let sizes = ctx.sizes(x);
    let rank = sizes.len().max(shape.len());
    let aligned = |sizes: &[u64]| [vec![1; rank - sizes.len()], sizes.to_vec()].concat();
    let mut result = Vec::with_capacity(rank);
    for (size, wanted) in aligned(&sizes).into_iter().zip(aligned(&shape)) {
        result.push(match (size, wanted) {
            (1, wanted) => wanted,
            (size, wanted) if wanted == 1 || wanted == size => size,
            _ => return Err(ctx.invalid(&format!("{} does not expand to {shape:?}", ctx.ty(x)))),
        });
    }
    Ok(vec![ctx.broadcast(x, &result)?])
}

#[cfg(test)]
mod tests {
    use planfile::Tensor;

    use crate::harness::{Case, tensor};

    fn x(sizes: &[u64]) -> Tensor {
        let count = sizes.iter().product::<u64>();
        tensor(sizes, &(0..count).map(|i| i as f32).collect::<Vec<_>>())
    }

    fn sizes(case: &Case) -> Vec<u64> {
        let found = case.one();
        assert_eq!(found.data, case.data[0].data);
        found.ty.sizes()
    }

    fn reshaped(from: &[u64], to: &[i64]) -> Case {
        Case::new("Reshape", 14).input(x(from)).constant(tensor(&[to.len() as u64], to))
    }

    #[test]
    fn reshapes() {
        assert_eq!(sizes(&reshaped(&[2, 3, 4], &[0, -1])), [2, 12]);
        assert_eq!(sizes(&reshaped(&[2, 3, 4], &[4, 6])), [4, 6]);
        assert_eq!(sizes(&reshaped(&[1], &[])), [0u64; 0]);
        assert_eq!(sizes(&reshaped(&[0, 3], &[3, 0]).int("allowzero", 1)), [3, 0]);
        for (from, to) in [(&[6][..], &[4, -1][..]), (&[6], &[-1, -1]), (&[6], &[5]), (&[6], &[6, 0]), (&[6], &[-2])] {
            assert!(reshaped(from, to).error().contains("cannot be reshaped"), "{from:?} {to:?}");
        }
    }

    #[test]
    fn a_shape_that_depends_on_data_names_the_input() {
        let case = Case::new("Reshape", 14).input(x(&[4])).input(tensor(&[2], &[2i64, 2]));
        assert!(case.error().contains("input `x1`") && case.error().contains("--like"), "{}", case.error());
        let mut bound = case;
        bound.bindings.samples.insert("x1".to_owned(), tensor(&[2], &[2i64, 2]));
        let module = bound.import().unwrap();
        let [frozen] = module.entries[0].frozen.as_slice() else { panic!("one input is frozen") };
        assert_eq!((frozen.input.as_str(), &frozen.value), ("x1", &tensor(&[2], &[2i64, 2])));
        assert_eq!((frozen.node.as_str(), frozen.nodes), ("/Reshape", 1));
        assert_eq!(module.entries[0].outputs[0].ty.sizes(), [2, 2]);
    }

    #[test]
    fn flattens_at_any_axis() {
        for (axis, expected) in [(0, [1, 24]), (1, [2, 12]), (3, [24, 1]), (-1, [6, 4]), (-3, [1, 24])] {
            assert_eq!(sizes(&Case::new("Flatten", 13).input(x(&[2, 3, 4])).int("axis", axis)), expected, "{axis}");
        }
        assert!(Case::new("Flatten", 13).input(x(&[2, 3])).int("axis", 3).error().contains("axis"));
        assert!(Case::new("Flatten", 13).input(x(&[2, 3])).int("axis", -3).error().contains("axis"));
    }

    #[test]
    fn squeezes_by_attribute_input_or_all() {
        assert_eq!(sizes(&Case::new("Squeeze", 11).input(x(&[1, 2, 1])).ints("axes", &[0])), [2, 1]);
        assert_eq!(sizes(&Case::new("Squeeze", 13).input(x(&[1, 2, 1])).constant(tensor(&[1], &[-1i64]))), [1, 2]);
        assert_eq!(sizes(&Case::new("Squeeze", 13).input(x(&[1, 2, 1]))), [2]);
        let wrong = Case::new("Squeeze", 11).input(x(&[1, 2])).ints("axes", &[1]);
        assert!(wrong.error().contains("not of size 1"));
    }

    #[test]
    fn unsqueezes_at_axes_of_the_result() {
        assert_eq!(sizes(&Case::new("Unsqueeze", 11).input(x(&[2, 3])).ints("axes", &[0, 3])), [1, 2, 3, 1]);
        let axes = tensor(&[2], &[-1i64, 1]);
        assert_eq!(sizes(&Case::new("Unsqueeze", 13).input(x(&[2, 3])).constant(axes)), [2, 1, 3, 1]);
        let twice = Case::new("Unsqueeze", 11).input(x(&[2])).ints("axes", &[0, 0]);
        assert!(twice.error().contains("repeat"));
    }

    #[test]
    fn expands_both_ways() {
        let case =
            |shape: &[i64]| Case::new("Expand", 13).input(x(&[2, 1])).constant(tensor(&[shape.len() as u64], shape));
        assert_eq!(case(&[3, 1, 2]).one(), tensor(&[3, 2, 2], &[0f32, 0., 1., 1., 0., 0., 1., 1., 0., 0., 1., 1.]));
        assert_eq!(case(&[1]).one(), x(&[2, 1]));
        assert!(case(&[3, 1]).error().contains("does not expand"));
    }
}
