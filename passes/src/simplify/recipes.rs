//! Makes weights of what is computed from weights alone and too large to fold.
//!
//! before  %t = transpose %w [1, 0]     after  %y = dot %x, %w2     # %w2's recipe: transpose of %w's
//!         %y = dot %x, %t
//!
//! A recipe is evaluated box by box while the plan is written, so only primitives that turn a box into boxes are taken
//! at any size; others only while whole operands fit in memory. What repeats elements stays a node: it costs less to
//! repeat them when they are read than to store them. So does what would make a weight, or all weights together, much
//! larger than what they are made from: a small model must not become a large plan (`%b = concat %a, %a`, then
//! `%c = concat %b, %b`, and so on).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use cpu::recipe::WeightBytes;
use ir::{Graph, IrError, Module, Node, NodeId, ValueDef, ValueId, Weight, WeightId};
use planfile::op::PadMode;
use planfile::{Op, Recipe, RecipeInput, Spec, SpecNode, TensorType};

use super::NAME;
use super::fold::INLINE_BYTES;
use super::weights::Weights;
use crate::error::PassError;

/// Largest operand or result of a primitive that is evaluated whole.
const WHOLE_BYTES: u64 = 64 << 20;

/// Primitives of one recipe.
const MAX_RECIPE_NODES: usize = 256;

/// A result may have so many times the elements of all that it is made from: padded, so that kernels see round sizes.
const GROWTH: u64 = 2;

/// All results together may have so many times the elements of the module's own constants, which may each be needed in
/// more than one form, and [`FREE_ELEMENTS`] more.
const TOTAL_GROWTH: u64 = 4;
const FREE_ELEMENTS: u64 = 1 << 20;

/// Replaces constant values that non-constant nodes read.
pub(super) fn run(mut module: Module, bytes: &dyn WeightBytes) -> Result<Module, PassError> {
    let (mut weights, renamed) = Weights::new(&module.weights, bytes);
    if renamed.iter().enumerate().any(|(index, id)| id.index() != index) {
        return Err(PassError::Invalid { pass: NAME, why: "equal weights were not merged".to_owned() });
    }
    let mut budget = Budget::new(&module.weights);
    for graph in &mut module.graphs {
        let absorbed = absorbed(graph, &mut weights, &mut budget);
        if absorbed.is_empty() {
            continue;
        }
        // What made them has no readers then, and goes.
        *graph = graph.rewrite(|edit, node| {
            let mut kept = edit.keep(node)?;
            for (result, kept) in node.results.iter().zip(&mut kept) {
                if let Some(&id) = absorbed.get(result) {
                    *kept = edit.add_source(weights.get(id).ty.clone(), ValueDef::Weight(id));
                }
            }
            Ok::<_, IrError>(kept)
        })?;
    }
    module.weights = weights.into_table();
    Ok(module.without_unread_weights())
}

/// Elements that recipes may still make.
struct Budget {
    elements: u64,
}

impl Budget {
    /// What the weights' ingredients justify, less what their recipes make already.
    fn new(weights: &[Weight]) -> Self {
        let ingredients: HashSet<&RecipeInput> = weights.iter().flat_map(|weight| &weight.recipe.inputs).collect();
        let sources = sum(ingredients.into_iter().map(|input| &input.ty));
        let made = sum(weights.iter().filter(|weight| !weight.recipe.spec.nodes.is_empty()).map(|weight| &weight.ty));
        Self { elements: sources.saturating_mul(TOTAL_GROWTH).saturating_add(FREE_ELEMENTS).saturating_sub(made) }
    }

    /// Whether there was room for so many.
    fn take(&mut self, elements: u64) -> bool {
        let left = self.elements.checked_sub(elements);
        self.elements = left.unwrap_or(self.elements);
        left.is_some()
    }
}

/// Elements of all; saturates.
fn sum<'a>(types: impl Iterator<Item = &'a TensorType>) -> u64 {
    types.map(|ty| ty.elements().unwrap_or(u64::MAX)).fold(0, u64::saturating_add)
}

/// What is known of a constant value.
#[derive(Clone)]
struct Constant {
    /// Primitives that make it, values read by several counted more than once.
    length: usize,
    /// Weights that it is made from.
    leaves: Rc<BTreeSet<WeightId>>,
}

