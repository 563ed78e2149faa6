//! Parts of weights as they lie in the image, cut into tiles: runs of leading rows, so that each is one run of bytes.
//! Rows that are too large are parts of their own, cut along the next dimension.
//!
//! A tile is made of boxes of the weight that its recipe evaluates. What a box costs depends on where its elements lie
//! in the files: a few rows of a transposed table are a little of every row of its source. There, tiles are taller, and
//! boxes cut across, until reading is nearly as cheap as from front to back.

use std::sync::Arc;

use cpu::recipe::{RecipeError, Region, WeightBytes, read_cost, read_region};
use planfile::plan::{Manifest, PlacedWeight, PlanPiece};
use planfile::types::strides;
use planfile::{Buffer, DType, Recipe, TensorType};

/// Bytes of a tile whose source lies as it does.
const TILE_BYTES: u64 = 16 << 20;
/// Most bytes of a tile whose source lies otherwise.
const TALL_TILE_BYTES: u64 = 256 << 20;
/// Bytes of a box, so that what lies between reading and result stays in cache.
const BOX_BYTES: u64 = 1 << 20;

/// Why a tile cannot be made.
#[derive(Debug)]
pub(super) enum Fault {
    /// The plan contradicts itself.
    Layout,
    Recipe(RecipeError),
}

/// What some ranks hold of a weight.
#[derive(Clone, Debug)]
pub(super) struct Part<'a> {
    recipe: &'a Recipe,
    local: Vec<u64>,
    /// Per dimension, the runs of the whole weight that are in the part.
    runs: Vec<Vec<PlanPiece>>,
    element_bytes: u64,
    bytes: u64,
    /// The dimension of the rows; those before have one element.
    lead: usize,
    /// Bytes of the whole part before this row of it.
    start: u64,
}

impl<'a> Part<'a> {
    /// The part of the stage's rank number `position`.
    pub(super) fn new(manifest: &'a Manifest, placed: &PlacedWeight, position: usize) -> Result<Self, Fault> {
        let weight = manifest.weights.get(placed.weight as usize).ok_or(Fault::Layout)?;
        let whole = |len| vec![PlanPiece { global: 0, local: 0, len }];
        let mut runs: Vec<Vec<PlanPiece>> = weight.ty.sizes().into_iter().map(whole).collect();
        for split in &placed.splits {
            let pieces = split.pieces.get(position).ok_or(Fault::Layout)?;
            *runs.get_mut(usize::from(split.dim)).ok_or(Fault::Layout)? = pieces.clone();
        }
        let (local, bytes) = (placed.ty.sizes(), placed.ty.bytes().ok_or(Fault::Layout)?);
        Ok(Self {
            recipe: &weight.recipe,
            local,
            runs,
            element_bytes: placed.ty.dtype.bytes() as u64,
            bytes,
            lead: 0,
            start: 0,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn rows(&self) -> u64 {
        self.local.get(self.lead).copied().unwrap_or(1)
    }

    /// One row as a part of its own.
    fn row(&self, row: u64) -> Self {
        let mut part = self.clone();
        let within = |run: &&PlanPiece| (run.local..run.local + run.len).contains(&row);
        let only = |run: &PlanPiece| PlanPiece { global: run.global + (row - run.local), local: 0, len: 1 };
        part.runs[self.lead] = self.runs[self.lead].iter().find(within).map(only).into_iter().collect();
        part.local[self.lead] = 1;
        part.bytes = self.bytes / self.rows();
        part.lead = self.lead + 1;
        part.start = self.start + row * part.bytes;
        part
    }

    /// The part from its front to its end; none without elements.
    pub(super) fn tiles(self) -> Result<Vec<Tile<'a>>, Fault> {
        if self.bytes == 0 {
            return Ok(Vec::new());
        }
        let rows = self.rows();
        let row_bytes = self.bytes / rows;
        if row_bytes > TILE_BYTES && self.lead + 1 < self.local.len() {
            let rows = (0..rows).map(|row| self.row(row).tiles()).collect::<Result<Vec<_>, _>>()?;
            return Ok(rows.into_iter().flatten().collect());
        }
        let rows_within = |bytes: u64| (bytes / row_bytes.max(1)).clamp(1, rows);
        let mut height = rows_within(TILE_BYTES);
        let mut cost = self.cost_of_byte(height)?;
        while height < rows_within(TALL_TILE_BYTES) {
            let taller = (height * 2).min(rows_within(TALL_TILE_BYTES));
            let next = self.cost_of_byte(taller)?;
            if next >= 0.8 * cost {
                break;
            }
            (height, cost) = (taller, next);
        }
        let part = Arc::new(self);
        let starts = (0..rows).step_by(usize::try_from(height).unwrap_or(usize::MAX));
        let tile = |first| Tile { part: Arc::clone(&part), first, count: height.min(rows - first), row_bytes };
        Ok(starts.map(tile).collect())
    }

    /// What reading the first tile of that height costs, per byte of its result.
    fn cost_of_byte(&self, height: u64) -> Result<f64, Fault> {
        let mut cost = 0.0;
        for region in boxes(&self.runs, self.lead, 0, height) {
            cost += self.cost(&region)? as f64;
        }
        Ok(cost / height as f64)
    }

    fn cost(&self, pieces: &[PlanPiece]) -> Result<u64, Fault> {
        read_cost(self.recipe, &region(pieces)).map_err(Fault::Recipe)
    }

    fn box_bytes(&self, pieces: &[PlanPiece]) -> u64 {
        pieces.iter().map(|piece| piece.len).product::<u64>() * self.element_bytes
    }

    /// The box in boxes of about [`BOX_BYTES`], cut along the dimension that makes reading cheapest. Recipes that need
    /// whole operands for any box are not cut.
    fn cut(&self, pieces: Vec<PlanPiece>, into: &mut Vec<Vec<PlanPiece>>) -> Result<(), Fault> {
        let wanted = self.box_bytes(&pieces).div_ceil(BOX_BYTES);
        let mut best: Option<(u64, usize)> = None;
        for axis in (0..pieces.len()).filter(|&axis| wanted > 1 && pieces[axis].len > 1) {
            let mut half = pieces.clone();
            half[axis].len = half[axis].len.div_ceil(2);
            let cost = self.cost(&half)?;
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, axis));
            }
        }
        let worth = |cost: u64, whole: u64| cost <= whole / 4 * 3;
        let Some((cost, axis)) = best else {
            into.push(pieces);
            return Ok(());
        };
        if !worth(cost, self.cost(&pieces)?) {
            into.push(pieces);
            return Ok(());
        }
        let whole = pieces[axis];
        let len = whole.len.div_ceil(wanted.min(whole.len));
        let mut offset = 0;
        while offset < whole.len {
            let mut slice = pieces.clone();
            let len = len.min(whole.len - offset);
            slice[axis] = PlanPiece { global: whole.global + offset, local: whole.local + offset, len };
            // Few long rows: cut again, along another dimension.
            if len == 1 && self.box_bytes(&slice) > BOX_BYTES {
                self.cut(slice, into)?
            } else {
                into.push(slice)
            }
            offset += len;
        }
        Ok(())
    }
}

