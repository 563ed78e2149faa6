//! Batched products of tensors with general dimensions.
//!
//! Each operand is a stack of matrices under strides where its dimensions permit it, otherwise it is packed first.

use std::borrow::Cow;

use planfile::{DType, Expr, Tensor, TensorType};

use crate::error::CpuError;
use crate::number::with_wrapping;
use crate::pointwise::pointwise;
use crate::product::{Job, Left, Matrix, Product, RightPanels};
use crate::strided::{Layout, copy, strides};
use crate::view::{View, ViewMut, product, read, sizes, slice, slice_mut, write};

/// `result[batch.., free of a.., free of b..] = sum over contracted dimensions of a · b`.
pub(crate) fn dot(
    batch: &[(u8, u8)],
    contract: &[(u8, u8)],
    accumulate: DType,
    a: &View<'_>,
    b: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let axes = |pick: fn(&(u8, u8)) -> u8, pairs: &[(u8, u8)]| -> Vec<usize> {
        pairs.iter().map(|pair| usize::from(pick(pair))).collect()
    };
    let (left, right) = (|pair: &(u8, u8)| pair.0, |pair: &(u8, u8)| pair.1);
    let accumulate = accumulate.accumulator();
    let (converted_a, converted_b) = (converted(a, accumulate)?, converted(b, accumulate)?);
    let a = converted_a.as_ref().map_or(*a, View::from);
    let b = converted_b.as_ref().map_or(*b, View::from);
    let run = |result: &mut ViewMut<'_>| {
        with_wrapping!(accumulate, T => {
            let a = Stack::<T>::new(&a, &axes(left, batch), &axes(left, contract))?;
            let b = Stack::<T>::new(&b, &axes(right, batch), &axes(right, contract))?;
            write(result, |dst: &mut [T]| {
                multiply(&a, &b, dst);
                Ok(())
            })
        })
    };
    if result.ty.dtype.accumulator() == accumulate {
        return run(result);
    }
    let mut sums = zeros(result.ty, accumulate)?;
    run(&mut ViewMut::from(&mut sums))?;
    let expr = Expr::operand(0).cast(result.ty.dtype);
    pointwise(&expr, 0, &[View::from(&sums)], result)
}

/// Zeros in the shape of a tensor.
fn zeros(like: &TensorType, dtype: DType) -> Result<Tensor, CpuError> {
    let ty = TensorType { dtype, dims: like.dims.clone() };
    let bytes = ty.bytes().unwrap_or(u64::MAX);
    Tensor::zeroed(ty.clone()).ok_or(CpuError::Memory { op: "dot", ty, bytes })
}

/// An operand in the type that its products are accumulated in; `None` if it is read in that type anyway.
fn converted(operand: &View<'_>, accumulate: DType) -> Result<Option<Tensor>, CpuError> {
    if operand.ty.dtype.accumulator() == accumulate {
        return Ok(None);
    }
    let mut converted = zeros(operand.ty, accumulate)?;
    pointwise(&Expr::operand(0).cast(accumulate), 0, &[*operand], &mut ViewMut::from(&mut converted))?;
    Ok(Some(converted))
}

/// As [`dot`] in `f32` without batch, with the right side in panels.
pub(crate) fn dot_panels(
    contract: &[(u8, u8)],
    a: &View<'_>,
    panels: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let a = Stack::<f32>::new(a, &[], &contract.iter().map(|pair| usize::from(pair.0)).collect::<Vec<_>>())?;
    let data: &[f32] = slice(panels.bytes, DType::F32)?;
    let c: &mut [f32] = slice_mut(result.bytes, DType::F32)?;
    let [m, k] = [a.free.size, a.contract.size];
    let size = [m, c.len() / m.max(1), k];
    f32::multiply(size, &mut [Job { a: Left::Matrix(a.matrix(0)), b: RightPanels { data, depth: k }, c }]);
    Ok(())
}

