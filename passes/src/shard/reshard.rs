//! From one placement of a tensor to another: collectives and local slices.

use ir::{Graph, IrError, Mesh, Origin, Placement, Shard, Split, SubAxes, ValueId};
use planfile::op::{Groups, PadMode};
use planfile::{DType, Dim, Op, RankScalar, Scalar, Tensor, TensorType};

/// The graph of one stage while it grows, and where its ranks are on the mesh.
pub(crate) struct Stage<'a> {
    pub(crate) mesh: &'a Mesh,
    pub(crate) graph: Graph,
    /// Weights that sharding itself adds, such as the zero of padding.
    pub(crate) zero: &'a mut dyn FnMut(DType) -> (ir::WeightId, TensorType),
}

/// A local value and what it is a shard of.
#[derive(Clone, Debug)]
pub(crate) struct Local {
    pub(crate) value: ValueId,
    pub(crate) global: Vec<u64>,
    pub(crate) placement: Placement,
}

impl Stage<'_> {
    /// Emits an operation with one result of the given placement.
    pub(crate) fn emit(&mut self, op: Op, operands: &[ValueId], origin: &Origin, of: Shard) -> Result<Local, IrError> {
        let value = self.graph.add_one(op, operands, origin)?;
        self.annotate(value, &of)?;
        Ok(Local { value, global: of.global, placement: of.placement })
    }

    /// Notes what a value is a shard of, and checks that its type says the same. Replicated values are no shards.
    pub(crate) fn annotate(&mut self, value: ValueId, of: &Shard) -> Result<(), IrError> {
        let expected = of.placement.local_sizes(self.mesh, &of.global);
        if self.graph.ty(value).sizes() != expected {
            let why = format!("{value} is {} where its placement says {expected:?}", self.graph.ty(value));
            return Err(IrError::Graph { graph: self.graph.name().to_owned(), why });
        }
        let replicated = of.placement == Placement::replicated();
        self.graph.set_shard(value, (!replicated).then(|| of.clone()));
        Ok(())
    }

    /// Groups of this stage's ranks that differ only on these sub-axes.
    fn groups(&self, over: SubAxes) -> Groups {
        let inside = |group: &Vec<u32>| group.iter().all(|rank| self.graph.ranks().contains(rank));
        self.mesh.groups(over).into_iter().filter(inside).collect()
    }

    /// A number for each rank of the stage.
    pub(crate) fn by_rank(&self, number: impl Fn(u32) -> u64) -> RankScalar {
        RankScalar::from_table(self.graph.ranks().iter().map(|&rank| number(rank).cast_signed()).collect())
    }

    /// The value placed as asked.
    pub(crate) fn reshard(&mut self, from: Local, to: &Placement, origin: &Origin) -> Result<Local, IrError> {
        let mut now = from;
        if now.placement.partial != to.partial {
            now = self.combine(now, to, origin)?;
        }
        if let Some(moved) = self.exchange(&now, to, origin)? {
            now = moved;
        }
        let stale: Vec<Split> = now.placement.splits.iter().filter(|split| !self.refines(split, to)).cloned().collect();
        for split in stale {
            now = self.gather(now, &split, origin)?;
        }
        for split in &to.splits {
            let held = now.placement.split(usize::from(split.dim));
            if !held.is_some_and(|held| held.same_layout(split, self.mesh)) {
                now = self.cut(now, split, origin)?;
            }
        }
        now.placement = to.clone();
        Ok(now)
    }

    /// Whether the split is the wanted one, or a coarser one that local cuts refine.
    fn refines(&self, split: &Split, to: &Placement) -> bool {
        let Some(wanted) = to.split(usize::from(split.dim)) else { return false };
        wanted.same_layout(split, self.mesh) || self.is_prefix(split, wanted)
    }

    /// Whether each chunk of `wanted` lies in the same rank's chunk of `split`.
    fn is_prefix(&self, split: &Split, wanted: &Split) -> bool {
        let more = wanted.over.without(split.over);
        let contained = split.over.without(wanted.over).is_empty();
        let ordered = split.over.iter().max() < more.iter().min();
        let single = split.segments.len() == 1 && wanted.segments.len() == 1;
        let even = !split.is_padded(self.mesh) && !wanted.is_padded(self.mesh);
        contained && !more.is_empty() && ordered && single && even
    }

    /// Combines partial terms, scattering the result where that is what is wanted.
    fn combine(&mut self, from: Local, to: &Placement, origin: &Origin) -> Result<Local, IrError> {
        let Some((combine, over)) = from.placement.partial else {
            let why = "nothing turns whole values into partial terms".to_owned();
            return Err(IrError::Graph { graph: self.graph.name().to_owned(), why });
        };
        let groups = self.groups(over);
        let mut placement = Placement { partial: None, ..from.placement };
        let scattered = to.splits.iter().find(|split| {
            let free = placement.split(usize::from(split.dim)).is_none();
            split.over == over && free && split.segments.len() == 1 && !split.is_padded(self.mesh)
        });
        let op = if let Some(split) = scattered {
            placement.splits.push(split.clone());
            placement.splits.sort_by_key(|split| split.dim);
            Op::ReduceScatter { combine, axis: split.dim, groups }
        } else {
            Op::AllReduce { combine, groups }
        };
        self.emit(op, &[from.value], origin, Shard { global: from.global, placement })
    }

    /// Moves a split from one dimension to another in one exchange, where both are even.
    fn exchange(&mut self, from: &Local, to: &Placement, origin: &Origin) -> Result<Option<Local>, IrError> {
        let even = |split: &Split| split.segments.len() == 1 && !split.is_padded(self.mesh);
        for old in &from.placement.splits {
            let moved = to.splits.iter().find(|new| {
                let free = from.placement.split(usize::from(new.dim)).is_none();
                new.over == old.over && new.dim != old.dim && free && even(new) && even(old)
            });
            let Some(new) = moved else { continue };
            let mut placement = from.placement.clone();
            placement.splits.retain(|split| split.dim != old.dim);
            placement.splits.push(new.clone());
            placement.splits.sort_by_key(|split| split.dim);
            let op = Op::AllToAll { split: new.dim, concat: old.dim, groups: self.groups(old.over) };
            return self.emit(op, &[from.value], origin, Shard { global: from.global.clone(), placement }).map(Some);
        }
        Ok(None)
    }

    /// Makes a split dimension whole on every rank.
    fn gather(&mut self, from: Local, split: &Split, origin: &Origin) -> Result<Local, IrError> {
        let (dim, global) = (usize::from(split.dim), from.global.clone());
        let chunks = self.mesh.chunks(split.over);
        let mut placement = from.placement.clone();
        placement.splits.retain(|other| other.dim != split.dim);
        let of = Shard { global, placement };
        let gathered = self.graph.add_one(
            Op::AllGather { axis: split.dim, groups: self.groups(split.over) },
            &[from.value],
            origin,
        )?;
        if split.segments.len() == 1 && !split.is_padded(self.mesh) {
            self.annotate(gathered, &of)?;
            return Ok(Local { value: gathered, global: of.global, placement: of.placement });
        }
        // [.., chunks · local, ..] → [.., chunks, local, ..]: each segment's columns are the segment, padding last.
        let sizes = self.graph.ty(gathered).sizes();
        let local = sizes[dim] / chunks;
        let with = |middle: &[u64]| [&sizes[..dim], middle, &sizes[dim + 1..]].concat();
        let apart = self.graph.add_one(reshape(&with(&[chunks, local])), &[gathered], origin)?;
        let (mut parts, mut at) = (Vec::new(), 0);
        for segment in &split.segments {
            let reserved = segment.local(chunks);
            let columns = slice(&self.graph.ty(apart).sizes(), dim + 1, RankScalar::Uniform(at), reserved);
            let columns = self.graph.add_one(columns, &[apart], origin)?;
            let joined = self.graph.add_one(reshape(&with(&[chunks * reserved])), &[columns], origin)?;
            let part = if chunks * reserved == segment.size {
                joined
            } else {
                let exact = slice(&self.graph.ty(joined).sizes(), dim, RankScalar::Uniform(0), segment.size);
                self.graph.add_one(exact, &[joined], origin)?
            };
            parts.push(part);
            at += reserved.cast_signed();
        }
        match parts.as_slice() {
            [part] => {
                self.annotate(*part, &of)?;
                Ok(Local { value: *part, global: of.global, placement: of.placement })
            }
            parts => self.emit(Op::Concat { axis: split.dim }, parts, origin, of),
        }
    }

    /// Takes each rank's part of a dimension that is whole, or of a coarser split.
    fn cut(&mut self, from: Local, split: &Split, origin: &Origin) -> Result<Local, IrError> {
        let dim = usize::from(split.dim);
        let mut placement = from.placement.clone();
        let coarser = placement.split(dim).cloned();
        placement.splits.retain(|other| other.dim != split.dim);
        placement.splits.push(split.clone());
        placement.splits.sort_by_key(|split| split.dim);
        let of = Shard { global: from.global, placement };
        let mesh = self.mesh;
        let chunks = mesh.chunks(split.over);
        let (mut parts, mut at) = (Vec::new(), 0u64);
        for segment in &split.segments {
            let reserved = segment.local(chunks);
            // The last ranks may reach beyond the segment: it is padded first.
            let mut source = from.value;
            let mut offset = at;
            if reserved * chunks != segment.size {
                let exact =
                    slice(&self.graph.ty(source).sizes(), dim, RankScalar::Uniform(at.cast_signed()), segment.size);
                let exact = self.graph.add_one(exact, &[source], origin)?;
                source = self.pad(exact, dim, reserved * chunks - segment.size, origin)?;
                offset = 0;
            }
            let start = self.by_rank(|rank| {
                let first = mesh.chunk(split.over, rank) * reserved;
                let held =
                    coarser.as_ref().map_or(0, |coarser| mesh.chunk(coarser.over, rank) * coarser.local_size(mesh));
                offset + first - held
            });
            let part = slice(&self.graph.ty(source).sizes(), dim, start, reserved);
            parts.push(self.graph.add_one(part, &[source], origin)?);
            at += segment.size;
        }
        match parts.as_slice() {
            [part] => {
                self.annotate(*part, &of)?;
                Ok(Local { value: *part, global: of.global, placement: of.placement })
            }
            parts => self.emit(Op::Concat { axis: split.dim }, parts, origin, of),
        }
    }

    /// Appends zeros along a dimension.
    fn pad(&mut self, value: ValueId, dim: usize, amount: u64, origin: &Origin) -> Result<ValueId, IrError> {
        let ty = self.graph.ty(value).clone();
        let (zero, zero_ty) = (self.zero)(ty.dtype);
        let zero = self.graph.add_source(zero_ty, ir::ValueDef::Weight(zero));
        let mut high = vec![0; ty.rank()];
        high[dim] = amount.cast_signed();
        let op = Op::Pad { low: vec![0; ty.rank()], high, mode: PadMode::Constant };
        self.graph.add_one(op, &[value, zero], origin)
    }
}

/// A scalar zero.
pub(crate) fn zero_tensor(dtype: DType) -> Option<Tensor> {
    Tensor::from_bytes(TensorType::new(dtype, &[]), &Scalar::from_i64(dtype, 0).to_bytes())
}

pub(crate) fn reshape(sizes: &[u64]) -> Op {
    Op::Reshape { dims: sizes.iter().copied().map(Dim::Static).collect() }
}

/// `size` elements from `start` along `dim`, everything along the others.
pub(crate) fn slice(sizes: &[u64], dim: usize, start: RankScalar, size: u64) -> Op {
    let mut starts = vec![RankScalar::Uniform(0); sizes.len()];
    let mut taken = sizes.to_vec();
    (starts[dim], taken[dim]) = (start, size);
    Op::Slice { starts, steps: vec![1; sizes.len()], sizes: taken }
}
