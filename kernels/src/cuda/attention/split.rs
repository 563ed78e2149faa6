//! Attention of few query rows: the work is not in the rows but in reading keys and values, which are split.
//!
//! before  a block for each head, one warp of it at work     after  a cluster for each group of heads (and tile of their
//!         reads all keys                                           rows), each warp of it reads a run of the keys
//!
//! See `kernels/cuda/attention_split.cu`. Where there are no clusters (before `sm_90`), the warps of one block share the
//! keys.

use planfile::launch::Factor;
use planfile::op::Causal;
use planfile::{Cuda, DType, Spec};

use super::super::CLUSTER_MAX;
use super::super::Launch;
use super::super::block::{Shape, Unit, sizes_of, tiles};
use super::{COMMON, Matched, TILES_WIDTH_MAX, is_wide};

const BODY: &str =
    concat!(include_str!("../../../cuda/cluster.cuh"), "\n", include_str!("../../../cuda/attention_split.cu"));

/// Queries of a head for which keys are split, at most: beyond, tiles of queries are enough work, and read keys and values no more often.
pub const FEW_QUERIES: u64 = 16;
/// Widest values without tensor cores: a lane has a column of each 32.
const LANES_WIDTH_MAX: u64 = 256;
const WARPS_MAX: u64 = 8;
/// Keys of a tile.
const KEY_TILE: u64 = 16;
/// Tiles of keys that a warp reads ahead, at most.
const STAGES_MAX: u64 = 3;
/// Blocks that surely run at once: with clusters, not all multiprocessors of a GPU are of use, and a second turn costs
/// more than a cluster of half as many blocks.
const BLOCKS_AT_ONCE: u64 = 112;

/// What is computed.
#[derive(Clone, Copy, Debug)]
struct Few {
    dtype: DType,
    batches: u64,
    groups: u64,
    /// Of a group: all queries of all its heads.
    rows: u64,
    /// That any row sees.
    keys: u64,
    features: u64,
    values: u64,
}

/// How it is divided; the names are those of the constants above the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Division {
    row_tile: u64,
    blocks: u64,
    warps: u64,
    stages: u64,
    features_padded: u64,
    feature_pitch: u64,
    values_padded: u64,
    value_pitch: u64,
    arrivals_at: u64,
    q_at: u64,
    weights_at: u64,
    ring_at: u64,
    shared_bytes: u64,
}

impl Matched<'_> {
    /// `None` where there are many query rows, or where a tile of keys and values has no room.
    pub(super) fn split(&self, spec: &Spec, mut unit: Unit, architecture: Cuda) -> Option<Launch> {
        if self.queries > FEW_QUERIES {
            return None;
        }
        let few = Few {
            dtype: self.dtype,
            batches: self.batches,
            groups: self.groups,
            rows: (self.heads / self.groups.max(1)).checked_mul(self.queries)?,
            keys: match self.causal {
                Some(Causal::FromStart) => self.keys.min(self.queries),
                Some(Causal::FromEnd) | None => self.keys,
            },
            features: self.features,
            values: self.values,
        };
        let division = Division::of(few, architecture)?;
        let sizes = [
            ("ROW_TILE", division.row_tile),
            ("KEY_TILE", KEY_TILE),
            ("BLOCKS", division.blocks),
            ("WARPS", division.warps),
            ("STAGES", division.stages),
            ("FEATURES_PADDED", division.features_padded),
            ("FEATURE_PITCH", division.feature_pitch),
            ("VALUES_PADDED", division.values_padded),
            ("VALUE_PITCH", division.value_pitch),
            ("ARRIVALS_AT", division.arrivals_at),
            ("Q_AT", division.q_at),
            ("WEIGHTS_AT", division.weights_at),
            ("RING_AT", division.ring_at),
        ];
        for (name, value) in sizes {
            unit.int(name, value.cast_signed());
        }
        let access = 16 / self.dtype.bytes() as u64;
        for (name, view, width) in
            [("Q", &self.q, self.features), ("K", &self.k, self.features), ("V", &self.v, self.values)]
        {
            unit.flag(&format!("{name}_IS_WIDE"), is_wide(view.offset, &view.axes, width, access));
        }
        unit.text(format_args!("#define ATTENTION_TENSOR_CORES {}", i32::from(few.tensor_cores())));
        // Rows are those of all heads of a group.
        let rows_of_groups = self.groups.max(1).checked_mul(division.row_tile)?;
        let blocks = [
            tiles(sizes_of(self.value, 0..1), 1),
            tiles(sizes_of(self.keys_value, 1..2), 1),
            tiles(sizes_of(self.value, 1..3), rows_of_groups),
            Factor::Count(division.blocks),
        ];
        let shape = Shape::flat(blocks, 32 * u32::try_from(division.warps).ok()?);
        let shape = shape.shared(u32::try_from(division.shared_bytes).ok()?);
        let shape = shape.cluster(u32::try_from(division.blocks).ok()?);
        self.launch(spec, unit, "attention_split", &format!("{COMMON}\n{BODY}"), shape)
    }
}

