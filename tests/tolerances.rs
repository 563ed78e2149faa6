//! The default tolerance of comparisons: what is right passes in every type, what is wrong does not.
//!
//! Faults are put into kernels: one step of a plan, on all ranks, computes something else than it should.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its own functions too")]

use std::fs;
use std::path::{Path, PathBuf};

use passes::settings::MeshChoice;
use passes::shard::parse_mesh;
use planfile::plan::{Action, Argument, Plan};
use planfile::{
    Binary, Compare, DType, Expr, ExprOp, Op, PlanError, PlanFile, RankScalar, Scalar, Spec, SpecNode, Target, Tensor,
    TensorType, Unary, write_plan,
};
use planwright::compiler::Request;
use runtime::compare::{Comparison, Tolerance, compare};
use runtime::rounding::Rounding;
use runtime::tensor_file::TestData;
use runtime::{Devices, Session};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn models(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(folder);
    let folders = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> =
        folders.filter(|one| one.join("model.onnx").exists() && one.join("test_data_set_0").exists()).collect();
    found.sort();
    assert!(found.len() > 10, "{}: run `python3 fixtures/fetch.py`", folder.display());
    found
}

fn name(folder: &Path) -> String {
    folder.file_name().unwrap().to_string_lossy().into_owned()
}

/// A compiled model: its plan, the bytes of its weights, its data, and what its outputs may be off.
struct Case {
    plan: Plan,
    image: Vec<u8>,
    data: TestData,
    tolerance: Tolerance,
    folder: tempfile::TempDir,
}

