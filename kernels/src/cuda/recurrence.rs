//! Recurrent layers: one launch for all steps, a cluster of blocks for each direction and tile of samples.
//!
//! Each block of a cluster owns some of the hidden units; states are exchanged through shared memory, and as many weights
//! as fit stay in registers and shared memory for all steps. Where there are no clusters (before `sm_90`), and for small
//! layers, one block has all units. Half types use tensor cores, but for GRUs that reset early: their scaled state stays
//! in `f32`.
//!
//! Two states of a sample, and the cells of a block's units, must fit in shared memory. In clusters (227 KiB) that is so
//! up to 26,000 hidden units of `f32`. On `sm_80` (163 KiB) it is up to 20,000, or 13,000 of an LSTM and of a GRU that
//! resets early; on `sm_86` (99 KiB) up to 60 % of that; of `f64` half as many. Wider ones have no kernel.

use planfile::launch::Factor;
use planfile::op::Cell;
use planfile::{Cuda, DType, Expr, Op, Spec};

use super::block::{Only, Shape, Unit, tiles};
use super::generated::function;
use super::{CLUSTER_MAX, CudaTarget, Launch};

const BODY: &str = concat!(
    include_str!("../../cuda/cluster.cuh"),
    "\n",
    include_str!("../../cuda/recurrence.cuh"),
    "\n",
    include_str!("../../cuda/recurrence.cu"),
);

/// Blocks that surely run at once: with clusters, not all multiprocessors of a GPU are of use.
const BLOCKS_AT_ONCE: u64 = 112;
/// The same where weights are read in each step: they share the second-level cache.
const BLOCKS_STREAMING: u64 = 48;
/// Weights of a block that registers and shared memory serve faster than another block's exchange would.
const SLICE_BYTES: u64 = 128 << 10;
const WARPS_MAX: u64 = 16;
/// Registers of a thread besides weights, states, sums and elements that are read ahead: for one unit of a sample, and
/// for each one more.
const REGISTERS_BESIDES: [u64; 2] = [44, 10];
/// Registers of a thread, at most.
const REGISTERS_MAX: u64 = 224;
/// Tiles of a warp that hold weights or read ahead, at most: code is repeated for each.
const TILES_HELD_MAX: u64 = 2;
/// Elements that a thread reads ahead, at most.
const AHEAD_MAX: u64 = 8;

/// What is computed.
#[derive(Clone, Copy, Debug)]
struct Layer {
    cell: Cell,
    dtype: DType,
    steps: u64,
    batch: u64,
    directions: u64,
    hidden: u64,
}

impl Layer {
    fn gates(self) -> u64 {
        self.cell.gates()
    }

    fn resets_early(self) -> bool {
        self.cell == Cell::Gru { resets_late: false }
    }

    /// Whether values beside the states last from one phase or step to the next.
    fn has_cells(self) -> bool {
        self.resets_early() || matches!(self.cell, Cell::Lstm { .. })
    }

    fn tensor_cores(self) -> bool {
        matches!(self.dtype, DType::F16 | DType::BF16) && !self.resets_early()
    }

    /// Bytes of an element, of a value that is computed, and of an element of the state.
    fn bytes(self) -> [u64; 3] {
        let element = self.dtype.bytes() as u64;
        let value = element.max(4);
        [element, value, if self.tensor_cores() { element } else { value }]
    }
}

/// How a layer is divided; the names are those of the constants above the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Division {
    blocks: u64,
    units: u64,
    samples: u64,
    sample_tiles: u64,
    warps: u64,
    tiles: u64,
    tile_units: u64,
    vector: u64,
    chunks: u64,
    held: u64,
    resident: u64,
    ahead: bool,
    state_pitch: u64,
    weight_pitch: u64,
    weights_at: u64,
    cells_at: u64,
    sums_at: u64,
    ends_at: u64,
    shared_bytes: u64,
}

