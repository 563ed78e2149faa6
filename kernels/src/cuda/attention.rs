//! Attention over any number of queries: tensor cores for half types, lanes for the rest and for very wide heads. Where
//! query rows are few, [`split`] over keys.
//!
//! Operands may be views (transposed, reshaped, sliced) of inputs, and the result may be transposed and reshaped: all
//! strides are literals, so heads need no copies.
//!
//! before  %q = transpose %a [0, 2, 1, 3]     after  a tile of queries per block, keys and values in passing
//!         %y = attention %q, %k, %v
//!         %z = transpose %y [0, 2, 1, 3]
//!
//! Scores, the softmax and sums are in `f32` (`f64` for `f64`); weights of half types are rounded to the type before
//! they meet the values, as queries and keys are. Tiles of keys that no query of a block sees are not read, so that NaN
//! among their values does not spread as it does where weights of zero are multiplied.

use planfile::launch::Factor;
use planfile::op::{Causal, Real};
use planfile::types::strides;
use planfile::{DType, Op, Spec, TensorType};

use super::block::{Shape, Unit, is_static, launch_for, sizes_of, tiles};
use super::view::{Axis, View, producer, reshaped, view};
use super::{CudaTarget, Launch};

mod split;

pub use split::FEW_QUERIES;

const COMMON: &str = include_str!("../../cuda/attention.cuh");
const BODY: &str = concat!(include_str!("../../cuda/attention.cuh"), "\n", include_str!("../../cuda/attention.cu"));

/// Widest heads on tensor cores: sums of a tile stay in registers.
const TILES_WIDTH_MAX: u64 = 256;
const KEY_TILE: u64 = 64;

/// The attention of a specification, and how its operands and result lie in memory.
struct Matched<'a> {
    /// The number of what the attention itself gives, `[batch, head, query, feature]`.
    value: u32,
    /// The number of the keys, `[batch, group, key, feature]`.
    keys_value: u32,
    scale: Real,
    causal: Option<Causal>,
    softcap: Real,
    dtype: DType,
    heads: u64,
    groups: u64,
    batches: u64,
    queries: u64,
    keys: u64,
    features: u64,
    values: u64,
    q: View,
    k: View,
    v: View,
    mask: Option<(View, DType)>,
    /// Where each dimension of the result lies.
    out: Vec<Axis>,
    types: Vec<&'a TensorType>,
}

pub(super) fn select(spec: &Spec, target: &CudaTarget) -> Option<Launch> {
    let types = spec.types().ok()?;
    let matched = Matched::of(spec, &types)?;
    let counts = [matched.queries, matched.keys, matched.features, matched.values];
    if counts.iter().any(|&count| count >= 1 << 30) {
        return None;
    }
    let declared = || {
        let mut unit = Unit::indexing(&matched.types);
        matched.declare(&mut unit);
        unit
    };
    if let Some(launch) = matched.split(spec, declared(), target.architecture) {
        return Some(launch);
    }
    let unit = declared();
    let is_half = matches!(matched.dtype, DType::F16 | DType::BF16);
    if is_half && matched.features <= TILES_WIDTH_MAX && matched.values <= TILES_WIDTH_MAX {
        matched.tiles(spec, unit)
    } else {
        matched.lanes(spec, unit)
    }
}

impl<'a> Matched<'a> {
    fn of(spec: &Spec, types: &'a [TensorType]) -> Option<Self> {
        let position = spec.nodes.iter().position(|node| matches!(node.op, Op::Attention { .. }))?;
        let node = &spec.nodes[position];
        let Op::Attention { scale, causal, softcap, mask } = node.op else { return None };
        let [result] = spec.results.as_slice() else { return None };
        if !types.iter().all(is_static) {
            return None;
        }
        let mut used = vec![position];
        let mut operand = |index: usize| {
            let (view, nodes) = view(spec, *node.operands.get(index)?)?;
            used.extend(nodes);
            Some(view)
        };
        let (q, k, v) = (operand(0)?, operand(1)?, operand(2)?);
        let of = |index: usize| types.get(*node.operands.get(index)? as usize);
        let (q_type, k_type, v_type) = (of(0)?, of(1)?, of(2)?);
        let value = (spec.inputs.len() + position) as u32;
        let y = types.get(value as usize)?;
        let mask = if mask {
            let sizes = [y.size(0), y.size(1), y.size(2), k_type.size(2)];
            Some((spread(operand(3)?, &sizes)?, of(3)?.dtype))
        } else {
            None
        };
        let out = outward(spec, types, *result, value, &mut used)?;
        used.sort_unstable();
        used.dedup();
        // All that the specification computes is done here.
        if used.len() != spec.nodes.len() {
            return None;
        }
        Some(Self {
            value,
            keys_value: *node.operands.get(1)?,
            scale,
            causal,
            softcap,
            dtype: y.dtype,
            heads: y.size(1),
            groups: k_type.size(1),
            batches: y.size(0),
            queries: y.size(2),
            keys: k_type.size(2),
            features: q_type.size(3),
            values: v_type.size(3),
            q,
            k,
            v,
            mask,
            out,
            types: types[..spec.inputs.len()].iter().chain([y]).collect(),
        })
    }

