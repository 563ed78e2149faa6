//! Binds the dimensions of a model's inputs to numbers.
//!
//! Symbols are bound by name, by whole shapes and by sample inputs; all must agree. A dimension may also be an
//! expression of symbols, such as `past + 1`, which follows from them.

use std::collections::{BTreeMap, BTreeSet};

use planfile::text::{count, few};
use planfile::{DType, Tensor, TensorType};
use thiserror::Error;

use crate::dim_expr::{evaluate, symbols};
use crate::error::{OnnxError, UnboundDim};
use crate::flat::{Container, DimSpec, Graph, ValueInfo};
use crate::tensor_data::ElemType;

/// What a user binds before import.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bindings {
    /// Symbolic dimensions by name.
    pub dims: BTreeMap<String, u64>,
    /// Whole shapes by input name.
    pub shapes: BTreeMap<String, Vec<u64>>,
    /// Sample inputs by name: their shapes count, and their values where shapes depend on them.
    pub samples: BTreeMap<String, Tensor>,
    /// Seed of the noise that stands in for weights whose file is absent.
    pub random_weights: Option<u64>,
}

/// Why bindings do not fit the model, or each other.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BindingError {
    #[error("the model has no dimension `{name}`; {}", known_names("its dimensions are", known))]
    UnknownDim { name: String, known: Vec<String> },
    #[error(
        "{given} names the input `{input}`, which the model does not have; {}",
        known_names("its inputs are", known)
    )]
    UnknownInput { given: &'static str, input: String, known: Vec<String> },
    #[error(
        "input `{input}` has rank {expected}, but {given} gives it {}; give {expected}",
        count(*found as u64, "dimension")
    )]
    Rank { input: String, given: &'static str, expected: usize, found: usize },
    #[error(
        "axis {axis} of input `{input}` is {expected} in the model, but {given} makes it {found}; bind it to {expected}"
    )]
    Size { input: String, axis: usize, given: &'static str, expected: u64, found: u64 },
    #[error(
        "dimension `{name}` is bound to {first} by {first_given} and to {second} by {second_given}; make them agree"
    )]
    Conflict { name: String, first: u64, first_given: String, second: u64, second_given: String },
    #[error("input `{input}` has element type {expected}, but its sample has {found}; convert the sample")]
    ElementType { input: String, expected: DType, found: DType },
    #[error("input `{input}` has no element type in the model; give it one with a sample: `--like DIR`")]
    NoElementType { input: String },
    #[error("input `{input}` is {what}, which is not supported; export the model with tensor inputs")]
    NotATensor { input: String, what: &'static str },
    #[error("input `{input}` with dimensions {sizes:?} is larger than 63 bits of bytes; bind smaller dimensions")]
    TooLarge { input: String, sizes: Vec<u64> },
}

fn known_names(what: &str, known: &[String]) -> String {
    if known.is_empty() {
        return "it has none".to_owned();
    }
    format!("{what} {}", few(known.iter().map(|name| format!("`{name}`"))))
}

/// A number and where it is from.
struct Bound {
    size: u64,
    given: String,
}

/// What is known of a graph's inputs.
pub(crate) struct Inputs {
    /// In order.
    pub(crate) types: Vec<InputType>,
    /// Dimensions that nothing binds, each once.
    pub(crate) open: Vec<UnboundDim>,
}

/// The type of an input.
pub(crate) enum InputType {
    /// `is_open`: a dimension is not bound and has a size on trial.
    Known { ty: TensorType, is_open: bool },
    /// Not even the rank is known.
    Open,
    /// A type that cannot be held.
    Refused(OnnxError),
}

impl InputType {
    pub(crate) fn refusal(self) -> Option<OnnxError> {
        match self {
            Self::Refused(error) => Some(error),
            Self::Known { .. } | Self::Open => None,
        }
    }
}

