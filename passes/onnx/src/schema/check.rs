//! Checks a node against what ONNX says of its operator: attributes, numbers of inputs and outputs, element types.
//!
//! As strict as `onnx.checker` and ONNX Runtime are, which refuse such models too: what a node says and nobody reads
//! would be a wrong answer. Each finding is a text that stands after the node's name, operator and opset.

use planfile::DType;

use super::{Formal, Places, Schema, history};
use crate::flat::{Attribute, Node};
use crate::operators;

/// An actual input or output: which of the two, what they stand for, and its position.
type Place<'s> = (&'s str, &'s [Formal], usize);

/// A sum of thousands of values may have one for each; so many say enough.
const TYPE_FINDINGS_MAX: usize = 4;

/// What is wrong with a node whatever its operands are. Nothing where ONNX has no such operator: that is said elsewhere.
pub(crate) fn form(node: &Node) -> Vec<String> {
    let Some(schema) = super::find(&node.domain, &node.op_type, node.opset) else { return Vec::new() };
    let mut findings = Vec::new();
    // A version that ONNX has removed may still be imported, by a row of its own.
    let has_row = || {
        let row = operators::since(&node.domain, &node.op_type, node.opset);
        row.is_some_and(|row| row >= schema.since)
    };
    if schema.is_deprecated && !has_row() {
        findings.push(format!("ONNX has removed the operator from opset {} on", schema.since));
        return findings;
    }
    places(&mut findings, "input", &schema.inputs, &node.inputs);
    places(&mut findings, "output", &schema.outputs, &node.outputs);
    if !schema.output_counts.is_empty() && !schema.output_counts.contains(&node.outputs.len()) {
        let counts: Vec<String> = schema.output_counts.iter().map(usize::to_string).collect();
        findings.push(format!("it has {} outputs; allowed: {}", node.outputs.len(), counts.join(" or ")));
    }
    attributes(&mut findings, schema, node);
    findings
}

