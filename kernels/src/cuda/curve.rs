//! Functions of one number of the form `plain + factor · tanh(inner)`, all three polynomials: enough to tell every
//! spelling of the GELU by `tanh`.
//!
//! x · 0.5 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))   and   x · sigmoid(2 · √(2/π) · (x + 0.044715 · x³))

use std::f64::consts::FRAC_2_PI;

/// Coefficients of 1, x, x² and x³.
pub(super) type Polynomial = [f64; 4];

/// How far √(2/π) and 0.044715 may be off, as a share: a model may hold them in `f16`, or cut to a few digits.
const TOLERANCE: f64 = 5e-4;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Curve {
    plain: Polynomial,
    factor: Polynomial,
    inner: Polynomial,
}

const ZERO: Polynomial = [0.0; 4];

impl Curve {
    /// `scale · x`
    pub(super) const fn line(scale: f64) -> Self {
        Self { plain: [0.0, scale, 0.0, 0.0], factor: ZERO, inner: ZERO }
    }

    pub(super) const fn constant(value: f64) -> Self {
        Self { plain: [value, 0.0, 0.0, 0.0], factor: ZERO, inner: ZERO }
    }

    fn is_polynomial(&self) -> bool {
        self.factor == ZERO
    }

    pub(super) fn tanh(self) -> Option<Self> {
        self.is_polynomial().then_some(Self { plain: ZERO, factor: [1.0, 0.0, 0.0, 0.0], inner: self.plain })
    }

    /// `sigmoid(x)` is `½ + ½ tanh(x / 2)`.
    pub(super) fn sigmoid(self) -> Option<Self> {
        let halved = Self { plain: self.plain.map(|c| c / 2.0), ..self };
        let Self { inner, .. } = halved.tanh()?;
        Some(Self { plain: [0.5, 0.0, 0.0, 0.0], factor: [0.5, 0.0, 0.0, 0.0], inner })
    }

    pub(super) fn add(self, other: Self) -> Option<Self> {
        let sum = |a: Polynomial, b: Polynomial| std::array::from_fn(|degree| a[degree] + b[degree]);
        let inner = match (self.is_polynomial(), other.is_polynomial()) {
            (true, _) => other.inner,
            (_, true) => self.inner,
            _ if self.inner == other.inner => self.inner,
            _ => return None,
        };
        Some(Self { plain: sum(self.plain, other.plain), factor: sum(self.factor, other.factor), inner })
    }

    pub(super) fn mul(self, other: Self) -> Option<Self> {
        let (curve, by) = if other.is_polynomial() { (self, other.plain) } else { (other, self.plain) };
        if !self.is_polynomial() && !other.is_polynomial() {
            return None;
        }
        Some(Self { plain: product(curve.plain, by)?, factor: product(curve.factor, by)?, inner: curve.inner })
    }

    pub(super) fn pow(self, exponent: f64) -> Option<Self> {
        match exponent {
            2.0 => self.mul(self),
            3.0 => self.mul(self)?.mul(self),
            _ => None,
        }
    }

    /// `s` where this is the GELU, by `tanh`, of `s · x`.
    pub(super) fn gelu(&self) -> Option<f64> {
        let scale = 2.0 * self.plain[1];
        let half = [0.0, scale / 2.0, 0.0, 0.0];
        let slope = FRAC_2_PI.sqrt() * scale;
        let inner = [0.0, slope, 0.0, slope * 0.044715 * scale * scale];
        let fits = self.plain == half && self.factor == half && close(self.inner, inner);
        (scale != 0.0 && fits).then_some(scale)
    }
}

fn close(actual: Polynomial, expected: Polynomial) -> bool {
    actual.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= TOLERANCE * b.abs())
}

/// None for a degree above 3.
fn product(a: Polynomial, b: Polynomial) -> Option<Polynomial> {
    let mut all = [0.0; 7];
    for (i, x) in a.iter().enumerate() {
        for (j, y) in b.iter().enumerate() {
            all[i + j] += x * y;
        }
    }
    let [low @ .., x4, x5, x6] = all;
    (x4 == 0.0 && x5 == 0.0 && x6 == 0.0).then_some(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inner(x: Curve, cubic: f64) -> Curve {
        let cube = x.pow(3.0).unwrap().mul(Curve::constant(cubic)).unwrap();
        x.add(cube).unwrap().mul(Curve::constant(0.797_884_6)).unwrap()
    }

    #[test]
    fn spellings_of_the_gelu_are_told() {
        for scale in [1.0, 0.125] {
            let x = Curve::line(scale);
            let one = Curve::constant(1.0);
            let shifted = inner(x, 0.044715).tanh().unwrap().add(one).unwrap();
            let gelu = shifted.mul(x).unwrap().mul(Curve::constant(0.5)).unwrap();
            assert_eq!(gelu.gelu(), Some(scale));
            let sigmoid = inner(x, 0.044715).mul(Curve::constant(2.0)).unwrap().sigmoid().unwrap();
            assert_eq!(x.mul(sigmoid).unwrap().gelu(), Some(scale));
        }
    }

    #[test]
    fn neighbours_of_the_gelu_are_not() {
        let x = Curve::line(1.0);
        assert_eq!(x.gelu(), None);
        assert_eq!(Curve::constant(0.0).gelu(), None);
        assert_eq!(x.mul(x.sigmoid().unwrap()).unwrap().gelu(), None, "SiLU");
        let other = inner(x, 0.05).mul(Curve::constant(2.0)).unwrap().sigmoid().unwrap();
        assert_eq!(x.mul(other).unwrap().gelu(), None, "another cubic term");
        let tanh = inner(x, 0.044715).tanh().unwrap().mul(Curve::line(0.499_9)).unwrap();
        assert_eq!(Curve::line(0.5).add(tanh).unwrap().gelu(), None, "less than x for large ones");
        let tanh = x.tanh().unwrap();
        assert_eq!((tanh.mul(tanh), tanh.tanh(), x.pow(3.0).unwrap().mul(x)), (None, None, None));
        assert_eq!(tanh.add(inner(x, 0.044715).tanh().unwrap()), None, "two of them");
    }
}