pub(super) fn select(spec: &Spec, target: &CudaTarget) -> Option<Launch> {
    let only = Only::of(spec)?;
    let Op::Recurrence { cell, reverse, functions, bias, peepholes, lengths } = only.op else { return None };
    if let Some(nothing) = only.nothing() {
        return Some(nothing);
    }
    let (x, state) = (only.operands[0].sizes(), only.operands[2].sizes());
    let [steps, batch] = [*x.first()?, *x.get(1)?];
    let [directions, hidden] = [*state.first()?, *state.get(2)?];
    let layer = Layer { cell: *cell, dtype: only.operands[0].dtype, steps, batch, directions, hidden };
    // Counts, and rows of the weights, are `int` in the body.
    if [steps, batch, hidden].iter().any(|&count| count >= 1 << 28) {
        return None;
    }
    let division = Division::of(layer, target.architecture)?;
    let all: Vec<_> = only.operands.iter().copied().chain(&only.results).collect();
    let mut unit = Unit::indexing(&all);
    declare(&mut unit, layer, &division);
    for (name, present) in [("HAS_BIAS", bias), ("HAS_PEEPHOLES", peepholes), ("HAS_LENGTHS", lengths)] {
        unit.flag(name, *present);
    }
    unit.alias("Length", only.operands.last().filter(|_| *lengths).map_or(DType::I64, |ty| ty.dtype));
    let backwards = |direction: usize| reverse.get(direction).copied().unwrap_or_default();
    let (first, second) = (backwards(0), backwards(directions as usize - 1));
    unit.text(format_args!("DEVICE bool is_reverse(int direction) {{ return direction == 0 ? {first} : {second}; }}"));
    declare_functions(&mut unit, layer, functions)?;

    let mut at = 3;
    let mut passed = |present: bool| {
        at += usize::from(present);
        if present { only.argument(at - 1) } else { "nullptr" }
    };
    let lstm = matches!(cell, Cell::Lstm { .. });
    let optional = [lstm, *bias, *peepholes, *lengths].map(&mut passed).join(", ");
    let results = [true, true, lstm].map(passed).join(", ");
    let call =
        format!("recurrence({}, {}, {}, {optional}, {results})", only.argument(0), only.argument(1), only.argument(2));
    let blocks = [
        tiles(only.sizes_of_operand(2, [0]), 1),
        tiles(only.sizes_of_operand(0, [1]), division.samples),
        Factor::Count(division.blocks),
    ];
    let shape = Shape::flat(blocks, 32 * u32::try_from(division.warps).ok()?);
    let shape = shape.shared(u32::try_from(division.shared_bytes).ok()?).cluster(u32::try_from(division.blocks).ok()?);
    only.launch_call(unit, "recurrence", BODY, &call, shape)
}

fn declare(unit: &mut Unit, layer: Layer, division: &Division) {
    unit.alias("Element", layer.dtype);
    let kind = match layer.cell {
        Cell::Rnn => 0,
        Cell::Gru { .. } => 1,
        Cell::Lstm { coupled } => 2 + i64::from(coupled),
    };
    unit.text(format_args!(
        "#define RECURRENCE_TENSOR_CORES {}\n#define RECURRENCE_RESETS_EARLY {}",
        i32::from(layer.tensor_cores()),
        i32::from(layer.resets_early()),
    ));
    unit.int("KIND", kind);
    unit.flag("AHEAD", division.ahead);
    let sizes = [
        ("GATES", layer.gates()),
        ("STEPS", layer.steps),
        ("BATCH", layer.batch),
        ("DIRECTIONS", layer.directions),
        ("HIDDEN", layer.hidden),
        ("BLOCKS", division.blocks),
        ("UNITS", division.units),
        ("SAMPLES", division.samples),
        ("SAMPLE_TILES", division.sample_tiles),
        ("WARPS", division.warps),
        ("TILES", division.tiles),
        ("TILE_UNITS", division.tile_units),
        ("VECTOR", division.vector),
        ("CHUNKS", division.chunks),
        ("HELD", division.held),
        ("RESIDENT", division.resident),
        ("STATE_PITCH", division.state_pitch),
        ("WEIGHT_PITCH", division.weight_pitch),
        ("WEIGHTS_AT", division.weights_at),
        ("CELLS_AT", division.cells_at),
        ("SUMS_AT", division.sums_at),
        ("ENDS_AT", division.ends_at),
    ];
    for (name, value) in sizes {
        unit.int(name, value.cast_signed());
    }
    unit.flag("IS_WIDE", layer.hidden.is_multiple_of(division.vector));
}

