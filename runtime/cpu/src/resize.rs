//! Resampling: each axis on its own, by a table of input positions and weights for each output position.

use planfile::op::{Coordinates, NearestRounding, Real, ResizeMode};
use planfile::{DType, Scalar};

use crate::error::CpuError;
use crate::movement::gather_product;
use crate::number::{Float, Number, with_float, with_number, with_width};
use crate::strided::strides;
use crate::view::{View, ViewMut, product, read, sizes, slice, slice_mut, write};

/// Resamples as the ONNX specification of `Resize` says; coordinates in `f32`, as ONNX Runtime has them. Integers are
/// interpolated in `f32` and truncated.
pub(crate) fn resize(
    mode: ResizeMode,
    coordinates: Coordinates,
    scales: &[Real],
    region: &[(Real, Real)],
    x: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let (from, to) = (sizes(x.ty), sizes(result.ty));
    if let Some(axis) = from.iter().position(|&size| size == 0) {
        return Err(CpuError::Type(format!("resize: axis {axis} of {} has nothing to resample", x.ty)));
    }
    let axes: Vec<ResizedAxis> = (0..from.len())
        .map(|axis| ResizedAxis {
            input: from[axis],
            output: to[axis],
            scale: scales[axis].0 as f32,
            region: (region[axis].0.0 as f32, region[axis].1.0 as f32),
        })
        .collect();
    let dtype = x.ty.dtype;
    match mode {
        ResizeMode::Nearest(rounding) => {
            let strides = strides(&from);
            let table = |(axis, &stride): (&ResizedAxis, &isize)| -> Vec<usize> {
                let nearest = |position| axis.nearest(coordinates, rounding, position) * stride.cast_unsigned();
                (0..axis.output).map(nearest).collect()
            };
            let tables: Vec<Vec<usize>> = axes.iter().zip(&strides).map(table).collect();
            with_width!(dtype, T => {
                gather_product::<T>(&tables, slice_mut(result.bytes, dtype)?, slice(x.bytes, dtype)?);
            });
        }
        ResizeMode::Linear { .. } | ResizeMode::Cubic { .. } => {
            let filter = Filter::new(mode);
            let tables: Vec<Table> = axes.iter().map(|axis| axis.table(coordinates, &filter)).collect();
            interpolate(&tables, &from, x, result)?;
        }
    }
    if let Coordinates::TfCropAndResize { extrapolation } = coordinates {
        let outside: Vec<Vec<bool>> = axes.iter().map(|axis| axis.outside(coordinates)).collect();
        extrapolate(&outside, Scalar::from_f64(dtype, extrapolation.0), result);
    }
    Ok(())
}

struct ResizedAxis {
    input: usize,
    output: usize,
    scale: f32,
    region: (f32, f32),
}

impl ResizedAxis {
    /// The input coordinate that an output position stands for.
    fn coordinate(&self, coordinates: Coordinates, position: usize) -> f32 {
        let (input, output, at) = (self.input as f32, self.output as f32, position as f32);
        match coordinates {
            Coordinates::HalfPixel => (at + 0.5) / self.scale - 0.5,
            Coordinates::HalfPixelSymmetric => {
                let adjustment = output / (self.scale * input);
                input / 2.0 * (1.0 - adjustment) + (at + 0.5) / self.scale - 0.5
            }
            Coordinates::PytorchHalfPixel if self.output > 1 => (at + 0.5) / self.scale - 0.5,
            Coordinates::PytorchHalfPixel => 0.0,
            Coordinates::AlignCorners if self.output > 1 => at * (input - 1.0) / (output - 1.0),
            Coordinates::AlignCorners => 0.0,
            Coordinates::Asymmetric => at / self.scale,
            Coordinates::TfCropAndResize { .. } => {
                let (start, end) = self.region;
                if self.output > 1 {
                    start * (input - 1.0) + at * (end - start) * (input - 1.0) / (output - 1.0)
                } else {
                    0.5 * (start + end) * (input - 1.0)
                }
            }
        }
    }