/// Types of the graph's inputs; dimensions that nothing binds have the size `trial`.
///
/// # Errors
/// [`OnnxError::Binding`] when bindings contradict the model or each other.
pub(crate) fn bind(graph: &Graph, bindings: &Bindings, trial: u64) -> Result<Inputs, OnnxError> {
    let known = named_dims(graph);
    check_names(graph, bindings, &known)?;
    let mut bound = BTreeMap::new();
    for (name, &size) in &bindings.dims {
        bound.insert(name.clone(), Bound { size, given: format!("`--dim {name}={size}`") });
    }
    let mut given_shapes = Vec::new();
    for input in &graph.inputs {
        let dtype = match element_type(input, bindings) {
            Err(OnnxError::Binding(error @ BindingError::ElementType { .. })) => return Err(error.into()),
            held_or_not => held_or_not,
        };
        let sizes = given_sizes(input, bindings)?;
        if let (Some(sizes), Some(dims)) = (&sizes, &input.dims) {
            for (dim, &size) in dims.iter().zip(sizes) {
                let (DimSpec::Param(name), false) = (dim, is_unnamed(dim)) else { continue };
                let given = format!("the shape of input `{}`", input.name);
                conflict(name, bound.get(name), size, &given)?;
                bound.entry(name.clone()).or_insert(Bound { size, given });
            }
        }
        given_shapes.push((input, dtype, sizes));
    }
    check_expressions(&known, &bound)?;
    let mut open = Vec::new();
    let mut types = Vec::new();
    for (input, dtype, given) in given_shapes {
        let dtype = match dtype {
            Ok(dtype) => dtype,
            Err(error) => {
                types.push(InputType::Refused(error));
                continue;
            }
        };
        let found = given.map(|sizes| (sizes, false));
        let Some((sizes, is_open)) = found.or_else(|| model_sizes(input, &known, &bound, trial, &mut open)) else {
            open.push(UnboundDim { input: input.name.clone(), axis: 0, name: None });
            types.push(InputType::Open);
            continue;
        };
        let ty = TensorType::new(dtype, &sizes);
        if ty.bytes().is_none() {
            return Err(BindingError::TooLarge { input: input.name.clone(), sizes }.into());
        }
        types.push(InputType::Known { ty, is_open });
    }
    // A name is asked for once.
    let mut asked: BTreeSet<String> = BTreeSet::new();
    open.retain(|open| open.name.as_ref().is_none_or(|name| asked.insert(name.clone())));
    Ok(Inputs { types, open })
}

/// A dimension without number or name: exporters also write `?`, and 0 for what they do not know.
fn is_unnamed(dim: &DimSpec) -> bool {
    match dim {
        DimSpec::Unknown | DimSpec::Value(0) => true,
        DimSpec::Param(name) => name == "?" || name.parse::<i64>().is_ok(),
        DimSpec::Value(_) => false,
    }
}

/// The names that dimensions of inputs have.
fn named_dims(graph: &Graph) -> BTreeSet<String> {
    let dims = graph.inputs.iter().flat_map(|input| input.dims.iter().flatten());
    let named = dims.filter(|dim| !is_unnamed(dim)).filter_map(|dim| match dim {
        DimSpec::Param(name) => Some(name.clone()),
        DimSpec::Value(_) | DimSpec::Unknown => None,
    });
    named.collect()
}

fn check_names(graph: &Graph, bindings: &Bindings, dims: &BTreeSet<String>) -> Result<(), BindingError> {
    let inside: BTreeSet<String> = dims.iter().flat_map(|name| symbols(name)).chain(dims.iter().cloned()).collect();
    if let Some(name) = bindings.dims.keys().find(|name| !inside.contains(*name)) {
        return Err(BindingError::UnknownDim { name: name.clone(), known: dims.iter().cloned().collect() });
    }
    let known: BTreeSet<&str> = graph.inputs.iter().map(|input| input.name.as_str()).collect();
    let shapes = bindings.shapes.keys().map(|name| ("`--shape`", name));
    let samples = bindings.samples.keys().map(|name| ("a sample", name));
    match shapes.chain(samples).find(|(_, name)| !known.contains(name.as_str())) {
        Some((given, input)) => {
            let known = graph.inputs.iter().map(|input| input.name.clone()).collect();
            Err(BindingError::UnknownInput { given, input: input.clone(), known })
        }
        None => Ok(()),
    }
}

