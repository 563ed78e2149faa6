//! Memory of a virtual device: one arena for activations, one for weights, and typed windows into both.

use cpu::{View, ViewMut};
use planfile::plan::{Argument, Place};
use planfile::{Buffer, TensorType};

use crate::error::{RuntimeError, StepError};

/// Zeros, or an error where the machine has no room for them.
pub(crate) fn allocate(bytes: u64, what: impl FnOnce() -> String) -> Result<Buffer, RuntimeError> {
    let data = usize::try_from(bytes).ok().and_then(Buffer::try_zeroed);
    data.ok_or_else(|| RuntimeError::Memory { what: what(), bytes })
}

/// A rank's memory while it executes a program.
pub(crate) struct Memory<'a> {
    pub(crate) arena: &'a mut [u8],
    pub(crate) weights: &'a [u8],
}

/// A tensor's bytes in one of the arenas.
#[derive(Clone, Copy)]
enum Range {
    Arena { first: usize, end: usize },
    Weights { first: usize, end: usize },
}

fn contradiction(what: String) -> StepError {
    StepError::Contradiction { what }
}

impl Memory<'_> {
    fn range(&self, place: &Place) -> Result<Range, StepError> {
        let (offset, available) = match &place.at {
            Argument::Arena { offset } => (*offset, self.arena.len()),
            Argument::Weights { offset } => (*offset, self.weights.len()),
            Argument::Peer { .. } => return Err(StepError::Unsupported { what: "memory of a peer" }),
            Argument::State { .. } => return Err(StepError::Unsupported { what: "state between runs" }),
            Argument::Extent { .. }
            | Argument::Epoch
            | Argument::TensorMap { .. }
            | Argument::Scalar { .. }
            | Argument::Fault { .. } => {
                return Err(contradiction("a tensor is at a place that holds none".to_owned()));
            }
        };
        let end = place.ty.bytes().and_then(|bytes| offset.checked_add(bytes)).unwrap_or(u64::MAX);
        // The verifier has checked this; here it keeps slices from panicking.
        if end > available as u64 {
            return Err(contradiction(format!("{} at {offset} ends outside of {available} bytes", place.ty)));
        }
        let (first, end) = (offset as usize, end as usize);
        Ok(match place.at {
            Argument::Weights { .. } => Range::Weights { first, end },
            _ => Range::Arena { first, end },
        })
    }

    /// The bytes of a tensor, to read.
    pub(crate) fn read(&self, place: &Place) -> Result<&[u8], StepError> {
        match self.range(place)? {
            Range::Arena { first, end } => Ok(&self.arena[first..end]),
            Range::Weights { first, end } => Ok(&self.weights[first..end]),
        }
    }

    /// The bytes of a tensor, to write.
    pub(crate) fn write(&mut self, place: &Place) -> Result<&mut [u8], StepError> {
        match self.range(place)? {
            Range::Arena { first, end } => Ok(&mut self.arena[first..end]),
            Range::Weights { .. } => Err(contradiction("a step writes to weights".to_owned())),
        }
    }

    /// Windows on all operands and results of a step at once.
    ///
    /// Results must not overlap each other; operands may overlap anything: those that share bytes with a result are
    /// copied first, so a step reads what was there before it.
    pub(crate) fn step<T>(
        &mut self,
        operands: &[Place],
        results: &[Place],
        run: impl FnOnce(&[View<'_>], &mut [ViewMut<'_>]) -> Result<T, StepError>,
    ) -> Result<T, StepError> {
        let mut targets = Vec::with_capacity(results.len());
        for (position, place) in results.iter().enumerate() {
            match self.range(place)? {
                Range::Arena { first, end } => targets.push((first, end, position)),
                Range::Weights { .. } => return Err(contradiction("a step writes to weights".to_owned())),
            }
        }
        targets.sort_unstable();
        let sources = operands.iter().map(|place| self.range(place)).collect::<Result<Vec<_>, _>>()?;
        let copies: Vec<Option<Buffer>> = sources
            .iter()
            .map(|source| match *source {
                Range::Arena { first, end } if targets.iter().any(|&(from, to, _)| first < to && from < end) => {
                    Some(Buffer::from_bytes(&self.arena[first..end]))
                }
                _ => None,
            })
            .collect();
        let mut views: Vec<Option<ViewMut<'_>>> = results.iter().map(|_| None).collect();
        let mut gaps: Vec<(usize, &[u8])> = Vec::with_capacity(targets.len() + 1);
        let (mut rest, mut position) = (&mut *self.arena, 0);
        for (first, end, result) in targets {
            if first == end {
                views[result] = Some(ViewMut { ty: &results[result].ty, bytes: &mut [] });
                continue;
            }
            let before = first.checked_sub(position);
            let before = before.ok_or_else(|| contradiction("results of a step overlap".to_owned()))?;
            let (gap, tail) = rest.split_at_mut(before);
            let (target, tail) = tail.split_at_mut(end - first);
            gaps.push((position, gap));
            views[result] = Some(ViewMut { ty: &results[result].ty, bytes: target });
            (rest, position) = (tail, end);
        }
        gaps.push((position, rest));
        let mut inputs = Vec::with_capacity(operands.len());
        for ((place, source), copy) in operands.iter().zip(sources).zip(&copies) {
            let bytes = match (source, copy) {
                (_, Some(copy)) => copy.bytes(),
                (Range::Weights { first, end }, None) => &self.weights[first..end],
                (Range::Arena { first, end }, None) if first == end => &[],
                (Range::Arena { first, end }, None) => within(&gaps, first, end)?,
            };
            inputs.push(View { ty: &place.ty, bytes });
        }
        let mut outputs: Vec<ViewMut<'_>> = views.into_iter().flatten().collect();
        run(&inputs, &mut outputs)
    }
}

