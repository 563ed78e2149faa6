//! Cuts what is wider than a kernel for a CUDA device into a tree: concatenations of many operands, and tensors that are
//! split into many parts.
//!
//! before  %y: f32[8000] = concat %x0, … %x7999 {axis 0}       after  %a: f32[128] = concat %x0, … %x127 {axis 0}
//!                                                                    …
//!                                                                    %y: f32[8000] = concat %a, … {axis 0}
//!
//! before  %p: f32[1] = slice %x {starts [77], steps [1]}      after  %c: f32[32] = slice %x {starts [64], steps [1]}
//!         … and 2000 more                                            %p: f32[1] = slice %c {starts [13], steps [1]}
//!
//! Each operand is a parameter of the kernel, and parameters have a limit. Each start is a kernel of its own, so that as
//! many would be compiled as there are parts; in pieces of one size the same starts come back, and 32 kernels for each
//! level of the tree do for any number of parts. Every level moves the tensor once more.
//!
//! The host takes any number of operands, and a start costs it nothing: its plans stay as they are.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use ir::{Edit, Graph, IrError, Node, Origin, ValueDef, ValueId};
use planfile::{Dim, Op, RankScalar};

use crate::error::PassError;
use crate::phase::Sharded;
use crate::settings::Settings;

/// Operands of one concatenation. A thread looks for its operand among all of them.
const OPERANDS_MAX: usize = 128;
/// Parts that are read from one piece.
const PARTS_MAX: usize = 32;
/// Where parts lie far apart, pieces hold mostly what nobody reads: more than this many times the parts are no pieces,
/// unless the whole tensor has fewer bytes than [`FREE_BYTES`].
const WASTE_MAX: u64 = 2;
/// Moved in less time than [`PARTS_MAX`] launches take.
const FREE_BYTES: u64 = 16 << 20;

/// Narrows every graph, for CUDA devices.
///
/// # Errors
/// [`PassError::Ir`] if a type does not follow.
pub fn run(Sharded(mut module): Sharded, settings: &Settings<'_>) -> Result<Sharded, PassError> {
    if !settings.target.device.architecture.is_host() {
        for graph in &mut module.graphs {
            *graph = narrowed(graph)?;
        }
    }
    Ok(Sharded(module))
}

fn narrowed(graph: &Graph) -> Result<Graph, IrError> {
    let mut pieces = Pieces::of(graph);
    graph.rewrite(|edit, node| match (&node.op, node.results.first()) {
        (Op::Concat { .. }, _) if node.operands.len() > OPERANDS_MAX => joined(edit, node),
        (Op::Slice { .. }, Some(result)) => match pieces.by_part.get(result) {
            Some(&piece) => pieces.part(piece, edit, node),
            None => edit.keep(node),
        },
        _ => edit.keep(node),
    })
}

