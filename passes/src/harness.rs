//! What tests of passes share: text before, text after, executed on noise, and once more.
//!
//! A [`Case`] runs a pass on a module in text form. What comes out is verified, executed on every rank beside what went
//! in, and run again, which must change nothing.

use cpu::recipe::{NoFiles, WeightBytes, WeightReadError, read_all};
use cpu::{View, ViewMut, combine, evaluate, execute};
use ir::text::parse_lines;
use ir::verify::verify;
use ir::{Graph, Mesh, Module, Node, Value, ValueDef, WeightId};
use planfile::{DType, Op, RankScalar, Recipe, Scalar, Source, SourceFile, Target, Tensor, TensorType, infer};

use crate::error::PassError;
use crate::phase::Phase;
use crate::settings::{MeshChoice, Options, SPLIT_TABLE_BYTES, Settings, ShardOptions};

pub(crate) const CPU: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/targets/cpu.json"));
pub(crate) const H200: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/targets/h200x4.json"));

/// Types of the files of [`Noise`], in order.
pub(crate) const FILES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// Files of noise, a type each.
pub(crate) struct Noise;

impl WeightBytes for Noise {
    fn read(&self, file: u32, offset: u64, into: &mut [u8]) -> Result<(), WeightReadError> {
        let dtype = FILES[file as usize];
        let bytes = dtype.bytes() as u64;
        for (byte, at) in into.iter_mut().zip(offset..) {
            let element = (at / bytes).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            let value = (element as f32 / (1 << 24) as f32 - 0.5) / 4.0;
            *byte = Scalar::from_f64(dtype, value.into()).to_bytes()[(at % bytes) as usize];
        }
        Ok(())
    }
}

/// The lines as a module with files of noise.
#[track_caller]
pub(crate) fn parse(text: &str) -> Module {
    let module = parse_lines(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let files = FILES.map(|dtype| SourceFile { name: format!("{dtype}.onnx"), bytes: 1 << 30 });
    Module { files: files.into(), ..module }
}

/// What a test compiles for.
pub(crate) struct Machine {
    pub target: Target,
    pub options: Options,
    pub shard: ShardOptions,
}

impl Machine {
    /// One device of a target in JSON.
    pub(crate) fn new(target: &str) -> Self {
        let mesh = MeshChoice::Fixed(Mesh::default());
        let shard = ShardOptions { mesh, split_table_bytes: SPLIT_TABLE_BYTES, batch_dim: 0 };
        Self { target: Target::from_json(target).unwrap(), options: Options::default(), shard }
    }

    pub(crate) fn with_mesh(self, mesh: Mesh) -> Self {
        Self { shard: ShardOptions { mesh: MeshChoice::Fixed(mesh), ..self.shard }, ..self }
    }

    pub(crate) fn settings(&self) -> Settings<'_> {
        Settings { weights: &Noise, options: self.options.clone(), shard: self.shard.clone(), target: &self.target }
    }
}

