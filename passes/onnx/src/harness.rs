//! For tests: a model of a few nodes in memory, imported and run on the CPU.

use std::collections::BTreeMap;

use ir::{Module, ValueDef, ValueId};
use planfile::tensor::Element;
use planfile::{Source, Tensor};

use crate::bindings::Bindings;
use crate::error::OnnxError;
use crate::flat::{Attribute, Container, DimSpec, Graph, Initializer, Node, ValueInfo};
use crate::import::import;
use crate::load::Model;
use crate::source_files::WeightFiles;
use crate::tensor_data::{self, ElemType};

/// A model under construction.
#[derive(Clone, Default)]
pub(crate) struct Case {
    pub(crate) graph: Graph,
    pub(crate) bindings: Bindings,
    /// Values of the inputs, when the model is run.
    pub(crate) data: Vec<Tensor>,
}

impl Case {
    /// A model of one node, whose operands are added in order.
    pub(crate) fn new(op_type: &str, opset: i64) -> Self {
        let mut case = Self::default();
        case.graph.nodes.push(node(op_type, opset, &[], &["y0"]));
        case.outputs(1)
    }

    pub(crate) fn attr(mut self, name: &str, value: Attribute) -> Self {
        self.last().attributes.insert(name.to_owned(), value);
        self
    }

    pub(crate) fn int(self, name: &str, value: i64) -> Self {
        self.attr(name, Attribute::Int(value))
    }

    pub(crate) fn ints(self, name: &str, values: &[i64]) -> Self {
        self.attr(name, Attribute::Ints(values.to_vec()))
    }

    pub(crate) fn float(self, name: &str, value: f32) -> Self {
        self.attr(name, Attribute::Float(value))
    }

    pub(crate) fn string(self, name: &str, value: &str) -> Self {
        self.attr(name, Attribute::String(value.to_owned()))
    }

    pub(crate) fn tensor(self, name: &str, value: &Tensor) -> Self {
        self.attr(name, Attribute::Tensor(stored(value)))
    }

    /// The node's next operand: a graph input of this tensor's type, run with this value.
    pub(crate) fn input(mut self, value: Tensor) -> Self {
        let name = format!("x{}", self.graph.inputs.len());
        let dims = value.ty.sizes().into_iter().map(DimSpec::Value).collect();
        self.bindings.shapes.insert(name.clone(), value.ty.sizes());
        self.graph.inputs.push(info(&name, elem_type(&value), Some(dims)));
        self.data.push(value);
        self.last().inputs.push(name);
        self
    }

    /// The node's next operand: an initializer.
    pub(crate) fn constant(mut self, value: Tensor) -> Self {
        let name = format!("c{}", self.graph.initializers.len());
        self.graph.initializers.push(Initializer { name: name.clone(), tensor: stored(&value) });
        self.last().inputs.push(name);
        self
    }

    /// The node's next operand: left out.
    pub(crate) fn without(mut self) -> Self {
        self.last().inputs.push(String::new());
        self
    }

    /// Number of outputs of the node, all of them outputs of the model.
    pub(crate) fn outputs(mut self, count: usize) -> Self {
        let names: Vec<String> = (0..count).map(|position| format!("y{position}")).collect();
        self.graph.outputs = names.iter().map(|name| info(name, ElemType::UNDEFINED, None)).collect();
        self.last().outputs = names;
        self
    }

    fn last(&mut self) -> &mut Node {
        self.graph.nodes.last_mut().unwrap()
    }

    pub(crate) fn import(&self) -> Result<Module, OnnxError> {
        let model = Model {
            ir_version: 10,
            opsets: BTreeMap::from([(String::new(), 20)]),
            producer_name: String::new(),
            producer_version: String::new(),
            graph: self.graph.clone(),
            functions: Vec::new(),
            external_data_root_unused: false,
            files: Vec::new(),
            metadata: BTreeMap::new(),
            device_configurations: Vec::new(),
        };
        import(&model, &self.bindings, &WeightFiles::open(&[]).unwrap())
    }

