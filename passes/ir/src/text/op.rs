//! Operations: names, attributes, and what of them follows from the types.
//!
//! Not written, because the result's type says it: the dimensions of `pointwise`, `reshape` and `broadcast`, the
//! sizes of `slice` and `resize`, the type of `recv`, the result type of `dot`.

use planfile::op::{
    Causal, Coordinates, IndexOrder, NearestRounding, NormKind, PadMode, PoolKind, ReduceKind, ResizeMode, Window,
};
use planfile::{DType, Dim, Expr, Op, RankScalar, Real, TensorType, infer};

use super::bag::{Bag, missing};
use super::cursor::{Cursor, Mark};
use super::scalar::real;
use super::types::{COMBINES, combine_name};
use super::{expr, lexer::Kind, recurrence};
use crate::error::IrError;

const NEAREST: [(NearestRounding, &str); 4] = [
    (NearestRounding::PreferFloor, "prefer_floor"),
    (NearestRounding::PreferCeil, "prefer_ceil"),
    (NearestRounding::Floor, "floor"),
    (NearestRounding::Ceil, "ceil"),
];

const COORDINATES: [(Coordinates, &str); 5] = [
    (Coordinates::HalfPixel, "half_pixel"),
    (Coordinates::HalfPixelSymmetric, "half_pixel_symmetric"),
    (Coordinates::PytorchHalfPixel, "pytorch_half_pixel"),
    (Coordinates::AlignCorners, "align_corners"),
    (Coordinates::Asymmetric, "asymmetric"),
];

const PAD_MODES: [(PadMode, &str); 4] =
    [(PadMode::Constant, "constant"), (PadMode::Reflect, "reflect"), (PadMode::Edge, "edge"), (PadMode::Wrap, "wrap")];

const REDUCE_KINDS: [(ReduceKind, &str); 5] = [
    (ReduceKind::Mean, "mean"),
    (ReduceKind::ArgMax { last: false }, "arg_max"),
    (ReduceKind::ArgMax { last: true }, "arg_max_last"),
    (ReduceKind::ArgMin { last: false }, "arg_min"),
    (ReduceKind::ArgMin { last: true }, "arg_min_last"),
];

const INDEX_ORDERS: [(IndexOrder, &str); 2] =
    [(IndexOrder::RowMajor, "row_major"), (IndexOrder::ColumnMajor, "column_major")];

const CAUSALS: [(Causal, &str); 2] = [(Causal::FromStart, "from_start"), (Causal::FromEnd, "from_end")];