    fn declare(&self, unit: &mut Unit) {
        unit.alias("Element", self.dtype);
        unit.alias("Mask", self.mask.as_ref().map_or(self.dtype, |(_, dtype)| *dtype));
        unit.size("HEADS", self.heads.max(1));
        unit.size("HEADS_PER_GROUP", (self.heads / self.groups.max(1)).max(1));
        for (name, value) in
            [("QUERIES", self.queries), ("KEYS", self.keys), ("FEATURES", self.features), ("VALUES", self.values)]
        {
            unit.int(name, value.cast_signed());
        }
        unit.real("SCALE", self.scale.0);
        unit.flag("HAS_SOFTCAP", self.softcap.0 != 0.0);
        unit.real("SOFTCAP", self.softcap.0);
        let causal = match self.causal {
            None => 0,
            Some(Causal::FromStart) => 1,
            Some(Causal::FromEnd) => 2,
        };
        unit.int("CAUSAL", causal);
        let mask = self.mask.as_ref().map(|(view, dtype)| (view, 1 + i64::from(*dtype != DType::Bool)));
        unit.int("MASK", mask.map_or(0, |(_, code)| code));
        let absent = [(1, 0); 4];
        let none = (0, absent.as_slice());
        let views = [
            ("Q", (self.q.offset, self.q.axes.as_slice())),
            ("K", (self.k.offset, self.k.axes.as_slice())),
            ("V", (self.v.offset, self.v.axes.as_slice())),
            ("M", mask.map_or(none, |(view, _)| (view.offset, view.axes.as_slice()))),
            ("O", (0, self.out.as_slice())),
        ];
        for (name, (offset, axes)) in views {
            unit.size(&format!("{name}_START"), offset);
            for (axis, part) in axes.iter().zip(["BATCH", "HEAD", "ROW", "COLUMN"]) {
                unit.size(&format!("{name}_{part}"), axis.1);
            }
        }
    }

    fn call(&self, symbol: &str) -> String {
        let mask = self.mask.as_ref().map_or("nullptr".to_owned(), |(view, _)| format!("in{}", view.input));
        let (q, k, v) = (self.q.input, self.k.input, self.v.input);
        format!("{symbol}(in{q}, in{k}, in{v}, static_cast<const Mask*>({mask}), out0)")
    }

    /// Blocks for tiles of so many queries and so many values.
    fn blocks(&self, queries: u64, values: u64) -> [Factor; 3] {
        let of = |axes| sizes_of(self.value, axes);
        [tiles(of(0..2), 1), tiles(of(2..3), queries), tiles(of(3..4), values)]
    }

    fn tiles(&self, spec: &Spec, mut unit: Unit) -> Option<Launch> {
        let warps = 4;
        let padded = |width: u64| width.next_multiple_of(16).max(16);
        let (features, values) = (padded(self.features), padded(self.values));
        unit.int("WARPS", warps);
        unit.int("FEATURES_PADDED", features.cast_signed());
        unit.int("VALUES_PADDED", values.cast_signed());
        for (name, view, width) in
            [("Q", &self.q, self.features), ("K", &self.k, self.features), ("V", &self.v, self.values)]
        {
            unit.flag(&format!("{name}_IS_WIDE"), is_wide(view.offset, &view.axes, width, 8));
        }
        unit.flag("O_IS_PAIRED", is_wide(0, &self.out, self.values, 2));
        unit.text(format_args!("#define ATTENTION_TILES 1"));
        let queries = 16 * warps.cast_unsigned();
        let pitches = (queries + KEY_TILE) * (features + 8) + KEY_TILE * (values + 8);
        let shape = Shape::flat(self.blocks(queries, values), 32 * warps as u32).shared(2 * pitches as u32);
        self.launch(spec, unit, "attention_tiles", BODY, shape)
    }

    fn lanes(&self, spec: &Spec, mut unit: Unit) -> Option<Launch> {
        let is_double = self.dtype == DType::F64;
        let (bytes, widest) = if is_double { (8, 64) } else { (4, 128) };
        let chunk = |width: u64, unit: u64| width.max(1).next_multiple_of(unit).min(widest);
        let (features, values, rows) = (chunk(self.features, 4), chunk(self.values, 32), if is_double { 4 } else { 8 });
        unit.int("ROWS", rows);
        unit.int("FEATURE_CHUNK", features.cast_signed());
        unit.int("VALUE_CHUNK", values.cast_signed());
        unit.text(format_args!("#define ATTENTION_TILES 0"));
        let rows = rows.cast_unsigned();
        let elements = 4 * rows * features + 32 * (features + 1) + 32 * values + 4 * 32 * rows;
        let shape = Shape::flat(self.blocks(4 * rows, values), 128).shared((bytes * elements) as u32).resident(4);
        self.launch(spec, unit, "attention_lanes", BODY, shape)
    }

