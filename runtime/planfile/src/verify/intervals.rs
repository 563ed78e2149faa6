//! What happened to each byte of a memory: who wrote it last, and who has read it since.

use std::collections::BTreeMap;

use crate::dtype::DType;

/// Who touches memory: a step, or a group of tasks inside a persistent step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    /// `None` for what is there before the first step.
    pub(super) step: Option<usize>,
    pub(super) unit: usize,
    /// Whether the memory may be another rank's.
    pub(super) foreign: bool,
}

/// Decides which accesses follow one another, and which readers need not be remembered.
pub(super) trait Order {
    /// Whether `a` is over when `b` starts. `a` comes first in the list of steps, or is of the same step.
    fn ordered(&self, a: Access, b: Access) -> bool;
    /// Whether everything that follows `later` follows `earlier` too.
    fn supersedes(&self, later: Access, earlier: Access) -> bool;
}

struct Segment {
    end: u64,
    dtype: DType,
    writer: Access,
    /// All that the writer wrote with these bytes.
    written: (u64, u64),
    /// Since it was written.
    readers: Vec<Access>,
}

/// The bytes of one memory that were written.
#[derive(Default)]
pub(super) struct Intervals {
    segments: BTreeMap<u64, Segment>,
}

type Range = (u64, u64);

impl Intervals {
    /// # Errors
    /// Bytes never written, written as another type, or written by a step that is not ordered before.
    pub(super) fn read(&mut self, range: Range, dtype: DType, by: Access, order: &impl Order) -> Result<(), String> {
        self.split(range.0);
        self.split(range.1);
        let mut position = range.0;
        for (&first, segment) in self.segments.range_mut(range.0..range.1) {
            if first > position {
                break;
            }
            position = segment.end;
            if !order.ordered(segment.writer, by) {
                return Err(conflict("reads", range, "writes", segment.writer));
            }
            if segment.dtype != dtype {
                return Err(format!("reads {} as {dtype}, which was written as {}", show(range), segment.dtype));
            }
            // Whoever reads the same bytes again is there already: outputs may be one value under many names.
            if segment.readers.last() != Some(&by) {
                segment.readers.retain(|&earlier| !order.supersedes(by, earlier));
                segment.readers.push(by);
            }
        }
        let missing = || format!("reads {}, of which {} was never written", show(range), show((position, range.1)));
        (position >= range.1).then_some(()).ok_or_else(missing)
    }

    /// # Errors
    /// Bytes that a step which is not ordered before reads or writes.
    pub(super) fn write(&mut self, range: Range, dtype: DType, by: Access, order: &impl Order) -> Result<(), String> {
        if range.0 >= range.1 {
            return Ok(());
        }
        self.split(range.0);
        self.split(range.1);
        for segment in self.segments.range(range.0..range.1).map(|(_, segment)| segment) {
            if !order.ordered(segment.writer, by) {
                return Err(conflict("writes", range, "writes", segment.writer));
            }
            if let Some(&reader) = segment.readers.iter().find(|&&reader| !order.ordered(reader, by)) {
                return Err(conflict("writes", range, "reads", reader));
            }
        }
        let gone: Vec<u64> = self.segments.range(range.0..range.1).map(|(&first, _)| first).collect();
        for first in gone {
            self.segments.remove(&first);
        }
        let segment = Segment { end: range.1, dtype, writer: by, written: range, readers: Vec::new() };
        self.segments.insert(range.0, segment);
        Ok(())
    }

    /// Whether something was written in the range.
    pub(super) fn touched(&self, range: Range) -> bool {
        let before = self.segments.range(..range.1).next_back();
        range.0 < range.1 && before.is_some_and(|(_, segment)| segment.end > range.0)
    }

    /// A last write to the range that reaches beyond it, as the next owner of reused memory would make.
    pub(super) fn overwritten(&self, range: Range) -> Option<Access> {
        let mut segments = self.segments.range(range.0..range.1).map(|(_, segment)| segment);
        let beyond = segments.find(|segment| segment.written.0 < range.0 || segment.written.1 > range.1);
        beyond.map(|segment| segment.writer)
    }

    /// Makes a segment begin at `position` if one spans it.
    fn split(&mut self, position: u64) {
        let Some((_, segment)) = self.segments.range_mut(..position).next_back() else { return };
        if segment.end > position {
            let rest = Segment { readers: segment.readers.clone(), ..*segment };
            segment.end = position;
            self.segments.insert(position, rest);
        }
    }
}

fn show(range: Range) -> String {
    format!("{:#x}..{:#x}", range.0, range.1)
}

fn conflict(does: &str, range: Range, other_does: &str, other: Access) -> String {
    let who = other.step.map_or("the caller".to_owned(), |step| format!("step #{step}"));
    let ranks = if other.foreign { " on another rank" } else { "" };
    format!("{does} {}, which {who} {other_does}{ranks}, with no order between them", show(range))
}
