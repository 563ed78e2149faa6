//! Which experts tokens go to: a model whose choices are outputs too, and how two runs of it agree.
//!
//! Two experts may suit a token alike; then the rounding of a half type decides, and the token's row is another expert's.
//! Such a row says nothing of rounding, so that a bound on all rows would have to let anything pass. What is judged
//! instead: how many tokens are routed alike, the rows of those, and the most likely token of each row.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use onnx::messages::ModelProto;
use planfile::Tensor;
use planwright::compiler::Request;
use prost::Message;
use runtime::compare::to_f64s;
use runtime::tensor_file::TestData;
use runtime::{Devices, Session};

/// Writes a copy of the model that also outputs the indices of each `TopK`, after its own outputs; how many those are.
pub(crate) fn with_choices(model: &Path, copy: &Path) -> usize {
    let bytes = fs::read(model).unwrap();
    let graph = ModelProto::decode(bytes.as_slice()).unwrap().graph.unwrap();
    let choices = graph.node.iter().filter(|node| node.op_type == "TopK").map(|node| node.output[1].clone());
    // name, and type: a tensor of i64.
    let port = |name: String| field(12, &[field(1, name.as_bytes()), field(2, &field(1, &[0x08, 7]))].concat());
    let ports: Vec<Vec<u8>> = choices.map(port).collect();
    assert!(!ports.is_empty(), "{} chooses nothing", model.display());
    // The graph is the model's field 7; everything else stays as it is.
    let mut at = 0;
    let mut written = Vec::new();
    while at < bytes.len() {
        let start = at;
        let key = varint(&bytes, &mut at);
        let body = at;
        match key & 7 {
            0 => drop(varint(&bytes, &mut at)),
            2 => {
                let length = varint(&bytes, &mut at) as usize;
                if key >> 3 == 7 {
                    written.extend(field(7, &[&bytes[at..at + length], &ports.concat()].concat()));
                    at += length;
                    continue;
                }
                at += length;
            }
            other => panic!("a field of wire type {other} at {body}"),
        }
        written.extend_from_slice(&bytes[start..at]);
    }
    fs::write(copy, written).unwrap();
    ports.len()
}

fn varint(bytes: &[u8], at: &mut usize) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = bytes[*at];
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

fn field(number: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut length = body.len();
    while length >= 0x80 {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend_from_slice(body);
    bytes
}

/// Outputs of a model on these devices, by position.
///
/// # Errors
/// What does not compile or run.
pub(crate) fn outputs(request: &Request, data: &TestData, devices: Devices) -> Result<Vec<Tensor>, String> {
    let compiled = request.compile(&mut |_, _| {}).map_err(|error| error.to_string())?.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.plan");
    compiled.write(&path, |_| {}).map_err(|error| error.to_string())?;
    let session = Session::load(&path, devices).map_err(|error| error.to_string())?;
    let entry = &session.entries()[0];
    let names = entry.inputs.iter().map(|port| port.name.clone());
    let inputs = names.zip(data.inputs.iter().cloned()).collect();
    let mut context = session.context().map_err(|error| error.to_string())?;
    let outputs = context.run(&entry.name, &inputs).map_err(|error| error.to_string())?;
    Ok(outputs.into_iter().map(|(_, tensor)| tensor).collect())
}

/// How two runs agree.
#[derive(Debug)]
pub(crate) struct Agreement {
    /// Share of tokens that go to the same experts in every layer.
    pub(crate) routed_alike: f64,
    /// Share of rows of the first output whose largest element is the same.
    pub(crate) first_alike: f64,
    /// The same, of tokens that are routed alike.
    pub(crate) first_alike_of_those: f64,
    /// Largest error of rows of tokens that are routed alike, as a share of the largest value.
    pub(crate) error_of_those: f64,
}

/// Shares that a half type must reach, and what the rows of tokens that are routed alike may be off.
pub(crate) struct Bounds {
    pub(crate) routed_alike: f64,
    pub(crate) first_alike: f64,
    pub(crate) first_alike_of_those: f64,
    pub(crate) error_of_those: f64,
}

impl Agreement {
    pub(crate) fn is_within(&self, bounds: &Bounds) -> bool {
        self.routed_alike >= bounds.routed_alike
            && self.first_alike >= bounds.first_alike
            && self.first_alike_of_those >= bounds.first_alike_of_those
            && self.error_of_those <= bounds.error_of_those
    }
}

/// Outputs of two runs of a model [`with_choices`]: logits first, choices last.
pub(crate) fn agreement(actual: &[Tensor], expected: &[Tensor], choices: usize) -> Agreement {
    let width = *expected[0].ty.sizes().last().unwrap() as usize;
    let [logits, references] = [actual, expected].map(|outputs| to_f64s(&outputs[0]));
    let tokens = references.len() / width;
    let experts = |outputs: &[Tensor], token: usize| -> Vec<BTreeSet<u64>> {
        let of_layer = |indices: &Tensor| {
            let indices = to_f64s(indices);
            let each = indices.len() / tokens;
            indices[token * each..][..each].iter().map(|&index| index as u64).collect()
        };
        outputs[outputs.len() - choices..].iter().map(of_layer).collect()
    };
    let alike: Vec<bool> = (0..tokens).map(|token| experts(actual, token) == experts(expected, token)).collect();
    let row = |values: &'_ [f64], token: usize| values[token * width..][..width].to_vec();
    let first = |row: &[f64]| (0..width).fold(0, |best, at| if row[at] > row[best] { at } else { best });
    let same_first = |token: &usize| first(&row(&logits, *token)) == first(&row(&references, *token));
    let those = || (0..tokens).filter(|&token| alike[token]);
    let largest = references.iter().fold(f64::MIN_POSITIVE, |largest: f64, value| largest.max(value.abs()));
    let error = |token: usize| {
        let pairs = row(&logits, token).into_iter().zip(row(&references, token));
        pairs.fold(0.0, |worst: f64, (a, b)| worst.max((a - b).abs() / largest))
    };
    let share = |count: usize, of: usize| count as f64 / of.max(1) as f64;
    Agreement {
        routed_alike: share(those().count(), tokens),
        first_alike: share((0..tokens).filter(same_first).count(), tokens),
        first_alike_of_those: share(those().filter(same_first).count(), those().count()),
        error_of_those: those().map(error).fold(0.0, f64::max),
    }
}
