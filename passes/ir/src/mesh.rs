//! The mesh of devices and how tensors lie on it.

use planfile::Combine;
use planfile::types::element_count;

/// A set of sub-axes of a mesh, as bits; bit 0 is the outermost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubAxes(pub u32);

impl SubAxes {
    pub const NONE: Self = Self(0);

    pub const fn of(sub_axis: usize) -> Self {
        Self(1 << sub_axis)
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub const fn contains(self, sub_axis: usize) -> bool {
        self.0 >> sub_axis & 1 == 1
    }

    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// From outermost to innermost.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..32).filter(move |&sub_axis| self.contains(sub_axis))
    }
}

/// An axis that the user names: `data`, `pipe` or `tensor`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MeshAxis {
    pub name: String,
    /// Prime factors of the size, outermost first: the sub-axes. Empty for size 1.
    pub factors: Vec<u32>,
}

impl MeshAxis {
    pub fn new(name: &str, size: u32) -> Self {
        let mut factors = Vec::new();
        let (mut rest, mut factor) = (size, 2);
        while rest > 1 {
            while rest.is_multiple_of(factor) {
                factors.push(factor);
                rest /= factor;
            }
            factor += 1;
        }
        Self { name: name.to_owned(), factors }
    }

    pub fn size(&self) -> u32 {
        self.factors.iter().product()
    }
}

/// Ranks in row-major order of the axes' coordinates, first axis outermost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mesh {
    pub axes: Vec<MeshAxis>,
}

impl Mesh {
    /// Number of devices.
    pub fn ranks(&self) -> u32 {
        self.sizes().iter().product()
    }

    /// Sizes of all sub-axes, outermost first.
    pub fn sizes(&self) -> Vec<u32> {
        self.axes.iter().flat_map(|axis| axis.factors.iter().copied()).collect()
    }

    /// The sub-axes of the named axis; none if there is no such axis.
    pub fn axis(&self, name: &str) -> SubAxes {
        let mut first = 0;
        for axis in &self.axes {
            if axis.name == name {
                return (first..first + axis.factors.len()).map(SubAxes::of).fold(SubAxes::NONE, SubAxes::union);
            }
            first += axis.factors.len();
        }
        SubAxes::NONE
    }

    /// All sub-axes of the mesh.
    pub fn all(&self) -> SubAxes {
        (0..self.sizes().len()).map(SubAxes::of).fold(SubAxes::NONE, SubAxes::union)
    }

    /// Number of chunks that a split over these sub-axes makes.
    pub fn chunks(&self, over: SubAxes) -> u64 {
        let sizes = self.sizes();
        over.iter().filter_map(|sub_axis| sizes.get(sub_axis)).map(|&size| u64::from(size)).product()
    }

    /// The chunk that `rank` holds of a split over these sub-axes: its coordinates there, outermost most significant.
    pub fn chunk(&self, over: SubAxes, rank: u32) -> u64 {
        let sizes = self.sizes();
        let (mut rest, mut coordinates) = (rank, vec![0; sizes.len()]);
        for (sub_axis, &size) in sizes.iter().enumerate().rev() {
            coordinates[sub_axis] = rest % size;
            rest /= size;
        }
        let within = over.iter().filter(|&sub_axis| sub_axis < sizes.len());
        within.fold(0, |chunk, sub_axis| chunk * u64::from(sizes[sub_axis]) + u64::from(coordinates[sub_axis]))
    }

    /// The groups of ranks that differ only in their coordinates on these sub-axes, members in order of their chunk.
    pub fn groups(&self, over: SubAxes) -> Vec<Vec<u32>> {
        let others = self.all().without(over);
        let mut groups = vec![Vec::new(); self.chunks(others) as usize];
        for rank in 0..self.ranks() {
            groups[self.chunk(others, rank) as usize].push(rank);
        }
        groups
    }
}

/// Part of a dimension that is split on its own: the query, key and value parts of a merged projection, for instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Segment {
    /// Elements, over all ranks.
    pub size: u64,
    /// Elements that stay together: a head's features, for instance. Divides `size`.
    pub unit: u64,
}

impl Segment {
    /// Elements of this segment on each of `chunks` ranks; the last ranks may hold padding.
    pub fn local(&self, chunks: u64) -> u64 {
        (self.size / self.unit.max(1)).div_ceil(chunks.max(1)) * self.unit
    }
}

/// A dimension that is split: each segment in as many chunks as the sub-axes have coordinates.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Split {
    pub dim: u8,
    pub over: SubAxes,
    /// In order; they make up the dimension.
    pub segments: Vec<Segment>,
}

/// A run of a split dimension on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First element in the whole dimension.
    pub global: u64,
    /// First element on the rank.
    pub local: u64,
    /// Elements that exist; the rest up to `reserved` is padding.
    pub len: u64,
    pub reserved: u64,
}

