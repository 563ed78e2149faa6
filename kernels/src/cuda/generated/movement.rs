//! Primitives that move elements: where the element at a position comes from.
//!
//! Transposing, slicing and reshaping only rewrite the position. Concatenation and padding branch: one branch for all
//! lanes where they agree. Gathers read a position first.

use planfile::RankScalar;
use planfile::op::PadMode;

use super::affine::{Affine, Spread};
use super::kernel::{Kernel, Operand};
use super::literal::value;

impl Kernel<'_> {
    pub(super) fn reshape(&mut self, x: u32, number: u32, index: &[Affine]) -> Option<Operand> {
        let (from, to) = (self.sizes(number), self.sizes(x));
        let flat = Affine::flat(index, &from);
        if let Some(split) = flat.split(&to) {
            return self.value(x, split);
        }
        if self.spread(&flat) != Spread::Uniform {
            return self.by_lane(number, index);
        }
        let count = from.iter().product();
        let held = self.hold(&flat, count);
        let split = held.split(&to)?;
        self.value(x, split)
    }

    pub(super) fn transpose(&mut self, permutation: &[u8], x: u32, index: &[Affine]) -> Option<Operand> {
        let mut source = vec![Affine::default(); index.len()];
        for (position, &axis) in index.iter().zip(permutation) {
            *source.get_mut(usize::from(axis))? = position.clone();
        }
        self.value(x, source)
    }

    pub(super) fn slice(&mut self, starts: &[RankScalar], steps: &[i64], x: u32, index: &[Affine]) -> Option<Operand> {
        let mut source = Vec::with_capacity(index.len());
        for ((position, start), &step) in index.iter().zip(starts).zip(steps) {
            let scaled = position.clone().times(step);
            source.push(match start {
                RankScalar::Uniform(start) => scaled.plus(*start),
                RankScalar::ByRank(_) => {
                    let scalar = self.scalar(start)?;
                    scaled.and(Affine { scalars: vec![(1, scalar)], ..Affine::default() })
                }
            });
        }
        self.value(x, source)
    }

    pub(super) fn concat(&mut self, axis: usize, operands: &[u32], number: u32, index: &[Affine]) -> Option<Operand> {
        let mut parts = Vec::new();
        let mut end = 0;
        for &operand in operands {
            let size = self.sizes(operand)[axis];
            if size > 0 {
                parts.push((operand, end, end + size));
                end += size;
            }
        }
        let position = index.get(axis)?.clone();
        if position.terms.is_empty() && position.scalars.is_empty() {
            let at = position.constant.cast_unsigned();
            let &(operand, start, _) = parts.iter().find(|part| at < part.2)?;
            let mut source = index.to_vec();
            source[axis] = position.plus(-start.cast_signed());
            return self.value(operand, source);
        }
        if parts.len() > 1 && !parts.iter().all(|part| self.agree_below(&position, part.2)) {
            return self.by_lane(number, index);
        }
        if let [(operand, ..)] = parts.as_slice() {
            return self.value(*operand, index.to_vec());
        }
        let uniform = index.iter().all(|position| self.spread(position) == Spread::Uniform);
        let result = self.declare('v', value(self.dtype(number)), uniform);
        let (text, last) = (self.position(&position), parts.len() - 1);
        for (turn, (operand, start, stop)) in parts.into_iter().enumerate() {
            let head = match turn {
                0 => format!("if ({text} < {})", self.number(stop)),
                turn if turn < last => format!("else if ({text} < {})", self.number(stop)),
                _ => "else".to_owned(),
            };
            let mut source = index.to_vec();
            source[axis] = position.clone().plus(-start.cast_signed());
            self.branch(&head, (stop - start, end), |kernel| {
                let part = kernel.value(operand, source)?;
                kernel.assign(&result, &part)
            })?;
        }
        Some(result)
    }

    pub(super) fn pad(
        &mut self,
        (low, high): (&[i64], &[i64]),
        mode: PadMode,
        operands: &[u32],
        number: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let x = *operands.first()?;
        let (from, to) = (self.sizes(x), self.sizes(number));
        let shifted: Vec<Affine> = index.iter().zip(low).map(|(position, &low)| position.clone().plus(-low)).collect();
        let changed: Vec<usize> = (0..from.len()).filter(|&axis| low[axis] > 0 || high[axis] > 0).collect();
        if changed.is_empty() {
            return self.value(x, shifted);
        }
        if mode != PadMode::Constant {
            if changed.iter().any(|&axis| self.spread(&shifted[axis]) != Spread::Uniform) {
                return self.by_lane(number, index);
            }
            let mut source = shifted;
            for axis in changed {
                source[axis] = self.padded(mode, &source[axis], from[axis]);
            }
            return self.value(x, source);
        }
        let value_operand = self.value(*operands.get(1)?, Vec::new())?;
        if !changed.iter().all(|&axis| self.agree_below(&shifted[axis], from[axis])) {
            return self.by_lane(number, index);
        }
        let uniform = shifted.iter().all(|position| self.spread(position) == Spread::Uniform);
        let result = self.declare('v', value(self.dtype(number)), uniform);
        let inside: Vec<String> = changed
            .iter()
            .map(|&axis| format!("static_cast<Index>({}) < {}", self.position(&shifted[axis]), self.number(from[axis])))
            .collect();
        let kept = |axis: usize| from[axis].min(to[axis]);
        let share = changed.iter().fold((1u64, 1u64), |(part, whole), &axis| {
            (part.saturating_mul(kept(axis)), whole.saturating_mul(to[axis]))
        });
        self.branch(&format!("if ({})", inside.join(" && ")), share, |kernel| {
            let part = kernel.value(x, shifted)?;
            kernel.assign(&result, &part)
        })?;
        self.block("else", |kernel| kernel.assign(&result, &value_operand))?;
        Some(result)
    }

    /// The position below `size` that a padded one repeats.
    fn padded(&mut self, mode: PadMode, position: &Affine, size: u64) -> Affine {
        let function = match mode {
            PadMode::Constant | PadMode::Edge => "edge",
            PadMode::Reflect => "reflect",
            PadMode::Wrap => "wrap",
        };
        let (name, text) = (self.fresh('p'), self.position(position));
        self.line(&format!("const Index {name} = {function}(signed_index({text}), {size});"));
        self.variable(name, size)
    }

    /// Reads a position along a dimension of `size`, counted from the end where negative; reports one that is outside.
    fn read_position(&mut self, indices: u32, at: Vec<Affine>, size: u64) -> Option<Affine> {
        let read = self.value(indices, at)?;
        let name = self.fresh('p');
        self.line(&format!("const Index {name} = resolve({}, {size}, fault);", read.name));
        Some(self.variable(name, size))
    }

    /// What a gather from an operand without elements gives: there is no position that would not be outside.
    fn outside(&mut self, number: u32) -> Operand {
        self.line("*fault = 1;");
        Operand::uniform(format!("static_cast<{}>(0)", value(self.dtype(number))))
    }

    pub(super) fn gather(&mut self, axis: usize, operands: [u32; 2], number: u32, index: &[Affine]) -> Option<Operand> {
        let [x, indices] = operands;
        if self.ty(x).elements() == Some(0) {
            return Some(self.outside(number));
        }
        let own = index.get(axis..axis + self.ty(indices).rank())?.to_vec();
        if own.iter().any(|position| self.spread(position) != Spread::Uniform) {
            return self.by_lane(number, index);
        }
        let size = self.sizes(x)[axis];
        let after = index.get(axis + own.len()..)?;
        let found = self.read_position(indices, own, size)?;
        self.value(x, [index.get(..axis)?, &[found], after].concat())
    }

    pub(super) fn gather_elements(
        &mut self,
        axis: usize,
        operands: [u32; 2],
        number: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let [x, indices] = operands;
        if self.ty(x).elements() == Some(0) {
            return Some(self.outside(number));
        }
        if index.iter().any(|position| self.spread(position) != Spread::Uniform) {
            return self.by_lane(number, index);
        }
        let size = self.sizes(x)[axis];
        let mut source = index.to_vec();
        source[axis] = self.read_position(indices, index.to_vec(), size)?;
        self.value(x, source)
    }

    pub(super) fn gather_nd(
        &mut self,
        batch: usize,
        operands: [u32; 2],
        number: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let [x, indices] = operands;
        if self.ty(x).elements() == Some(0) {
            return Some(self.outside(number));
        }
        let (sizes, depth) = (self.sizes(x), *self.sizes(indices).last()?);
        let outer = index.get(..self.ty(indices).rank() - 1)?.to_vec();
        if outer.iter().any(|position| self.spread(position) != Spread::Uniform) {
            return self.by_lane(number, index);
        }
        let mut source = index.get(..batch)?.to_vec();
        for level in 0..usize::try_from(depth).ok()? {
            let mut at = outer.clone();
            at.push(Affine::constant(i64::try_from(level).ok()?));
            let size = *sizes.get(batch + level)?;
            source.push(self.read_position(indices, at, size)?);
        }
        source.extend_from_slice(index.get(outer.len()..)?);
        self.value(x, source)
    }

    /// Pairs `(a, b)` of features become `(a cos - b sin, a sin + b cos)`; the rest is copied.
    pub(super) fn rotary(
        &mut self,
        interleaved: bool,
        rotary: u64,
        operands: &[u32],
        number: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let &[x, cos, sin] = operands else { return None };
        let [batch, head, row, feature] = index else { return None };
        let (dtype, half) = (self.dtype(x), rotary / 2);
        let table_batch = if self.sizes(cos)[0] == 1 { Affine::default() } else { batch.clone() };
        let agree = [half, rotary].iter().all(|&bound| self.agree_below(feature, bound));
        if !agree || (interleaved && self.spread(feature) != Spread::Uniform) {
            return self.by_lane(number, index);
        }
        let uniform = index.iter().all(|position| self.spread(position) == Spread::Uniform);
        let result = self.declare('v', value(dtype), uniform);
        let at = |feature: &Affine| vec![batch.clone(), head.clone(), row.clone(), feature.clone()];
        let width = self.sizes(x)[3].max(1);
        // Either member of the pair, with what tells them apart.
        let text = self.position(feature);
        let (first, pair, other) = if interleaved {
            let held = self.hold(feature, width);
            let digits = held.split(&[width.div_ceil(2), 2]).unwrap_or_else(|| {
                // An odd number of features: the last is beyond all pairs.
                let digit = |divide, size| Affine::digit(held.terms.first().map_or(0, |term| term.base), divide, size);
                vec![digit(2, width.div_ceil(2)), digit(1, 2)]
            });
            let pair = digits.first()?.clone();
            (format!("{text} < {} && ({text}) % 2 == 0", self.number(rotary)), [pair.clone(), pair], 1)
        } else {
            let second = feature.clone().plus(-half.cast_signed());
            (format!("{text} < {}", self.number(half)), [feature.clone(), second], half.cast_signed())
        };
        let second = format!("else if ({text} < {})", self.number(rotary));
        for (head, pair, is_first) in [(format!("if ({first})"), &pair[0], true), (second, &pair[1], false)] {
            let shift = if is_first { other } else { -other };
            self.branch(&head, (half, width), |kernel| {
                let own = kernel.value(x, at(feature))?;
                let partner = kernel.value(x, at(&feature.clone().plus(shift)))?;
                let table = vec![table_batch.clone(), row.clone(), pair.clone()];
                let (cos, sin) = (kernel.value(cos, table.clone())?, kernel.value(sin, table)?);
                kernel.each_lane(|kernel| {
                    let sign = if is_first { '-' } else { '+' };
                    let [own, partner, cos, sin] = [&own, &partner, &cos, &sin].map(Operand::lane);
                    let sum = format!("{own} * {cos} {sign} {partner} * {sin}");
                    let rounded = format!("round_to<{}>({sum})", super::literal::element(dtype));
                    kernel.line(&format!("{} = {rounded};", result.lane()));
                    Some(())
                })
            })?;
        }
        self.branch("else", (width - rotary, width), |kernel| {
            let own = kernel.value(x, at(feature))?;
            kernel.assign(&result, &own)
        })?;
        Some(result)
    }
}
