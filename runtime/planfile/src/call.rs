//! Calls into libraries, in full: shapes, strides and fused operations, so that the runtime has nothing to work out.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::attributes::real;
use crate::op::Real;
use crate::types::TensorType;

/// What a library is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Call {
    Matmul(Matmul),
    Convolution(Convolution),
}

/// `D = activation(scale · A · B + bias + residual)` with `A: [m, k]`, `B: [k, n]`, `D: [m, n]`, for each of `batch`
/// triples. Accumulates in `f32`, `f64` for `f64`; element types are those of operands and result.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Matmul {
    pub m: u64,
    pub n: u64,
    pub k: u64,
    pub batch: u64,
    pub a: Matrix,
    pub b: Matrix,
    /// The step's first result; its `operand` is 0.
    pub result: Matrix,
    pub scale: Real,
    /// An operand of `n` elements, the same for every row.
    pub bias: Option<u32>,
    /// An operand that lies as the result does.
    pub residual: Option<u32>,
    pub activation: Activation,
    /// Whether `f32` operands may be rounded to TF32.
    pub allow_tf32: bool,
}

/// A batch of matrices in an operand. Strides and offset in elements; of row and column stride, one is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Matrix {
    pub operand: u32,
    pub offset: u64,
    pub row_stride: u64,
    pub column_stride: u64,
    pub batch_stride: u64,
}

/// Applied to a product before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Activation {
    None,
    /// The larger one of the number and 0. Of NaN it is NaN or 0: cuBLASLt's kernels differ in that.
    Relu,
    /// By the approximation with `tanh`.
    GeluTanh,
}

/// `y = relu?(conv(x, w) + bias + residual)`. Memory is `[N, C, spatial…]` and `[M, C / groups, window…]`, or with
/// `channels_last` `[N, spatial…, C]` and `[M, window…, C / groups]`. Transposed: the filter is
/// `[C, M / groups, window…]`, and pads and strides are those of the convolution that it is the gradient of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Convolution {
    pub input: u32,
    pub filter: u32,
    /// An operand with one element for each output channel.
    pub bias: Option<u32>,
    /// An operand that lies as the result does.
    pub residual: Option<u32>,
    pub relu: bool,
    pub channels_last: bool,
    pub batch: u64,
    pub input_channels: u64,
    pub output_channels: u64,
    /// By spatial dimension, like all lists here.
    pub input_sizes: Vec<u64>,
    pub output_sizes: Vec<u64>,
    pub window: Vec<u64>,
    /// The same before and after.
    pub pads: Vec<u64>,
    pub strides: Vec<u64>,
    pub dilations: Vec<u64>,
    pub groups: u64,
    pub transposed: bool,
    /// Whether `f32` operands may be rounded to TF32.
    pub allow_tf32: bool,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Matmul(call) => call.fmt(f),
            Self::Convolution(call) => call.fmt(f),
        }
    }
}

impl fmt::Display for Matmul {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { m, n, k, batch, a, b, result, scale, bias, residual, activation, allow_tf32 } = self;
        write!(f, "matmul {{m {m}, n {n}, k {k}, batch {batch}, a {a}, b {b}, result {result}")?;
        if scale.0.to_bits() != 1f64.to_bits() {
            write!(f, ", scale {}", real(*scale))?;
        }
        added(f, *bias, *residual)?;
        match activation {
            Activation::None => {}
            Activation::Relu => f.write_str(", relu")?,
            Activation::GeluTanh => f.write_str(", gelu_tanh")?,
        }
        f.write_str(if *allow_tf32 { ", allow_tf32}" } else { "}" })
    }
}

/// `%1+64 [32, 1, 2048]`: the operand, its offset, and the strides of rows, columns and batch.
impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operand, offset, row_stride, column_stride, batch_stride } = self;
        let offset = if *offset == 0 { String::new() } else { format!("+{offset}") };
        write!(f, "%{operand}{offset} [{row_stride}, {column_stride}, {batch_stride}]")
    }
}

