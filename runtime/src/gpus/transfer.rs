//! Where an entry's inputs and outputs pass through page-locked memory, for one rank.

use std::ops::Range;

use planfile::plan::{Binding, Plan, PlanEntry};

use crate::error::RuntimeError;
use crate::pieces::is_repeated;

/// Parts begin at multiples of this many bytes.
const ALIGNMENT: usize = 256;

/// One port's part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    pub(super) program: usize,
    /// Position among the program's inputs or outputs.
    pub(super) binding: usize,
    /// Position of the rank among the stage's.
    pub(super) position: usize,
    /// In the staging memory.
    pub(super) range: Range<usize>,
}

/// All of an entry's for one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Transfers {
    pub(super) inputs: Vec<Transfer>,
    /// Without those that an earlier rank of the stage brings.
    pub(super) outputs: Vec<Transfer>,
    pub(super) input_bytes: usize,
    pub(super) output_bytes: usize,
}

impl Transfers {
    pub(super) fn new(plan: &Plan, entry: &PlanEntry, rank: u32) -> Result<Self, RuntimeError> {
        let mut transfers = Self::default();
        for &program in &entry.programs {
            let program = program as usize;
            let Some(described) = plan.programs.get(program) else {
                let what = format!("entry `{}` names program {program}, which is not there", entry.name);
                return Err(RuntimeError::Contradiction { what });
            };
            let Some(position) = described.ranks.iter().position(|&member| member == rank) else { continue };
            let add =
                |binding: usize, described: &Binding, list: &mut Vec<Transfer>, bytes: &mut usize| {
                    let end =
                        described.place.ty.bytes().and_then(|len| usize::try_from(len).ok()).and_then(|len| {
                            bytes.checked_add(len)?.checked_add(ALIGNMENT).map(|_| *bytes..*bytes + len)
                        });
                    let range = end.ok_or_else(|| RuntimeError::Contradiction {
                        what: format!("port {} does not fit in memory", described.port),
                    })?;
                    *bytes = range.end.next_multiple_of(ALIGNMENT);
                    list.push(Transfer { program, binding, position, range });
                    Ok::<(), RuntimeError>(())
                };
            for (binding, input) in described.inputs.iter().enumerate() {
                add(binding, input, &mut transfers.inputs, &mut transfers.input_bytes)?;
            }
            for (binding, output) in described.outputs.iter().enumerate() {
                if !is_repeated(&output.splits, position) {
                    add(binding, output, &mut transfers.outputs, &mut transfers.output_bytes)?;
                }
            }
        }
        Ok(transfers)
    }
}
