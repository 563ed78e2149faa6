//! Resize and its predecessor Upsample.

use ir::ValueId;
use planfile::op::{Coordinates, NearestRounding, ResizeMode};
use planfile::{Op, Real};

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Upsample", 7,  resize_by_scales),
    row("Resize",   10, resize_by_scales),
    row("Resize",   11, resize),
];

/// What becomes of each axis.
struct Axes {
    scales: Vec<f64>,
    sizes: Vec<u64>,
    /// Start and end, as fractions of the input.
    region: Vec<(f64, f64)>,
}

/// The forms without coordinate attributes: output index divided by scale.
fn resize_by_scales(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let scales = match ctx.optional(1) {
        Some(scales) => ctx.constant_f64s(scales)?,
        None => ctx.floats("scales")?.unwrap_or_default().into_iter().map(f64::from).collect(),
    };
    let input = ctx.sizes(x);
    if scales.len() != input.len() {
        return Err(ctx.invalid(&format!("{} scales for {}", scales.len(), ctx.ty(x))));
    }
    let region = vec![(0.0, 1.0); input.len()];
    let sizes = scaled_sizes(ctx, &input, &scales, &region)?;
    let mode = match ctx.string("mode", "nearest")?.as_str() {
        // Shrinking rounds up: the published results of this version, and ONNX Runtime's.
        "nearest" => match (scales.iter().any(|&scale| scale > 1.0), scales.iter().any(|&scale| scale < 1.0)) {
            (_, false) => ResizeMode::Nearest(NearestRounding::Floor),
            (false, true) => ResizeMode::Nearest(NearestRounding::Ceil),
            (true, true) => {
                return Err(ctx.unsupported("growing one axis and shrinking another; convert the model to opset 11"));
            }
        },
        "linear" | "bilinear" => ResizeMode::Linear { antialias: false },
        other => return Err(ctx.invalid(&format!("`mode` is `{other}`"))),
    };
    Ok(vec![emit(ctx, x, mode, Coordinates::Asymmetric, Axes { scales, sizes, region })?])
}

fn resize(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let (mode, coordinates) = attributes(ctx)?;
    let axes = axes(ctx, x, coordinates)?;
    Ok(vec![emit(ctx, x, mode, coordinates, axes)?])
}

/// No node if nothing changes.
fn emit(
    ctx: &mut Context<'_>,
    x: ValueId,
    mode: ResizeMode,
    coordinates: Coordinates,
    axes: Axes,
) -> Result<ValueId, OpError> {
    let Axes { scales, sizes, region } = axes;
    let from = ctx.sizes(x);
    if let Some(axis) = (0..sizes.len().min(from.len())).find(|&axis| from[axis] == 0 && !sizes.contains(&0)) {
        return Err(ctx.invalid(&format!("axis {axis} of {} has nothing to resample", ctx.ty(x))));
    }
    let crops = matches!(coordinates, Coordinates::TfCropAndResize { .. });
    if !crops && sizes == ctx.sizes(x) && scales.iter().all(|&scale| scale == 1.0) {
        return Ok(x);
    }
    let scales = scales.into_iter().map(Real).collect();
    let region = region.into_iter().map(|(start, end)| (Real(start), Real(end))).collect();
    ctx.emit(Op::Resize { mode, coordinates, scales, region, sizes }, &[x])
}

