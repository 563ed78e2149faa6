//! An entry's inputs and outputs: whole on the caller's side, in parts on the ranks'.

use planfile::plan::{Binding, Plan, PlanEntry, Step};
use planfile::{Tensor, TensorType};

use crate::error::RuntimeError;
use crate::pieces::Part;

/// What one rank holds of an output.
pub(crate) struct Piece<B> {
    pub(crate) program: usize,
    /// Position among the program's outputs.
    pub(crate) binding: usize,
    /// Position of the rank among the stage's.
    pub(crate) position: usize,
    pub(crate) bytes: B,
}

/// Puts outputs together from what the ranks hold.
pub(crate) fn assemble<B: AsRef<[u8]>>(
    plan: &Plan,
    entry: &PlanEntry,
    pieces: Vec<Piece<B>>,
) -> Result<Vec<Tensor>, RuntimeError> {
    let contradiction = |what: String| RuntimeError::Contradiction { what };
    let mut outputs = Vec::with_capacity(entry.outputs.len());
    for port in &entry.outputs {
        let bytes = port.ty.bytes().unwrap_or(u64::MAX);
        let data = crate::memory::allocate(bytes, || format!("output `{}`", port.name))?;
        outputs.push((Tensor { ty: port.ty.clone(), data }, 0usize));
    }
    for piece in pieces {
        let binding = &plan.programs[piece.program].outputs[piece.binding];
        let Some((output, copied)) = outputs.get_mut(binding.port as usize) else {
            return Err(contradiction(format!("there is no output number {}", binding.port)));
        };
        let part = PartOf::new(&output.ty, binding);
        let bytes = part.at(piece.position).gather(piece.bytes.as_ref(), output.data.bytes_mut());
        *copied += bytes.ok_or_else(|| contradiction(misfit("output", binding)))?;
    }
    for ((output, copied), port) in outputs.iter().zip(&entry.outputs) {
        if *copied != output.data.len() {
            let expected = output.data.len();
            return Err(contradiction(format!("ranks hold {copied} bytes of output `{}` of {expected}", port.name)));
        }
    }
    Ok(outputs.into_iter().map(|(output, _)| output).collect())
}

pub(crate) fn misfit(what: &str, binding: &Binding) -> String {
    format!("the split of {what} {} does not fit its sizes", binding.port)
}

/// Sizes of a port and of its binding, whichever rank's.
pub(crate) struct PartOf<'a> {
    whole: Vec<u64>,
    local: Vec<u64>,
    binding: &'a Binding,
}

impl<'a> PartOf<'a> {
    pub(crate) fn new(ty: &TensorType, binding: &'a Binding) -> Self {
        Self { whole: ty.sizes(), local: binding.place.ty.sizes(), binding }
    }

    pub(crate) fn at(&self, position: usize) -> Part<'_> {
        let element_bytes = self.binding.place.ty.dtype.bytes();
        Part { whole: &self.whole, local: &self.local, splits: &self.binding.splits, position, element_bytes }
    }
}

/// The ONNX nodes that a step came from.
pub(crate) fn names_of(plan: &Plan, step: &Step) -> Vec<String> {
    let names = &plan.explanations.names;
    step.origin.iter().filter_map(|&name| names.get(name as usize)).cloned().collect()
}
