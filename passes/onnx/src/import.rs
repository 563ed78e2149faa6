//! From a loaded model to a module: one pass over the nodes, each lowered by its row in [`crate::operators`].
//!
//! Shapes are static once the inputs' dimensions are bound. What a shape depends on is computed when a lowering asks for
//! it; everything else, shape arithmetic included, becomes ordinary nodes for later passes to fold.

use std::collections::{BTreeMap, HashMap};

use ir::{Entry, Graph, GraphId, Module, Port, ValueDef, ValueId};
use planfile::{DType, SourceFile};

use crate::attribute;
use crate::bindings::{Bindings, InputType, Inputs, bind};
use crate::build::Builder;
use crate::context::{Context, OpError};
use crate::error::{OnnxError, UnsupportedNode};
use crate::findings::Findings;
use crate::flat::{self, Attribute, Initializer, Node};
use crate::load::Model;
use crate::operators::{self, Lower};
use crate::schema;
use crate::source_files::WeightFiles;
use crate::stand_ins::StandIns;
use crate::support::refused_whatever_is_bound;

/// Of a node that was not looked at.
const FOLLOWS: &str = "not looked at: it reads what a node makes that cannot be imported";

/// Imports `model` with its input dimensions bound, as a module of one entry and one graph. Weights stay ranges of
/// their files.
///
/// # Errors
/// When a dimension is not bound or bound in two ways, when nodes are not supported (all are listed), when shapes
/// contradict each other, or when a shape depends on data that nothing binds.
pub fn import(model: &Model, bindings: &Bindings, weights: &WeightFiles) -> Result<Module, OnnxError> {
    let Inputs { types, open } = bind(&model.graph, bindings, 0)?;
    if !open.is_empty() {
        // What cannot be imported comes first: to bind dimensions would be in vain.
        let unsupported = refused_whatever_is_bound(model, bindings, weights)?;
        return Err(if unsupported.is_empty() {
            OnnxError::UnboundDims(open)
        } else {
            OnnxError::Unsupported(unsupported)
        });
    }
    let (module, findings) = attempt(model, &types, bindings, weights, refused(&model.graph))?;
    if let Some(error) = findings.into_error() {
        return Err(error);
    }
    match types.into_iter().find_map(InputType::refusal) {
        Some(error) => Err(error),
        None => Ok(module),
    }
}

/// Imports what can be imported, around nodes that are refused already, and finds all that cannot. The module is whole
/// where nothing is found and all inputs are known.
///
/// # Errors
/// A model with an output that nothing defines, or two of one name.
pub(crate) fn attempt(
    model: &Model,
    types: &[InputType],
    bindings: &Bindings,
    weights: &WeightFiles,
    refused: Vec<UnsupportedNode>,
) -> Result<(Module, Findings), OnnxError> {
    check_outputs(&model.graph)?;
    let name = if model.graph.name.is_empty() { "main" } else { &model.graph.name };
    let mut inputs = Vec::new();
    let mut ports = Vec::new();
    let mut graph = Graph::new("main");
    let mut import = Import {
        files: weights,
        values: HashMap::new(),
        refused: refused.iter().map(|node| (node.name.clone(), node.hint.clone())).collect(),
        findings: Findings { unsupported: refused, ..Findings::default() },
        unheld: Vec::new(),
        stand_ins: StandIns::new(&model.graph, types),
    };
    for ((info, ty), number) in model.graph.inputs.iter().zip(types).zip(0u32..) {
        let named = match ty {
            InputType::Known { ty, .. } => {
                ports.push(Port { name: info.name.clone(), ty: ty.clone() });
                Named::Value(graph.add_source(ty.clone(), ValueDef::Input(number)))
            }
            InputType::Open => Named::Failed,
            InputType::Refused(error) => {
                import.unheld.push(error.to_string());
                Named::Unheld(import.unheld.len() - 1)
            }
        };
        import.values.insert(&info.name, named);
        inputs.push((info.name.clone(), bindings.samples.get(&info.name).cloned()));
    }
    let files = model.files.iter().map(|file| SourceFile { name: file.path.clone(), bytes: file.len }).collect();
    let mut builder = Builder {
        module: Module { name: name.to_owned(), files, ..Module::default() },
        graph,
        absent: model.files.iter().map(|file| file.absent).collect(),
        random_weights: bindings.random_weights,
        inputs,
        ..Builder::default()
    };
    import.graph(&mut builder, &model.graph);
    let mut outputs = Vec::new();
    for info in &model.graph.outputs {
        match import.value(&mut builder, &info.name) {
            Ok(value) => outputs.push((info.name.clone(), value)),
            Err(NoValue::Failed | NoValue::Unheld(_)) => {}
            Err(NoValue::Undefined) => return Err(undefined_output(&info.name)),
        }
    }
    Ok((finish(builder, ports, outputs), import.findings))
}

