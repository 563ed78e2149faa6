//! Folds constants and exact identities inside an expression.
//!
//! before  x0 * (sqrt 4 / 2)      after  x0
//!
//! Only what keeps every bit of every result: `x + 0` stays, since it turns `-0` into `0`.

use cpu::evaluate;
use planfile::{Binary, DType, Dim, Expr, ExprOp, Op, RankScalar, Scalar, Unary};

/// The folded expression; `None` when nothing can be folded, or the expression is not well-formed.
pub(super) fn fold(expr: &Expr, operands: &[DType], dims: &[Dim]) -> Option<Expr> {
    let mut terms = Terms { terms: Vec::new(), folded: false };
    let mut stack: Vec<usize> = Vec::new();
    let mut slots: [Option<usize>; 256] = [None; 256];
    for op in &expr.ops {
        let term = match op {
            ExprOp::Set(slot) => {
                slots[usize::from(*slot)] = stack.last().copied();
                continue;
            }
            ExprOp::Get(slot) => slots[usize::from(*slot)]?,
            _ => {
                let first = stack.len().checked_sub(arity(op))?;
                let arguments = stack.split_off(first);
                terms.add(op, &arguments, operands, dims)?
            }
        };
        stack.push(term);
    }
    let &[root] = stack.as_slice() else { return None };
    terms.folded.then(|| terms.write(root)).flatten()
}

struct Term {
    op: ExprOp,
    arguments: Vec<usize>,
    dtype: DType,
}

/// The expression as a graph: a term read by several stays one.
struct Terms {
    terms: Vec<Term>,
    folded: bool,
}

impl Terms {
    /// The term of an instruction, or a simpler one of the same value.
    fn add(&mut self, op: &ExprOp, arguments: &[usize], operands: &[DType], dims: &[Dim]) -> Option<usize> {
        if let Some(simpler) = self.simpler(op, arguments, dims) {
            self.folded = true;
            return Some(match simpler {
                Simpler::Term(term) => term,
                Simpler::Const(scalar) => self.push(ExprOp::Const(scalar), &[], scalar.dtype),
            });
        }
        let dtype_of = |position: usize| arguments.get(position).map(|&term| self.terms[term].dtype);
        let dtype = match op {
            ExprOp::Operand(index) => *operands.get(usize::from(*index))?,
            ExprOp::Const(scalar) => scalar.dtype,
            ExprOp::Index { .. } => DType::I64,
            ExprOp::Cast(dtype) => *dtype,
            ExprOp::Unary(unary) => unary.result(dtype_of(0)?)?,
            ExprOp::Compare(_) => DType::Bool,
            ExprOp::Binary(_) => dtype_of(0)?,
            ExprOp::Select => dtype_of(1)?,
            ExprOp::Set(_) | ExprOp::Get(_) => return None,
        };
        Some(self.push(op.clone(), arguments, dtype))
    }

    fn push(&mut self, op: ExprOp, arguments: &[usize], dtype: DType) -> usize {
        self.terms.push(Term { op, arguments: arguments.to_vec(), dtype });
        self.terms.len() - 1
    }

    fn constant(&self, term: usize) -> Option<Scalar> {
        match self.terms[term].op {
            ExprOp::Const(scalar) => Some(scalar),
            _ => None,
        }
    }

    fn simpler(&self, op: &ExprOp, arguments: &[usize], dims: &[Dim]) -> Option<Simpler> {
        let constants: Option<Vec<Scalar>> = arguments.iter().map(|&term| self.constant(term)).collect();
        if let Some(constants) = constants.filter(|constants| !constants.is_empty()) {
            return calculate(op, &constants).map(Simpler::Const);
        }
        match (op, arguments) {
            (ExprOp::Index { axis, base: RankScalar::Uniform(base) }, _) => {
                let single = dims.get(usize::from(*axis)) == Some(&Dim::Static(1));
                single.then(|| Simpler::Const(Scalar::i64(*base)))
            }
            (ExprOp::Cast(dtype), &[x]) => {
                let Term { op: inner, arguments, dtype: from } = &self.terms[x];
                if from == dtype {
                    return Some(Simpler::Term(x));
                }
                // A boolean survives the way through any type.
                let behind = arguments.first().filter(|_| matches!(inner, ExprOp::Cast(_)))?;
                let survives = *dtype == DType::Bool && self.terms[*behind].dtype == DType::Bool;
                survives.then_some(Simpler::Term(*behind))
            }
            (ExprOp::Unary(unary), &[x]) => {
                let inner = &self.terms[x];
                let undone = match unary {
                    Unary::Neg | Unary::Not => *unary,
                    Unary::Bits => Unary::FromBits,
                    Unary::FromBits => Unary::Bits,
                    _ => return None,
                };
                let undoes = matches!(&inner.op, ExprOp::Unary(before) if *before == undone);
                inner.arguments.first().filter(|_| undoes).map(|&term| Simpler::Term(term))
            }
            (ExprOp::Binary(binary), &[left, right]) => self.simpler_binary(*binary, left, right),
            (ExprOp::Select, &[condition, yes, no]) => match self.constant(condition) {
                Some(condition) => Some(Simpler::Term(if condition.bits != 0 { yes } else { no })),
                None => (yes == no).then_some(Simpler::Term(yes)),
            },
            _ => None,
        }
    }