impl Few {
    fn tensor_cores(self) -> bool {
        matches!(self.dtype, DType::F16 | DType::BF16)
    }

    /// Pieces of work that share no keys, or no rows.
    fn units(self, row_tile: u64) -> Option<u64> {
        self.batches.checked_mul(self.groups)?.checked_mul(self.rows.div_ceil(row_tile))
    }
}

impl Division {
    fn of(few: Few, architecture: Cuda) -> Option<Self> {
        let widest = if few.tensor_cores() { TILES_WIDTH_MAX } else { LANES_WIDTH_MAX };
        if few.features > widest || few.values > widest {
            return None;
        }
        let row_tile = match (few.tensor_cores(), few.dtype) {
            (true, _) => 16,
            (false, DType::F64) => few.rows.next_power_of_two().min(4),
            (false, _) => few.rows.next_power_of_two().min(8),
        };
        let tiles = few.keys.div_ceil(KEY_TILE).max(1);
        let most = if architecture.has_clusters() { CLUSTER_MAX } else { 1 };
        let units = few.units(row_tile)?.max(1);
        let warps_wanted = tiles.next_power_of_two().min(WARPS_MAX);
        // Each warp has a tile.
        let fits = |blocks: u64| {
            units.saturating_mul(blocks) <= BLOCKS_AT_ONCE && blocks <= most && blocks * warps_wanted <= tiles
        };
        let mut blocks = 1;
        while fits(2 * blocks) {
            blocks *= 2;
        }
        // Where all tiles come at once, the more warps the better; elsewhere more of them only wait for each other.
        let warps_wanted = if tiles.div_ceil(blocks * warps_wanted) <= STAGES_MAX {
            warps_wanted
        } else {
            warps_wanted.min(WARPS_MAX / 2)
        };
        let of_warp = |warps: u64| tiles.div_ceil(blocks * warps);
        let choices = [8, 4, 2, 1].into_iter().filter(|&warps| warps <= warps_wanted);
        // One tile is multiplied while another comes, or else as many warps as fit.
        let two = choices.clone().find_map(|warps| {
            let of_warp = of_warp(warps);
            (1..=STAGES_MAX.min(of_warp))
                .rev()
                .take_while(|&stages| stages >= of_warp.min(2))
                .find_map(|stages| Self::with(few, architecture, [row_tile, blocks, warps, stages]))
        });
        two.or_else(|| choices.clone().find_map(|warps| Self::with(few, architecture, [row_tile, blocks, warps, 1])))
    }

