//! Where a program's tensors may be.

use std::collections::BTreeSet;

use super::{ARENA_ALIGN, sound_bytes};
use crate::expr::RankScalar;
use crate::plan::{Argument, Place, Plan, PlanState, Program};
use crate::text::count;
use crate::types::{Dim, ExtentId};

/// Sizes of the memories that a program's ranks have.
pub(super) struct Bounds<'a> {
    pub(super) ranks: &'a [u32],
    arena_bytes: u64,
    peer_arena_bytes: u64,
    /// Of the rank that has the least.
    weight_arena_bytes: u64,
    states: &'a [PlanState],
    extents: BTreeSet<ExtentId>,
}

impl<'a> Bounds<'a> {
    /// The program's ranks are sound.
    pub(super) fn new(plan: &'a Plan, program: &'a Program) -> Self {
        let arenas = &plan.manifest.weight_arena_bytes;
        let weights = program.ranks.iter().map(|&rank| arenas.get(rank as usize).copied().unwrap_or(0));
        Self {
            ranks: &program.ranks,
            arena_bytes: program.arena_bytes,
            peer_arena_bytes: program.peer_arena_bytes,
            weight_arena_bytes: weights.min().unwrap_or(0),
            states: &plan.manifest.states,
            extents: plan.manifest.states.iter().map(|state| state.extent).collect(),
        }
    }

    /// Whether a tensor is in memory that all ranks of the program have, and aligned there.
    pub(super) fn check(&self, place: &Place) -> Result<(), String> {
        let bytes = sound_bytes(&place.ty)?;
        for dim in &place.ty.dims {
            if let Dim::Bounded { extent, .. } = dim {
                self.check_extent(*extent)?;
            }
        }
        let (offset, size) = match &place.at {
            Argument::Arena { offset } => (*offset, self.arena_bytes),
            Argument::Weights { offset } => (*offset, self.weight_arena_bytes),
            Argument::Peer { rank, offset } => {
                self.check_peer(rank)?;
                (*offset, self.peer_arena_bytes)
            }
            Argument::State { state, offset } => {
                let found = self.states.get(*state as usize);
                let found = found.ok_or_else(|| format!("state {state} of {}", self.states.len()))?;
                (*offset, sound_bytes(&found.ty)?)
            }
            Argument::Extent { .. }
            | Argument::Epoch
            | Argument::TensorMap { .. }
            | Argument::Scalar { .. }
            | Argument::Fault { .. } => {
                return Err("a tensor that is not in memory".to_owned());
            }
        };
        if !offset.is_multiple_of(ARENA_ALIGN) {
            return Err(format!("offset {offset} is not a multiple of {ARENA_ALIGN}"));
        }
        if offset.checked_add(bytes).is_none_or(|end| end > size) {
            return Err(format!("{} at {offset} of {size} of the {}", count(bytes, "byte"), memory_name(&place.at)));
        }
        Ok(())
    }

    pub(super) fn check_extent(&self, extent: ExtentId) -> Result<(), String> {
        self.extents.contains(&extent).then_some(()).ok_or_else(|| format!("extent {} of no state", extent.0))
    }

    /// Whether a per-rank number has a value for each rank.
    pub(super) fn check_table(&self, scalar: &RankScalar) -> Result<(), String> {
        match scalar {
            RankScalar::ByRank(table) if table.len() != self.ranks.len() => {
                Err(format!("a table of {} values for {} ranks", table.len(), self.ranks.len()))
            }
            _ => Ok(()),
        }
    }

    fn check_peer(&self, rank: &RankScalar) -> Result<(), String> {
        self.check_table(rank)?;
        let values = (0..self.ranks.len()).filter_map(|position| rank.get(position));
        for value in values {
            let known = u32::try_from(value).is_ok_and(|value| self.ranks.binary_search(&value).is_ok());
            if !known {
                return Err(format!("peer {value} is not a rank of this program"));
            }
        }
        Ok(())
    }

    /// Whether a sound peer is the rank itself.
    pub(super) fn is_own(&self, peer: &RankScalar) -> bool {
        self.ranks.iter().enumerate().all(|(position, &rank)| peer.get(position) == Some(i64::from(rank)))
    }

    /// Whether no two ranks name the same peer.
    pub(super) fn is_injective(&self, peer: &RankScalar) -> bool {
        let values: BTreeSet<Option<i64>> = (0..self.ranks.len()).map(|position| peer.get(position)).collect();
        values.len() == self.ranks.len()
    }

    /// Whether two sound places share a byte on some rank.
    pub(super) fn overlap(&self, a: &Place, b: &Place) -> bool {
        let same_memory = match (&a.at, &b.at) {
            (Argument::Arena { .. }, Argument::Arena { .. }) | (Argument::Weights { .. }, Argument::Weights { .. }) => {
                true
            }
            // What one rank reads or writes in a peer's memory may be what the peer has as its own.
            (Argument::Peer { .. }, Argument::Peer { .. }) => true,
            (Argument::State { state: a, .. }, Argument::State { state: b, .. }) => a == b,
            _ => false,
        };
        let (a, b) = (range(a), range(b));
        same_memory && a.0.max(b.0) < a.1.min(b.1)
    }
}

/// First byte and end of a sound place in its memory.
pub(super) fn range(place: &Place) -> (u64, u64) {
    let first = offset(&place.at);
    (first, first.saturating_add(place.ty.bytes().unwrap_or(0)))
}

fn offset(at: &Argument) -> u64 {
    match at {
        Argument::Arena { offset }
        | Argument::Weights { offset }
        | Argument::Peer { offset, .. }
        | Argument::State { offset, .. }
        | Argument::TensorMap { offset, .. } => *offset,
        Argument::Extent { .. } | Argument::Epoch | Argument::Scalar { .. } | Argument::Fault { .. } => 0,
    }
}

/// The memory that a place is in, for readers of findings.
pub(super) fn memory_name(at: &Argument) -> &'static str {
    match at {
        Argument::Arena { .. } | Argument::TensorMap { .. } => "arena",
        Argument::Weights { .. } => "weight arena",
        Argument::Peer { .. } => "peer arena",
        Argument::State { .. } => "state",
        Argument::Extent { .. } | Argument::Epoch | Argument::Scalar { .. } | Argument::Fault { .. } => "argument",
    }
}
