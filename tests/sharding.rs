//! Sharded plans against unsharded ones: random modules of awkward sizes, on meshes that fit them badly.
//!
//! Each seed makes one small module. It is compiled for one device and for each mesh, run on virtual devices, and the
//! outputs must agree. `SHARDING_SEEDS=100..400` runs other seeds than the usual ones.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its own functions too")]
#![expect(clippy::panic, reason = "a failing seed is reported with its module")]

#[path = "sharding/compositions.rs"]
mod compositions;
#[path = "sharding/modules.rs"]
mod modules;
#[path = "sharding/operations.rs"]
mod operations;

use std::collections::BTreeMap;
use std::ops::Range;

use cpu::recipe::NoFiles;
use ir::Mesh;
use modules::{Case, Drawing, Known};
use passes::lower::NoAssembler;
use passes::settings::{MeshChoice, Options, Settings, ShardOptions};
use passes::shard::parse_mesh;
use planfile::op::Cell;
use planfile::plan::Plan;
use planfile::{Binary, Dim, Expr, Op, Target, Tensor, Unary, write_plan};
use planwright::compiler::CompileError;
use runtime::{Devices, Session, image};

const MESHES: [&str; 9] = [
    "tensor=2",
    "tensor=3",
    "tensor=4",
    "tensor=6",
    "tensor=8",
    "data=2",
    "data=3",
    "data=2,tensor=3",
    "pipe=3,tensor=2",
];

/// A share of the largest value of an output; sums in another order differ by far less.
const TOLERANCE: f64 = 1e-4;

/// The plan of the case for the virtual devices of a mesh.
fn plan(case: &Case, mesh: Mesh, split_table_bytes: u64) -> Result<Plan, String> {
    let target = Target::from_json(include_str!("../fixtures/targets/cpu.json")).unwrap();
    let shard = ShardOptions { mesh: MeshChoice::Fixed(mesh), split_table_bytes, batch_dim: 0 };
    let settings = Settings { weights: &NoFiles, options: Options::default(), shard, target: &target };
    let plan = passes::compile::run(case.module.clone(), &settings, &NoAssembler, &mut |_, _| {})
        .map_err(|error| error.to_string())?;
    plan.map(|outcome| outcome.plan).ok_or_else(|| "no plan".to_owned())
}

/// Runs the case on the virtual devices of a mesh.
fn run(case: &Case, mesh: Mesh, split_table_bytes: u64) -> Result<Vec<Tensor>, String> {
    let plan = plan(case, mesh, split_table_bytes)?;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.plan");
    write_plan(&path, &plan, |sink| {
        image::write(&plan, &NoFiles, |bytes| sink.push(sink.position(), bytes))?;
        Ok::<(), CompileError>(())
    })
    .map_err(|error| error.to_string())?;
    let session = Session::load(&path, Devices::Virtual).map_err(|error| error.to_string())?;
    let mut context = session.context().map_err(|error| error.to_string())?;
    let outputs = context.run("main", &case.inputs).map_err(|error| error.to_string())?;
    Ok(outputs.into_iter().map(|(_, tensor)| tensor).collect())
}

/// Where two runs differ, in words; integers must be equal.
fn difference(expected: &[Tensor], actual: &[Tensor]) -> Option<String> {
    expected.iter().zip(actual).enumerate().find_map(|(position, (expected, actual))| {
        if expected.ty != actual.ty {
            return Some(format!("output {position} is {}, expected {}", actual.ty, expected.ty));
        }
        let [a, b] = [expected, actual].map(runtime::compare::to_f64s);
        let largest = a.iter().filter(|value| value.is_finite()).fold(0.0, |most: f64, value| most.max(value.abs()));
        let allowed = if expected.ty.dtype.is_float() { TOLERANCE * largest } else { 0.0 };
        let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= allowed;
        let at = a.iter().zip(&b).position(|(&a, &b)| !same(a, b))?;
        Some(format!("output {position}, element {at}: {}, expected {} (largest {largest})", b[at], a[at]))
    })
}

