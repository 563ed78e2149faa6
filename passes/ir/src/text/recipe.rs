//! Recipes of weights: one source as it is, or a block of sources and operations.

use std::fmt::Write as _;

use planfile::{DType, Recipe, RecipeInput, Source, Spec, SpecNode, TensorType, infer};

use super::cursor::Cursor;
use super::lexer::Kind;
use super::op::{self, Signature};
use super::scalar::{data, is_data, read_data};
use super::types::read_type;
use crate::error::IrError;

fn source(input: &RecipeInput, elide: bool) -> String {
    match &input.source {
        Source::File { file, offset } => format!("file {file} at {offset}"),
        Source::Inline(buffer) => data(&input.ty, buffer, elide),
        Source::Random { seed } => format!("random {seed}"),
    }
}

/// What follows `=`.
pub(super) fn print(recipe: &Recipe, ty: &TensorType, elide: bool) -> String {
    if let [input] = recipe.inputs.as_slice()
        && input.ty == *ty
        && recipe.spec == Spec::identity(ty.clone())
    {
        return source(input, elide);
    }
    let mut text = "recipe {\n".to_owned();
    for (number, input) in recipe.inputs.iter().enumerate() {
        let _ = writeln!(text, "  %{number}: {} = {}", input.ty, source(input, elide));
    }
    let mut types: Vec<TensorType> = recipe.spec.inputs.clone();
    for node in &recipe.spec.nodes {
        let operands: Vec<&TensorType> = node.operands.iter().filter_map(|&value| types.get(value as usize)).collect();
        let results = infer(&node.op, &operands).unwrap_or_default();
        let typed: Vec<String> =
            (types.len()..).zip(&results).map(|(number, result)| format!("%{number}: {result}")).collect();
        let operands: Vec<String> = node.operands.iter().map(|value| format!("%{value}")).collect();
        let space = if operands.is_empty() { "" } else { " " };
        let (typed, operands) = (typed.join(", "), operands.join(", "));
        let equals = if typed.is_empty() { "" } else { " = " };
        let (name, attributes) = (node.op.name(), op::attributes(&node.op));
        let _ = writeln!(text, "  {typed}{equals}{name}{space}{operands}{attributes}");
        types.extend(results);
    }
    let results: Vec<String> = recipe.spec.results.iter().map(|value| format!("%{value}")).collect();
    let _ = write!(text, "  return {}\n}}", results.join(", "));
    text
}

/// Whether the cursor is at a recipe.
pub(super) fn is_recipe(cursor: &Cursor<'_>) -> bool {
    is_data(cursor) || ["file", "random", "recipe"].iter().any(|word| cursor.is_word(word))
}

fn is_source(cursor: &Cursor<'_>) -> bool {
    is_recipe(cursor) && !cursor.is_word("recipe")
}

fn read_source(cursor: &mut Cursor<'_>, dtype: DType) -> Result<Source, IrError> {
    if cursor.accept_word("random") {
        return Ok(Source::Random { seed: cursor.integer("seed")? });
    }
    if cursor.accept_word("file") {
        let file = cursor.integer("file number")?;
        cursor.keyword("at")?;
        return Ok(Source::File { file, offset: cursor.integer("offset")? });
    }
    if !is_data(cursor) {
        return Err(cursor.expected("`file`, `random`, `recipe`, `hex` or numbers in brackets"));
    }
    read_data(cursor, dtype).map(Source::Inline)
}

/// What [`print`] printed in full, for a weight of this type.
pub(super) fn read(cursor: &mut Cursor<'_>, ty: &TensorType) -> Result<Recipe, IrError> {
    if !cursor.accept_word("recipe") {
        return Ok(Recipe::source(ty.clone(), read_source(cursor, ty.dtype)?));
    }
    cursor.sign("{")?;
    let mut block = Block::default();
    while !cursor.accept_word("return") {
        block.statement(cursor)?;
    }
    let mut results = Vec::new();
    while matches!(cursor.peek(), Kind::Value(_)) {
        results.push(block.value(cursor)?);
        if !cursor.accept(",") {
            break;
        }
    }
    cursor.sign("}")?;
    let spec =
        Spec { inputs: block.inputs.iter().map(|input| input.ty.clone()).collect(), nodes: block.nodes, results };
    Ok(Recipe { inputs: block.inputs, spec })
}

#[derive(Default)]
struct Block<'a> {
    inputs: Vec<RecipeInput>,
    nodes: Vec<SpecNode>,
    names: std::collections::BTreeMap<&'a str, u32>,
    types: Vec<TensorType>,
}

impl<'a> Block<'a> {
    fn value(&self, cursor: &mut Cursor<'a>) -> Result<u32, IrError> {
        let mark = cursor.mark();
        let name = cursor.value()?;
        self.names.get(name).copied().ok_or_else(|| cursor.error_at(mark, format!("`%{name}` is not defined yet")))
    }

    fn define(&mut self, name: &'a str, ty: TensorType) -> Result<(), String> {
        self.types.push(ty);
        let known = self.names.insert(name, self.types.len() as u32 - 1);
        known.map_or(Ok(()), |_| Err(format!("`%{name}` is defined twice")))
    }

    fn statement(&mut self, cursor: &mut Cursor<'a>) -> Result<(), IrError> {
        let start = cursor.mark();
        let mut results: Vec<(&str, Option<TensorType>)> = Vec::new();
        while matches!(cursor.peek(), Kind::Value(_)) {
            let name = cursor.value()?;
            results.push((name, if cursor.accept(":") { Some(read_type(cursor)?) } else { None }));
            if !cursor.accept(",") {
                break;
            }
        }
        if !results.is_empty() {
            cursor.sign("=")?;
        }
        if is_source(cursor) {
            let [(name, Some(ty))] = results.as_slice() else {
                return Err(cursor.error_at(start, "a source has one value, with its type"));
            };
            if !self.nodes.is_empty() {
                return Err(cursor.error_at(start, "sources come before operations"));
            }
            let source = read_source(cursor, ty.dtype)?;
            self.inputs.push(RecipeInput { ty: ty.clone(), source });
            return self.define(name, ty.clone()).map_err(|why| cursor.error_at(start, why));
        }
        let mark = cursor.mark();
        let name = cursor.word("an operation or a source")?;
        let mut operands = Vec::new();
        while matches!(cursor.peek(), Kind::Value(_)) {
            operands.push(self.value(cursor)?);
            if !cursor.accept(",") {
                break;
            }
        }
        let types: Vec<&TensorType> = operands.iter().map(|&value| &self.types[value as usize]).collect();
        let result = results.first().and_then(|(_, ty)| ty.as_ref());
        let op = op::read(cursor, name, mark, &Signature { operands: types.clone(), result })?;
        let declared: Vec<Option<&TensorType>> = results.iter().map(|(_, ty)| ty.as_ref()).collect();
        let inferred = op::check(&op, &types, &declared).map_err(|why| cursor.error_at(mark, why))?;
        self.nodes.push(SpecNode { op, operands });
        for ((name, _), ty) in results.into_iter().zip(inferred) {
            self.define(name, ty).map_err(|why| cursor.error_at(start, why))?;
        }
        Ok(())
    }
}
