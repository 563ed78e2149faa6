//! How a kernel of ours is launched: formulas over its specification, so that every launch of it can be worked out
//! again, and the label that ties them to its machine code.
//!
//! A kernel is given a pointer for each input of the specification and each result, every per-rank number of the
//! specification, and where the specification checks indices, its fault word. Its grid follows from the shapes.

use std::collections::HashSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::expr::RankScalar;
use crate::plan::LaunchShape;
use crate::spec::Spec;
use crate::types::TensorType;

/// Most blocks along the first dimension of a grid, and along the others.
const GRID_MAX: [u64; 3] = [(1 << 31) - 1, 65_535, 65_535];

/// The launch of a kernel, whatever the sizes in its specification are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LaunchRule {
    /// Blocks in each dimension: the product of these, and at least one.
    pub grid: [Vec<Factor>; 3],
    /// Threads in each dimension: a literal of the code.
    pub block: [u32; 3],
    /// Dynamic shared memory: a literal of the code.
    pub shared_bytes: u32,
}

/// A factor of the number of blocks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Factor {
    /// A literal of the code, such as the blocks of a cluster.
    Count(u64),
    /// Tiles that cover the sizes: their product, divided by the elements of a tile and rounded up.
    Tiles { sizes: Vec<SizeOf>, tile: u64 },
}

/// A size in a specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SizeOf {
    /// By number: inputs, then results of nodes.
    pub value: u32,
    pub axis: u8,
}

impl Factor {
    fn evaluate(&self, types: &[TensorType]) -> Result<u64, String> {
        match self {
            Self::Count(count) => Ok(*count),
            Self::Tiles { sizes, tile } => {
                let mut product = 1u64;
                for SizeOf { value, axis } in sizes {
                    let ty = types.get(*value as usize).ok_or_else(|| format!("a size of value {value}"))?;
                    let dim = ty.dims.get(usize::from(*axis)).and_then(|dim| dim.fixed());
                    let size = dim.ok_or_else(|| format!("size {axis} of {ty} is not fixed"))?;
                    product = product.checked_mul(size).ok_or("sizes overflow")?;
                }
                if *tile == 0 { Err("tiles of nothing".to_owned()) } else { Ok(product.div_ceil(*tile)) }
            }
        }
    }
}

impl LaunchRule {
    /// The launch for a specification, the same on all ranks.
    ///
    /// # Errors
    /// A size that the specification does not have or fix, or a grid beyond what any launch takes.
    pub fn shape(&self, spec: &Spec) -> Result<LaunchShape, String> {
        let types = spec.types()?;
        let mut grid = [1u64; 3];
        for ((blocks, factors), most) in grid.iter_mut().zip(&self.grid).zip(GRID_MAX) {
            for factor in factors {
                *blocks = blocks.checked_mul(factor.evaluate(&types)?).ok_or("blocks overflow")?;
            }
            *blocks = (*blocks).max(1);
            if *blocks > most {
                return Err(format!("{blocks} blocks, a launch takes {most}"));
            }
        }
        let grid = grid.map(|blocks| RankScalar::Uniform(blocks.cast_signed()));
        Ok(LaunchShape { grid, block: self.block, shared_bytes: self.shared_bytes })
    }
}

/// Such as `grid ⌈%1[0] · %1[1] / 256⌉ · 2 block [128, 1, 1] shared 1024`.
impl fmt::Display for LaunchRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grid: Vec<String> = self.grid.iter().map(|factors| product(factors)).collect();
        let used = grid.iter().rposition(|blocks| blocks != "1").unwrap_or(0);
        write!(f, "grid {} block {:?} shared {}", grid[..=used].join(", "), self.block, self.shared_bytes)
    }
}

fn product<T: fmt::Display>(factors: &[T]) -> String {
    let factors: Vec<String> = factors.iter().map(ToString::to_string).collect();
    if factors.is_empty() { "1".to_owned() } else { factors.join(" · ") }
}

impl fmt::Display for Factor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Tiles { sizes, tile: 1 } => f.write_str(&product(sizes)),
            Self::Tiles { sizes, tile } => write!(f, "⌈{} / {tile}⌉", product(sizes)),
        }
    }
}

impl fmt::Display for SizeOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}[{}]", self.value, self.axis)
    }
}

impl Spec {
    /// Numbers that differ by rank, each once, in the order of the nodes: a kernel of ours is given them as scalars.
    pub fn rank_scalars(&self) -> Vec<RankScalar> {
        let mut seen = HashSet::new();
        let scalars = self.nodes.iter().flat_map(|node| node.op.rank_scalars());
        scalars.filter(|scalar| seen.insert(*scalar)).cloned().collect()
    }

    /// Whether it reads indices that may be out of range: a kernel of ours then reports one by its fault word.
    pub fn checks_indices(&self) -> bool {
        self.nodes.iter().any(|node| node.op.checks_indices())
    }
}

/// Bytes of a label.
pub const LABEL_BYTES: usize = 32;
/// The constant in the machine code of a kernel that holds its labels, one after the other.
pub const LABELS: &str = "planwright_labels";

/// A digest of what a kernel of ours is said to be. Its machine code holds it, so that neither the specification nor the
/// launch can be changed, nor the code exchanged, without changing code.
///
/// # Errors
/// As the codec.
pub fn label(spec: &Spec, symbol: &str, rule: &LaunchRule) -> Result<[u8; LABEL_BYTES], String> {
    codec::encode(&(spec, symbol, rule)).map(|bytes| *blake3::hash(&bytes).as_bytes())
}

