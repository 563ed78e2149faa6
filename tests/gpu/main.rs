//! What needs GPUs: every kernel against the CPU, every model against its references, on as many GPUs as there are.
//!
//! `cargo test --test gpu -- --ignored --nocapture` on a machine with CUDA. Nothing of this runs without `--ignored`.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may stop at the first surprise, in its own functions too"
)]

mod kernels;
mod models;

use planfile::{DType, Tensor};
use runtime::compare::to_f64s;

/// Largest difference of two tensors, as a share of the largest expected value. Infinite where one is not finite and
/// the other is another number.
fn error(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.ty, expected.ty);
    if !expected.ty.dtype.is_float() && actual.data.bytes() != expected.data.bytes() {
        return f64::INFINITY;
    }
    let [actual, expected] = [actual, expected].map(to_f64s);
    let finite = expected.iter().filter(|value| value.is_finite());
    let largest = finite.fold(0.0, |largest: f64, value| largest.max(value.abs()));
    let difference = |(a, b): (&f64, &f64)| {
        if a == b || (a.is_nan() && b.is_nan()) {
            0.0
        } else if a.is_finite() && b.is_finite() {
            (a - b).abs()
        } else {
            f64::INFINITY
        }
    };
    actual.iter().zip(&expected).map(difference).fold(0.0, f64::max) / largest.max(f64::MIN_POSITIVE)
}

/// What a kernel's results may differ by: sums in another order, and functions that round otherwise.
fn kernel_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        DType::F32 => 1e-5,
        DType::F64 => 1e-12,
        _ => 0.0,
    }
}
