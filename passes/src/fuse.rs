//! Which nodes become one step: a node, and those before it that its kernel takes along.
//!
//! For the host, a product takes the nodes that undo the layout of its weight, see [`crate::panels`]. For a CUDA device
//! a region grows backwards from its last node for as long as a kernel takes the whole: each value inside of it is
//! read by nobody else, so nothing is computed twice and nothing of it is stored.

use std::collections::{BTreeMap, BTreeSet};

use ir::{Graph, Node, NodeId, ValueDef, ValueId};
use kernels::cuda::{self, CudaTarget};
use planfile::{Op, Spec, SpecNode, TensorType};

use crate::error::PassError;
use crate::phase::{Fused, Region, Sharded};
use crate::settings::Settings;

/// Inputs of a region that grows: no kernel that takes others along reads more, and each would be tried.
const MAX_INPUTS: usize = 256;

/// Whether the node is only another view of its operand.
pub fn is_view(node: &Node) -> bool {
    matches!(node.op, Op::Reshape { .. })
}

/// Groups the nodes of every graph.
///
/// # Errors
/// [`PassError::Invalid`] where types do not fit.
pub fn run(Sharded(module): Sharded, settings: &Settings<'_>) -> Result<Fused, PassError> {
    let cuda = settings.cuda();
    let regions = module.graphs.iter().map(|graph| regions(graph, cuda.as_ref())).collect::<Result<_, _>>()?;
    Ok(Fused { module, regions })
}

/// The region that ends with each node, for these GPUs or for the host; none where another takes the node along, or where
/// it is only a view.
///
/// # Errors
/// [`PassError::Invalid`] where types do not fit.
pub fn regions(graph: &Graph, cuda: Option<&CudaTarget>) -> Result<Vec<Option<Region>>, PassError> {
    let regions = match cuda {
        None => layouts(graph),
        Some(target) => grown(graph, target),
    };
    regions.map_err(|why| PassError::invalid("fuse", why))
}

/// For each value the nodes that read it, each once; an output has two more readers that are no nodes.
fn readers(graph: &Graph) -> Vec<Vec<usize>> {
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); graph.values().len()];
    for (index, node) in graph.nodes().iter().enumerate() {
        for operand in &node.operands {
            if readers[operand.index()].last() != Some(&index) {
                readers[operand.index()].push(index);
            }
        }
    }
    for output in graph.outputs() {
        // Read by nobody in particular, and by more than one.
        readers[output.value.index()].extend([usize::MAX; 2]);
    }
    readers
}

/// The region of one node alone.
fn alone(graph: &Graph, index: usize) -> Result<Region, String> {
    let node = &graph.nodes()[index];
    let types = node.operands.iter().map(|&operand| graph.ty(operand).clone()).collect();
    let spec = Spec::of(node.op.clone(), types)?;
    Ok(Region { nodes: vec![NodeId(index as u32)], inputs: node.operands.clone(), spec })
}

/// The region of these nodes, ascending, whose inputs are in the order in which the last one comes to need them.
fn region(graph: &Graph, nodes: &BTreeSet<usize>) -> Result<Region, String> {
    let last = *nodes.last().ok_or("a region without nodes")?;
    if nodes.len() == 1 {
        return alone(graph, last);
    }
    let inside = |value: ValueId| match graph.value(value).def {
        ValueDef::Node(id, _) if nodes.contains(&id.index()) => Some(id.index()),
        _ => None,
    };
    let mut inputs: Vec<ValueId> = Vec::new();
    let mut pending: Vec<ValueId> = graph.nodes()[last].operands.iter().rev().copied().collect();
    while let Some(value) = pending.pop() {
        match inside(value) {
            Some(producer) => pending.extend(graph.nodes()[producer].operands.iter().rev()),
            None if !inputs.contains(&value) => inputs.push(value),
            None => {}
        }
    }
    let types: Vec<TensorType> = inputs.iter().map(|&input| graph.ty(input).clone()).collect();
    let mut spec = Spec { inputs: types, nodes: Vec::new(), results: Vec::new() };
    let mut numbers: Vec<ValueId> = inputs.clone();
    for &index in nodes {
        let node = &graph.nodes()[index];
        let number = |value: &ValueId| numbers.iter().position(|known| known == value).map(|number| number as u32);
        let operands: Option<Vec<u32>> = node.operands.iter().map(number).collect();
        let operands = operands.ok_or_else(|| format!("an operand of {} comes after it", node.op.name()))?;
        spec.nodes.push(SpecNode { op: node.op.clone(), operands });
        if index == last {
            let first = numbers.len() as u32;
            spec.results = (first..first + node.results.len() as u32).collect();
        }
        numbers.extend(&node.results);
    }
    spec.types()?;
    let nodes = nodes.iter().map(|&index| NodeId(index as u32)).collect();
    Ok(Region { nodes, inputs, spec })
}

