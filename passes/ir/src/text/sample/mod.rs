//! Random modules that verify: every operation, attribute, placement and source, drawn from a list of choices.

mod operations;

use planfile::op::Groups;
use planfile::{
    Buffer, Combine, DType, Dim, ExtentId, FrozenInput, Op, RankScalar, Real, Recipe, RecipeInput, Scalar, Source,
    SourceFile, Spec, SpecNode, Tensor, TensorType,
};

use operations::{COLLECTIVE, KINDS, op};

use crate::ids::{GraphId, StateId, ValueId, WeightId};
use crate::mesh::{Mesh, MeshAxis, Placement, Segment, Split, SubAxes};
use crate::module::{Entry, Graph, Module, Origin, Output, Port, Shard, State, ValueDef, Weight};

/// Numbers that decide everything; zeros when they run out, so that shorter lists make simpler modules.
pub(crate) struct Choices<'c>(std::slice::Iter<'c, u32>);

impl<'c> Choices<'c> {
    pub(crate) fn new(numbers: &'c [u32]) -> Self {
        Self(numbers.iter())
    }

    fn next(&mut self) -> u32 {
        self.0.next().copied().unwrap_or_default()
    }

    fn below(&mut self, bound: u64) -> u64 {
        u64::from(self.next()) % bound.max(1)
    }

    fn flag(&mut self) -> bool {
        self.below(2) == 1
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }

    fn size(&mut self) -> u64 {
        1 + self.below(4)
    }

    fn sizes(&mut self, least: u64) -> Vec<u64> {
        (0..least + self.below(3)).map(|_| self.size()).collect()
    }

    fn axis(&mut self, rank: usize) -> u8 {
        self.below(rank as u64) as u8
    }

    fn real(&mut self) -> Real {
        let bits = u64::from(self.next()) << 32 | u64::from(self.next());
        let special = [0.0, -0.0, 1e-5, 0.125, f64::NAN, f64::INFINITY, f64::from_bits(bits)];
        Real(self.pick(&special))
    }

    fn dtype(&mut self) -> DType {
        self.pick(&DType::ALL)
    }

    fn float(&mut self) -> DType {
        self.pick(&[DType::F32, DType::F16, DType::BF16, DType::F64])
    }

    fn ty(&mut self, least: u64) -> TensorType {
        TensorType::new(self.dtype(), &self.sizes(least))
    }

    fn bounded(&mut self, mut ty: TensorType) -> TensorType {
        for dim in &mut ty.dims {
            if self.below(4) == 1 {
                *dim = Dim::Bounded { capacity: dim.capacity(), extent: ExtentId(self.below(3) as u32) };
            }
        }
        ty
    }

    fn name(&mut self) -> String {
        let weird = [
            "x",
            "fc1.weight",
            "",
            " a b ",
            "\"q\"",
            "\\",
            "#",
            "+",
            "%0",
            "née\n\t",
            "return",
            "\u{7f}\u{2028}",
            "/fc1/MatMul",
        ];
        self.pick(&weird).to_owned()
    }

    fn combine(&mut self) -> Combine {
        self.pick(&[Combine::Sum, Combine::Prod, Combine::Max, Combine::Min])
    }

    fn scalar(&mut self, dtype: DType) -> Scalar {
        let bits = u64::from(self.next()) << 32 | u64::from(self.next());
        let width = 8 * dtype.bytes() as u32;
        let drawn = Scalar { dtype, bits: bits & (u64::MAX >> (64 - width)) };
        let small = Scalar::from_i64(dtype, self.below(4) as i64 - 1);
        self.pick(&[small, drawn])
    }

    fn rank_scalar(&mut self, ranks: usize, bound: u64) -> RankScalar {
        let value = |choices: &mut Self| choices.below(bound) as i64;
        if ranks > 0 && self.flag() {
            return RankScalar::ByRank((0..ranks).map(|_| value(self)).collect());
        }
        RankScalar::Uniform(value(self))
    }

