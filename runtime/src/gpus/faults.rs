//! Words that kernels mark when an index is out of range. They are in memory of the host, which kernels reach but only
//! touch where something is wrong: a run without faults has nothing to copy and nothing to clear.

use std::sync::Arc;

use planfile::plan::{Plan, Program};

use crate::error::StepError;
use cuda::CudaError;
use cuda::driver::{Address, Gpu, Pinned};

/// Bytes of a word.
const WORD: usize = size_of::<u32>();

/// A step that read an index that is out of range. In the order of what happens first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Fault {
    /// Index into the plan's programs.
    pub(super) program: usize,
    /// Index into the program's steps.
    pub(super) step: usize,
    pub(super) rank: u32,
}

/// One rank's words, as many as any of its programs has: programs run one after the other.
pub(super) struct Faults {
    words: Pinned,
    address: Address,
}

impl Faults {
    pub(super) fn new(gpu: &Arc<Gpu>, plan: &Plan, rank: u32) -> Result<Self, CudaError> {
        let words = Pinned::zeroed(gpu, most_words(plan, rank) * WORD)?;
        let address = words.address()?;
        Ok(Self { words, address })
    }

    /// Where the GPU finds a word.
    pub(super) fn word(&self, word: u32) -> Result<Address, StepError> {
        let offset = (word as usize).checked_mul(WORD).filter(|offset| *offset < self.words.bytes().len());
        let outside = || StepError::Contradiction { what: format!("there is no fault word {word}") };
        Ok(self.address + offset.ok_or_else(outside)? as Address)
    }

    /// The first step of these programs that marked its word since the last time this was asked. The GPU has nothing to
    /// do.
    ///
    /// # Errors
    /// [`CudaError::Contradiction`] where words are marked, and none of them is a step's.
    pub(super) fn take<'a>(
        &mut self,
        programs: impl Iterator<Item = (usize, &'a Program)>,
        rank: u32,
    ) -> Result<Option<Fault>, CudaError> {
        let found = first_marked(self.words.bytes(), programs);
        if found != Ok(None) {
            self.words.bytes_mut().fill(0);
        }
        Ok(found?.map(|(program, step)| Fault { program, step, rank }))
    }
}

/// Words of the rank's program that has most.
fn most_words(plan: &Plan, rank: u32) -> usize {
    let programs = plan.programs.iter().filter(|program| program.ranks.contains(&rank));
    programs.map(|program| program.faults().count()).max().unwrap_or(0)
}

/// The first step, in issue order, whose word is marked; with the number of its program.
fn first_marked<'a>(
    words: &[u8],
    mut programs: impl Iterator<Item = (usize, &'a Program)>,
) -> Result<Option<(usize, usize)>, CudaError> {
    if words.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    let is_marked = |word: u32| {
        let first = (word as usize).saturating_mul(WORD);
        words.get(first..first.saturating_add(WORD)).is_some_and(|word| word.iter().any(|&byte| byte != 0))
    };
    let found = programs.find_map(|(number, program)| {
        let (step, _) = program.faults().find(|&(_, word)| is_marked(word))?;
        Some((number, step))
    });
    let unowned = || CudaError::contradiction("a kernel marked a fault word that no step of the entry has");
    found.map(Some).ok_or_else(unowned)
}

#[cfg(test)]
mod tests {
    use planfile::plan::{Action, Argument, Step, StepCost};

    use super::*;

    /// Steps that have such words.
    fn program(words: &[Option<u32>]) -> Program {
        let step = |word: &Option<u32>| {
            let scalars = word.iter().map(|&word| Argument::Fault { word }).collect();
            let action = Action::Launch { kernel: 0, operands: vec![], results: vec![], scalars, launch: None };
            Step { action, stream: 0, waits: vec![], origin: vec![], cost: StepCost::default() }
        };
        Program {
            entry: 0,
            stage: 0,
            ranks: vec![0],
            inputs: vec![],
            outputs: vec![],
            steps: words.iter().map(step).collect(),
            arena_bytes: 0,
            peer_arena_bytes: 0,
            streams: 1,
        }
    }

    #[test]
    fn the_first_step_is_named_and_not_the_first_word() {
        let program = program(&[None, Some(2), Some(0), None, Some(1)]);
        let first = |words: [u32; 3]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            first_marked(&bytes, std::iter::once((7, &program)))
        };
        assert_eq!(first([0, 0, 0]), Ok(None));
        assert_eq!(first([0, 1, 0]), Ok(Some((7, 4))));
        assert_eq!(first([1, 1, 1]), Ok(Some((7, 1))));
    }

    #[test]
    fn words_that_are_not_there_are_not_marked() {
        assert_eq!(first_marked(&[], std::iter::once((0, &program(&[Some(0)])))), Ok(None));
    }

    #[test]
    fn a_word_of_no_step_is_a_contradiction() {
        let bytes: Vec<u8> = [0u32, 1].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let error = first_marked(&bytes, std::iter::once((0, &program(&[Some(0)])))).unwrap_err();
        assert!(
            matches!(&error, CudaError::Contradiction { what } if what.contains("no step of the entry")),
            "{error}"
        );
    }
}