/// A pass under test.
pub(crate) struct Case<P> {
    pass: fn(P, &Settings<'_>) -> Result<P, PassError>,
    machine: Machine,
    /// Largest difference of results, as a share of the largest of them; none where no bit may change.
    tolerance: Option<f64>,
}

impl<P: Phase + From<Module>> Case<P> {
    /// The pass for a target; it changes no bit of a result.
    pub(crate) fn new(pass: fn(P, &Settings<'_>) -> Result<P, PassError>, target: &str) -> Self {
        Self { pass, machine: Machine::new(target), tolerance: None }
    }

    /// It changes results by so much.
    pub(crate) fn within(self, tolerance: f64) -> Self {
        Self { tolerance: Some(tolerance), ..self }
    }

    /// What the pass makes of the lines: verified, and as they were in what it computes and when it is run again.
    #[track_caller]
    pub(crate) fn run(&self, text: &str) -> Module {
        let run = |module: Module| (self.pass)(module.into(), &self.machine.settings()).unwrap().module().clone();
        let before = parse(text);
        let once = run(before.clone());
        verify(&once).unwrap_or_else(|error| panic!("{error}\n{once}"));
        let (expected, actual) = (outputs(&before), outputs(&once));
        match self.tolerance {
            None => assert!(expected == actual, "results differ:\n{before}\n{once}"),
            Some(tolerance) => {
                let difference = difference(&expected, &actual);
                assert!(difference <= tolerance, "results differ by {difference}:\n{before}\n{once}");
            }
        }
        let twice = run(once.clone());
        assert_eq!(once, twice, "not idempotent:\n{once}\n{twice}");
        once
    }

    /// Checks that `before` becomes `after`, up to names of weights and, unless `after` states some, origins.
    #[track_caller]
    pub(crate) fn check(&self, before: &str, after: &str) {
        let (actual, expected) = (self.run(before).compacted(), parse(after).compacted());
        assert!(same(&actual, &expected, after.contains('#')), "got\n{actual}\nfor\n{expected}");
    }

    #[track_caller]
    pub(crate) fn check_unchanged(&self, text: &str) {
        self.check(text, text);
    }
}

/// Whether both say the same: weights by what they are, whatever their names and numbers.
fn same(left: &Module, right: &Module, origins: bool) -> bool {
    let weight = |module: &Module, id: WeightId| (module.weight(id).ty.clone(), module.weight(id).recipe.clone());
    let same_value = |(a, b): (&Value, &Value)| {
        let same = match (a.def, b.def) {
            (ValueDef::Weight(a), ValueDef::Weight(b)) => weight(left, a) == weight(right, b),
            (a, b) => a == b,
        };
        same && (&a.ty, &a.shard) == (&b.ty, &b.shard)
    };
    let same_node = |(a, b): (&Node, &Node)| {
        (&a.op, &a.operands, &a.results) == (&b.op, &b.operands, &b.results) && (!origins || a.origin == b.origin)
    };
    let same_graph = |(a, b): (&Graph, &Graph)| {
        let lengths = (a.values().len(), a.nodes().len()) == (b.values().len(), b.nodes().len());
        let rest = (a.outputs(), a.ranks()) == (b.outputs(), b.ranks());
        let values = a.values().iter().zip(b.values()).all(same_value);
        lengths && rest && values && a.nodes().iter().zip(b.nodes()).all(same_node)
    };
    left.weights.len() == right.weights.len() && left.graphs.iter().zip(&right.graphs).all(same_graph)
}

/// Outputs of the module's only graph on noise, of each rank.
pub(crate) fn outputs(module: &Module) -> Vec<Tensor> {
    let graph = &module.graphs[0];
    // Before sharding there is one of them.
    let ranks = graph.ranks().len().max(1);
    let mut values: Vec<Vec<Option<Tensor>>> = (0..ranks).map(|rank| sources(module, graph, rank)).collect();
    for node in graph.nodes() {
        let operands: Vec<Vec<&Tensor>> = values
            .iter()
            .map(|values| node.operands.iter().map(|operand| values[operand.index()].as_ref().unwrap()).collect())
            .collect();
        let made = match exchanged(&node.op, &operands) {
            Some(parts) => parts.into_iter().map(|part| vec![part]).collect(),
            None => (0..ranks).map(|rank| evaluated(node, rank, &operands[rank])).collect::<Vec<_>>(),
        };
        for (values, made) in values.iter_mut().zip(made) {
            for (result, tensor) in node.results.iter().zip(made) {
                values[result.index()] = Some(tensor);
            }
        }
    }
    let of = |values: &Vec<Option<Tensor>>| -> Vec<Tensor> {
        graph.outputs().iter().map(|output| values[output.value.index()].clone().unwrap()).collect()
    };
    values.iter().flat_map(of).collect()
}

/// Weights, which are whole on each rank, and inputs of noise, which differ by rank.
fn sources(module: &Module, graph: &Graph, rank: usize) -> Vec<Option<Tensor>> {
    let source = |value: &Value| match value.def {
        ValueDef::Weight(id) => {
            assert_eq!(value.ty, module.weight(id).ty, "a test with parts of weights");
            Some(read_all(&module.weight(id).recipe, &Noise).unwrap())
        }
        ValueDef::Input(number) => {
            let source = Source::Random { seed: u64::from(number) + 1000 * rank as u64 };
            Some(read_all(&Recipe::source(value.ty.clone(), source), &NoFiles).unwrap())
        }
        ValueDef::State(_) | ValueDef::Node(..) => None,
    };
    graph.values().iter().map(source).collect()
}

fn evaluated(node: &Node, rank: usize, operands: &[&Tensor]) -> Vec<Tensor> {
    let types: Vec<&TensorType> = operands.iter().map(|operand| &operand.ty).collect();
    let types = infer(&node.op, &types).unwrap();
    let mut results: Vec<Tensor> = types.into_iter().map(|ty| Tensor::zeroed(ty).unwrap()).collect();
    let operands: Vec<View<'_>> = operands.iter().map(|&operand| View::from(operand)).collect();
    let mut views: Vec<ViewMut<'_>> = results.iter_mut().map(ViewMut::from).collect();
    execute(&node.op, rank, &operands, &mut views).unwrap();
    results
}

/// What each rank has of an exchange between all of them; `None` if the operation is none.
fn exchanged(op: &Op, operands: &[Vec<&Tensor>]) -> Option<Vec<Tensor>> {
    let count = operands.len();
    let one = |op: Op, operands: &[&Tensor]| evaluate(&op, operands).unwrap().remove(0);
    let part = |whole: &Tensor, axis: u8, part: usize| {
        let mut sizes = whole.ty.sizes();
        let mut starts = vec![RankScalar::Uniform(0); sizes.len()];
        sizes[usize::from(axis)] /= count as u64;
        starts[usize::from(axis)] = RankScalar::Uniform((part as u64 * sizes[usize::from(axis)]).cast_signed());
        one(Op::Slice { starts, steps: vec![1; sizes.len()], sizes }, &[whole])
    };
    let all: Vec<&Tensor> = operands.iter().filter_map(|operands| operands.first().copied()).collect();
    let combined = |kind| {
        let mut whole = all[0].clone();
        let mut bytes = whole.data.bytes().to_vec();
        all[1..].iter().for_each(|other| combine(kind, whole.ty.dtype, &mut bytes, other.data.bytes()).unwrap());
        whole.data = planfile::Buffer::from_bytes(&bytes);
        whole
    };
    if let Some(groups) = op.groups() {
        assert_eq!(*groups, [(0..count as u32).collect::<Vec<_>>()], "a test with several groups");
    }
    Some(match *op {
        Op::AllGather { axis, .. } => vec![one(Op::Concat { axis }, &all); count],
        Op::AllReduce { combine, .. } => vec![combined(combine); count],
        Op::ReduceScatter { combine, axis, .. } => {
            let whole = combined(combine);
            (0..count).map(|rank| part(&whole, axis, rank)).collect()
        }
        Op::AllToAll { split, concat, .. } => {
            let of = |rank: usize| all.iter().map(|whole| part(whole, split, rank)).collect::<Vec<_>>();
            let join = |parts: Vec<Tensor>| one(Op::Concat { axis: concat }, &parts.iter().collect::<Vec<_>>());
            (0..count).map(of).map(join).collect()
        }
        _ => return None,
    })
}

/// Largest difference, as a share of the largest expected element; infinite where one of both is no number.
pub(crate) fn difference(expected: &[Tensor], actual: &[Tensor]) -> f64 {
    let elements = |tensors: &[Tensor]| -> Vec<f64> {
        let of = |tensor: &Tensor| -> Vec<f64> {
            let (dtype, bytes) = (tensor.ty.dtype, tensor.data.bytes());
            bytes.chunks_exact(dtype.bytes()).map(|bytes| Scalar::from_bytes(dtype, bytes).unwrap().to_f64()).collect()
        };
        tensors.iter().flat_map(of).collect()
    };
    let types = |tensors: &[Tensor]| tensors.iter().map(|tensor| tensor.ty.clone()).collect::<Vec<_>>();
    assert_eq!(types(expected), types(actual));
    let (expected, actual) = (elements(expected), elements(actual));
    let largest = expected.iter().filter(|x| x.is_finite()).fold(0.0, |largest: f64, x| largest.max(x.abs()));
    let of = |(a, b): (&f64, &f64)| match (a - b).abs() {
        _ if a == b || a.is_nan() && b.is_nan() => 0.0,
        difference if difference.is_finite() => difference / largest,
        _ => f64::INFINITY,
    };
    expected.iter().zip(&actual).map(of).fold(0.0, f64::max)
}
