//! Element-wise expressions: flat, postfix, typed.
//!
//! Flat so that decoding, dropping and evaluating never recurse, and so that fusing two is splicing one into another.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

/// A number with its element type: the value's bits in that type, zero-extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Scalar {
    pub dtype: DType,
    pub bits: u64,
}

impl Scalar {
    pub fn f32(value: f32) -> Self {
        Self { dtype: DType::F32, bits: u64::from(value.to_bits()) }
    }

    pub fn i64(value: i64) -> Self {
        Self { dtype: DType::I64, bits: value.cast_unsigned() }
    }

    pub fn bool(value: bool) -> Self {
        Self { dtype: DType::Bool, bits: u64::from(value) }
    }

    /// `value` rounded (floats) or truncated and wrapped (integers) to `dtype`.
    pub fn from_f64(dtype: DType, value: f64) -> Self {
        let bits = match dtype {
            DType::Bool => u64::from(value != 0.0),
            DType::F16 => u64::from(half::f16::from_f64(value).to_bits()),
            DType::BF16 => u64::from(half::bf16::from_f64(value).to_bits()),
            DType::F32 => u64::from((value as f32).to_bits()),
            DType::F64 => value.to_bits(),
            integer => return Self::from_i64(integer, value as i64),
        };
        Self { dtype, bits }
    }

    /// `value` wrapped (integers) or rounded (floats) to `dtype`.
    pub fn from_i64(dtype: DType, value: i64) -> Self {
        let bits = match dtype {
            DType::Bool => u64::from(value != 0),
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 => return Self::from_f64(dtype, value as f64),
            DType::U8 | DType::I8 => value.cast_unsigned() & 0xff,
            DType::U16 | DType::I16 => value.cast_unsigned() & 0xffff,
            DType::U32 | DType::I32 => value.cast_unsigned() & 0xffff_ffff,
            DType::U64 | DType::I64 => value.cast_unsigned(),
        };
        Self { dtype, bits }
    }

    /// Little-endian bytes, `dtype.bytes()` of them.
    pub fn to_bytes(self) -> Vec<u8> {
        self.bits.to_le_bytes()[..self.dtype.bytes()].to_vec()
    }

    /// From little-endian bytes; `None` unless there are `dtype.bytes()` of them.
    pub fn from_bytes(dtype: DType, bytes: &[u8]) -> Option<Self> {
        let mut word = [0; 8];
        (bytes.len() == dtype.bytes()).then(|| word[..bytes.len()].copy_from_slice(bytes))?;
        Some(Self { dtype, bits: u64::from_le_bytes(word) })
    }

    /// The value as `f64`; rounded for 64-bit integers beyond 2^53.
    pub fn to_f64(self) -> f64 {
        match self.dtype {
            DType::F16 => half::f16::from_bits(self.bits as u16).to_f64(),
            DType::BF16 => half::bf16::from_bits(self.bits as u16).to_f64(),
            DType::F32 => f64::from(f32::from_bits(self.bits as u32)),
            DType::F64 => f64::from_bits(self.bits),
            DType::U64 => self.bits as f64,
            _ => self.to_i64().unwrap_or_default() as f64,
        }
    }

    /// The value of an integer or boolean that fits in `i64`.
    pub fn to_i64(self) -> Option<i64> {
        match self.dtype {
            DType::Bool | DType::U8 | DType::U16 | DType::U32 => Some(self.bits as i64),
            DType::U64 => i64::try_from(self.bits).ok(),
            DType::I8 => Some(i64::from(self.bits as u8 as i8)),
            DType::I16 => Some(i64::from(self.bits as u16 as i16)),
            DType::I32 => Some(i64::from(self.bits as u32 as i32)),
            DType::I64 => Some(self.bits.cast_signed()),
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 => None,
        }
    }
}

/// A compile-time number that may differ by rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RankScalar {
    Uniform(i64),
    /// One value per rank of the stage, in the order of the stage's ranks.
    ByRank(Vec<i64>),
}

impl RankScalar {
    /// The value on the stage's `rank`-th device; `None` beyond the table.
    pub fn get(&self, rank: usize) -> Option<i64> {
        match self {
            Self::Uniform(value) => Some(*value),
            Self::ByRank(table) => table.get(rank).copied(),
        }
    }

    /// `Uniform` when all values of the table agree.
    pub fn from_table(table: Vec<i64>) -> Self {
        match table.split_first() {
            Some((&first, rest)) if rest.iter().all(|&value| value == first) => Self::Uniform(first),
            _ => Self::ByRank(table),
        }
    }
}

impl From<i64> for RankScalar {
    fn from(value: i64) -> Self {
        Self::Uniform(value)
    }
}