/// Compares the case on each mesh with one device.
fn check(name: &str, case: &Case, meshes: &[&str]) -> Vec<String> {
    let text = || case.module.summary_text();
    let expected = match run(case, Mesh::default(), 1 << 40) {
        Ok(outputs) => outputs,
        Err(error) => return vec![format!("{name} on one device: {error}\n{}", text())],
    };
    let mut failures = Vec::new();
    for mesh in meshes {
        // Even seeds split their look-up tables by rows.
        let split_table_bytes = if name.ends_with(['0', '2', '4', '6', '8']) { 0 } else { 1 << 40 };
        let why = match run(case, parse_mesh(mesh).unwrap(), split_table_bytes) {
            Ok(actual) => difference(&expected, &actual),
            Err(error) => Some(error),
        };
        if let Some(why) = why {
            failures.push(format!("{name} on {mesh}: {why}\n{}", text()));
        }
    }
    failures
}

fn seeds(usual: Range<u64>) -> Range<u64> {
    let Ok(text) = std::env::var("SHARDING_SEEDS") else { return usual };
    let (from, to) = text.split_once("..").unwrap();
    from.parse().unwrap()..to.parse().unwrap()
}

fn check_seeds(usual: Range<u64>, meshes: &[&str]) {
    let failures: Vec<String> =
        seeds(usual).flat_map(|seed| check(&format!("seed {seed}"), &Drawing::case(seed), meshes)).collect();
    if !failures.is_empty() {
        let heads: Vec<&str> = failures.iter().filter_map(|failure| failure.lines().next()).collect();
        panic!("{} failures\n{}\n\nfirst module:\n{}", failures.len(), heads.join("\n"), failures[0]);
    }
}

#[test]
fn random_modules_on_one_axis() {
    check_seeds(0..60, &MESHES[..7]);
}

#[test]
fn random_modules_on_two_axes() {
    check_seeds(1000..1060, &["pipe=2", "data=2,tensor=3", "pipe=3,tensor=2"]);
}

fn check_built(mesh: &str, build: impl FnOnce(&mut Drawing) -> Option<Known>) {
    let mut drawing = Drawing::new(1);
    build(&mut drawing).unwrap();
    let failures = check("built", &drawing.finish(), &[mesh]);
    assert!(failures.is_empty(), "{}", failures[0]);
}

/// Three nodes a stage: the product whose terms are pending ends one, the transpose that would pass them on begins the
/// next. What is sent between stages is whole.
#[test]
fn pending_sums_end_with_their_stage() {
    check_built("pipe=2,tensor=2", |drawing| {
        let x = drawing.input(&[3, 8]);
        let hidden = operations::product(drawing, x, 1, 6)?;
        let hidden = operations::tame(drawing, Known { exact: false, ..hidden })?;
        let terms = operations::product(drawing, hidden, 1, 5)?;
        let moved = drawing.value(Op::Transpose { permutation: vec![1, 0] }, &[terms.id], terms, terms.range)?;
        let shares = drawing.value(Op::Softmax { axis: 0, log: false }, &[moved.id], moved, 1.0)?;
        drawing.value(Op::Softmax { axis: 1, log: false }, &[shares.id], shares, 1.0)
    });
}

/// The last row of a weight alone on a rank, once without padding and once with a row of it.
#[test]
fn one_weight_padded_two_ways() {
    check_built("data=2,tensor=3", |drawing| {
        let x = drawing.input(&[3, 100]);
        let w = drawing.weight(&[3, 100]);
        drawing.value(operations::dot(&[], &[(1, 1)]), &[x.id, w.id], x, 5.0)?;
        let dims = [3, 100].map(Dim::Static).to_vec();
        let expr = Expr::operand(0).binary(Binary::Add, Expr::operand(1));
        drawing.value(Op::Pointwise { expr, dims }, &[x.id, w.id], x, 7.0)
    });
}