    fn nearest(&self, coordinates: Coordinates, rounding: NearestRounding, position: usize) -> usize {
        let coordinate = self.coordinate(coordinates, position);
        let rounded = match rounding {
            NearestRounding::PreferFloor => (coordinate - 0.5).ceil(),
            NearestRounding::PreferCeil => (coordinate + 0.5).floor(),
            NearestRounding::Floor => coordinate.floor(),
            NearestRounding::Ceil => coordinate.ceil(),
        };
        // Not a number becomes 0.
        (rounded.max(0.0) as usize).min(self.input - 1)
    }

    fn outside(&self, coordinates: Coordinates) -> Vec<bool> {
        let last = (self.input - 1) as f32;
        (0..self.output).map(|position| !(0.0..=last).contains(&self.coordinate(coordinates, position))).collect()
    }

    fn table(&self, coordinates: Coordinates, filter: &Filter) -> Table {
        let compress = if filter.antialias { self.scale.min(1.0) } else { 1.0 };
        // Taps whose distance times the compression is below the support of the filter. A scale that shrinks the axis
        // to less than one element asks for no more of them.
        let limit = filter.support * (self.input as f32 + 1.0);
        let before = (filter.support / compress).ceil().clamp(1.0, limit) as i64;
        let width = usize::try_from(2 * before).unwrap_or(0);
        let mut table = Table { input: self.input, output: self.output, width, taps: Vec::new() };
        let mut weights = vec![0f32; width];
        for position in 0..self.output {
            let coordinate = self.coordinate(coordinates, position);
            let floor = coordinate.floor();
            let ratio = coordinate - floor;
            let sources = (1 - before..=before).map(|tap| (floor as i64).saturating_add(tap));
            for (tap, (weight, source)) in (1 - before..=before).zip(weights.iter_mut().zip(sources.clone())) {
                let outside = source < 0 || source >= self.input as i64;
                let skipped = filter.exclude_outside && outside;
                *weight = if skipped { 0.0 } else { filter.weight((tap as f32 - ratio) * compress) };
            }
            let sum: f32 = weights.iter().sum();
            let factor = if filter.antialias || filter.exclude_outside { 1.0 / sum } else { 1.0 };
            let clamped = sources.map(|source| usize::try_from(source).unwrap_or(0).min(self.input - 1));
            table.taps.extend(clamped.zip(weights.iter().map(|weight| weight * factor)));
        }
        table
    }
}

/// The interpolating function of a distance.
struct Filter {
    /// Distance from which on the function is 0.
    support: f32,
    /// Coefficient of the cubic.
    a: f32,
    antialias: bool,
    exclude_outside: bool,
}

impl Filter {
    fn new(mode: ResizeMode) -> Self {
        match mode {
            ResizeMode::Cubic { a, exclude_outside, antialias } => {
                Self { support: 2.0, a: a.0 as f32, antialias, exclude_outside }
            }
            ResizeMode::Linear { antialias } => Self { support: 1.0, a: 0.0, antialias, exclude_outside: false },
            ResizeMode::Nearest(_) => Self { support: 1.0, a: 0.0, antialias: false, exclude_outside: false },
        }
    }

    /// Triangle or cubic convolution (Keys, 1981).
    fn weight(&self, distance: f32) -> f32 {
        let (x, a) = (distance.abs(), self.a);
        if self.support == 1.0 {
            (1.0 - x).max(0.0)
        } else if x <= 1.0 {
            ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
        } else if x < 2.0 {
            ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
        } else {
            0.0
        }
    }
}

/// Input positions and weights of each output position, `width` of them each.
struct Table {
    input: usize,
    output: usize,
    width: usize,
    taps: Vec<(usize, f32)>,
}

impl Table {
    fn is_identity(&self) -> bool {
        let kept = |(position, taps): (usize, &[(usize, f32)])| {
            taps.iter().all(|&(source, weight)| weight == if source == position { 1.0 } else { 0.0 } || weight == 0.0)
                && taps.iter().filter(|tap| tap.0 == position).map(|tap| tap.1).sum::<f32>() == 1.0
        };
        self.input == self.output && self.taps.chunks_exact(self.width).enumerate().all(kept)
    }

