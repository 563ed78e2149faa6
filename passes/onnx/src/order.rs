//! Checks that every value of a graph is defined once, and sorts nodes so that each follows what it reads.
//!
//! before  `b = Relu(a)`, `a = Neg(x)`      after  `a = Neg(x)`, `b = Relu(a)`
//!
//! A graph that is in order stays as it is. A body reads values of the graphs around it by name; its own names come first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};

use crate::error::OnnxError;
use crate::flat::{Attribute, Graph, Node};

/// Checks and sorts a model's graph and the bodies in it.
///
/// # Errors
/// When a value is defined twice or not at all, or nodes depend on each other in a cycle.
pub(crate) fn order(graph: &mut Graph) -> Result<(), OnnxError> {
    match order_body(graph)?.pop_first() {
        None => Ok(()),
        Some((value, Some((node, op)))) => Err(OnnxError::UndefinedValue { node, op, value }),
        Some((value, None)) => Err(OnnxError::UndefinedOutput { place: place(graph), value }),
    }
}

/// Values that a body reads and does not define, each with a node (and its operator) that reads it, or `None` where it is
/// an output of the body.
type Captures = BTreeMap<String, Option<(String, String)>>;

fn order_body(graph: &mut Graph) -> Result<Captures, OnnxError> {
    // What each node reads: its own inputs, and what its bodies capture.
    let mut reads: Vec<Captures> = Vec::with_capacity(graph.nodes.len());
    for node in &mut graph.nodes {
        let mut node_reads = Captures::new();
        for attribute in node.attributes.values_mut() {
            let bodies = match attribute {
                Attribute::Graph(body) => std::slice::from_mut(&mut **body),
                Attribute::Graphs(bodies) => bodies.as_mut_slice(),
                Attribute::Int(_)
                | Attribute::Float(_)
                | Attribute::String(_)
                | Attribute::Ints(_)
                | Attribute::Floats(_)
                | Attribute::Strings(_)
                | Attribute::Tensor(_)
                | Attribute::Tensors(_)
                | Attribute::Unsupported(_) => continue,
            };
            for body in bodies {
                for (value, reader) in order_body(body)? {
                    node_reads.insert(value, reader.or_else(|| Some((node.name.clone(), node.op_type.clone()))));
                }
            }
        }
        for input in node.inputs.iter().filter(|input| !input.is_empty()) {
            node_reads.insert(input.clone(), Some((node.name.clone(), node.op_type.clone())));
        }
        reads.push(node_reads);
    }
    let defined = definitions(graph)?;
    let mut captures = Captures::new();
    // Nodes whose results each node reads.
    let mut sources: Vec<Vec<usize>> = Vec::with_capacity(reads.len());
    for node_reads in reads {
        let mut node_sources = Vec::new();
        for (value, reader) in node_reads {
            match defined.get(value.as_str()) {
                Some(Definition::Node(source)) => node_sources.push(*source),
                Some(Definition::Input | Definition::Initializer) => {}
                None => {
                    captures.entry(value).or_insert(reader);
                }
            }
        }
        sources.push(node_sources);
    }
    for output in &graph.outputs {
        if !defined.contains_key(output.name.as_str()) {
            captures.entry(output.name.clone()).or_insert(None);
        }
    }
    let sorted = sort(&sources, &graph.nodes)?;
    let mut nodes: Vec<Option<Node>> = std::mem::take(&mut graph.nodes).into_iter().map(Some).collect();
    graph.nodes = sorted.into_iter().filter_map(|index| nodes[index].take()).collect();
    Ok(captures)
}

#[derive(Clone, Copy)]
enum Definition {
    Input,
    Initializer,
    Node(usize),
}

fn definitions(graph: &Graph) -> Result<HashMap<String, Definition>, OnnxError> {
    let describe = |definition: Definition| match definition {
        Definition::Input => String::from("a graph input"),
        Definition::Initializer => String::from("an initializer or constant"),
        Definition::Node(index) => format!("an output of node `{}`", graph.nodes[index].name),
    };
    let inputs = graph.inputs.iter().map(|input| (&input.name, Definition::Input));
    let initializers = graph.initializers.iter().map(|initializer| (&initializer.name, Definition::Initializer));
    let nodes = graph.nodes.iter().enumerate();
    let outputs =
        nodes.flat_map(|(index, node)| node.outputs.iter().map(move |output| (output, Definition::Node(index))));
    let mut defined = HashMap::new();
    for (name, definition) in inputs.chain(initializers).chain(outputs.filter(|(name, _)| !name.is_empty())) {
        if let Some(first) = defined.insert(name.clone(), definition) {
            return Err(OnnxError::DuplicateName {
                place: place(graph),
                name: name.clone(),
                first: describe(first),
                second: describe(definition),
            });
        }
    }
    Ok(defined)
}

fn place(graph: &Graph) -> String {
    format!("graph `{}`", graph.name)
}