/// What is wrong with the element types of a node's inputs and outputs; `None` where one is left out or not known.
pub(crate) fn types(node: &Node, inputs: &[Option<DType>], outputs: &[Option<DType>]) -> Vec<String> {
    let Some(schema) = super::find(&node.domain, &node.op_type, node.opset) else { return Vec::new() };
    let mut findings = Vec::new();
    // What each variable stands for, and where that was seen first.
    let mut bound: Vec<(&str, DType, Place<'_>)> = Vec::new();
    for (what, formals, actual) in [("input", &schema.inputs, inputs), ("output", &schema.outputs, outputs)] {
        for (position, &dtype) in actual.iter().enumerate() {
            let (Some(dtype), Some(formal)) = (dtype, formal_of(formals, position)) else { continue };
            if findings.len() == TYPE_FINDINGS_MAX {
                return findings;
            }
            if !formal.types.contains(dtype) {
                findings.push(format!("{} is {dtype}; allowed: {}", label(what, formals, position), formal.types));
                continue;
            }
            let Some(variable) = formal.variable else { continue };
            match bound.iter().find(|(name, ..)| *name == variable) {
                Some((_, first, _)) if *first == dtype => {}
                Some(&(_, first, (what_first, formals_first, position_first))) => {
                    let place = label(what_first, formals_first, position_first);
                    let other = label(what, formals, position);
                    findings.push(format!("{place} is {first} and {other} is {dtype}; they have to be of one type"));
                }
                None => bound.push((variable, dtype, (what, formals, position))),
            }
        }
    }
    findings
}

/// The formal input or output of an actual one; the last one may stand for many.
fn formal_of(formals: &[Formal], position: usize) -> Option<&Formal> {
    let many = || formals.last().filter(|formal| matches!(formal.places, Places::Many { .. }));
    formals.get(position).or_else(many)
}

fn label(what: &str, formals: &[Formal], position: usize) -> String {
    match formal_of(formals, position) {
        Some(formal) => format!("{what} {position} (`{}`)", formal.name),
        None => format!("{what} {position}"),
    }
}

/// Whether every formal one that has to be given is, and no more than there are.
fn places(findings: &mut Vec<String>, what: &str, formals: &[Formal], actual: &[String]) {
    for (position, formal) in formals.iter().enumerate() {
        let is_missing = match formal.places {
            Places::One => actual.get(position).is_none_or(String::is_empty),
            Places::OneOrNone => false,
            Places::Many { least } => actual.len() < position + least,
        };
        if is_missing {
            findings.push(format!("{} is missing", label(what, formals, position)));
        }
    }
    let has_end = !formals.last().is_some_and(|formal| matches!(formal.places, Places::Many { .. }));
    if has_end && actual.len() > formals.len() {
        let plural = if actual.len() == 1 { "" } else { "s" };
        let names = quoted(formals.iter().map(|formal| formal.name));
        findings.push(format!("it has {} {what}{plural}; allowed: {names}", actual.len()));
    }
}

fn attributes(findings: &mut Vec<String>, schema: &Schema, node: &Node) {
    for (name, value) in &node.attributes {
        match schema.attributes.iter().find(|rule| rule.name == name) {
            Some(rule) if is_of(value, rule.kind) => {}
            Some(rule) => {
                findings.push(format!("attribute `{name}` is {}, not {}", kind(value), in_words(rule.kind)));
            }
            // ONNX's own rule: such a name is a note of the tool that wrote the model.
            None if name.starts_with("__") => {}
            None => {
                let known = quoted(schema.attributes.iter().map(|rule| rule.name));
                let other = other_version(node, name);
                findings.push(format!("it has no attribute `{name}`{other}; allowed: {known}"));
            }
        }
    }
    for rule in schema.attributes.iter().filter(|rule| rule.is_required && !node.attributes.contains_key(rule.name)) {
        findings.push(format!("attribute `{}` is missing; it has to be {}", rule.name, in_words(rule.kind)));
    }
}

/// The opset nearest to the node's whose version of the operator has the attribute.
fn other_version(node: &Node, attribute: &str) -> String {
    let with = |schema: &&Schema| schema.attributes.iter().any(|rule| rule.name == attribute);
    let mut later = history(&node.domain, &node.op_type).filter(|schema| schema.since > node.opset).filter(with);
    let earlier = || history(&node.domain, &node.op_type).filter(|s| s.since < node.opset).rfind(with);
    let version = later.next().or_else(earlier);
    version.map_or_else(String::new, |schema| format!(" (opset {} has it)", schema.since))
}

fn quoted<'n>(names: impl Iterator<Item = &'n str>) -> String {
    let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Whether the value is of ONNX's kind. One that we cannot represent is left to whoever reads it.
fn is_of(value: &Attribute, expected: &str) -> bool {
    match value {
        Attribute::Int(_) => expected == "int",
        Attribute::Float(_) => expected == "float",
        Attribute::String(_) => expected == "string",
        Attribute::Ints(_) => expected == "ints",
        Attribute::Floats(_) => expected == "floats",
        Attribute::Strings(_) => expected == "strings",
        // Sparse ones have become dense ones.
        Attribute::Tensor(_) => matches!(expected, "tensor" | "sparse_tensor"),
        Attribute::Graph(_) => expected == "graph",
        Attribute::Tensors(_) | Attribute::Graphs(_) => false,
        Attribute::Unsupported(_) => true,
    }
}

fn kind(value: &Attribute) -> &'static str {
    match value {
        Attribute::Int(_) => in_words("int"),
        Attribute::Float(_) => in_words("float"),
        Attribute::String(_) => in_words("string"),
        Attribute::Ints(_) => in_words("ints"),
        Attribute::Floats(_) => in_words("floats"),
        Attribute::Strings(_) => in_words("strings"),
        Attribute::Tensor(_) => in_words("tensor"),
        Attribute::Tensors(_) => "a list of tensors",
        Attribute::Graph(_) => in_words("graph"),
        Attribute::Graphs(_) => "a list of graphs",
        Attribute::Unsupported(_) => "something else",
    }
}