/// A concatenation of concatenations.
fn joined(edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, IrError> {
    let mut operands = edit.operands(node)?;
    while operands.len() > OPERANDS_MAX {
        let mut group = |group: &[ValueId]| match group {
            [one] => Ok(*one),
            group => edit.add_one(node.op.clone(), group, &node.origin),
        };
        operands = operands.chunks(OPERANDS_MAX).map(&mut group).collect::<Result<_, _>>()?;
    }
    edit.add(node.op.clone(), &operands, &node.origin)
}

/// A run of a tensor along an axis: parts are read from it, or smaller pieces.
struct Piece {
    whole: ValueId,
    axis: usize,
    range: Range<u64>,
    /// The piece that it is read from; the tensor itself if none.
    within: Option<usize>,
    made: Option<ValueId>,
}

/// Where a part lies, and the value that it becomes.
type Part = (Range<u64>, ValueId);

/// What tensors of many parts are cut into first.
#[derive(Default)]
struct Pieces {
    all: Vec<Piece>,
    /// The piece that a part is read from.
    by_part: HashMap<ValueId, usize>,
}

impl Pieces {
    fn of(graph: &Graph) -> Self {
        let mut parts: BTreeMap<(ValueId, usize), Vec<Part>> = BTreeMap::new();
        for node in graph.nodes() {
            if let (Some((whole, axis, range)), &[result]) = (part(graph, node), node.results.as_slice()) {
                parts.entry((whole, axis)).or_default().push((range, result));
            }
        }
        let mut pieces = Self::default();
        for ((whole, axis), mut parts) in parts {
            parts.sort_unstable_by_key(|(range, part)| (range.start, range.end, *part));
            pieces.cut(graph, (whole, axis), parts);
        }
        pieces
    }

    /// Puts parts, ascending, into pieces, these into larger ones, and so on.
    fn cut(&mut self, graph: &Graph, (whole, axis): (ValueId, usize), parts: Vec<Part>) {
        let ty = graph.ty(whole);
        let (size, free) = (ty.size(axis), ty.bytes().is_some_and(|bytes| bytes <= FREE_BYTES));
        let length = |ranges: &[Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum::<u64>();
        // The parts at first, then the pieces of each level.
        let mut ranges: Vec<Range<u64>> = parts.iter().map(|(range, _)| range.clone()).collect();
        let mut below = None;
        while ranges.len() > PARTS_MAX {
            let cover = |group: &[Range<u64>]| {
                let end = group.iter().map(|range| range.end).max().unwrap_or(size);
                group.first().map_or(0, |range| range.start)..end
            };
            let covers: Vec<Range<u64>> = ranges.chunks(PARTS_MAX).map(cover).collect();
            let is_waste = length(&covers) > length(&ranges).saturating_mul(WASTE_MAX) && !free;
            // A piece that is the whole tensor is no piece.
            if is_waste || covers.contains(&(0..size)) {
                break;
            }
            let level = self.all.len();
            let outer = (0..ranges.len()).map(|number| level + number / PARTS_MAX);
            match below {
                None => self.by_part.extend(parts.iter().map(|part| part.1).zip(outer)),
                Some(below) => {
                    self.all[below..].iter_mut().zip(outer).for_each(|(piece, outer)| piece.within = Some(outer))
                }
            }
            let piece = |range: &Range<u64>| Piece { whole, axis, range: range.clone(), within: None, made: None };
            self.all.extend(covers.iter().map(piece));
            (below, ranges) = (Some(level), covers);
        }
    }

    /// A node's part, read from its piece.
    fn part(&mut self, piece: usize, edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, IrError> {
        let Piece { axis, range, .. } = &self.all[piece];
        let mut op = node.op.clone();
        if let Op::Slice { starts, .. } = &mut op
            && let RankScalar::Uniform(start) = &mut starts[*axis]
        {
            *start -= range.start.cast_signed();
        }
        let from = self.made(piece, edit, &node.origin)?;
        edit.add(op, &[from], &node.origin)
    }

    /// The value of a piece, made where it is first read: what it is cut from need not live longer.
    fn made(&mut self, piece: usize, edit: &mut Edit<'_>, origin: &Origin) -> Result<ValueId, IrError> {
        let Piece { whole, axis, ref range, within, made } = self.all[piece];
        if let Some(known) = made {
            return Ok(known);
        }
        let range = range.clone();
        let (from, before) = match within {
            // Pieces within pieces are as deep as a logarithm of their number.
            Some(outer) => (self.made(outer, edit, origin)?, self.all[outer].range.start),
            None => (edit.value(whole)?, 0),
        };
        let mut sizes = edit.new_graph().ty(from).sizes();
        let mut starts = vec![RankScalar::Uniform(0); sizes.len()];
        sizes[axis] = range.end - range.start;
        starts[axis] = RankScalar::Uniform((range.start - before).cast_signed());
        let op = Op::Slice { starts, steps: vec![1; sizes.len()], sizes };
        let value = edit.add_one(op, &[from], origin)?;
        self.all[piece].made = Some(value);
        Ok(value)
    }
}

/// The tensor, axis and range of a node that takes a part of a tensor along one axis, and all of it along the others.
fn part(graph: &Graph, node: &Node) -> Option<(ValueId, usize, Range<u64>)> {
    let (Op::Slice { starts, steps, sizes }, &[whole]) = (&node.op, node.operands.as_slice()) else { return None };
    // A state may be written between the first part that is read and the last.
    if matches!(graph.value(whole).def, ValueDef::State(_)) {
        return None;
    }
    let dims = &graph.ty(whole).dims;
    let mut found = None;
    for (axis, (((dim, start), &step), &size)) in dims.iter().zip(starts).zip(steps).zip(sizes).enumerate() {
        let (&Dim::Static(whole), RankScalar::Uniform(start)) = (dim, start) else { return None };
        if (step, size) == (1, whole) && *start == 0 {
            continue;
        }
        let start = u64::try_from(*start).ok()?;
        if found.is_some() || size == 0 || (step != 1 && size > 1) {
            return None;
        }
        found = Some((axis, start..start.checked_add(size)?));
    }
    found.map(|(axis, range)| (whole, axis, range))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ir::Module;

    use super::*;
    use crate::harness::{Case, H200, parse};

    fn case() -> Case<Sharded> {
        Case::new(run, H200)
    }

    /// Nodes by what kernel they would need.
    fn kernels(module: &Module) -> usize {
        let graph = &module.graphs[0];
        let kernel = |node: &Node| format!("{:?} {}", node.op, graph.ty(node.operands[0]));
        graph.nodes().iter().map(kernel).collect::<BTreeSet<_>>().len()
    }

    /// `x` of `[2, size]`, and those parts of it along its last dimension.
    fn split(size: u64, parts: impl Iterator<Item = Range<u64>>) -> String {
        let (mut text, mut results) = (format!("%x: i64[2, {size}]\n"), Vec::new());
        for (number, part) in parts.enumerate() {
            let (start, length) = (part.start, part.end - part.start);
            text.push_str(&format!("%y{number}: i64[2, {length}] = slice %x {{starts [0, {start}], steps [1, 1]}}\n"));
            results.push(format!("%y{number}"));
        }
        format!("{text}return {}", results.join(", "))
    }

    /// Parts that are read from pieces.
    fn cut(text: &str) -> usize {
        Pieces::of(&parse(text).graphs[0]).by_part.len()
    }

    #[test]
    fn many_parts_are_few_kernels() {
        let narrow = case().run(&split(3 * 5000, (0..5000).map(|part| 3 * part..3 * part + 3)));
        // Three levels of at most 32 starts, and what is left over at the end of each.
        assert!(kernels(&narrow) <= 4 * PARTS_MAX, "{} kernels", kernels(&narrow));
        assert!((5100..5200).contains(&narrow.graphs[0].nodes().len()));
    }

    #[test]
    fn parts_of_any_size_that_overlap_are_what_they_were() {
        let narrow = case().run(&split(5000, (0..900).rev().map(|part| 5 * part..5 * part + 1 + part % 70)));
        assert!(narrow.graphs[0].nodes().len() > 900);
    }

    #[test]
    fn few_parts_and_parts_that_lie_far_apart_stay_as_they_are() {
        assert_eq!(cut(&split(64, (0..32).map(|part| 2 * part..2 * part + 2))), 0);
        // 64 MB for 80 kB, and 1.6 MB for 2 kB.
        assert_eq!(cut(&split(4_000_000, (0..100).map(|part| 40_000 * part..40_000 * part + 50))), 0);
        assert_eq!(cut(&split(100_000, (0..100).map(|part| 1000 * part..1000 * part + 1))), 100);
        // A piece as large as the tensor is none.
        case().check_unchanged(&split(50, (0..50).map(|part| (part % 7)..50 - part % 6)));
    }

    #[test]
    fn a_wide_concatenation_is_a_tree() {
        for width in [129, 300, 17_000] {
            let names: Vec<String> = (0..width).map(|input| format!("%x{input}")).collect();
            let inputs: String = (0..width).map(|i| format!("%x{i}: i64[2, {}]\n", 1 + i % 3)).collect();
            let narrow = case().run(&format!("{inputs}%y = concat {} {{axis 1}}\nreturn %y", names.join(", ")));
            assert!(narrow.graphs[0].nodes().iter().all(|node| node.operands.len() <= OPERANDS_MAX));
        }
    }

    #[test]
    fn what_is_narrow_enough_stays_as_it_is() {
        let names: Vec<String> = (0..OPERANDS_MAX).map(|input| format!("%x{input}")).collect();
        let inputs: String = names.iter().map(|name| format!("{name}: i64[1]\n")).collect();
        case().check_unchanged(&format!("{inputs}%y = concat {} {{axis 0}}\nreturn %y", names.join(", ")));
    }

    #[test]
    fn parts_along_several_dimensions_or_by_steps_are_no_parts() {
        let slices = |slice: &dyn Fn(u64) -> String| {
            let lines: String = (0..40).map(|part| format!("%y{part}: {}\n", slice(part))).collect();
            let results: Vec<String> = (0..40).map(|part| format!("%y{part}")).collect();
            case().check_unchanged(&format!("%x: i64[80, 80]\n{lines}return {}", results.join(", ")));
        };
        slices(&|part| format!("i64[1, 1] = slice %x {{starts [{part}, {part}], steps [1, 1]}}"));
        slices(&|part| format!("i64[2, 80] = slice %x {{starts [{part}, 0], steps [3, 1]}}"));
        slices(&|part| format!("i64[2, 80] = slice %x {{starts [{part}, 79], steps [1, -1]}}"));
    }
}