/// As printed: the variant's name in lower case.
macro_rules! display_in_lower_case {
    ($($name:ty),*) => {
        $(
            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(&format!("{self:?}").to_lowercase())
                }
            }
        )*
    };
}

display_in_lower_case!(Unary, Binary, Compare);

impl fmt::Display for RankScalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform(value) => write!(f, "{value}"),
            Self::ByRank(table) => {
                let table: Vec<String> = table.iter().map(i64::to_string).collect();
                write!(f, "rank({})", table.join(", "))
            }
        }
    }
}

/// One operand in, one out, same element type unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Unary {
    Neg,
    Abs,
    Sign,
    Floor,
    Ceil,
    /// Half to even.
    Round,
    Trunc,
    Sqrt,
    Reciprocal,
    Exp,
    Log,
    Sin,
    Cos,
    Tan,
    Asin,
    Acos,
    Atan,
    Sinh,
    Cosh,
    Tanh,
    Asinh,
    Acosh,
    Atanh,
    Erf,
    /// `1 / (1 + exp(-x))`, computed without overflow.
    Sigmoid,
    /// Logical on `Bool`, bitwise on integers.
    Not,
    /// Float → `Bool`.
    IsNan,
    /// Float → `Bool`; either sign.
    IsInf,
    /// The same bits as an integer: `F32` → `I32`, `F64` → `I64`. Half types have none here: they are computed in `F32`,
    /// where not every NaN keeps its bits.
    Bits,
    /// The same bits as a float: `I32` → `F32`, `I64` → `F64`.
    FromBits,
}

impl Unary {
    /// Element type of the result for an operand of this type; `None` where the instruction does not take it.
    pub fn result(self, operand: DType) -> Option<DType> {
        let fine = match self {
            Self::Neg | Self::Abs | Self::Sign => operand != DType::Bool,
            Self::Not => !operand.is_float(),
            Self::Bits => matches!(operand, DType::F32 | DType::F64),
            Self::FromBits => matches!(operand, DType::I32 | DType::I64),
            _ => operand.is_float(),
        };
        let result = match (self, operand) {
            (Self::IsNan | Self::IsInf, _) => DType::Bool,
            (Self::Bits, DType::F32) => DType::I32,
            (Self::Bits, _) => DType::I64,
            (Self::FromBits, DType::I32) => DType::F32,
            (Self::FromBits, _) => DType::F64,
            _ => operand,
        };
        fine.then_some(result)
    }
}

/// Two operands of one element type in, the same type out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    /// Integers: truncated; division by zero gives 0.
    Div,
    /// Remainder with the sign of the divisor (Python's `%`).
    Mod,
    /// Remainder with the sign of the dividend (C's `fmod`).
    Rem,
    Pow,
    /// NaN if either operand is NaN.
    Max,
    /// NaN if either operand is NaN.
    Min,
    /// Logical on `Bool`, bitwise on integers.
    And,
    Or,
    Xor,
    ShiftLeft,
    /// Logical for unsigned types.
    ShiftRight,
}

/// Two operands of one element type in, `Bool` out. Comparisons with NaN are false, `Ne` true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// One instruction on a stack of scalars.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ExprOp {
    /// Pushes the operand's element at the output's index (broadcast like NumPy).
    Operand(u16),
    Const(Scalar),
    /// Pushes `base +` the output's index along `axis`, as `I64`.
    Index {
        axis: u8,
        base: RankScalar,
    },
    /// Copies the top of the stack into a slot; the value stays.
    Set(u8),
    /// Pushes a slot that an earlier [`ExprOp::Set`] filled.
    Get(u8),
    /// Float → integer truncates toward zero and saturates; integers wrap; anything → `Bool` is `x != 0`.
    Cast(DType),
    Unary(Unary),
    Binary(Binary),
    Compare(Compare),
    /// Pops `c`, `b`, `a` in this order and pushes `if a { b } else { c }`.
    Select,
}

/// A postfix program that leaves one scalar.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Expr {
    pub ops: Vec<ExprOp>,
}

/// Limit on instructions: keeps hostile plans and runaway fusion bounded.
pub const MAX_EXPR_OPS: usize = 4096;
/// Limit on slots, stack depth and operands of an expression.
pub const MAX_EXPR_SLOTS: usize = 256;

impl Expr {
    /// The operand itself.
    pub fn operand(index: u16) -> Self {
        Self { ops: vec![ExprOp::Operand(index)] }
    }

    pub fn constant(value: Scalar) -> Self {
        Self { ops: vec![ExprOp::Const(value)] }
    }

    /// The output's index along `axis`, as `I64`.
    pub fn index(axis: u8) -> Self {
        Self { ops: vec![ExprOp::Index { axis, base: RankScalar::Uniform(0) }] }
    }