/// Whether every output has a name of its own: results are given by name.
fn check_outputs(graph: &flat::Graph) -> Result<(), OnnxError> {
    let mut known: HashMap<&str, usize> = HashMap::new();
    for (position, output) in graph.outputs.iter().enumerate() {
        if let Some(first) = known.insert(&output.name, position) {
            return Err(OnnxError::DuplicateName {
                place: "the graph".to_owned(),
                name: output.name.clone(),
                first: format!("output {first}"),
                second: format!("output {position}"),
            });
        }
    }
    Ok(())
}

/// Puts graph and signature into the module.
fn finish(builder: Builder, inputs: Vec<Port>, outputs: Vec<(String, ValueId)>) -> Module {
    let frozen = builder.frozen();
    let Builder { mut module, mut graph, .. } = builder;
    (0..).zip(&outputs).for_each(|(position, &(_, value))| graph.add_output(position, value));
    let outputs = outputs.into_iter().map(|(name, value)| Port { name, ty: graph.ty(value).clone() }).collect();
    module.graphs.push(graph);
    module.entries.push(Entry { name: "main".to_owned(), inputs, outputs, frozen, stages: vec![GraphId(0)] });
    module
}

fn undefined_output(name: &str) -> OnnxError {
    OnnxError::UndefinedOutput { place: "the graph".to_owned(), value: name.to_owned() }
}

/// What a name of the model stands for.
#[derive(Clone, Copy)]
enum Named<'m> {
    Value(ValueId),
    /// A constant that nobody has read yet.
    Initializer(&'m Initializer),
    /// Result of a node that could not be lowered, or of one that reads such a result; an input of unknown rank.
    Failed,
    /// An input or a constant of a type that cannot be held; which and why by number.
    Unheld(usize),
}

/// Why a name has no value.
enum NoValue {
    Failed,
    Unheld(usize),
    Undefined,
}

/// A walk over the nodes of a model.
struct Import<'m> {
    files: &'m WeightFiles,
    /// Looked up, never walked.
    values: HashMap<&'m str, Named<'m>>,
    /// Nodes that were refused before the walk, by their names, which are unique, and why.
    refused: BTreeMap<String, String>,
    findings: Findings,
    /// Why inputs and constants cannot be held.
    unheld: Vec<String>,
    stand_ins: StandIns<'m>,
}