    /// `None` where this does not fit in shared memory.
    fn with(few: Few, architecture: Cuda, [row_tile, blocks, warps, stages]: [u64; 4]) -> Option<Self> {
        let element = few.dtype.bytes() as u64;
        let value = element.max(4);
        let access = 16 / element;
        let padded = |width: u64, unit: u64| width.max(1).next_multiple_of(unit);
        // Rows that are read across begin an odd number of accesses apart: eight of them lie in different banks.
        let pitch = |width: u64| ((width / access) | 1) * access;
        let (features_padded, values_padded) = if few.tensor_cores() {
            (padded(few.features, 16), padded(few.values, 16))
        } else {
            (padded(few.features, 2 * access), padded(few.values, 32))
        };
        let feature_pitch = pitch(features_padded);
        let value_pitch = if few.tensor_cores() { pitch(values_padded) } else { values_padded };
        let rows = few.rows.min(row_tile);
        let sent = if blocks > 1 { blocks * ((rows * few.values).div_ceil(blocks) + 2 * rows) * value } else { 0 };
        let arrivals_at = sent.next_multiple_of(16);
        let q_at = arrivals_at + 16;
        let weights_at = q_at + row_tile * feature_pitch * element;
        let weights = if few.tensor_cores() { 0 } else { warps * KEY_TILE * row_tile * value };
        let ring_at = (weights_at + weights).next_multiple_of(16);
        let ring = warps * stages * KEY_TILE * (feature_pitch + value_pitch) * element;
        let parts = warps * rows * (values_padded + 8 + 2) * value;
        let shared_bytes = ring_at + ring.max(parts);
        (shared_bytes <= u64::from(architecture.shared_bytes_max())).then_some(Self {
            row_tile,
            blocks,
            warps,
            stages,
            features_padded,
            feature_pitch,
            values_padded,
            value_pitch,
            arrivals_at,
            q_at,
            weights_at,
            ring_at,
            shared_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(dtype: DType, batches: u64, keys: u64) -> Few {
        Few { dtype, batches, groups: 8, rows: 4, keys, features: 128, values: 128 }
    }

    fn cuda(name: &str) -> Cuda {
        name.parse().unwrap()
    }

    fn divided(few: Few, architecture: Cuda) -> Division {
        Division::of(few, architecture).unwrap()
    }

    #[test]
    fn few_heads_spread_their_keys_over_a_cluster_and_many_do_not() {
        let blocks = |batches, keys| divided(decode(DType::BF16, batches, keys), cuda("sm_90a")).blocks;
        assert_eq!([1, 2, 4, 16].map(|batches| blocks(batches, 2048)), [8, 4, 2, 1]);
        // A block has no more warps than there are tiles of keys.
        assert_eq!([16, 100, 256, 100_000].map(|keys| blocks(1, keys)), [1, 1, 2, 8]);
    }

    #[test]
    fn warps_are_many_where_all_tiles_come_at_once() {
        let warps = |keys| divided(decode(DType::BF16, 1, keys), cuda("sm_90a")).warps;
        assert_eq!([2048, 2049, 4097, 100_000].map(warps), [8, 8, 4, 4]);
    }

    #[test]
    fn without_clusters_a_block_has_all_keys() {
        for architecture in ["sm_80", "sm_86", "sm_89"].map(cuda) {
            assert_eq!(divided(decode(DType::F16, 1, 8192), architecture).blocks, 1, "{architecture}");
        }
    }

    #[test]
    fn any_few_rows_have_room() {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            for architecture in ["sm_80", "sm_86", "sm_90a", "sm_100a", "sm_120"].map(cuda) {
                for (rows, keys) in [(1, 1), (3, 40), (4, 2048), (16, 515), (128, 4096)] {
                    for (features, values) in [(0, 8), (20, 36), (64, 64), (128, 128), (256, 256)] {
                        let few = Few { dtype, batches: 1, groups: 2, rows, keys, features, values };
                        let division = divided(few, architecture);
                        let what = format!("{few:?} on {architecture}: {division:?}");
                        assert!(division.shared_bytes <= u64::from(architecture.shared_bytes_max()), "{what}");
                        assert!(division.blocks == 1 || architecture.has_clusters(), "{what}");
                        let tiles = few.keys.div_ceil(KEY_TILE).next_power_of_two();
                        assert!(division.blocks * division.warps <= tiles, "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn wide_heads_are_refused() {
        let wide = |features, values| Few { features, values, ..decode(DType::F32, 1, 100) };
        for few in [wide(257, 128), wide(128, 300)] {
            assert_eq!(Division::of(few, cuda("sm_90a")), None, "{few:?}");
        }
    }
}