impl fmt::Display for Convolution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { input, filter, batch, input_channels, output_channels, groups, .. } = self;
        let Self { input_sizes, output_sizes, window, pads, strides, dilations, .. } = self;
        write!(
            f,
            "convolution {{input %{input}, filter %{filter}, batch {batch}, channels {input_channels} to \
             {output_channels}, sizes {input_sizes:?} to {output_sizes:?}, window {window:?}, pads {pads:?}, strides \
             {strides:?}, dilations {dilations:?}, groups {groups}"
        )?;
        added(f, self.bias, self.residual)?;
        let flags = [
            ("relu", self.relu),
            ("channels_last", self.channels_last),
            ("transposed", self.transposed),
            ("allow_tf32", self.allow_tf32),
        ];
        for (name, _) in flags.iter().filter(|(_, set)| *set) {
            write!(f, ", {name}")?;
        }
        f.write_str("}")
    }
}

/// Operands that are added to a product.
fn added(f: &mut fmt::Formatter<'_>, bias: Option<u32>, residual: Option<u32>) -> fmt::Result {
    for (name, operand) in [("bias", bias), ("residual", residual)] {
        if let Some(operand) = operand {
            write!(f, ", {name} %{operand}")?;
        }
    }
    Ok(())
}

impl Call {
    /// Proves that the call stays inside of operands and result of these types.
    ///
    /// # Errors
    /// What reaches outside, or is no such call at all.
    pub fn check(&self, operands: &[TensorType], results: &[TensorType]) -> Result<(), String> {
        let [result] = results else { return Err(format!("{} results, a call has one", results.len())) };
        // Libraries read what is added with the type of the result.
        let added = match self {
            Self::Matmul(call) => [call.bias, call.residual],
            Self::Convolution(call) => [call.bias, call.residual],
        };
        let factors = match self {
            Self::Matmul(call) => [call.a.operand, call.b.operand],
            Self::Convolution(call) => [call.input, call.filter],
        };
        let dtype = |operand: u32| operands.get(operand as usize).map(|ty| ty.dtype);
        if let Some(odd) = added.into_iter().flatten().find(|&operand| dtype(operand) != Some(result.dtype)) {
            return Err(format!("operand {odd} of {} is not of the result's type", operands.len()));
        }
        if dtype(factors[0]) != dtype(factors[1]) {
            return Err("the factors have different types".to_owned());
        }
        match self {
            Self::Matmul(call) => call.check(operands, result),
            Self::Convolution(call) => call.check(operands, result),
        }
    }
}

/// Elements of the named operand.
fn elements(operands: &[TensorType], operand: u32) -> Result<u64, String> {
    let ty = operands.get(operand as usize).ok_or_else(|| format!("operand {operand} of {}", operands.len()))?;
    ty.elements().ok_or_else(|| format!("operand {operand} is too large"))
}

fn expect_elements(operands: &[TensorType], operand: u32, expected: Option<u64>, what: &str) -> Result<(), String> {
    let found = elements(operands, operand)?;
    let fine = expected == Some(found);
    fine.then_some(()).ok_or_else(|| format!("{what} is operand {operand} of {found} elements"))
}

impl Matmul {
    fn check(&self, operands: &[TensorType], result: &TensorType) -> Result<(), String> {
        if [self.m, self.n, self.k, self.batch].contains(&0) {
            return Err("a product of nothing".to_owned());
        }
        let result_elements = result.elements().ok_or("the result is too large")?;
        self.a.check([self.m, self.k, self.batch], elements(operands, self.a.operand)?, "the left matrix")?;
        self.b.check([self.k, self.n, self.batch], elements(operands, self.b.operand)?, "the right matrix")?;
        self.result.check([self.m, self.n, self.batch], result_elements, "the result")?;
        self.result.check_all([self.m, self.n, self.batch], result_elements)?;
        if let Some(bias) = self.bias {
            expect_elements(operands, bias, Some(self.n), "the bias")?;
        }
        if let Some(residual) = self.residual {
            expect_elements(operands, residual, Some(result_elements), "the residual")?;
        }
        Ok(())
    }
}

