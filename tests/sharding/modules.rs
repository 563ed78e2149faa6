//! Random modules with inputs to run them on.

use std::collections::BTreeMap;

use ir::{Entry, Graph, GraphId, Module, Port, ValueDef, ValueId, Weight, WeightId, origin};
use planfile::{Op, Recipe, Source, Tensor, TensorType};

use super::{compositions, operations};

/// A module with one entry, `main`, and its inputs.
pub(crate) struct Case {
    pub(crate) module: Module,
    pub(crate) inputs: BTreeMap<String, Tensor>,
}

/// What is known of a value of type `f32`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) id: ValueId,
    /// No element is farther from zero.
    pub(crate) range: f64,
    /// The same whatever the order of its sums: integers that `f32` holds. Only these may be sorted.
    pub(crate) exact: bool,
    /// No element is below 1: the reciprocal is finite, but not that of padding.
    pub(crate) positive: bool,
}

/// A module that grows, and the numbers that decide how.
pub(crate) struct Drawing {
    state: u64,
    pub(crate) graph: Graph,
    weights: Vec<Weight>,
    ports: Vec<Port>,
    inputs: BTreeMap<String, Tensor>,
    /// Values to build on, oldest first.
    pub(crate) known: Vec<Known>,
    /// Results of other types.
    pub(crate) integers: Vec<ValueId>,
}

/// Sizes that two, three, four, six and eight devices divide badly.
const SIZES: [u64; 8] = [1, 3, 5, 6, 7, 8, 12, 4];

/// Values stay below this many elements.
const MOST_ELEMENTS: u64 = 6000;

impl Drawing {
    pub(crate) fn new(seed: u64) -> Self {
        let graph = Graph::new("main");
        let (weights, ports, inputs) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { state: seed, graph, weights, ports, inputs, known: Vec::new(), integers: Vec::new() }
    }

    /// The module of a seed.
    pub(crate) fn case(seed: u64) -> Case {
        let mut drawing = Self::new(seed);
        let batch = drawing.pick(&[1, 2, 3, 5, 6]);
        let sizes = match drawing.below(3) {
            0 => [batch, drawing.size(), drawing.pick(&[3, 5, 6]), drawing.pick(&[3, 5, 6])].to_vec(),
            1 => [batch, drawing.size(), drawing.size()].to_vec(),
            _ => [batch, drawing.size()].to_vec(),
        };
        drawing.input(&sizes);
        if drawing.flag() {
            let leading = if drawing.flag() { batch } else { drawing.size() };
            let sizes = [leading, drawing.size()];
            drawing.input(&sizes);
        }
        for _ in 0..2 + drawing.below(8) {
            // What does not fit is left out.
            let _ =
                if drawing.below(4) == 0 { compositions::draw(&mut drawing) } else { operations::draw(&mut drawing) };
        }
        drawing.finish()
    }

