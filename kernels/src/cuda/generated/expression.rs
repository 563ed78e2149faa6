//! Element-wise expressions: a statement for each instruction, in a loop over the lanes.
//!
//! ```text
//! operand 0, operand 1, add, tanh      const f32 e3 = scalar::add(v1[j], v2[j]);
//!                                      const f32 e4 = scalar::tanh(e3);
//! ```

use std::collections::BTreeMap;

use planfile::{Binary, Compare, DType, Expr, ExprOp, RankScalar, Unary};

use super::affine::{Affine, Spread};
use super::kernel::{Kernel, Operand};
use super::literal::{constant, is_half, value};

/// Index of an operand of these sizes that is broadcast like NumPy to where `index` points.
pub(super) fn broadcast(index: &[Affine], sizes: &[u64]) -> Vec<Affine> {
    let skipped = index.len().saturating_sub(sizes.len());
    let own = index.iter().skip(skipped).zip(sizes);
    own.map(|(position, &size)| if size == 1 { Affine::default() } else { position.clone() }).collect()
}

impl Kernel<'_> {
    pub(super) fn pointwise(
        &mut self,
        expr: &Expr,
        operands: &[u32],
        number: u32,
        index: &[Affine],
    ) -> Option<Operand> {
        let mut read: BTreeMap<u16, Operand> = BTreeMap::new();
        let mut uniform = true;
        for op in &expr.ops {
            match op {
                ExprOp::Operand(own) if !read.contains_key(own) => {
                    let operand = *operands.get(usize::from(*own))?;
                    let at = broadcast(index, &self.sizes(operand));
                    let operand = self.value(operand, at)?;
                    uniform &= operand.uniform;
                    read.insert(*own, operand);
                }
                ExprOp::Index { axis, .. } => {
                    uniform &= self.spread(index.get(usize::from(*axis))?) == Spread::Uniform;
                }
                _ => {}
            }
        }
        if let [ExprOp::Operand(own)] = expr.ops.as_slice() {
            return read.remove(own);
        }
        let dtypes: Vec<DType> = operands.iter().map(|&operand| self.dtype(operand)).collect();
        if uniform {
            let name = self.instructions(expr, &dtypes, &read, index)?;
            return Some(Operand::uniform(name));
        }
        let result = self.declare('v', value(self.dtype(number)), false);
        self.each_lane(|kernel| {
            let name = kernel.instructions(expr, &dtypes, &read, index)?;
            kernel.line(&format!("{} = {name};", result.lane()));
            Some(())
        })?;
        Some(result)
    }

    /// The statements; the name of the result.
    fn instructions(
        &mut self,
        expr: &Expr,
        operands: &[DType],
        read: &BTreeMap<u16, Operand>,
        index: &[Affine],
    ) -> Option<String> {
        let mut stack: Vec<(String, DType)> = Vec::new();
        let mut slots: BTreeMap<u8, (String, DType)> = BTreeMap::new();
        for op in &expr.ops {
            let (text, dtype) = match op {
                ExprOp::Operand(own) => {
                    stack.push((read.get(own)?.lane(), *operands.get(usize::from(*own))?));
                    continue;
                }
                ExprOp::Const(scalar) => {
                    stack.push((constant(*scalar), scalar.dtype));
                    continue;
                }
                ExprOp::Set(slot) => {
                    slots.insert(*slot, stack.last()?.clone());
                    continue;
                }
                ExprOp::Get(slot) => {
                    stack.push(slots.get(slot)?.clone());
                    continue;
                }
                ExprOp::Cast(dtype) if stack.last()?.1 == *dtype => continue,
                ExprOp::Index { axis, base } => (self.index_value(index.get(usize::from(*axis))?, base)?, DType::I64),
                ExprOp::Cast(dtype) => {
                    let (x, _) = stack.pop()?;
                    let text = if *dtype == DType::Bool {
                        format!("to_bool({x})")
                    } else {
                        format!("convert<{}>({x})", value(*dtype))
                    };
                    (text, *dtype)
                }
                ExprOp::Unary(unary) => {
                    let (x, dtype) = stack.pop()?;
                    (format!("scalar::{}({x})", unary_name(*unary, dtype)), unary.result(dtype)?)
                }
                ExprOp::Binary(binary) => {
                    let ((b, _), (a, dtype)) = (stack.pop()?, stack.pop()?);
                    (format!("scalar::{}({a}, {b})", binary_name(*binary)), dtype)
                }
                ExprOp::Compare(compare) => {
                    let ((b, _), (a, _)) = (stack.pop()?, stack.pop()?);
                    (format!("scalar::{}({a}, {b})", compare_name(*compare)), DType::Bool)
                }
                ExprOp::Select => {
                    let ((no, _), (yes, dtype), (condition, _)) = (stack.pop()?, stack.pop()?, stack.pop()?);
                    (format!("{condition} ? {yes} : {no}"), dtype)
                }
            };
            let rounds = is_half(dtype) && !matches!(op, ExprOp::Select);
            let text = if rounds { format!("round_to<{}>({text})", dtype.name()) } else { text };
            let name = self.fresh('e');
            self.line(&format!("const {} {name} = {text};", value(dtype)));
            stack.push((name, dtype));
        }
        stack.pop().map(|top| top.0)
    }

    /// `base +` a coordinate, as `i64`.
    fn index_value(&mut self, coordinate: &Affine, base: &RankScalar) -> Option<String> {
        let position = match self.spread(coordinate) {
            Spread::Uniform => self.position(coordinate),
            Spread::Step { by: 1, .. } => format!("{} + j", self.position(coordinate)),
            Spread::Step { .. } | Spread::Irregular => {
                let own = self.of_lane(std::slice::from_ref(coordinate));
                self.position(own.first()?)
            }
        };
        let position = format!("static_cast<i64>(static_cast<Index>({position}))");
        Some(match base {
            RankScalar::Uniform(0) => position,
            RankScalar::Uniform(base) => format!("scalar::add({position}, static_cast<i64>({base}ll))"),
            RankScalar::ByRank(_) => format!("scalar::add({position}, static_cast<i64>(s{}))", self.scalar(base)?),
        })
    }

    /// Number of the kernel parameter that holds the scalar.
    pub(super) fn scalar(&self, scalar: &RankScalar) -> Option<usize> {
        self.scalars.iter().position(|own| own == scalar)
    }
}