impl Matrix {
    fn check(&self, [rows, columns, batch]: [u64; 3], elements: u64, what: &str) -> Result<(), String> {
        if self.row_stride != 1 && self.column_stride != 1 {
            return Err(format!("{what} has strides {} and {}", self.row_stride, self.column_stride));
        }
        let steps = [(rows, self.row_stride), (columns, self.column_stride), (batch, self.batch_stride)];
        let reach = |(count, stride): (u64, u64)| (count - 1).checked_mul(stride);
        let last = steps.into_iter().try_fold(self.offset, |last, step| last.checked_add(reach(step)?));
        let inside = last.is_some_and(|last| last < elements);
        inside.then_some(()).ok_or_else(|| format!("{what} reaches outside of its {elements} elements"))
    }
}

impl Matrix {
    /// Proves that each element of the result is stored once: its strides, from the narrowest, are those of a dense
    /// tensor.
    fn check_all(&self, [rows, columns, batch]: [u64; 3], elements: u64) -> Result<(), String> {
        let mut steps = [(rows, self.row_stride), (columns, self.column_stride), (batch, self.batch_stride)];
        steps.sort_by_key(|step| step.1);
        let mut stored = 1u64;
        let mut dense = true;
        for (count, stride) in steps.into_iter().filter(|(count, _)| *count != 1) {
            dense &= stride == stored;
            stored = stored.saturating_mul(count);
        }
        let fine = dense && stored == elements && self.offset == 0 && self.operand == 0;
        fine.then_some(()).ok_or_else(|| format!("the result is not all of its {elements} elements, each stored once"))
    }
}

