//! Inputs whose values were bound at compile time, because shapes or branches depend on them.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::expr::Scalar;
use crate::tensor::Tensor;

/// Elements of a value that are shown; of longer ones, how many more there are.
const SHOWN_ELEMENTS: usize = 8;

/// An input whose value is part of the plan: a run brings the same value, or leaves it out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenInput {
    pub input: String,
    pub value: Tensor,
    /// Name of the first node of the model whose shape, or whose choice of a branch, depends on the value.
    pub node: String,
    /// How many nodes there are of that kind.
    pub nodes: u32,
}

/// As [`FrozenInput`], for summaries and reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrozenSummary {
    pub input: String,
    /// Such as `i64[2]`.
    pub ty: String,
    /// Abbreviated where it is long, such as `[1, 2, 3, 4, 5, 6, 7, 8, … 56 more]`.
    pub value: String,
    pub node: String,
    pub nodes: u32,
}

impl From<&FrozenInput> for FrozenSummary {
    fn from(frozen: &FrozenInput) -> Self {
        Self {
            input: frozen.input.clone(),
            ty: frozen.value.ty.to_string(),
            value: value_text(&frozen.value),
            node: frozen.node.clone(),
            nodes: frozen.nodes,
        }
    }
}

impl FrozenSummary {
    /// `n: i64[2] = [2, 3], which node `/Reshape` and 2 more need`.
    pub fn text(&self) -> String {
        let Self { input, ty, value, .. } = self;
        format!("{input}: {ty} = {value}, which {}", self.reader())
    }

    /// `node `/Reshape` and 2 more need`.
    pub fn reader(&self) -> String {
        match self.nodes {
            0 | 1 => format!("node `{}` needs", self.node),
            nodes => format!("node `{}` and {} more need", self.node, nodes - 1),
        }
    }
}

/// The elements in row-major order, in brackets unless the tensor is a scalar; long ones abbreviated.
pub fn value_text(tensor: &Tensor) -> String {
    let dtype = tensor.ty.dtype;
    let elements = tensor.data.bytes().chunks_exact(dtype.bytes());
    let more = elements.len().saturating_sub(SHOWN_ELEMENTS);
    let mut texts: Vec<String> = elements.take(SHOWN_ELEMENTS).map(|bytes| element_text(dtype, bytes)).collect();
    if tensor.ty.rank() == 0 {
        return texts.concat();
    }
    if more > 0 {
        texts.push(format!("… {more} more"));
    }
    format!("[{}]", texts.join(", "))
}

/// `value` for someone who expects `expected`: where both look alike once abbreviated, the first element that differs.
pub fn other_value_text(value: &Tensor, expected: &Tensor) -> String {
    let text = value_text(value);
    let dtype = value.ty.dtype;
    let elements = |tensor: &Tensor| -> Vec<String> {
        tensor.data.bytes().chunks_exact(dtype.bytes()).map(|bytes| element_text(dtype, bytes)).collect()
    };
    if text != value_text(expected) {
        return text;
    }
    let (found, expected) = (elements(value), elements(expected));
    match found.iter().zip(&expected).position(|(found, expected)| found != expected) {
        Some(at) => format!("{text}, whose element {at} is {} instead of {}", found[at], expected[at]),
        None => text,
    }
}

fn element_text(dtype: DType, bytes: &[u8]) -> String {
    match (dtype, Scalar::from_bytes(dtype, bytes)) {
        (DType::Bool, Some(scalar)) => (scalar.bits != 0).to_string(),
        (DType::U64, Some(scalar)) => scalar.bits.to_string(),
        (DType::F64, Some(scalar)) => scalar.to_f64().to_string(),
        // The shortest text that reads back to an `f32`; half types are shown as what they widen to.
        (_, Some(scalar)) => {
            scalar.to_i64().map_or_else(|| (scalar.to_f64() as f32).to_string(), |value| value.to_string())
        }
        (_, None) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::TensorType;

    #[test]
    fn long_values_are_abbreviated() {
        let text = |sizes: &[u64], elements: &[i64]| value_text(&Tensor::from_elements(sizes, elements).unwrap());
        assert_eq!(text(&[], &[-7]), "-7");
        assert_eq!(text(&[0], &[]), "[]");
        assert_eq!(text(&[2, 4], &[1, 2, 3, 4, 5, 6, 7, 8]), "[1, 2, 3, 4, 5, 6, 7, 8]");
        assert_eq!(text(&[64], &[1; 64]), "[1, 1, 1, 1, 1, 1, 1, 1, … 56 more]");
    }

    #[test]
    fn a_difference_that_the_abbreviation_hides_is_named() {
        let ones = Tensor::from_elements(&[64], &[1i64; 64]).unwrap();
        let mut other = [1i64; 64];
        other[40] = 7;
        let text = other_value_text(&Tensor::from_elements(&[64], &other).unwrap(), &ones);
        assert_eq!(text, format!("{}, whose element 40 is 7 instead of 1", value_text(&ones)));
        other[1] = 2;
        assert!(other_value_text(&Tensor::from_elements(&[64], &other).unwrap(), &ones).starts_with("[1, 2, 1"));
    }

    #[test]
    fn elements_are_written_in_their_type() {
        assert_eq!(value_text(&Tensor::from_elements(&[1], &[u64::MAX]).unwrap()), "[18446744073709551615]");
        assert_eq!(value_text(&Tensor::from_elements(&[2], &[0.1f32, f32::NAN]).unwrap()), "[0.1, NaN]");
        assert_eq!(value_text(&Tensor::from_bytes(TensorType::new(DType::Bool, &[]), &[1]).unwrap()), "true");
    }

    #[test]
    fn says_who_needs_the_value() {
        let value = Tensor::from_elements(&[2], &[2i64, 3]).unwrap();
        let frozen = |nodes| FrozenInput { input: "n".into(), value: value.clone(), node: "/Reshape".into(), nodes };
        let text = |nodes| FrozenSummary::from(&frozen(nodes)).text();
        assert_eq!(text(1), "n: i64[2] = [2, 3], which node `/Reshape` needs");
        assert_eq!(text(3), "n: i64[2] = [2, 3], which node `/Reshape` and 2 more need");
    }
}
