//! The bytes of a plan's weights section: each rank's part of each weight, from its recipe, a tile at a time.

use std::collections::BTreeMap;

use cpu::recipe::{RecipeError, Region, WeightBytes, read_region};
use planfile::plan::{PlacedWeight, Plan, PlanPiece};
use planfile::types::strides;
use thiserror::Error;

/// Most bytes of a weight in memory at once, unless a single row is larger.
pub const TILE_BYTES: u64 = 16 << 20;

/// Why the weights section could not be made.
#[derive(Debug, Error)]
pub enum ImageError<E: std::error::Error + 'static> {
    #[error("weight `{weight}`: {source}")]
    Recipe { weight: String, source: RecipeError },
    #[error("weight `{weight}` has no place in the image")]
    Layout { weight: String },
    #[error(transparent)]
    Sink(E),
}

/// Produces the section from its start to its end and hands it to `sink` in pieces, gaps between weights as zeros.
///
/// # Errors
/// [`ImageError::Recipe`] when a source cannot be read; [`ImageError::Sink`] with what `sink` reports.
pub fn write<E: std::error::Error>(
    plan: &Plan,
    bytes: &dyn WeightBytes,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), ImageError<E>> {
    let mut parts = BTreeMap::new();
    for placed in &plan.manifest.placed {
        for (position, &image) in placed.images.iter().enumerate() {
            parts.entry(image).or_insert((placed, position));
        }
    }
    let mut at = 0;
    for (start, (placed, position)) in parts {
        // Images that overlap in part are no plan of ours, though they may verify.
        let gap = start.checked_sub(at).ok_or_else(|| ImageError::Layout { weight: weight_name(plan, placed) })?;
        zeros(gap, &mut sink)?;
        at = start + write_part(plan, placed, position, bytes, &mut sink)?;
    }
    zeros(plan.manifest.image_bytes.saturating_sub(at), &mut sink)
}

fn weight_name(plan: &Plan, placed: &PlacedWeight) -> String {
    plan.manifest.weights.get(placed.weight as usize).map(|weight| weight.name.clone()).unwrap_or_default()
}

fn zeros<E: std::error::Error>(count: u64, sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), ImageError<E>> {
    let block = [0; 4096];
    let mut left = count;
    while left > 0 {
        let now = left.min(block.len() as u64);
        sink(&block[..now as usize]).map_err(ImageError::Sink)?;
        left -= now;
    }
    Ok(())
}

/// Writes one rank's part; returns its size in bytes.
fn write_part<E: std::error::Error>(
    plan: &Plan,
    placed: &PlacedWeight,
    position: usize,
    bytes: &dyn WeightBytes,
    sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<u64, ImageError<E>> {
    let weight = plan.manifest.weights.get(placed.weight as usize);
    let name = || weight_name(plan, placed);
    let layout = || ImageError::Layout { weight: name() };
    let weight = weight.ok_or_else(layout)?;
    let total = placed.ty.bytes().ok_or_else(layout)?;
    let (local, global, element) = (placed.ty.sizes(), weight.ty.sizes(), placed.ty.dtype.bytes() as u64);
    // Per dimension, the runs of the whole weight that this rank holds.
    let mut runs: Vec<Vec<PlanPiece>> =
        global.iter().map(|&len| vec![PlanPiece { global: 0, local: 0, len }]).collect();
    for split in &placed.splits {
        let pieces = split.pieces.get(position).ok_or_else(layout)?;
        *runs.get_mut(usize::from(split.dim)).ok_or_else(layout)? = pieces.clone();
    }
    let rows = local.first().copied().unwrap_or(1);
    let row_bytes = total.checked_div(rows).unwrap_or(0);
    let rows_per_tile = (TILE_BYTES / row_bytes.max(1)).max(1);
    let mut first = 0;
    while first < rows && total > 0 {
        let count = rows_per_tile.min(rows - first);
        let mut tile = vec![0; (count * row_bytes) as usize];
        for region in boxes(&runs, first, count) {
            let len = region.iter().map(|run| run.len).product::<u64>() * element;
            let mut part = vec![0; len as usize];
            let wanted = Region {
                starts: region.iter().map(|run| run.global).collect(),
                sizes: region.iter().map(|run| run.len).collect(),
            };
            read_region(&weight.recipe, &wanted, bytes, &mut part)
                .map_err(|source| ImageError::Recipe { weight: name(), source })?;
            paste(&part, &mut tile, &region, &local, first, element);
        }
        sink(&tile).map_err(ImageError::Sink)?;
        first += count;
    }
    Ok(total)
}

/// Every combination of one run per dimension, the leading one cut to local rows `first..first + count`.
fn boxes(runs: &[Vec<PlanPiece>], first: u64, count: u64) -> Vec<Vec<PlanPiece>> {
    let mut boxes: Vec<Vec<PlanPiece>> = vec![Vec::new()];
    for (dim, runs) in runs.iter().enumerate() {
        let mut extended = Vec::new();
        for prefix in &boxes {
            for run in runs {
                let (mut start, mut end) = (run.local, run.local + run.len);
                if dim == 0 {
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

/// Copies a dense box to where it lies in the tile, which begins at local row `first`.
fn paste(part: &[u8], tile: &mut [u8], region: &[PlanPiece], local: &[u64], first: u64, element: u64) {
    let Some(last) = region.last() else {
        tile.copy_from_slice(part);
        return;
    };
    let strides = strides(local);
    let run = (last.len * element) as usize;
    let mut index = vec![0; region.len() - 1];
    for source in part.chunks_exact(run.max(1)) {
        let row = |dim: usize| index.get(dim).copied().unwrap_or(0) + region[dim].local;
        let offset: u64 = (0..region.len()).map(|dim| row(dim) * strides[dim]).sum();
        let start = ((offset - first * strides[0]) * element) as usize;
        tile[start..start + run].copy_from_slice(source);
        for dim in (0..index.len()).rev() {
            index[dim] += 1;
            if index[dim] < region[dim].len {
                break;
            }
            index[dim] = 0;
        }
    }
}
