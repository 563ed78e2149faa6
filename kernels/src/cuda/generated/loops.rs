//! Primitives that combine many elements into one, as plain loops: whatever no better kernel takes.

use planfile::DType;
use planfile::op::{Combine, IndexOrder, PoolKind, ReduceKind, Window};

use super::affine::Affine;
use super::kernel::{Kernel, Operand};
use super::literal::{is_half, value};

/// Sums of booleans are "or"; products and minima "and", of which nothing is true.
const fn logical(combine: Combine, dtype: DType) -> Combine {
    match (dtype, combine) {
        (DType::Bool, Combine::Sum) => Combine::Max,
        (DType::Bool, Combine::Min) => Combine::Prod,
        (_, other) => other,
    }
}

fn identity(combine: Combine, ty: &str) -> String {
    match combine {
        Combine::Sum => format!("static_cast<{ty}>(0)"),
        Combine::Prod => format!("static_cast<{ty}>(1)"),
        Combine::Max => format!("Traits<{ty}>::lowest()"),
        Combine::Min => format!("Traits<{ty}>::highest()"),
    }
}

const fn function(combine: Combine) -> &'static str {
    match combine {
        Combine::Sum => "scalar::add",
        Combine::Prod => "scalar::mul",
        Combine::Max => "scalar::larger",
        Combine::Min => "scalar::smaller",
    }
}

/// Positions of windows along one spatial dimension.
struct Slide {
    stride: i64,
    dilation: i64,
    low: i64,
}

impl Slide {
    fn of(window: &Window, axis: usize) -> Self {
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Self {
            stride: signed(window.strides[axis]),
            dilation: signed(window.dilations[axis]),
            low: window.pads[axis].0,
        }
    }
}

