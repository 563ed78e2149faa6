//! Transpositions. Dimensions collapse first; then either the innermost one stays and packs of it are copied, or the
//! two innermost ones of operand and result change places tile by tile, reads and writes both contiguous.

use planfile::{Op, Spec};

use super::block::{Axis, Only, Shape, Unit, collapse, dense, neighbours, tiles, widest};
use super::{CudaTarget, Launch};

const BODY: &str = include_str!("../../cuda/transpose.cu");

/// Narrower dimensions leave most of a tile empty.
const TILED_MIN: u64 = 8;

pub(super) fn select(spec: &Spec, _: &CudaTarget) -> Option<Launch> {
    let only = Only::of(spec)?;
    let Op::Transpose { permutation } = only.op else { return None };
    if let Some(nothing) = only.nothing() {
        return Some(nothing);
    }
    let x = only.operands[0];
    let from = dense(x);
    let permuted: Vec<Axis> = permutation.iter().filter_map(|&axis| from.get(usize::from(axis)).copied()).collect();
    let axes = collapse(&permuted);
    // For each, the axes of the operand that became one.
    let groups = neighbours(&permuted);
    let of_operand = |group: &Vec<usize>| group.iter().map(|&position| usize::from(permutation[position])).collect();
    let groups: Vec<Vec<usize>> = groups.iter().map(of_operand).collect();
    let bytes = x.dtype.bytes();
    let mut unit = Unit::indexing(&[x]);
    let elements = x.elements()?;
    // Where each dimension lies in the result.
    let mut to = axes.clone();
    let mut stride = 1;
    for axis in to.iter_mut().rev() {
        axis.stride = stride;
        stride *= axis.size;
    }
    let innermost = axes.iter().position(|axis| axis.stride == 1);
    let tiled = innermost.filter(|&row| row + 1 < axes.len()).and_then(|row| {
        let column = axes.len() - 1;
        (axes[row].size >= TILED_MIN && axes[column].size >= TILED_MIN).then_some((row, column))
    });
    if let Some((row, column)) = tiled {
        let tile = if bytes <= 2 { 64 } else { 32 };
        let rest = |axes: &[Axis]| -> Vec<Axis> {
            let others = axes.iter().enumerate().filter(|(axis, _)| *axis != row && *axis != column);
            others.map(|(_, axis)| *axis).collect()
        };
        let (rows, columns) = (axes[row].size, axes[column].size);
        unit.text(format_args!("typedef {} Element;\n#define TRANSPOSE_TILES 1", word(bytes)));
        unit.int("TILE", tile);
        let tile = tile.cast_unsigned();
        unit.size("ROWS", rows);
        unit.size("COLUMNS", columns);
        unit.size("ROW_TILES", rows.div_ceil(tile));
        unit.size("COLUMN_TILES", columns.div_ceil(tile));
        unit.size("FROM_COLUMN", axes[column].stride);
        unit.size("TO_ROW", to[row].stride);
        unit.offset("from_batch", &rest(&axes));
        unit.offset("to_batch", &rest(&to));
        let of = |group: &[usize]| only.sizes_of_operand(0, group.iter().copied());
        let others = (0..groups.len()).filter(|&group| group != row && group != column);
        let others: Vec<usize> = others.flat_map(|group| groups[group].iter().copied()).collect();
        let blocks = [tiles(of(&others), 1), tiles(of(&groups[row]), tile), tiles(of(&groups[column]), tile)];
        return only.launch(unit, "transpose_tiles", BODY, Shape::flat(blocks, 256));
    }
    // Packs of what stays together; single elements where nothing does.
    let mut packs = axes;
    let mut vector = 1;
    if let Some(last) = packs.last_mut().filter(|last| last.stride == 1) {
        vector = widest(bytes, &[last.size]);
        last.size /= vector;
        let outer = packs.len() - 1;
        for axis in &mut packs[..outer] {
            axis.stride /= vector;
        }
    }
    unit.text(format_args!("typedef Pack<{}, {vector}> Element;\n#define TRANSPOSE_TILES 0", word(bytes)));
    unit.size("COUNT", elements / vector);
    unit.offset("source", &packs);
    only.launch(
        unit,
        "transpose_packs",
        BODY,
        Shape::flat([tiles(only.sizes_of_operand(0, 0..x.rank()), 256 * vector)], 256),
    )
}

/// What moves an element of so many bytes.
const fn word(bytes: usize) -> &'static str {
    match bytes {
        1 => "u8",
        2 => "u16",
        4 => "u32",
        _ => "u64",
    }
}

#[cfg(test)]
mod tests {
    use planfile::{DType, TensorType};

    use super::*;

    fn launched(permutation: &[u8], dtype: DType, sizes: &[u64]) -> (Launch, i64) {
        let op = Op::Transpose { permutation: permutation.to_vec() };
        let spec = Spec::of(op, vec![TensorType::new(dtype, sizes)]).unwrap();
        let launch = select(&spec, &CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false }).unwrap();
        let blocks = launch.blocks(&spec);
        (launch, blocks)
    }

    #[test]
    fn heads_move_in_wide_packs() {
        let (launch, blocks) = launched(&[0, 2, 1, 3], DType::F16, &[2, 128, 12, 64]);
        assert_eq!(launch.symbol, "transpose_packs_kernel");
        assert!(launch.source.contains("Pack<u16, 8> Element"));
        assert_eq!(blocks, 2 * 128 * 12 * 8 / 256);
    }

    #[test]
    fn layouts_change_in_tiles() {
        let (launch, blocks) = launched(&[0, 2, 3, 1], DType::F32, &[4, 64, 56, 56]);
        assert_eq!(launch.symbol, "transpose_tiles_kernel");
        assert_eq!(blocks, 4 * 2 * 98);
        // Three channels would leave most of a tile empty.
        assert_eq!(launched(&[0, 2, 3, 1], DType::F32, &[4, 3, 56, 56]).0.symbol, "transpose_packs_kernel");
    }
}