/// `Value name(int direction, Value x)` for each function that the cell has; those it has not are the operand itself.
fn declare_functions(unit: &mut Unit, layer: Layer, functions: &[Expr]) -> Option<()> {
    let count = layer.cell.functions();
    let computing = layer.dtype.accumulator();
    let value = computing.name();
    for (index, name) in ["gate_function", "new_function", "shown_function"].into_iter().enumerate() {
        let itself = Expr::operand(0);
        let of = |direction: usize| {
            if index < count { functions.get(direction * count + index) } else { Some(&itself) }
        };
        let (first, last) = (of(0)?, of(layer.directions as usize - 1)?);
        let own = |number: usize| format!("{name}_{number}");
        let mut choice = format!("{}(x)", own(0));
        unit.text(format_args!("{}", function(&own(0), first, computing)?));
        if last != first {
            unit.text(format_args!("{}", function(&own(1), last, computing)?));
            choice = format!("direction == 0 ? {choice} : {}(x)", own(1));
        }
        unit.text(format_args!(
            "DEVICE {value} {name}([[maybe_unused]] int direction, {value} x) {{ return {choice}; }}"
        ));
    }
    Some(())
}

impl Division {
    fn of(layer: Layer, architecture: Cuda) -> Option<Self> {
        let [element, ..] = layer.bytes();
        let row_bytes = layer.hidden.checked_mul(element)?;
        let slice = |blocks: u64| layer.hidden.div_ceil(blocks).saturating_mul(layer.gates()).saturating_mul(row_bytes);
        let most = if architecture.has_clusters() { CLUSTER_MAX } else { 1 };
        let own = if layer.dtype == DType::F64 { SLICE_BYTES / 2 } else { SLICE_BYTES };
        let blocks = [1, 2, 4].into_iter().find(|&blocks| blocks >= most || slice(blocks) <= own).unwrap_or(most);
        let at_once = if slice(blocks) <= 2 * own { BLOCKS_AT_ONCE } else { BLOCKS_STREAMING };
        let clusters = (at_once / blocks).max(1);
        let fills = |samples: &u64| layer.directions.saturating_mul(layer.batch.div_ceil(*samples)) <= clusters;
        let choices: &[u64] = match (layer.tensor_cores(), layer.dtype) {
            (true, _) => &[8, 16],
            (false, DType::F64) => &[1, 2, 4],
            (false, _) => &[1, 2, 4, 8],
        };
        let found = choices.iter().copied().find(fills).or(choices.last().copied())?;
        // Samples go evenly to tiles; to smaller ones where states are large.
        let mut tile = found;
        loop {
            let samples = layer.batch.div_ceil(layer.batch.div_ceil(tile)).max(1);
            if let Some(division) = Self::with(layer, architecture, blocks, samples) {
                return Some(division);
            }
            if tile == 1 {
                return None;
            }
            tile /= 2;
        }
    }

