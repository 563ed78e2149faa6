//! Scatters, by element and by slice: a block for each part of the operand applies all updates that fall into it, in
//! order. The last of equal indices wins; half types are combined in `f32` and rounded once.

use std::fmt::Write as _;
use std::ops::Range;

use planfile::op::Combine;
use planfile::{DType, Op, Spec, TensorType};

use super::block::{Only, Shape, Unit, around, dense, tiles};
use super::{CudaTarget, Launch};

const BODY: &str = include_str!("../../cuda/scatter.cu");

const THREADS: u64 = 256;
/// Elements that a block holds, at most: 32 KiB of the widest.
const HELD_MAX: u64 = 4096;
/// Blocks that fill a large device twice.
const MANY_BLOCKS: u64 = 264;

pub(super) fn select(spec: &Spec, _: &CudaTarget) -> Option<Launch> {
    let only = Only::of(spec)?;
    let combine = match only.op {
        Op::ScatterElements { combine, .. } | Op::ScatterNd { combine } => *combine,
        _ => return None,
    };
    if let Some(nothing) = only.nothing() {
        return Some(nothing);
    }
    let (x, indices, updates) = (only.operands[0], only.operands[1], only.operands[2]);
    let mut unit = Unit::indexing(&[x, indices, updates]);
    unit.alias("Element", x.dtype);
    unit.alias("Where", indices.dtype);
    unit.int("COMBINE", code(combine, x.dtype));
    let by_element = if let Op::ScatterElements { axis, .. } = only.op { Some(usize::from(*axis)) } else { None };
    let lines = match by_element {
        Some(axis) => elements(&mut unit, axis, x, indices),
        None => slices(&mut unit, x, indices)?,
    };
    let columns = lines.inner.next_power_of_two().min(32);
    let owners = THREADS / columns;
    let column_tiles = lines.inner.div_ceil(columns);
    let whole = (HELD_MAX / columns).min(lines.targets);
    // Smaller parts where there are few blocks, but at least two targets for each owner.
    let share = (lines.targets * lines.outer * column_tiles).div_ceil(MANY_BLOCKS).max(2 * owners);
    let part = whole.min(share);
    let parts = lines.targets.div_ceil(part);
    unit.size("TARGETS", lines.targets);
    unit.size("INNER", lines.inner);
    unit.size("UPDATES", if updates.elements()? == 0 { 0 } else { lines.updates });
    unit.size("UPDATE_STRIDE", lines.update_stride);
    unit.size("PARTS", parts);
    unit.size("COLUMN_TILES", column_tiles);
    unit.int("PART", part.cast_signed());
    unit.int("COLUMNS", columns.cast_signed());
    unit.int("OWNERS", owners.cast_signed());
    unit.int("TARGET_COLUMNS", if by_element.is_some() { columns.cast_signed() } else { 1 });
    let blocks = [
        tiles(only.sizes_of_operand(0, 0..lines.axes.start), 1),
        tiles(only.sizes_of_operand(0, lines.axes.clone()), part),
        tiles(only.sizes_of_operand(0, lines.axes.end..x.rank()), columns),
    ];
    only.launch_checked(unit, "scatter", BODY, Shape::flat(blocks, THREADS as u32))
}

/// The operand as `[outer, targets, inner]`.
struct Lines {
    /// Those of the operand that are the targets; the ones before are outer.
    axes: Range<usize>,
    outer: u64,
    targets: u64,
    inner: u64,
    updates: u64,
    update_stride: u64,
}

/// Lines along `axis`; those beyond the indices' other dimensions have no updates.
fn elements(unit: &mut Unit, axis: usize, x: &TensorType, indices: &TensorType) -> Lines {
    let [outer, targets, inner] = around(x, axis);
    let (sizes, own) = (x.sizes(), dense(indices));
    let mut body = String::new();
    // Writing to a string does not fail.
    for (name, range) in [("outer", 0..axis), ("column", axis + 1..sizes.len())] {
        let mut below = 1u64;
        for dim in range.rev().filter(|&dim| sizes[dim] > 1) {
            let _ = write!(
                body,
                "\n    {{ const Index at = {name} / static_cast<Index>({below}ull) % static_cast<Index>({}ull); \
                 any = any && at < static_cast<Index>({}ull); start += at * static_cast<Index>({}ull); }}",
                sizes[dim], own[dim].size, own[dim].stride
            );
            below *= sizes[dim];
        }
    }
    let stride = own[axis].stride;
    unit.text(format_args!(
        "DEVICE Index update_of(Index outer, Index column, bool& any) {{\n    any = true;\n    Index start = 0;{body}\n\
         \x20   return start;\n}}\n\
         DEVICE i64 target_of(const Where* indices, Index start, Index j) {{\n    \
         const i64 index = indices[start + j * static_cast<Index>({stride}ull)];\n    \
         const i64 target = index < 0 ? index + {targets}ll : index;\n    \
         return target < {targets}ll ? target : -1;\n}}"
    ));
    Lines { axes: axis..axis + 1, outer, targets, inner, updates: own[axis].size, update_stride: stride }
}

/// One line of slices, and a column for each element of a slice; all columns share the targets.
fn slices(unit: &mut Unit, x: &TensorType, indices: &TensorType) -> Option<Lines> {
    let depth = *indices.sizes().last()?;
    let sizes = x.sizes();
    let bounds = sizes.get(..usize::try_from(depth).ok()?)?;
    let targets = bounds.iter().product();
    let inner: u64 = sizes[bounds.len()..].iter().product();
    let updates: u64 = indices.sizes()[..indices.rank() - 1].iter().product();
    let mut body = String::new();
    for (level, bound) in bounds.iter().enumerate() {
        // Writing to a string does not fail.
        let _ = write!(
            body,
            "\n    {{ i64 at = indices[j * {depth}u + {level}u]; at = at < 0 ? at + {bound}ll : at; \
             inside = inside && at >= 0 && at < {bound}ll; target = target * {bound}ll + (inside ? at : 0); }}"
        );
    }
    unit.text(format_args!(
        "DEVICE Index update_of(Index, Index column, bool& any) {{ any = true; return column; }}\n\
         DEVICE i64 target_of(const Where* indices, Index, Index j) {{\n    bool inside = true;\n    \
         i64 target = 0;{body}\n    return inside ? target : -1;\n}}"
    ));
    Some(Lines { axes: 0..bounds.len(), outer: 1, targets, inner, updates, update_stride: inner })
}

/// The number of the combination in the kernel. Sums of booleans are "or", products "and".
fn code(combine: Option<Combine>, dtype: DType) -> i64 {
    match (combine, dtype) {
        (None, _) => 0,
        (Some(Combine::Max), _) | (Some(Combine::Sum), DType::Bool) => 3,
        (Some(Combine::Min), _) | (Some(Combine::Prod), DType::Bool) => 4,
        (Some(Combine::Sum), _) => 1,
        (Some(Combine::Prod), _) => 2,
    }
}
