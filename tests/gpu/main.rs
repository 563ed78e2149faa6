//! What needs GPUs: every kernel against the CPU, every model against its references, on as many GPUs as there are.
//!
//! `cargo test --test gpu -- --ignored --nocapture` on a machine with CUDA. Nothing of this runs without `--ignored`.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may stop at the first surprise, in its own functions too"
)]

mod faults;
mod kernels;
mod models;
#[path = "../routing/mod.rs"]
mod routing;
mod sample_plan;

use planfile::{DType, Tensor};
use runtime::compare::to_f64s;

/// Largest difference of two tensors, as a share of the largest expected value. Infinite where one is not finite and
/// the other is another number.
fn error(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.ty, expected.ty);
    if !expected.ty.dtype.is_float() && actual.data.bytes() != expected.data.bytes() {
        return f64::INFINITY;
    }
    let immense = immense(expected.ty.dtype);
    let [actual, expected] = [actual, expected].map(to_f64s);
    share(&actual, &expected, largest(&expected, immense))
}

/// As [`error`], of each row (the innermost dimension) as a share of that row's largest, which counts as a thousandth of
/// the tensor's at least: for what normalises rows, whose sizes may differ by much.
fn error_by_row(actual: &Tensor, expected: &Tensor) -> f64 {
    let whole = error(actual, expected);
    let width = expected.ty.sizes().last().copied().unwrap_or(1).max(1) as usize;
    let immense = immense(expected.ty.dtype);
    let [actual, expected] = [actual, expected].map(to_f64s);
    let floor = largest(&expected, immense) * 1e-3;
    let rows = actual.chunks(width).zip(expected.chunks(width));
    rows.map(|(actual, expected)| share(actual, expected, largest(expected, immense).max(floor))).fold(whole, f64::max)
}

/// Numbers from here on are compared as shares of themselves: the extremes of a type say nothing of the others' size.
fn immense(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1e4,
        DType::F64 => 1e150,
        _ => 1e18,
    }
}

fn largest(values: &[f64], immense: f64) -> f64 {
    values.iter().map(|value| value.abs()).filter(|&value| value < immense).fold(0.0, f64::max)
}

/// The largest difference, as a share of `scale` or, where that is more, of the expected value.
fn share(actual: &[f64], expected: &[f64], scale: f64) -> f64 {
    let difference = |(a, b): (&f64, &f64)| {
        if a == b || (a.is_nan() && b.is_nan()) {
            0.0
        } else if a.is_finite() && b.is_finite() {
            (a - b).abs() / b.abs().max(scale).max(f64::MIN_POSITIVE)
        } else {
            f64::INFINITY
        }
    };
    actual.iter().zip(expected).map(difference).fold(0.0, f64::max)
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