impl Convolution {
    fn check(&self, operands: &[TensorType], result: &TensorType) -> Result<(), String> {
        let rank = self.input_sizes.len();
        let lists = [&self.output_sizes, &self.window, &self.pads, &self.strides, &self.dilations];
        if rank == 0 || lists.iter().any(|list| list.len() != rank) {
            return Err("a convolution with lists of different lengths".to_owned());
        }
        let positive = [self.batch, self.input_channels, self.output_channels, self.groups];
        let sizes = [&self.input_sizes, &self.output_sizes, &self.window, &self.strides, &self.dilations];
        if positive.contains(&0) || sizes.iter().any(|sizes| sizes.contains(&0)) {
            return Err("a convolution of nothing".to_owned());
        }
        if !self.input_channels.is_multiple_of(self.groups) || !self.output_channels.is_multiple_of(self.groups) {
            return Err(format!("{} groups do not divide the channels", self.groups));
        }
        for dim in 0..rank {
            // The windowed side of a transposed convolution is its result.
            let (from, to) = if self.transposed {
                (self.output_sizes[dim], self.input_sizes[dim])
            } else {
                (self.input_sizes[dim], self.output_sizes[dim])
            };
            let padded = self.pads[dim].checked_mul(2).and_then(|pads| pads.checked_add(from));
            let window = (self.window[dim] - 1).checked_mul(self.dilations[dim]).and_then(|reach| reach.checked_add(1));
            let steps = padded.zip(window).and_then(|(padded, window)| padded.checked_sub(window));
            if steps.map(|steps| steps / self.strides[dim] + 1) != Some(to) {
                return Err(format!("windows of spatial dimension {dim} do not make {to} from {from}"));
            }
        }
        let product =
            |sizes: &[u64], with: u64| sizes.iter().try_fold(with, |product, &size| product.checked_mul(size));
        let images = |channels: u64, sizes: &[u64]| product(sizes, self.batch)?.checked_mul(channels);
        let filter = product(&self.window, self.input_channels)
            .and_then(|taps| taps.checked_mul(self.output_channels))
            .map(|elements| elements / self.groups);
        expect_elements(operands, self.input, images(self.input_channels, &self.input_sizes), "the input")?;
        expect_elements(operands, self.filter, filter, "the filter")?;
        let output = images(self.output_channels, &self.output_sizes);
        if result.elements() != output {
            return Err("the result has another number of elements".to_owned());
        }
        if let Some(bias) = self.bias {
            expect_elements(operands, bias, Some(self.output_channels), "the bias")?;
        }
        match self.residual {
            Some(residual) => expect_elements(operands, residual, output, "the residual"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    fn f32s(sizes: &[u64]) -> TensorType {
        TensorType::new(DType::F32, sizes)
    }

    fn matrix(operand: u32, row_stride: u64) -> Matrix {
        Matrix { operand, offset: 0, row_stride, column_stride: 1, batch_stride: 0 }
    }

    fn product() -> Matmul {
        Matmul {
            m: 4,
            n: 6,
            k: 8,
            batch: 1,
            a: matrix(0, 8),
            b: matrix(1, 6),
            result: matrix(0, 6),
            scale: Real(1.0),
            bias: Some(2),
            residual: None,
            activation: Activation::None,
            allow_tf32: false,
        }
    }

    #[test]
    fn calls_are_printed_in_the_words_of_the_field() {
        let text = Call::Matmul(Matmul { activation: Activation::Relu, scale: Real(0.5), ..product() }).to_string();
        assert_eq!(
            text,
            "matmul {m 4, n 6, k 8, batch 1, a %0 [8, 1, 0], b %1 [6, 1, 0], result %0 [6, 1, 0], scale 0.5, bias %2, relu}"
        );
        let plain = Call::Matmul(Matmul { bias: None, allow_tf32: true, ..product() }).to_string();
        assert!(plain.ends_with("result %0 [6, 1, 0], allow_tf32}"), "{plain}");
    }

    #[test]
    fn a_product_stays_inside_of_its_matrices() {
        let operands = [f32s(&[4, 8]), f32s(&[8, 6]), f32s(&[6])];
        let check = |call: Matmul| Call::Matmul(call).check(&operands, &[f32s(&[4, 6])]);
        check(product()).unwrap();
        let beyond = |change: fn(&mut Matmul)| {
            let mut call = product();
            change(&mut call);
            check(call).unwrap_err()
        };
        assert!(beyond(|call| call.m = 3).contains("each stored once"));
        assert!(beyond(|call| (call.batch, call.result.batch_stride) = (2, 0)).contains("each stored once"));
        let mixed = [operands[0].clone(), f32s(&[8, 6]).with_dtype(DType::F16), operands[2].clone()];
        assert!(Call::Matmul(product()).check(&mixed, &[f32s(&[4, 6])]).unwrap_err().contains("factors"));
        let result = f32s(&[4, 6]).with_dtype(DType::F16);
        assert!(Call::Matmul(product()).check(&operands, &[result]).unwrap_err().contains("operand 2 of 3"));
        assert!(beyond(|call| call.a.row_stride = 9).contains("the left matrix reaches outside"));
        assert!(beyond(|call| call.b.offset = 1).contains("the right matrix reaches outside"));
        assert!(beyond(|call| call.b.column_stride = 2).contains("strides"));
        assert!(beyond(|call| (call.batch, call.result.batch_stride) = (u64::MAX, 2)).contains("outside"));
        assert!(beyond(|call| call.bias = Some(1)).contains("the bias is operand 1"));
        assert!(beyond(|call| call.residual = Some(7)).contains("operand 7 of 3"));
        assert!(beyond(|call| call.k = 0).contains("nothing"));
    }

    #[test]
    fn a_convolution_has_the_sizes_that_its_windows_make() {
        let call = Convolution {
            input: 0,
            filter: 1,
            bias: None,
            residual: None,
            relu: false,
            channels_last: true,
            batch: 1,
            input_channels: 4,
            output_channels: 6,
            input_sizes: vec![8, 8],
            output_sizes: vec![4, 4],
            window: vec![3, 3],
            pads: vec![1, 1],
            strides: vec![2, 2],
            dilations: vec![1, 1],
            groups: 2,
            transposed: false,
            allow_tf32: false,
        };
        let operands = [f32s(&[1, 8, 8, 4]), f32s(&[6, 3, 3, 2])];
        let check = |call: Convolution| Call::Convolution(call).check(&operands, &[f32s(&[1, 4, 4, 6])]);
        check(call.clone()).unwrap();
        assert!(check(Convolution { pads: vec![0, 1], ..call.clone() }).unwrap_err().contains("dimension 0"));
        assert!(check(Convolution { groups: 4, ..call.clone() }).unwrap_err().contains("groups"));
        assert!(check(Convolution { groups: 1, ..call.clone() }).unwrap_err().contains("the filter"));
        assert!(check(Convolution { strides: vec![2], ..call }).unwrap_err().contains("lengths"));
    }
}