    /// One more than the highest slot that is set: the first free one.
    pub fn slots(&self) -> usize {
        let slot = |op: &ExprOp| if let ExprOp::Set(slot) = op { usize::from(*slot) + 1 } else { 0 };
        self.ops.iter().map(slot).max().unwrap_or(0)
    }

    fn then(mut self, op: ExprOp) -> Self {
        self.ops.push(op);
        self
    }

    #[must_use]
    pub fn cast(self, dtype: DType) -> Self {
        self.then(ExprOp::Cast(dtype))
    }

    #[must_use]
    pub fn unary(self, op: Unary) -> Self {
        self.then(ExprOp::Unary(op))
    }

    #[must_use]
    pub fn binary(mut self, op: Binary, right: Self) -> Self {
        self.ops.extend(right.ops);
        self.then(ExprOp::Binary(op))
    }

    #[must_use]
    pub fn compare(mut self, op: Compare, right: Self) -> Self {
        self.ops.extend(right.ops);
        self.then(ExprOp::Compare(op))
    }

    /// `if self { yes } else { no }`.
    #[must_use]
    pub fn select(mut self, yes: Self, no: Self) -> Self {
        self.ops.extend(yes.ops);
        self.ops.extend(no.ops);
        self.then(ExprOp::Select)
    }

    /// Element type of the result, and proof that the program is well-formed for these operand types.
    ///
    /// # Errors
    /// A sentence that names the instruction at fault.
    pub fn check(&self, operands: &[DType], rank: usize) -> Result<DType, String> {
        if self.ops.len() > MAX_EXPR_OPS {
            return Err(format!("expression of {} instructions, limit {MAX_EXPR_OPS}", self.ops.len()));
        }
        let mut stack: Vec<DType> = Vec::new();
        let mut slots: [Option<DType>; MAX_EXPR_SLOTS] = [None; MAX_EXPR_SLOTS];
        for (position, op) in self.ops.iter().enumerate() {
            let result = check_op(op, operands, rank, &mut stack, &mut slots);
            let dtype = result.map_err(|why| format!("expression instruction {position}: {why}"))?;
            stack.push(dtype);
            if stack.len() > MAX_EXPR_SLOTS {
                return Err(format!("expression deeper than {MAX_EXPR_SLOTS}"));
            }
        }
        match stack.as_slice() {
            [dtype] => Ok(*dtype),
            rest => Err(format!("expression leaves {} values, not one", rest.len())),
        }
    }
}

fn check_op(
    op: &ExprOp,
    operands: &[DType],
    rank: usize,
    stack: &mut Vec<DType>,
    slots: &mut [Option<DType>; MAX_EXPR_SLOTS],
) -> Result<DType, String> {
    let mut pop = || stack.pop().ok_or_else(|| "the stack is empty".to_owned());
    match op {
        ExprOp::Operand(index) => {
            operands.get(usize::from(*index)).copied().ok_or_else(|| format!("operand {index} of {}", operands.len()))
        }
        ExprOp::Const(scalar) => Ok(scalar.dtype),
        ExprOp::Index { axis, .. } if usize::from(*axis) < rank => Ok(DType::I64),
        ExprOp::Index { axis, .. } => Err(format!("index of axis {axis} at rank {rank}")),
        ExprOp::Set(slot) => {
            let dtype = pop()?;
            slots[usize::from(*slot)] = Some(dtype);
            Ok(dtype)
        }
        ExprOp::Get(slot) => slots[usize::from(*slot)].ok_or_else(|| format!("slot {slot} is read before it is set")),
        ExprOp::Cast(dtype) => pop().map(|_| *dtype),
        ExprOp::Unary(unary) => {
            let operand = pop()?;
            unary.result(operand).ok_or_else(|| format!("{unary} of {operand}"))
        }
        ExprOp::Binary(binary) => {
            let (right, left) = (pop()?, pop()?);
            check_binary(*binary, left, right)
        }
        ExprOp::Compare(compare) => {
            let (right, left) = (pop()?, pop()?);
            let same = left == right;
            same.then_some(DType::Bool).ok_or_else(|| format!("{compare} of {left} and {right}"))
        }
        ExprOp::Select => {
            let (no, yes, condition) = (pop()?, pop()?, pop()?);
            let fine = condition == DType::Bool && yes == no;
            fine.then_some(yes).ok_or_else(|| format!("select of {condition}, {yes}, {no}"))
        }
    }
}

fn check_binary(binary: Binary, left: DType, right: DType) -> Result<DType, String> {
    let fine = left == right
        && match binary {
            Binary::And | Binary::Or | Binary::Xor => !left.is_float(),
            Binary::ShiftLeft | Binary::ShiftRight => left.is_integer(),
            _ => left != DType::Bool,
        };
    fine.then_some(left).ok_or_else(|| format!("{binary} of {left} and {right}"))
}
