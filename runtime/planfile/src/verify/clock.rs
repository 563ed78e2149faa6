//! Happens-before within a program, as vector clocks over its streams.

use crate::plan::{EdgeKind, Program};

/// For each step, how far every stream is known to be when it starts.
pub(super) struct Clocks {
    streams: usize,
    stream: Vec<usize>,
    /// Per step and stream: steps below this index, of that stream, are over on the step's own rank.
    own: Vec<u32>,
    /// The same on all ranks of the program, as signals tell.
    all: Vec<u32>,
}

impl Clocks {
    /// The program's streams and edges are sound.
    pub(super) fn new(program: &Program) -> Self {
        let (streams, steps) = (program.streams as usize, program.steps.len());
        let mut clocks = Self {
            streams,
            stream: Vec::with_capacity(steps),
            own: vec![0; steps * streams],
            all: vec![0; steps * streams],
        };
        let mut last: Vec<Option<usize>> = vec![None; streams];
        for (position, step) in program.steps.iter().enumerate() {
            let stream = step.stream as usize;
            clocks.stream.push(stream);
            if let Some(before) = last[stream].replace(position) {
                clocks.follow(position, before, false);
            }
            for edge in &step.waits {
                clocks.follow(position, edge.from as usize, matches!(edge.kind, EdgeKind::Signal { .. }));
            }
        }
        clocks
    }

    /// Takes over what is known once `before` is over.
    fn follow(&mut self, position: usize, before: usize, signalled: bool) {
        for stream in 0..self.streams {
            let (from, to) = (before * self.streams + stream, position * self.streams + stream);
            let mut own = self.own[from];
            if stream == self.stream[before] {
                own = own.max(before as u32 + 1);
            }
            let all = if signalled { self.all[from].max(own) } else { self.all[from] };
            self.own[to] = self.own[to].max(own);
            self.all[to] = self.all[to].max(all);
        }
    }

    /// Whether step `a` is over when `b` starts, on the same rank.
    pub(super) fn ordered(&self, a: usize, b: usize) -> bool {
        a < b && self.own[b * self.streams + self.stream[a]] as usize > a
    }

    /// Whether step `a` is over on every rank when `b` starts on any.
    pub(super) fn ordered_between_ranks(&self, a: usize, b: usize) -> bool {
        a < b && self.all[b * self.streams + self.stream[a]] as usize > a
    }

    /// The stream of a step.
    pub(super) fn stream(&self, step: usize) -> usize {
        self.stream[step]
    }
}
