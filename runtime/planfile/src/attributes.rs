//! Attributes of operations as text: the one spelling that modules and plans are printed in.
//!
//! Only what differs from a default is written. What the result's type says is left out: the dimensions of
//! `pointwise`, `reshape` and `broadcast`, the sizes of `slice` and `resize`, the type of `recv`, the result type of
//! `dot`. `ir` reads what is written here.

use crate::expr::{Expr, RankScalar};
use crate::op::{
    Causal, Cell, Combine, Coordinates, IndexOrder, NearestRounding, NormKind, Op, PadMode, PoolKind, Real, ReduceKind,
    ResizeMode, Window,
};

pub const NEAREST: [(NearestRounding, &str); 4] = [
    (NearestRounding::PreferFloor, "prefer_floor"),
    (NearestRounding::PreferCeil, "prefer_ceil"),
    (NearestRounding::Floor, "floor"),
    (NearestRounding::Ceil, "ceil"),
];

pub const COORDINATES: [(Coordinates, &str); 5] = [
    (Coordinates::HalfPixel, "half_pixel"),
    (Coordinates::HalfPixelSymmetric, "half_pixel_symmetric"),
    (Coordinates::PytorchHalfPixel, "pytorch_half_pixel"),
    (Coordinates::AlignCorners, "align_corners"),
    (Coordinates::Asymmetric, "asymmetric"),
];

pub const PAD_MODES: [(PadMode, &str); 4] =
    [(PadMode::Constant, "constant"), (PadMode::Reflect, "reflect"), (PadMode::Edge, "edge"), (PadMode::Wrap, "wrap")];

pub const REDUCE_KINDS: [(ReduceKind, &str); 5] = [
    (ReduceKind::Mean, "mean"),
    (ReduceKind::ArgMax { last: false }, "arg_max"),
    (ReduceKind::ArgMax { last: true }, "arg_max_last"),
    (ReduceKind::ArgMin { last: false }, "arg_min"),
    (ReduceKind::ArgMin { last: true }, "arg_min_last"),
];

pub const INDEX_ORDERS: [(IndexOrder, &str); 2] =
    [(IndexOrder::RowMajor, "row_major"), (IndexOrder::ColumnMajor, "column_major")];

pub const CAUSALS: [(Causal, &str); 2] = [(Causal::FromStart, "from_start"), (Causal::FromEnd, "from_end")];

pub const COMBINES: [(Combine, &str); 4] =
    [(Combine::Sum, "sum"), (Combine::Prod, "prod"), (Combine::Max, "max"), (Combine::Min, "min")];

pub const NORM_KINDS: [(NormKind, &str); 2] = [(NormKind::Layer, "layer"), (NormKind::Rms, "rms")];

pub const CELLS: [(Cell, &str); 5] = [
    (Cell::Rnn, "rnn"),
    (Cell::Gru { resets_late: false }, "gru"),
    (Cell::Gru { resets_late: true }, "gru_resets_late"),
    (Cell::Lstm { coupled: false }, "lstm"),
    (Cell::Lstm { coupled: true }, "lstm_coupled"),
];

/// Whether a direction of a recurrence runs backwards.
pub const DIRECTIONS: [(bool, &str); 2] = [(false, "forward"), (true, "reverse")];

