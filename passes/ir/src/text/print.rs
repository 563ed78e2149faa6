//! From modules to text.

use std::fmt::Write as _;

use planfile::{FrozenInput, TensorType};

use super::lexer::{name, origin_comment, quote};
use super::{op, recipe, scalar, types};
use crate::ids::ValueId;
use crate::module::{Entry, Graph, Module, Node, Port, Value, ValueDef};

/// What to leave out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Long constants show their length and a hash instead of their bytes; such text does not parse.
    pub elide_data: bool,
}

/// Column that origins are lined up at.
const ORIGIN_COLUMN: usize = 88;
/// Longest line of a signature before it is broken up.
const WIDTH: usize = 110;

/// All of a module.
pub fn module_text(module: &Module, options: Options) -> String {
    let mut text = format!("module {}\n", quote(&module.name));
    if !module.mesh.axes.is_empty() {
        text.push_str(&types::mesh(&module.mesh));
        text.push('\n');
    }
    for (number, file) in module.files.iter().enumerate() {
        let _ = writeln!(text, "file {number} {} {} bytes", quote(&file.name), file.bytes);
    }
    for (number, weight) in module.weights.iter().enumerate() {
        let source = recipe::print(&weight.recipe, &weight.ty, options.elide_data);
        let _ = writeln!(text, "weight w{number} {}: {} = {source}", quote(&weight.name), weight.ty);
    }
    for (number, state) in module.states.iter().enumerate() {
        let _ = writeln!(text, "state s{number} {}: {} extent {}", quote(&state.name), state.ty, state.extent.0);
    }
    for entry in &module.entries {
        text.push_str(&entry_text(module, entry, options));
    }
    for graph in &module.graphs {
        text.push_str(&graph_text(module, graph));
    }
    text
}

/// Items in parentheses, each on its own line if one line is too short.
fn parenthesised(indent: usize, used: usize, items: &[String]) -> String {
    let line = format!("({})", items.join(", "));
    if items.len() < 2 || used + line.len() <= WIDTH {
        return line;
    }
    let margin = " ".repeat(indent);
    let lines: String = items.iter().map(|item| format!("{margin}  {item},\n")).collect();
    format!("(\n{lines}{margin})")
}

fn entry_text(module: &Module, entry: &Entry, options: Options) -> String {
    let port = |port: &Port| format!("{}: {}", name(&port.name), port.ty);
    let inputs: Vec<String> = entry.inputs.iter().map(port).collect();
    let outputs: Vec<String> = entry.outputs.iter().map(port).collect();
    let mut text = format!("entry {} ", quote(&entry.name));
    text.push_str(&parenthesised(0, text.len() + 20, &inputs));
    text.push_str(" -> ");
    let used = text.lines().last().map_or(0, str::len);
    text.push_str(&parenthesised(0, used, &outputs));
    if !entry.stages.is_empty() {
        let stages: Vec<String> = entry.stages.iter().map(|stage| graph_reference(module, stage.index())).collect();
        let _ = write!(text, " = {}", stages.join(", "));
    }
    text.push('\n');
    if !entry.frozen.is_empty() {
        let frozen = entry.frozen.iter().map(|FrozenInput { input, value, node, nodes }| {
            let data = scalar::data(&value.ty, &value.data, options.elide_data);
            let more = if *nodes > 1 { format!(" and {}", nodes - 1) } else { String::new() };
            format!("{}: {} = {data} for {}{more}", name(input), value.ty, quote(node))
        });
        let _ = writeln!(text, "  frozen {}", parenthesised(2, 9, &frozen.collect::<Vec<_>>()));
    }
    text
}

/// By name; by number where the name does not tell.
fn graph_reference(module: &Module, index: usize) -> String {
    match module.graphs.get(index) {
        Some(graph) if module.graphs.iter().filter(|other| other.name == graph.name).count() == 1 => {
            format!("@{}", name(&graph.name))
        }
        _ => format!("@{index}"),
    }
}

fn ranks(graph: &Graph) -> String {
    match graph.ranks.as_slice() {
        [] => String::new(),
        [first, .., last]
            if graph.ranks.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1])) && *last < u32::MAX =>
        {
            format!("ranks {first}..{} ", last + 1)
        }
        ranks => format!("ranks {ranks:?} "),
    }
}