/// Regions for the host.
fn layouts(graph: &Graph) -> Result<Vec<Option<Region>>, String> {
    let absorbed = absorbed(graph);
    let region_of = |(index, node): (usize, &Node)| {
        if is_view(node) || absorbed[index] {
            return Ok(None);
        }
        let mut nodes = BTreeSet::from([index]);
        let mut source = node.operands.get(1).copied();
        while let Some(value) = source
            && let ValueDef::Node(id, _) = graph.value(value).def
            && absorbed[id.index()]
        {
            nodes.insert(id.index());
            source = graph.node(id).operands.first().copied();
        }
        region(graph, &nodes).map(Some)
    };
    graph.nodes().iter().enumerate().map(region_of).collect()
}

/// For each node, whether it undoes the layout of a weight for a product: a chain that starts with the transposition of
/// a weight, each link read by the next alone, the last by the product.
fn absorbed(graph: &Graph) -> Vec<bool> {
    let readers = readers(graph);
    let mut absorbed = vec![false; graph.nodes().len()];
    for (index, node) in graph.nodes().iter().enumerate() {
        absorbed[index] = match (&node.op, node.operands.as_slice()) {
            (Op::Transpose { .. }, &[operand]) => matches!(graph.value(operand).def, ValueDef::Weight(_)),
            (Op::Reshape { .. } | Op::Slice { .. }, &[operand]) => match graph.value(operand).def {
                ValueDef::Node(before, _) => absorbed[before.index()],
                _ => false,
            },
            _ => false,
        };
    }
    for index in (0..graph.nodes().len()).rev() {
        let [result] = graph.nodes()[index].results.as_slice() else { continue };
        let [reader] = readers[result.index()].as_slice() else {
            absorbed[index] = false;
            continue;
        };
        let product = graph.nodes().get(*reader).is_some_and(|node| {
            let second = node.operands.get(1) == Some(result) && node.operands.first() != Some(result);
            matches!(node.op, Op::Dot { .. } | Op::Conv { .. }) && second
        });
        absorbed[index] &= product || absorbed.get(*reader) == Some(&true);
    }
    // What follows a link that is not part of a chain is not, either.
    for (index, node) in graph.nodes().iter().enumerate() {
        if let (true, Some(&operand)) = (absorbed[index], node.operands.first())
            && let ValueDef::Node(before, _) = graph.value(operand).def
        {
            absorbed[index] = absorbed[before.index()];
        }
    }
    absorbed
}

/// Transpositions around a window, which make sense together only: by the node that they end with. See
/// [`crate::layout`].
fn sandwiches(graph: &Graph, readers: &[Vec<usize>], target: &CudaTarget) -> Result<BTreeMap<usize, Region>, String> {
    let mut found = BTreeMap::new();
    let mut claimed: BTreeSet<usize> = BTreeSet::new();
    let transposes = |index: usize| matches!(graph.nodes().get(index), Some(Node { op: Op::Transpose { .. }, .. }));
    for (index, node) in graph.nodes().iter().enumerate() {
        let (Op::Conv { .. } | Op::Pool { .. }, &[result]) = (&node.op, node.results.as_slice()) else { continue };
        let &[after] = readers[result.index()].as_slice() else { continue };
        let mut nodes = BTreeSet::from([index, after]);
        for &operand in &node.operands {
            if let ValueDef::Node(id, _) = graph.value(operand).def
                && transposes(id.index())
                && readers[operand.index()] == [index]
            {
                nodes.insert(id.index());
            }
        }
        // Where two want the same transposition, the first has it.
        if !transposes(after) || nodes.len() != node.operands.len() + 2 || !nodes.is_disjoint(&claimed) {
            continue;
        }
        let region = region(graph, &nodes)?;
        if cuda::takes_along(&region.spec, target) {
            claimed.extend(nodes);
            found.insert(after, region);
        }
    }
    Ok(found)
}