    /// Steele, Lea and Flood's generator.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.below(2) == 1
    }

    pub(crate) fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }

    pub(crate) fn size(&mut self) -> u64 {
        self.pick(&SIZES)
    }

    pub(crate) fn axis(&mut self, rank: usize) -> usize {
        self.below(rank as u64) as usize
    }

    /// A permutation of the axes.
    pub(crate) fn permutation(&mut self, rank: usize) -> Vec<u8> {
        let mut axes: Vec<u8> = (0..rank as u8).collect();
        for position in (1..rank).rev() {
            axes.swap(position, self.axis(position + 1));
        }
        axes
    }

    /// Any value, the latest most often.
    pub(crate) fn any(&mut self) -> Known {
        let recent = self.known.len().saturating_sub(3);
        let from = if self.below(4) == 0 { 0 } else { recent };
        let index = from + self.axis(self.known.len() - from);
        self.known[index]
    }

    pub(crate) fn any_of_rank(&mut self, least: usize) -> Option<Known> {
        let value = self.any();
        (self.sizes(value).len() >= least).then_some(value)
    }

    pub(crate) fn sizes(&self, value: Known) -> Vec<u64> {
        self.graph.ty(value.id).sizes()
    }

    fn tensor(&mut self, sizes: &[u64], least: u64, count: u64) -> Tensor {
        let elements: u64 = sizes.iter().product();
        let values: Vec<f32> = (0..elements).map(|_| (self.below(count) + least) as f32 - 2.0).collect();
        Tensor::from_elements(sizes, &values).unwrap()
    }

    /// An input of small integers, or of small positive ones.
    pub(crate) fn input(&mut self, sizes: &[u64]) -> Known {
        let positive = self.below(3) == 0;
        let tensor = self.tensor(sizes, if positive { 3 } else { 0 }, 5);
        let id = self.add_input(tensor);
        self.know(id, 5.0, true, positive)
    }

    fn add_input(&mut self, tensor: Tensor) -> ValueId {
        let position = self.ports.len() as u32;
        let name = format!("x{position}");
        self.ports.push(Port { name: name.clone(), ty: tensor.ty.clone() });
        let id = self.graph.add_source(tensor.ty.clone(), ValueDef::Input(position));
        self.inputs.insert(name, tensor);
        id
    }

    /// Indices below `bound`, some of them from the end, as an input or as a weight.
    pub(crate) fn indices(&mut self, sizes: &[u64], bound: u64) -> ValueId {
        let elements: u64 = sizes.iter().product();
        let bound = bound as i64;
        let values: Vec<i64> = (0..elements).map(|_| self.below(2 * bound as u64) as i64 - bound).collect();
        let tensor = Tensor::from_elements(sizes, &values).unwrap();
        if self.flag() { self.add_input(tensor) } else { self.add_weight(tensor) }
    }

    fn add_weight(&mut self, tensor: Tensor) -> ValueId {
        let id = WeightId(self.weights.len() as u32);
        let recipe = Recipe::source(tensor.ty.clone(), Source::Inline(tensor.data));
        self.weights.push(Weight { name: format!("w{}", id.0), ty: tensor.ty.clone(), recipe });
        self.graph.add_source(tensor.ty, ValueDef::Weight(id))
    }

    /// A weight of small integers: a new one, or one of this shape that others use too.
    pub(crate) fn weight(&mut self, sizes: &[u64]) -> Known {
        let ty = TensorType::new(planfile::DType::F32, sizes);
        let tied = self.weights.iter().position(|weight| weight.ty == ty);
        if let Some(tied) = tied.filter(|_| self.state.is_multiple_of(2)) {
            let id = self.graph.add_source(ty, ValueDef::Weight(WeightId(tied as u32)));
            return Known { id, range: 2.0, exact: true, positive: false };
        }
        let tensor = self.tensor(sizes, 0, 5);
        Known { id: self.add_weight(tensor), range: 2.0, exact: true, positive: false }
    }

    /// A weight as a value to build on.
    pub(crate) fn know_weight(&mut self, sizes: &[u64]) {
        let weight = self.weight(sizes);
        self.known.push(weight);
    }

    pub(crate) fn know(&mut self, id: ValueId, range: f64, exact: bool, positive: bool) -> Known {
        let known = Known { id, range, exact: exact && range < f64::from(1 << 20), positive };
        self.known.push(known);
        known
    }

    /// Appends a node; `None` where it does not fit or makes too much.
    pub(crate) fn node(&mut self, op: Op, operands: &[ValueId]) -> Option<Vec<ValueId>> {
        let types: Vec<&TensorType> = operands.iter().map(|&operand| self.graph.ty(operand)).collect();
        let results = planfile::infer(&op, &types).ok()?;
        results.iter().all(|ty| ty.elements().is_some_and(|count| count <= MOST_ELEMENTS)).then_some(())?;
        let name = format!("{}{}", op.name(), self.graph.nodes().len());
        self.graph.add(op, operands, &origin(&name)).ok()
    }

    /// Appends a node of one `f32` result and remembers it, with what is known of `like` but for the range.
    pub(crate) fn value(&mut self, op: Op, operands: &[ValueId], like: Known, range: f64) -> Option<Known> {
        let id = self.node(op, operands)?[0];
        let known = self.know(id, range, like.exact, like.positive);
        if known.range < 200.0 {
            return Some(known);
        }
        self.known.pop();
        operations::tame(self, known)
    }

    /// The module so far; its outputs are the latest values, and any others.
    pub(crate) fn finish(mut self) -> Case {
        let mut outputs: Vec<ValueId> = self.known.iter().rev().take(2).map(|known| known.id).collect();
        outputs.extend(self.integers.last());
        // Anything else may leave as well: an input, a weight, a value of an early stage, the same value twice.
        for _ in 0..self.below(3) {
            outputs.push(self.any().id);
        }
        let mut ports = Vec::new();
        for (position, &value) in (0u32..).zip(&outputs) {
            ports.push(Port { name: format!("y{position}"), ty: self.graph.ty(value).clone() });
            self.graph.add_output(position, value);
        }
        let entry = Entry {
            name: "main".to_owned(),
            inputs: self.ports,
            outputs: ports,
            frozen: Vec::new(),
            stages: vec![GraphId(0)],
        };
        let module = Module {
            name: "random".to_owned(),
            weights: self.weights,
            graphs: vec![self.graph],
            entries: vec![entry],
            ..Module::default()
        };
        Case { module, inputs: self.inputs }
    }
}