    fn groups(&mut self, ranks: &[u32]) -> Groups {
        let divisors: Vec<usize> = (1..=ranks.len()).filter(|size| ranks.len().is_multiple_of(*size)).collect();
        let size = self.pick(&divisors);
        let mut groups: Groups = ranks.chunks(size).map(<[u32]>::to_vec).collect();
        groups.iter_mut().filter(|_| self.flag()).for_each(|group| group.reverse());
        groups
    }
}

fn mesh(c: &mut Choices<'_>) -> Mesh {
    let sizes = [1, 2, 3, 4, 6];
    let names = ["data", "tensor", "odd name"];
    let axes = names.iter().take(1 + c.below(3) as usize);
    Mesh { axes: axes.map(|name| MeshAxis::new(name, c.pick(&sizes))).collect() }
}

/// A placement that leaves these sizes on each rank, and the sizes over all ranks.
fn shard(c: &mut Choices<'_>, mesh: &Mesh, local: &[u64]) -> Shard {
    let mut free: Vec<usize> = mesh.all().iter().collect();
    let mut over = |c: &mut Choices<'_>| {
        let mut set = SubAxes::NONE;
        while !free.is_empty() && (set.is_empty() || c.flag()) {
            let index = c.below(free.len() as u64) as usize;
            set = set.union(SubAxes::of(free.swap_remove(index)));
        }
        set
    };
    let mut shard = Shard { global: local.to_vec(), placement: Placement::replicated() };
    for (dim, &size) in local.iter().enumerate() {
        let over = if c.flag() { over(c) } else { SubAxes::NONE };
        if over.is_empty() || size == 0 {
            continue;
        }
        let chunks = mesh.chunks(over);
        let (mut rest, mut segments) = (size, Vec::new());
        while rest > 0 {
            let local = if c.flag() { rest } else { 1 + c.below(rest) };
            let unit = if c.flag() { 1 } else { local };
            // The last ranks may hold padding.
            let padding = if c.flag() { 0 } else { c.below(chunks) };
            segments.push(Segment { size: (local / unit * chunks - padding) * unit, unit });
            rest -= local;
        }
        shard.global[dim] = segments.iter().map(|segment| segment.size).sum();
        shard.placement.splits.push(Split { dim: dim as u8, over, segments });
    }
    if c.below(3) == 1 {
        let over = over(c);
        shard.placement.partial = Some((c.combine(), over));
    }
    shard
}

struct Builder<'a, 'c> {
    c: &'a mut Choices<'c>,
    module: &'a mut Module,
    inputs: &'a mut Vec<Port>,
    graph: Graph,
}

impl Builder<'_, '_> {
    /// A value of this type: one that is there, a new input or a new weight.
    fn value(&mut self, ty: &TensorType) -> ValueId {
        let known: Vec<usize> = (0..self.graph.values.len()).filter(|&i| self.graph.values[i].ty == *ty).collect();
        if !known.is_empty() && self.c.flag() {
            return ValueId(self.c.pick(&known) as u32);
        }
        let shard = (!self.graph.ranks.is_empty()).then(|| shard(self.c, &self.module.mesh, &ty.sizes()));
        let whole = shard.as_ref().map_or_else(|| ty.clone(), |shard| TensorType::new(ty.dtype, &shard.global));
        let def = match self.c.below(3) {
            0 => {
                self.inputs.push(Port { name: format!("{} {}", self.c.name(), self.inputs.len()), ty: whole });
                ValueDef::Input(self.inputs.len() as u32 - 1)
            }
            _ => {
                let recipe = recipe(self.c, &whole, self.module.files.len() as u32);
                self.module.weights.push(Weight { name: self.c.name(), ty: whole, recipe });
                ValueDef::Weight(WeightId(self.module.weights.len() as u32 - 1))
            }
        };
        self.graph.values.push(crate::module::Value { ty: ty.clone(), def, shard });
        ValueId(self.graph.values.len() as u32 - 1)
    }

