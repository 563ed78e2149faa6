//! Holds given inputs against what an entry expects.

use std::collections::BTreeMap;

use planfile::plan::{PlanEntry, PlanPort};
use planfile::{Tensor, TensorType};

use crate::error::RuntimeError;

fn listed(ports: &[PlanPort]) -> Vec<String> {
    ports.iter().map(|port| format!("`{}` ({})", port.name, port.ty)).collect()
}

/// The inputs in the order of the entry's ports.
///
/// # Errors
/// An input that is missing or unknown, of another type or shape, or with other values than it was bound to.
pub(crate) fn arrange<'a>(
    entry: &PlanEntry,
    given: &'a BTreeMap<String, Tensor>,
) -> Result<Vec<&'a Tensor>, RuntimeError> {
    if let Some(name) = given.keys().find(|name| !entry.inputs.iter().any(|port| &port.name == *name)) {
        let expected = listed(&entry.inputs);
        return Err(RuntimeError::UnknownInput { entry: entry.name.clone(), name: name.clone(), expected });
    }
    entry.inputs.iter().map(|port| check(entry, port, given.get(&port.name))).collect()
}

fn check<'a>(entry: &PlanEntry, port: &PlanPort, tensor: Option<&'a Tensor>) -> Result<&'a Tensor, RuntimeError> {
    let name = || port.name.clone();
    let Some(tensor) = tensor else {
        let expected = listed(&entry.inputs);
        return Err(RuntimeError::MissingInput {
            entry: entry.name.clone(),
            name: name(),
            ty: port.ty.clone(),
            expected,
        });
    };
    let (expected, given) = (port.ty.clone(), tensor.ty.clone());
    if given.dtype != expected.dtype {
        return Err(RuntimeError::InputDType { name: name(), expected, given });
    }
    // Bounded dimensions are given at their capacity.
    if given.sizes() != expected.sizes() || !is_whole(tensor) {
        return Err(RuntimeError::InputShape { name: name(), expected, given });
    }
    match entry.pinned.iter().find(|(pinned, _)| *pinned == port.name) {
        Some((_, pinned)) if pinned.data != tensor.data => Err(RuntimeError::PinnedInput { name: name() }),
        _ => Ok(tensor),
    }
}

/// Tensors have public fields: their bytes may not be as many as their type says.
fn is_whole(tensor: &Tensor) -> bool {
    let bytes = |ty: &TensorType| ty.bytes();
    bytes(&tensor.ty) == Some(tensor.data.len() as u64)
}

#[cfg(test)]
mod tests {
    use planfile::{Buffer, DType};

    use super::*;

    fn entry() -> PlanEntry {
        let port = |name: &str, dtype, sizes: &[u64]| PlanPort { name: name.into(), ty: TensorType::new(dtype, sizes) };
        PlanEntry {
            name: "main".into(),
            inputs: vec![port("ids", DType::I64, &[2]), port("x", DType::F32, &[1, 2])],
            outputs: vec![],
            pinned: vec![("ids".into(), ids(&[1, 2]))],
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
        let pinned = message(&[("ids", Some(ids(&[1, 3])))]);
        assert!(pinned.contains("`ids` was bound to other values"), "{pinned}");
    }

    #[test]
    fn tensors_without_their_bytes_are_refused() {
        let hollow = Tensor { ty: TensorType::new(DType::F32, &[1, 2]), data: Buffer::zeroed(4) };
        assert!(arrange(&entry(), &given(&[("x", Some(hollow))])).is_err());
    }
}