fn region(pieces: &[PlanPiece]) -> Region {
    Region {
        starts: pieces.iter().map(|piece| piece.global).collect(),
        sizes: pieces.iter().map(|piece| piece.len).collect(),
    }
}

/// Some leading rows of a part.
#[derive(Clone, Debug)]
pub(super) struct Tile<'a> {
    part: Arc<Part<'a>>,
    first: u64,
    count: u64,
    row_bytes: u64,
}

impl Tile<'_> {
    pub(super) fn bytes(&self) -> u64 {
        self.count * self.row_bytes
    }

    /// Where it begins in the part.
    pub(super) fn offset(&self) -> u64 {
        self.part.start + self.first * self.row_bytes
    }

    pub(super) fn make(&self, bytes: &dyn WeightBytes) -> Result<Buffer, Fault> {
        let part = &self.part;
        let zeroed = |bytes: u64| {
            let buffer = usize::try_from(bytes).ok().and_then(Buffer::try_zeroed);
            buffer.ok_or_else(|| Fault::Recipe(RecipeError::memory(&TensorType::new(DType::U8, &[bytes]))))
        };
        let mut tile = zeroed(self.bytes())?;
        for pieces in boxes(&part.runs, part.lead, self.first, self.count) {
            let mut cuts = Vec::new();
            if part.recipe.spec.nodes.is_empty() && self.place(&pieces).is_some() {
                // Read straight into place.
                cuts.push(pieces);
            } else {
                part.cut(pieces, &mut cuts)?;
            }
            for pieces in cuts {
                let len = part.box_bytes(&pieces) as usize;
                let read = |into: &mut [u8]| read_region(part.recipe, &region(&pieces), bytes, into);
                match self.place(&pieces) {
                    Some(start) => read(&mut tile.bytes_mut()[start..start + len]).map_err(Fault::Recipe)?,
                    None => {
                        let mut dense = zeroed(len as u64)?;
                        read(dense.bytes_mut()).map_err(Fault::Recipe)?;
                        let element = part.element_bytes;
                        let before = self.first * self.row_bytes / element;
                        paste(dense.bytes(), tile.bytes_mut(), &pieces, &part.local, before, element);
                    }
                }
            }
        }
        Ok(tile)
    }

    /// Where a box begins in the tile, if it is one run of bytes there.
    fn place(&self, pieces: &[PlanPiece]) -> Option<usize> {
        let [first, rest @ ..] = pieces.get(self.part.lead..)? else { return Some(0) };
        let sizes = &self.part.local[self.part.lead + 1..];
        let whole = rest.iter().zip(sizes).all(|(piece, &size)| piece.local == 0 && piece.len == size);
        whole.then(|| ((first.local - self.first) * self.row_bytes) as usize)
    }
}

