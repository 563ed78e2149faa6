//! Elements put elsewhere: transposed, joined, repeated, padded.

use ir::ValueId;
use planfile::Op;
use planfile::op::PadMode;

use super::reshape::unsigned;
use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("CenterCropPad", 18, center_crop_pad),
    row("Concat",        4,  concat),
    row("DepthToSpace",  1,  depth_to_space),
    row("Pad",           2,  pad_by_attributes),
    row("Pad",           11, pad_by_inputs),
    row("SpaceToDepth",  1,  space_to_depth),
    row("Tile",          6,  tile),
    row("Transpose",     1,  transpose),
];

fn concat(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let parts = ctx.variadic()?;
    let axis = ctx.axis(ctx.required_int("axis")?, ctx.rank(parts[0]))?;
    Ok(vec![ctx.concat(&parts, axis)?])
}

/// Reverses the dimensions unless told otherwise.
fn transpose(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let rank = ctx.rank(x);
    let permutation = ctx.ints("perm")?.unwrap_or_else(|| (0..rank as i64).rev().collect());
    if permutation.len() != rank {
        return Err(ctx.invalid(&format!("attribute `perm` is {permutation:?} for {}", ctx.ty(x))));
    }
    let permutation = ctx.axes(&permutation, rank)?;
    Ok(vec![ctx.transpose(x, &permutation)?])
}

/// Repeats: a new dimension of the count before each repeated one, which then merge.
fn tile(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, repeats) = (ctx.operand(0)?, ctx.operand(1)?);
    let repeats = ctx.constant_i64s(repeats)?;
    let repeats = unsigned(ctx, &repeats)?;
    let sizes = ctx.sizes(x);
    if repeats.len() != sizes.len() {
        return Err(ctx.invalid(&format!("{} repeats for {}", repeats.len(), ctx.ty(x))));
    }
    let (mut apart, mut repeated, mut merged) = (Vec::new(), Vec::new(), Vec::new());
    for (&size, &count) in sizes.iter().zip(&repeats) {
        if count != 1 {
            apart.push(1);
            repeated.push(count);
        }
        apart.push(size);
        repeated.push(size);
        merged.push(ctx.count(&[size, count])?);
    }
    let x = ctx.reshape(x, &apart)?;
    let x = ctx.broadcast(x, &repeated)?;
    Ok(vec![ctx.reshape(x, &merged)?])
}

fn pad_by_attributes(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let pads = ctx.ints("pads")?.ok_or_else(|| ctx.invalid("attribute `pads` is missing"))?;
    let x = ctx.operand(0)?;
    let value = ctx.float("value", 0.0)?;
    let value = ctx.scalar(ctx.dtype(x), f64::from(value));
    pad(ctx, &pads, None, value)
}

fn pad_by_inputs(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, pads) = (ctx.operand(0)?, ctx.operand(1)?);
    let pads = ctx.constant_i64s(pads)?;
    let axes = ctx.optional(3).map(|axes| ctx.constant_i64s(axes)).transpose()?;
    let value = match ctx.optional(2) {
        // Some exporters write `[1]` for a scalar.
        Some(value) => ctx.reshape(value, &[])?,
        None => ctx.scalar(ctx.dtype(x), 0.0),
    };
    pad(ctx, &pads, axes, value)
}

/// `pads`: amounts before each of the axes, then after each; negative ones crop.
fn pad(ctx: &mut Context<'_>, pads: &[i64], axes: Option<Vec<i64>>, value: ValueId) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let rank = ctx.rank(x);
    let axes = axes.unwrap_or_else(|| (0..rank as i64).collect());
    let axes = ctx.axes(&axes, rank)?;
    if pads.len() != 2 * axes.len() {
        return Err(ctx.invalid(&format!("{} pads for {} axes", pads.len(), axes.len())));
    }
    let mode = match ctx.string("mode", "constant")?.as_str() {
        "constant" => PadMode::Constant,
        "reflect" => PadMode::Reflect,
        "edge" => PadMode::Edge,
        "wrap" => PadMode::Wrap,
        other => return Err(ctx.unsupported(&format!("padding mode `{other}`"))),
    };
    if pads.iter().all(|&amount| amount == 0) {
        return Ok(vec![x]);
    }
    let (mut low, mut high) = (vec![0; rank], vec![0; rank]);
    let (before, after) = pads.split_at(axes.len());
    for ((&axis, &before), &after) in axes.iter().zip(before).zip(after) {
        (low[usize::from(axis)], high[usize::from(axis)]) = (before, after);
    }
    let operands = if mode == PadMode::Constant { vec![x, value] } else { vec![x] };
    Ok(vec![ctx.emit(Op::Pad { low, high, mode }, &operands)?])
}

