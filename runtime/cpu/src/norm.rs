//! Layer and root-mean-square normalisation.

use std::borrow::Cow;

use planfile::op::NormKind;
use rayon::prelude::*;

use crate::error::CpuError;
use crate::number::{Float, Number, sum, with_float};
use crate::simd::vectorised;
use crate::strided::{Layout, broadcast_strides, copy, strides};
use crate::view::{View, ViewMut, product, read, sizes, write};

/// `normalised(x) * scale + bias` over the dimensions from `axis` on. Statistics in `f64`.
pub(crate) fn norm(
    kind: NormKind,
    axis: usize,
    epsilon: f64,
    has_scale: bool,
    operands: &[View<'_>],
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let x = &operands[0];
    let tail = &sizes(x.ty)[axis..];
    let (scale, bias) = if has_scale { (operands.get(1), operands.get(2)) } else { (None, operands.get(1)) };
    with_float!("norm", x.ty.dtype, T => {
        let x = read::<T>(x)?;
        let scale = scale.map(|view| expand::<T>(view, tail)).transpose()?;
        let bias = bias.map(|view| expand::<T>(view, tail)).transpose()?;
        write(result, |y| {
            let width = product(tail);
            let rows = y.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width));
            rows.with_min_len(ROWS).for_each(|(y, x)| row(kind, epsilon, x, scale.as_deref(), bias.as_deref(), y));
            Ok(())
        })
    })
}

/// Rows that a thread takes at least.
const ROWS: usize = 8;

vectorised! {
    fn row<T: Float>(kind: NormKind, epsilon: f64, x: &[T], scale: Option<&[T]>, bias: Option<&[T]>, y: &mut [T]) {
        let count = x.len() as f64;
        let mean = match kind {
            NormKind::Layer => sum(x, |x| x.to_sum()) / count,
            NormKind::Rms => 0.0,
        };
        let variance = sum(x, |x| (x.to_sum() - mean) * (x.to_sum() - mean)) / count;
        let factor = 1.0 / (variance + epsilon).sqrt();
        for (y, &x) in y.iter_mut().zip(x) {
            *y = T::from_f64((x.to_sum() - mean) * factor);
        }
        if let Some(scale) = scale {
            y.iter_mut().zip(scale).for_each(|(y, &scale)| *y = *y * scale);
        }
        if let Some(bias) = bias {
            y.iter_mut().zip(bias).for_each(|(y, &bias)| *y = *y + bias);
        }
    }
}

/// The operand broadcast to `dims`.
fn expand<'a, T: Number>(view: &View<'a>, dims: &[usize]) -> Result<Cow<'a, [T]>, CpuError> {
    let elements = read::<T>(view)?;
    if elements.len() == product(dims) {
        return Ok(elements);
    }
    let from = Layout { offset: 0, strides: broadcast_strides(&sizes(view.ty), dims.len()) };
    let to = Layout { offset: 0, strides: strides(dims) };
    let mut expanded = vec![T::ZERO; product(dims)];
    copy(dims, &mut expanded, &to, &elements, &from);
    Ok(Cow::Owned(expanded))
}

#[cfg(test)]
mod tests {
    use planfile::op::{NormKind, Real};
    use planfile::{Op, Tensor};

    use crate::evaluate;

    fn close(actual: &Tensor, expected: &[f32]) {
        let actual = actual.elements::<f32>().unwrap();
        assert!(actual.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{actual:?} instead of {expected:?}");
    }

    #[test]
    fn layer_with_scale_and_bias() {
        let x = Tensor::from_elements(&[2, 2], &[1.0f32, 3.0, 10.0, 6.0]).unwrap();
        let scale = Tensor::from_elements(&[2], &[2.0f32, 4.0]).unwrap();
        let bias = Tensor::from_elements(&[1], &[0.5f32]).unwrap();
        let op = |scale, bias| Op::Norm { kind: NormKind::Layer, axis: 1, epsilon: Real(0.0), scale, bias };
        close(&evaluate(&op(true, true), &[&x, &scale, &bias]).unwrap()[0], &[-1.5, 4.5, 2.5, -3.5]);
        close(&evaluate(&op(false, true), &[&x, &bias]).unwrap()[0], &[-0.5, 1.5, 1.5, -0.5]);
        close(&evaluate(&op(false, false), &[&x]).unwrap()[0], &[-1.0, 1.0, 1.0, -1.0]);
    }

    #[test]
    fn rms_over_two_dimensions() {
        let x = Tensor::from_elements(&[1, 2, 2], &[1.0f32, 1.0, 3.0, 5.0]).unwrap();
        let op = Op::Norm { kind: NormKind::Rms, axis: 1, epsilon: Real(7.0), scale: true, bias: false };
        let scale = Tensor::from_elements(&[2, 1], &[4.0f32, 8.0]).unwrap();
        close(&evaluate(&op, &[&x, &scale]).unwrap()[0], &[1.0, 1.0, 6.0, 10.0]);
    }
}