/// Every combination of one run per dimension, dimension `lead` cut to local rows `first..first + count`.
fn boxes(runs: &[Vec<PlanPiece>], lead: usize, first: u64, count: u64) -> Vec<Vec<PlanPiece>> {
    let mut boxes: Vec<Vec<PlanPiece>> = vec![Vec::new()];
    for (dim, runs) in runs.iter().enumerate() {
        let mut extended = Vec::new();
        for prefix in &boxes {
            for run in runs {
                let (mut start, mut end) = (run.local, run.local + run.len);
                if dim == lead {
                    (start, end) = (start.max(first), end.min(first + count));
                }
                if start < end {
                    let cut = PlanPiece { global: run.global + (start - run.local), local: start, len: end - start };
                    extended.push([prefix.as_slice(), &[cut]].concat());
                }
            }
        }
        boxes = extended;
    }
    boxes
}

/// Copies a dense box to where it lies in the tile, which begins after `before` elements of the part.
fn paste(dense: &[u8], tile: &mut [u8], pieces: &[PlanPiece], local: &[u64], before: u64, element: u64) {
    let Some(last) = pieces.last() else {
        tile.copy_from_slice(dense);
        return;
    };
    let strides = strides(local);
    let run = (last.len * element) as usize;
    let mut index = vec![0; pieces.len() - 1];
    for source in dense.chunks_exact(run.max(1)) {
        let row = |dim: usize| index.get(dim).copied().unwrap_or(0) + pieces[dim].local;
        let offset: u64 = (0..pieces.len()).map(|dim| row(dim) * strides[dim]).sum();
        let start = ((offset - before) * element) as usize;
        tile[start..start + run].copy_from_slice(source);
        for dim in (0..index.len()).rev() {
            index[dim] += 1;
            if index[dim] < pieces[dim].len {
                break;
            }
            index[dim] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use cpu::recipe::{WeightReadError, read_all};
    use planfile::{Expr, ExprOp, Op, RecipeInput, Source, Spec, SpecNode};

    use super::*;

    /// Files of small numbers.
    struct Numbers;

    impl WeightBytes for Numbers {
        fn read(&self, _: u32, offset: u64, into: &mut [u8]) -> Result<(), WeightReadError> {
            for (at, bytes) in (offset / 4..).zip(into.chunks_exact_mut(4)) {
                bytes.copy_from_slice(&((at.wrapping_mul(40503) % 2039) as f32).to_le_bytes());
            }
            Ok(())
        }
    }

    /// `bf16(transpose(w))`, or `w` itself.
    fn recipe(sizes: [u64; 2], transposed: bool) -> Recipe {
        let ty = TensorType::new(DType::F32, &sizes);
        let mut recipe = Recipe::source(ty.clone(), Source::File { file: 0, offset: 0 });
        if transposed {
            let dims = [sizes[1], sizes[0]].map(Into::into).to_vec();
            let expr = Expr { ops: vec![ExprOp::Operand(0), ExprOp::Cast(DType::BF16)] };
            let nodes = vec![
                SpecNode { op: Op::Transpose { permutation: vec![1, 0] }, operands: vec![0] },
                SpecNode { op: Op::Pointwise { expr, dims }, operands: vec![1] },
            ];
            recipe.inputs = vec![RecipeInput { ty: ty.clone(), source: Source::File { file: 0, offset: 0 } }];
            recipe.spec = Spec { inputs: vec![ty], nodes, results: vec![2] };
        }
        recipe
    }

    fn part(recipe: &Recipe, local: [u64; 2], runs: [Vec<PlanPiece>; 2], element_bytes: u64) -> Part<'_> {
        Part {
            recipe,
            local: local.to_vec(),
            runs: runs.to_vec(),
            element_bytes,
            bytes: local[0] * local[1] * element_bytes,
            lead: 0,
            start: 0,
        }
    }

    fn all(len: u64) -> Vec<PlanPiece> {
        vec![PlanPiece { global: 0, local: 0, len }]
    }

    fn made(part: Part<'_>) -> (Vec<u8>, usize) {
        let tiles = part.tiles().unwrap();
        let (mut bytes, mut largest) = (Vec::new(), 0);
        for tile in &tiles {
            assert_eq!(tile.offset(), bytes.len() as u64);
            bytes.extend(tile.make(&Numbers).unwrap().bytes());
            largest = largest.max(tile.bytes() as usize);
        }
        (bytes, largest)
    }

    #[test]
    fn tiles_make_up_the_weight_and_are_taller_across_its_source() {
        let straight = recipe([4500, 1100], false);
        let (bytes, largest) = made(part(&straight, [4500, 1100], [all(4500), all(1100)], 4));
        assert!(bytes == read_all(&straight, &Numbers).unwrap().data.bytes());
        assert!(largest as u64 <= TILE_BYTES);
        // A tile of 16 MiB would take 1 KiB of each row of 24 KiB.
        let across = recipe([33000, 6000], true);
        let tiles = part(&across, [6000, 33000], [all(6000), all(33000)], 2).tiles().unwrap();
        assert!(tiles[0].bytes() > 4 * TILE_BYTES && tiles[0].bytes() <= TALL_TILE_BYTES, "{}", tiles[0].bytes());
        let small = recipe([1500, 1700], true);
        let (bytes, _) = made(part(&small, [1700, 1500], [all(1700), all(1500)], 2));
        assert!(bytes == read_all(&small, &Numbers).unwrap().data.bytes());
    }

    #[test]
    fn large_rows_are_cut_along_the_next_dimension() {
        let sizes = [1u64, 3, 2500, 2000];
        let ty = TensorType::new(DType::F32, &sizes);
        let whole = Recipe::source(ty.clone(), Source::File { file: 0, offset: 0 });
        let mut doubled = whole.clone();
        let dims = ty.dims.clone();
        let sum = Expr::operand(0).binary(planfile::Binary::Add, Expr::operand(0));
        doubled.spec = Spec::of(Op::Pointwise { expr: sum, dims }, vec![ty]).unwrap();
        // Of the second and third matrix in this order, all rows but the first: the rest of the part is padding.
        let runs = [
            all(1),
            vec![PlanPiece { global: 2, local: 1, len: 1 }, PlanPiece { global: 1, local: 0, len: 1 }],
            vec![PlanPiece { global: 1, local: 0, len: 2499 }],
            all(2000),
        ];
        for recipe in [&whole, &doubled] {
            let part = Part {
                recipe,
                local: vec![1, 2, 2500, 2000],
                runs: runs.to_vec(),
                element_bytes: 4,
                bytes: 2 * 2500 * 2000 * 4,
                lead: 0,
                start: 0,
            };
            let (bytes, largest) = made(part);
            assert!(largest as u64 <= TILE_BYTES, "{largest}");
            let elements = read_all(recipe, &Numbers).unwrap();
            let elements = elements.elements::<f32>().unwrap();
            let matrix = |number: usize| [&elements[number * 5_000_000 + 2000..][..4_998_000], &[0.0; 2000]].concat();
            let expected: Vec<u8> = [matrix(1), matrix(2)].concat().iter().flat_map(|x| x.to_le_bytes()).collect();
            assert!(bytes == expected, "{recipe:?}");
        }
    }

    #[test]
    fn parts_hold_their_pieces_and_zeros_elsewhere() {
        let recipe = recipe([40, 30], true);
        let whole = read_all(&recipe, &Numbers).unwrap();
        let piece = |global, local, len| PlanPiece { global, local, len };
        // Columns of two segments, and one of padding.
        let runs = [vec![piece(10, 0, 15)], vec![piece(4, 0, 6), piece(24, 6, 6)]];
        let (bytes, _) = made(part(&recipe, [15, 13], runs, 2));
        let mut expected = vec![0; 15 * 13 * 2];
        for row in 0..15 {
            for (global, local) in (4..10).zip(0..6).chain((24..30).zip(6..12)) {
                let (from, to) = (((row + 10) * 40 + global) * 2, (row * 13 + local) * 2);
                expected[to..to + 2].copy_from_slice(&whole.data.bytes()[from..from + 2]);
            }
        }
        assert_eq!(bytes, expected);
    }
}
