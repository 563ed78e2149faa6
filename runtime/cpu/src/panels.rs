//! Weights of products laid out the way tiles read them, so that nothing is packed at run time.
//!
//! The left side of a convolution's product becomes `[outputs / ROWS, depth, ROWS]`, the right side of a product
//! `[columns / COLUMNS, depth, COLUMNS]`, each padded with zeros. A compiler stores a weight so and puts the primitives
//! that undo it in front of the product, in one kernel: whoever executes these computes the same, and [`execute`]
//! recognises the kernel and reads the panels where they are.

use planfile::op::PadMode;
use planfile::{DType, Dim, Op, RankScalar, Spec, TensorType, infer};

use crate::error::CpuError;
use crate::view::{View, ViewMut};
use crate::{conv, dot};

/// Rows of a panel of the left side: whole tiles of every instruction set.
pub(crate) const ROWS: usize = 12;
/// Columns of a panel of the right side, likewise.
pub(crate) const COLUMNS: usize = 32;
/// Fewer elements are not worth a layout of their own.
const WORTH_IT: u64 = 1 << 12;

/// How a weight is brought into panels, and back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    /// From the weight to panels. A [`Op::Pad`] takes a zero as its second operand.
    pub pack: Vec<Op>,
    /// From panels to the weight.
    pub unpack: Vec<Op>,
    /// Of the panels.
    pub ty: TensorType,
}

