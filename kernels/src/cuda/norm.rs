//! Layer and root-mean-square normalisation: a group of threads for each row, held in registers where it fits.
//!
//! Statistics in two passes over the row, in `f32`, or in `f64` for `f64`; layers are relative to their first element.
//! Squares in `f32` are infinite beyond 1.8e19: rows with such differences, which `f64` would normalise, give 0.

use planfile::op::NormKind;
use planfile::{Op, Spec, TensorType};

use super::block::{Axis, Only, Row, Shape, Unit, dense};
use super::{CudaTarget, Launch};

const BODY: &str = include_str!("../../cuda/norm.cu");

pub(super) fn select(spec: &Spec, _: &CudaTarget) -> Option<Launch> {
    let only = Only::of(spec)?;
    let Op::Norm { kind, axis, epsilon, scale, bias } = *only.op else { return None };
    if let Some(nothing) = only.nothing() {
        return Some(nothing);
    }
    let x = only.operands[0];
    let wide = |ty: &&TensorType| (ty.dtype == planfile::DType::F64) != (x.dtype == planfile::DType::F64);
    if only.operands.iter().any(|ty| !ty.dtype.is_float()) || only.operands.iter().any(wide) {
        return None;
    }
    let tail = &x.sizes()[usize::from(axis)..];
    let length: u64 = tail.iter().product();
    let lines = x.elements()?.checked_div(length)?;
    let row = Row::of(length, only.operands.iter().map(|ty| ty.dtype.bytes()).max()?);
    let mut unit = Unit::indexing(&only.operands);
    unit.alias("Element", x.dtype);
    unit.flag("IS_LAYER", kind == NormKind::Layer);
    unit.real("EPSILON", epsilon.0);
    unit.size("LINES", lines);
    unit.size("LENGTH", length);
    row.declare(&mut unit);
    unit.flag("HELD", row.is_held());
    let mut operand = |name: &str, constant: &str, ty: Option<&TensorType>| {
        let ty = ty.unwrap_or(x);
        unit.alias(name, ty.dtype);
        unit.flag(&format!("{constant}_IS_PACKED"), ty.elements() == Some(length));
        unit.offset(&format!("{}_at", constant.to_lowercase()), &spread(ty, tail));
    };
    operand("Scale", "SCALE", scale.then(|| only.operands[1]));
    operand("Bias", "BIAS", bias.then(|| only.operands[1 + usize::from(scale)]));
    unit.flag("HAS_SCALE", scale);
    unit.flag("HAS_BIAS", bias);
    // The body always takes both; what is absent is not read.
    let shape = Shape::flat(row.blocks(only.sizes_of_operand(0, 0..usize::from(axis))), row.block);
    let passed = |present: bool, at: usize| if present { only.argument(at) } else { "nullptr" };
    let call = format!(
        "norm_rows({}, {}, {}, {})",
        only.argument(0),
        passed(scale, 1),
        passed(bias, 1 + usize::from(scale)),
        only.argument(only.operands.len()),
    );
    only.launch_call(unit, "norm_rows", BODY, &call, shape)
}

/// The walk over `sizes` of a tensor that broadcasts to them. One that does not is a walk nobody takes.
fn spread(ty: &TensorType, sizes: &[u64]) -> Vec<Axis> {
    let own = dense(ty);
    let missing = sizes.len().saturating_sub(own.len());
    let axis = |(position, &size): (usize, &u64)| {
        let own = position.checked_sub(missing).and_then(|position| own.get(position));
        Axis { size, stride: own.filter(|own| own.size != 1).map_or(0, |own| own.stride) }
    };
    sizes.iter().enumerate().map(axis).collect()
}