/// One graph of the module, whose mesh and weights it names.
pub fn graph_text(module: &Module, graph: &Graph) -> String {
    let mut printer = Printer { module, graph, text: String::new(), shown: vec![false; graph.values.len()] };
    printer.header();
    for node in &graph.nodes {
        for &operand in &node.operands {
            printer.source(operand);
        }
        printer.node(node);
    }
    for index in 0..graph.values.len() {
        printer.source(ValueId(index as u32));
    }
    let outputs = graph.outputs.iter().enumerate().map(|(index, output)| match output.position as usize {
        position if position == index => format!(" {}", output.value),
        position => format!(" {position}: {}", output.value),
    });
    let outputs: Vec<String> = outputs.collect();
    let _ = writeln!(printer.text, "  return{}\n}}", outputs.join(","));
    printer.text
}

struct Printer<'m> {
    module: &'m Module,
    graph: &'m Graph,
    text: String,
    /// Weights and states that were shown, by value.
    shown: Vec<bool>,
}

impl Printer<'_> {
    /// `%2: f32[4, 64] of [8, 64] split(0: data)`.
    fn typed(&self, id: ValueId) -> String {
        match self.graph.values.get(id.index()) {
            Some(Value { ty, shard, .. }) => {
                format!("{id}: {ty}{}", types::shard(&self.module.mesh, shard.as_ref()))
            }
            None => id.to_string(),
        }
    }

    fn header(&mut self) {
        let mut inputs = Vec::new();
        for (index, value) in self.graph.values.iter().enumerate() {
            if let ValueDef::Input(number) = value.def {
                let typed = self.typed(ValueId(index as u32));
                let in_order = number as usize == inputs.len();
                inputs.push(if in_order { typed } else { format!("{typed} = input {number}") });
            }
        }
        let start = format!("graph @{} {}", name(&self.graph.name), ranks(self.graph));
        let inputs = parenthesised(0, start.len() + 2, &inputs);
        let start = if start.ends_with(' ') && self.graph.ranks.is_empty() { start.trim_end() } else { &start };
        let _ = writeln!(self.text, "{start}{inputs} {{");
    }

    /// The line of a weight or state, before its first use.
    fn source(&mut self, id: ValueId) {
        let Some(Value { def, .. }) = self.graph.values.get(id.index()) else { return };
        let what = match def {
            ValueDef::Input(_) | ValueDef::Node(..) => return,
            ValueDef::Weight(weight) => {
                let known = self.module.weights.get(weight.index());
                let name = known.map(|known| format!(" {}", quote(&known.name))).unwrap_or_default();
                format!("weight {weight}{name}")
            }
            ValueDef::State(state) => {
                let known = self.module.states.get(state.index());
                let name = known.map(|known| format!(" {}", quote(&known.name))).unwrap_or_default();
                format!("state {state}{name}")
            }
        };
        if !std::mem::replace(&mut self.shown[id.index()], true) {
            let _ = writeln!(self.text, "  {} = {what}", self.typed(id));
        }
    }

    fn node(&mut self, node: &Node) {
        let results: Vec<String> = node.results.iter().map(|&result| self.typed(result)).collect();
        let operands: Vec<String> = node.operands.iter().map(|operand| format!(" {operand}")).collect();
        let equals = if results.is_empty() { "" } else { " = " };
        let (results, operands, attributes) = (results.join(", "), operands.join(","), op::attributes(&node.op));
        let line = format!("  {results}{equals}{}{operands}{attributes}", node.op.name());
        if node.origin.is_empty() {
            self.text.push_str(&line);
        } else {
            let origin = origin_comment(node.origin.iter().map(AsRef::as_ref));
            let _ = write!(self.text, "{line:<ORIGIN_COLUMN$}  # {origin}");
        }
        self.text.push('\n');
    }
}

/// The whole tensor's type of a value: with the sizes it is a shard of, if it is one.
pub(super) fn whole_type(value: &Value) -> TensorType {
    match &value.shard {
        Some(shard) => TensorType::new(value.ty.dtype, &shard.global),
        None => value.ty.clone(),
    }
}
