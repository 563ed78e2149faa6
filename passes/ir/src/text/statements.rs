//! The statements of a graph: declarations, nodes, `return`.

use std::collections::BTreeMap;
use std::sync::Arc;

use planfile::TensorType;

use super::cursor::{Cursor, Mark, integer};
use super::lexer::{Kind, origin_names};
use super::op::{self, Signature};
use super::recipe::{self, is_recipe};
use super::types::{read_shard, read_type};
use crate::error::IrError;
use crate::ids::{NodeId, StateId, ValueId, WeightId};
use crate::module::{Graph, Module, Node, Output, Shard, Value, ValueDef, Weight};

/// What stands before `=`, or alone for an input.
pub(super) struct Declaration<'a> {
    mark: Mark,
    name: &'a str,
    ty: Option<TensorType>,
    shard: Option<Shard>,
    /// Of an input that is not the next one.
    input: Option<u32>,
}

fn declared<'a>(cursor: &mut Cursor<'a>, module: &Module) -> Result<Declaration<'a>, IrError> {
    let mark = cursor.mark();
    let name = cursor.value()?;
    let (mut ty, mut shard) = (None, None);
    if cursor.accept(":") {
        ty = Some(read_type(cursor)?);
        shard = read_shard(cursor, &module.mesh)?;
    }
    Ok(Declaration { mark, name, ty, shard, input: None })
}

/// An input in a graph's header.
pub(super) fn read_declaration<'a>(cursor: &mut Cursor<'a>, module: &Module) -> Result<Declaration<'a>, IrError> {
    let mut declaration = declared(cursor, module)?;
    if cursor.accept("=") {
        cursor.keyword("input")?;
        declaration.input = Some(cursor.integer("input number")?);
    }
    Ok(declaration)
}

/// Values in order of definition, until all are known and get their ids.
struct Values<'a> {
    names: BTreeMap<&'a str, usize>,
    values: Vec<(&'a str, Mark, Value)>,
    inputs: u32,
}

impl<'a> Values<'a> {
    fn define(
        &mut self,
        cursor: &Cursor<'_>,
        declaration: Declaration<'a>,
        def: ValueDef,
        inferred: Option<TensorType>,
    ) -> Result<ValueId, IrError> {
        let Declaration { mark, name, ty, shard, .. } = declaration;
        let ty = ty.or(inferred).ok_or_else(|| cursor.error_at(mark, format!("`%{name}` needs a type")))?;
        let index = self.values.len();
        if self.names.insert(name, index).is_some() {
            return Err(cursor.error_at(mark, format!("`%{name}` is defined twice")));
        }
        self.values.push((name, mark, Value { ty, def, shard }));
        Ok(ValueId(index as u32))
    }

    fn input(&mut self, cursor: &Cursor<'_>, declaration: Declaration<'a>) -> Result<(), IrError> {
        let number = declaration.input.unwrap_or(self.inputs);
        self.inputs += 1;
        self.define(cursor, declaration, ValueDef::Input(number), None).map(|_| ())
    }

    fn read(&self, cursor: &mut Cursor<'a>) -> Result<ValueId, IrError> {
        let mark = cursor.mark();
        let name = cursor.value()?;
        let index = self.names.get(name);
        let index = index.ok_or_else(|| cursor.error_at(mark, format!("`%{name}` is not defined yet")))?;
        Ok(ValueId(*index as u32))
    }

    /// The id of each value: the number it is named by, or the next one that is free.
    fn ids(&self, cursor: &Cursor<'_>) -> Result<Vec<ValueId>, IrError> {
        let count = self.values.len();
        let number = |name: &str| {
            let number: usize = integer(name)?;
            (number.to_string() == name).then_some(number)
        };
        let mut taken = vec![false; count];
        for (name, mark, _) in &self.values {
            if let Some(number) = number(name) {
                let free = taken.get_mut(number);
                *free.ok_or_else(|| cursor.error_at(*mark, format!("`%{name}` is beyond the {count} values")))? = true;
            }
        }
        let mut free = (0..count).filter(|&id| !taken[id]);
        let ids = self.values.iter().map(|(name, ..)| number(name).or_else(|| free.next()).unwrap_or_default());
        Ok(ids.map(|id| ValueId(id as u32)).collect())
    }
}

/// Reads statements into the graph up to what cannot begin one. Returns the name of each value.
pub(super) fn read_statements<'a>(
    cursor: &mut Cursor<'a>,
    module: &mut Module,
    graph: &mut Graph,
    inputs: Vec<Declaration<'a>>,
) -> Result<Vec<String>, IrError> {
    let mut values = Values { names: BTreeMap::new(), values: Vec::new(), inputs: 0 };
    for declaration in inputs {
        values.input(cursor, declaration)?;
    }
    loop {
        match *cursor.peek() {
            Kind::Value(_) => statement(cursor, module, graph, &mut values)?,
            Kind::Word("return") => {
                cursor.next();
                outputs(cursor, graph, &values)?;
                break;
            }
            Kind::Word(_) => node(cursor, graph, &mut values, Vec::new())?,
            _ => break,
        }
    }
    let ids = values.ids(cursor)?;
    let renumber = |id: &mut ValueId| *id = ids[id.index()];
    for node in &mut graph.nodes {
        node.operands.iter_mut().chain(&mut node.results).for_each(renumber);
    }
    graph.outputs.iter_mut().for_each(|output| renumber(&mut output.value));
    let mut ordered: Vec<_> = ids.iter().zip(values.values).collect();
    ordered.sort_by_key(|(id, _)| **id);
    let (names, values) = ordered.into_iter().map(|(_, (name, _, value))| (name.to_owned(), value)).unzip();
    graph.values = values;
    Ok(names)
}

