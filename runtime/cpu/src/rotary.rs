//! Rotary position embedding.

use crate::error::CpuError;
use crate::number::{Float, with_float};
use crate::view::{View, ViewMut, read, sizes, write};

/// `(a, b) → (a cos - b sin, a sin + b cos)` for each pair of features; those beyond the tables are copied.
pub(crate) fn rotary(interleaved: bool, operands: &[View<'_>], result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let (x, cos, sin) = (&operands[0], &operands[1], &operands[2]);
    let (x_sizes, table_sizes) = (sizes(x.ty), sizes(cos.ty));
    let [heads, length, features] = [x_sizes[1], x_sizes[2], x_sizes[3]];
    let pairs = table_sizes[2];
    with_float!("rotary", x.ty.dtype, T => {
        let (x, cos, sin) = (read::<T>(x)?, read::<T>(cos)?, read::<T>(sin)?);
        write(result, |y| {
            for (row, (x, y)) in x.chunks_exact(features).zip(y.chunks_exact_mut(features)).enumerate() {
                let batch = if table_sizes[0] == 1 { 0 } else { row / (heads * length) };
                let at = (batch * length + row % length) * pairs;
                rotate::<T>(interleaved, x, y, &cos[at..at + pairs], &sin[at..at + pairs]);
            }
            Ok(())
        })
    })
}

fn rotate<T: Float>(interleaved: bool, x: &[T], y: &mut [T], cos: &[T], sin: &[T]) {
    y.copy_from_slice(x);
    let pairs = cos.len();
    for (pair, (&cos, &sin)) in cos.iter().zip(sin).enumerate() {
        let (first, second) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
        y[first] = x[first] * cos - x[second] * sin;
        y[second] = x[first] * sin + x[second] * cos;
    }
}

#[cfg(test)]
mod tests {
    use planfile::{Op, Tensor};

    use crate::evaluate;

    fn run(interleaved: bool, rotary: u64) -> Vec<f32> {
        // Two batches of one head and one position; the second batch turns by 90 degrees, the first not at all.
        let x = Tensor::from_elements(&[2, 1, 1, 5], &[1.0f32, 2.0, 3.0, 4.0, 5.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        let table = |first: f32, second: f32| {
            let row = |value| vec![value; rotary as usize / 2];
            Tensor::from_elements(&[2, 1, rotary / 2], &[row(first), row(second)].concat()).unwrap()
        };
        let y = evaluate(&Op::Rotary { interleaved, rotary }, &[&x, &table(1.0, 0.0), &table(0.0, 1.0)]).unwrap();
        y[0].elements::<f32>().unwrap().to_vec()
    }

    #[test]
    fn turns_pairs_and_leaves_the_rest() {
        assert_eq!(run(false, 4), [1.0, 2.0, 3.0, 4.0, 5.0, -3.0, -4.0, 1.0, 2.0, 5.0]);
        assert_eq!(run(true, 4), [1.0, 2.0, 3.0, 4.0, 5.0, -2.0, 1.0, -4.0, 3.0, 5.0]);
        assert_eq!(run(false, 2), [1.0, 2.0, 3.0, 4.0, 5.0, -2.0, 1.0, 3.0, 4.0, 5.0]);
        assert_eq!(run(true, 0), [1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    fn one_table_serves_all_heads_and_batches() {
        let x = Tensor::from_elements(&[2, 2, 2, 2], &(0..16).map(|i| i as f32).collect::<Vec<_>>()).unwrap();
        let cos = Tensor::from_elements(&[1, 2, 1], &[1.0f32, 0.0]).unwrap();
        let sin = Tensor::from_elements(&[1, 2, 1], &[0.0f32, 1.0]).unwrap();
        let y = evaluate(&Op::Rotary { interleaved: false, rotary: 2 }, &[&x, &cos, &sin]).unwrap();
        let expected = [0, 1, -3, 2, 4, 5, -7, 6, 8, 9, -11, 10, 12, 13, -15, 14].map(|i| i as f32);
        assert_eq!(y[0].elements::<f32>().unwrap(), expected);
    }
}