/// Regions for a CUDA device: each node takes along as much of what is before it as one kernel takes.
fn grown(graph: &Graph, target: &CudaTarget) -> Result<Vec<Option<Region>>, String> {
    let readers = readers(graph);
    let mut sandwiches = sandwiches(graph, &readers, target)?;
    let inner: BTreeSet<usize> = sandwiches
        .iter()
        .flat_map(|(&last, region)| region.nodes.iter().map(|id| id.index()).filter(move |&index| index != last))
        .collect();
    let mut regions: Vec<Option<Region>> = vec![None; graph.nodes().len()];
    for (index, node) in graph.nodes().iter().enumerate() {
        if is_view(node) || inner.contains(&index) {
            continue;
        }
        if let Some(whole) = sandwiches.remove(&index) {
            regions[index] = Some(whole);
            continue;
        }
        let mut own = alone(graph, index)?;
        if node.op.is_collective() {
            regions[index] = Some(own);
            continue;
        }
        let mut refused: BTreeSet<ValueId> = BTreeSet::new();
        // Inputs before this one are refused.
        let mut at = 0;
        while own.inputs.len() <= MAX_INPUTS
            && let Some(&input) = own.inputs.get(at)
        {
            if refused.contains(&input) {
                at += 1;
                continue;
            }
            let mut merged = None;
            if let Some(taken) = behind(graph, &readers, &regions, &own, input) {
                let nodes = own.nodes.iter().map(|id| id.index()).chain(taken).collect();
                let candidate = region(graph, &nodes)?;
                if cuda::takes_along(&candidate.spec, target) {
                    merged = Some(candidate);
                }
            }
            match merged {
                Some(candidate) => (own, at) = (candidate, 0),
                None => {
                    refused.insert(input);
                }
            }
        }
        for inner in &own.nodes {
            regions[inner.index()] = None;
        }
        regions[index] = Some(own);
    }
    Ok(regions)
}