fn multiply<T: Product>(a: &Stack<'_, T>, b: &Stack<'_, T>, dst: &mut [T]) {
    let (m, n, k) = (a.free.size, b.free.size, a.contract.size);
    if m * n == 0 {
        return;
    }
    let jobs = dst.chunks_exact_mut(m * n).enumerate();
    let mut jobs: Vec<Job<'_, T, Matrix<'_, T>>> = jobs
        .map(|(position, c)| Job { a: Left::Matrix(a.matrix(position)), b: b.matrix(position).transposed(), c })
        .collect();
    T::multiply([m, n, k], &mut jobs);
}

/// Dimensions that act as one.
#[derive(Clone, Copy, Debug)]
struct Group {
    size: usize,
    stride: usize,
}

impl Group {
    /// `None` if no single stride visits the axes' elements in row-major order.
    fn new(sizes: &[usize], strides: &[isize], axes: &[usize]) -> Option<Self> {
        let mut group = Self { size: 1, stride: 1 };
        for &axis in axes.iter().rev() {
            let (size, stride) = (sizes[axis], strides[axis].cast_unsigned());
            match (size, group.size) {
                (1, _) => {}
                (_, 1) => group = Self { size, stride },
                _ if group.size.checked_mul(group.stride) == Some(stride) => group.size *= size,
                _ => return None,
            }
        }
        Some(group)
    }
}

/// An operand as matrices `[free, contract]`, one for each index of the batch.
struct Stack<'a, T: Clone> {
    data: Cow<'a, [T]>,
    /// Distance between matrices.
    step: usize,
    free: Group,
    contract: Group,
}

impl<'a, T: Product> Stack<'a, T> {
    fn new(view: &View<'a>, batch: &[usize], contract: &[usize]) -> Result<Self, CpuError> {
        let sizes = sizes(view.ty);
        let free: Vec<usize> =
            (0..sizes.len()).filter(|axis| !batch.contains(axis) && !contract.contains(axis)).collect();
        let data = read(view)?;
        let size_of = |axes: &[usize]| product(&axes.iter().map(|&axis| sizes[axis]).collect::<Vec<_>>());
        let groups = |sizes: &[usize], strides: &[isize], axes: [&[usize]; 3]| {
            let [batch, free, contract] = axes.map(|axes| Group::new(sizes, strides, axes));
            Some((batch?, free?, contract?))
        };
        if data.is_empty() {
            let group = |axes: &[usize]| Group { size: size_of(axes), stride: 1 };
            return Ok(Self { data, step: 0, free: group(&free), contract: group(contract) });
        }
        let packed = strides(&sizes);
        if let Some((stack, free, contract)) = groups(&sizes, &packed, [batch, &free, contract]) {
            return Ok(Self { data, step: stack.stride, free, contract });
        }
        let order = [batch, &free, contract].concat();
        let new_sizes: Vec<usize> = order.iter().map(|&axis| sizes[axis]).collect();
        let from = Layout { offset: 0, strides: order.iter().map(|&axis| packed[axis]).collect() };
        let to = Layout { offset: 0, strides: strides(&new_sizes) };
        let mut copied = vec![T::ZERO; data.len()];
        copy(&new_sizes, &mut copied, &to, &data, &from);
        let (rows, depth) = (size_of(&free), size_of(contract));
        Ok(Self {
            data: Cow::Owned(copied),
            step: rows * depth,
            free: Group { size: rows, stride: depth },
            contract: Group { size: depth, stride: 1 },
        })
    }

    fn matrix(&self, position: usize) -> Matrix<'_, T> {
        let data = self.data.get(position * self.step..).unwrap_or_default();
        Matrix { data, rows: self.free.stride, columns: self.contract.stride }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use planfile::{DType, Op, Tensor};
    use proptest::prelude::*;

    use crate::evaluate;

    fn dot(batch: &[(u8, u8)], contract: &[(u8, u8)], accumulate: DType, out: DType) -> Op {
        Op::Dot { batch: batch.to_vec(), contract: contract.to_vec(), accumulate, out }
    }

    #[test]
    fn unsigned_times_signed_in_32_bits() {
        let a = Tensor::from_elements(&[1, 2], &[200u8, 255]).unwrap();
        let b = Tensor::from_elements(&[2, 1], &[-100i8, 127]).unwrap();
        let y = evaluate(&dot(&[], &[(1, 0)], DType::I32, DType::I32), &[&a, &b]).unwrap();
        assert_eq!(y[0].elements::<i32>().unwrap(), [200 * -100 + 255 * 127]);
        let y = evaluate(&dot(&[], &[(1, 0)], DType::I32, DType::F32), &[&a, &b]).unwrap();
        assert_eq!(y[0].elements::<f32>().unwrap(), [12385.0]);
    }

