//! Weights in the ranks' arenas and their images in the file.

use std::collections::BTreeMap;

use super::{ARENA_ALIGN, Report, sound_bytes, splits};
use crate::plan::{Manifest, PlacedWeight, Plan};
use crate::text::count;

pub(super) fn check(plan: &Plan, stages: &BTreeMap<u32, Vec<u32>>, report: &mut Report) {
    let manifest = &plan.manifest;
    let mut ranges: BTreeMap<u32, Vec<(u64, u64, u32)>> = BTreeMap::new();
    for (index, placed) in manifest.placed.iter().enumerate() {
        match check_one(manifest, placed, stages) {
            Ok(end) => ranges.entry(placed.stage).or_default().push((placed.arena_offset, end, placed.weight)),
            Err(what) => report.add(format_args!("placed weight {index}"), what),
        }
    }
    // Stages share no rank, so weights of different stages never share an arena.
    for (stage, mut ranges) in ranges {
        ranges.retain(|range| range.0 < range.1);
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            let name = |weight: u32| manifest.weights.get(weight as usize).map_or("", |weight| &weight.name);
            report.require(pair[0].1 <= pair[1].0, format_args!("stage {stage}"), || {
                format!("weights `{}` and `{}` overlap", name(pair[0].2), name(pair[1].2))
            });
        }
    }
}

/// The end of its range in the arena.
fn check_one(manifest: &Manifest, placed: &PlacedWeight, stages: &BTreeMap<u32, Vec<u32>>) -> Result<u64, String> {
    let weights = manifest.weights.len();
    let weight = manifest.weights.get(placed.weight as usize);
    let weight = weight.ok_or_else(|| format!("is weight {} of {weights}", placed.weight))?;
    let named = |what: String| format!("`{}`: {what}", weight.name);
    if stages.get(&placed.stage) != Some(&placed.ranks) {
        return Err(named(format!("is on ranks {:?}, which are not those of stage {}", placed.ranks, placed.stage)));
    }
    let bytes = sound_bytes(&placed.ty).map_err(named)?;
    splits::check(&weight.ty, &placed.ty, placed.ranks.len(), &placed.splits).map_err(named)?;
    let offset = placed.arena_offset;
    if !offset.is_multiple_of(ARENA_ALIGN) {
        return Err(named(format!("offset {offset} is not a multiple of {ARENA_ALIGN}")));
    }
    let end = offset.checked_add(bytes).ok_or_else(|| named(format!("{bytes} bytes at {offset} overflow")))?;
    for &rank in &placed.ranks {
        let arena = manifest.weight_arena_bytes.get(rank as usize).copied().unwrap_or(0);
        if end > arena {
            return Err(named(format!(
                "{} at {offset} of {arena} of the weight arena of rank {rank}",
                count(bytes, "byte")
            )));
        }
    }
    if placed.images.len() != placed.ranks.len() {
        return Err(named(format!("{} images for {} ranks", placed.images.len(), placed.ranks.len())));
    }
    for &image in &placed.images {
        if image.checked_add(bytes).is_none_or(|end| end > manifest.image_bytes) {
            let all = manifest.image_bytes;
            return Err(named(format!("image of {} at {image} of {all} of the weights section", count(bytes, "byte"))));
        }
    }
    Ok(end)
}
