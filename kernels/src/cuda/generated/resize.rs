//! Resampling: coordinates and weights are computed on the device, in `f32` and in the order of the definition.

use planfile::op::{Coordinates, NearestRounding, Real, ResizeMode};
use planfile::{DType, Scalar};

use super::affine::{Affine, Spread};
use super::kernel::{Kernel, Operand};
use super::literal::{constant, f32, is_half, value};

/// An axis that is resampled.
struct Axis {
    axis: usize,
    input: u64,
    output: u64,
    scale: f32,
    region: (f32, f32),
    /// Position in the result.
    position: Affine,
}

/// The interpolating function.
#[derive(Clone, Copy)]
struct Filter {
    /// Coefficient of the cubic; the triangle without.
    cubic: Option<f32>,
    antialias: bool,
    exclude_outside: bool,
}

/// An axis with the variables that hold what all of its taps share.
struct Sampled {
    axis: usize,
    input: u64,
    before: i64,
    floor: String,
    ratio: String,
    compress: f32,
    factor: Option<String>,
}

impl Axis {
    /// Whether every position is that of the input.
    fn is_identity(&self, coordinates: Coordinates) -> bool {
        let crops = matches!(coordinates, Coordinates::TfCropAndResize { .. }) && self.region != (0.0, 1.0);
        self.input == self.output && (self.scale - 1.0).abs() == 0.0 && !crops
    }

    /// The input coordinate as an expression of the output position.
    fn coordinate(&self, coordinates: Coordinates, at: &str) -> String {
        let (input, output) = (self.input as f32, self.output as f32);
        let half_pixel = format!("({at} + 0.5f) / {} - 0.5f", f32(self.scale));
        match coordinates {
            Coordinates::HalfPixel => half_pixel,
            Coordinates::HalfPixelSymmetric => {
                let adjustment = output / (self.scale * input);
                let offset = input / 2.0 * (1.0 - adjustment);
                format!("{} + ({at} + 0.5f) / {} - 0.5f", f32(offset), f32(self.scale))
            }
            Coordinates::PytorchHalfPixel if self.output > 1 => half_pixel,
            Coordinates::AlignCorners if self.output > 1 => {
                format!("{at} * {} / {}", f32(input - 1.0), f32(output - 1.0))
            }
            Coordinates::PytorchHalfPixel | Coordinates::AlignCorners => f32(0.0),
            Coordinates::Asymmetric => format!("{at} / {}", f32(self.scale)),
            Coordinates::TfCropAndResize { .. } => {
                let (start, end) = self.region;
                if self.output > 1 {
                    let (first, length) = (f32(start * (input - 1.0)), f32(end - start));
                    format!("{first} + {at} * {length} * {} / {}", f32(input - 1.0), f32(output - 1.0))
                } else {
                    f32(0.5 * (start + end) * (input - 1.0))
                }
            }
        }
    }
}

