//! Operations: names, attributes, and what of them follows from the types.
//!
//! `planfile::attributes` writes attributes, and says what is not written because the result's type says it.

use planfile::attributes::{
    CAUSALS, COMBINES, COORDINATES, INDEX_ORDERS, NEAREST, NORM_KINDS, PAD_MODES, REDUCE_KINDS, whole_region,
};
use planfile::op::{Coordinates, PadMode, PoolKind, ReduceKind, ResizeMode};
use planfile::{DType, Dim, Expr, Op, Real, TensorType, infer};

use super::bag::{Bag, missing};
use super::cursor::{Cursor, Mark};
use super::{expr, lexer::Kind, recurrence};
use crate::error::IrError;

pub(super) fn lookup<T: Copy>(table: &[(T, &str)], name: &str) -> Option<T> {
    table.iter().find(|(_, known)| *known == name).map(|(value, _)| *value)
}

/// What follows the operands, with a space before it; nothing when all attributes are defaults.
pub(super) fn attributes(op: &Op) -> String {
    planfile::attributes::attributes(op, &expr::print)
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
            kind: bag.choice(&NORM_KINDS)?.ok_or_else(|| missing("layer` or `rms"))?,
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