/// Indices of nodes, each after its sources, otherwise in their order.
fn sort(sources: &[Vec<usize>], nodes: &[Node]) -> Result<Vec<usize>, OnnxError> {
    let mut waiting: Vec<usize> = sources.iter().map(Vec::len).collect();
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); sources.len()];
    for (reader, node_sources) in sources.iter().enumerate() {
        for &source in node_sources {
            readers[source].push(reader);
        }
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        waiting.iter().enumerate().filter(|(_, count)| **count == 0).map(|(index, _)| Reverse(index)).collect();
    let mut sorted = Vec::with_capacity(sources.len());
    while let Some(Reverse(index)) = ready.pop() {
        sorted.push(index);
        for &reader in &readers[index] {
            waiting[reader] -= 1;
            if waiting[reader] == 0 {
                ready.push(Reverse(reader));
            }
        }
    }
    match waiting.iter().position(|&count| count > 0) {
        None => Ok(sorted),
        Some(start) => Err(cycle(start, sources, &waiting, nodes)),
    }
}

/// A node still waits only for nodes that wait too, so going from source to source ends in a cycle.
fn cycle(start: usize, sources: &[Vec<usize>], waiting: &[usize], nodes: &[Node]) -> OnnxError {
    let mut path = Vec::new();
    let mut seen_at = vec![None; sources.len()];
    let mut next = Some(start);
    while let Some(index) = next {
        if let Some(first) = seen_at[index] {
            path.drain(..first);
            break;
        }
        seen_at[index] = Some(path.len());
        path.push(index);
        next = sources[index].iter().copied().find(|&source| waiting[source] > 0);
    }
    // In the direction that values flow.
    OnnxError::Cycle { nodes: path.into_iter().rev().map(|index| nodes[index].name.clone()).collect() }
}

#[cfg(test)]
mod tests {
    use crate::error::OnnxError;
    use crate::messages::GraphProto;
    use crate::samples::{body, graph, model, named, node, reload, tensor, value, with};

    fn node_names(graph: GraphProto) -> Result<Vec<String>, OnnxError> {
        Ok(reload(&model(graph))?.graph.nodes.into_iter().map(|node| node.name).collect())
    }

    #[test]
    fn sorts_stably() {
        let nodes = vec![
            named("last", node("Add", &["b", "c"], &["y"])),
            named("c", node("Neg", &["x"], &["c"])),
            named("b", node("Relu", &["a"], &["b"])),
            named("a", node("Neg", &["x"], &["a"])),
        ];
        assert_eq!(node_names(graph(nodes)).unwrap(), ["c", "a", "b", "last"]);
    }

    #[test]
    fn a_body_waits_for_what_it_captures() {
        let inner = GraphProto { input: vec![], ..graph(vec![node("Relu", &["late"], &["y"])]) };
        let nodes = vec![
            named("if", with(node("If", &["x"], &["y"]), body("then_branch", inner))),
            named("late", node("Neg", &["x"], &["late"])),
        ];
        assert_eq!(node_names(graph(nodes)).unwrap(), ["late", "if"]);
    }

    #[test]
    fn names_the_nodes_of_a_cycle() {
        let nodes = vec![
            named("after", node("Relu", &["b"], &["y"])),
            named("one", node("Add", &["x", "b"], &["a"])),
            named("two", node("Neg", &["a"], &["b"])),
        ];
        match node_names(graph(nodes)).unwrap_err() {
            OnnxError::Cycle { nodes } => assert_eq!(nodes, ["one", "two"]),
            other => panic!("{other:?}"),
        }
        let own = graph(vec![named("self", node("Add", &["x", "y"], &["y"]))]);
        assert!(matches!(node_names(own).unwrap_err(), OnnxError::Cycle { nodes } if nodes == ["self"]));
    }

    #[test]
    fn undefined_values_are_named_with_their_reader() {
        let error = node_names(graph(vec![named("reader", node("Neg", &["ghost"], &["y"]))])).unwrap_err();
        assert!(error.to_string().starts_with("node `reader` (Neg) reads `ghost`"), "{error}");
        let inner = GraphProto { input: vec![], ..graph(vec![named("inner", node("Neg", &["ghost"], &["y"]))]) };
        let error = node_names(graph(vec![with(node("If", &["x"], &["y"]), body("else_branch", inner))])).unwrap_err();
        assert!(error.to_string().starts_with("node `inner` (Neg) reads `ghost`"), "{error}");
        let error = node_names(graph(vec![node("Neg", &["x"], &["z"])])).unwrap_err();
        assert!(matches!(error, OnnxError::UndefinedOutput { value, .. } if value == "y"));
    }

    #[test]
    fn a_name_is_defined_once() {
        let twice = graph(vec![named("a", node("Neg", &["x"], &["y"])), named("b", node("Relu", &["x"], &["y"]))]);
        let input = graph(vec![named("a", node("Neg", &["x"], &["x"])), node("Neg", &["x"], &["y"])]);
        let mut initializers = graph(vec![node("Neg", &["x"], &["y"])]);
        initializers.initializer = vec![tensor("w", &[1], &[1.0]), tensor("w", &[1], &[2.0])];
        let mut inputs = graph(vec![node("Neg", &["x"], &["y"])]);
        inputs.input.push(value("x", &[]));
        for (graph, name, second) in [
            (twice, "`y`", "an output of node `b`"),
            (input, "`x`", "an output of node `a`"),
            (initializers, "`w`", "an initializer or constant"),
            (inputs, "`x`", "a graph input"),
        ] {
            let error = node_names(graph).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(second), "{error}");
        }
    }
}