impl<'m> Import<'m> {
    /// Adds the nodes of a graph, the model's own or the body of a node, in order.
    fn graph(&mut self, builder: &mut Builder, graph: &'m flat::Graph) {
        for initializer in &graph.initializers {
            builder.weight_names.insert(initializer.name.clone());
            self.values.insert(&initializer.name, Named::Initializer(initializer));
        }
        for node in &graph.nodes {
            let Some(results) = self.node(builder, node) else {
                self.stand_in(builder, node);
                continue;
            };
            for (position, name) in node.outputs.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
                let named = results.get(position).map_or_else(
                    || {
                        self.fail(node, OpError::Unsupported { hint: format!("output {position} is not supported") });
                        Named::Failed
                    },
                    |&value| Named::Value(value),
                );
                self.values.insert(name, named);
            }
        }
    }

    /// The value of a name; a weight is added when it is first read.
    fn value(&mut self, builder: &mut Builder, name: &str) -> Result<ValueId, NoValue> {
        match self.values.get(name).copied() {
            Some(Named::Value(value)) => Ok(value),
            Some(Named::Initializer(initializer)) => {
                let value = builder.initializer(&initializer.name, &initializer.tensor);
                self.values.insert(&initializer.name, Named::Value(value));
                Ok(value)
            }
            Some(Named::Failed) => Err(NoValue::Failed),
            Some(Named::Unheld(why)) => Err(NoValue::Unheld(why)),
            None => Err(NoValue::Undefined),
        }
    }

    /// Lowers a node. `None` when it cannot be, or depends on one that cannot.
    fn node(&mut self, builder: &mut Builder, node: &'m Node) -> Option<Vec<ValueId>> {
        if self.refused.contains_key(&node.name) {
            return None;
        }
        let mut operands = Vec::with_capacity(node.inputs.len());
        let (mut follows, mut unheld) = (false, Vec::new());
        for name in &node.inputs {
            if name.is_empty() {
                operands.push(None);
                continue;
            }
            match self.value(builder, name) {
                Ok(value) => operands.push(Some(value)),
                Err(NoValue::Failed) => follows = true,
                Err(NoValue::Unheld(why)) => unheld.push(self.unheld[why].clone()),
                Err(NoValue::Undefined) => {
                    let (name, op, value) = (node.name.clone(), node.op_type.clone(), name.clone());
                    self.fault(node, OnnxError::UndefinedValue { node: name, op, value });
                    return None;
                }
            }
        }
        if !unheld.is_empty() {
            self.fail(node, OpError::Unsupported { hint: unheld.join("; ") });
            return None;
        }
        if follows {
            self.findings.skipped.push(UnsupportedNode::at(node, FOLLOWS));
            return None;
        }
        let types: Vec<Option<DType>> =
            operands.iter().map(|operand| operand.map(|value| builder.graph.ty(value).dtype)).collect();
        if is_branch(node) {
            let fits = self.conforms(node, schema::check::types(node, &types, &[]));
            return if fits { self.branch(builder, node, operands) } else { None };
        }
        let lower: Lower = operators::find(&node.domain, &node.op_type, node.opset)
            .map_err(|hint| self.fail(node, OpError::Unsupported { hint }))
            .ok()?;
        let mut context = Context::new(builder, self.files, node, operands);
        let results = lower(&mut context);
        let of = |value: &ValueId| Some(builder.graph.ty(*value).dtype);
        let outputs: Vec<Option<DType>> = results.iter().flatten().map(of).collect();
        // Types that ONNX forbids are the reason, whatever else does not fit on account of them.
        if !self.conforms(node, schema::check::types(node, &types, &outputs)) {
            return None;
        }
        results.map_err(|error| self.fail(node, error)).ok()
    }

    /// Whether nothing was found; reports what was.
    fn conforms(&mut self, node: &Node, findings: Vec<String>) -> bool {
        let conforms = findings.is_empty();
        if !conforms {
            self.fail(node, OpError::Unsupported { hint: findings.join("; ") });
        }
        conforms
    }

    /// An `If` whose condition is known: the branch taken, in place.
    fn branch(
        &mut self,
        builder: &mut Builder,
        node: &'m Node,
        operands: Vec<Option<ValueId>>,
    ) -> Option<Vec<ValueId>> {
        let mut context = Context::new(builder, self.files, node, operands);
        let condition = context.operand(0).and_then(|value| context.constant_i64(value));
        let name = match condition {
            Ok(0) => "else_branch",
            Ok(_) => "then_branch",
            Err(error) => {
                self.fail(node, error);
                return None;
            }
        };
        let Some(Attribute::Graph(body)) = node.attributes.get(name) else {
            self.fail(node, OpError::Invalid { why: format!("attribute `{name}` is missing") });
            return None;
        };
        self.graph(builder, body);
        let mut results = Vec::new();
        for output in &body.outputs {
            match self.value(builder, &output.name) {
                Ok(value) => results.push(value),
                Err(NoValue::Failed | NoValue::Unheld(_)) => return None,
                Err(NoValue::Undefined) => {
                    self.fault(node, undefined_output(&output.name));
                    return None;
                }
            }
        }
        Some(results)
    }

    fn fail(&mut self, node: &Node, error: OpError) {
        let (name, op) = (node.name.clone(), node.op_type.clone());
        let error = match error {
            OpError::Unsupported { hint } => {
                self.findings.unsupported.push(UnsupportedNode::at(node, &hint));
                return;
            }
            // What the model says of a value is a hint: with it, a contradiction proves nothing.
            OpError::Invalid { .. } if self.stand_ins.is_used() => None,
            OpError::DataDependent { input } if self.stand_ins.contains(&input) => None,
            OpError::Invalid { why } => Some(OnnxError::ContradictoryShape { node: name, op, problem: why }),
            OpError::DataDependent { input } => Some(OnnxError::DataDependent { node: name, op, input }),
            OpError::Read(error) => Some(*error),
        };
        match error {
            Some(error) => self.fault(node, error),
            None => self.findings.skipped.push(UnsupportedNode::at(node, FOLLOWS)),
        }
    }

    fn fault(&mut self, node: &Node, error: OnnxError) {
        self.findings.faults.push((UnsupportedNode::at(node, &error.at_a_node()), error));
    }

    /// Lets the walk go on after a node without results: with values of the types that the model says they have, where it
    /// does.
    fn stand_in(&mut self, builder: &mut Builder, node: &'m Node) {
        // What a constant cannot hold, its readers cannot read.
        let unheld = (node.op_type == "Constant" && node.domain.is_empty()).then(|| {
            let why = self.refused.get(&node.name).map_or("", String::as_str);
            self.unheld.push(format!("constant `{}`: {why}", node.name));
            self.unheld.len() - 1
        });
        for name in node.outputs.iter().filter(|name| !name.is_empty()) {
            let named = match (unheld, self.stand_ins.take(name)) {
                (Some(why), _) => Named::Unheld(why),
                (None, Some(ty)) => {
                    let number = builder.inputs.len() as u32;
                    builder.inputs.push((name.clone(), None));
                    Named::Value(builder.graph.add_source(ty, ValueDef::Input(number)))
                }
                (None, None) => Named::Failed,
            };
            self.values.insert(name, named);
        }
    }
}