    /// `[outer, input, inner]` → `[outer, output, inner]`.
    fn apply<T: Float>(&self, inner: usize, x: &[T]) -> Vec<T> {
        let outer = x.len() / (self.input * inner);
        let mut y = vec![T::ZERO; outer * self.output * inner];
        for (x, y) in x.chunks_exact(self.input * inner).zip(y.chunks_exact_mut(self.output * inner)) {
            for (taps, y) in self.taps.chunks_exact(self.width).zip(y.chunks_exact_mut(inner)) {
                for &(source, weight) in taps.iter().filter(|tap| tap.1 != 0.0) {
                    let weight = T::from_f32(weight);
                    for (y, &x) in y.iter_mut().zip(&x[source * inner..][..inner]) {
                        *y = *y + x * weight;
                    }
                }
            }
        }
        y
    }
}

fn interpolate(tables: &[Table], from: &[usize], x: &View<'_>, result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let dtype = x.ty.dtype;
    if !dtype.is_float() {
        return with_number!(dtype, T => {
            let x: Vec<f32> = read::<T>(x)?.iter().map(|&x| <T as Number>::to_f32(x)).collect();
            let interpolated = apply_all(tables, from, &x);
            write(result, |y: &mut [T]| {
                let limit = |value: f32| if dtype == DType::Bool { f32::from(u8::from(value != 0.0)) } else { value };
                for (y, &value) in y.iter_mut().zip(&interpolated) {
                    *y = <T as Number>::from_f32(limit(value));
                }
                Ok(())
            })
        });
    }
    with_float!("resize", dtype, T => {
        let x = read::<T>(x)?;
        write(result, |y| {
            y.copy_from_slice(&apply_all::<T>(tables, from, &x));
            Ok(())
        })
    })
}

fn apply_all<T: Float>(tables: &[Table], from: &[usize], x: &[T]) -> Vec<T> {
    let mut sizes = from.to_vec();
    let mut values = x.to_vec();
    for (axis, table) in tables.iter().enumerate() {
        if table.is_identity() {
            continue;
        }
        values = table.apply(product(&sizes[axis + 1..]), &values);
        sizes[axis] = table.output;
    }
    values
}

