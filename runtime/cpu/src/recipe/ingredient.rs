//! Boxes of a recipe's ingredients: files, inline constants and seeded noise.

use planfile::types::strides;
use planfile::{DType, RecipeInput, Scalar, Source};

use super::{RecipeError, Region, WeightBytes};

/// Rows that lie this close together in a file are read at once, gaps included.
const LARGEST_GAP_BYTES: u64 = 8 << 10;
/// The most that is read at once when rows are read together.
const LARGEST_SPAN_BYTES: u64 = 1 << 20;

/// What a read costs beyond its bytes, as bytes: a call, and pages of which only a part is wanted.
const READ_OVERHEAD_BYTES: u64 = 4 << 10;

/// Bounds of the noise that stands in for absent weights.
const NOISE: f64 = 0.05;

/// Fills `out` with a box of the ingredient. The box was checked against the type, `out` against the box.
pub(super) fn read(
    input: &RecipeInput,
    region: &Region,
    bytes: &dyn WeightBytes,
    out: &mut [u8],
) -> Result<(), RecipeError> {
    let rows = Rows::new(input, region);
    match &input.source {
        Source::File { file, offset } => read_file(*file, *offset, &rows, bytes, out)?,
        Source::Inline(buffer) => {
            if input.ty.bytes() != Some(buffer.len() as u64) {
                return Err(RecipeError::Malformed(format!("{} inline bytes for {}", buffer.len(), input.ty)));
            }
            for (row, into) in rows.starts().zip(out.chunks_exact_mut(rows.bytes as usize)) {
                let row = row as usize;
                into.copy_from_slice(&buffer.bytes()[row..row + into.len()]);
            }
        }
        Source::Random { seed } => {
            let element = input.ty.dtype.bytes();
            for (row, into) in rows.starts().zip(out.chunks_exact_mut(rows.bytes as usize)) {
                for (index, into) in (row / element as u64..).zip(into.chunks_exact_mut(element)) {
                    into.copy_from_slice(&noise(*seed, index, input.ty.dtype).to_bytes());
                }
            }
        }
    }
    // Files may hold any non-zero byte for true.
    if input.ty.dtype == DType::Bool {
        out.iter_mut().for_each(|byte| *byte = u8::from(*byte != 0));
    }
    Ok(())
}

/// What reading a box costs, as bytes of a plain read from front to back. Saturates.
pub(super) fn cost(input: &RecipeInput, region: &Region) -> u64 {
    let rows = Rows::new(input, region);
    let count = rows.outer.iter().fold(1u64, |count, (size, _)| count.saturating_mul(*size));
    let stride = rows.outer.iter().rev().find(|(size, _)| *size > 1).map_or(rows.bytes, |(_, stride)| *stride);
    let each = match input.source {
        Source::File { .. } if stride.saturating_sub(rows.bytes) <= LARGEST_GAP_BYTES => stride,
        Source::File { .. } => rows.bytes.saturating_add(READ_OVERHEAD_BYTES),
        Source::Inline(_) | Source::Random { .. } => rows.bytes,
    };
    count.saturating_mul(each)
}

/// The contiguous runs of a box, in order.
struct Rows {
    /// Bytes of each.
    bytes: u64,
    /// Byte offset of the first.
    first: u64,
    /// Number and byte stride of each dimension outside of a row.
    outer: Vec<(u64, u64)>,
}

impl Rows {
    fn new(input: &RecipeInput, region: &Region) -> Self {
        let element = input.ty.dtype.bytes() as u64;
        let sizes = input.ty.sizes();
        let strides: Vec<u64> = strides(&sizes).iter().map(|stride| stride * element).collect();
        let first = region.starts.iter().zip(&strides).map(|(start, stride)| start * stride).sum();
        // A row spans the innermost dimensions that are taken whole, and one more.
        let mut axis = sizes.len();
        let mut bytes = element;
        while axis > 0 {
            axis -= 1;
            bytes *= region.sizes[axis];
            if region.sizes[axis] != sizes[axis] {
                break;
            }
        }
        let outer = region.sizes[..axis].iter().copied().zip(strides[..axis].iter().copied()).collect();
        Self { bytes, first, outer }
    }

    /// Byte offsets of all rows, ascending. There are none of zero bytes: empty boxes are never read.
    fn starts(&self) -> impl Iterator<Item = u64> {
        let count: u64 = self.outer.iter().map(|(size, _)| size).product();
        (0..count).map(|mut row| {
            let place = |offset, &(size, stride): &(u64, u64)| {
                let coordinate = row % size;
                row /= size;
                offset + coordinate * stride
            };
            self.outer.iter().rev().fold(self.first, place)
        })
    }
}

fn read_file(file: u32, offset: u64, rows: &Rows, bytes: &dyn WeightBytes, out: &mut [u8]) -> Result<(), RecipeError> {
    let position = |row: u64| {
        let position = offset.checked_add(row);
        position.ok_or_else(|| RecipeError::Malformed(format!("file offset {offset} + {row} overflows")))
    };
    let mut starts = rows.starts().peekable();
    let mut outs = out.chunks_exact_mut(rows.bytes as usize);
    let (mut span, mut together) = (Vec::new(), Vec::new());
    while let Some(first) = starts.next() {
        together.clear();
        together.push(first);
        let mut end = first + rows.bytes;
        while let Some(&next) = starts.peek()
            && next - end <= LARGEST_GAP_BYTES
            && next + rows.bytes - first <= LARGEST_SPAN_BYTES
        {
            together.push(next);
            end = next + rows.bytes;
            starts.next();
        }
        if together.len() == 1 {
            outs.next().map_or(Ok(()), |into| bytes.read(file, position(first)?, into).map_err(RecipeError::from))?;
            continue;
        }
        span.resize((end - first) as usize, 0);
        bytes.read(file, position(first)?, &mut span)?;
        for (row, into) in together.iter().zip(&mut outs) {
            let from = (row - first) as usize;
            into.copy_from_slice(&span[from..from + into.len()]);
        }
    }
    Ok(())
}

/// Noise that depends on the seed and the element's index alone (`SplitMix64`, Steele et al., 2014): floats uniform in
/// ±[`NOISE`], everything else zero.
fn noise(seed: u64, index: u64, dtype: DType) -> Scalar {
    if !dtype.is_float() {
        return Scalar { dtype, bits: 0 };
    }
    let mut state = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^= state >> 31;
    let unit = (state >> 11) as f64 / (1u64 << 53) as f64;
    Scalar::from_f64(dtype, (2.0 * unit - 1.0) * NOISE)
}