/// Whether the node is ONNX's `If`, which this file handles itself because its bodies read names of the graph around.
fn is_branch(node: &Node) -> bool {
    node.domain.is_empty() && node.op_type == "If"
}

/// All nodes that cannot be imported whatever their operands are, bodies included.
pub(crate) fn refused(graph: &flat::Graph) -> Vec<UnsupportedNode> {
    let mut refused = Vec::new();
    let mut graphs = vec![graph];
    while let Some(graph) = graphs.pop() {
        for node in &graph.nodes {
            graphs.extend(node.attributes.values().flat_map(Attribute::graphs));
            if let Some(hint) = refusal(node) {
                refused.push(UnsupportedNode {
                    name: node.name.clone(),
                    op: node.op_type.clone(),
                    domain: node.domain.clone(),
                    opset: node.opset,
                    hint,
                });
            }
        }
    }
    refused
}

/// Why a node cannot be imported, whatever its operands are: its operator, and what ONNX says of that operator.
fn refusal(node: &Node) -> Option<String> {
    if let Some(constant) = attribute::constant(node) {
        return constant.err();
    }
    let missing = operators::find(&node.domain, &node.op_type, node.opset).err().filter(|_| !is_branch(node));
    let findings: Vec<String> = missing.into_iter().chain(schema::check::form(node)).collect();
    (!findings.is_empty()).then(|| findings.join("; "))
}

#[cfg(test)]
mod tests {
    use planfile::Source;

    use super::*;
    use crate::flat::ValueInfo;
    use crate::harness::{Case, assert_close, bools, elem_type, info, node, run, stored, tensor};
    use crate::tensor_data::{ElemType, Tensor, TensorSource};