    fn node(&mut self, op: Op, types: &[TensorType]) -> Vec<ValueId> {
        let operands: Vec<ValueId> = types.iter().map(|ty| self.value(ty)).collect();
        let origin: Origin = (0..self.c.below(3)).map(|_| self.c.name().into()).collect();
        let results = self.graph.add(op.clone(), &operands, &origin).unwrap_or_else(|why| panic!("{op:?}: {why}"));
        if !self.graph.ranks.is_empty() {
            for result in &results {
                let sizes = self.graph.ty(*result).sizes();
                self.graph.values[result.index()].shard = Some(shard(self.c, &self.module.mesh, &sizes));
            }
        }
        results
    }

    fn nodes(&mut self) {
        let kinds = if self.graph.ranks.is_empty() { COLLECTIVE } else { KINDS };
        for _ in 0..self.c.below(8) {
            let kind = self.c.below(kinds);
            let (op, types) = op(self.c, kind, &self.graph.ranks.clone());
            self.node(op, &types);
        }
    }

    fn outputs(&mut self, outputs: &mut Vec<Port>) {
        for _ in 0..self.c.below(3).min(self.graph.values.len() as u64) {
            let value = ValueId(self.c.below(self.graph.values.len() as u64) as u32);
            let ty = super::print::whole_type(self.graph.value(value));
            self.graph.outputs.push(Output { position: outputs.len() as u32, value });
            outputs.push(Port { name: format!("{}{}", self.c.name(), outputs.len()), ty });
        }
        self.graph.outputs.reverse();
    }
}

fn source(c: &mut Choices<'_>, ty: &TensorType, files: u32) -> Source {
    let bytes = ty.bytes().unwrap();
    match c.below(3) {
        0 if files > 0 => Source::File { file: c.below(files.into()) as u32, offset: c.below(4096) },
        1 => Source::Random { seed: u64::from(c.next()) << 32 },
        _ => Source::Inline(Buffer::from_bytes(&(0..bytes).map(|_| c.next() as u8).collect::<Vec<_>>())),
    }
}

fn recipe(c: &mut Choices<'_>, ty: &TensorType, files: u32) -> Recipe {
    if c.flag() {
        return Recipe::source(ty.clone(), source(c, ty, files));
    }
    // Split in two along a new axis, multiply, join: a list of primitives with several values.
    let sizes = [&[1], ty.sizes().as_slice()].concat();
    let part = TensorType::new(ty.dtype, &sizes);
    let inputs: Vec<RecipeInput> =
        (0..2).map(|_| RecipeInput { ty: part.clone(), source: source(c, &part, files) }).collect();
    let nodes = vec![
        SpecNode { op: Op::Concat { axis: 0 }, operands: vec![0, 1] },
        SpecNode { op: Op::TopK { axis: 0, k: 1, largest: c.flag(), sorted: true }, operands: vec![2] },
        SpecNode { op: Op::Reshape { dims: ty.dims.clone() }, operands: vec![3] },
    ];
    Recipe { spec: Spec { inputs: vec![part.clone(), part], nodes, results: vec![5] }, inputs }
}

/// Renumbers the values by a random permutation: ids need not follow the order of definition.
fn shuffle(c: &mut Choices<'_>, graph: &mut Graph) {
    let count = graph.values.len();
    for from in 0..count {
        let to = from + c.below((count - from) as u64) as usize;
        graph.values.swap(from, to);
        let swap = |id: &mut ValueId| match id.index() {
            index if index == from => *id = ValueId(to as u32),
            index if index == to => *id = ValueId(from as u32),
            _ => {}
        };
        for node in &mut graph.nodes {
            node.operands.iter_mut().chain(&mut node.results).for_each(swap);
        }
        graph.outputs.iter_mut().for_each(|output| swap(&mut output.value));
    }
}