    #[test]
    fn halves_accumulate_in_single_precision() {
        let a = Tensor::from_elements(&[1, 512], &[bf16::ONE; 512]).unwrap();
        let b = Tensor::from_elements(&[512, 1], &[bf16::ONE; 512]).unwrap();
        // A sum in bf16 would stop at 256.
        let y = evaluate(&dot(&[], &[(1, 0)], DType::F32, DType::BF16), &[&a, &b]).unwrap();
        assert_eq!(y[0].elements::<bf16>().unwrap(), [bf16::from_f32(512.0)]);
    }

    #[test]
    fn an_empty_contraction_gives_zeros() {
        let a = Tensor::from_elements::<f32>(&[2, 0], &[]).unwrap();
        let b = Tensor::from_elements::<f32>(&[0, 3], &[]).unwrap();
        let y = evaluate(&dot(&[], &[(1, 0)], DType::F32, DType::F32), &[&a, &b]).unwrap();
        assert_eq!(y[0].elements::<f32>().unwrap(), [0.0; 6]);
    }

    fn integers(sizes: &[u64], step: i64) -> Vec<i64> {
        let count: u64 = sizes.iter().product();
        (0..count as i64).map(|i| (i * step) % 13 - 6).collect()
    }

    proptest! {
        /// Dimensions of both operands in any order: two batch, two contracted, one or two free ones.
        #[test]
        fn matches_the_sum_it_stands_for(
            s in prop::collection::vec(prop_oneof![1 => 0u64..2, 6 => 1u64..6], 7),
            a_order in Just([0usize, 1, 2, 3, 4, 5]).prop_shuffle(),
            b_order in Just([0usize, 1, 2, 3, 6]).prop_shuffle(),
        ) {
            // Labels 0, 1: batch; 2, 3: contracted; 4, 5: free of a; 6: free of b.
            let sizes = |order: &[usize]| order.iter().map(|&label| s[label]).collect::<Vec<u64>>();
            let (a_sizes, b_sizes) = (sizes(&a_order), sizes(&b_order));
            let axis = |order: &[usize], label| order.iter().position(|&own| own == label).unwrap() as u8;
            let pair = |label| (axis(&a_order, label), axis(&b_order, label));
            let (a, b) = (integers(&a_sizes, 7), integers(&b_sizes, 5));
            let mut free = [axis(&a_order, 4), axis(&a_order, 5)];
            free.sort();
            let free = free.map(|axis| a_order[usize::from(axis)]);
            let at = |order: &[usize], index: &[u64; 7]| {
                order.iter().fold(0, |linear, &label| linear * s[label] + index[label]) as usize
            };
            let mut expected = Vec::new();
            let mut index = [0u64; 7];
            for i0 in 0..s[0] { for i1 in 0..s[1] { for f0 in 0..s[free[0]] { for f1 in 0..s[free[1]] { for f2 in 0..s[6] {
                index[0] = i0; index[1] = i1; index[free[0]] = f0; index[free[1]] = f1; index[6] = f2;
                let mut sum = 0;
                for c0 in 0..s[2] { for c1 in 0..s[3] {
                    index[2] = c0; index[3] = c1;
                    sum += a[at(&a_order, &index)] * b[at(&b_order, &index)];
                } }
                expected.push(sum);
            } } } } }
            for dtype in [DType::I64, DType::F64, DType::F32] {
                let x = Tensor::from_elements(&a_sizes, &a).unwrap();
                let y = Tensor::from_elements(&b_sizes, &b).unwrap();
                let op = dot(&[pair(0), pair(1)], &[pair(2), pair(3)], dtype, DType::I64);
                let result = evaluate(&op, &[&x, &y]).unwrap();
                prop_assert_eq!(result[0].elements::<i64>().unwrap(), &expected);
            }
        }
    }
}