pub(super) fn named<T: PartialEq>(table: &[(T, &'static str)], value: &T) -> &'static str {
    table.iter().find(|(known, _)| known == value).map_or("?", |(_, name)| name)
}

pub(super) fn lookup<T: Copy>(table: &[(T, &str)], name: &str) -> Option<T> {
    table.iter().find(|(_, known)| *known == name).map(|(value, _)| *value)
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

fn whole_region(rank: usize) -> Vec<(Real, Real)> {
    vec![(Real(0.0), Real(1.0)); rank]
}

/// What follows the operands, with a space before it; nothing when all attributes are defaults.
pub(super) fn attributes(op: &Op) -> String {
    let mut items = Items(Vec::new());
    match op {
        Op::Pointwise { expr, .. } => items.put(expr::print(expr)),
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
            items.put(match kind {
                NormKind::Layer => "layer",
                NormKind::Rms => "rms",
            });
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
        Op::Recurrence { .. } => items.0.extend(recurrence::items(op)),
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

/// What is known of a node before its attributes are read.
pub(super) struct Signature<'c> {
    pub(super) operands: Vec<&'c TensorType>,
    /// The first result's type, where it is written.
    pub(super) result: Option<&'c TensorType>,
}

impl Signature<'_> {
    fn result(&self) -> Result<&TensorType, String> {
        self.result.ok_or_else(|| "the result's type is needed".to_owned())
    }

    fn dims(&self) -> Result<Vec<Dim>, String> {
        self.result().map(|ty| ty.dims.clone())
    }

    /// Dimensions that all operands broadcast to, as far as they tell; inference judges them.
    fn broadcast(&self) -> Vec<Dim> {
        let rank = self.operands.iter().map(|ty| ty.rank()).max().unwrap_or(0);
        let mut dims = vec![Dim::Static(1); rank];
        for ty in &self.operands {
            for (dim, own) in dims[rank - ty.rank()..].iter_mut().zip(&ty.dims) {
                if *own != Dim::Static(1) {
                    *dim = *own;
                }
            }
        }
        dims
    }
}

/// The operation of this name with the attributes at the cursor.
///
/// # Errors
/// [`IrError::Parse`] at the attributes, or at `mark`, the operation's name, for what is missing.
pub(super) fn read(cursor: &mut Cursor<'_>, name: &str, mark: Mark, signature: &Signature<'_>) -> Result<Op, IrError> {
    if name == "pointwise" {
        cursor.sign("{")?;
        let expr: Expr = expr::read(cursor)?;
        cursor.sign("}")?;
        let dims = signature.dims().unwrap_or_else(|_| signature.broadcast());
        return Ok(Op::Pointwise { expr, dims });
    }
    if name == "recurrence" {
        return recurrence::read(cursor, mark);
    }
    let bare = if name == "transpose" { "permutation" } else { "list" };
    if matches!(cursor.peek(), Kind::Sign("[")) && name != "transpose" {
        return Err(cursor.error(format!("`{name}` takes its attributes in braces")));
    }
    let mut bag = Bag::read(cursor, bare)?;
    let op = build(name, &mut bag, signature).map_err(|why| cursor.error_at(mark, format!("{name}: {why}")))?;
    bag.finish(cursor, mark)?;
    Ok(op)
}

fn build(name: &str, bag: &mut Bag, signature: &Signature<'_>) -> Result<Op, String> {
    Ok(match name {
        "dot" => dot(bag, signature)?,
        "conv" => {
            let window = bag.window()?;
            Op::Conv {
                groups: bag.int("groups")?.unwrap_or(1),
                transposed: bag.flag("transposed")?,
                output_pads: bag.ints("output_pads")?.unwrap_or_else(|| vec![0; window.sizes.len()]),
                window,
            }
        }
        "pool" => Op::Pool {
            kind: pool_kind(bag)?,
            window: bag.window()?,
            ceil: bag.flag("ceil")?,
            indices: word_of(bag, "indices", &INDEX_ORDERS)?,
        },
        "reduce" => {
            let (kind, axes) = reduction(bag)?;
            Op::Reduce { kind, axes, keep: bag.flag("keep")? }
        }
        "scan" => Op::Scan {
            combine: bag.need_combine()?,
            axis: bag.need("axis")?,
            exclusive: bag.flag("exclusive")?,
            reverse: bag.flag("reverse")?,
        },
        "gather" => Op::Gather { axis: bag.need("axis")? },
        "gather_elements" => Op::GatherElements { axis: bag.need("axis")? },
        "gather_nd" => Op::GatherNd { batch: bag.int("batch")?.unwrap_or(0) },
        "scatter_elements" => Op::ScatterElements { axis: bag.need("axis")?, combine: bag.combine()? },
        "scatter_nd" => Op::ScatterNd { combine: bag.combine()? },
        "reshape" => Op::Reshape { dims: signature.dims()? },
        "transpose" => Op::Transpose { permutation: bag.need_ints("permutation")? },
        "slice" => {
            let starts = bag.rank_scalars("starts")?;
            let steps = bag.ints("steps")?.unwrap_or_else(|| vec![1; starts.len()]);
            Op::Slice { starts, steps, sizes: signature.result()?.sizes() }
        }
        "pad" => Op::Pad {
            low: bag.need_ints("low")?,
            high: bag.need_ints("high")?,
            mode: bag.choice(&PAD_MODES)?.unwrap_or(PadMode::Constant),
        },
        "concat" => Op::Concat { axis: bag.need("axis")? },
        "broadcast" => Op::Broadcast { dims: signature.dims()? },
        "resize" => read_resize(bag, signature)?,
        "top_k" => Op::TopK {
            axis: bag.need("axis")?,
            k: bag.need("k")?,
            largest: !bag.flag("smallest")?,
            sorted: !bag.flag("unsorted")?,
        },
        "append" => Op::Append { axis: bag.need("axis")? },
        "softmax" => Op::Softmax { axis: bag.need("axis")?, log: bag.flag("log")? },
        "norm" => Op::Norm {
            kind: bag
                .choice(&[(NormKind::Layer, "layer"), (NormKind::Rms, "rms")])?
                .ok_or_else(|| missing("layer` or `rms"))?,
            axis: bag.need("axis")?,
            epsilon: bag.real("epsilon")?.ok_or_else(|| missing("epsilon"))?,
            scale: bag.flag("scale")?,
            bias: bag.flag("bias")?,
        },
        "attention" => Op::Attention {
            scale: bag.real("scale")?.ok_or_else(|| missing("scale"))?,
            causal: word_of(bag, "causal", &CAUSALS)?,
            softcap: bag.real("softcap")?.unwrap_or(Real(0.0)),
            mask: bag.flag("mask")?,
        },
        "rotary" => Op::Rotary { interleaved: bag.flag("interleaved")?, rotary: bag.need("rotary")? },
        "all_reduce" => Op::AllReduce { combine: bag.need_combine()?, groups: bag.groups()? },
        "all_gather" => Op::AllGather { axis: bag.need("axis")?, groups: bag.groups()? },
        "reduce_scatter" => {
            Op::ReduceScatter { combine: bag.need_combine()?, axis: bag.need("axis")?, groups: bag.groups()? }
        }
        "all_to_all" => Op::AllToAll { split: bag.need("split")?, concat: bag.need("concat")?, groups: bag.groups()? },
        "send" => Op::Send { channel: bag.need("channel")?, peers: bag.need_ints("peers")? },
        "recv" => {
            Op::Recv { channel: bag.need("channel")?, peers: bag.need_ints("peers")?, ty: signature.result()?.clone() }
        }
        _ => return Err("there is no such operation".to_owned()),
    })
}

fn word_of<T: Copy>(bag: &mut Bag, key: &str, table: &[(T, &str)]) -> Result<Option<T>, String> {
    let Some(word) = bag.word(key)? else { return Ok(None) };
    lookup(table, &word).map(Some).ok_or_else(|| format!("`{key} {word}` is unknown"))
}

/// Without attributes, NumPy's `matmul` of operands of one rank.
fn dot(bag: &mut Bag, signature: &Signature<'_>) -> Result<Op, String> {
    let first = signature.operands.first().ok_or("takes 2 operands")?;
    let out = match (bag.dtype("out")?, signature.result) {
        (Some(out), _) => out,
        (None, Some(result)) => result.dtype,
        (None, None) => first.dtype,
    };
    let accumulate: DType = bag.dtype("accumulate")?.unwrap_or(out.accumulator());
    if bag.given {
        let contract = bag.dim_pairs("contract")?.ok_or_else(|| missing("contract"))?;
        return Ok(Op::Dot { batch: bag.dim_pairs("batch")?.unwrap_or_default(), contract, accumulate, out });
    }
    let rank = u8::try_from(first.rank()).ok().filter(|rank| *rank >= 2);
    let rank = rank.filter(|_| signature.operands.iter().all(|ty| ty.rank() == first.rank()));
    let rank = rank.ok_or_else(|| missing("contract"))?;
    let batch = (0..rank - 2).map(|dim| (dim, dim)).collect();
    Ok(Op::Dot { batch, contract: vec![(rank - 1, rank - 2)], accumulate, out })
}

fn pool_kind(bag: &mut Bag) -> Result<PoolKind, String> {
    if bag.flag("max")? {
        return Ok(PoolKind::Max);
    }
    if let Some(p) = bag.int("lp")? {
        return Ok(PoolKind::Lp { p });
    }
    match bag.words("average")?.as_deref() {
        Some([]) => Ok(PoolKind::Average { count_pads: false }),
        Some([word]) if word == "count_pads" => Ok(PoolKind::Average { count_pads: true }),
        _ => Err(missing("max`, `average`, `average count_pads` or `lp")),
    }
}

fn reduction(bag: &mut Bag) -> Result<(ReduceKind, Vec<u8>), String> {
    for (combine, name) in COMBINES {
        if let Some(axes) = bag.ints(name)? {
            return Ok((ReduceKind::Combine(combine), axes));
        }
    }
    for (kind, name) in REDUCE_KINDS {
        if let Some(axes) = bag.ints(name)? {
            return Ok((kind, axes));
        }
    }
    Err(missing("sum [0]` or such a reduction, as in `reduce %0 {sum [0]}"))
}

fn read_resize(bag: &mut Bag, signature: &Signature<'_>) -> Result<Op, String> {
    let mode = if let Some(rounding) = word_of(bag, "nearest", &NEAREST)? {
        ResizeMode::Nearest(rounding)
    } else if bag.flag("linear")? {
        ResizeMode::Linear { antialias: bag.flag("antialias")? }
    } else {
        let a = bag.real("cubic")?.ok_or_else(|| missing("nearest`, `linear` or `cubic"))?;
        let (exclude_outside, antialias) = (bag.flag("exclude_outside")?, bag.flag("antialias")?);
        ResizeMode::Cubic { a, exclude_outside, antialias }
    };
    let coordinates = match bag.real("tf_crop_and_resize")? {
        Some(extrapolation) => Coordinates::TfCropAndResize { extrapolation },
        None => bag
            .choice(&COORDINATES)?
            .ok_or_else(|| missing("half_pixel` or another mapping of coordinates such as `asymmetric"))?,
    };
    let scales = bag.reals("scales")?.ok_or_else(|| missing("scales"))?;
    let region = bag.real_pairs("region")?.unwrap_or_else(|| whole_region(scales.len()));
    Ok(Op::Resize { mode, coordinates, scales, region, sizes: signature.result()?.sizes() })
}

/// Types of the results, which those that are written must equal.
pub(super) fn check(
    op: &Op,
    operands: &[&TensorType],
    written: &[Option<&TensorType>],
) -> Result<Vec<TensorType>, String> {
    let types = infer(op, operands).map_err(|why| format!("{}: {why}", op.name()))?;
    if types.len() != written.len() {
        return Err(format!("{} has {} results, not {}", op.name(), types.len(), written.len()));
    }
    for (ty, written) in types.iter().zip(written) {
        if let Some(written) = written
            && *written != ty
        {
            return Err(format!("{} results in {ty}, not in {written}", op.name()));
        }
    }
    Ok(types)
}