fn entry(c: &mut Choices<'_>, module: &mut Module) {
    let (mut inputs, mut outputs, mut stages) = (Vec::new(), Vec::new(), Vec::new());
    let all = module.mesh.ranks();
    let ranks: Vec<Vec<u32>> = match c.below(3) {
        0 => vec![Vec::new()],
        1 => vec![(0..all).collect()],
        _ if all.is_multiple_of(2) => vec![(0..all / 2).collect(), (all / 2..all).collect()],
        _ => vec![(0..all).collect()],
    };
    let transfer = (ranks.len() == 2).then(|| c.ty(0));
    for (stage, own) in ranks.iter().enumerate() {
        let name = format!("{}{}", c.name(), module.graphs.len());
        let graph = Graph { ranks: own.clone(), ..Graph::new(&name) };
        let mut builder = Builder { c, module, inputs: &mut inputs, graph };
        builder.nodes();
        if let Some(ty) = &transfer {
            let peers: Vec<u32> = ranks[1 - stage].iter().rev().copied().collect();
            if stage == 0 {
                builder.node(Op::Send { channel: 7, peers }, std::slice::from_ref(ty));
            } else {
                builder.node(Op::Recv { channel: 7, peers, ty: ty.clone() }, &[]);
                builder.nodes();
            }
        }
        builder.outputs(&mut outputs);
        let mut graph = builder.graph;
        if c.flag() {
            shuffle(c, &mut graph);
        }
        stages.push(GraphId(module.graphs.len() as u32));
        module.graphs.push(graph);
    }
    let mut frozen = Vec::new();
    for port in &inputs {
        if c.below(4) == 1 {
            let bytes: Vec<u8> = (0..port.ty.bytes().unwrap()).map(|_| c.next() as u8).collect();
            let value = Tensor::from_bytes(port.ty.clone(), &bytes).unwrap();
            let (input, nodes) = (port.name.clone(), c.below(3) as u32 + 1);
            frozen.push(FrozenInput { input, value, node: c.name(), nodes });
        }
    }
    let name = format!("{}{}", c.name(), module.entries.len());
    module.entries.push(Entry { name, inputs, outputs, frozen, stages });
}

/// A module that verifies.
pub(crate) fn module(c: &mut Choices<'_>) -> Module {
    let mut module = Module { name: c.name(), mesh: mesh(c), ..Module::default() };
    for _ in 0..c.below(3) {
        module.files.push(SourceFile { name: c.name(), bytes: (1 << 40) + c.below(9) });
    }
    for _ in 0..c.below(2) {
        let (extent, name) = (ExtentId(c.below(3) as u32), c.name());
        let dims = vec![Dim::Static(c.size()), Dim::Bounded { capacity: 1024, extent }];
        module.states.push(State { name, ty: TensorType { dtype: DType::F16, dims }, extent });
    }
    for _ in 0..1 + c.below(2) {
        entry(c, &mut module);
    }
    for (index, state) in module.states.iter().enumerate() {
        if let Some(graph) = module.graphs.first_mut() {
            graph.add_source(state.ty.clone(), ValueDef::State(StateId(index as u32)));
        }
    }
    module
}

/// Kinds of operations, for tests that want each of them.
pub(crate) fn kinds() -> std::ops::Range<u64> {
    0..KINDS
}

/// An operation of this kind alone in a graph.
pub(crate) fn single(c: &mut Choices<'_>, kind: u64) -> Graph {
    let ranks = [0, 1, 2, 3];
    let (op, types) = op(c, kind, &ranks);
    let mut graph = Graph { ranks: ranks.to_vec(), ..Graph::new("single") };
    let operands: Vec<ValueId> =
        (0..).zip(types).map(|(number, ty)| graph.add_source(ty, ValueDef::Input(number))).collect();
    graph.add(op.clone(), &operands, &Origin::from([])).unwrap_or_else(|why| panic!("{op:?}: {why}"));
    graph
}