/// The packing of the second operand of `op`, if it is a product that panels suit.
pub fn packing(op: &Op, weight: &TensorType) -> Option<Packing> {
    let sizes: Vec<u64> = weight.dims.iter().map(|dim| if let Dim::Static(size) = dim { *size } else { 0 }).collect();
    let elements = weight.elements()?;
    if weight.dtype != DType::F32 || elements < WORTH_IT {
        return None;
    }
    match op {
        Op::Conv { groups: 1, transposed: false, .. } => {
            let (&outputs, taps) = sizes.split_first()?;
            // Outputs as rows, their panels first.
            packed(weight, [outputs, taps.iter().product()], 0, ROWS as u64, [0, 2, 1])
        }
        Op::Dot { batch, contract, accumulate: DType::F32, out: DType::F32 } if batch.is_empty() => {
            match (contract.as_slice(), sizes.as_slice()) {
                ([(_, 0)], &[depth, columns]) => packed(weight, [depth, columns], 1, COLUMNS as u64, [1, 0, 2]),
                ([(_, 1)], &[columns, depth]) => packed(weight, [columns, depth], 0, COLUMNS as u64, [0, 2, 1]),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Cuts dimension `axis` of the weight, seen as a matrix, into panels; `order` brings the cut matrix's three dimensions
/// into the order `[panel, depth, within]`, and is its own inverse.
fn packed(weight: &TensorType, matrix: [u64; 2], axis: usize, width: u64, order: [u8; 3]) -> Option<Packing> {
    let [rows, columns] = matrix;
    let cut = matrix[axis];
    // Padding that outweighs the weight is no gain.
    if cut < width {
        return None;
    }
    let padded = cut.checked_next_multiple_of(width)?;
    let panels = padded / width;
    let reshape = |sizes: &[u64]| Op::Reshape { dims: sizes.iter().map(|&size| Dim::Static(size)).collect() };
    let cut_sizes = if axis == 0 { [panels, width, columns] } else { [rows, panels, width] };
    let whole = {
        let mut whole = [rows, columns];
        whole[axis] = padded;
        whole
    };
    let (mut pack, mut unpack) = (vec![reshape(&[rows, columns])], Vec::new());
    if padded > cut {
        let mut high = vec![0; 2];
        high[axis] = i64::try_from(padded - cut).ok()?;
        pack.push(Op::Pad { low: vec![0; 2], high, mode: PadMode::Constant });
    }
    let permutation = order.to_vec();
    pack.extend([reshape(&cut_sizes), Op::Transpose { permutation: permutation.clone() }]);
    unpack.extend([Op::Transpose { permutation }, reshape(&whole)]);
    if padded > cut {
        let starts = vec![RankScalar::Uniform(0); 2];
        unpack.push(Op::Slice { starts, steps: vec![1; 2], sizes: vec![rows, columns] });
    }
    unpack.push(reshape(&weight.sizes()));
    let sizes = order.map(|dim| cut_sizes[usize::from(dim)]);
    Some(Packing { pack, unpack, ty: TensorType::new(weight.dtype, &sizes) })
}

/// Executes a kernel whose specification unpacks its second operand for a product, without doing so. `None` for all
/// other kernels.
pub fn execute(spec: &Spec, operands: &[View<'_>], results: &mut [ViewMut<'_>]) -> Option<Result<(), CpuError>> {
    let (node, unpack) = spec.nodes.split_last()?;
    let ([x, panels], [result]) = (operands, results) else { return None };
    if unpack.is_empty() || !matches!(node.op, Op::Conv { .. } | Op::Dot { .. }) {
        return None;
    }
    // The chain from the second operand to the product's.
    let chain = (1u32..).zip(unpack).all(|(before, node)| node.operands == [before]);
    let last = unpack.len() as u32 + 1;
    if !chain || node.operands != [0, last] || spec.results != [last + 1] {
        return None;
    }
    let types = spec.types().ok()?;
    let weight = types.get(last as usize)?;
    let packing = packing(&node.op, weight)?;
    let same = packing.ty == *panels.ty && packing.unpack.iter().eq(unpack.iter().map(|node| &node.op));
    let fits = |ty: &TensorType, bytes: usize| ty.bytes() == Some(bytes as u64);
    let inferred = infer(&node.op, &[x.ty, weight]).ok()?;
    let sound = inferred.first() == Some(result.ty)
        && fits(x.ty, x.bytes.len())
        && fits(panels.ty, panels.bytes.len())
        && fits(result.ty, result.bytes.len());
    if !same || !sound || x.ty.dtype != DType::F32 || result.bytes.is_empty() {
        return None;
    }
    match &node.op {
        Op::Conv { window, .. } => Some(conv::conv_panels(window, x, panels, result)),
        Op::Dot { contract, .. } => Some(dot::dot_panels(contract, x, panels, result)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use planfile::op::Window;
    use planfile::{SpecNode, Tensor};

    use super::*;
    use crate::evaluate;

    /// Small integers, whose sums `f32` holds exactly in any order.
    fn numbers(sizes: &[u64], step: u64) -> Tensor {
        let count: u64 = sizes.iter().product();
        let elements: Vec<f32> = (0..count).map(|i| (i * step % 11) as f32 - 5.0).collect();
        Tensor::from_elements(sizes, &elements).unwrap()
    }

    fn chain(ops: &[Op], tensor: &Tensor) -> Tensor {
        let zero = Tensor::from_elements::<f32>(&[], &[0.0]).unwrap();
        ops.iter().fold(tensor.clone(), |tensor, op| {
            let operands = if matches!(op, Op::Pad { .. }) { vec![&tensor, &zero] } else { vec![&tensor] };
            evaluate(op, &operands).unwrap().remove(0)
        })
    }

    /// The kernel that unpacks its second operand for `op`.
    fn kernel(op: &Op, x: &TensorType, packing: &Packing) -> Spec {
        let last = packing.unpack.len() as u32 + 1;
        let node = |(position, op): (u32, &Op)| SpecNode { op: op.clone(), operands: vec![position] };
        let mut nodes: Vec<SpecNode> = (1..).zip(&packing.unpack).map(node).collect();
        nodes.push(SpecNode { op: op.clone(), operands: vec![0, last] });
        Spec { inputs: vec![x.clone(), packing.ty.clone()], nodes, results: vec![last + 1] }
    }

    #[track_caller]
    fn check(op: &Op, x: &Tensor, w: &Tensor) {
        let packing = packing(op, &w.ty).unwrap();
        let panels = chain(&packing.pack, w);
        assert_eq!(panels.ty, packing.ty);
        assert_eq!(chain(&packing.unpack, &panels), *w);
        let expected = evaluate(op, &[x, w]).unwrap().remove(0);
        let mut y = Tensor::zeroed(expected.ty.clone()).unwrap();
        let spec = kernel(op, &x.ty, &packing);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (operands, results) = ([View::from(x), View::from(&panels)], &mut [ViewMut::from(&mut y)]);
            pool.install(|| execute(&spec, &operands, results)).unwrap().unwrap();
            assert_eq!(y, expected);
        }
    }

    fn dot(contract: (u8, u8)) -> Op {
        Op::Dot { batch: vec![], contract: vec![contract], accumulate: DType::F32, out: DType::F32 }
    }

    fn conv(window: Window) -> Op {
        Op::Conv { window, groups: 1, transposed: false, output_pads: vec![0; 2] }
    }

    fn window(size: u64, stride: u64, pad: i64) -> Window {
        Window { sizes: vec![size; 2], strides: vec![stride; 2], dilations: vec![1; 2], pads: vec![(pad, pad); 2] }
    }

    #[test]
    fn products_read_panels_of_either_layout() {
        // With and without a last panel that is padded; few rows and many.
        for (rows, columns) in [(1, 96), (5, 70), (100, 64)] {
            let x = numbers(&[rows, 300], 3);
            check(&dot((1, 0)), &x, &numbers(&[300, columns], 7));
            check(&dot((1, 1)), &x, &numbers(&[columns, 300], 7));
            check(&dot((0, 0)), &numbers(&[300, rows], 3), &numbers(&[300, columns], 7));
        }
    }

    #[test]
    fn convolutions_read_panels() {
        for (outputs, size, stride, pad) in [(24, 3, 1, 1), (25, 3, 2, 0), (76, 1, 1, 0), (24, 5, 1, 2)] {
            let x = numbers(&[2, 64, 13, 37], 3);
            check(&conv(window(size, stride, pad)), &x, &numbers(&[outputs, 64, size, size], 7));
        }
    }

    #[test]
    fn other_kernels_are_left_alone() {
        let (x, w) = (numbers(&[4, 64], 3), numbers(&[64, 64], 7));
        let op = dot((1, 0));
        let packing = packing(&op, &w.ty).unwrap();
        let panels = chain(&packing.pack, &w);
        let mut y = Tensor::zeroed(TensorType::new(DType::F32, &[4, 64])).unwrap();
        let mut refused =
            |spec: &Spec| execute(spec, &[View::from(&x), View::from(&panels)], &mut [ViewMut::from(&mut y)]).is_none();
        let spec = kernel(&op, &x.ty, &packing);
        assert!(!refused(&spec));
        // Another layout, the plain product, and a result in the middle.
        let mut other = spec.clone();
        other.nodes[0].op = Op::Transpose { permutation: vec![0, 2, 1] };
        let plain = Spec::of(op, vec![x.ty.clone(), w.ty.clone()]).unwrap();
        let middle = Spec { results: vec![2], ..spec };
        assert!([other, plain, middle].iter().all(refused));
    }

    #[test]
    fn small_and_half_precision_weights_stay_as_they_are() {
        assert_eq!(packing(&dot((1, 0)), &TensorType::new(DType::F32, &[8, 64])), None);
        assert_eq!(packing(&dot((1, 0)), &TensorType::new(DType::F32, &[4096, 8])), None);
        assert_eq!(packing(&dot((1, 0)), &TensorType::new(DType::BF16, &[512, 512])), None);
        let grouped = Op::Conv { window: window(3, 1, 1), groups: 2, transposed: false, output_pads: vec![0; 2] };
        assert_eq!(packing(&grouped, &TensorType::new(DType::F32, &[64, 32, 3, 3])), None);
    }
}