/// Sizes `[n, c, h, w]` of the operand, and the size of a block.
fn blocks(ctx: &Context<'_>) -> Result<([u64; 4], u64), OpError> {
    let x = ctx.operand(0)?;
    let block = ctx.required_int("blocksize")?;
    let block = u64::try_from(block).ok().filter(|block| (1..1 << 31).contains(block));
    let block = block.ok_or_else(|| ctx.invalid("attribute `blocksize` is not positive"))?;
    let sizes = <[u64; 4]>::try_from(ctx.sizes(x)).map_err(|_| ctx.invalid("the operand is not of rank 4"))?;
    Ok((sizes, block))
}

fn depth_to_space(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let ([n, c, h, w], block) = blocks(ctx)?;
    if !c.is_multiple_of(block * block) {
        return Err(ctx.invalid(&format!("{c} channels are no multiple of {block} squared")));
    }
    let depth = c / (block * block);
    let (apart, permutation) = match ctx.string("mode", "DCR")?.as_str() {
        "DCR" => ([n, block, block, depth, h, w], [0, 3, 4, 1, 5, 2]),
        "CRD" => ([n, depth, block, block, h, w], [0, 1, 4, 2, 5, 3]),
        other => return Err(ctx.invalid(&format!("attribute `mode` is `{other}`, not `DCR` or `CRD`"))),
    };
    let x = ctx.reshape(x, &apart)?;
    let x = ctx.transpose(x, &permutation)?;
    let result = [n, depth, ctx.count(&[h, block])?, ctx.count(&[w, block])?];
    Ok(vec![ctx.reshape(x, &result)?])
}

fn space_to_depth(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let ([n, c, h, w], block) = blocks(ctx)?;
    if !h.is_multiple_of(block) || !w.is_multiple_of(block) {
        return Err(ctx.invalid(&format!("{h} by {w} is no multiple of {block}")));
    }
    let permutation = match ctx.string("mode", "DCR")?.as_str() {
        "DCR" => [0, 3, 5, 1, 2, 4],
        "CRD" => [0, 1, 3, 5, 2, 4],
        other => return Err(ctx.invalid(&format!("attribute `mode` is `{other}`, not `DCR` or `CRD`"))),
    };
    let x = ctx.reshape(x, &[n, c, h / block, block, w / block, block])?;
    let x = ctx.transpose(x, &permutation)?;
    let result = [n, ctx.count(&[c, block, block])?, h / block, w / block];
    Ok(vec![ctx.reshape(x, &result)?])
}

/// To these sizes by cropping or padding with 0 on both sides, the odd one at the end.
fn center_crop_pad(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, shape) = (ctx.operand(0)?, ctx.operand(1)?);
    let (shape, sizes) = (ctx.constant_i64s(shape)?, ctx.sizes(x));
    let axes = match ctx.ints("axes")? {
        Some(axes) => ctx.axes(&axes, sizes.len())?,
        None => (0..sizes.len() as u8).collect(),
    };
    if axes.len() != shape.len() || shape.iter().any(|size| !(0..1 << 40).contains(size)) {
        return Err(ctx.invalid(&format!("sizes {shape:?} for axes {axes:?}")));
    }
    let (mut low, mut high) = (vec![0; sizes.len()], vec![0; sizes.len()]);
    for (&axis, wanted) in axes.iter().zip(shape) {
        let axis = usize::from(axis);
        let more = i64::try_from(sizes[axis]).ok().and_then(|size| wanted.checked_sub(size));
        let more = more.ok_or_else(|| ctx.invalid(&format!("{} is too large", ctx.ty(x))))?;
        // Division rounds to zero, so that the larger half of either sign is at the end.
        (low[axis], high[axis]) = (more / 2, more - more / 2);
    }
    let zero = ctx.scalar(ctx.dtype(x), 0.0);
    Ok(vec![ctx.emit(Op::Pad { low, high, mode: PadMode::Constant }, &[x, zero])?])
}

#[cfg(test)]
mod tests {
    use planfile::Tensor;

    use crate::harness::{Case, tensor};

    fn counted(sizes: &[u64]) -> Tensor {
        let count = sizes.iter().product::<u64>();
        tensor(sizes, &(0..count).map(|i| i as f32).collect::<Vec<_>>())
    }

    #[test]
    fn joins() {
        let case = Case::new("Concat", 13).input(counted(&[2, 1])).input(counted(&[2, 2])).int("axis", -1);
        assert_eq!(case.one(), tensor(&[2, 3], &[0f32, 0., 1., 1., 2., 3.]));
        let wrong = Case::new("Concat", 13).input(counted(&[2, 1])).input(counted(&[3, 1])).int("axis", 1);
        assert!(wrong.error().contains("f32[3, 1] beside f32[2, 1]"), "{}", wrong.error());
    }