/// By value; none if not constant, or for want of room.
fn constants(graph: &Graph, weights: &Weights<'_>, kept: &HashSet<NodeId>) -> Vec<Option<Constant>> {
    let mut constants: Vec<Option<Constant>> = graph
        .values()
        .iter()
        .map(|value| match value.def {
            ValueDef::Weight(id) => {
                let length = weights.get(id).recipe.spec.nodes.len();
                Some(Constant { length, leaves: Rc::new(BTreeSet::from([id])) })
            }
            ValueDef::Input(_) | ValueDef::State(_) | ValueDef::Node(..) => None,
        })
        .collect();
    for (number, node) in graph.nodes().iter().enumerate() {
        let absorbed = || {
            let of = |operand: &ValueId| constants[operand.index()].as_ref();
            let length = node.operands.iter().map(|operand| of(operand).map(|constant| constant.length));
            let length = length.sum::<Option<usize>>()? + 1;
            if length > MAX_RECIPE_NODES || kept.contains(&NodeId(number as u32)) || !absorbs(graph, node) {
                return None;
            }
            let mut operands = node.operands.iter().filter_map(of).map(|constant| &constant.leaves);
            let first = Rc::clone(operands.next()?);
            let leaves = operands.fold(first, |mut leaves, more| {
                if !Rc::ptr_eq(&leaves, more) && !more.is_subset(&leaves) {
                    Rc::make_mut(&mut leaves).extend(more.iter());
                }
                leaves
            });
            justified(graph, node, &leaves, weights).then_some(Constant { length, leaves })
        };
        let constant = absorbed();
        for result in &node.results {
            constants[result.index()].clone_from(&constant);
        }
    }
    constants
}

/// Whether what a node makes is small, or not much larger than what it is made from.
fn justified(graph: &Graph, node: &Node, leaves: &BTreeSet<WeightId>, weights: &Weights<'_>) -> bool {
    let ingredients: HashSet<&RecipeInput> = leaves.iter().flat_map(|&id| &weights.get(id).recipe.inputs).collect();
    let sources = sum(ingredients.into_iter().map(|input| &input.ty));
    let small = |&result: &ValueId| graph.ty(result).bytes().is_some_and(|bytes| bytes <= INLINE_BYTES);
    let made = sum(node.results.iter().map(|&result| graph.ty(result)));
    node.results.iter().all(small) || made <= sources.saturating_mul(GROWTH)
}

/// The weight of each constant value that is worth one.
fn absorbed(graph: &Graph, weights: &mut Weights<'_>, budget: &mut Budget) -> HashMap<ValueId, WeightId> {
    // Nodes that stay for want of room. What they read may be wanted instead.
    let mut kept: HashSet<NodeId> = HashSet::new();
    let wanted = loop {
        let (wanted, before) = (wanted(graph, &constants(graph, weights, &kept)), kept.len());
        let mut left = Budget { elements: budget.elements };
        for &value in &wanted {
            if let ValueDef::Node(id, _) = graph.value(value).def
                && !left.take(graph.ty(value).elements().unwrap_or(u64::MAX))
            {
                kept.insert(id);
            }
        }
        if kept.len() == before {
            *budget = left;
            break wanted;
        }
    };
    let mut absorbed = HashMap::new();
    for &value in &wanted {
        let recipe = compose(graph, value, weights);
        let (origin, name) = graph.producer(value).map(|node| (node.origin.clone(), node.op.name())).unzip();
        let (origin, name) = (origin.unwrap_or_else(|| [].into()), name.unwrap_or("weight"));
        absorbed.insert(value, weights.add(graph.ty(value).clone(), recipe, &origin, name));
    }
    absorbed
}

/// Constant values that nodes read which are none, and constant outputs.
fn wanted(graph: &Graph, constants: &[Option<Constant>]) -> BTreeSet<ValueId> {
    let constant =
        |value: ValueId| constants[value.index()].is_some() && matches!(graph.value(value).def, ValueDef::Node(..));
    let mut wanted: BTreeSet<ValueId> = BTreeSet::new();
    for node in graph.nodes() {
        if node.results.iter().all(|&result| !constant(result)) {
            wanted.extend(node.operands.iter().copied().filter(|&operand| constant(operand)));
        }
    }
    wanted.extend(graph.outputs().iter().map(|output| output.value).filter(|&value| constant(value)));
    wanted
}

/// Whether a node of constants may become part of a recipe.
fn absorbs(graph: &Graph, node: &Node) -> bool {
    let op = &node.op;
    if op.is_collective() || matches!(op, Op::Append { .. }) || node.operands.is_empty() {
        return false;
    }
    let elements = |values: &[ValueId]| -> u64 {
        values.iter().map(|&value| graph.ty(value).elements().unwrap_or(u64::MAX)).fold(0, u64::saturating_add)
    };
    let within = |limit: u64| {
        let mut values = node.operands.iter().chain(&node.results);
        values.all(|&value| graph.ty(value).bytes().is_some_and(|bytes| bytes <= limit))
    };
    let room = if matches!(op, Op::Pad { .. }) { GROWTH } else { 1 };
    let small = node.results.iter().all(|&value| graph.ty(value).bytes().is_some_and(|bytes| bytes <= INLINE_BYTES));
    let repeats = !small && elements(&node.results) > elements(&node.operands).saturating_mul(room);
    !repeats && (maps_boxes(op) || within(WHOLE_BYTES))
}