    fn launch(&self, spec: &Spec, unit: Unit, symbol: &str, body: &str, shape: Shape) -> Option<Launch> {
        if [self.batches, self.heads, self.queries, self.values].contains(&0) {
            return launch_for(spec, Unit::new(), "nothing", "DEVICE void nothing() {}", "nothing()", shape.shared(0));
        }
        launch_for(spec, unit, symbol, body, &self.call(symbol), shape)
    }
}

/// Whether accesses of `unit` elements serve all rows.
fn is_wide(offset: u64, axes: &[Axis], width: u64, unit: u64) -> bool {
    let (Some(columns), Some(rows)) = (axes.last(), axes.get(..axes.len() - 1)) else { return false };
    let aligned = |axis: &Axis| axis.0 == 1 || axis.1.is_multiple_of(unit);
    (columns.1 == 1 || width == 1)
        && width.is_multiple_of(unit)
        && offset.is_multiple_of(unit)
        && rows.iter().all(aligned)
}

/// The view, broadcast to `sizes`.
fn spread(view: View, sizes: &[u64; 4]) -> Option<View> {
    let missing = sizes.len().checked_sub(view.axes.len())?;
    let axis = |position: usize| {
        let own = position.checked_sub(missing).and_then(|position| view.axes.get(position));
        own.filter(|(size, _)| *size != 1).map_or((sizes[position], 0), |&own| own)
    };
    Some(View { axes: (0..sizes.len()).map(axis).collect(), ..view })
}

/// Where each dimension of `value` lies in `result`, which transposes and reshapes make of it.
fn outward(spec: &Spec, types: &[TensorType], result: u32, value: u32, used: &mut Vec<usize>) -> Option<Vec<Axis>> {
    let sizes = types.get(result as usize)?.sizes();
    let mut axes: Vec<Axis> = sizes.iter().copied().zip(strides(&sizes)).collect();
    let mut at = result;
    while at != value {
        let position = producer(spec, at)?;
        let [operand] = spec.nodes[position].operands.as_slice() else { return None };
        let before = types.get(*operand as usize)?.sizes();
        axes = match &spec.nodes[position].op {
            Op::Transpose { permutation } => {
                let mut moved = vec![(1, 0); axes.len()];
                for (axis, &from) in axes.iter().zip(permutation) {
                    *moved.get_mut(usize::from(from))? = *axis;
                }
                moved
            }
            Op::Reshape { .. } => reshaped(&axes, &before)?,
            _ => return None,
        };
        used.push(position);
        at = *operand;
    }
    Some(axes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::samples;

    fn target() -> CudaTarget {
        CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false }
    }

    fn attentions() -> Vec<(String, Spec)> {
        let is_attention = |spec: &Spec| spec.nodes.iter().any(|node| matches!(node.op, Op::Attention { .. }));
        samples().into_iter().filter(|(_, spec)| is_attention(spec)).collect()
    }

    #[test]
    fn takes_all_attentions_and_fits_in_shared_memory() {
        for (architecture, most) in [("sm_80", 163 << 10), ("sm_86", 99 << 10), ("sm_90a", 227 << 10)] {
            let target = CudaTarget { architecture: architecture.parse().unwrap(), ..target() };
            for (name, spec) in attentions() {
                let rule = select(&spec, &target).unwrap_or_else(|| panic!("{name} is refused")).rule;
                assert!(rule.shared_bytes <= most, "{name} on {architecture}: {} bytes", rule.shared_bytes);
            }
        }
    }

    #[test]
    fn heads_are_read_and_written_where_they_lie() {
        let (_, spec) = attentions().into_iter().find(|(_, spec)| spec.nodes.len() == 6).unwrap();
        let types = spec.types().unwrap();
        let matched = Matched::of(&spec, &types).unwrap();
        let [b, s, h, d] = spec.inputs[0].sizes()[..] else { panic!("rank 4") };
        assert_eq!(matched.q.axes, [(b, s * h * d), (h, d), (s, h * d), (d, 1)]);
        assert_eq!(matched.out, matched.q.axes);
    }

    #[test]
    fn refuses_what_it_would_have_to_compute_besides() {
        let (_, mut spec) = attentions().into_iter().find(|(_, spec)| spec.nodes.len() == 1).unwrap();
        let result = spec.results[0];
        spec.nodes.push(planfile::SpecNode { op: Op::Softmax { axis: 3, log: false }, operands: vec![result] });
        spec.results = vec![result + 1];
        assert!(select(&spec, &target()).is_none());
    }

    #[test]
    fn narrow_accesses_where_rows_are_not_aligned() {
        assert!(is_wide(0, &[(2, 640), (4, 160), (10, 16), (16, 1)], 16, 8));
        assert!(!is_wide(4, &[(2, 640), (4, 160), (10, 16), (16, 1)], 16, 8));
        assert!(!is_wide(0, &[(2, 640), (4, 160), (10, 20), (20, 1)], 20, 8));
        assert!(!is_wide(0, &[(2, 640), (4, 160), (10, 1), (16, 10)], 16, 8));
    }
}