fn attributes(ctx: &Context<'_>) -> Result<(ResizeMode, Coordinates), OpError> {
    let transformation = ctx.string("coordinate_transformation_mode", "half_pixel")?;
    let rounding = match ctx.string("nearest_mode", "round_prefer_floor")?.as_str() {
        "round_prefer_floor" => NearestRounding::PreferFloor,
        "round_prefer_ceil" => NearestRounding::PreferCeil,
        "floor" => NearestRounding::Floor,
        "ceil" => NearestRounding::Ceil,
        other => return Err(ctx.invalid(&format!("`nearest_mode` is `{other}`"))),
    };
    let antialias = ctx.flag("antialias", false)?;
    let mode = match ctx.string("mode", "nearest")?.as_str() {
        "nearest" => ResizeMode::Nearest(rounding),
        "linear" => ResizeMode::Linear { antialias },
        "cubic" => ResizeMode::Cubic {
            a: Real(f64::from(ctx.float("cubic_coeff_a", -0.75)?)),
            exclude_outside: ctx.flag("exclude_outside", false)?,
            antialias,
        },
        other => return Err(ctx.invalid(&format!("`mode` is `{other}`"))),
    };
    let coordinates = match transformation.as_str() {
        "half_pixel" => Coordinates::HalfPixel,
        "half_pixel_symmetric" => Coordinates::HalfPixelSymmetric,
        "pytorch_half_pixel" => Coordinates::PytorchHalfPixel,
        "align_corners" => Coordinates::AlignCorners,
        "asymmetric" => Coordinates::Asymmetric,
        "tf_crop_and_resize" => {
            Coordinates::TfCropAndResize { extrapolation: Real(f64::from(ctx.float("extrapolation_value", 0.0)?)) }
        }
        // `floor(x + 0.5)` of half-pixel coordinates is `floor` of these.
        "tf_half_pixel_for_nn" if mode == ResizeMode::Nearest(NearestRounding::Floor) => {
            return Ok((ResizeMode::Nearest(NearestRounding::PreferCeil), Coordinates::HalfPixel));
        }
        "tf_half_pixel_for_nn" => {
            return Err(ctx.unsupported("tf_half_pixel_for_nn without `nearest_mode` floor; use half_pixel"));
        }
        other => return Err(ctx.invalid(&format!("`coordinate_transformation_mode` is `{other}`"))),
    };
    Ok((mode, coordinates))
}

/// Scales, sizes and regions of all axes from the inputs, which may speak of some axes only.
fn axes(ctx: &mut Context<'_>, x: ValueId, coordinates: Coordinates) -> Result<Axes, OpError> {
    let input = ctx.sizes(x);
    let rank = input.len();
    let named: Vec<usize> = match ctx.ints("axes")? {
        Some(axes) => ctx.axes(&axes, rank)?.into_iter().map(usize::from).collect(),
        None => (0..rank).collect(),
    };
    let mut region = vec![(0.0, 1.0); rank];
    if let (Coordinates::TfCropAndResize { .. }, Some(roi)) = (coordinates, ctx.optional(1)) {
        let roi = ctx.constant_f64s(roi)?;
        if roi.len() != 2 * named.len() {
            return Err(ctx.invalid(&format!("`roi` has {} numbers for {} axes", roi.len(), named.len())));
        }
        for (position, &axis) in named.iter().enumerate() {
            region[axis] = (roi[position], roi[named.len() + position]);
        }
    }
    let present = |ctx: &Context<'_>, index| ctx.optional(index).filter(|&value| ctx.sizes(value) != [0]);
    let mut scales = vec![1.0; rank];
    if let Some(sizes) = present(ctx, 3) {
        let wanted = ctx.constant_i64s(sizes)?;
        let wanted: Option<Vec<u64>> = wanted.into_iter().map(|size| u64::try_from(size).ok()).collect();
        let wanted = wanted.filter(|wanted| wanted.len() == named.len());
        let wanted = wanted.ok_or_else(|| ctx.invalid("`sizes` must have one size per axis"))?;
        let mut sizes = input.clone();
        for (&axis, &size) in named.iter().zip(&wanted) {
            sizes[axis] = size;
            scales[axis] = if input[axis] == 0 { 1.0 } else { size as f64 / input[axis] as f64 };
        }
        keep_aspect_ratio(ctx, &named, &input, &mut scales, &mut sizes)?;
        return Ok(Axes { scales, sizes, region });
    }
    let Some(stated) = present(ctx, 2) else { return Err(ctx.invalid("neither `scales` nor `sizes` is given")) };
    let stated = ctx.constant_f64s(stated)?;
    if stated.len() != named.len() {
        return Err(ctx.invalid(&format!("{} scales for {} axes", stated.len(), named.len())));
    }
    for (&axis, &scale) in named.iter().zip(&stated) {
        scales[axis] = scale;
    }
    let sizes = scaled_sizes(ctx, &input, &scales, &region)?;
    Ok(Axes { scales, sizes, region })
}

