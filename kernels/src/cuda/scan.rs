//! Cumulative sums, products and extrema: a block for each line, or a thread where lines are many or short.

use planfile::op::Combine;
use planfile::{DType, Op, Spec};

use super::block::{Only, Shape, Unit, around, tiles};
use super::{CudaTarget, Launch};

const BODY: &str = include_str!("../../cuda/scan.cu");

/// Elements of a thread in a step of its block.
const EACH: u64 = 4;
/// Lines that keep a device busy with a thread each.
const MANY_LINES: u64 = 16 * 1024;

pub(super) fn select(spec: &Spec, _: &CudaTarget) -> Option<Launch> {
    let only = Only::of(spec)?;
    let Op::Scan { combine, axis, exclusive, reverse } = *only.op else { return None };
    if let Some(nothing) = only.nothing() {
        return Some(nothing);
    }
    let x = only.operands[0];
    let [outer, length, inner] = around(x, usize::from(axis));
    let lines = outer * inner;
    let across = only.sizes_of_operand(0, (0..x.rank()).filter(|&own| own != usize::from(axis)));
    let mut unit = Unit::indexing(&[x]);
    unit.alias("Element", x.dtype);
    // Sums of booleans are "or"; products and minima "and", of which nothing is true.
    let combine = match (combine, x.dtype) {
        (Combine::Max, _) | (Combine::Sum, DType::Bool) => 2,
        (Combine::Prod, _) | (Combine::Min, DType::Bool) => 1,
        (Combine::Min, _) => 3,
        (Combine::Sum, _) => 0,
    };
    unit.int("COMBINE", combine);
    unit.flag("EXCLUSIVE", exclusive);
    unit.flag("REVERSE", reverse);
    unit.size("LINES", lines);
    unit.size("LENGTH", length);
    unit.size("INNER", inner);
    if length <= 16 || (inner >= 32 && lines >= MANY_LINES) {
        unit.text(format_args!("#define SCAN_BLOCKS 0"));
        return only.launch(unit, "scan_threads", BODY, Shape::flat([tiles(across, 128)], 128));
    }
    let threads = length.div_ceil(EACH).next_power_of_two().clamp(32, 512);
    unit.int("THREADS", threads.cast_signed());
    unit.int("EACH", EACH.cast_signed());
    unit.text(format_args!("#define SCAN_BLOCKS 1"));
    only.launch(unit, "scan_blocks", BODY, Shape::flat([tiles(across, 1)], threads as u32))
}
