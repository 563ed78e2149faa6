//! Convolutions of a plan in cuDNN's terms: at least two spatial dimensions, channels second, layouts as strides.

use std::ffi::c_int;

use planfile::plan::Convolution;

use crate::error::CudaError;

/// Sizes `[N, C, spatial…]` with strides, in elements.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) sizes: Vec<c_int>,
    pub(super) strides: Vec<c_int>,
}

/// All that cuDNN wants to know of a convolution's sizes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) input: Tensor,
    pub(super) result: Tensor,
    /// One element for each channel of the result.
    pub(super) bias: Tensor,
    /// Outputs, inputs in a group, window; for a transposed convolution, those of the one it is the gradient of.
    pub(super) filter: Vec<c_int>,
    pub(super) pads: Vec<c_int>,
    pub(super) strides: Vec<c_int>,
    pub(super) dilations: Vec<c_int>,
}

pub(super) fn int(value: u64) -> Result<c_int, CudaError> {
    c_int::try_from(value).map_err(|_| CudaError::contradiction(format!("{value} is too large for cuDNN")))
}

fn ints(values: impl IntoIterator<Item = u64>) -> Result<Vec<c_int>, CudaError> {
    values.into_iter().map(int).collect()
}

impl Tensor {
    fn new(batch: u64, channels: u64, spatial: &[u64], channels_last: bool) -> Result<Self, CudaError> {
        let sizes: Vec<u64> = [batch, channels].into_iter().chain(spatial.iter().copied()).collect();
        // Dimensions from the fastest to the slowest in memory.
        let mut order: Vec<usize> = (0..sizes.len()).rev().collect();
        if channels_last {
            order.retain(|&dim| dim != 1);
            order.insert(0, 1);
        }
        let mut strides = vec![1; sizes.len()];
        let mut stride = 1u64;
        for dim in order {
            strides[dim] = stride;
            stride = stride.saturating_mul(sizes[dim]);
        }
        Ok(Self { sizes: ints(sizes)?, strides: ints(strides)? })
    }
}

impl Shape {
    pub(super) fn new(call: &Convolution) -> Result<Self, CudaError> {
        // One spatial dimension is the last of two.
        let spatial = |sizes: &[u64], neutral: u64| -> Vec<u64> {
            let missing = 2usize.saturating_sub(sizes.len());
            std::iter::repeat_n(neutral, missing).chain(sizes.iter().copied()).collect()
        };
        let rank = call.window.len();
        if rank == 0 || rank > 3 {
            let what =
                format!("a convolution with {rank} spatial dimensions is asked of cuDNN, which has one to three");
            return Err(CudaError::contradiction(what));
        }
        let lists = [&call.input_sizes, &call.output_sizes, &call.pads, &call.strides, &call.dilations];
        let divides = |channels: u64| call.groups > 0 && channels.is_multiple_of(call.groups);
        if lists.iter().any(|list| list.len() != rank)
            || !divides(call.input_channels)
            || !divides(call.output_channels)
        {
            return Err(CudaError::contradiction("sizes of a convolution do not fit each other"));
        }
        let tensor =
            |batch, channels, sizes: &[u64]| Tensor::new(batch, channels, &spatial(sizes, 1), call.channels_last);
        let (outer, inner) = if call.transposed {
            (call.input_channels, call.output_channels)
        } else {
            (call.output_channels, call.input_channels)
        };
        Ok(Self {
            input: tensor(call.batch, call.input_channels, &call.input_sizes)?,
            result: tensor(call.batch, call.output_channels, &call.output_sizes)?,
            bias: tensor(1, call.output_channels, &vec![1; rank])?,
            filter: ints([outer, inner / call.groups].into_iter().chain(spatial(&call.window, 1)))?,
            pads: ints(spatial(&call.pads, 0))?,
            strides: ints(spatial(&call.strides, 1))?,
            dilations: ints(spatial(&call.dilations, 1))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(channels_last: bool, transposed: bool) -> Convolution {
        Convolution {
            input: 0,
            filter: 1,
            bias: None,
            residual: None,
            relu: false,
            channels_last,
            batch: 2,
            input_channels: 6,
            output_channels: 4,
            input_sizes: vec![5],
            output_sizes: vec![3],
            window: vec![3],
            pads: vec![1],
            strides: vec![2],
            dilations: vec![1],
            groups: 2,
            transposed,
            allow_tf32: false,
        }
    }

    #[test]
    fn one_dimension_is_the_last_of_two() {
        let shape = Shape::new(&call(false, false)).unwrap();
        assert_eq!(shape.input, Tensor { sizes: vec![2, 6, 1, 5], strides: vec![30, 5, 5, 1] });
        assert_eq!(shape.filter, [4, 3, 1, 3]);
        assert_eq!((shape.pads, shape.strides, shape.dilations), (vec![0, 1], vec![1, 2], vec![1, 1]));
    }

    #[test]
    fn channels_may_be_the_fastest_dimension() {
        let shape = Shape::new(&call(true, false)).unwrap();
        assert_eq!(shape.input.strides, [30, 1, 30, 6]);
        assert_eq!(shape.result, Tensor { sizes: vec![2, 4, 1, 3], strides: vec![12, 1, 12, 4] });
        assert_eq!(shape.bias.strides, [4, 1, 4, 4]);
    }

    #[test]
    fn a_transposed_filter_is_that_of_the_gradient() {
        assert_eq!(Shape::new(&call(false, true)).unwrap().filter, [6, 2, 1, 3]);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert!(Shape::new(&Convolution { groups: 5, ..call(false, false) }).is_err());
        assert!(Shape::new(&Convolution { pads: vec![], ..call(false, false) }).is_err());
        assert!(Shape::new(&Convolution { batch: 1 << 40, ..call(false, false) }).is_err());
    }
}
