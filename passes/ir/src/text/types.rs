//! Types, meshes and placements.

use std::fmt::Write as _;

use planfile::attributes::{COMBINES, combine_name};
use planfile::{Combine, DType, Dim, ExtentId, TensorType};

use super::cursor::Cursor;
use super::expr::dtype;
use super::lexer::{Kind, name};
use crate::error::IrError;
use crate::mesh::{Mesh, MeshAxis, Placement, Segment, Split, SubAxes};
use crate::module::Shard;

/// Sub-axes that a set of them can name.
pub(super) const MAX_SUB_AXES: usize = 32;

pub(super) fn combine_of(word: &str) -> Option<Combine> {
    COMBINES.iter().find(|(_, name)| *name == word).map(|(combine, _)| *combine)
}

/// `f32[2, <=128@0]`.
pub(super) fn read_type(cursor: &mut Cursor<'_>) -> Result<TensorType, IrError> {
    let dtype: DType = dtype(cursor)?;
    let dims = cursor.list("[", "]", |cursor| {
        if cursor.accept("<=") {
            let capacity = cursor.integer("capacity")?;
            cursor.sign("@")?;
            return Ok(Dim::Bounded { capacity, extent: ExtentId(cursor.integer("extent number")?) });
        }
        cursor.integer("size").map(Dim::Static)
    })?;
    Ok(TensorType { dtype, dims })
}

/// `mesh data=2 tensor=2x2`: each axis with the factors it is made of.
pub(super) fn mesh(mesh: &Mesh) -> String {
    let mut text = "mesh".to_owned();
    for axis in &mesh.axes {
        let factors: Vec<String> = axis.factors.iter().map(u32::to_string).collect();
        let factors = if factors.is_empty() { "1".to_owned() } else { factors.join("x") };
        let _ = write!(text, " {}={factors}", name(&axis.name));
    }
    text
}

/// What follows `mesh`.
pub(super) fn read_mesh(cursor: &mut Cursor<'_>) -> Result<Mesh, IrError> {
    let mut axes = Vec::new();
    while matches!(cursor.peek(), Kind::Word(_) | Kind::Text(_)) && *cursor.peek_after(1) == Kind::Sign("=") {
        let mark = cursor.mark();
        let name = cursor.name("an axis")?;
        cursor.sign("=")?;
        let mut factors: Vec<u32> = vec![cursor.integer("factor")?];
        // `2x2` reads as the number 2 and the word `x2`.
        while let Kind::Word(word) = *cursor.peek()
            && let Some(rest) = word.strip_prefix('x')
            && !matches!(cursor.peek_after(1), Kind::Sign("="))
        {
            for factor in rest.split('x') {
                factors.push(factor.parse().map_err(|_| cursor.expected("factors such as `2x3`"))?);
            }
            cursor.next();
        }
        if factors == [1] {
            factors.clear();
        }
        axes.push(MeshAxis { name, factors });
        if axes.iter().map(|axis| axis.factors.len()).sum::<usize>() > MAX_SUB_AXES {
            return Err(cursor.error_at(mark, format!("more than {MAX_SUB_AXES} factors")));
        }
    }
    Ok(Mesh { axes })
}

/// `data+tensor.1`: axes of which all sub-axes are meant by their name, others by number; `()` for none.
fn sub_axes(mesh: &Mesh, set: SubAxes) -> String {
    let mut terms = Vec::new();
    let (mut first, mut rest) = (0, set);
    for axis in &mesh.axes {
        let all = (first..first + axis.factors.len()).filter(|&i| i < MAX_SUB_AXES);
        first += axis.factors.len();
        let all: Vec<usize> = all.collect();
        let held: Vec<usize> = all.iter().copied().filter(|&sub_axis| set.contains(sub_axis)).collect();
        let axis = name(&axis.name);
        if !all.is_empty() && held == all {
            terms.push(axis);
        } else {
            terms.extend(held.iter().map(|sub_axis| format!("{axis}.{}", sub_axis - all[0])));
        }
        rest = held.into_iter().fold(rest, |rest, sub_axis| rest.without(SubAxes::of(sub_axis)));
    }
    // Sub-axes beyond the mesh are wrong, but must be seen to be found.
    terms.extend(rest.iter().map(|sub_axis| format!("${sub_axis}")));
    if terms.is_empty() { "()".to_owned() } else { terms.join("+") }
}