fn element_type(input: &ValueInfo, bindings: &Bindings) -> Result<DType, OnnxError> {
    let what = match input.container {
        Container::Tensor => None,
        Container::SparseTensor => Some("a sparse tensor"),
        Container::Sequence => Some("a sequence"),
        Container::Optional => Some("an optional"),
        Container::Map => Some("a map"),
        Container::Opaque => Some("of an opaque type"),
    };
    if let Some(what) = what {
        return Err(BindingError::NotATensor { input: input.name.clone(), what }.into());
    }
    let sample = bindings.samples.get(&input.name).map(|sample| sample.ty.dtype);
    if let (ElemType::UNDEFINED, Some(dtype)) = (input.elem_type, sample) {
        return Ok(dtype);
    }
    if input.elem_type == ElemType::UNDEFINED {
        return Err(BindingError::NoElementType { input: input.name.clone() }.into());
    }
    let dtype = input.elem_type.dtype().map_err(|problem| OnnxError::Tensor { tensor: input.name.clone(), problem })?;
    match sample {
        Some(found) if found != dtype => {
            Err(BindingError::ElementType { input: input.name.clone(), expected: dtype, found }.into())
        }
        Some(_) | None => Ok(dtype),
    }
}

/// Sizes that a shape or a sample gives, checked against each other and the model's numbers.
fn given_sizes(input: &ValueInfo, bindings: &Bindings) -> Result<Option<Vec<u64>>, BindingError> {
    let name = || input.name.clone();
    let shape = bindings.shapes.get(&input.name).map(|sizes| ("`--shape`", sizes.clone()));
    let sample = bindings.samples.get(&input.name).map(|sample| ("its sample", sample.ty.sizes()));
    if let (Some((given, shape)), Some((sample_given, sample))) = (&shape, &sample) {
        if shape.len() != sample.len() {
            return Err(BindingError::Rank { input: name(), given, expected: sample.len(), found: shape.len() });
        }
        if let Some(axis) = (0..shape.len()).find(|&axis| shape[axis] != sample[axis]) {
            return Err(BindingError::Conflict {
                name: format!("{}[{axis}]", input.name),
                first: shape[axis],
                first_given: (*given).to_owned(),
                second: sample[axis],
                second_given: (*sample_given).to_owned(),
            });
        }
    }
    let Some((given, sizes)) = shape.or(sample) else { return Ok(None) };
    let Some(dims) = &input.dims else { return Ok(Some(sizes)) };
    if dims.len() != sizes.len() {
        return Err(BindingError::Rank { input: name(), given, expected: dims.len(), found: sizes.len() });
    }
    for (axis, (dim, &found)) in dims.iter().zip(&sizes).enumerate() {
        match dim {
            DimSpec::Value(expected) if *expected != found && !is_unnamed(dim) => {
                return Err(BindingError::Size { input: name(), axis, given, expected: *expected, found });
            }
            DimSpec::Value(_) | DimSpec::Param(_) | DimSpec::Unknown => {}
        }
    }
    Ok(Some(sizes))
}

fn conflict(name: &str, first: Option<&Bound>, second: u64, second_given: &str) -> Result<(), BindingError> {
    match first {
        Some(first) if first.size != second => Err(BindingError::Conflict {
            name: name.to_owned(),
            first: first.size,
            first_given: first.given.clone(),
            second,
            second_given: second_given.to_owned(),
        }),
        Some(_) | None => Ok(()),
    }
}

/// Expressions that are bound themselves must agree with their symbols.
fn check_expressions(names: &BTreeSet<String>, bound: &BTreeMap<String, Bound>) -> Result<(), BindingError> {
    for name in names {
        if let Some(value) = evaluate(name, &|symbol| bound.get(symbol).map(|bound| bound.size)) {
            conflict(name, bound.get(name), value, &symbols_given(name, bound))?;
        }
    }
    Ok(())
}

fn symbols_given(name: &str, bound: &BTreeMap<String, Bound>) -> String {
    let mut parts: Vec<String> = Vec::new();
    for symbol in symbols(name) {
        if let Some(bound) = bound.get(&symbol) {
            parts.push(format!("`{symbol}` = {} ({})", bound.size, bound.given));
        }
    }
    parts.join(" and ")
}