impl Case {
    fn new(model: &Path, dtype: DType, mesh: &str) -> Self {
        let target = Target::from_json(include_str!("../fixtures/targets/cpu.json")).unwrap();
        let data = TestData::read(&model.join("test_data_set_0")).unwrap();
        let mut request = Request::new(&model.join("model.onnx"), target);
        request.samples.clone_from(&data.inputs);
        request.options.dtype = Some(dtype);
        request.mesh = match mesh {
            "1" => MeshChoice::Devices(1),
            mesh => MeshChoice::Fixed(parse_mesh(mesh).unwrap()),
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.plan");
        request.compile(&mut |_, _| {}).unwrap().unwrap().write(&path, |_| {}).unwrap();
        let file = PlanFile::open(&path).unwrap();
        let mut image = vec![0; file.plan().manifest.image_bytes as usize];
        file.read_weights(0, &mut image).unwrap();
        let plan = file.into_plan();
        let tolerance = Tolerance { rounding: Rounding::of(&plan, &plan.manifest.entries[0]), elements: None };
        Self { plan, image, data, tolerance, folder }
    }

    /// Runs a plan with the weights of this one.
    fn run(&self, plan: &Plan) -> Vec<Tensor> {
        let path = self.folder.path().join("b.plan");
        write_plan(&path, plan, |sink| sink.push(0, &self.image)).map_err(|error: PlanError| error).unwrap();
        let session = Session::load(&path, Devices::Virtual).unwrap();
        let entry = &session.entries()[0];
        let names = entry.inputs.iter().map(|port| port.name.clone());
        let inputs = names.zip(self.data.inputs.iter().cloned()).collect();
        let outputs = session.context().unwrap().run(&entry.name, &inputs).unwrap();
        outputs.into_iter().map(|(_, tensor)| tensor).collect()
    }

    fn compared(&self, outputs: &[Tensor], references: &[Tensor]) -> Vec<Comparison> {
        outputs.iter().zip(references).map(|(a, b)| compare(a, b, self.tolerance).unwrap()).collect()
    }
}

fn right_results_pass(folder: &str, meshes: &[&str]) {
    let mut failures = Vec::new();
    for model in models(folder) {
        for dtype in DTYPES {
            for mesh in meshes {
                let case = Case::new(&model, dtype, mesh);
                let found = case.compared(&case.run(&case.plan), &case.data.outputs);
                let expected = case.tolerance.rounding.expected;
                for one in &found {
                    let (norm, largest) = (one.norm_error / expected, one.max_relative_error / expected);
                    let label = format!("{:20} {dtype:4} {mesh:8}", name(&model));
                    println!(
                        "{label} ε {expected:.1e}: norm {norm:.2} ε, largest {largest:.2} ε, {} elsewhere",
                        one.elsewhere
                    );
                    if !one.passes() {
                        failures.push(format!("{label}: {one:?}"));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn right_results_of_small_models_pass() {
    right_results_pass("onnx", &["1", "tensor=2"]);
}

#[test]
fn right_results_of_trained_models_pass() {
    right_results_pass("fetched", &["1"]);
}

/// Something that a kernel does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// The last row of each matrix is not written.
    MissingRow,
    /// The first two heads, or channels, are swapped.
    SwappedHeads,
    /// A vector of weights that is added is not.
    MissingBias,
    /// A product with its sign flipped.
    FlippedSign,
}

const FAULTS: [Fault; 4] = [Fault::MissingRow, Fault::SwappedHeads, Fault::MissingBias, Fault::FlippedSign];

impl Fault {
    /// The kernel's specification with the fault; none where there is no place for it. `weights`: the operands that are.
    fn put_into(self, spec: &Spec, weights: &[bool]) -> Option<Spec> {
        let [result] = spec.results[..] else { return None };
        let ty = spec.result_types().ok()?.remove(0);
        let has = |wanted: fn(&Op) -> bool| spec.nodes.iter().any(|node| wanted(&node.op));
        let is_product = has(|op| matches!(op, Op::Dot { .. } | Op::Conv { .. } | Op::Attention { .. }));
        if !ty.dtype.is_float() {
            return None;
        }
        let mut faulty = spec.clone();
        match self {
            Self::MissingRow => {
                let rank = ty.rank();
                if rank < 2 || ty.size(rank - 2) < 2 || !is_product {
                    return None;
                }
                let last = Expr::constant(Scalar::i64(ty.size(rank - 2) as i64 - 1));
                let is_last = Expr::index(rank as u8 - 2).compare(Compare::Eq, last);
                let expr = is_last.select(Expr::constant(Scalar::from_i64(ty.dtype, 0)), Expr::operand(0));
                let changed = append(&mut faulty, Op::Pointwise { expr, dims: ty.dims.clone() }, vec![result]);
                faulty.results = vec![changed];
            }
            Self::SwappedHeads => {
                if ty.rank() != 4 || ty.size(1) < 2 || !is_product {
                    return None;
                }
                let part = |first: u64, size: u64| {
                    let mut sizes = ty.sizes();
                    sizes[1] = size;
                    let starts = [0, first as i64, 0, 0].map(RankScalar::Uniform).to_vec();
                    Op::Slice { starts, steps: vec![1; 4], sizes }
                };
                let mut parts: Vec<u32> =
                    [(1, 1), (0, 1)].map(|(first, size)| append(&mut faulty, part(first, size), vec![result])).to_vec();
                if ty.size(1) > 2 {
                    parts.push(append(&mut faulty, part(2, ty.size(1) - 2), vec![result]));
                }
                faulty.results = vec![append(&mut faulty, Op::Concat { axis: 1 }, parts)];
            }
            Self::MissingBias => {
                let adds = has(|op| match op {
                    Op::Pointwise { expr, .. } => expr.ops.contains(&ExprOp::Binary(Binary::Add)),
                    _ => false,
                });
                let is_bias = |(position, ty): (usize, &TensorType)| {
                    weights[position] && ty.dtype.is_float() && ty.elements() > Some(1) && ty.elements() < Some(1 << 12)
                };
                let bias = spec.inputs.iter().enumerate().position(is_bias).filter(|_| adds)?;
                let zeros = Expr::operand(0).binary(Binary::Mul, Expr::constant(Scalar::from_i64(ty.dtype, 0)));
                if spec.inputs[bias].dtype != ty.dtype {
                    return None;
                }
                // A new first node, whose result stands for the bias; later values move on by one.
                let first = spec.inputs.len() as u32;
                let moved = |value: u32| if value >= first { value + 1 } else { value };
                for node in &mut faulty.nodes {
                    for operand in &mut node.operands {
                        *operand = if *operand == bias as u32 { first } else { moved(*operand) };
                    }
                }
                faulty.results = vec![moved(result)];
                let dims = spec.inputs[bias].dims.clone();
                faulty
                    .nodes
                    .insert(0, SpecNode { op: Op::Pointwise { expr: zeros, dims }, operands: vec![bias as u32] });
            }
            Self::FlippedSign => {
                if !is_product {
                    return None;
                }
                let op = Op::Pointwise { expr: Expr::operand(0).unary(Unary::Neg), dims: ty.dims.clone() };
                faulty.results = vec![append(&mut faulty, op, vec![result])];
            }
        }
        Some(faulty)
    }
}

fn append(spec: &mut Spec, op: Op, operands: Vec<u32>) -> u32 {
    let result = spec.types().unwrap().len() as u32;
    spec.nodes.push(SpecNode { op, operands });
    result
}

/// The plan with the fault in one step, for each step that has a place for it.
fn faulty_plans(plan: &Plan, fault: Fault) -> Vec<Plan> {
    let mut plans = Vec::new();
    for (number, step) in plan.programs[0].steps.iter().enumerate() {
        let Action::Launch { kernel, operands, .. } = &step.action else { continue };
        let weights: Vec<bool> =
            operands.iter().map(|operand| matches!(operand.at, Argument::Weights { .. })).collect();
        let mut wrong = plan.kernels[*kernel as usize].clone();
        let Some(spec) = fault.put_into(&wrong.spec, &weights) else { continue };
        wrong.spec = spec;
        let mut faulty = plan.clone();
        faulty.kernels.push(wrong);
        let Action::Launch { kernel, .. } = &mut faulty.programs[0].steps[number].action else { continue };
        *kernel = plan.kernels.len() as u32;
        plans.push(faulty);
    }
    plans
}

/// Puts faults into up to `each` steps of every model, the last ones first, and says how far each moves the outputs. What must fail: in `f32`
/// whatever moves them at all; in half types what moves them by more than rounding does, as a product with its sign
/// flipped always does. A fault that moves them less cannot be seen in outputs, by whatever rule.
fn wrong_kernels_fail(folder: &str, dtypes: &[DType], each: usize) {
    let mut failures = Vec::new();
    for model in models(folder) {
        for &dtype in dtypes {
            let case = Case::new(&model, dtype, "1");
            let right = case.run(&case.plan);
            let rounding = case.tolerance.rounding;
            let mut seen = 0;
            for fault in FAULTS {
                let plans = faulty_plans(&case.plan, fault);
                let every = plans.len().div_ceil(each).max(1);
                let mut line = format!("{:20} {dtype:4} ε {:.0e} {fault:?}:", name(&model), rounding.expected);
                for plan in plans.iter().rev().step_by(every) {
                    let wrong = case.run(plan);
                    let caught = case.compared(&wrong, &case.data.outputs).iter().any(|one| !one.passes());
                    let moved = case.compared(&wrong, &right).iter().map(|one| one.norm_error).fold(0.0, f64::max);
                    line.push_str(&format!(" {}{moved:.0e}", if caught { "+" } else { "-" }));
                    let visible = match dtype {
                        DType::F32 => moved > 1e-4,
                        // Where rows may be another expert's, one row less is that; a sign is not.
                        _ if rounding.chooses => fault == Fault::FlippedSign && moved > 0.0,
                        _ => moved > 5.0 * rounding.expected,
                    };
                    if visible && !caught {
                        failures.push(line.clone());
                    }
                    seen += usize::from(caught);
                }
                println!("{line}");
            }
            if seen == 0 {
                failures.push(format!("{} {dtype}: no fault was seen", name(&model)));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn wrong_kernels_of_small_models_fail() {
    wrong_kernels_fail("onnx", &DTYPES, 3);
}

#[test]
fn wrong_kernels_of_trained_models_fail() {
    wrong_kernels_fail("fetched", &[DType::F32, DType::BF16], 1);
}