/// A layer in both directions over samples of any length; its inputs have the samples first.
fn recurrent(drawing: &mut Drawing, cell: Cell, batch: u64) -> Option<Known> {
    let [steps, features, width] = [4, 6, 5];
    let rows = 2 * cell.gates() * width;
    let x = drawing.input(&[batch, steps, features]);
    let product = operations::product(drawing, x, 2, rows)?;
    let moved = drawing.value(Op::Transpose { permutation: vec![1, 0, 2] }, &[product.id], product, product.range)?;
    let x = operations::tame(drawing, Known { exact: false, ..moved })?;
    let x = drawing.value(operations::reshape(&[steps, batch, 2, rows / 2]), &[x.id], x, 1.0)?;
    let lstm = matches!(cell, Cell::Lstm { .. });
    let mut operands = vec![x.id, drawing.weight(&[2, rows / 2, width]).id];
    for _ in 0..1 + usize::from(lstm) {
        let state = drawing.input(&[batch, 2, width]);
        let op = Op::Transpose { permutation: vec![1, 0, 2] };
        operands.push(drawing.value(op, &[state.id], state, 5.0)?.id);
    }
    if lstm {
        operands.push(drawing.weight(&[2, 3 * width]).id);
    }
    operands.push(drawing.indices(&[batch], steps + 1));
    let (sigmoid, tanh) = (Expr::operand(0).unary(Unary::Sigmoid), Expr::operand(0).unary(Unary::Tanh));
    let functions = [sigmoid, tanh.clone(), tanh][..cell.functions()].to_vec();
    let functions = [functions.clone(), functions].concat();
    let op =
        Op::Recurrence { cell, reverse: vec![false, true], functions, bias: false, peepholes: lstm, lengths: true };
    let results = drawing.node(op, &operands)?;
    let last = *results.last()?;
    drawing.know(results[0], 1.0, false, false);
    Some(drawing.know(last, 10.0, false, false))
}

#[test]
fn samples_of_recurrent_layers_are_split() {
    let meshes = ["data=2", "data=3", "tensor=2", "data=2,tensor=3", "pipe=2,tensor=2"];
    for cell in [Cell::Rnn, Cell::Gru { resets_late: false }, Cell::Lstm { coupled: false }] {
        for batch in [4, 3] {
            let mut drawing = Drawing::new(7);
            recurrent(&mut drawing, cell, batch).unwrap();
            let case = drawing.finish();
            let failures = check("layer", &case, &meshes);
            assert!(failures.is_empty(), "{}", failures[0]);
            let plan = plan(&case, parse_mesh("data=2").unwrap(), 0).unwrap();
            let layers =
                plan.kernels.iter().flat_map(|kernel| kernel.spec.nodes.iter().map(move |node| (kernel, node)));
            let mut layers = layers.filter(|(_, node)| matches!(node.op, Op::Recurrence { .. }));
            let (kernel, node) = layers.next().unwrap();
            assert_eq!(kernel.spec.inputs[node.operands[2] as usize].sizes(), [2, batch.div_ceil(2), 5]);
        }
    }
}

/// An index that is out of range of a split table is out of range of every part of it.
#[test]
fn indices_outside_of_a_split_table_are_refused() {
    let case = |indices: [i64; 3]| {
        let text = "%i: i64[3]\n %w: f32[10, 4] = weight random 7\n %y = gather %w, %i {axis 0}\n return %y";
        let inputs = BTreeMap::from([("i".to_owned(), Tensor::from_elements(&[3], &indices).unwrap())]);
        Case { module: ir::text::parse_lines(text).unwrap(), inputs }
    };
    for (mesh, rows) in [("tensor=2", 5), ("tensor=3", 4), ("tensor=4", 3)] {
        let on = |case: &Case| run(case, parse_mesh(mesh).unwrap(), 0);
        let inside = case([9, -10, 0]);
        assert_eq!(on(&inside).unwrap(), run(&inside, Mesh::default(), 1 << 40).unwrap(), "{mesh}");
        for index in [10, -11, i64::MIN, i64::MAX] {
            let error = on(&case([0, index, 1])).unwrap_err();
            let expected = format!("gather: index {index} is outside of -{rows}..{rows} on axis 0");
            assert!(error.contains(&expected), "{mesh}: {error}");
        }
    }
}