/// Whether a box of the result needs boxes of the operands only.
fn maps_boxes(op: &Op) -> bool {
    matches!(
        op,
        Op::Pointwise { .. }
            | Op::Reshape { .. }
            | Op::Transpose { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Broadcast { .. }
            | Op::Pad { mode: PadMode::Constant, .. }
    )
}

/// The recipe of a constant value: those of the weights it is made from, joined, and the nodes on the way.
fn compose(graph: &Graph, value: ValueId, weights: &Weights<'_>) -> Recipe {
    let (nodes, leaves) = ancestors(graph, value);
    let mut joined = Joined::default();
    // Inputs are numbered first, so all of them must be known before any primitive.
    let recipe_of = |leaf: ValueId| match graph.value(leaf).def {
        ValueDef::Weight(id) => Some(&weights.get(id).recipe),
        ValueDef::Input(_) | ValueDef::State(_) | ValueDef::Node(..) => None,
    };
    for &leaf in &leaves {
        recipe_of(leaf).into_iter().flat_map(|recipe| &recipe.inputs).for_each(|input| joined.add_input(input));
    }
    joined.values = joined.inputs.len() as u32;
    let mut numbers: HashMap<ValueId, u32> = HashMap::new();
    for &leaf in &leaves {
        if let Some(number) = recipe_of(leaf).and_then(|recipe| joined.add_recipe(recipe)) {
            numbers.insert(leaf, number);
        }
    }
    for id in nodes {
        let node = graph.node(id);
        let operands = node.operands.iter().filter_map(|operand| numbers.get(operand).copied()).collect();
        let first = joined.add_node(&node.op, operands, node.results.len() as u32);
        numbers.extend(node.results.iter().copied().zip(first..));
    }
    let results = numbers.get(&value).copied().into_iter().collect();
    let spec =
        Spec { inputs: joined.inputs.iter().map(|input| input.ty.clone()).collect(), nodes: joined.nodes, results };
    Recipe { inputs: joined.inputs, spec }
}

/// The nodes that a value needs, in order, and the other values they read, by first use.
fn ancestors(graph: &Graph, value: ValueId) -> (BTreeSet<NodeId>, Vec<ValueId>) {
    let (mut nodes, mut leaves, mut seen) = (BTreeSet::new(), Vec::new(), HashSet::new());
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        if !seen.insert(value) {
            continue;
        }
        match graph.value(value).def {
            ValueDef::Node(id, _) => {
                nodes.insert(id);
                open.extend(graph.node(id).operands.iter().rev());
            }
            ValueDef::Weight(_) | ValueDef::Input(_) | ValueDef::State(_) => leaves.push(value),
        }
    }
    (nodes, leaves)
}

/// A recipe under construction: equal ingredients and equal primitives are there once.
#[derive(Default)]
struct Joined {
    inputs: Vec<RecipeInput>,
    input_numbers: HashMap<RecipeInput, u32>,
    nodes: Vec<SpecNode>,
    node_numbers: HashMap<SpecNode, u32>,
    /// Values so far.
    values: u32,
}

impl Joined {
    fn add_input(&mut self, input: &RecipeInput) {
        if !self.input_numbers.contains_key(input) {
            self.input_numbers.insert(input.clone(), self.inputs.len() as u32);
            self.inputs.push(input.clone());
        }
    }

    /// The number of the first result.
    fn add_node(&mut self, op: &Op, operands: Vec<u32>, results: u32) -> u32 {
        let node = SpecNode { op: op.clone(), operands };
        if let Some(&first) = self.node_numbers.get(&node) {
            return first;
        }
        let first = self.values;
        self.values += results;
        self.node_numbers.insert(node.clone(), first);
        self.nodes.push(node);
        first
    }

