//! From text to modules.

use planfile::{FrozenInput, SourceFile, Tensor};

use super::cursor::{Cursor, Mark, integer};
use super::lexer::Kind;
use super::print::whole_type;
use super::recipe;
use super::scalar::read_data;
use super::statements::read_statements;
use super::types::{read_mesh, read_type};
use crate::error::IrError;
use crate::ids::GraphId;
use crate::module::{Entry, Graph, Module, Port, State, ValueDef, Weight};

/// Ranks that a graph can name.
const MAX_RANKS: u32 = 1 << 16;

/// The module that the text describes.
///
/// Types of nodes are checked, or inferred where they are not written; [`crate::verify::verify`] checks the rest.
///
/// # Errors
/// [`IrError::Parse`] with line and column of the first thing that is wrong.
pub fn parse(text: &str) -> Result<Module, IrError> {
    let mut cursor = Cursor::new(text)?;
    let mut module = Module::default();
    let mut stages = Vec::new();
    if cursor.accept_word("module") {
        module.name = cursor.string("the module's name in quotes")?;
    }
    while *cursor.peek() != Kind::End {
        let mark = cursor.mark();
        match cursor.word("`mesh`, `file`, `weight`, `state`, `entry` or `graph`")? {
            "mesh" => module.mesh = read_mesh(&mut cursor)?,
            "file" => file(&mut cursor, &mut module)?,
            "weight" => weight(&mut cursor, &mut module)?,
            "state" => state(&mut cursor, &mut module)?,
            "entry" => stages.push(entry(&mut cursor, &mut module)?),
            "graph" => graph(&mut cursor, &mut module)?,
            word => return Err(cursor.error_at(mark, format!("`{word}` begins no part of a module"))),
        }
    }
    for (entry, stages) in module.entries.iter_mut().zip(stages) {
        for (mark, name) in stages {
            let found = match name {
                Stage::Name(name) => module.graphs.iter().position(|graph| graph.name == name),
                Stage::Number(number) => Some(number),
            };
            let found = found.and_then(|index| u32::try_from(index).ok());
            let found = found.filter(|&index| (index as usize) < module.graphs.len());
            entry.stages.push(GraphId(found.ok_or_else(|| cursor.error_at(mark, "there is no such graph"))?));
        }
    }
    Ok(module)
}

/// The lines of one graph, without a module around them: what tests of passes are written in.
///
/// Inputs are declared by their types alone, weights may carry their recipe; `mesh` may come first, whose
/// ranks run the graph then.
///
/// ```
/// let module = ir::text::parse_lines("
///     %a: f32[2, 3]
///     %w: f32[2] = weight [0.5, 2]
///     %t = transpose %a [1, 0]    # /Transpose
///     %y = pointwise %t, %w {$0 * $1}
///     return %y
/// ").unwrap();
/// assert_eq!(module.entries[0].outputs[0].ty.to_string(), "f32[3, 2]");
/// ```
///
/// The entry `main` takes and yields the values by their names.
///
/// # Errors
/// As [`parse`].
pub fn parse_lines(text: &str) -> Result<Module, IrError> {
    let mut cursor = Cursor::new(text)?;
    let mut module = Module { name: "lines".to_owned(), ..Module::default() };
    if cursor.accept_word("mesh") {
        module.mesh = read_mesh(&mut cursor)?;
    }
    let ranks = module.mesh.ranks();
    let ranks = if ranks > 1 { (0..ranks).collect() } else { Vec::new() };
    let mut graph = Graph { ranks, ..Graph::new("main") };
    let names = read_statements(&mut cursor, &mut module, &mut graph, Vec::new())?;
    if *cursor.peek() != Kind::End {
        return Err(cursor.expected("a statement"));
    }
    let mut entry = Entry {
        name: "main".to_owned(),
        inputs: Vec::new(),
        outputs: Vec::new(),
        frozen: Vec::new(),
        stages: vec![GraphId(0)],
    };
    for (index, value) in graph.values.iter().enumerate() {
        if let ValueDef::Input(_) = value.def {
            entry.inputs.push(Port { name: names[index].clone(), ty: whole_type(value) });
        }
    }
    for (position, output) in graph.outputs.iter().enumerate() {
        let (name, ty) = (&names[output.value.index()], whole_type(graph.value(output.value)));
        let taken = entry.outputs.iter().any(|port| port.name == *name);
        let name = if taken { format!("{name}.{position}") } else { name.clone() };
        entry.outputs.push(Port { name, ty });
    }
    module.graphs.push(graph);
    module.entries.push(entry);
    Ok(module)
}

/// A word such as `w3` that must have the number that is next in its table.
fn numbered(cursor: &mut Cursor<'_>, prefix: char, next: usize) -> Result<(), IrError> {
    let expected = format!("{prefix}{next}");
    if cursor.accept_word(&expected) { Ok(()) } else { Err(cursor.expected(&format!("`{expected}`"))) }
}