/// Sizes from the model's numbers and the bound symbols, and whether any is open: that one goes to `unbound`, `trial` in
/// its place. `None` where the model does not give the rank.
fn model_sizes(
    input: &ValueInfo,
    names: &BTreeSet<String>,
    bound: &BTreeMap<String, Bound>,
    trial: u64,
    unbound: &mut Vec<UnboundDim>,
) -> Option<(Vec<u64>, bool)> {
    let bound = |symbol: &str| bound.get(symbol).map(|bound| bound.size);
    let mut sizes = Vec::new();
    let mut is_open = false;
    for (axis, dim) in input.dims.as_ref()?.iter().enumerate() {
        let open = |name: Option<String>| UnboundDim { input: input.name.clone(), axis, name };
        let size = match dim {
            _ if is_unnamed(dim) => Err(Some(open(None))),
            DimSpec::Value(size) => Ok(*size),
            DimSpec::Unknown => Err(Some(open(None))),
            DimSpec::Param(name) => {
                let found = bound(name).or_else(|| evaluate(name, &bound));
                // An expression follows once its symbols are bound; those are listed where they stand alone.
                let inner = symbols(name);
                let follows = !inner.contains(name) && inner.iter().all(|symbol| names.contains(symbol));
                found.ok_or_else(|| (!follows).then(|| open(Some(name.clone()))))
            }
        };
        sizes.push(size.unwrap_or_else(|open| {
            unbound.extend(open);
            is_open = true;
            match dim {
                DimSpec::Param(name) => evaluate(name, &|symbol| bound(symbol).or(Some(trial))).unwrap_or(trial),
                DimSpec::Value(_) | DimSpec::Unknown => trial,
            }
        }));
    }
    Some((sizes, is_open))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{info, tensor};

    const FLOAT: ElemType = ElemType(1);

    fn dims(names: &[&str]) -> Vec<DimSpec> {
        let dim = |name: &&str| match name.parse() {
            Ok(size) => DimSpec::Value(size),
            Err(_) => DimSpec::Param((*name).to_owned()),
        };
        names.iter().map(dim).collect()
    }

    /// A graph with the inputs `ids: [batch, 1]`, `mask: [batch, past + 1]` and `key: [batch, 2, past, 8]`.
    fn decoder() -> Graph {
        let input = |name, names: &[&str]| info(name, FLOAT, Some(dims(names)));
        let inputs = vec![
            input("ids", &["batch", "1"]),
            input("mask", &["batch", "past + 1"]),
            input("key", &["batch", "2", "past", "8"]),
        ];
        Graph { inputs, ..Graph::default() }
    }

    fn named(dims: &[(&str, u64)]) -> Bindings {
        Bindings { dims: dims.iter().map(|&(name, size)| (name.to_owned(), size)).collect(), ..Bindings::default() }
    }

    fn sizes(graph: &Graph, bindings: &Bindings) -> Vec<Vec<u64>> {
        let Inputs { types, open } = bind(graph, bindings, 0).unwrap();
        assert_eq!(open, []);
        let sizes = |ty: &InputType| match ty {
            InputType::Known { ty, is_open: false } => ty.sizes(),
            _ => panic!("an input is open"),
        };
        types.iter().map(sizes).collect()
    }

    fn error(graph: &Graph, bindings: &Bindings) -> String {
        match bind(graph, bindings, 0) {
            Err(error) => error.to_string(),
            Ok(Inputs { types, open }) => match types.into_iter().find_map(InputType::refusal) {
                Some(error) => error.to_string(),
                None => OnnxError::UnboundDims(open).to_string(),
            },
        }
    }

    fn with_shape(mut bindings: Bindings, input: &str, sizes: &[u64]) -> Bindings {
        bindings.shapes.insert(input.to_owned(), sizes.to_vec());
        bindings
    }

    fn with_sample(mut bindings: Bindings, input: &str, sample: Tensor) -> Bindings {
        bindings.samples.insert(input.to_owned(), sample);
        bindings
    }

    #[test]
    fn names_bind_dimensions_and_expressions_of_them() {
        let expected = [vec![3, 1], vec![3, 7], vec![3, 2, 6, 8]];
        assert_eq!(sizes(&decoder(), &named(&[("batch", 3), ("past", 6)])), expected);
        let shape = with_shape(named(&[("batch", 3)]), "key", &[3, 2, 6, 8]);
        assert_eq!(sizes(&decoder(), &shape), expected);
        let sample = with_sample(named(&[]), "key", tensor(&[3, 2, 6, 8], &[0f32; 288]));
        assert_eq!(sizes(&decoder(), &sample), expected);
        let whole = named(&[("batch", 3), ("past", 0), ("past + 1", 1)]);
        assert_eq!(sizes(&decoder(), &whole)[1..], [vec![3, 1], vec![3, 2, 0, 8]]);
    }

    #[test]
    fn lists_every_open_dimension_once() {
        let text = error(&decoder(), &named(&[]));
        assert!(text.contains("`--dim batch=N`") && text.contains("`--dim past=N`"), "{text}");
        assert!(!text.contains("past + 1") && text.matches("--dim batch").count() == 1, "{text}");
        let graph = Graph { inputs: vec![info("x", FLOAT, Some(dims(&["?", "0", "-1"])))], ..Graph::default() };
        assert_eq!(error(&graph, &named(&[])).matches("`--shape x=").count(), 3);
        assert_eq!(sizes(&graph, &with_shape(named(&[]), "x", &[2, 3, 4])), [[2, 3, 4]]);
        let unranked = Graph { inputs: vec![info("x", FLOAT, None)], ..Graph::default() };
        assert!(error(&unranked, &named(&[])).contains("`--shape x="));
    }

    #[test]
    fn open_dimensions_have_a_size_on_trial() {
        let Inputs { types, open } = bind(&decoder(), &named(&[("batch", 3)]), 32).unwrap();
        let known = |ty: &InputType| match ty {
            InputType::Known { ty, is_open } => (ty.sizes(), *is_open),
            _ => panic!("a rank is open"),
        };
        let types: Vec<(Vec<u64>, bool)> = types.iter().map(known).collect();
        assert_eq!(types, [(vec![3, 1], false), (vec![3, 33], true), (vec![3, 2, 32, 8], true)]);
        assert_eq!(open.iter().map(|dim| dim.name.as_deref()).collect::<Vec<_>>(), [Some("past")]);
    }

    #[test]
    fn two_values_of_one_name_contradict() {
        let shape = with_shape(named(&[("batch", 3)]), "ids", &[4, 1]);
        let text = error(&decoder(), &shape);
        assert!(text.contains("bound to 3 by `--dim batch=3` and to 4 by the shape of input `ids`"), "{text}");
        let text = error(&decoder(), &named(&[("batch", 3), ("past", 6), ("past + 1", 9)]));
        assert!(text.contains("`past + 1` is bound to 9") && text.contains("to 7 by `past` = 6"), "{text}");
        let both = with_sample(with_shape(named(&[]), "ids", &[3, 1]), "ids", tensor(&[4, 1], &[0f32; 4]));
        assert!(error(&decoder(), &both).contains("`ids[0]` is bound to 3"));
    }

    #[test]
    fn shapes_must_fit_the_model() {
        let text = error(&decoder(), &with_shape(named(&[]), "ids", &[3]));
        assert!(text.contains("rank 2") && text.contains("`--shape`"), "{text}");
        let text = error(&decoder(), &with_shape(named(&[]), "ids", &[3, 2]));
        assert!(text.contains("axis 1 of input `ids` is 1 in the model"), "{text}");
        let text = error(&decoder(), &with_sample(named(&[]), "ids", tensor(&[3, 1], &[0i64; 3])));
        assert!(text.contains("element type f32, but its sample has i64"), "{text}");
        let text = error(&decoder(), &named(&[("batch", u64::MAX), ("past", 1)]));
        assert!(text.contains("larger than 63 bits"), "{text}");
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        let text = error(&decoder(), &named(&[("bach", 3)]));
        assert!(text.contains("`bach`") && text.contains("`batch`, `past`"), "{text}");
        let text = error(&decoder(), &with_shape(named(&[]), "x", &[1]));
        assert!(text.contains("`ids`, `mask`, `key`"), "{text}");
    }

    #[test]
    fn inputs_are_tensors_of_known_types() {
        let mut graph = decoder();
        graph.inputs[0].elem_type = ElemType::UNDEFINED;
        assert!(error(&graph, &named(&[("batch", 1), ("past", 1)])).contains("no element type"));
        graph.inputs[0].elem_type = ElemType(8);
        assert!(error(&graph, &named(&[("batch", 1), ("past", 1)])).contains("string"));
        graph.inputs[0].container = Container::Sequence;
        assert!(error(&graph, &named(&[("batch", 1), ("past", 1)])).contains("is a sequence"));
        graph.inputs[0].container = Container::Opaque;
        assert!(error(&graph, &named(&[("batch", 1), ("past", 1)])).contains("is of an opaque type"));
    }
}