/// One scale for all named axes, as `keep_aspect_ratio_policy` asks.
fn keep_aspect_ratio(
    ctx: &Context<'_>,
    named: &[usize],
    input: &[u64],
    scales: &mut [f64],
    sizes: &mut [u64],
) -> Result<(), OpError> {
    let stated = named.iter().map(|&axis| scales[axis]);
    let scale = match ctx.string("keep_aspect_ratio_policy", "stretch")?.as_str() {
        "stretch" => return Ok(()),
        "not_larger" => stated.fold(f64::INFINITY, f64::min),
        "not_smaller" => stated.fold(0.0, f64::max),
        other => return Err(ctx.invalid(&format!("`keep_aspect_ratio_policy` is `{other}`"))),
    };
    for &axis in named {
        scales[axis] = scale;
        sizes[axis] = (scale * input[axis] as f64 + 0.5).floor() as u64;
    }
    Ok(())
}

/// `floor(size * extent of the region * scale)`, in `f32` as other implementations compute it: 10 by 0.7 is 7.
fn scaled_sizes(ctx: &Context<'_>, input: &[u64], scales: &[f64], region: &[(f64, f64)]) -> Result<Vec<u64>, OpError> {
    let sizes = input.iter().zip(scales).zip(region).map(|((&size, &scale), &(start, end))| {
        let scaled = size as f32 * (end - start) as f32 * scale as f32;
        let fits = scale > 0.0 && (0.0..9e18).contains(&scaled);
        fits.then_some(scaled as u64).ok_or_else(|| ctx.invalid(&format!("scale {scale} of a dimension of {size}")))
    });
    sizes.collect()
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    fn row(elements: &[f32]) -> planfile::Tensor {
        tensor(&[1, elements.len() as u64], elements)
    }

    fn scaled(scale: f32) -> Case {
        let case = Case::new("Resize", 13).input(row(&[1.0, 2.0, 3.0, 4.0])).without();
        case.constant(tensor(&[2], &[1f32, scale]))
    }

    #[test]
    fn coordinates_and_rounding() {
        assert_close(&scaled(2.0).one(), &[1, 8], &[1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]);
        assert_close(&scaled(0.6).one(), &[1, 2], &[1.0, 3.0]);
        let linear = scaled(2.0).string("mode", "linear");
        assert_close(&linear.one(), &[1, 8], &[1.0, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.0]);
        let corners = linear.string("coordinate_transformation_mode", "align_corners");
        assert_close(
            &corners.one(),
            &[1, 8],
            &[1.0, 10.0 / 7.0, 13.0 / 7.0, 16.0 / 7.0, 19.0 / 7.0, 22.0 / 7.0, 25.0 / 7.0, 4.0],
        );
    }

    #[test]
    fn sizes_may_keep_the_aspect_ratio() {
        let case = |policy: &str| {
            let case = Case::new("Resize", 18).string("keep_aspect_ratio_policy", policy).ints("axes", &[2, 1]);
            let case = case.input(tensor(&[1, 2, 4], &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])).without().without();
            case.constant(tensor(&[2], &[8i64, 2])).one().ty.sizes()
        };
        assert_eq!(case("stretch"), [1, 2, 8]);
        assert_eq!(case("not_larger"), [1, 2, 4]);
        assert_eq!(case("not_smaller"), [1, 4, 8]);
    }

    #[test]
    fn older_versions_divide_by_the_scale() {
        let case = |op: &str, opset, scale: f32| {
            let case = Case::new(op, opset).input(row(&[1.0, 2.0, 3.0, 4.0]));
            case.constant(tensor(&[2], &[1f32, scale])).one()
        };
        assert_close(&case("Upsample", 9, 2.0), &[1, 8], &[1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]);
        assert_close(&case("Resize", 10, 0.6), &[1, 2], &[1.0, 3.0]);
    }

    #[test]
    fn unchanged_sizes_need_no_node() {
        let module = scaled(1.0).import().unwrap();
        assert!(module.graphs[0].nodes().is_empty());
    }

    #[test]
    fn regions_crop() {
        let case = Case::new("Resize", 13).string("coordinate_transformation_mode", "tf_crop_and_resize");
        let case = case.string("mode", "linear").float("extrapolation_value", 9.0).input(row(&[0.0, 1.0, 2.0]));
        let case = case.constant(tensor(&[4], &[0f32, 0.5, 1.0, 1.5])).without().constant(tensor(&[2], &[1i64, 3]));
        assert_close(&case.one(), &[1, 3], &[1.0, 2.0, 9.0]);
    }
}
