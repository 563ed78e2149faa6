//! The strided copy that all movement of elements is made of.

use bytemuck::Pod;

/// Row-major strides, in elements.
pub(crate) fn strides(sizes: &[usize]) -> Vec<isize> {
    let mut strides = vec![1isize; sizes.len()];
    for axis in (1..sizes.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(sizes[axis].max(1).cast_signed());
    }
    strides
}

/// Strides of an operand of `from` sizes under the index of a result of rank `rank`: aligned at the end as NumPy does,
/// 0 along dimensions that are repeated.
pub(crate) fn broadcast_strides(from: &[usize], rank: usize) -> Vec<isize> {
    let mut aligned = vec![0; rank - from.len()];
    aligned.extend(strides(from).iter().zip(from).map(|(&stride, &size)| if size == 1 { 0 } else { stride }));
    aligned
}

/// Where a copy reads or writes: the element at the all-zero index, and the distance between neighbours on each axis.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) offset: isize,
    pub(crate) strides: Vec<isize>,
}

/// One dimension of a copy.
#[derive(Clone, Copy, Debug)]
struct Axis {
    size: usize,
    to: isize,
    from: isize,
}

/// Side of the square tiles that a transposing copy works in.
const TILE: usize = 32;

/// `to[index] = from[index]` for each index below `sizes`.
///
/// Every index must lie inside of both slices; callers derive the layouts from types that were checked.
pub(crate) fn copy<T: Pod>(sizes: &[usize], to: &mut [T], to_layout: &Layout, from: &[T], from_layout: &Layout) {
    if sizes.contains(&0) {
        return;
    }
    let mut axes = merged(sizes, to_layout, from_layout);
    // Any order of visiting will do: writes are best when consecutive.
    axes.sort_by_key(|axis| std::cmp::Reverse(axis.to.unsigned_abs()));
    let inner = axes.pop().unwrap_or(Axis { size: 1, to: 1, from: 1 });
    // Reads along another axis than writes: visit both in tiles.
    let crossed = (inner.from != 1 && inner.from != 0).then(|| axes.iter().rposition(|axis| axis.from == 1)).flatten();
    let crossing = crossed.map(|position| axes.remove(position));
    let mut odometer = Odometer::new(&axes, to_layout.offset, from_layout.offset);
    loop {
        match crossing {
            Some(other) => copy_tiled(inner, other, to, odometer.to, from, odometer.from),
            None => copy_row(inner, to, odometer.to, from, odometer.from),
        }
        if !odometer.advance() {
            return;
        }
    }
}

/// Drops dimensions of size 1 and merges neighbours that are consecutive on both sides.
fn merged(sizes: &[usize], to: &Layout, from: &Layout) -> Vec<Axis> {
    let mut axes: Vec<Axis> = Vec::with_capacity(sizes.len());
    for ((&size, &to), &from) in sizes.iter().zip(&to.strides).zip(&from.strides) {
        if size == 1 {
            continue;
        }
        let length = size.cast_signed();
        match axes.last_mut() {
            Some(last) if last.to == to * length && last.from == from * length => {
                *last = Axis { size: last.size * size, to, from };
            }
            _ => axes.push(Axis { size, to, from }),
        }
    }
    axes
}

fn copy_row<T: Pod>(axis: Axis, to: &mut [T], to_start: isize, from: &[T], from_start: isize) {
    let Axis { size, to: to_step, from: from_step } = axis;
    if to_step == 1 {
        let start = to_start.cast_unsigned();
        let to = &mut to[start..start + size];
        match from_step {
            1 => to.copy_from_slice(&from[from_start.cast_unsigned()..][..size]),
            0 => to.fill(from[from_start.cast_unsigned()]),
            _ => {
                for (position, to) in to.iter_mut().enumerate() {
                    *to = from[(from_start + position.cast_signed() * from_step).cast_unsigned()];
                }
            }
        }
        return;
    }
    for position in 0..size.cast_signed() {
        to[(to_start + position * to_step).cast_unsigned()] = from[(from_start + position * from_step).cast_unsigned()];
    }
}