fn read_sub_axes(cursor: &mut Cursor<'_>, mesh: &Mesh) -> Result<SubAxes, IrError> {
    if cursor.accept("(") {
        cursor.sign(")")?;
        return Ok(SubAxes::NONE);
    }
    let mut set = SubAxes::NONE;
    loop {
        let mark = cursor.mark();
        if cursor.accept("$") {
            let sub_axis: u8 = cursor.integer("sub-axis")?;
            if usize::from(sub_axis) >= MAX_SUB_AXES {
                return Err(cursor.error_at(mark, format!("sub-axes are below {MAX_SUB_AXES}")));
            }
            set = set.union(SubAxes::of(sub_axis.into()));
        } else {
            let axis = cursor.name("an axis of the mesh")?;
            if !mesh.axes.iter().any(|known| known.name == axis) {
                return Err(cursor.error_at(mark, format!("the mesh has no axis `{axis}`")));
            }
            let all = mesh.axis(&axis);
            if cursor.accept(".") {
                let number: usize = cursor.integer("sub-axis")?;
                let sub_axis = all.iter().nth(number);
                let sub_axis = sub_axis.ok_or_else(|| cursor.error_at(mark, format!("no sub-axis {number}")))?;
                set = set.union(SubAxes::of(sub_axis));
            } else {
                set = set.union(all);
            }
        }
        if !cursor.accept("+") {
            return Ok(set);
        }
    }
}

/// ` of [8, 256] split(0: data) partial(sum: tensor)`, or nothing before sharding.
pub(super) fn shard(mesh: &Mesh, shard: Option<&Shard>) -> String {
    let Some(Shard { global, placement }) = shard else { return String::new() };
    let mut text = format!(" of {global:?}");
    if !placement.splits.is_empty() {
        let splits: Vec<String> = placement.splits.iter().map(|one| split(mesh, global, one)).collect();
        let _ = write!(text, " split({})", splits.join(", "));
    }
    if let Some((combine, over)) = placement.partial {
        let _ = write!(text, " partial({}: {})", combine_name(combine), sub_axes(mesh, over));
    }
    text
}

fn split(mesh: &Mesh, global: &[u64], split: &Split) -> String {
    let over = sub_axes(mesh, split.over);
    let text = format!("{}: {over}", split.dim);
    let whole = global.get(usize::from(split.dim)).map(|&size| Segment { size, unit: 1 });
    if let ([segment], Some(whole)) = (split.segments.as_slice(), whole)
        && *segment == whole
    {
        return text;
    }
    let segment = |segment: &Segment| match segment.unit {
        1 => segment.size.to_string(),
        unit => format!("{}/{unit}", segment.size),
    };
    let segments: Vec<String> = split.segments.iter().map(segment).collect();
    format!("{text} segments [{}]", segments.join(", "))
}

/// What [`shard`] printed.
pub(super) fn read_shard(cursor: &mut Cursor<'_>, mesh: &Mesh) -> Result<Option<Shard>, IrError> {
    if !cursor.accept_word("of") {
        return Ok(None);
    }
    let global = cursor.list("[", "]", |cursor| cursor.integer("size"))?;
    let mut placement = Placement::replicated();
    if cursor.accept_word("split") {
        placement.splits = cursor.list("(", ")", |cursor| read_split(cursor, mesh, &global))?;
    }
    if cursor.accept_word("partial") {
        cursor.sign("(")?;
        let mark = cursor.mark();
        let word = cursor.word("`sum`, `prod`, `max` or `min`")?;
        let combine = combine_of(word);
        let combine = combine.ok_or_else(|| cursor.error_at(mark, format!("`{word}` combines nothing")))?;
        cursor.sign(":")?;
        placement.partial = Some((combine, read_sub_axes(cursor, mesh)?));
        cursor.sign(")")?;
    }
    Ok(Some(Shard { global, placement }))
}

fn read_split(cursor: &mut Cursor<'_>, mesh: &Mesh, global: &[u64]) -> Result<Split, IrError> {
    let mark = cursor.mark();
    let dim: u8 = cursor.integer("dimension")?;
    cursor.sign(":")?;
    let over = read_sub_axes(cursor, mesh)?;
    if cursor.accept_word("segments") {
        let segments = cursor.list("[", "]", |cursor| {
            let size = cursor.integer("size")?;
            let unit = if cursor.accept("/") { cursor.integer("unit")? } else { 1 };
            Ok(Segment { size, unit })
        })?;
        return Ok(Split { dim, over, segments });
    }
    let size = global.get(usize::from(dim));
    let size = *size.ok_or_else(|| cursor.error_at(mark, format!("there is no dimension {dim}")))?;
    Ok(Split::simple(dim, over, size, 1))
}