/// The declaration of labels in CUDA C++.
pub fn declaration(labels: &[[u8; LABEL_BYTES]]) -> String {
    let bytes: Vec<String> = labels.iter().flatten().map(ToString::to_string).collect();
    format!("extern \"C\" __constant__ const unsigned char {LABELS}[] = {{{}}};\n", bytes.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::op::Op;
    use crate::types::{Dim, ExtentId};

    fn spec(sizes: &[u64]) -> Spec {
        Spec::of(Op::Softmax { axis: 1, log: false }, vec![TensorType::new(DType::F32, sizes)]).unwrap()
    }

    fn rule(factors: Vec<Factor>) -> LaunchRule {
        LaunchRule { grid: [factors, vec![], vec![]], block: [128, 1, 1], shared_bytes: 64 }
    }

    fn size(axis: u8) -> SizeOf {
        SizeOf { value: 1, axis }
    }

    fn tiles(tile: u64) -> Factor {
        Factor::Tiles { sizes: vec![size(0), size(1)], tile }
    }

    #[test]
    fn grids_follow_from_sizes() {
        let blocks = |factors: Vec<Factor>, sizes: &[u64]| rule(factors).shape(&spec(sizes)).map(|shape| shape.grid);
        let grid = |blocks: i64| Ok([blocks, 1, 1].map(RankScalar::Uniform));
        assert_eq!(blocks(vec![tiles(8)], &[5, 8]), grid(5));
        assert_eq!(blocks(vec![tiles(7)], &[5, 8]), grid(6));
        assert_eq!(blocks(vec![tiles(8), Factor::Count(3)], &[5, 8]), grid(15));
        assert_eq!(blocks(vec![tiles(8)], &[0, 8]), grid(1), "no launch is of no blocks");
        assert_eq!(blocks(vec![], &[5, 8]), grid(1));
    }

    #[test]
    fn rules_are_formulas_to_read() {
        let text = rule(vec![tiles(256), Factor::Count(2)]).to_string();
        assert_eq!(text, "grid ⌈%1[0] · %1[1] / 256⌉ · 2 block [128, 1, 1] shared 64");
        let plane = LaunchRule { grid: [vec![], vec![tiles(1)], vec![]], ..rule(vec![]) };
        assert_eq!(plane.to_string(), "grid 1, %1[0] · %1[1] block [128, 1, 1] shared 64");
    }

    #[test]
    fn what_no_launch_takes_is_an_error() {
        let refused = |factors: Vec<Factor>, sizes: &[u64]| rule(factors).shape(&spec(sizes)).unwrap_err();
        assert_eq!(refused(vec![tiles(0)], &[5, 8]), "tiles of nothing");
        assert_eq!(refused(vec![tiles(1)], &[1 << 16, 1 << 15]), "2147483648 blocks, a launch takes 2147483647");
        assert_eq!(refused(vec![Factor::Count(u64::MAX), Factor::Count(2)], &[5, 8]), "blocks overflow");
        let beyond = |value, axis| Factor::Tiles { sizes: vec![SizeOf { value, axis }], tile: 1 };
        assert_eq!(refused(vec![beyond(2, 0)], &[5, 8]), "a size of value 2");
        assert_eq!(refused(vec![beyond(0, 2)], &[5, 8]), "size 2 of f32[5, 8] is not fixed");
        let dims = vec![Dim::Bounded { capacity: 4, extent: ExtentId(0) }, Dim::Static(4)];
        let bounded = Spec::identity(TensorType { dtype: DType::F32, dims });
        assert!(rule(vec![beyond(0, 0)]).shape(&bounded).unwrap_err().contains("is not fixed"));
        let plane = LaunchRule { grid: [vec![], vec![Factor::Count(65_536)], vec![]], ..rule(vec![]) };
        assert_eq!(plane.shape(&spec(&[5, 8])).unwrap_err(), "65536 blocks, a launch takes 65535");
    }

    #[test]
    fn scalars_are_the_tables_of_the_specification() {
        let table = |first| RankScalar::ByRank(vec![first, first + 2]);
        let slice = |starts: Vec<RankScalar>| Op::Slice { starts, steps: vec![1, 1], sizes: vec![2, 2] };
        let mut spec = Spec::of(slice(vec![table(0), 0.into()]), vec![TensorType::new(DType::F32, &[4, 4])]).unwrap();
        spec.nodes.push(crate::SpecNode { op: slice(vec![table(1), table(0)]), operands: vec![0] });
        assert_eq!(spec.rank_scalars(), [table(0), table(1)]);
        assert!(!spec.checks_indices());
        let types = vec![TensorType::new(DType::F32, &[4]), TensorType::new(DType::I64, &[2])];
        assert!(Spec::of(Op::Gather { axis: 0 }, types).unwrap().checks_indices());
    }

    #[test]
    fn labels_tell_kernels_apart() {
        let rule = rule(vec![tiles(8)]);
        let own = label(&spec(&[5, 8]), "k", &rule).unwrap();
        assert_eq!(label(&spec(&[5, 8]), "k", &rule), Ok(own));
        let others = [
            label(&spec(&[8, 5]), "k", &rule),
            label(&spec(&[5, 8]), "l", &rule),
            label(&spec(&[5, 8]), "k", &LaunchRule { shared_bytes: 0, ..rule }),
        ];
        assert!(others.iter().all(|other| *other != Ok(own)));
        let text = declaration(&[[1; LABEL_BYTES], [200; LABEL_BYTES]]);
        assert!(text.contains("planwright_labels[] = {1,1,") && text.ends_with(",200};\n"), "{text}");
    }
}