fn copy_tiled<T: Pod>(inner: Axis, other: Axis, to: &mut [T], to_start: isize, from: &[T], from_start: isize) {
    for first_other in (0..other.size).step_by(TILE) {
        let others = TILE.min(other.size - first_other);
        for first_inner in (0..inner.size).step_by(TILE) {
            let row = Axis { size: TILE.min(inner.size - first_inner), ..inner };
            for position in first_other..first_other + others {
                let (position, first) = (position.cast_signed(), first_inner.cast_signed());
                let to_start = to_start + position * other.to + first * inner.to;
                let from_start = from_start + position * other.from + first * inner.from;
                copy_row(row, to, to_start, from, from_start);
            }
        }
    }
}

/// Counts through the outer dimensions of a copy.
struct Odometer<'a> {
    axes: &'a [Axis],
    index: Vec<usize>,
    to: isize,
    from: isize,
}

impl<'a> Odometer<'a> {
    fn new(axes: &'a [Axis], to: isize, from: isize) -> Self {
        Self { axes, index: vec![0; axes.len()], to, from }
    }

    /// Steps to the next index; false after the last.
    fn advance(&mut self) -> bool {
        for (axis, index) in self.axes.iter().zip(&mut self.index).rev() {
            *index += 1;
            self.to += axis.to;
            self.from += axis.from;
            if *index < axis.size {
                return true;
            }
            let length = axis.size.cast_signed();
            self.to -= axis.to * length;
            self.from -= axis.from * length;
            *index = 0;
        }
        false
    }
}

/// Calls `visit` with the offset of each index below `sizes` under `strides`, in row-major order.
pub(crate) fn for_each_offset(sizes: &[usize], strides: &[isize], mut visit: impl FnMut(isize)) {
    if sizes.contains(&0) {
        return;
    }
    let axes: Vec<Axis> = sizes.iter().zip(strides).map(|(&size, &from)| Axis { size, to: 0, from }).collect();
    let mut odometer = Odometer::new(&axes, 0, 0);
    loop {
        visit(odometer.from);
        if !odometer.advance() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Offsets of all indexes, by division: the definition.
    fn offsets(sizes: &[usize], layout: &Layout) -> Vec<usize> {
        let count: usize = sizes.iter().product();
        (0..count)
            .map(|mut linear| {
                let mut offset = layout.offset;
                for (size, stride) in sizes.iter().zip(&layout.strides).rev() {
                    offset += (linear % size) as isize * stride;
                    linear /= size;
                }
                offset as usize
            })
            .collect()
    }

    proptest! {
        #[test]
        fn copies_what_the_definition_says(
            sizes in prop::collection::vec(0usize..40, 0..4),
            order in any::<prop::sample::Index>(),
            flips in prop::collection::vec(any::<bool>(), 4),
            repeats in prop::collection::vec(prop::bool::weighted(0.2), 4),
        ) {
            let rank = sizes.len();
            let count: usize = sizes.iter().product();
            // The source's dimensions are rotated, some reversed, some repeated.
            let shift = if rank == 0 { 0 } else { order.index(rank) };
            let rotated: Vec<usize> = (0..rank).map(|axis| sizes[(axis + shift) % rank]).collect();
            let packed = strides(&rotated);
            let mut layout = Layout { offset: 0, strides: vec![0; rank] };
            for axis in 0..rank {
                let target = (axis + shift) % rank;
                if repeats[axis] { continue; }
                layout.strides[target] = packed[axis];
                if flips[axis] && sizes[target] > 0 {
                    layout.offset += packed[axis] * (sizes[target] as isize - 1);
                    layout.strides[target] = -packed[axis];
                }
            }
            let from: Vec<u32> = (0..count as u32).collect();
            let to_layout = Layout { offset: 0, strides: strides(&sizes) };
            let mut to = vec![u32::MAX; count];
            copy(&sizes, &mut to, &to_layout, &from, &layout);
            let expected: Vec<u32> = offsets(&sizes, &layout).into_iter().map(|offset| from[offset]).collect();
            prop_assert_eq!(&to, &expected);
            // The other way round the same indexes meet.
            let mut back = vec![u32::MAX; count];
            copy(&sizes, &mut back, &layout, &to, &to_layout);
            for offset in offsets(&sizes, &layout) {
                prop_assert_eq!(back[offset], from[offset]);
            }
            let mut visited = Vec::new();
            for_each_offset(&sizes, &layout.strides, |offset| visited.push((offset + layout.offset) as usize));
            prop_assert_eq!(visited, offsets(&sizes, &layout));
        }
    }
}
