//! Softmax and its logarithm: rows stay in registers where they fit; columns are read by a thread each.
//!
//! Computed in `f32`, or in `f64` for `f64`. Reads each element once where rows are held, twice otherwise.

use planfile::{Op, Spec};

use super::block::{Only, Row, Shape, Unit, around, tiles};
use super::{CudaTarget, Launch};

const BODY: &str = include_str!("../../cuda/softmax.cu");

pub(super) fn select(spec: &Spec, _: &CudaTarget) -> Option<Launch> {
    let only = Only::of(spec)?;
    let Op::Softmax { axis, log } = *only.op else { return None };
    if let Some(nothing) = only.nothing() {
        return Some(nothing);
    }
    let x = only.operands[0];
    if !x.dtype.is_float() {
        return None;
    }
    let [outer, length, inner] = around(x, usize::from(axis));
    let lines = outer * inner;
    let across = only.sizes_of_operand(0, (0..x.rank()).filter(|&own| own != usize::from(axis)));
    let mut unit = Unit::indexing(&[x]);
    unit.alias("Element", x.dtype);
    unit.flag("LOG", log);
    unit.size("LINES", lines);
    unit.size("LENGTH", length);
    if inner == 1 {
        let row = Row::of(length, x.dtype.bytes());
        row.declare(&mut unit);
        unit.flag("HELD", row.is_held());
        unit.text(format_args!("#define SOFTMAX_ROWS 1"));
        return only.launch(unit, "softmax_rows", BODY, Shape::flat(row.blocks(across), row.block));
    }
    let splits = (length / 8).clamp(1, 16).next_power_of_two();
    let columns = if splits == 1 { 128 } else { 32 };
    unit.size("INNER", inner);
    unit.int("SPLITS", splits.cast_signed());
    unit.text(format_args!("#define SOFTMAX_ROWS 0"));
    let shape = Shape::plane([tiles(across, columns)], [columns as u32, splits as u32]);
    only.launch(unit, "softmax_columns", BODY, shape)
}
