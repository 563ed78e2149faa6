//! Holds given inputs against what an entry expects.

use std::collections::{BTreeMap, HashMap};

use planfile::frozen::other_value_text;
use planfile::plan::{PlanEntry, PlanPort};
use planfile::{FrozenInput, Tensor, TensorType};

use crate::error::RuntimeError;

fn listed(ports: &[PlanPort]) -> Vec<String> {
    ports.iter().map(|port| format!("`{}` ({})", port.name, port.ty)).collect()
}

/// The inputs in the order of the entry's ports; one that is left out has its frozen value, where there is one.
///
/// # Errors
/// An input that is missing or unknown, of another type or shape, or with another value than it is frozen at.
pub(crate) fn arrange<'a>(
    entry: &'a PlanEntry,
    given: &'a BTreeMap<String, Tensor>,
) -> Result<Vec<&'a Tensor>, RuntimeError> {
    let expected = Expected::new(entry);
    if let Some(name) = given.keys().find(|name| !expected.ports.contains_key(name.as_str())) {
        return Err(expected.unknown(name));
    }
    let frozen: HashMap<&str, &FrozenInput> =
        entry.frozen.iter().map(|frozen| (frozen.input.as_str(), frozen)).collect();
    let check = |port: &PlanPort| {
        let frozen = frozen.get(port.name.as_str());
        let Some(tensor) = given.get(&port.name).or_else(|| frozen.map(|frozen| &frozen.value)) else {
            let (entry, name, ty, expected) =
                (entry.name.clone(), port.name.clone(), port.ty.clone(), listed(&entry.inputs));
            return Err(RuntimeError::MissingInput { entry, name, ty, expected });
        };
        expected.check(&port.name, &tensor.ty)?;
        if !is_whole(tensor) {
            let (name, expected, given) = (port.name.clone(), port.ty.clone(), tensor.ty.clone());
            return Err(RuntimeError::InputShape { name, expected, given });
        }
        match frozen.filter(|frozen| frozen.value.data != tensor.data) {
            Some(&frozen) => Err(RuntimeError::FrozenInput {
                frozen: Box::new(frozen.into()),
                given: other_value_text(tensor, &frozen.value),
            }),
            None => Ok(tensor),
        }
    };
    entry.inputs.iter().map(check).collect()
}

/// The types that an entry expects, by the names of its inputs.
pub(crate) struct Expected<'a> {
    entry: &'a PlanEntry,
    ports: HashMap<&'a str, &'a TensorType>,
}

impl<'a> Expected<'a> {
    pub(crate) fn new(entry: &'a PlanEntry) -> Self {
        Self { entry, ports: entry.inputs.iter().map(|port| (port.name.as_str(), &port.ty)).collect() }
    }

    fn unknown(&self, name: &str) -> RuntimeError {
        let expected = listed(&self.entry.inputs);
        RuntimeError::UnknownInput { entry: self.entry.name.clone(), name: name.to_owned(), expected }
    }

    /// Whether there is such an input and `given` is its type.
    ///
    /// # Errors
    /// A name that is unknown, another type or shape.
    pub(crate) fn check(&self, name: &str, given: &TensorType) -> Result<(), RuntimeError> {
        let &expected = self.ports.get(name).ok_or_else(|| self.unknown(name))?;
        let differs = || (name.to_owned(), expected.clone(), given.clone());
        if given.dtype != expected.dtype {
            let (name, expected, given) = differs();
            return Err(RuntimeError::InputDType { name, expected, given });
        }
        // Bounded dimensions are given at their capacity.
        if given.sizes() != expected.sizes() {
            let (name, expected, given) = differs();
            return Err(RuntimeError::InputShape { name, expected, given });
        }
        Ok(())
    }
}

/// Tensors have public fields: their bytes may not be as many as their type says.
fn is_whole(tensor: &Tensor) -> bool {
    let bytes = |ty: &TensorType| ty.bytes();
    bytes(&tensor.ty) == Some(tensor.data.len() as u64)
}

#[cfg(test)]
mod tests {
    use planfile::{Buffer, DType, FrozenInput};

    use super::*;

    fn entry() -> PlanEntry {
        let port = |name: &str, dtype, sizes: &[u64]| PlanPort { name: name.into(), ty: TensorType::new(dtype, sizes) };
        PlanEntry {
            name: "main".into(),
            inputs: vec![port("ids", DType::I64, &[2]), port("x", DType::F32, &[1, 2])],
            outputs: vec![],
            frozen: vec![FrozenInput { input: "ids".into(), value: ids(&[1, 2]), node: "/Reshape".into(), nodes: 1 }],
            programs: vec![],
            predicted_ns: 0,
        }
    }

    fn ids(elements: &[i64]) -> Tensor {
        Tensor::from_elements(&[elements.len() as u64], elements).unwrap()
    }

    fn given(changes: &[(&str, Option<Tensor>)]) -> BTreeMap<String, Tensor> {
        let x = Tensor::from_elements(&[1, 2], &[0f32; 2]).unwrap();
        let mut given = BTreeMap::from([("x".to_owned(), x), ("ids".to_owned(), ids(&[1, 2]))]);
        for (name, change) in changes {
            match change {
                Some(tensor) => given.insert((*name).to_owned(), tensor.clone()),
                None => given.remove(*name),
            };
        }
        given
    }

    fn message(changes: &[(&str, Option<Tensor>)]) -> String {
        arrange(&entry(), &given(changes)).unwrap_err().to_string()
    }

    #[test]
    fn inputs_come_in_the_order_of_the_ports() {
        let given = given(&[]);
        let types: Vec<String> = arrange(&entry(), &given).unwrap().iter().map(|input| input.ty.to_string()).collect();
        assert_eq!(types, ["i64[2]", "f32[1, 2]"]);
    }

    #[test]
    fn what_does_not_fit_is_named_with_what_is_expected() {
        let missing = message(&[("x", None)]);
        assert!(missing.contains("`x` (f32[1, 2]) is missing") && missing.contains("`ids` (i64[2])"), "{missing}");
        let unknown = message(&[("y", Some(ids(&[1])))]);
        assert!(unknown.contains("no input `y`") && unknown.contains("`x` (f32[1, 2])"), "{unknown}");
        let dtype = message(&[("x", Some(ids(&[1])))]);
        assert!(dtype.contains("must be f32[1, 2], given is i64[1]; convert"), "{dtype}");
        let shape = message(&[("x", Some(Tensor::from_elements(&[2], &[0f32; 2]).unwrap()))]);
        assert!(shape.contains("must be f32[1, 2], given is f32[2]; reshape"), "{shape}");
    }

    #[test]
    fn a_frozen_input_may_be_left_out_but_not_be_another() {
        let left_out = given(&[("ids", None)]);
        let entry = entry();
        assert_eq!(arrange(&entry, &left_out).unwrap()[0].to_i64s().unwrap(), [1, 2]);
        let other = message(&[("ids", Some(ids(&[1, 3])))]);
        for part in ["`ids` is frozen at [1, 2]", "`/Reshape`", "given is [1, 3]", "leave the input out", "--like"] {
            assert!(other.contains(part), "{other}");
        }
    }

    #[test]
    fn tensors_without_their_bytes_are_refused() {
        let hollow = Tensor { ty: TensorType::new(DType::F32, &[1, 2]), data: Buffer::zeroed(4) };
        assert!(arrange(&entry(), &given(&[("x", Some(hollow))])).is_err());
    }
}