    /// `None` where states do not fit in shared memory.
    fn with(layer: Layer, architecture: Cuda, blocks: u64, samples: u64) -> Option<Self> {
        let [element, value, state] = layer.bytes();
        let (gates, hidden, tensor_cores) = (layer.gates(), layer.hidden, layer.tensor_cores());
        let units = hidden.div_ceil(blocks);
        let columns = samples.div_ceil(8);
        let tile_units = if tensor_cores {
            if gates == 1 { 16 } else { 4 }
        } else {
            // Rows of a tile share what is read of the state; sums of all samples are one for each lane at most.
            let fits = |units: &u64| {
                let rows = gates * units;
                *units == 1
                    || (rows <= 8 && rows * samples * value <= 128 && hidden.div_ceil(blocks).div_ceil(*units) >= 8)
            };
            [8, 4, 2, 1].into_iter().find(fits)?
        };
        let vector = if tensor_cores {
            8
        } else {
            // Rows begin where packs do, and a chunk is no more than twice as long as what there is.
            let (widest, narrowest) = (16 / value, if element == 2 { 2 } else { 1 });
            let fits =
                |vector: &u64| *vector == narrowest || (hidden.is_multiple_of(*vector) && 32 * (vector / 2) < hidden);
            std::iter::successors(Some(widest), |vector| Some(vector / 2)).find(fits)?
        };
        let span = if tensor_cores { 32 } else { 32 * vector };
        let chunks = hidden.div_ceil(span);
        let all_tiles = units.div_ceil(tile_units);
        let tiles = all_tiles.div_ceil(WARPS_MAX);
        let warps = all_tiles.div_ceil(tiles);
        let rounds = (tile_units * samples).div_ceil(32);

        let (lane_rows, sums) =
            if tensor_cores { (2, 16 * 8 * columns) } else { (gates * tile_units, gates * tile_units * samples) };
        let registers = (65_536 / (32 * warps)).min(REGISTERS_MAX);
        let of_sums = if tensor_cores { 16 * columns } else { sums.next_power_of_two() * value / 4 };
        let of_items = REGISTERS_BESIDES[0] + REGISTERS_BESIDES[1] * (tiles * rounds - 1) + 2 * tiles * rounds * gates;
        let states = if tensor_cores { 2 * 4 * columns } else { samples * vector * value / 4 };
        let free = registers.saturating_sub(of_items + states + of_sums);
        // Lanes widen what they hold once, for all steps; tensor cores take it as it is.
        let pack_words = vector * if tensor_cores { element } else { value } / 4;
        let held_words = tiles * lane_rows * pack_words;
        // What is not held passes through registers.
        let passing = lane_rows * pack_words * if tensor_cores { 2 } else { 1 };
        let held = match layer.dtype {
            DType::F64 => 0,
            _ if tiles > TILES_HELD_MAX => 0,
            _ if chunks * held_words <= free => chunks,
            _ if tiles > 1 => 0,
            _ => chunks.min(free.saturating_sub(passing) / held_words),
        };
        let ahead = (tiles == 1 || held > 0) && tiles * rounds * gates <= AHEAD_MAX;

        // The next odd multiple of a chunk, on tensor cores: eight rows of a chunk then lie in different banks.
        let pitch = |chunks: u64| if tensor_cores { (chunks | 1) * span } else { chunks * span };
        let state_pitch = pitch(chunks);
        let weights_at = 2 * samples * state_pitch * state;
        let aligned = |bytes: u64| bytes.next_multiple_of(16);
        let cells_bytes = if layer.has_cells() { aligned(samples * units * value) } else { 0 };
        let beside = cells_bytes + aligned(warps * sums * value) + aligned(4 * samples);
        let free = u64::from(architecture.shared_bytes_max()).checked_sub(weights_at.checked_add(beside)?)?;
        let room = free / (gates * units) / (span * element);
        let fits = if tensor_cores { room.saturating_sub(u64::from(room.is_multiple_of(2))) } else { room };
        let resident = fits.min(chunks - held);
        let weight_pitch = if resident == 0 { 0 } else { pitch(resident) };
        let cells_at = weights_at + gates * units * weight_pitch * element;
        let sums_at = cells_at + cells_bytes;
        let ends_at = sums_at + aligned(warps * sums * value);
        Some(Self {
            blocks,
            units,
            samples,
            sample_tiles: layer.batch.div_ceil(samples),
            warps,
            tiles,
            tile_units,
            vector,
            chunks,
            held,
            resident,
            ahead,
            state_pitch,
            weight_pitch,
            weights_at,
            cells_at,
            sums_at,
            ends_at,
            shared_bytes: ends_at + aligned(4 * samples),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuda(name: &str) -> Cuda {
        name.parse().unwrap()
    }

    fn layer(cell: Cell, dtype: DType, batch: u64, hidden: u64) -> Layer {
        Layer { cell, dtype, steps: 10, batch, directions: 1, hidden }
    }

    const LSTM: Cell = Cell::Lstm { coupled: false };
    const EARLY: Cell = Cell::Gru { resets_late: false };

    #[test]
    fn every_unit_and_sample_has_an_owner_and_all_fits() {
        for cell in [Cell::Rnn, EARLY, Cell::Gru { resets_late: true }, LSTM] {
            for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
                for architecture in ["sm_80", "sm_86", "sm_90a", "sm_100a"].map(cuda) {
                    for hidden in [1, 5, 33, 64, 100, 256, 513, 1024, 4096] {
                        for batch in [1, 3, 17, 128] {
                            let layer = layer(cell, dtype, batch, hidden);
                            let division = Division::of(layer, architecture).unwrap();
                            let what = format!("{layer:?} on {architecture}: {division:?}");
                            assert!(division.shared_bytes <= u64::from(architecture.shared_bytes_max()), "{what}");
                            assert!(division.blocks * division.units >= hidden, "{what}");
                            assert!(division.warps * division.tiles * division.tile_units >= division.units, "{what}");
                            assert!(division.sample_tiles * division.samples >= batch, "{what}");
                            assert!((division.sample_tiles - 1) * division.samples < batch, "{what}");
                            assert!(division.held + division.resident <= division.chunks, "{what}");
                            assert!(architecture.has_clusters() || division.blocks == 1, "{what}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn small_layers_need_no_cluster_and_large_ones_take_the_largest() {
        let hopper = cuda("sm_90a");
        let division = |hidden| Division::of(layer(LSTM, DType::F16, 1, hidden), hopper).unwrap();
        let [small, large, streaming] = [64, 512, 2048].map(division);
        assert_eq!([small.blocks, large.blocks, streaming.blocks], [1, 8, 8]);
        assert_eq!(small.held, small.chunks, "in registers");
        assert_eq!(large.held + large.resident, large.chunks, "nothing moves");
        assert!(streaming.held + streaming.resident < streaming.chunks);
    }

    #[test]
    fn samples_fill_a_device_before_they_share_a_block() {
        let samples = |dtype, batch| {
            let division = Division::of(layer(LSTM, dtype, batch, 256), cuda("sm_90a")).unwrap();
            [division.samples, division.sample_tiles]
        };
        assert_eq!(samples(DType::F32, 8), [1, 8]);
        assert_eq!(samples(DType::F32, 32), [4, 8]);
        // Tensor cores multiply eight samples in the time of one.
        assert_eq!([samples(DType::F16, 8), samples(DType::F16, 9)], [[8, 1], [5, 2]]);
    }

    #[test]
    fn very_wide_layers_have_a_kernel() {
        for (cell, dtype) in [(LSTM, DType::F32), (EARLY, DType::F32), (LSTM, DType::BF16), (EARLY, DType::F16)] {
            let division = Division::of(layer(cell, dtype, 4, 16_384), cuda("sm_90a"));
            assert!(division.is_some_and(|division| division.blocks == 8), "{cell:?} {dtype}");
        }
        assert_eq!(Division::of(layer(LSTM, DType::F64, 1, 16_384), cuda("sm_90a")), None);
    }
}