impl Split {
    /// One segment.
    pub fn simple(dim: u8, over: SubAxes, size: u64, unit: u64) -> Self {
        Self { dim, over, segments: vec![Segment { size, unit }] }
    }

    /// Size of the dimension on each rank, padding included.
    pub fn local_size(&self, mesh: &Mesh) -> u64 {
        let chunks = mesh.chunks(self.over);
        self.segments.iter().map(|segment| segment.local(chunks)).sum()
    }

    /// Whether some rank holds padding.
    pub fn is_padded(&self, mesh: &Mesh) -> bool {
        let chunks = mesh.chunks(self.over);
        self.segments.iter().any(|segment| segment.local(chunks) * chunks != segment.size)
    }

    /// Whether every rank holds the same elements at the same places under both: they may differ in units alone.
    pub fn same_layout(&self, other: &Self, mesh: &Mesh) -> bool {
        let chunks = mesh.chunks(self.over);
        let same = |(a, b): (&Segment, &Segment)| a.size == b.size && a.local(chunks) == b.local(chunks);
        let alike = self.dim == other.dim && self.over == other.over && self.segments.len() == other.segments.len();
        alike && self.segments.iter().zip(&other.segments).all(same)
    }

    /// What `rank` holds, a piece per segment.
    pub fn pieces(&self, mesh: &Mesh, rank: u32) -> Vec<Piece> {
        let (chunks, chunk) = (mesh.chunks(self.over), mesh.chunk(self.over, rank));
        let (mut global, mut local, mut pieces) = (0, 0, Vec::new());
        for segment in &self.segments {
            let reserved = segment.local(chunks);
            let start = (chunk * reserved).min(segment.size);
            let len = reserved.min(segment.size - start);
            pieces.push(Piece { global: global + start, local, len, reserved });
            global += segment.size;
            local += reserved;
        }
        pieces
    }
}

/// How a tensor lies on the mesh: replicated over every sub-axis that is not named here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Placement {
    /// By ascending dimension, sub-axes disjoint.
    pub splits: Vec<Split>,
    /// Each rank holds a term; combined over these sub-axes they are the tensor.
    pub partial: Option<(Combine, SubAxes)>,
}

impl Placement {
    pub fn replicated() -> Self {
        Self::default()
    }

    pub fn split(&self, dim: usize) -> Option<&Split> {
        self.splits.iter().find(|split| usize::from(split.dim) == dim)
    }

    /// All sub-axes that splits or partial sums use.
    pub fn used(&self) -> SubAxes {
        let splits = self.splits.iter().fold(SubAxes::NONE, |used, split| used.union(split.over));
        self.partial.map_or(splits, |(_, over)| splits.union(over))
    }

    /// Sizes on each rank of a tensor whose sizes over all ranks are `global`.
    pub fn local_sizes(&self, mesh: &Mesh, global: &[u64]) -> Vec<u64> {
        let mut sizes = global.to_vec();
        for split in &self.splits {
            if let Some(size) = sizes.get_mut(usize::from(split.dim)) {
                *size = split.local_size(mesh);
            }
        }
        sizes
    }

    /// Bytes-free check against a tensor's sizes: dimensions exist, segments add up, sub-axes are disjoint.
    ///
    /// # Errors
    /// A sentence that says what does not fit.
    pub fn check(&self, mesh: &Mesh, global: &[u64]) -> Result<(), String> {
        let mut used = self.partial.map_or(SubAxes::NONE, |(_, over)| over);
        let mut previous = None;
        for split in &self.splits {
            let size = global.get(usize::from(split.dim)).ok_or_else(|| format!("no dimension {}", split.dim))?;
            let total = split.segments.iter().try_fold(0u64, |total, segment| total.checked_add(segment.size));
            let units =
                split.segments.iter().all(|segment| segment.unit > 0 && segment.size.is_multiple_of(segment.unit));
            if total != Some(*size) || !units || split.segments.is_empty() {
                return Err(format!("segments of dimension {} do not make up {size}", split.dim));
            }
            if previous >= Some(split.dim) {
                return Err("splits are not in order of their dimensions".to_owned());
            }
            if !used.intersection(split.over).is_empty() || split.over.is_empty() {
                return Err(format!("dimension {} uses no sub-axis, or one in use", split.dim));
            }
            previous = Some(split.dim);
            used = used.union(split.over);
        }
        if !used.without(mesh.all()).is_empty() {
            return Err("a sub-axis is not of the mesh".to_owned());
        }
        element_count(&self.local_sizes(mesh, global)).map(|_| ()).ok_or_else(|| "local sizes overflow".to_owned())
    }
}