/// The nodes of the region that makes `input`, with the views between: what would have to be taken along. `None` where
/// anyone else reads any of it.
fn behind(
    graph: &Graph,
    readers: &[Vec<usize>],
    regions: &[Option<Region>],
    own: &Region,
    input: ValueId,
) -> Option<Vec<usize>> {
    let mut taken: Vec<usize> = Vec::new();
    let mut value = input;
    loop {
        let ValueDef::Node(id, _) = graph.value(value).def else { return None };
        let node = graph.node(id);
        let ours = |reader: &usize| own.nodes.iter().any(|id| id.index() == *reader) || taken.contains(reader);
        // A state may be written before the region's last node runs.
        let is_state = |operand: &ValueId| matches!(graph.value(*operand).def, ValueDef::State(_));
        if node.operands.iter().any(is_state) {
            return None;
        }
        if node.results.len() != 1 || node.op.is_collective() || !readers[value.index()].iter().all(ours) {
            return None;
        }
        taken.push(id.index());
        if !is_view(node) {
            let producer = regions[id.index()].as_ref()?;
            taken.extend(producer.nodes.iter().map(|id| id.index()).filter(|&index| index != id.index()));
            return Some(taken);
        }
        value = *node.operands.first()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_absorbed(text: &str, expected: &[bool]) {
        let module = ir::text::parse_lines(text).unwrap();
        assert_eq!(absorbed(&module.graphs[0]), expected);
    }

    #[test]
    fn chains_from_a_weight_to_a_product_are_absorbed() {
        check_absorbed(
            "%x: f32[4, 8]
             %w: f32[6, 8] = weight file 0 at 0
             %t = transpose %w [1, 0]
             %s: f32[8, 4] = slice %t {starts [0, 1], steps [1, 1]}
             %y = dot %x, %s {contract [1]x[0]}
             return %y",
            &[true, true, false],
        );
    }

    #[test]
    fn a_chain_with_other_readers_is_not() {
        // The transposed weight is read twice: what follows it must not be part of a kernel that would keep reading it.
        check_absorbed(
            "%x: f32[4, 8]
             %w: f32[6, 8] = weight file 0 at 0
             %t = transpose %w [1, 0]
             %a: f32[8, 3] = slice %t {starts [0, 0], steps [1, 1]}
             %b: f32[8, 3] = slice %t {starts [0, 3], steps [1, 1]}
             %y = dot %x, %a {contract [1]x[0]}
             %z = dot %x, %b {contract [1]x[0]}
             return %y, %z",
            &[false; 5],
        );
        let leaves = "%x: f32[4, 8]
             %w: f32[6, 8] = weight file 0 at 0
             %t = transpose %w [1, 0]
             %y = dot %x, %t {contract [1]x[0]}
             return %y, %t";
        check_absorbed(leaves, &[false, false]);
        let left_side = "%x: f32[4, 8]
             %w: f32[8, 6] = weight file 0 at 0
             %t = transpose %w [1, 0]
             %y = dot %t, %x {contract [1]x[1]}
             return %y";
        check_absorbed(left_side, &[false, false]);
    }

    /// Positions of the nodes of each region, with the number of inputs.
    fn on_cuda(text: &str) -> Vec<(Vec<usize>, usize)> {
        let module = ir::text::parse_lines(text).unwrap();
        let target = CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false };
        let regions = regions(&module.graphs[0], Some(&target)).unwrap();
        let shape = |region: Region| (region.nodes.iter().map(|id| id.index()).collect(), region.inputs.len());
        regions.into_iter().flatten().map(shape).collect()
    }

    #[test]
    fn a_wide_node_is_not_tried_with_each_of_its_inputs() {
        // Looking through all that was refused before each would be a million million comparisons.
        const OPERANDS: usize = 20_000;
        let (mut inputs, mut names) = (String::new(), Vec::new());
        for number in 0..OPERANDS {
            inputs.push_str(&format!("%x{number}: f32[1, 4]\n"));
            names.push(format!("%x{number}"));
        }
        let text = format!("{inputs} %y = concat {} {{axis 0}}\n return %y", names.join(", "));
        let module = ir::text::parse_lines(&text).unwrap();
        let target = CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false };
        let grown = grown(&module.graphs[0], &target).unwrap();
        assert_eq!(grown[0].as_ref().map(|region| region.inputs.len()), Some(OPERANDS));
    }

    #[test]
    fn a_product_takes_a_transposed_operand_along() {
        let text = "%x: f32[4, 8]
             %w: f32[6, 8]
             %t = transpose %w [1, 0]
             %y = dot %x, %t {contract [1]x[0]}
             return %y";
        assert_eq!(on_cuda(text), [(vec![0, 1], 2)]);
    }

    #[test]
    fn a_transposition_between_two_pools_belongs_to_one() {
        let text = "%x: f16[1, 8, 8, 4]
             %a = transpose %x [0, 3, 1, 2]
             %b: f16[1, 4, 4, 4] = pool %a {max, window [2, 2], strides [2, 2], pads [(0, 0), (0, 0)]}
             %c = transpose %b [0, 2, 3, 1]
             %d: f16[1, 4, 2, 2] = pool %c {max, window [1, 1], strides [2, 2], pads [(0, 0), (0, 0)]}
             %e = transpose %d [0, 3, 1, 2]
             return %e";
        let regions = on_cuda(text);
        let nodes: usize = regions.iter().map(|region| region.0.len()).sum();
        assert_eq!((regions.first(), nodes), (Some(&(vec![0, 1, 2], 1)), 5), "{regions:?}");
    }

    #[test]
    fn what_others_read_stays_a_step() {
        let text = "%x: f32[4, 8]
             %w: f32[6, 8]
             %t = transpose %w [1, 0]
             %y = dot %x, %t {contract [1]x[0]}
             return %y, %t";
        assert_eq!(on_cuda(text), [(vec![0], 1), (vec![1], 2)]);
    }
}
