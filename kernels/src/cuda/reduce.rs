//! Reductions: a group of threads for each result where what is reduced is contiguous, a thread for each column of
//! results where they are.
//!
//! Sums accumulate in `f32` for half types and `f32`, long ones in runs that are added in `f64`; in `f64` for `f64`.
//! In an order that the shape alone decides.

use planfile::op::{Combine, ReduceKind};
use planfile::{DType, Op, Spec};

use super::block::{Axis, Only, Row, Shape, Unit, collapse, dense, tiles, widest};
use super::{CudaTarget, Launch};

const BODY: &str = include_str!("../../cuda/reduce.cu");

/// Threads that fill a large device.
const MANY_THREADS: u64 = 132 * 1024;

pub(super) fn select(spec: &Spec, _: &CudaTarget) -> Option<Launch> {
    let only = Only::of(spec)?;
    let Op::Reduce { kind, axes, keep: _ } = only.op else { return None };
    if let Some(nothing) = only.nothing() {
        return Some(nothing);
    }
    let (x, y) = (only.operands[0], &only.results[0]);
    let is_reduced = |axis: usize| axes.iter().any(|&own| usize::from(own) == axis);
    let dims = dense(x);
    let pick = |wanted: bool| -> Vec<Axis> {
        let picked = dims.iter().enumerate().filter(|(axis, _)| is_reduced(*axis) == wanted);
        collapse(&picked.map(|(_, dim)| *dim).collect::<Vec<_>>())
    };
    let (kept, reduced) = (pick(false), pick(true));
    let outputs = y.elements()?;
    let across = only.sizes_of_operand(0, (0..x.rank()).filter(|&axis| !is_reduced(axis)));
    let length = reduced.iter().try_fold(1u64, |product, dim| product.checked_mul(dim.size))?;
    let (code, last) = code(*kind, x.dtype);
    if length == 0 && code >= 5 {
        // There is no extremum to point at.
        return None;
    }
    let mut unit = Unit::indexing(&[x, y]);
    unit.alias("Element", x.dtype);
    unit.alias("Result", y.dtype);
    unit.int("KIND", code);
    unit.flag("LAST", last);
    unit.size("OUTPUTS", outputs);
    unit.size("LENGTH", length);
    unit.offset("kept", &kept);
    unit.offset("reduced", &reduced);
    let bytes = x.dtype.bytes();
    let inner = kept.last().filter(|dim| dim.stride == 1 && dim.size > 1);
    let (symbol, shape) = if let Some(inner) = inner {
        // Wide accesses only where enough threads remain.
        let mut lengths: Vec<u64> = kept.iter().chain(&reduced).map(|dim| dim.stride).filter(|&n| n > 1).collect();
        lengths.push(inner.size);
        let mut vector = widest(bytes.max(y.dtype.bytes()), &lengths);
        while vector > 1 && outputs / vector < MANY_THREADS / 8 {
            vector /= 2;
        }
        let threads = outputs.div_ceil(vector);
        let wanted = (length / 4).clamp(1, 32).next_power_of_two();
        let splits = if threads >= 2 * MANY_THREADS { wanted.min(4) } else { wanted };
        let splits = if splits > length.max(1) { 1 } else { splits };
        let columns = 32u64.max(128 / splits);
        unit.int("VECTOR", vector.cast_signed());
        unit.int("COLUMNS", columns.cast_signed());
        unit.int("SPLITS", splits.cast_signed());
        unit.text(format_args!("#define REDUCE_ROWS 0"));
        ("reduce_columns", Shape::plane([tiles(across, vector * columns)], [columns as u32, splits as u32]))
    } else {
        let mut row = Row::of(length, bytes);
        if reduced.len() > 1 || reduced.first().is_some_and(|dim| dim.stride != 1) {
            // Wide accesses stay inside of the innermost contiguous run, and begin at multiples of their width.
            let last = reduced.last()?;
            let strides = kept.iter().chain(&reduced).map(|dim| dim.stride).filter(|&stride| stride > 1);
            let lengths: Vec<u64> = strides.chain([last.size]).collect();
            let vector = if last.stride == 1 { widest(bytes, &lengths) } else { 1 };
            let threads = (length / vector).clamp(1, 1024).next_power_of_two();
            row = Row { vector, threads: threads as u32, packs: 1, block: threads.max(128) as u32 };
        }
        // Few rows: more threads for each.
        while row.threads < 1024
            && outputs.saturating_mul(u64::from(row.threads)) < MANY_THREADS
            && length / row.vector >= 4 * u64::from(row.threads)
        {
            row.threads *= 2;
            row.block = row.block.max(row.threads);
        }
        row.declare(&mut unit);
        unit.text(format_args!("#define REDUCE_ROWS 1"));
        ("reduce_rows", Shape::flat(row.blocks(across), row.block))
    };
    only.launch(unit, symbol, BODY, shape)
}

/// The number of the kind in the kernel, and whether the last of equals is meant. Sums of booleans are "or"; products
/// and minima "and", of which nothing is true.
fn code(kind: ReduceKind, dtype: DType) -> (i64, bool) {
    let is_bool = dtype == DType::Bool;
    match kind {
        ReduceKind::Combine(Combine::Sum) if is_bool => (2, false),
        ReduceKind::Combine(Combine::Min) if is_bool => (1, false),
        ReduceKind::Combine(Combine::Sum) => (0, false),
        ReduceKind::Combine(Combine::Prod) => (1, false),
        ReduceKind::Combine(Combine::Max) => (2, false),
        ReduceKind::Combine(Combine::Min) => (3, false),
        ReduceKind::Mean => (4, false),
        ReduceKind::ArgMax { last } => (5, last),
        ReduceKind::ArgMin { last } => (6, last),
    }
}

#[cfg(test)]
mod tests {
    use planfile::TensorType;

    use super::*;

    fn launch(kind: ReduceKind, axes: &[u8], sizes: &[u64]) -> Option<Launch> {
        let op = Op::Reduce { kind, axes: axes.to_vec(), keep: false };
        let spec = Spec::of(op, vec![TensorType::new(DType::F32, sizes)]).unwrap();
        select(&spec, &CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false })
    }

    #[test]
    fn what_is_contiguous_decides() {
        let sum = ReduceKind::Combine(Combine::Sum);
        assert_eq!(launch(sum, &[1], &[64, 1024]).unwrap().symbol, "reduce_rows_kernel");
        assert_eq!(launch(sum, &[0, 2, 3], &[8, 64, 7, 7]).unwrap().symbol, "reduce_rows_kernel");
        assert_eq!(launch(sum, &[0], &[1024, 64]).unwrap().symbol, "reduce_columns_kernel");
        assert_eq!(launch(sum, &[1], &[4, 50, 30]).unwrap().symbol, "reduce_columns_kernel");
    }

    #[test]
    fn few_rows_get_whole_blocks() {
        assert_eq!(launch(ReduceKind::Mean, &[0], &[1 << 20]).unwrap().rule.block, [1024, 1, 1]);
        assert_eq!(launch(ReduceKind::Mean, &[1], &[1 << 20, 32]).unwrap().rule.block, [128, 1, 1]);
    }

    #[test]
    fn nothing_has_no_extremum() {
        assert!(launch(ReduceKind::ArgMax { last: false }, &[1], &[3, 0]).is_none());
        assert!(launch(ReduceKind::Combine(Combine::Max), &[1], &[3, 0]).is_some());
    }
}