/// The name of a value in a table of all of its type's values.
pub fn named<T: PartialEq>(table: &[(T, &'static str)], value: &T) -> &'static str {
    table.iter().find(|(known, _)| known == value).map_or("?", |(_, name)| name)
}

pub fn combine_name(combine: Combine) -> &'static str {
    named(&COMBINES, &combine)
}

/// The shortest text that reads back to the same number; bits where there is none.
pub fn real(value: Real) -> String {
    if value.0.is_nan() { format!("{:#x}", value.0.to_bits()) } else { format!("{:?}", value.0) }
}

fn reduce_name(kind: ReduceKind) -> &'static str {
    match kind {
        ReduceKind::Combine(combine) => combine_name(combine),
        kind => named(&REDUCE_KINDS, &kind),
    }
}

/// Collects attributes that differ from their defaults.
struct Items(Vec<String>);

impl Items {
    fn put(&mut self, item: impl Into<String>) {
        self.0.push(item.into());
    }

    fn flag(&mut self, name: &str, set: bool) {
        if set {
            self.put(name);
        }
    }

    fn window(&mut self, window: &Window) {
        let Window { sizes, strides, dilations, pads } = window;
        self.put(format!("window {sizes:?}"));
        if *strides != vec![1; sizes.len()] {
            self.put(format!("strides {strides:?}"));
        }
        if *dilations != vec![1; sizes.len()] {
            self.put(format!("dilations {dilations:?}"));
        }
        if *pads != vec![(0, 0); sizes.len()] {
            self.put(format!("pads {pads:?}"));
        }
    }

    fn pairs(&mut self, key: &str, pairs: &[(u8, u8)]) {
        let (left, right): (Vec<u8>, Vec<u8>) = pairs.iter().copied().unzip();
        self.put(format!("{key} {left:?}x{right:?}"));
    }
}

fn reals(values: &[Real]) -> String {
    format!("[{}]", values.iter().map(|&value| real(value)).collect::<Vec<_>>().join(", "))
}

/// The region of [`Op::Resize`] that is all of the tensor.
pub fn whole_region(rank: usize) -> Vec<(Real, Real)> {
    vec![(Real(0.0), Real(1.0)); rank]
}

/// What follows an operation's operands in text, with a space before it; nothing when all attributes are defaults.
/// `print` writes expressions.
pub fn attributes(op: &Op, print: &dyn Fn(&Expr) -> String) -> String {
    let mut items = Items(Vec::new());
    match op {
        Op::Pointwise { expr, .. } => items.put(print(expr)),
        Op::Transpose { permutation } => return format!(" {permutation:?}"),
        Op::Reshape { .. } | Op::Broadcast { .. } => {}
        Op::Dot { batch, contract, accumulate, out } => {
            items.pairs("contract", contract);
            if !batch.is_empty() {
                items.pairs("batch", batch);
            }
            if *accumulate != out.accumulator() {
                items.put(format!("accumulate {accumulate}"));
            }
        }
        Op::Conv { window, groups, transposed, output_pads } => {
            items.flag("transposed", *transposed);
            items.window(window);
            if *output_pads != vec![0; window.sizes.len()] {
                items.put(format!("output_pads {output_pads:?}"));
            }
            if *groups != 1 {
                items.put(format!("groups {groups}"));
            }
        }
        Op::Pool { kind, window, ceil, indices } => {
            items.put(match kind {
                PoolKind::Max => "max".to_owned(),
                PoolKind::Average { count_pads: false } => "average".to_owned(),
                PoolKind::Average { count_pads: true } => "average count_pads".to_owned(),
                PoolKind::Lp { p } => format!("lp {p}"),
            });
            items.window(window);
            items.flag("ceil", *ceil);
            if let Some(order) = indices {
                items.put(format!("indices {}", named(&INDEX_ORDERS, order)));
            }
        }
        Op::Reduce { kind, axes, keep } => {
            items.put(format!("{} {axes:?}", reduce_name(*kind)));
            items.flag("keep", *keep);
        }
        Op::Scan { combine, axis, exclusive, reverse } => {
            items.put(combine_name(*combine));
            items.put(format!("axis {axis}"));
            items.flag("exclusive", *exclusive);
            items.flag("reverse", *reverse);
        }
        Op::Gather { axis } | Op::GatherElements { axis } | Op::Concat { axis } | Op::Append { axis } => {
            items.put(format!("axis {axis}"));
        }
        Op::GatherNd { batch } => {
            if *batch != 0 {
                items.put(format!("batch {batch}"));
            }
        }
        Op::ScatterElements { axis, combine } => {
            items.put(format!("axis {axis}"));
            items.0.extend(combine.map(|combine| combine_name(combine).to_owned()));
        }
        Op::ScatterNd { combine } => items.0.extend(combine.map(|combine| combine_name(combine).to_owned())),
        Op::Slice { starts, steps, .. } => {
            let starts: Vec<String> = starts.iter().map(RankScalar::to_string).collect();
            items.put(format!("starts [{}]", starts.join(", ")));
            if *steps != vec![1; starts.len()] {
                items.put(format!("steps {steps:?}"));
            }
        }
        Op::Pad { low, high, mode } => {
            items.put(format!("low {low:?}"));
            items.put(format!("high {high:?}"));
            items.flag(named(&PAD_MODES, mode), *mode != PadMode::Constant);
        }
        Op::Resize { mode, coordinates, scales, region, .. } => {
            resize(&mut items, mode, coordinates);
            items.put(format!("scales {}", reals(scales)));
            if *region != whole_region(scales.len()) {
                let region: Vec<String> =
                    region.iter().map(|&(start, end)| format!("({}, {})", real(start), real(end))).collect();
                items.put(format!("region [{}]", region.join(", ")));
            }
        }
        Op::TopK { axis, k, largest, sorted } => {
            items.put(format!("k {k}"));
            items.put(format!("axis {axis}"));
            items.flag("smallest", !largest);
            items.flag("unsorted", !sorted);
        }
        Op::Softmax { axis, log } => {
            items.put(format!("axis {axis}"));
            items.flag("log", *log);
        }
        Op::Norm { kind, axis, epsilon, scale, bias } => {
            items.put(named(&NORM_KINDS, kind));
            items.put(format!("axis {axis}"));
            items.put(format!("epsilon {}", real(*epsilon)));
            items.flag("scale", *scale);
            items.flag("bias", *bias);
        }
        Op::Attention { scale, causal, softcap, mask } => {
            items.put(format!("scale {}", real(*scale)));
            if let Some(causal) = causal {
                items.put(format!("causal {}", named(&CAUSALS, causal)));
            }
            if *softcap != Real(0.0) {
                items.put(format!("softcap {}", real(*softcap)));
            }
            items.flag("mask", *mask);
        }
        Op::Rotary { interleaved, rotary } => {
            items.put(format!("rotary {rotary}"));
            items.flag("interleaved", *interleaved);
        }
        Op::Recurrence { .. } => recurrence(&mut items, op, print),
        Op::AllReduce { combine, groups } => {
            items.put(combine_name(*combine));
            items.put(format!("groups {groups:?}"));
        }
        Op::AllGather { axis, groups } => {
            items.put(format!("axis {axis}"));
            items.put(format!("groups {groups:?}"));
        }
        Op::ReduceScatter { combine, axis, groups } => {
            items.put(combine_name(*combine));
            items.put(format!("axis {axis}"));
            items.put(format!("groups {groups:?}"));
        }
        Op::AllToAll { split, concat, groups } => {
            items.put(format!("split {split}"));
            items.put(format!("concat {concat}"));
            items.put(format!("groups {groups:?}"));
        }
        Op::Send { channel, peers } | Op::Recv { channel, peers, .. } => {
            items.put(format!("channel {channel}"));
            items.put(format!("peers {peers:?}"));
        }
    }
    if items.0.is_empty() { String::new() } else { format!(" {{{}}}", items.0.join(", ")) }
}

fn resize(items: &mut Items, mode: &ResizeMode, coordinates: &Coordinates) {
    let antialias = |items: &mut Items, antialias: bool| items.flag("antialias", antialias);
    match mode {
        ResizeMode::Nearest(rounding) => items.put(format!("nearest {}", named(&NEAREST, rounding))),
        ResizeMode::Linear { antialias: on } => {
            items.put("linear");
            antialias(items, *on);
        }
        ResizeMode::Cubic { a, exclude_outside, antialias: on } => {
            items.put(format!("cubic {}", real(*a)));
            items.flag("exclude_outside", *exclude_outside);
            antialias(items, *on);
        }
    }
    items.put(match coordinates {
        Coordinates::TfCropAndResize { extrapolation } => format!("tf_crop_and_resize {}", real(*extrapolation)),
        coordinates => named(&COORDINATES, coordinates).to_owned(),
    });
}

/// The cell, flags, and the functions of each direction.
fn recurrence(items: &mut Items, op: &Op, print: &dyn Fn(&Expr) -> String) {
    let Op::Recurrence { cell, reverse, functions, bias, peepholes, lengths } = op else { return };
    items.put(named(&CELLS, cell));
    for (name, set) in [("bias", bias), ("peepholes", peepholes), ("lengths", lengths)] {
        items.flag(name, *set);
    }
    let mut functions = functions.iter().map(print);
    for backwards in reverse {
        let own: Vec<String> = functions.by_ref().take(cell.functions()).collect();
        items.put(format!("{} [{}]", named(&DIRECTIONS, backwards), own.join(", ")));
    }
}