    /// Values of the outputs.
    pub(crate) fn run(&self) -> Vec<Tensor> {
        run(&self.import().unwrap(), &self.data)
    }

    /// Values of the only output.
    pub(crate) fn one(&self) -> Tensor {
        self.run().remove(0)
    }

    /// The message of the error that import ends with.
    pub(crate) fn error(&self) -> String {
        self.import().unwrap_err().to_string()
    }
}

pub(crate) fn node(op_type: &str, opset: i64, inputs: &[&str], outputs: &[&str]) -> Node {
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    Node {
        op_type: op_type.to_owned(),
        domain: String::new(),
        opset,
        name: format!("/{op_type}"),
        inputs: names(inputs),
        outputs: names(outputs),
        attributes: BTreeMap::new(),
        device_configurations: Vec::new(),
    }
}

pub(crate) fn info(name: &str, elem_type: ElemType, dims: Option<Vec<DimSpec>>) -> ValueInfo {
    ValueInfo { name: name.to_owned(), container: Container::Tensor, elem_type, dims }
}

/// The tensor as a model stores it.
pub(crate) fn stored(value: &Tensor) -> tensor_data::Tensor {
    tensor_data::Tensor::inline(value.ty.dtype, value.ty.sizes(), value.data.bytes().to_vec())
}

pub(crate) fn elem_type(value: &Tensor) -> ElemType {
    (1..20).map(ElemType).find(|elem_type| elem_type.dtype() == Ok(value.ty.dtype)).unwrap()
}

/// A tensor of these elements.
pub(crate) fn tensor<T: Element>(sizes: &[u64], elements: &[T]) -> Tensor {
    Tensor::from_elements(sizes, elements).unwrap()
}

/// A tensor of booleans.
pub(crate) fn bools(sizes: &[u64], elements: &[bool]) -> Tensor {
    let bytes: Vec<u8> = elements.iter().map(|&element| u8::from(element)).collect();
    Tensor::from_bytes(planfile::TensorType::new(planfile::DType::Bool, sizes), &bytes).unwrap()
}

/// Runs the only graph of an imported module.
pub(crate) fn run(module: &Module, inputs: &[Tensor]) -> Vec<Tensor> {
    let graph = &module.graphs[0];
    let mut values: BTreeMap<ValueId, Tensor> = BTreeMap::new();
    for (value, id) in graph.values().iter().zip((0..).map(ValueId)) {
        let known = match value.def {
            ValueDef::Input(number) => inputs[number as usize].clone(),
            ValueDef::Weight(weight) => match &module.weight(weight).recipe.inputs[0].source {
                Source::Inline(data) => Tensor { ty: value.ty.clone(), data: data.clone() },
                other => panic!("{other:?} in a test model"),
            },
            ValueDef::State(_) | ValueDef::Node(..) => continue,
        };
        assert_eq!(known.ty, value.ty, "{id}");
        values.insert(id, known);
    }
    for node in graph.nodes() {
        let operands: Vec<&Tensor> = node.operands.iter().map(|operand| &values[operand]).collect();
        let results = cpu::evaluate(&node.op, &operands).unwrap();
        for (&id, result) in node.results.iter().zip(results) {
            assert_eq!(result.ty, *graph.ty(id), "{id} of {}", node.op.name());
            values.insert(id, result);
        }
    }
    graph.outputs().iter().map(|output| values[&output.value].clone()).collect()
}

/// Asserts sizes, and elements within `1e-5` of the largest expected magnitude.
pub(crate) fn assert_close(found: &Tensor, sizes: &[u64], expected: &[f32]) {
    assert_eq!(found.ty.sizes(), sizes);
    let found = found.elements::<f32>().unwrap();
    let largest = expected.iter().filter(|x| x.is_finite()).fold(1f32, |largest, x| largest.max(x.abs()));
    let close = |a: f32, b: f32| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-5 * largest;
    let fine = found.len() == expected.len() && found.iter().zip(expected).all(|(&a, &b)| close(a, b));
    assert!(fine, "found {found:?}, expected {expected:?}");
}