/// Overwrites the elements that lie outside of the input on any axis.
fn extrapolate(outside: &[Vec<bool>], value: Scalar, result: &mut ViewMut<'_>) {
    let bytes = value.to_bytes();
    for (linear, element) in result.bytes.chunks_exact_mut(bytes.len()).enumerate() {
        let mut rest = linear;
        let mut is_outside = false;
        for axis in outside.iter().rev() {
            is_outside |= axis[rest % axis.len()];
            rest /= axis.len();
        }
        if is_outside {
            element.copy_from_slice(&bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use planfile::op::{Coordinates, NearestRounding, Real, ResizeMode};
    use planfile::{Element, Op, Tensor};

    use crate::evaluate;

    fn run<T: Element>(mode: ResizeMode, coordinates: Coordinates, region: (f64, f64), size: u64, x: &[T]) -> Vec<T> {
        let op = Op::Resize {
            mode,
            coordinates,
            scales: vec![Real(size as f64 / x.len() as f64)],
            region: vec![(Real(region.0), Real(region.1))],
            sizes: vec![size],
        };
        let x = Tensor::from_elements(&[x.len() as u64], x).unwrap();
        evaluate(&op, &[&x]).unwrap()[0].elements::<T>().unwrap().to_vec()
    }

    const LINEAR: ResizeMode = ResizeMode::Linear { antialias: false };

    fn close(actual: &[f32], expected: &[f32]) {
        assert_eq!(actual.len(), expected.len());
        assert!(actual.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{actual:?} instead of {expected:?}");
    }

    #[test]
    fn nearest_rounds_four_ways() {
        // Coordinates 0, 0.5, 1, 1.5.
        let of = |rounding| run(ResizeMode::Nearest(rounding), Coordinates::Asymmetric, (0.0, 1.0), 4, &[10i16, 20]);
        assert_eq!(of(NearestRounding::PreferFloor), [10, 10, 20, 20]);
        assert_eq!(of(NearestRounding::PreferCeil), [10, 20, 20, 20]);
        assert_eq!(of(NearestRounding::Floor), [10, 10, 20, 20]);
        assert_eq!(of(NearestRounding::Ceil), [10, 20, 20, 20]);
    }

    #[test]
    fn linear_in_each_coordinate_system() {
        let of = |coordinates, size| run(LINEAR, coordinates, (0.0, 1.0), size, &[1.0f32, 2.0, 3.0, 4.0]);
        close(&of(Coordinates::HalfPixel, 8), &[1.0, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.0]);
        close(&of(Coordinates::AlignCorners, 7), &[1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]);
        close(&of(Coordinates::Asymmetric, 8), &[1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0]);
        close(&of(Coordinates::PytorchHalfPixel, 1), &[1.0]);
        close(&of(Coordinates::HalfPixelSymmetric, 2), &[1.5, 3.5]);
    }

    #[test]
    fn crops_and_extrapolates() {
        let coordinates = Coordinates::TfCropAndResize { extrapolation: Real(10.0) };
        let x = [1.0f32, 2.0, 3.0, 4.0];
        close(&run(LINEAR, coordinates, (0.5, 1.5), 3, &x), &[2.5, 4.0, 10.0].map(|x| x));
        close(&run(LINEAR, coordinates, (0.0, 1.0), 1, &x), &[2.5]);
    }

    #[test]
    fn cubic_reproduces_a_line_inside() {
        let cubic = |exclude_outside| ResizeMode::Cubic { a: Real(-0.5), exclude_outside, antialias: false };
        let x: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let y = run(cubic(false), Coordinates::HalfPixel, (0.0, 1.0), 16, &x);
        let expected: Vec<f32> = (0..16).map(|i| (i as f32 + 0.5) / 2.0 - 0.5).collect();
        close(&y[4..12], &expected[4..12]);
        // Constants survive at the borders when the outside is left out.
        close(&run(cubic(true), Coordinates::HalfPixel, (0.0, 1.0), 7, &[5.0f32; 4]), &[5.0; 7]);
    }

    #[test]
    fn antialiasing_averages() {
        let linear = ResizeMode::Linear { antialias: true };
        // Weights 1/8, 3/8, 3/8, 1/8 around each centre, the edge repeated outside.
        close(&run(linear, Coordinates::HalfPixel, (0.0, 1.0), 2, &[8.0f32, 16.0, 24.0, 32.0]), &[13.0, 27.0]);
        close(&run(linear, Coordinates::HalfPixel, (0.0, 1.0), 4, &[8.0f32, 16.0]), &[8.0, 10.0, 14.0, 16.0]);
    }

    #[test]
    fn all_that_lies_outside_weighs_on_the_edge() {
        let cubic = ResizeMode::Cubic { a: Real(-0.5), exclude_outside: false, antialias: true };
        let x = [1.0f32, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8.0];
        // The one centre lies half-way between the fourth and the fifth element, the filter is eight times as wide.
        let keys = |x: f64| match x.abs() {
            x if x <= 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            x if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            _ => 0.0,
        };
        let (mut sum, mut total) = (0.0, 0.0);
        for position in -20i32..30 {
            let weight = keys((f64::from(position) - 3.5) / 8.0);
            sum += weight * f64::from(x[position.clamp(0, 7) as usize]);
            total += weight;
        }
        close(&run(cubic, Coordinates::HalfPixel, (0.0, 1.0), 1, &x), &[(sum / total) as f32]);
    }

    #[test]
    fn integers_are_truncated() {
        assert_eq!(run(LINEAR, Coordinates::HalfPixel, (0.0, 1.0), 7, &[0u8, 3, 6, 9]), [0, 1, 2, 4, 6, 7, 9]);
    }

    #[test]
    fn two_axes_are_independent() {
        let x = Tensor::from_elements(&[1, 2, 2], &[0.0f32, 2.0, 4.0, 6.0]).unwrap();
        let op = Op::Resize {
            mode: LINEAR,
            coordinates: Coordinates::AlignCorners,
            scales: [1.0, 1.5, 1.5].map(Real).to_vec(),
            region: vec![(Real(0.0), Real(1.0)); 3],
            sizes: vec![1, 3, 3],
        };
        let y = evaluate(&op, &[&x]).unwrap();
        assert_eq!(y[0].elements::<f32>().unwrap(), [0.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 6.0]);
    }
}