fn outputs<'a>(cursor: &mut Cursor<'a>, graph: &mut Graph, values: &Values<'a>) -> Result<(), IrError> {
    while matches!(cursor.peek(), Kind::Value(_) | Kind::Number(_)) {
        let mut position = graph.outputs.len() as u32;
        if matches!(cursor.peek(), Kind::Number(_)) {
            position = cursor.integer("output number")?;
            cursor.sign(":")?;
        }
        graph.outputs.push(Output { position, value: values.read(cursor)? });
        if !cursor.accept(",") {
            break;
        }
    }
    Ok(())
}

/// A statement that starts with the values it defines.
fn statement<'a>(
    cursor: &mut Cursor<'a>,
    module: &mut Module,
    graph: &mut Graph,
    values: &mut Values<'a>,
) -> Result<(), IrError> {
    let mut results = vec![declared(cursor, module)?];
    while cursor.accept(",") {
        results.push(declared(cursor, module)?);
    }
    let source = !cursor.is_sign("=") || matches!(cursor.peek_after(1), Kind::Word("input" | "weight" | "state"));
    if !source {
        cursor.next();
        return node(cursor, graph, values, results);
    }
    let one = if results.len() == 1 { results.pop() } else { None };
    let Some(mut declaration) = one else { return Err(cursor.expected("`=` and an operation")) };
    if !cursor.accept("=") {
        if declaration.ty.is_none() {
            return Err(cursor.expected("`:` and a type, or `=`"));
        }
        return values.input(cursor, declaration);
    }
    match cursor.word("a source")? {
        "weight" => {
            let weight = weight(cursor, module, &declaration)?;
            let whole = module.weights[weight.index()].ty.clone();
            values.define(cursor, declaration, ValueDef::Weight(weight), Some(whole))?;
        }
        "state" => {
            let index = numbered(cursor, 's', module.states.iter().map(|state| state.name.as_str()))?;
            let whole = module.states[index as usize].ty.clone();
            values.define(cursor, declaration, ValueDef::State(StateId(index)), Some(whole))?;
        }
        _ => {
            declaration.input = Some(cursor.integer("input number")?);
            values.input(cursor, declaration)?;
        }
    }
    Ok(())
}

/// A word such as `w3` below the names' count, and the name if it is written.
fn numbered<'n>(cursor: &mut Cursor<'_>, prefix: char, names: impl Iterator<Item = &'n str>) -> Result<u32, IrError> {
    let mark = cursor.mark();
    let names: Vec<&str> = names.collect();
    let word = cursor.word(&format!("`{prefix}` and a number"))?;
    let index = word.strip_prefix(prefix).and_then(integer::<u32>);
    let known = index.and_then(|index| Some((index, *names.get(index as usize)?)));
    let (index, known) =
        known.ok_or_else(|| cursor.error_at(mark, format!("`{word}` is not among {}", names.len())))?;
    if matches!(cursor.peek(), Kind::Text(_)) {
        let mark = cursor.mark();
        if cursor.string("a name")? != known {
            return Err(cursor.error_at(mark, format!("`{word}` is named `{}`", known.escape_debug())));
        }
    }
    Ok(index)
}

/// A weight of the module, or a recipe for one that is added under the value's name.
fn weight(cursor: &mut Cursor<'_>, module: &mut Module, declaration: &Declaration<'_>) -> Result<WeightId, IrError> {
    if !is_recipe(cursor) {
        return numbered(cursor, 'w', module.weights.iter().map(|weight| weight.name.as_str())).map(WeightId);
    }
    let Declaration { mark, name, ty, shard, .. } = declaration;
    let (Some(ty), None) = (ty, shard) else {
        return Err(cursor.error_at(*mark, "a weight's recipe needs the type of the whole tensor"));
    };
    let recipe = recipe::read(cursor, ty)?;
    module.weights.push(Weight { name: (*name).to_owned(), ty: ty.clone(), recipe });
    Ok(WeightId(module.weights.len() as u32 - 1))
}

fn node<'a>(
    cursor: &mut Cursor<'a>,
    graph: &mut Graph,
    values: &mut Values<'a>,
    declarations: Vec<Declaration<'a>>,
) -> Result<(), IrError> {
    let mark = cursor.mark();
    let name = cursor.word("an operation")?;
    let mut operands = Vec::new();
    while matches!(cursor.peek(), Kind::Value(_)) {
        operands.push(values.read(cursor)?);
        if !cursor.accept(",") {
            break;
        }
    }
    let types: Vec<&TensorType> = operands.iter().map(|operand| &values.values[operand.index()].2.ty).collect();
    let written: Vec<Option<&TensorType>> = declarations.iter().map(|declaration| declaration.ty.as_ref()).collect();
    let signature = Signature { operands: types.clone(), result: written.first().copied().flatten() };
    let op = op::read(cursor, name, mark, &signature)?;
    let inferred = op::check(&op, &types, &written).map_err(|why| cursor.error_at(mark, why))?;
    let mut origin: Vec<Arc<str>> = Vec::new();
    if let Some(comment) = cursor.trailing_comment().filter(|comment| !comment.is_empty()) {
        let names = origin_names(comment);
        let names = names.ok_or_else(|| cursor.error_at(mark, "an origin is names joined by ` + `"))?;
        origin = names.into_iter().map(Arc::from).collect();
    }
    let id = NodeId(graph.nodes.len() as u32);
    let mut results = Vec::new();
    for (position, (declaration, ty)) in (0..).zip(declarations.into_iter().zip(inferred)) {
        results.push(values.define(cursor, declaration, ValueDef::Node(id, position), Some(ty))?);
    }
    graph.nodes.push(Node { op, operands, results, origin: origin.into() });
    Ok(())
}
