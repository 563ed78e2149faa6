//! The bytes of a plan's weights section: each rank's part of each weight, from its recipe, a tile at a time.
//!
//! Tiles are made on several threads and leave in order; how many are in memory at once is bounded, whatever the weights'
//! sizes. `tile` says what shapes they have.

mod in_order;
mod tile;

use std::collections::BTreeMap;

use cpu::recipe::{RecipeError, WeightBytes};
use planfile::plan::{PlacedWeight, Plan};
use thiserror::Error;

use self::in_order::in_order;
use self::tile::{Fault, Part};

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
/// Holds less than 1 GiB, and less than 150 MiB unless a large weight is transposed.
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
    let (mut tiles, mut end) = (Vec::new(), 0);
    for (start, (placed, position)) in parts {
        let named = |fault| error(plan, placed, fault);
        // Images that overlap in part are no plan of ours, though they may verify.
        if start < end {
            return Err(named(Fault::Layout));
        }
        let part = Part::new(&plan.manifest, placed, position).map_err(named)?;
        end = start + part.bytes();
        for tile in part.tiles().map_err(named)? {
            tiles.push((start, placed, tile));
        }
    }
    let mut at = 0;
    in_order(
        &tiles,
        |(_, _, tile)| tile.bytes(),
        |(_, _, tile)| tile.make(bytes),
        |(start, placed, tile), made| {
            let made = made.map_err(|fault| error(plan, placed, fault))?;
            let first = start + tile.offset();
            zeros(first - at, &mut sink)?;
            at = first + made.len() as u64;
            sink(made.bytes()).map_err(ImageError::Sink)
        },
    )?;
    zeros(plan.manifest.image_bytes.saturating_sub(at), &mut sink)
}

fn error<E: std::error::Error>(plan: &Plan, placed: &PlacedWeight, fault: Fault) -> ImageError<E> {
    let weight = plan.manifest.weights.get(placed.weight as usize);
    let weight = weight.map(|weight| weight.name.clone()).unwrap_or_default();
    match fault {
        Fault::Layout => ImageError::Layout { weight },
        Fault::Recipe(source) => ImageError::Recipe { weight, source },
    }
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
