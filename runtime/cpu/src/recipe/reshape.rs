//! Boxes through a reshape: the box of the operand that covers a box of the result, and where in it the elements lie.
//!
//! Dimensions fall into groups that the reshape splits and merges independently: `[8, 6, 5] → [8, 2, 3, 5]` has the
//! groups `8 → 8`, `6 → 2 × 3` and `5 → 5`. In each group the operand's box spans the flat range from the first to the
//! last wanted element.

use std::ops::Range;

use planfile::types::strides;

use super::Region;

/// How a box of a reshape's result is read from its operand.
pub(super) struct Cover {
    /// Box of the operand.
    pub region: Region,
    /// First wanted element within the box, row-major.
    pub first: u64,
    /// Elements from one index to the next, for each dimension of the result.
    pub strides: Vec<u64>,
    /// Result dimension along which to take the box apart when it covers too much: the outermost one of a loose group.
    pub loose: Option<usize>,
}

/// Covers the box `wanted` of a tensor of sizes `to` by a box of the same elements as sizes `from`. All sizes positive.
pub(super) fn cover(from: &[u64], to: &[u64], wanted: &Region) -> Cover {
    let mut region = Region { starts: vec![0; from.len()], sizes: vec![1; from.len()] };
    let mut strides_out = vec![0; to.len()];
    let mut loose = None;
    // Flat sizes and offsets of the groups within the covering box.
    let mut parts: Vec<(Range<usize>, u64, u64)> = Vec::new();
    for (ins, outs) in groups(from, to) {
        let (in_strides, out_strides) = (strides(&from[ins.clone()]), strides(&to[outs.clone()]));
        let (mut low, mut high, mut count) = (0, 0, 1);
        for (axis, stride) in outs.clone().zip(&out_strides) {
            low += wanted.starts[axis] * stride;
            high += (wanted.starts[axis] + wanted.sizes[axis] - 1) * stride;
            count *= wanted.sizes[axis];
        }
        let (mut low_rest, mut high_rest, mut begin, mut len, mut apart) = (low, high, 0, 1, false);
        for (axis, stride) in ins.zip(&in_strides) {
            let (first, last) = (low_rest / stride, high_rest / stride);
            (low_rest, high_rest) = (low_rest % stride, high_rest % stride);
            let (start, size) = if apart { (0, from[axis]) } else { (first, last - first + 1) };
            (region.starts[axis], region.sizes[axis]) = (start, size);
            begin += start * stride;
            len *= size;
            apart |= first != last;
        }
        if len > count {
            loose = loose.or_else(|| outs.clone().find(|&axis| wanted.sizes[axis] > 1));
        }
        for (axis, stride) in outs.clone().zip(out_strides) {
            strides_out[axis] = stride;
        }
        parts.push((outs, len, low - begin));
    }
    let (mut first, mut outer) = (0, 1);
    for (outs, len, offset) in parts.into_iter().rev() {
        first += offset * outer;
        for axis in outs {
            strides_out[axis] *= outer;
        }
        outer *= len;
    }
    Cover { region, first, strides: strides_out, loose }
}

/// Smallest runs of dimensions with equal products, in order. Dimensions of size 1 at the end belong to no group.
fn groups(from: &[u64], to: &[u64]) -> Vec<(Range<usize>, Range<usize>)> {
    let (mut i, mut o, mut groups) = (0, 0, Vec::new());
    while i < from.len() && o < to.len() {
        let (first_in, first_out) = (i, o);
        let (mut left, mut right) = (from[i], to[o]);
        (i, o) = (i + 1, o + 1);
        while left != right {
            let next =
                if left < right { from.get(i).map(|size| (true, size)) } else { to.get(o).map(|size| (false, size)) };
            match next {
                Some((true, size)) => (left, i) = (left * size, i + 1),
                Some((false, size)) => (right, o) = (right * size, o + 1),
                // Equal element counts: the products meet before either list ends.
                None => break,
            }
        }
        groups.push((first_in..i, first_out..o));
    }
    groups
}

/// Copies elements of `width` bytes from strided places of `from` to consecutive ones of `to`.
pub(super) fn gather(from: &[u8], first: u64, strides: &[u64], sizes: &[u64], width: usize, to: &mut [u8]) {
    let mut inner = 1;
    let mut axis = sizes.len();
    // Innermost dimensions whose elements follow each other are copied at once.
    while axis > 0 && (strides[axis - 1] == inner || sizes[axis - 1] == 1) {
        axis -= 1;
        inner *= sizes[axis];
    }
    let run = inner as usize * width;
    for (row, into) in (0u64..).zip(to.chunks_exact_mut(run)) {
        let mut rest = row;
        let mut place = first;
        for (size, stride) in sizes[..axis].iter().zip(&strides[..axis]).rev() {
            place += rest % size * stride;
            rest /= size;
        }
        let start = place as usize * width;
        into.copy_from_slice(&from[start..start + run]);
    }
}