fn file(cursor: &mut Cursor<'_>, module: &mut Module) -> Result<(), IrError> {
    let mark = cursor.mark();
    if cursor.integer::<usize>("file number")? != module.files.len() {
        return Err(cursor.error_at(mark, format!("expected file {}", module.files.len())));
    }
    let name = cursor.string("the file's name in quotes")?;
    let bytes = cursor.integer("length")?;
    cursor.keyword("bytes")?;
    module.files.push(SourceFile { name, bytes });
    Ok(())
}

fn weight(cursor: &mut Cursor<'_>, module: &mut Module) -> Result<(), IrError> {
    numbered(cursor, 'w', module.weights.len())?;
    let name = cursor.string("the weight's name in quotes")?;
    cursor.sign(":")?;
    let ty = read_type(cursor)?;
    cursor.sign("=")?;
    let recipe = recipe::read(cursor, &ty)?;
    module.weights.push(Weight { name, ty, recipe });
    Ok(())
}

fn state(cursor: &mut Cursor<'_>, module: &mut Module) -> Result<(), IrError> {
    numbered(cursor, 's', module.states.len())?;
    let name = cursor.string("the state's name in quotes")?;
    cursor.sign(":")?;
    let ty = read_type(cursor)?;
    cursor.keyword("extent")?;
    let extent = planfile::ExtentId(cursor.integer("extent number")?);
    module.states.push(State { name, ty, extent });
    Ok(())
}

enum Stage {
    Name(String),
    Number(usize),
}

/// Stages are returned: graphs come later in the text.
fn entry(cursor: &mut Cursor<'_>, module: &mut Module) -> Result<Vec<(Mark, Stage)>, IrError> {
    let name = cursor.string("the entry's name in quotes")?;
    let port = |cursor: &mut Cursor<'_>| {
        let name = cursor.name("a name")?;
        cursor.sign(":")?;
        Ok(Port { name, ty: read_type(cursor)? })
    };
    let inputs = cursor.list("(", ")", port)?;
    cursor.sign("->")?;
    let outputs = cursor.list("(", ")", port)?;
    let mut stages = Vec::new();
    if cursor.accept("=") {
        loop {
            let mark = cursor.mark();
            cursor.sign("@")?;
            let stage = match *cursor.peek() {
                Kind::Number(text) => {
                    cursor.next();
                    Stage::Number(integer(text).unwrap_or(usize::MAX))
                }
                _ => Stage::Name(cursor.name("a graph's name")?),
            };
            stages.push((mark, stage));
            if !cursor.accept(",") {
                break;
            }
        }
    }
    let mut frozen = Vec::new();
    if cursor.accept_word("frozen") {
        frozen = cursor.list("(", ")", frozen_input)?;
    }
    module.entries.push(Entry { name, inputs, outputs, frozen, stages: Vec::new() });
    Ok(stages)
}

/// `n: i64[2] = [2, 3] for "/Reshape"`, with `and 2` where two more nodes need the value.
fn frozen_input(cursor: &mut Cursor<'_>) -> Result<FrozenInput, IrError> {
    let input = cursor.name("an input")?;
    cursor.sign(":")?;
    let ty = read_type(cursor)?;
    cursor.sign("=")?;
    let data = read_data(cursor, ty.dtype)?;
    cursor.keyword("for")?;
    let node = cursor.string("a node of the model")?;
    let mut nodes = 1;
    if cursor.accept_word("and") {
        let mark = cursor.mark();
        let more: Option<u32> = cursor.number()?.parse().ok();
        nodes = more.and_then(|more| more.checked_add(1)).ok_or_else(|| cursor.error_at(mark, "expected a count"))?;
    }
    Ok(FrozenInput { input, value: Tensor { ty, data }, node, nodes })
}

fn graph(cursor: &mut Cursor<'_>, module: &mut Module) -> Result<(), IrError> {
    cursor.sign("@")?;
    let mut graph = Graph::new(&cursor.name("the graph's name")?);
    if cursor.accept_word("ranks") {
        graph.ranks = ranks(cursor)?;
    }
    let inputs = if cursor.is_sign("(") {
        cursor.list("(", ")", |cursor| super::statements::read_declaration(cursor, module))?
    } else {
        Vec::new()
    };
    cursor.sign("{")?;
    read_statements(cursor, module, &mut graph, inputs)?;
    cursor.sign("}")?;
    module.graphs.push(graph);
    Ok(())
}

/// `0..8` or `[0, 2, 4]`.
fn ranks(cursor: &mut Cursor<'_>) -> Result<Vec<u32>, IrError> {
    if cursor.is_sign("[") {
        return cursor.list("[", "]", |cursor| cursor.integer("rank"));
    }
    let mark = cursor.mark();
    let first: u32 = cursor.integer("rank")?;
    cursor.sign("..")?;
    let end: u32 = cursor.integer("rank")?;
    match end.checked_sub(first) {
        Some(count) if count <= MAX_RANKS => Ok((first..end).collect()),
        _ => Err(cursor.error_at(mark, format!("ranks are a rising range of at most {MAX_RANKS}"))),
    }
}
