//! The largest or smallest elements along an axis: short lines are sorted in shared memory; long ones are filtered by
//! the worst winner so far, or ranked by counting where very many win.

use planfile::{Cuda, Op, Spec};

use super::block::{Only, Shape, Unit, around, tiles};
use super::{CudaTarget, Launch};

const BODY: &str = include_str!("../../cuda/top_k.cu");

/// Entries that a block sorts, at most: 64 KiB, or 128 of 64-bit types where that much is shared.
fn sorted_max(entry_bytes: u64, architecture: Cuda) -> u64 {
    if 8192 * entry_bytes <= u64::from(architecture.shared_bytes_max()) { 8192 } else { 4096 }
}
/// Entries that the lines of a block should make together.
const SORTED_MIN: u64 = 512;

pub(super) fn select(spec: &Spec, target: &CudaTarget) -> Option<Launch> {
    let only = Only::of(spec)?;
    let Op::TopK { axis, k, largest, sorted: _ } = *only.op else { return None };
    if let Some(nothing) = only.nothing() {
        return Some(nothing);
    }
    let x = only.operands[0];
    let [outer, length, inner] = around(x, usize::from(axis));
    let lines = outer * inner;
    let along = usize::from(axis);
    let across = only.sizes_of_operand(0, (0..x.rank()).filter(|&own| own != along));
    if length >= 1 << 31 {
        return None;
    }
    let mut unit = Unit::indexing(&[x, &only.results[0]]);
    unit.alias("Element", x.dtype);
    unit.flag("LARGEST", largest);
    unit.size("WINNERS", k);
    unit.size("LINES", lines);
    unit.size("LENGTH", length);
    unit.size("INNER", inner);
    let entry_bytes = if x.dtype.bytes() == 8 { 16 } else { 8 };
    let sorted_max = sorted_max(entry_bytes, target.architecture);
    if length <= sorted_max {
        let run = length.next_power_of_two().max(2);
        let lines_per_block = (SORTED_MIN / run).max(1);
        let entries = run * lines_per_block;
        let threads = (entries / 2).clamp(32, 1024);
        unit.text(format_args!("#define TOP_K_SORTS 1"));
        unit.int("THREADS", threads.cast_signed());
        unit.int("RUN", run.cast_signed());
        unit.int("LINES_PER_BLOCK", lines_per_block.cast_signed());
        let shape =
            Shape::flat([tiles(across, lines_per_block)], threads as u32).shared((entries * entry_bytes) as u32);
        return only.launch(unit, "top_k_sort", BODY, shape);
    }
    let best = k.next_power_of_two();
    if best <= sorted_max / 2 {
        // Each thread brings four candidates in a step: half of what is sorted.
        let threads = sorted_max / 8;
        unit.text(format_args!("#define TOP_K_FILTERS 1"));
        unit.int("THREADS", threads.cast_signed());
        unit.int("RUN", sorted_max.cast_signed());
        unit.int("BEST", best.cast_signed());
        let shape = Shape::flat([tiles(across, 1)], threads as u32).shared((sorted_max * entry_bytes) as u32);
        return only.launch(unit, "top_k_filter", BODY, shape);
    }
    let blocks_per_line = length.div_ceil(256);
    unit.int("THREADS", 256);
    unit.size("BLOCKS_PER_LINE", blocks_per_line);
    let line = only.sizes_of_operand(0, [along]);
    only.launch(unit, "top_k_rank", BODY, Shape::flat([tiles(across, 1), tiles(line, 256)], 256))
}

#[cfg(test)]
mod tests {
    use planfile::{DType, TensorType};

    use super::*;

    #[test]
    fn the_way_follows_from_lengths() {
        let launch_for = |architecture: &str, dtype, length, k| {
            let op = Op::TopK { axis: 0, k, largest: true, sorted: true };
            let spec = Spec::of(op, vec![TensorType::new(dtype, &[length])]).unwrap();
            select(&spec, &CudaTarget { architecture: architecture.parse().unwrap(), allow_tf32: false }).unwrap()
        };
        let launch = |dtype, length, k| launch_for("sm_90a", dtype, length, k);
        assert_eq!(launch(DType::F32, 8192, 8000).symbol, "top_k_sort_kernel");
        assert_eq!(launch(DType::F32, 8193, 50).symbol, "top_k_filter_kernel");
        assert_eq!(launch(DType::F32, 10_000, 5000).symbol, "top_k_rank_kernel");
        assert_eq!(launch(DType::F64, 8192, 1).rule.shared_bytes, 128 << 10);
        for architecture in ["sm_86", "sm_89", "sm_120a"] {
            assert_eq!(launch_for(architecture, DType::F32, 8192, 1).rule.shared_bytes, 64 << 10);
            assert_eq!(launch_for(architecture, DType::F64, 4096, 1).rule.shared_bytes, 64 << 10);
            let filter = launch_for(architecture, DType::I64, 5000, 1000);
            assert_eq!((filter.symbol.as_str(), filter.rule.shared_bytes), ("top_k_filter_kernel", 64 << 10));
        }
        assert_eq!(launch(DType::F32, 128_000, 0).symbol, "nothing_kernel");
    }
}