fn unary_name(unary: Unary, dtype: DType) -> &'static str {
    match unary {
        Unary::Neg => "neg",
        Unary::Abs => "magnitude",
        Unary::Sign => "sign",
        Unary::Floor => "floor",
        Unary::Ceil => "ceil",
        Unary::Round => "round",
        Unary::Trunc => "trunc",
        Unary::Sqrt => "sqrt",
        Unary::Reciprocal => "reciprocal",
        Unary::Exp => "exp",
        Unary::Log => "log",
        Unary::Sin => "sin",
        Unary::Cos => "cos",
        Unary::Tan => "tan",
        Unary::Asin => "asin",
        Unary::Acos => "acos",
        Unary::Atan => "atan",
        Unary::Sinh => "sinh",
        Unary::Cosh => "cosh",
        Unary::Tanh => "tanh",
        Unary::Asinh => "asinh",
        Unary::Acosh => "acosh",
        Unary::Atanh => "atanh",
        Unary::Erf => "erf",
        Unary::Sigmoid => "sigmoid",
        Unary::Not if dtype == DType::Bool => "logical_not",
        Unary::Not => "bit_not",
        Unary::IsNan => "is_nan",
        Unary::IsInf => "is_inf",
        Unary::Bits => "bits",
        Unary::FromBits => "from_bits",
    }
}

const fn binary_name(binary: Binary) -> &'static str {
    match binary {
        Binary::Add => "add",
        Binary::Sub => "sub",
        Binary::Mul => "rounded_mul",
        Binary::Div => "div",
        Binary::Mod => "mod",
        Binary::Rem => "rem",
        Binary::Pow => "pow",
        Binary::Max => "larger",
        Binary::Min => "smaller",
        Binary::And => "bit_and",
        Binary::Or => "bit_or",
        Binary::Xor => "bit_xor",
        Binary::ShiftLeft => "shift_left",
        Binary::ShiftRight => "shift_right",
    }
}

const fn compare_name(compare: Compare) -> &'static str {
    match compare {
        Compare::Eq => "eq",
        Compare::Ne => "ne",
        Compare::Lt => "lt",
        Compare::Le => "le",
        Compare::Gt => "gt",
        Compare::Ge => "ge",
    }
}