    /// The number of the recipe's result; `None` if the recipe is malformed.
    fn add_recipe(&mut self, recipe: &Recipe) -> Option<u32> {
        let types = recipe.spec.types().ok()?;
        let mut numbers: Vec<u32> = Vec::new();
        for input in &recipe.inputs {
            numbers.push(*self.input_numbers.get(input)?);
        }
        for node in &recipe.spec.nodes {
            let operands: Vec<u32> =
                node.operands.iter().map(|&operand| numbers.get(operand as usize).copied()).collect::<Option<_>>()?;
            let operand_types: Vec<_> = node.operands.iter().map(|&operand| &types[operand as usize]).collect();
            let results = planfile::infer(&node.op, &operand_types).ok()?.len() as u32;
            let first = self.add_node(&node.op, operands, results);
            numbers.extend(first..first + results);
        }
        numbers.get(*recipe.spec.results.first()? as usize).copied()
    }
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn large_constants_become_recipes() {
        check(
            "%x: f32[128]
             %w: f32[128, 96] = weight file 0 at 16
             %r: f32[96, 1] = weight file 0 at 0
             %t = transpose %w [1, 0]
             %u = pointwise %t, %r {$0 * $1}
             %y = dot %u, %x {contract [1]x[0]}
             return %y",
            "%x: f32[128]
             %u: f32[96, 128] = weight recipe {
               %0: f32[128, 96] = file 0 at 16
               %1: f32[96, 1] = file 0 at 0
               %2: f32[96, 128] = transpose %0 [1, 0]
               %3: f32[96, 128] = pointwise %2, %1 {$0 * $1}
               return %3
             }
             %y = dot %u, %x {contract [1]x[0]}
             return %y",
        );
    }

    #[test]
    fn recipes_of_recipes_share_ingredients() {
        check(
            "%x: f32[100, 80]
             %w: f32[80, 100] = weight recipe {
               %0: f32[8000] = file 0 at 0
               %1: f32[80, 100] = reshape %0
               return %1
             }
             %v: f32[100, 80] = weight recipe {
               %0: f32[8000] = file 0 at 0
               %1: f32[80, 100] = reshape %0
               %2: f32[100, 80] = transpose %1 [1, 0]
               return %2
             }
             %t = transpose %w [1, 0]
             %c = concat %t, %v {axis 1}
             %y = dot %x, %c {contract [0]x[0]}
             return %y",
            "%x: f32[100, 80]
             %c: f32[100, 160] = weight recipe {
               %0: f32[8000] = file 0 at 0
               %1: f32[80, 100] = reshape %0
               %2: f32[100, 80] = transpose %1 [1, 0]
               %3: f32[100, 160] = concat %2, %2 {axis 1}
               return %3
             }
             %y = dot %x, %c {contract [0]x[0]}
             return %y",
        );
    }

    #[test]
    fn repeated_elements_are_not_stored() {
        check_unchanged(
            "%x: f32[96, 96]
             %w: f32[96, 1] = weight file 0 at 0
             %b: f32[96, 96] = broadcast %w
             %y = dot %x, %b {contract [1]x[0]}
             return %y",
        );
    }

    #[test]
    fn doubling_ends_at_twice_the_source() {
        check(
            "%x: f32[8000]
             %w: f32[8000] = weight file 0 at 0
             %a = concat %w, %w {axis 0}
             %n = pointwise %a {-$0}
             %b = concat %a, %n {axis 0}
             %m = pointwise %b {abs($0)}
             %c = concat %b, %m {axis 0}
             %y = concat %x, %c {axis 0}
             return %y",
            "%x: f32[8000]
             %a: f32[16000] = weight recipe {
               %0: f32[8000] = file 0 at 0
               %1: f32[16000] = concat %0, %0 {axis 0}
               return %1
             }
             %n: f32[16000] = weight recipe {
               %0: f32[8000] = file 0 at 0
               %1: f32[16000] = concat %0, %0 {axis 0}
               %2: f32[16000] = pointwise %1 {-$0}
               return %2
             }
             %b = concat %a, %n {axis 0}
             %m = pointwise %b {abs($0)}
             %c = concat %b, %m {axis 0}
             %y = concat %x, %c {axis 0}
             return %y",
        );
    }

    #[test]
    fn many_forms_of_one_constant_stay_within_the_budget() {
        // Each could be a weight; all together are far more than the constant and the free room.
        let count = 12;
        let forms: String = (1..=count)
            .map(|n| format!("%f{n} = pointwise %w {{$0 * {n}.5}}\n%r{n} = dot %x, %f{n} {{contract [0]x[0]}}\n"))
            .collect();
        let results: Vec<String> = (1..=count).map(|n| format!("%r{n}")).collect();
        let text =
            format!("%x: f32[1048576]\n%w: f32[1048576] = weight file 0 at 0\n{forms}return {}", results.join(", "));
        let module = crate::simplify::simplify(ir::text::parse_lines(&text).unwrap(), &cpu::recipe::NoFiles).unwrap();
        let made = module.weights.iter().filter(|weight| !weight.recipe.spec.nodes.is_empty()).count();
        assert_eq!(made, 5);
        let again = crate::simplify::simplify(module.clone(), &cpu::recipe::NoFiles).unwrap();
        assert!(again == module);
    }

    #[test]
    fn what_an_input_takes_part_in_stays() {
        check_unchanged(
            "%x: f32[96, 96]
             %w: f32[96, 96] = weight file 0 at 0
             %a = concat %w, %x {axis 0}
             %y = transpose %a [1, 0]
             return %y",
        );
    }
}
