//! What the tests of the steps share, and tests of the pass as a whole.

use cpu::evaluate;
use cpu::recipe::{NoFiles, WeightBytes, WeightReadError, read_all};
use ir::text::parse_lines;
use ir::verify::verify;
use ir::{Module, ValueDef, WeightId};
use planfile::{Source, SourceFile, Tensor};

use super::{dead, simplify};

/// Files whose byte at each offset is the offset's lowest.
struct Counting;

impl WeightBytes for Counting {
    fn read(&self, _: u32, offset: u64, into: &mut [u8]) -> Result<(), WeightReadError> {
        into.iter_mut().zip(offset..).for_each(|(byte, offset)| *byte = offset as u8);
        Ok(())
    }
}

/// The lines as a module with one file.
fn parse(text: &str) -> Module {
    let module = parse_lines(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    Module { files: vec![SourceFile { name: "model.onnx".to_owned(), bytes: 1 << 30 }], ..module }
}

fn simplified(text: &str) -> Module {
    let module = parse(text);
    let once = simplify(module.clone(), &Counting).unwrap();
    verify(&once).unwrap_or_else(|error| panic!("{error}\n{once}"));
    assert_same_results(&module, &once);
    let twice = simplify(once.clone(), &Counting).unwrap();
    assert_eq!(once, twice, "not idempotent:\n{once}\n{twice}");
    once
}

/// Checks that `before` becomes `after`, up to names of weights and, unless `after` states some, origins.
#[track_caller]
pub(super) fn check(before: &str, after: &str) {
    let actual = comparable(simplified(before), after.contains('#'));
    let expected = comparable(parse(after), after.contains('#'));
    assert!(actual.graphs == expected.graphs && actual.weights == expected.weights, "got\n{actual}\nfor\n{expected}");
}

#[track_caller]
pub(super) fn check_unchanged(text: &str) {
    check(text, text);
}

/// Without dead parts, weights numbered by use and without names.
fn comparable(module: Module, origins: bool) -> Module {
    let mut module = dead::run(&module);
    let mut order: Vec<WeightId> = Vec::new();
    for value in module.graphs.iter_mut().flat_map(|graph| &mut graph.values) {
        if let ValueDef::Weight(id) = &mut value.def {
            let number = order.iter().position(|known| known == id).unwrap_or_else(|| {
                order.push(*id);
                order.len() - 1
            });
            *id = WeightId(number as u32);
        }
    }
    let weights = order.iter().map(|id| module.weight(*id).clone());
    module.weights = weights.map(|weight| ir::Weight { name: String::new(), ..weight }).collect();
    if !origins {
        module.graphs.iter_mut().flat_map(|graph| &mut graph.nodes).for_each(|node| node.origin = [].into());
    }
    module
}

/// Runs the module's only graph on noise.
fn outputs(module: &Module) -> Vec<Tensor> {
    let graph = &module.graphs[0];
    let mut values: Vec<Option<Tensor>> = graph
        .values
        .iter()
        .map(|value| match value.def {
            ValueDef::Weight(id) => Some(read_all(&module.weight(id).recipe, &Counting).unwrap()),
            ValueDef::Input(seed) => {
                let recipe = planfile::Recipe::source(value.ty.clone(), Source::Random { seed: seed.into() });
                Some(read_all(&recipe, &NoFiles).unwrap())
            }
            ValueDef::State(_) | ValueDef::Node(..) => None,
        })
        .collect();
    for node in &graph.nodes {
        let operands: Vec<&Tensor> =
            node.operands.iter().map(|operand| values[operand.index()].as_ref().unwrap()).collect();
        let results = evaluate(&node.op, &operands).unwrap();
        for (id, result) in node.results.iter().zip(results) {
            values[id.index()] = Some(result);
        }
    }
    graph.outputs.iter().map(|output| values[output.value.index()].clone().unwrap()).collect()
}

#[track_caller]
fn assert_same_results(before: &Module, after: &Module) {
    assert_eq!(outputs(before), outputs(after), "results differ:\n{before}\n{after}");
}

#[test]
fn merges_equal_nodes_and_their_origins() {
    check(
        "%x: f32[4]
         %a = pointwise %x {exp($0)}      # a
         %b = pointwise %x {exp($0)}      # b
         %y = pointwise %a, %b {$0 - $1}  # y
         return %y",
        "%x: f32[4]
         %a = pointwise %x {exp($0)}      # a + b
         %y = pointwise %a {$0 - $0}      # y
         return %y",
    );
}

#[test]
fn merges_equal_weights() {
    check(
        "%x: f32[2]
         %v: f32[2] = weight [1, 2]
         %w: f32[2] = weight [1, 2]
         %y = pointwise %x, %v, %w {$0 * $1 + $2}
         return %y",
        "%x: f32[2]
         %v: f32[2] = weight [1, 2]
         %y = pointwise %x, %v {$0 * $1 + $1}
         return %y",
    );
}

#[test]
fn keeps_nodes_that_differ_in_an_attribute() {
    check_unchanged(
        "%x: f32[4, 4]
         %a = softmax %x {axis 0}
         %b = softmax %x {axis 1}
         %y = pointwise %a, %b {$0 - $1}
         return %y",
    );
}

#[test]
fn drops_what_nobody_reads() {
    check(
        "%x: f32[4]
         %u: f32[4]
         %w: f32[4] = weight [1, 2, 3, 4]
         %a = pointwise %u, %w {$0 + $1}
         %y = pointwise %x {tanh($0)}
         return %y",
        "%x: f32[4]
         %u: f32[4]
         %y = pointwise %x {tanh($0)}
         return %y",
    );
}

#[test]
fn inputs_and_weights_may_leave_as_they_are() {
    check(
        "%x: f32[4]
         %w: f32[2, 2] = weight [1, 2, 3, 4]
         %a: f32[2, 2] = reshape %x
         %y: f32[4] = reshape %a
         %v: f32[4] = reshape %w
         return %y, %v",
        "%x: f32[4]
         %v: f32[4] = weight [1, 2, 3, 4]
         return %x, %v",
    );
}

#[test]
fn folds_the_arithmetic_of_shapes() {
    // As exporters spell `x.view(x.shape[0], -1)`.
    check(
        "%x: f32[2, 3, 4]
         %shape: i64[3] = weight [2, 3, 4]
         %zero: i64[] = weight [0]
         %batch = gather %shape, %zero {axis 0}
         %first: i64[1] = reshape %batch
         %rest: i64[1] = weight [-1]
         %both = concat %first, %rest {axis 0}
         %bound = pointwise %both {max($0, 0)}
         %used = pointwise %bound {f32($0)}
         %flat: f32[2, 12] = reshape %x
         %some: f32[2, 1] = reshape %used
         %y = pointwise %flat, %some {$0 + $1}
         return %y",
        "%x: f32[2, 3, 4]
         %flat: f32[2, 12] = reshape %x
         %some: f32[2, 1] = weight [2, 0]
         %y = pointwise %flat, %some {$0 + $1}
         return %y",
    );
}

#[test]
fn refuses_a_sharded_module() {
    let module = parse_lines(
        "mesh tensor=2
         %x: f32[2] of [4] split(0: tensor)
         %y = pointwise %x {exp($0)}
         return %y",
    );
    let error = simplify(module.unwrap(), &NoFiles).unwrap_err();
    assert!(error.to_string().contains("sharded already"), "{error}");
}