/// A kind of attribute, from ONNX's word for it.
fn in_words(kind: &'static str) -> &'static str {
    match kind {
        "int" => "an integer",
        "float" => "a number",
        "string" => "a string",
        "ints" => "a list of integers",
        "floats" => "a list of numbers",
        "strings" => "a list of strings",
        "tensor" => "a tensor",
        "sparse_tensor" => "a sparse tensor",
        "graph" => "a graph",
        "type_proto" => "a type",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat::{Graph, ValueInfo};
    use crate::harness::{Case, bools, info, node, tensor};
    use crate::messages::AttributeType;
    use crate::samples::{attribute, graph, model, reload, with};
    use crate::tensor_data::ElemType;

    fn relu(opset: i64) -> Case {
        Case::new("Relu", opset).input(tensor(&[2], &[1f32, -2.0]))
    }

    #[track_caller]
    fn refused(case: &Case, expected: &str) {
        let text = case.error();
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn what_a_model_says_wrongly_is_named() {
        refused(&relu(20).int("clip", 6), "`/Relu`: Relu (opset 20): it has no attribute `clip`; allowed: none");
        refused(&relu(6).ints("consumed_inputs", &[0]), "it has no attribute `consumed_inputs` (opset 1 has it)");
        let image = || tensor(&[1, 4, 2, 2], &[1f32; 16]);
        let conv = Case::new("Conv", 11).input(image()).constant(tensor(&[1, 4, 1, 1], &[1f32; 4]));
        refused(&conv.string("auto_padd", "VALID"), "no attribute `auto_padd`; allowed: `auto_pad`, `dilations`");
        let blocks = Case::new("SpaceToDepth", 13).input(image()).int("blocksize", 2);
        assert!(blocks.import().is_ok());
        refused(&blocks.string("mode", "CRD"), "no attribute `mode` (opset 28 has it); allowed: `blocksize`");
        for name in ["left_window_size", "right_window_size"] {
            let heads = || tensor(&[1, 1, 2, 2], &[1f32; 4]);
            let attention = Case::new("Attention", 24).input(heads()).input(heads()).input(heads());
            refused(&attention.int(name, 1), &format!("no attribute `{name}` (opset 25 has it)"));
        }
    }

    #[test]
    fn notes_of_other_tools_are_passed_over() {
        assert!(relu(20).int("__note", 1).import().is_ok());
    }

    #[test]
    fn attributes_have_their_type_and_are_there() {
        let softmax = Case::new("Softmax", 13).input(tensor(&[2], &[1f32, 2.0]));
        refused(&softmax.float("axis", 0.0), "attribute `axis` is a number, not an integer");
        let blocks = Case::new("SpaceToDepth", 13).input(tensor(&[1, 1, 2, 2], &[1f32; 4]));
        refused(&blocks, "attribute `blocksize` is missing; it has to be an integer");
    }

    #[test]
    fn inputs_and_outputs_are_counted() {
        let x = || tensor(&[2], &[1f32, 2.0]);
        refused(&relu(20).input(x()), "it has 2 inputs; allowed: `X`");
        refused(&relu(20).outputs(2), "it has 2 outputs; allowed: `Y`");
        refused(&Case::new("Add", 14).input(x()), "input 1 (`B`) is missing");
        refused(&Case::new("Add", 14).without().input(x()), "input 0 (`A`) is missing");
        let channels = || tensor(&[1], &[1f32]);
        let norm = Case::new("BatchNormalization", 9).input(tensor(&[1, 1], &[1f32]));
        let norm = (0..4).fold(norm, |norm, _| norm.constant(channels()));
        assert!(norm.import().is_ok());
        refused(&norm.outputs(3), "it has 3 outputs; allowed: 1 or 5");
    }

    #[test]
    fn element_types_are_those_of_the_version() {
        let x = || tensor(&[2], &[1i64, -2]);
        let relu = |opset| Case::new("Relu", opset).input(x());
        refused(&relu(13), "input 0 (`X`) is i64; allowed: f16, bf16, f32 or f64");
        refused(&relu(12), "input 0 (`X`) is i64; allowed: f16, f32 or f64");
        assert!(relu(14).import().is_ok());
        let add = Case::new("Add", 14).input(x()).input(tensor(&[2], &[1f32, 2.0]));
        refused(&add, "input 0 (`A`) is i64 and input 1 (`B`) is f32; they have to be of one type");
        let sum = Case::new("Sum", 13).input(tensor(&[1], &[1f32])).input(tensor(&[1], &[1f64]));
        refused(&sum, "input 1 (`data_0`) is f64");
        let cast = |opset| Case::new("Cast", opset).input(x()).int("to", 16);
        refused(&cast(9), "output 0 (`output`) is bf16");
        assert!(cast(13).import().is_ok());
    }

    #[test]
    fn versions_that_onnx_has_removed_are_refused_unless_they_have_a_row() {
        let resized = |opset| {
            let case = Case::new("Upsample", opset).input(tensor(&[1, 1, 1, 1], &[1f32]));
            case.constant(tensor(&[4], &[1f32, 1.0, 2.0, 2.0]))
        };
        assert!(resized(9).import().is_ok());
        refused(&resized(10), "ONNX has removed the operator from opset 10 on");
        let normal = Case::new("GroupNormalization", 18).input(tensor(&[1, 2, 1], &[1f32, 2.0]));
        let normal = normal.constant(tensor(&[1], &[1f32])).constant(tensor(&[1], &[0f32])).int("num_groups", 1);
        assert!(normal.import().is_ok(), "{}", normal.error());
    }

    #[test]
    fn nodes_of_bodies_are_checked_too() {
        let body = |name: &str| {
            let mut inner = node("Abs", 20, &["x0"], &[name]);
            inner.attributes.insert("depth".to_owned(), Attribute::Int(1));
            let outputs: Vec<ValueInfo> = vec![info(name, ElemType::UNDEFINED, None)];
            Attribute::Graph(Box::new(Graph { nodes: vec![inner], outputs, ..Graph::default() }))
        };
        let mut case = relu(20);
        let mut branch = node("If", 20, &["yes"], &["y0"]);
        branch.attributes.insert("then_branch".to_owned(), body("a"));
        branch.attributes.insert("else_branch".to_owned(), body("b"));
        case.graph.nodes = vec![branch];
        case = case.constant(bools(&[], &[true]));
        case.graph.initializers[0].name = "yes".to_owned();
        case.graph.nodes[0].inputs.pop();
        let text = case.error();
        assert!(
            text.contains("`/Abs` and 1 more: Abs (opset 20): it has no attribute `depth`"),
            "both branches: {text}"
        );
    }

    #[test]
    fn constants_are_checked_before_they_become_weights() {
        let int = |name: &str| crate::messages::AttributeProto { i: Some(1), ..attribute(name, AttributeType::Int) };
        let constant = |attributes: Vec<crate::messages::AttributeProto>, opset: i64| {
            let constant = attributes.into_iter().fold(crate::samples::node("Constant", &[], &["c"]), with);
            let mut proto = model(graph(vec![constant, crate::samples::node("Identity", &["c"], &["y"])]));
            proto.opset_import = vec![crate::samples::opset("", opset)];
            let files = crate::source_files::WeightFiles::open(&[]).unwrap();
            let report = crate::support(&reload(&proto).unwrap(), &crate::Bindings::default(), &files).unwrap();
            let constant = report.operators.into_iter().find(|row| row.op == "Constant");
            constant.and_then(|row| row.reasons.into_iter().next()).map(|reason| reason.text)
        };
        assert_eq!(constant(vec![int("value_int")], 12), None);
        let early = constant(vec![int("value_int")], 11).unwrap();
        assert!(early.contains("no attribute `value_int` (opset 12 has it)"), "{early}");
        let invented = constant(vec![int("value_int"), int("invented")], 17).unwrap();
        assert!(invented.starts_with("it has no attribute `invented`"), "{invented}");
        let two = constant(vec![int("value_int"), int("value_ints")], 17).unwrap();
        assert!(two.contains("attribute `value_ints` is an integer, not a list of integers"), "{two}");
        let none = constant(vec![], 17).unwrap();
        assert!(none.contains("one attribute that says its value; given: none"), "{none}");
    }
}
