//! Integer tensors whose elements are a linear function of their indices: ranges, grids, offsets.
//!
//! Exporters build index grids of ranges, casts, additions and broadcasts; knowing them as functions needs no memory and
//! no folding, whatever their size.

use ir::ValueId;
use planfile::{Binary, Compare, DType, Dim, Expr, ExprOp, Op, RankScalar, TensorType, Unary};

use super::sweep::Sweep;

/// `element[i] = base + Σ steps[d] · i[d]`. The step of a dimension of size 1 is 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Affine {
    pub base: i64,
    pub steps: Vec<i64>,
}

/// The types that index tensors have.
pub(super) fn is_index_type(ty: &TensorType) -> bool {
    matches!(ty.dtype, DType::I32 | DType::I64) && ty.dims.iter().all(|dim| dim.fixed().is_some_and(|size| size > 0))
}

impl Affine {
    fn constant(base: i64, rank: usize) -> Self {
        Self { base, steps: vec![0; rank] }
    }

    /// The function that gives these elements, if one does. Row-major; sizes positive.
    pub(super) fn fit(sizes: &[u64], elements: &[i64]) -> Option<Self> {
        let base = *elements.first()?;
        let strides = planfile::types::strides(sizes);
        let step = |(&size, &stride): (&u64, &u64)| match size {
            1 => Some(0),
            _ => elements.get(stride as usize)?.checked_sub(base),
        };
        let steps = sizes.iter().zip(&strides).map(step).collect::<Option<Vec<i64>>>()?;
        let mut index = vec![0u64; sizes.len()];
        for &element in elements {
            let offset = index
                .iter()
                .zip(&steps)
                .try_fold(base, |sum, (&index, step)| sum.checked_add(step.checked_mul(i64::try_from(index).ok()?)?));
            if offset != Some(element) {
                return None;
            }
            for axis in (0..sizes.len()).rev() {
                index[axis] += 1;
                if index[axis] < sizes[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Some(Self { base, steps })
    }

    /// Smallest and largest element over these sizes (positive); `None` on overflow.
    pub(super) fn range(&self, sizes: &[u64]) -> Option<(i64, i64)> {
        self.steps.iter().zip(sizes).try_fold((self.base, self.base), |(low, high), (step, &size)| {
            let reach = step.checked_mul(i64::try_from(size - 1).ok()?)?;
            Some((low.checked_add(reach.min(0))?, high.checked_add(reach.max(0))?))
        })
    }

    fn combine(&self, other: &Self, f: impl Fn(i64, i64) -> Option<i64>) -> Option<Self> {
        let steps = self.steps.iter().zip(&other.steps).map(|(&a, &b)| f(a, b)).collect::<Option<_>>()?;
        Some(Self { base: f(self.base, other.base)?, steps })
    }

    fn times(&self, factor: i64) -> Option<Self> {
        self.combine(self, |a, _| a.checked_mul(factor))
    }

    fn as_constant(&self) -> Option<i64> {
        self.steps.iter().all(|&step| step == 0).then_some(self.base)
    }
}

/// The function of a node's first result, from its operands'.
pub(super) fn of(sweep: &Sweep<'_, '_, '_>, op: &Op, operands: &[ValueId]) -> Option<Affine> {
    let only = || operands.first().and_then(|&operand| Some((sweep.affine(operand)?, &sweep.ty(operand).dims)));
    match op {
        Op::Reshape { dims } => {
            let (affine, from) = only()?;
            let wide = |dims: &[Dim]| dims.iter().copied().filter(|dim| *dim != Dim::Static(1)).collect::<Vec<_>>();
            // Elements that only move between the same dimensions.
            (wide(from) == wide(dims)).then_some(())?;
            let mut steps =
                from.iter().zip(&affine.steps).filter(|(dim, _)| **dim != Dim::Static(1)).map(|(_, step)| *step);
            let steps = dims.iter().map(|dim| if *dim == Dim::Static(1) { Some(0) } else { steps.next() });
            Some(Affine { base: affine.base, steps: steps.collect::<Option<_>>()? })
        }
        Op::Broadcast { dims } => only().map(|(affine, _)| aligned(affine, dims.len())),
        Op::Transpose { permutation } => only().map(|(affine, _)| {
            let steps = permutation.iter().map(|&axis| affine.steps[usize::from(axis)]).collect();
            Affine { base: affine.base, steps }
        }),
        Op::Slice { starts, steps, sizes } => {
            let (affine, _) = only()?;
            let mut sliced = affine.clone();
            for axis in 0..sizes.len() {
                let RankScalar::Uniform(start) = starts[axis] else { return None };
                sliced.base = sliced.base.checked_add(affine.steps[axis].checked_mul(start)?)?;
                sliced.steps[axis] = if sizes[axis] == 1 { 0 } else { affine.steps[axis].checked_mul(steps[axis])? };
            }
            Some(sliced)
        }
        Op::Pointwise { expr, dims } => {
            let sizes: Vec<u64> = dims.iter().map(|dim| dim.fixed()).collect::<Option<_>>()?;
            let operands: Vec<Option<Affine>> =
                operands.iter().map(|&operand| Some(aligned(sweep.affine(operand)?, sizes.len()))).collect();
            of_expr(expr, &operands, &sizes)
        }
        _ => None,
    }
}

/// Dimensions in front, like broadcasting adds them.
fn aligned(affine: &Affine, rank: usize) -> Affine {
    let mut steps = vec![0; rank.saturating_sub(affine.steps.len())];
    steps.extend(&affine.steps);
    Affine { base: affine.base, steps }
}

/// What is known of a scalar in an expression.
#[derive(Clone)]
enum Known {
    Integer(Affine),
    Bool(bool),
    Nothing,
}

fn of_expr(expr: &Expr, operands: &[Option<Affine>], sizes: &[u64]) -> Option<Affine> {
    if sizes.contains(&0) {
        return None;
    }
    let mut stack: Vec<Known> = Vec::new();
    let mut slots: [Option<Known>; 256] = [const { None }; 256];
    for op in &expr.ops {
        let known = match op {
            ExprOp::Operand(index) => operands.get(usize::from(*index))?.clone().map_or(Known::Nothing, Known::Integer),
            ExprOp::Const(scalar) => match (scalar.dtype, scalar.to_i64()) {
                (DType::Bool, _) => Known::Bool(scalar.bits != 0),
                (DType::I32 | DType::I64, Some(value)) => Known::Integer(Affine::constant(value, sizes.len())),
                _ => Known::Nothing,
            },
            ExprOp::Index { axis, base: RankScalar::Uniform(base) } => {
                let mut affine = Affine::constant(*base, sizes.len());
                affine.steps[usize::from(*axis)] = i64::from(sizes[usize::from(*axis)] > 1);
                Known::Integer(affine)
            }
            ExprOp::Index { base: RankScalar::ByRank(_), .. } => Known::Nothing,
            ExprOp::Set(slot) => {
                slots[usize::from(*slot)] = stack.last().cloned();
                continue;
            }
            ExprOp::Get(slot) => slots[usize::from(*slot)].clone()?,
            ExprOp::Cast(dtype) => match (stack.pop()?, dtype) {
                (Known::Integer(x), DType::I32 | DType::I64) => Known::Integer(x),
                _ => Known::Nothing,
            },
            ExprOp::Unary(unary) => match (unary, stack.pop()?) {
                (Unary::Neg, Known::Integer(x)) => x.times(-1).map_or(Known::Nothing, Known::Integer),
                (Unary::Not, Known::Bool(x)) => Known::Bool(!x),
                _ => Known::Nothing,
            },
            ExprOp::Binary(op) => {
                let (right, left) = (stack.pop()?, stack.pop()?);
                binary(*op, left, right)
            }
            ExprOp::Compare(op) => {
                let (right, left) = (stack.pop()?, stack.pop()?);
                compare(*op, left, right, sizes).map_or(Known::Nothing, Known::Bool)
            }
            ExprOp::Select => {
                let (no, yes, condition) = (stack.pop()?, stack.pop()?, stack.pop()?);
                match condition {
                    Known::Bool(true) => yes,
                    Known::Bool(false) => no,
                    Known::Integer(_) | Known::Nothing => Known::Nothing,
                }
            }
        };
        stack.push(bounded(known, sizes));
    }
    match (stack.pop()?, stack.is_empty()) {
        (Known::Integer(affine), true) => Some(affine),
        _ => None,
    }
}

/// Forgets functions with elements beyond 32 bits, so that arithmetic is exact in both index types.
fn bounded(known: Known, sizes: &[u64]) -> Known {
    let fits = |affine: &Affine| {
        let range = affine.range(sizes);
        range.is_some_and(|(low, high)| i32::try_from(low).is_ok() && i32::try_from(high).is_ok())
    };
    match known {
        Known::Integer(affine) if !fits(&affine) => Known::Nothing,
        other => other,
    }
}

fn binary(op: Binary, left: Known, right: Known) -> Known {
    let result = match (op, &left, &right) {
        (Binary::And, Known::Bool(a), Known::Bool(b)) => return Known::Bool(*a && *b),
        (Binary::Or, Known::Bool(a), Known::Bool(b)) => return Known::Bool(*a || *b),
        (Binary::Add, Known::Integer(a), Known::Integer(b)) => a.combine(b, i64::checked_add),
        (Binary::Sub, Known::Integer(a), Known::Integer(b)) => a.combine(b, i64::checked_sub),
        (Binary::Mul, Known::Integer(a), Known::Integer(b)) => match (a.as_constant(), b.as_constant()) {
            (_, Some(factor)) => a.times(factor),
            (Some(factor), _) => b.times(factor),
            (None, None) => None,
        },
        _ => None,
    };
    result.map_or(Known::Nothing, Known::Integer)
}

/// The outcome, when it is the same for all elements.
fn compare(op: Compare, left: Known, right: Known, sizes: &[u64]) -> Option<bool> {
    let (Known::Integer(a), Known::Integer(b)) = (left, right) else { return None };
    let (low, high) = a.combine(&b, i64::checked_sub)?.range(sizes)?;
    match op {
        Compare::Lt => decided(high < 0, low >= 0),
        Compare::Le => decided(high <= 0, low > 0),
        Compare::Gt => decided(low > 0, high <= 0),
        Compare::Ge => decided(low >= 0, high < 0),
        Compare::Eq => decided(low == 0 && high == 0, low > 0 || high < 0),
        Compare::Ne => decided(low > 0 || high < 0, low == 0 && high == 0),
    }
}

fn decided(always: bool, never: bool) -> Option<bool> {
    (always || never).then_some(always)
}