/// Bytes `first..end` of the arena, of which `gaps` are what no result covers, by ascending offset.
fn within<'a>(gaps: &[(usize, &'a [u8])], first: usize, end: usize) -> Result<&'a [u8], StepError> {
    let index = gaps.partition_point(|&(offset, _)| offset <= first).checked_sub(1);
    let found = index.and_then(|index| {
        let (offset, bytes) = gaps[index];
        bytes.get(first - offset..end - offset)
    });
    found.ok_or_else(|| contradiction(format!("an operand at {first}..{end} lies across a result")))
}

/// Bytes that a tensor takes, for copies on the host.
pub(crate) fn byte_len(ty: &TensorType) -> Result<usize, StepError> {
    let bytes = ty.bytes().and_then(|bytes| usize::try_from(bytes).ok());
    bytes.ok_or_else(|| contradiction(format!("{ty} does not fit in memory")))
}

#[cfg(test)]
mod tests {
    use planfile::DType;

    use super::*;

    fn arena(offset: u64, len: u64) -> Place {
        Place { ty: TensorType::new(DType::U8, &[len]), at: Argument::Arena { offset } }
    }

    fn bytes() -> Vec<u8> {
        (0..32).collect()
    }

    #[test]
    fn operands_are_found_between_results() {
        let (mut arena_bytes, weights) = (bytes(), [99u8; 8]);
        let mut memory = Memory { arena: &mut arena_bytes, weights: &weights };
        let weight = Place { ty: TensorType::new(DType::U8, &[2]), at: Argument::Weights { offset: 4 } };
        let operands = [arena(8, 4), arena(0, 2), arena(8, 2), weight, arena(31, 0)];
        // In the order of the plan, not of memory.
        let results = [arena(16, 8), arena(2, 3)];
        memory
            .step(&operands, &results, |inputs, outputs| {
                let read: Vec<&[u8]> = inputs.iter().map(|input| input.bytes).collect();
                assert_eq!(read, [&[8u8, 9, 10, 11][..], &[0, 1], &[8, 9], &[99, 99], &[]]);
                outputs[0].bytes.fill(200);
                outputs[1].bytes.fill(100);
                Ok(())
            })
            .unwrap();
        assert_eq!(arena_bytes[..8], [0, 1, 100, 100, 100, 5, 6, 7]);
        assert_eq!(arena_bytes[16..25], [200, 200, 200, 200, 200, 200, 200, 200, 24]);
    }

    #[test]
    fn operands_in_place_are_what_was_there_before() {
        let mut arena_bytes = bytes();
        let mut memory = Memory { arena: &mut arena_bytes, weights: &[] };
        memory
            .step(&[arena(4, 4), arena(6, 4)], &[arena(4, 4)], |inputs, outputs| {
                outputs[0].bytes.fill(0);
                for (target, (a, b)) in outputs[0].bytes.iter_mut().zip(inputs[0].bytes.iter().zip(inputs[1].bytes)) {
                    *target = a + b;
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(arena_bytes[4..9], [10, 12, 14, 16, 8]);
    }

    #[test]
    fn places_outside_of_the_arena_are_refused() {
        let mut arena_bytes = bytes();
        let mut memory = Memory { arena: &mut arena_bytes, weights: &[] };
        for place in [arena(30, 3), arena(u64::MAX, 2), arena(0, u64::MAX)] {
            assert!(matches!(memory.read(&place), Err(StepError::Contradiction { .. })), "{place:?}");
            assert!(memory.step(&[], std::slice::from_ref(&place), |_, _| Ok(())).is_err());
        }
        let overlapping = [arena(0, 4), arena(3, 4)];
        assert!(memory.step(&[], &overlapping, |_, _| Ok(())).is_err());
        let weight = Place { ty: TensorType::new(DType::U8, &[0]), at: Argument::Weights { offset: 0 } };
        assert!(memory.write(&weight).is_err());
    }

    #[test]
    fn memory_that_no_machine_has_is_an_error() {
        let error = allocate(1 << 62, || "the arena of rank 0".to_owned()).unwrap_err();
        assert!(error.to_string().contains("the arena of rank 0 takes 4611686018427387904 bytes"), "{error}");
    }
}