    fn simpler_binary(&self, binary: Binary, left: usize, right: usize) -> Option<Simpler> {
        let is = |term: usize, value: f64| {
            // By bits, so that 0 is not -0.
            self.constant(term).is_some_and(|scalar| scalar == Scalar::from_f64(scalar.dtype, value))
        };
        let dtype = self.terms[left].dtype;
        let (keep, drop) = match binary {
            Binary::Mul if is(right, 1.0) => (left, right),
            Binary::Mul if is(left, 1.0) => (right, left),
            Binary::Div if is(right, 1.0) => (left, right),
            Binary::Sub if is(right, 0.0) => (left, right),
            Binary::Add if dtype.is_integer() && is(right, 0.0) => (left, right),
            Binary::Add if dtype.is_integer() && is(left, 0.0) => (right, left),
            Binary::And if dtype == DType::Bool && is(right, 1.0) => (left, right),
            Binary::And if dtype == DType::Bool && is(left, 1.0) => (right, left),
            Binary::Or if dtype == DType::Bool && is(right, 0.0) => (left, right),
            Binary::Or if dtype == DType::Bool && is(left, 0.0) => (right, left),
            _ => return None,
        };
        debug_assert!(self.constant(drop).is_some());
        Some(Simpler::Term(keep))
    }

    /// Back to postfix. Terms read more than once go through slots; `None` when there are too many of those.
    fn write(&self, root: usize) -> Option<Expr> {
        let mut readers = vec![0usize; self.terms.len()];
        readers[root] = 1;
        // Arguments come before their readers.
        for term in (0..=root).rev().filter(|&term| term < self.terms.len()) {
            if readers[term] > 0 {
                for &argument in &self.terms[term].arguments {
                    readers[argument] += 1;
                }
            }
        }
        enum Visit {
            Enter(usize),
            Leave(usize),
        }
        let mut slots: Vec<Option<u8>> = vec![None; self.terms.len()];
        let (mut used, mut ops, mut visits) = (0usize, Vec::new(), vec![Visit::Enter(root)]);
        while let Some(visit) = visits.pop() {
            match visit {
                Visit::Enter(term) => match slots[term] {
                    Some(slot) => ops.push(ExprOp::Get(slot)),
                    None => {
                        visits.push(Visit::Leave(term));
                        visits.extend(self.terms[term].arguments.iter().rev().map(|&argument| Visit::Enter(argument)));
                    }
                },
                Visit::Leave(term) => {
                    ops.push(self.terms[term].op.clone());
                    if readers[term] > 1 && !self.terms[term].arguments.is_empty() {
                        let slot = u8::try_from(used).ok()?;
                        (slots[term], used) = (Some(slot), used + 1);
                        ops.push(ExprOp::Set(slot));
                    }
                }
            }
        }
        Some(Expr { ops })
    }
}

enum Simpler {
    Term(usize),
    Const(Scalar),
}

fn arity(op: &ExprOp) -> usize {
    match op {
        ExprOp::Operand(_) | ExprOp::Const(_) | ExprOp::Index { .. } | ExprOp::Set(_) | ExprOp::Get(_) => 0,
        ExprOp::Cast(_) | ExprOp::Unary(_) => 1,
        ExprOp::Binary(_) | ExprOp::Compare(_) => 2,
        ExprOp::Select => 3,
    }
}

/// The instruction's result on constants, as the CPU computes it.
fn calculate(op: &ExprOp, arguments: &[Scalar]) -> Option<Scalar> {
    let ops = arguments.iter().map(|&scalar| ExprOp::Const(scalar)).chain([op.clone()]).collect();
    let results = evaluate(&Op::Pointwise { expr: Expr { ops }, dims: Vec::new() }, &[]).ok()?;
    let result = results.first()?;
    Scalar::from_bytes(result.ty.dtype, result.data.bytes())
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn constants_are_calculated() {
        check(
            "%x: f32[3]
             %y = pointwise %x {$0 + sqrt(4.0) * (1.0 / 8.0)}
             return %y",
            "%x: f32[3]
             %y = pointwise %x {$0 + 0.25}
             return %y",
        );
    }

    #[test]
    fn exact_identities_go() {
        check(
            "%x: f32[3]
             %b: bool[3]
             %y = pointwise %x, %b {select(and(bool(f32($1)), true), f32(exp($0) * 1.0) - 0.0, $0)}
             return %y",
            "%x: f32[3]
             %b: bool[3]
             %y = pointwise %b, %x {select($0, exp($1), $1)}
             return %y",
        );
    }

    #[test]
    fn what_is_undone_goes() {
        check(
            "%x: f32[3]
             %n: i64[3]
             %y = pointwise %x {neg(neg($0)) + from_bits(bits($0))}
             %m = pointwise %n {bits(from_bits($0)) / 2}
             return %y, %m",
            "%x: f32[3]
             %n: i64[3]
             %y = pointwise %x {$0 + $0}
             %m = pointwise %n {$0 / 2}
             return %y, %m",
        );
        check_unchanged(
            "%x: f32[3]
             %y = pointwise %x {bits(neg($0))}
             return %y",
        );
    }

    #[test]
    fn a_known_condition_decides() {
        check(
            "%x: f32[1, 3]
             %y = pointwise %x {select(index(0) == 0, exp($0), tanh($0))}
             return %y",
            "%x: f32[1, 3]
             %y = pointwise %x {exp($0)}
             return %y",
        );
    }

    #[test]
    fn what_is_kept_in_slots_stays_shared() {
        check(
            "%x: f32[3]
             %y = pointwise %x {(t0 := exp($0 * 1.0)) / (t0 + 1.0)}
             return %y",
            "%x: f32[3]
             %y = pointwise %x {(t0 := exp($0)) / (t0 + 1.0)}
             return %y",
        );
    }

    #[test]
    fn what_would_change_a_bit_stays() {
        check_unchanged(
            "%x: f32[3]
             %y = pointwise %x {($0 + 0.0) * 0.0 - -0.0}
             return %y",
        );
    }
}