impl Kernel<'_> {
    pub(super) fn resize(
        &mut self,
        (mode, coordinates): (ResizeMode, Coordinates),
        scales: &[Real],
        region: &[(Real, Real)],
        x: u32,
        number: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let (from, to, dtype) = (self.sizes(x), self.sizes(number), self.dtype(x));
        if from.contains(&0) {
            return None;
        }
        let axes = index.iter().enumerate().map(|(axis, position)| Axis {
            axis,
            input: from[axis],
            output: to[axis],
            scale: scales[axis].0 as f32,
            region: (region[axis].0.0 as f32, region[axis].1.0 as f32),
            position: position.clone(),
        });
        let axes: Vec<Axis> = axes.filter(|axis| !axis.is_identity(coordinates)).collect();
        if axes.iter().any(|axis| self.spread(&axis.position) != Spread::Uniform) {
            return self.by_lane(number, index);
        }
        let mut at = Vec::with_capacity(axes.len());
        for axis in &axes {
            let position = format!("static_cast<f32>({})", self.position(&axis.position));
            let (name, text) = (self.fresh('c'), axis.coordinate(coordinates, &position));
            self.line(&format!("const f32 {name} = {text};"));
            at.push(name);
        }
        let Coordinates::TfCropAndResize { extrapolation } = coordinates else {
            return self.resampled(mode, &axes, &at, x, index);
        };
        let uniform = index.iter().all(|position| self.spread(position) == Spread::Uniform);
        let result = self.declare('v', value(dtype), uniform);
        let within = |(axis, at): (&Axis, &String)| format!("{at} >= 0.0f && {at} <= {}", f32((axis.input - 1) as f32));
        let inside: Vec<String> = axes.iter().zip(&at).map(within).collect();
        let condition = if inside.is_empty() { "true".to_owned() } else { inside.join(" && ") };
        self.block(&format!("if ({condition})"), |kernel| {
            let own = kernel.resampled(mode, &axes, &at, x, index)?;
            kernel.assign(&result, &own)
        })?;
        let outside = Operand::uniform(constant(Scalar::from_f64(dtype, extrapolation.0)));
        self.block("else", |kernel| kernel.assign(&result, &outside))?;
        Some(result)
    }

    fn resampled(
        &mut self,
        mode: ResizeMode,
        axes: &[Axis],
        at: &[String],
        x: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let filter = match mode {
            ResizeMode::Nearest(rounding) => {
                let mut source = index.to_vec();
                for (axis, at) in axes.iter().zip(at) {
                    let rounded = match rounding {
                        NearestRounding::PreferFloor => format!("ceilf({at} - 0.5f)"),
                        NearestRounding::PreferCeil => format!("floorf({at} + 0.5f)"),
                        NearestRounding::Floor => format!("floorf({at})"),
                        NearestRounding::Ceil => format!("ceilf({at})"),
                    };
                    let name = self.fresh('p');
                    self.line(&format!("const Index {name} = edge(convert<i64>({rounded}), {});", axis.input));
                    source[axis.axis] = self.variable(name, axis.input);
                }
                return self.value(x, source);
            }
            ResizeMode::Linear { antialias } => Filter { cubic: None, antialias, exclude_outside: false },
            ResizeMode::Cubic { a, exclude_outside, antialias } => {
                Filter { cubic: Some(a.0 as f32), antialias, exclude_outside }
            }
        };
        let mut sampled = Vec::with_capacity(axes.len());
        for (axis, at) in axes.iter().zip(at) {
            sampled.push(self.sample(filter, axis, at)?);
        }
        let dtype = self.dtype(x);
        let sum = self.interpolate(filter, &sampled, x, index.to_vec())?;
        let text = match dtype {
            DType::Bool => format!("to_bool({sum})"),
            dtype if is_half(dtype) => format!("round_to<{}>({sum})", dtype.name()),
            dtype if dtype.is_float() => sum,
            dtype => format!("convert<{}>({sum})", value(dtype)),
        };
        let name = self.fresh('v');
        self.line(&format!("const {} {name} = {text};", value(dtype)));
        Some(Operand::uniform(name))
    }

    /// What all taps of an axis share.
    fn sample(&mut self, filter: Filter, axis: &Axis, at: &str) -> Option<Sampled> {
        let support = if filter.cubic.is_some() { 2.0f32 } else { 1.0 };
        let compress = if filter.antialias { axis.scale.min(1.0) } else { 1.0 };
        // Taps whose distance times the compression is below the support of the filter, which is bounded by the input.
        let limit = support * (axis.input as f32 + 1.0);
        let before = (support / compress).ceil().clamp(1.0, limit) as i64;
        let [floor, ratio] = ['f', 't'].map(|letter| self.fresh(letter));
        self.line(&format!("const f32 {ratio} = {at} - floorf({at});"));
        self.line(&format!("const i64 {floor} = convert<i64>(floorf({at}));"));
        let mut sampled = Sampled { axis: axis.axis, input: axis.input, before, floor, ratio, compress, factor: None };
        if filter.antialias || filter.exclude_outside {
            let [total, factor] = ['a', 'w'].map(|letter| self.fresh(letter));
            self.line(&format!("f32 {total} = 0.0f;"));
            self.taps(filter, &sampled, |kernel, _, weight| {
                kernel.line(&format!("{total} += {weight};"));
                Some(())
            })?;
            self.line(&format!("const f32 {factor} = 1.0f / {total};"));
            sampled.factor = Some(factor);
        }
        Some(sampled)
    }

    /// A loop over the taps; the body gets the input position, possibly outside, and the weight.
    fn taps(
        &mut self,
        filter: Filter,
        axis: &Sampled,
        body: impl FnOnce(&mut Self, &str, &str) -> Option<()>,
    ) -> Option<()> {
        let [tap, source, weight] = ['r', 'p', 'w'].map(|letter| self.fresh(letter));
        let head = format!("for (i64 {tap} = {}; {tap} <= {}; ++{tap})", 1 - axis.before, axis.before);
        self.branch(&head, (2 * axis.before.cast_unsigned(), 1), |kernel| {
            let distance = format!("(static_cast<f32>({tap}) - {}) * {}", axis.ratio, f32(axis.compress));
            let function = match filter.cubic {
                Some(a) => format!("cubic({distance}, {})", f32(a)),
                None => format!("triangle({distance})"),
            };
            let function = match &axis.factor {
                Some(factor) => format!("{function} * {factor}"),
                None => function,
            };
            kernel.line(&format!("const i64 {source} = {} + {tap};", axis.floor));
            let skips = filter.exclude_outside;
            let kept =
                if skips { format!("{source} < 0 || {source} >= {} ? 0.0f : ", axis.input) } else { String::new() };
            kernel.line(&format!("const f32 {weight} = {kept}{function};"));
            body(kernel, &source, &weight)
        })
    }

    /// The weighted sum over all taps, the first axis innermost: the order of resampling axis by axis.
    fn interpolate(&mut self, filter: Filter, axes: &[Sampled], x: u32, source: Vec<Affine>) -> Option<String> {
        let dtype = self.dtype(x);
        let Some((axis, rest)) = axes.split_last() else {
            let own = self.value(x, source)?.name;
            return Some(if dtype.is_float() { own } else { format!("to_f32({own})") });
        };
        let is_double = dtype == DType::F64;
        let (sum, ty) = (self.fresh('a'), if is_double { "f64" } else { "f32" });
        self.line(&format!("{ty} {sum} = 0;"));
        self.taps(filter, axis, |kernel, position, weight| {
            kernel.line(&format!("if ({weight} == 0.0f) continue;"));
            let name = kernel.fresh('p');
            kernel.line(&format!("const Index {name} = edge({position}, {});", axis.input));
            let mut source = source.clone();
            source[axis.axis] = kernel.variable(name, axis.input);
            let own = kernel.interpolate(filter, rest, x, source)?;
            // Rounded after each step: integers are truncated, which shows the last bit.
            kernel.line(&if is_double {
                format!("{sum} = {sum} + {own} * static_cast<f64>({weight});")
            } else {
                format!("{sum} = __fadd_rn({sum}, __fmul_rn({own}, {weight}));")
            });
            Some(())
        })?;
        Some(sum)
    }
}
