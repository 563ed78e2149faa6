//! Reference execution of primitives on host memory.
//!
//! Every primitive that does not communicate, on any element type it makes sense for. It defines what kernels on other
//! devices must compute, folds constants and runs plans on virtual devices. Half types are computed in `f32` and
//! rounded: by each instruction of an expression, at the end of everything else. Long sums are accumulated in `f64`
//! outside of matrix products.

mod attention;
mod combine;
mod conv;
mod dot;
mod error;
mod execute;
mod float_math;
mod gather;
mod lane;
mod movement;
mod norm;
mod number;
pub mod panels;
mod pointwise;
mod pool;
mod product;
mod program;
pub mod recipe;
mod recurrence;
mod reduce;
mod resize;
mod rotary;
mod scan;
mod scatter;
mod simd;
mod softmax;
mod strided;
mod topk;
mod view;
mod window;

pub use combine::combine;
pub use error::CpuError;
pub use execute::{evaluate, execute};
pub use view::{View, ViewMut};