    /// A model of `nodes` with the input `x0: f32[2]` and the output `y`.
    fn case(nodes: Vec<Node>) -> Case {
        let mut case = Case::new("Identity", 20).input(tensor(&[2], &[1f32, -2.0]));
        case.graph.nodes = nodes;
        case.graph.outputs = vec![output("y")];
        case
    }

    fn output(name: &str) -> ValueInfo {
        info(name, ElemType::UNDEFINED, None)
    }

    #[test]
    fn all_unsupported_nodes_are_listed_at_once() {
        let nodes = vec![node("Fancy", 20, &["x0"], &["a"]), node("Fancier", 20, &["a"], &["y"])];
        let text = case(nodes).error();
        assert!(text.contains("`/Fancy`: Fancy (opset 20)") && text.contains("`/Fancier`"), "{text}");
        let old = case(vec![node("Gelu", 19, &["x0"], &["y"])]).error();
        assert!(old.contains("from opset 20 on"), "{old}");
    }

    #[test]
    fn unsupported_forms_are_listed_too_and_what_follows_is_skipped() {
        let cast = |name: &str, input: &str, output: &str| {
            let mut node = node("Cast", 20, &[input], &[output]);
            node.name = name.to_owned();
            node.attributes.insert("to".to_owned(), Attribute::Int(8));
            node
        };
        let nodes = vec![
            cast("first", "x0", "a"),
            node("Add", 20, &["a", "x0"], &["b"]),
            cast("second", "x0", "c"),
            node("Add", 20, &["b", "c"], &["y"]),
        ];
        let OnnxError::Unsupported(found) = case(nodes).import().unwrap_err() else { panic!("another error") };
        let names: Vec<&str> = found.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["first", "second"]);
    }

    #[test]
    fn contradicting_shapes_name_the_node() {
        let mut case = case(vec![node("Add", 20, &["x0", "w"], &["y"])]);
        case.graph.initializers.push(Initializer { name: "w".to_owned(), tensor: stored(&tensor(&[3], &[0f32; 3])) });
        let text = case.error();
        assert!(text.contains("node `/Add` (Add)") && text.contains("f32[2] and f32[3]"), "{text}");
    }

    #[test]
    fn undefined_names_are_reported() {
        let text = case(vec![node("Add", 20, &["x0", "w"], &["y"])]).error();
        assert!(text.contains("reads `w`, which nothing defines"), "{text}");
        let text = case(vec![node("Neg", 20, &["x0"], &["z"])]).error();
        assert!(text.contains("output `y`, which nothing defines"), "{text}");
    }

    #[test]
    fn an_input_or_a_weight_may_be_an_output() {
        let mut case = case(vec![]);
        case.graph.outputs = vec![output("x0"), output("w")];
        case.graph.initializers.push(Initializer { name: "w".to_owned(), tensor: stored(&tensor(&[1], &[7f32])) });
        let module = case.import().unwrap();
        let names: Vec<&str> = module.entries[0].outputs.iter().map(|port| port.name.as_str()).collect();
        assert_eq!(names, ["x0", "w"]);
        assert_eq!(case.run(), [tensor(&[2], &[1f32, -2.0]), tensor(&[1], &[7f32])]);
    }

    #[test]
    fn weights_are_added_once_and_only_when_read() {
        let nodes = vec![node("Add", 20, &["x0", "w"], &["a"]), node("Mul", 20, &["a", "w"], &["y"])];
        let mut case = case(nodes);
        for name in ["unread", "w"] {
            let tensor = stored(&tensor(&[2], &[1f32, 2.0]));
            case.graph.initializers.push(Initializer { name: name.to_owned(), tensor });
        }
        let module = case.import().unwrap();
        assert_eq!(module.weights.iter().map(|weight| weight.name.as_str()).collect::<Vec<_>>(), ["w"]);
        assert_close(&case.one(), &[2], &[2.0, 0.0]);
    }

    #[test]
    fn made_up_names_avoid_those_of_the_model() {
        let mut case = case(vec![node("Shape", 20, &["x0"], &["s"]), node("Add", 20, &["s", "const_0"], &["y"])]);
        let tensor = stored(&tensor(&[1], &[1i64]));
        case.graph.initializers.push(Initializer { name: "const_0".to_owned(), tensor });
        let module = case.import().unwrap();
        assert_eq!(
            module.weights.iter().map(|weight| weight.name.as_str()).collect::<Vec<_>>(),
            ["const_1", "const_0"]
        );
    }

    #[test]
    fn absent_weights_become_seeded_noise_on_request() {
        let file = TensorSource::FileRange { file: crate::source_files::FileIndex(0), offset: 0, length: 8 };
        let weight = Tensor { dtype: DType::F32, dims: vec![2], source: file };
        let source = |absent, random_weights, name| {
            let mut builder = Builder { absent: vec![absent], random_weights, ..Builder::default() };
            builder.initializer(name, &weight);
            builder.module.weights[0].recipe.inputs[0].source.clone()
        };
        assert_eq!(source(false, Some(1), "w"), Source::File { file: 0, offset: 0 });
        assert_eq!(source(true, None, "w"), Source::File { file: 0, offset: 0 });
        let noise = source(true, Some(1), "w");
        assert!(matches!(noise, Source::Random { .. }));
        assert_ne!(noise, source(true, Some(2), "w"));
        assert_ne!(noise, source(true, Some(1), "v"));
    }

    #[test]
    fn a_known_condition_takes_its_branch() {
        let body = |op: &str| {
            let mut graph = flat::Graph { outputs: vec![output(op)], ..flat::Graph::default() };
            graph.nodes.push(node(op, 20, &["x0"], &[op]));
            Attribute::Graph(Box::new(graph))
        };
        let branch = |condition: &str| {
            let mut node = node("If", 20, &[condition], &["y"]);
            node.attributes.insert("then_branch".to_owned(), body("Neg"));
            node.attributes.insert("else_branch".to_owned(), body("Abs"));
            let mut case = case(vec![node]);
            for (name, value) in [("yes", true), ("no", false)] {
                let tensor = stored(&bools(&[], &[value]));
                case.graph.initializers.push(Initializer { name: name.to_owned(), tensor });
            }
            let given = bools(&[], &[true]);
            case.graph.inputs.push(info("given", elem_type(&given), Some(vec![])));
            case
        };
        for (condition, expected) in [("yes", [-1.0, 2.0]), ("no", [1.0, 2.0])] {
            let data = [tensor(&[2], &[1f32, -2.0]), bools(&[], &[true])];
            assert_close(&run(&branch(condition).import().unwrap(), &data)[0], &[2], &expected);
        }
        let text = branch("given").error();
        assert!(text.contains("(If)") && text.contains("input `given`") && text.contains("--like"), "{text}");
    }

    #[test]
    fn inputs_whose_samples_decide_shapes_or_branches_are_frozen() {
        let mut case = case(vec![
            node("Neg", 20, &["n"], &["minus"]),
            node("Neg", 20, &["minus"], &["again"]),
            node("Expand", 20, &["x0", "again"], &["a"]),
            node("Expand", 20, &["a", "again"], &["y"]),
        ]);
        case.graph.nodes[3].name = "/Expand_1".to_owned();
        for (name, value) in [("n", 2i64), ("unused", 1)] {
            let sample = tensor(&[1], &[value]);
            case.graph.inputs.push(info(name, elem_type(&sample), Some(vec![flat::DimSpec::Value(1)])));
            case.bindings.samples.insert(name.to_owned(), sample);
        }
        let module = case.import().unwrap();
        let [frozen] = module.entries[0].frozen.as_slice() else { panic!("one input is frozen") };
        assert_eq!((frozen.input.as_str(), frozen.value.to_i64s()), ("n", Some(vec![2])));
        assert_eq!((frozen.node.as_str(), frozen.nodes), ("/Expand", 2));
    }
}