impl Kernel<'_> {
    /// A variable that a loop updates.
    fn accumulator(&mut self, ty: &str, start: &str) -> String {
        let name = self.fresh('a');
        self.line(&format!("{ty} {name} = {start};"));
        name
    }

    /// The accumulator rounded to what a half type holds; others as they are.
    fn rounded(&mut self, dtype: DType, text: &str) -> Operand {
        let name = self.fresh('v');
        let text = if is_half(dtype) { format!("round_to<{}>({text})", dtype.name()) } else { text.to_owned() };
        self.line(&format!("const {} {name} = {text};", value(dtype)));
        Operand::uniform(name)
    }

    pub(super) fn reduce(
        &mut self,
        kind: ReduceKind,
        axes: &[u8],
        keep: bool,
        x: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let (sizes, dtype) = (self.sizes(x), self.dtype(x));
        let is_reduced: Vec<bool> =
            (0..sizes.len()).map(|axis| axes.iter().any(|&own| usize::from(own) == axis)).collect();
        let reduced: Vec<u64> = sizes.iter().zip(&is_reduced).filter(|own| *own.1).map(|own| *own.0).collect();
        let count: u64 = reduced.iter().product();
        let source = |round: usize| -> Option<Vec<Affine>> {
            let mut digits = Affine::digit(round, 1, count).split(&reduced)?.into_iter();
            let mut kept = index.iter();
            let mut source = Vec::with_capacity(sizes.len());
            for &reduced in &is_reduced {
                if !reduced || keep {
                    let position = kept.next()?;
                    if !reduced {
                        source.push(position.clone());
                        continue;
                    }
                }
                source.push(digits.next()?);
            }
            Some(source)
        };
        let ty = value(dtype);
        match kind {
            ReduceKind::Combine(combine) => {
                let combine = logical(combine, dtype);
                let sum = self.accumulator(ty, &identity(combine, ty));
                self.each(count, |kernel, round| {
                    let own = kernel.value(x, source(round)?)?;
                    kernel.line(&format!("{sum} = {}({sum}, {});", function(combine), own.name));
                    Some(())
                })?;
                Some(self.rounded(dtype, &sum))
            }
            ReduceKind::Mean => {
                let sum = self.accumulator(ty, &identity(Combine::Sum, ty));
                self.each(count, |kernel, round| {
                    let own = kernel.value(x, source(round)?)?;
                    kernel.line(&format!("{sum} = scalar::add({sum}, {});", own.name));
                    Some(())
                })?;
                Some(self.rounded(dtype, &format!("scalar::mean({sum}, {count}ll)")))
            }
            ReduceKind::ArgMax { last } => self.arg(x, count, last, "scalar::gt", source),
            ReduceKind::ArgMin { last } => self.arg(x, count, last, "scalar::lt", source),
        }
    }

    /// NaN is the extremum; the first of equals, or the last.
    fn arg(
        &mut self,
        x: u32,
        count: u64,
        last: bool,
        better: &str,
        source: impl Fn(usize) -> Option<Vec<Affine>>,
    ) -> Option<Operand> {
        let ty = value(self.dtype(x));
        let best = self.accumulator("i64", "0");
        let top = self.accumulator(ty, &format!("static_cast<{ty}>(0)"));
        self.each(count, |kernel, round| {
            let own = kernel.value(x, source(round)?)?.name;
            let position = kernel.position(&Affine::digit(round, 1, count));
            let equal = format!("{own} == {top} || (scalar::is_nan({own}) && scalar::is_nan({top}))");
            let wins = format!("!scalar::is_nan({top}) && (scalar::is_nan({own}) || {better}({own}, {top}))");
            let wins = if last { format!("({equal}) || ({wins})") } else { format!("!({equal}) && {wins}") };
            kernel.block(&format!("if ({position} == 0 || {wins})"), |kernel| {
                kernel.line(&format!("{best} = static_cast<i64>({position});"));
                kernel.line(&format!("{top} = {own};"));
                Some(())
            })
        })?;
        Some(Operand::uniform(best))
    }

    /// Each element combines those before it anew: for short dimensions.
    pub(super) fn scan(
        &mut self,
        combine: Combine,
        axis: usize,
        (exclusive, reverse): (bool, bool),
        x: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let (dtype, length) = (self.dtype(x), self.sizes(x)[axis]);
        let (ty, combine) = (value(dtype), logical(combine, dtype));
        let sum = self.accumulator(ty, &identity(combine, ty));
        let own = index.get(axis)?.clone();
        let from_start = if reverse { own.times(-1).plus(length.cast_signed() - 1) } else { own };
        let end = self.position(&from_start.plus(i64::from(!exclusive)));
        let name = self.fresh('r');
        let base = self.add_base(name.clone(), length);
        let head = format!("for (Index {name} = 0; {name} < {end}; ++{name})");
        self.branch(&head, (length, 1), |kernel| {
            let round = Affine::digit(base, 1, length);
            let mut source = index.to_vec();
            source[axis] = if reverse { round.times(-1).plus(length.cast_signed() - 1) } else { round };
            let own = kernel.value(x, source)?;
            kernel.line(&format!("{sum} = {}({sum}, {});", function(combine), own.name));
            Some(())
        })?;
        Some(self.rounded(dtype, &sum))
    }

    pub(super) fn dot(
        &mut self,
        batch: &[(u8, u8)],
        contract: &[(u8, u8)],
        accumulate: DType,
        [a, b]: [u32; 2],
        number: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let out = self.dtype(number);
        let sums = value(accumulate);
        let (a_sizes, b_sizes) = (self.sizes(a), self.sizes(b));
        let depths: Vec<u64> = contract.iter().map(|pair| a_sizes[usize::from(pair.0)]).collect();
        let depth: u64 = depths.iter().product();
        let sum = self.accumulator(sums, &format!("static_cast<{sums}>(0)"));
        self.each(depth, |kernel, round| {
            let digits = Affine::digit(round, 1, depth).split(&depths)?;
            let mut sources = [vec![None; a_sizes.len()], vec![None; b_sizes.len()]];
            let paired = batch.iter().zip(index).chain(contract.iter().zip(&digits));
            for (pair, position) in paired {
                sources[0][usize::from(pair.0)] = Some(position.clone());
                sources[1][usize::from(pair.1)] = Some(position.clone());
            }
            let mut free = index.iter().skip(batch.len());
            for own in sources.iter_mut().flatten().filter(|own| own.is_none()) {
                *own = Some(free.next()?.clone());
            }
            let mut factors = Vec::with_capacity(2);
            for (operand, source) in [a, b].into_iter().zip(sources) {
                let own = kernel.value(operand, source.into_iter().collect::<Option<Vec<_>>>()?)?;
                factors.push(format!("convert<{sums}>({})", own.name));
            }
            kernel.line(&format!("{sum} = scalar::add({sum}, scalar::mul({}));", factors.join(", ")));
            Some(())
        })?;
        let text =
            if out.accumulator() == accumulate.accumulator() { sum } else { format!("convert<{}>({sum})", value(out)) };
        Some(self.rounded(out, &text))
    }

    pub(super) fn conv(
        &mut self,
        window: &Window,
        groups: u64,
        transposed: bool,
        [x, w]: [u32; 2],
        number: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let (x_sizes, w_sizes, y_sizes) = (self.sizes(x), self.sizes(w), self.sizes(number));
        let (dtype, ty) = (self.dtype(x), value(self.dtype(x)));
        let (inputs, outputs) = (x_sizes[1] / groups, y_sizes[1] / groups);
        let channel = self.hold(index.get(1)?, y_sizes[1]);
        let [group, output]: [Affine; 2] = channel.split(&[groups, outputs])?.try_into().ok()?;
        let sum = self.accumulator(ty, &format!("static_cast<{ty}>(0)"));
        let taps: u64 = window.sizes.iter().product();
        self.each(taps, |kernel, tap| {
            let taps = Affine::digit(tap, 1, taps).split(&window.sizes)?;
            let mut spatial = Vec::with_capacity(taps.len());
            for (axis, tap) in taps.iter().enumerate() {
                let slide = Slide::of(window, axis);
                let (position, input) = (index.get(axis + 2)?.clone(), x_sizes[axis + 2]);
                let reach = tap.clone().times(slide.dilation);
                let name = kernel.fresh('p');
                if transposed {
                    // The window at `q` writes `q · stride + tap · dilation - low`.
                    let shifted = kernel.position(&position.and(reach.times(-1)).plus(slide.low));
                    let signed = kernel.fresh('p');
                    kernel.line(&format!("const i64 {signed} = signed_index({shifted});"));
                    kernel.line(&format!("if ({signed} < 0 || {signed} % {} != 0) continue;", slide.stride));
                    kernel.line(&format!("const Index {name} = static_cast<Index>({signed} / {});", slide.stride));
                } else {
                    let text = kernel.position(&position.times(slide.stride).and(reach).plus(-slide.low));
                    kernel.line(&format!("const Index {name} = {text};"));
                }
                kernel.line(&format!("if ({name} >= {}) continue;", kernel.number(input)));
                spatial.push(kernel.variable(name, input));
            }
            kernel.each(inputs, |kernel, round| {
                let round = Affine::digit(round, 1, inputs);
                let input = round.clone().and(group.clone().times(inputs.cast_signed()));
                let (row, column) = if transposed { (input.clone(), output.clone()) } else { (channel.clone(), round) };
                debug_assert_eq!(w_sizes.len(), taps.len() + 2);
                let from = kernel.value(x, [&[index.first()?.clone(), input], spatial.as_slice()].concat())?;
                let weight = kernel.value(w, [&[row, column], taps.as_slice()].concat())?;
                kernel.line(&format!("{sum} = scalar::add({sum}, scalar::mul({}, {}));", from.name, weight.name));
                Some(())
            })
        })?;
        Some(self.rounded(dtype, &sum))
    }

    /// The values, and for maxima the indices beside them where they are asked for.
    pub(super) fn pool(
        &mut self,
        kind: PoolKind,
        window: &Window,
        order: Option<IndexOrder>,
        x: u32,
        index: &[Affine],
    ) -> Option<Vec<Operand>> {
        let (sizes, dtype) = (self.sizes(x), self.dtype(x));
        let (ty, taps) = (value(dtype), window.sizes.iter().product::<u64>());
        let start =
            if kind == PoolKind::Max { format!("Traits<{ty}>::lowest()") } else { format!("static_cast<{ty}>(0)") };
        let result = self.accumulator(ty, &start);
        let found = order.map(|_| self.accumulator("i64", "-1"));
        let counts = matches!(kind, PoolKind::Average { .. }).then(|| self.accumulator("i32", "0"));
        let spatial_sizes = sizes.get(2..)?.to_vec();
        self.each(taps, |kernel, tap| {
            let taps = Affine::digit(tap, 1, taps).split(&window.sizes)?;
            let mut source = index.get(..2)?.to_vec();
            let mut inside = Vec::new();
            for (axis, tap) in taps.into_iter().enumerate() {
                let (slide, input) = (Slide::of(window, axis), spatial_sizes[axis]);
                let reach = index.get(axis + 2)?.clone().times(slide.stride).and(tap.times(slide.dilation));
                let name = kernel.fresh('p');
                if kind == (PoolKind::Average { count_pads: true }) {
                    let end = i128::from(input) + i128::from(slide.low) + i128::from(window.pads[axis].1);
                    let text = kernel.position(&reach);
                    kernel
                        .line(&format!("if ({text} >= {}) continue;", kernel.number(u64::try_from(end).unwrap_or(0))));
                }
                let text = kernel.position(&reach.plus(-slide.low));
                kernel.line(&format!("const Index {name} = {text};"));
                inside.push(format!("{name} < {}", kernel.number(input)));
                source.push(kernel.variable(name, input));
            }
            let count = |kernel: &mut Self| {
                if let Some(count) = &counts {
                    kernel.line(&format!("++{count};"));
                }
            };
            if kind == (PoolKind::Average { count_pads: true }) {
                count(kernel);
            }
            if !inside.is_empty() {
                kernel.line(&format!("if (!({})) continue;", inside.join(" && ")));
            }
            if kind == (PoolKind::Average { count_pads: false }) {
                count(kernel);
            }
            let plane = kernel.position(&Affine::flat(&source[2..], &spatial_sizes));
            let own = kernel.value(x, source)?.name;
            match (kind, &found) {
                (PoolKind::Max, None) => kernel.line(&format!("if ({own} > {result}) {result} = {own};")),
                (PoolKind::Max, Some(found)) => {
                    kernel.line(&format!("if ({own} > {result} || {found} < 0) {found} = static_cast<i64>({plane});"));
                    kernel.line(&format!("if ({own} > {result}) {result} = {own};"));
                }
                (PoolKind::Average { .. } | PoolKind::Lp { p: 1 }, _) => {
                    let term = if counts.is_some() { own } else { format!("scalar::magnitude({own})") };
                    kernel.line(&format!("{result} += {term};"));
                }
                (PoolKind::Lp { p: 2 }, _) => kernel.line(&format!("{result} += {own} * {own};")),
                (PoolKind::Lp { p }, _) => {
                    let power = format!("scalar::pow(scalar::magnitude({own}), static_cast<{ty}>({p}.0))");
                    kernel.line(&format!("{result} += {power};"));
                }
            }
            Some(())
        })?;
        let finished = match (kind, &counts) {
            (PoolKind::Average { .. }, Some(count)) => format!("{result} / static_cast<{ty}>({count})"),
            (PoolKind::Lp { p: 2 }, _) => format!("scalar::sqrt({result})"),
            (PoolKind::Lp { p }, _) if p != 1 => format!("scalar::pow({result}, static_cast<{ty}>(1.0 / {p}.0))"),
            _ => result,
        };
        let mut results = vec![self.rounded(dtype, &finished)];
        if let (Some(found), Some(order)) = (found, order) {
            results.push(self.pool_index(&found, order, &sizes, index)?);
        }
        Some(results)
    }

    /// The flat index into the pooled tensor of a row-major one into its plane; -1 where the tensor has no elements.
    fn pool_index(&mut self, found: &str, order: IndexOrder, sizes: &[u64], index: &[Affine]) -> Option<Operand> {
        let spatial = sizes.get(2..)?;
        let plane: u64 = spatial.iter().product();
        if plane == 0 {
            return Some(Operand::uniform("static_cast<i64>(-1)".to_owned()));
        }
        let within = self.fresh('p');
        self.line(&format!("const Index {within} = static_cast<Index>({found} < 0 ? 0 : {found});"));
        let within = self.variable(within, plane);
        let position = match order {
            IndexOrder::RowMajor => within,
            IndexOrder::ColumnMajor => {
                let mut digits = within.split(spatial)?;
                digits.reverse();
                let reversed: Vec<u64> = spatial.iter().rev().copied().collect();
                Affine::flat(&digits, &reversed)
            }
        };
        let planes = Affine::flat(index.get(..2)?, sizes.get(..2)?);
        let text = self.position(&planes.times(plane.cast_signed()).and(position));
        let name = self.fresh('v');
        self.line(&format!("const i64 {name} = static_cast<i64>(static_cast<Index>({text}));"));
        Some(Operand::uniform(name))
    }
}
