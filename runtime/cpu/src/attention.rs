//! Scaled dot-product attention, a few rows of scores at a time.

use std::borrow::Cow;

use planfile::DType;
use planfile::op::{Causal, Combine};
use rayon::prelude::*;

use crate::error::CpuError;
use crate::number::{Float, with_float};
use crate::product::{Job, Left, Matrix, Product};
use crate::reduce::extremum;
use crate::strided::broadcast_strides;
use crate::view::{View, ViewMut, read, sizes, slice, write};

/// Rows of scores in memory at once.
const ROWS: usize = 64;

/// `softmax(mask(softcap(scale · q kᵀ))) v`, computed in `f32` at least; see [`planfile::Op::Attention`].
pub(crate) fn attention(
    scale: f64,
    causal: Option<Causal>,
    softcap: f64,
    operands: &[View<'_>],
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let (q_sizes, k_sizes, v_sizes) = (sizes(operands[0].ty), sizes(operands[1].ty), sizes(operands[2].ty));
    let shape = Shape {
        heads: q_sizes[1],
        heads_per_group: q_sizes[1] / k_sizes[1],
        queries: q_sizes[2],
        keys: k_sizes[2],
        features: q_sizes[3],
        values: v_sizes[3],
        mask_strides: operands.get(3).map_or_else(Vec::new, |mask| broadcast_strides(&sizes(mask.ty), 4)),
    };
    with_float!("attention", result.ty.dtype, T => {
        let (q, k, v) = (read::<T>(&operands[0])?, read::<T>(&operands[1])?, read::<T>(&operands[2])?);
        let mask = match operands.get(3) {
            None => Mask::None,
            Some(mask) if mask.ty.dtype == DType::Bool => Mask::Bool(slice(mask.bytes, DType::Bool)?),
            Some(mask) => Mask::Add(read::<T>(mask)?),
        };
        let rule = Rule { scale: scale as T, causal, softcap: softcap as T, mask };
        write(result, |y| {
            run(&shape, &rule, &q, &k, &v, y);
            Ok(())
        })
    })
}

struct Shape {
    heads: usize,
    heads_per_group: usize,
    queries: usize,
    keys: usize,
    features: usize,
    values: usize,
    /// Strides of the mask under `[batch, head, query, key]`.
    mask_strides: Vec<isize>,
}

enum Mask<'a, T: Clone> {
    None,
    /// Not 0: attend.
    Bool(&'a [u8]),
    Add(Cow<'a, [T]>),
}

/// What happens to scores before the softmax.
struct Rule<'a, T: Clone> {
    scale: T,
    causal: Option<Causal>,
    softcap: T,
    mask: Mask<'a, T>,
}

fn run<T: Float + Product>(shape: &Shape, rule: &Rule<'_, T>, q: &[T], k: &[T], v: &[T], y: &mut [T]) {
    let (keys, features, values) = (shape.keys, shape.features, shape.values);
    let run = |head: usize, first: usize, y: &mut [T]| {
        // Batches have all their groups in order, so heads over heads per group number the groups of all batches.
        let group = head / shape.heads_per_group;
        let rows = y.len() / values;
        let q = &q[(head * shape.queries + first) * features..][..rows * features];
        let k = &k[group * keys * features..][..keys * features];
        let v = &v[group * keys * values..][..keys * values];
        let mut scores = vec![T::ZERO; rows * keys];
        let k = Matrix::packed(k, features).transposed();
        T::multiply(
            [rows, keys, features],
            &mut [Job { a: Left::Matrix(Matrix::packed(q, features)), b: k, c: &mut scores }],
        );
        for (row, scores) in scores.chunks_exact_mut(keys.max(1)).enumerate() {
            weigh(shape, rule, [head / shape.heads, head % shape.heads, first + row], scores);
        }
        let v = Matrix::packed(v, values);
        T::multiply([rows, values, keys], &mut [Job { a: Left::Matrix(Matrix::packed(&scores, keys)), b: v, c: y }]);
    };
    let heads = y.par_chunks_exact_mut(shape.queries * values).enumerate();
    heads.for_each(|(head, y)| {
        y.par_chunks_mut(ROWS * values).enumerate().for_each(|(block, y)| run(head, block * ROWS, y));
    });
}

/// Turns one query's scores into weights that sum to 1, or into zeros if it sees nothing.
fn weigh<T: Float>(shape: &Shape, rule: &Rule<'_, T>, [batch, head, query]: [usize; 3], scores: &mut [T]) {
    let visible = match rule.causal {
        None => shape.keys,
        Some(Causal::FromStart) => shape.keys.min(query + 1),
        Some(Causal::FromEnd) => shape.keys.min((query + 1 + shape.keys).saturating_sub(shape.queries)),
    };
    let (scores, hidden) = scores.split_at_mut(visible);
    hidden.fill(T::ZERO);
    for score in scores.iter_mut() {
        *score = *score * rule.scale;
        if rule.softcap != T::ZERO {
            *score = rule.softcap * (*score / rule.softcap).tanh();
        }
    }
    let mask_at = || {
        let index = [batch, head, query].map(usize::cast_signed);
        let start: isize = index.iter().zip(&shape.mask_strides).map(|(index, stride)| index * stride).sum();
        let step = shape.mask_strides.last().copied().unwrap_or(0).cast_unsigned();
        (start.cast_unsigned(), step)
    };
    match &rule.mask {
        Mask::None => {}
        Mask::Bool(mask) => {
            let (start, step) = mask_at();
            for (key, score) in scores.iter_mut().enumerate() {
                if mask[start + key * step] == 0 {
                    *score = T::LOWEST;
                }
            }
        }
        Mask::Add(mask) => {
            let (start, step) = mask_at();
            for (key, score) in scores.iter_mut().enumerate() {
                *score = *score + mask[start + key * step];
            }
        }
    }
    let max = extremum(Combine::Max, scores);
    if max == T::LOWEST {
        scores.fill(T::ZERO);
        return;
    }
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += score.to_sum();
    }
    let factor = T::from_f64(1.0 / sum);
    for score in scores.iter_mut() {
        *score = *score * factor;
    }
}