    #[test]
    fn transposes() {
        let case = Case::new("Transpose", 13).input(counted(&[2, 3]));
        assert_eq!(case.one(), tensor(&[3, 2], &[0f32, 3., 1., 4., 2., 5.]));
        assert!(case.clone().ints("perm", &[0, 1]).import().unwrap().graphs[0].nodes().is_empty());
        assert!(case.clone().ints("perm", &[0, 0]).error().contains("repeat"));
        assert!(case.ints("perm", &[0]).error().contains("perm"));
    }

    #[test]
    fn tiles() {
        let case = |repeats: &[i64]| {
            Case::new("Tile", 13).input(counted(&[2, 2])).constant(tensor(&[repeats.len() as u64], repeats))
        };
        assert_eq!(case(&[1, 2]).one(), tensor(&[2, 4], &[0f32, 1., 0., 1., 2., 3., 2., 3.]));
        assert_eq!(case(&[2, 1]).one(), tensor(&[4, 2], &[0f32, 1., 2., 3., 0., 1., 2., 3.]));
        assert_eq!(case(&[0, 1]).one().ty.sizes(), [0, 2]);
        assert!(case(&[2]).error().contains("1 repeats"));
    }

    #[test]
    fn pads_in_every_mode() {
        let case = |mode| {
            let pads = tensor(&[2], &[2i64, 1]);
            Case::new("Pad", 19).input(tensor(&[3], &[1f32, 2., 3.])).constant(pads).string("mode", mode)
        };
        assert_eq!(case("constant").one(), tensor(&[6], &[0f32, 0., 1., 2., 3., 0.]));
        assert_eq!(case("constant").constant(tensor(&[1], &[9f32])).one(), tensor(&[6], &[9f32, 9., 1., 2., 3., 9.]));
        assert_eq!(case("reflect").one(), tensor(&[6], &[3f32, 2., 1., 2., 3., 2.]));
        assert_eq!(case("edge").one(), tensor(&[6], &[1f32, 1., 1., 2., 3., 3.]));
        assert_eq!(case("wrap").one(), tensor(&[6], &[2f32, 3., 1., 2., 3., 1.]));
        assert!(case("mirror").error().contains("padding mode `mirror`"));
    }

    #[test]
    fn pads_chosen_axes_and_crops() {
        let case = Case::new("Pad", 18).input(counted(&[2, 2])).constant(tensor(&[2], &[-1i64, 1])).without();
        assert_eq!(case.constant(tensor(&[1], &[-1i64])).one(), tensor(&[2, 2], &[1f32, 0., 3., 0.]));
        let old = Case::new("Pad", 10).input(counted(&[2])).ints("pads", &[1, 0]).float("value", 5.0);
        assert_eq!(old.one(), tensor(&[3], &[5f32, 0., 1.]));
    }

    #[test]
    fn moves_depth_to_space_and_back() {
        let dcr = Case::new("DepthToSpace", 13).input(counted(&[1, 8, 1, 1])).int("blocksize", 2);
        assert_eq!(dcr.one(), tensor(&[1, 2, 2, 2], &[0f32, 2., 4., 6., 1., 3., 5., 7.]));
        let crd = dcr.clone().string("mode", "CRD");
        assert_eq!(crd.one(), tensor(&[1, 2, 2, 2], &[0f32, 1., 2., 3., 4., 5., 6., 7.]));
        let back = Case::new("SpaceToDepth", 13).input(dcr.one()).int("blocksize", 2);
        assert_eq!(back.one(), counted(&[1, 8, 1, 1]));
        let back = Case::new("SpaceToDepth", 28).input(crd.one()).int("blocksize", 2).string("mode", "CRD");
        assert_eq!(back.one(), counted(&[1, 8, 1, 1]));
        assert!(back.string("mode", "RCD").error().contains("attribute `mode` is `RCD`"));
        assert!(dcr.int("blocksize", 3).error().contains("8 channels"));
    }

    #[test]
    fn crops_and_pads_around_the_center() {
        let case = |size: i64| {
            let case = Case::new("CenterCropPad", 18).input(tensor(&[4], &[1f32, 2.0, 3.0, 4.0]));
            case.constant(tensor(&[1], &[size])).one()
        };
        assert_eq!(case(1), tensor(&[1], &[2f32]));
        assert_eq!(case(7), tensor(&[7], &[0f32, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0]));
    }
}