#[cfg(test)]
mod tests {
    use planfile::op::{Causal, Real};
    use planfile::{Op, Tensor};
    use proptest::prelude::*;

    use crate::evaluate;

    fn op(scale: f64, causal: Option<Causal>, softcap: f64, mask: bool) -> Op {
        Op::Attention { scale: Real(scale), causal, softcap: Real(softcap), mask }
    }

    fn fill(sizes: &[u64], step: u32) -> Tensor {
        let count: u64 = sizes.iter().product();
        let data: Vec<f32> = (0..count as u32).map(|i| ((i * step % 17) as f32 - 8.0) / 8.0).collect();
        Tensor::from_elements(sizes, &data).unwrap()
    }

    #[test]
    fn a_query_that_sees_nothing_yields_zero() {
        let (q, k, v) = (fill(&[1, 1, 2, 2], 3), fill(&[1, 1, 2, 2], 5), fill(&[1, 1, 2, 1], 7));
        let values = v.elements::<f32>().unwrap();
        let mask =
            Tensor::from_bytes(planfile::TensorType::new(planfile::DType::Bool, &[2, 2]), &[0, 0, 0, 1]).unwrap();
        let y = evaluate(&op(1.0, None, 0.0, true), &[&q, &k, &v, &mask]).unwrap();
        assert_eq!(y[0].elements::<f32>().unwrap(), [0.0, values[1]]);
        let mask = Tensor::from_elements(&[2, 2], &[f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY]);
        let y = evaluate(&op(1.0, None, 0.0, true), &[&q, &k, &v, &mask.unwrap()]).unwrap();
        assert_eq!(y[0].elements::<f32>().unwrap(), [0.0, values[0]]);
        // More queries than keys, aligned at the end: the first sees nothing.
        let (k, v) = (fill(&[1, 1, 1, 2], 5), fill(&[1, 1, 1, 1], 7));
        let y = evaluate(&op(1.0, Some(Causal::FromEnd), 0.0, false), &[&q, &k, &v]).unwrap();
        assert_eq!(y[0].elements::<f32>().unwrap(), [0.0, v.elements::<f32>().unwrap()[0]]);
    }

    #[test]
    fn no_keys_give_zeros() {
        let (q, k, v) = (fill(&[1, 1, 2, 2], 3), fill(&[1, 1, 0, 2], 5), fill(&[1, 1, 0, 3], 7));
        let y = evaluate(&op(1.0, None, 0.0, false), &[&q, &k, &v]).unwrap();
        assert_eq!(y[0].elements::<f32>().unwrap(), [0.0; 6]);
    }

    proptest! {
        #[test]
        fn matches_the_formula(
            b in 1u64..3, groups in 1u64..3, share in 1u64..3, s in 1u64..70, t in 1u64..6, d in 1u64..4, e in 1u64..4,
            causal in prop_oneof![Just(None), Just(Some(Causal::FromStart)), Just(Some(Causal::FromEnd))],
            softcap in prop_oneof![Just(0.0), Just(0.7)],
            mask_dims in prop::collection::vec(any::<bool>(), 4), masked in any::<bool>(),
        ) {
            let heads = groups * share;
            let (q, k, v) = (fill(&[b, heads, s, d], 3), fill(&[b, groups, t, d], 5), fill(&[b, groups, t, e], 7));
            let full = [b, heads, s, t];
            let mask_sizes: Vec<u64> = full.iter().zip(&mask_dims).map(|(&n, &keep)| if keep { n } else { 1 }).collect();
            let mask = fill(&mask_sizes, 11);
            let mut operands = vec![&q, &k, &v];
            if masked { operands.push(&mask); }
            let y = evaluate(&op(0.9, causal, softcap, masked), &operands).unwrap();
            let y = y[0].elements::<f32>().unwrap();
            let at = |tensor: &Tensor, index: [u64; 4]| {
                let sizes = tensor.ty.sizes();
                let linear = index.iter().zip(&sizes).fold(0, |linear, (&i, &n)| linear * n + if n == 1 { 0 } else { i });
                f64::from(tensor.elements::<f32>().unwrap()[linear as usize])
            };
            for bi in 0..b { for h in 0..heads { for i in 0..s {
                let g = h / share;
                let weights: Vec<f64> = (0..t).map(|j| {
                    let sees = match causal {
                        None => true,
                        Some(Causal::FromStart) => j <= i,
                        Some(Causal::FromEnd) => j as i64 <= i as i64 + t as i64 - s as i64,
                    };
                    let product: f64 = (0..d).map(|x| at(&q, [bi, h, i, x]) * at(&k, [bi, g, j, x])).sum();
                    let mut score = 0.9 * product;
                    if softcap != 0.0 { score = softcap * (score / softcap).tanh(); }
                    if masked { score += at(&mask, [bi, h, i, j]); }
                    if sees { score.exp() } else { 0.0 }
                }).collect();
                let sum: f64 = weights.iter().sum();
                for x in 0..e {
                    let dot: f64 = (0..t).map(|j| weights[j as usize] * at(&v, [bi, g, j, x])).sum();
                    let expected = if sum == 0.0 { 0.0 } else { dot / sum };
                    let actual = f64::from(y[(((bi * heads + h) * s + i) * e + x) as usize]);
                    prop_assert!((actual - expected).abs() < 1e-5, "{actual} instead of {expected}");
                }
            } } }
        }
    }
}
