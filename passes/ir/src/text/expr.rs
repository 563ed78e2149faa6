//! Element-wise expressions: postfix in memory, infix on paper, one-to-one. Neither direction recurses.
//!
//! `$0` is operand 0, `index(1)` the position along axis 1 (`index(1, 8)` counts from 8, `index(1, rank(0, 8))` by
//! rank), `f32($0)` a cast, `(t0 := $0)` keeps a value for `t0` to read. Operators are `+ - * /`, comparisons and a
//! leading `-`; everything else is a call.

use planfile::expr::MAX_EXPR_OPS;
use planfile::{Binary, Compare, DType, Expr, ExprOp, RankScalar, Scalar, Unary};

use super::cursor::{Cursor, integer};
use super::lexer::Kind;
use super::scalar::{constant, plain_dtype, scalar};
use crate::error::IrError;

const UNARY: &[(Unary, &str)] = &[
    (Unary::Neg, "neg"),
    (Unary::Abs, "abs"),
    (Unary::Sign, "sign"),
    (Unary::Floor, "floor"),
    (Unary::Ceil, "ceil"),
    (Unary::Round, "round"),
    (Unary::Trunc, "trunc"),
    (Unary::Sqrt, "sqrt"),
    (Unary::Reciprocal, "reciprocal"),
    (Unary::Exp, "exp"),
    (Unary::Log, "log"),
    (Unary::Sin, "sin"),
    (Unary::Cos, "cos"),
    (Unary::Tan, "tan"),
    (Unary::Asin, "asin"),
    (Unary::Acos, "acos"),
    (Unary::Atan, "atan"),
    (Unary::Sinh, "sinh"),
    (Unary::Cosh, "cosh"),
    (Unary::Tanh, "tanh"),
    (Unary::Asinh, "asinh"),
    (Unary::Acosh, "acosh"),
    (Unary::Atanh, "atanh"),
    (Unary::Erf, "erf"),
    (Unary::Sigmoid, "sigmoid"),
    (Unary::Not, "not"),
    (Unary::IsNan, "is_nan"),
    (Unary::IsInf, "is_inf"),
    (Unary::Bits, "bits"),
    (Unary::FromBits, "from_bits"),
];

const BINARY: &[(Binary, &str)] = &[
    (Binary::Mod, "mod"),
    (Binary::Rem, "rem"),
    (Binary::Pow, "pow"),
    (Binary::Max, "max"),
    (Binary::Min, "min"),
    (Binary::And, "and"),
    (Binary::Or, "or"),
    (Binary::Xor, "xor"),
    (Binary::ShiftLeft, "shift_left"),
    (Binary::ShiftRight, "shift_right"),
];

const INFIX: &[(ExprOp, &str, u8)] = &[
    (ExprOp::Compare(Compare::Eq), "==", COMPARE),
    (ExprOp::Compare(Compare::Ne), "!=", COMPARE),
    (ExprOp::Compare(Compare::Lt), "<", COMPARE),
    (ExprOp::Compare(Compare::Le), "<=", COMPARE),
    (ExprOp::Compare(Compare::Gt), ">", COMPARE),
    (ExprOp::Compare(Compare::Ge), ">=", COMPARE),
    (ExprOp::Binary(Binary::Add), "+", SUM),
    (ExprOp::Binary(Binary::Sub), "-", SUM),
    (ExprOp::Binary(Binary::Mul), "*", PRODUCT),
    (ExprOp::Binary(Binary::Div), "/", PRODUCT),
];

/// How tightly operators bind.
const COMPARE: u8 = 1;
const SUM: u8 = 2;
const PRODUCT: u8 = 3;
const NEGATION: u8 = 4;
const ATOM: u8 = 5;

/// The expression in infix form.
pub(super) fn print(expr: &Expr) -> String {
    let mut stack: Vec<(String, u8)> = Vec::new();
    for op in &expr.ops {
        let mut pop = || stack.pop().unwrap_or_else(|| ("?".to_owned(), ATOM));
        let printed = match op {
            ExprOp::Operand(index) => (format!("${index}"), ATOM),
            ExprOp::Const(value) => (constant(*value), ATOM),
            ExprOp::Index { axis, base: RankScalar::Uniform(0) } => (format!("index({axis})"), ATOM),
            ExprOp::Index { axis, base } => (format!("index({axis}, {base})"), ATOM),
            ExprOp::Set(slot) => (format!("(t{slot} := {})", pop().0), ATOM),
            ExprOp::Get(slot) => (format!("t{slot}"), ATOM),
            ExprOp::Cast(dtype) => (format!("{dtype}({})", pop().0), ATOM),
            ExprOp::Unary(Unary::Neg) => negation(pop()),
            ExprOp::Unary(unary) => (format!("{}({})", name_of(UNARY, unary), pop().0), ATOM),
            ExprOp::Select => {
                let (no, yes, condition) = (pop().0, pop().0, pop().0);
                (format!("select({condition}, {yes}, {no})"), ATOM)
            }
            ExprOp::Binary(_) | ExprOp::Compare(_) => {
                let (right, left) = (pop(), pop());
                binary(op, left, right)
            }
        };
        stack.push(printed);
    }
    let printed: Vec<String> = stack.into_iter().map(|(text, _)| text).collect();
    printed.join(" ? ")
}

fn name_of<T: PartialEq>(table: &[(T, &'static str)], op: &T) -> &'static str {
    table.iter().find(|(known, _)| known == op).map_or("?", |(_, name)| name)
}

fn within(text: String, parentheses: bool) -> String {
    if parentheses { format!("({text})") } else { text }
}

fn negation((text, binding): (String, u8)) -> (String, u8) {
    // A `-` before digits is the constant's sign.
    if text.starts_with(|c: char| c.is_ascii_digit() || c == '-') || text.starts_with("inf") {
        return (format!("neg({text})"), ATOM);
    }
    (format!("-{}", within(text, binding < NEGATION)), NEGATION)
}

fn binary(op: &ExprOp, left: (String, u8), right: (String, u8)) -> (String, u8) {
    if let Some(&(_, sign, binding)) = INFIX.iter().find(|(known, ..)| known == op) {
        // A comparison beside a comparison reads better with parentheses on both sides.
        let left_needs = left.1 < binding || (binding == COMPARE && left.1 == COMPARE);
        let (left, right) = (within(left.0, left_needs), within(right.0, right.1 <= binding));
        return (format!("{left} {sign} {right}"), binding);
    }
    let name = match op {
        ExprOp::Binary(binary) => name_of(BINARY, binary),
        _ => "?",
    };
    (format!("{name}({}, {})", left.0, right.0), ATOM)
}

/// What was opened or applied, and waits for its right end.
enum Pending {
    Parenthesis,
    Set(u8),
    Call { op: ExprOp, needs: usize, has: usize },
    Operator { op: ExprOp, binding: u8 },
}

struct Reader {
    ops: Vec<ExprOp>,
    pending: Vec<Pending>,
}

/// An expression up to a sign that cannot belong to it.
///
/// # Errors
/// [`IrError::Parse`] where the text is no expression, or longer than any expression may be.
pub(super) fn read(cursor: &mut Cursor<'_>) -> Result<Expr, IrError> {
    let mut reader = Reader { ops: Vec::new(), pending: Vec::new() };
    loop {
        reader.operand(cursor)?;
        while reader.closes(cursor)? {}
        if reader.ops.len() + reader.pending.len() > 2 * MAX_EXPR_OPS {
            return Err(cursor.error(format!("the expression is longer than {MAX_EXPR_OPS} instructions")));
        }
        let infix = match cursor.peek() {
            Kind::Sign(sign) => INFIX.iter().find(|(_, known, _)| known == sign),
            _ => None,
        };
        if let Some((op, _, binding)) = infix {
            cursor.next();
            reader.apply(*binding);
            reader.pending.push(Pending::Operator { op: op.clone(), binding: *binding });
        } else if reader.has_open() {
            reader.comma(cursor)?;
        } else {
            reader.apply(0);
            return Ok(Expr { ops: reader.ops });
        }
    }
}

impl Reader {
    /// Applies the operators that bind at least so tightly, back to what was opened last.
    fn apply(&mut self, least: u8) {
        while let Some(Pending::Operator { op, binding }) = self.pending.last() {
            if *binding < least {
                return;
            }
            self.ops.push(op.clone());
            self.pending.pop();
        }
    }

    fn has_open(&self) -> bool {
        self.pending.iter().rev().any(|pending| !matches!(pending, Pending::Operator { .. }))
    }

    fn comma(&mut self, cursor: &mut Cursor<'_>) -> Result<(), IrError> {
        self.apply(0);
        match self.pending.last_mut() {
            Some(Pending::Call { needs, has, .. }) if *has + 1 < *needs => {
                *has += 1;
                cursor.sign(",")
            }
            _ => Err(cursor.expected("`)` or an operator")),
        }
    }

    /// Whether a `)` was there and closed something.
    fn closes(&mut self, cursor: &mut Cursor<'_>) -> Result<bool, IrError> {
        if !cursor.is_sign(")") || !self.has_open() {
            return Ok(false);
        }
        self.apply(0);
        match self.pending.pop() {
            Some(Pending::Set(slot)) => self.ops.push(ExprOp::Set(slot)),
            Some(Pending::Call { op, needs, has }) => {
                if has + 1 != needs {
                    return Err(cursor.error(format!("{} arguments where {needs} are needed", has + 1)));
                }
                self.ops.push(op);
            }
            Some(Pending::Parenthesis | Pending::Operator { .. }) | None => {}
        }
        cursor.next();
        Ok(true)
    }

    /// One operand, with what opens before it.
    fn operand(&mut self, cursor: &mut Cursor<'_>) -> Result<(), IrError> {
        loop {
            // What is opened here waits in memory: the limit holds for it as for instructions.
            if self.pending.len() > 2 * MAX_EXPR_OPS {
                return Err(cursor.error(format!("the expression is deeper than {MAX_EXPR_OPS} instructions")));
            }
            if cursor.accept("(") {
                let slot = match (cursor.peek(), cursor.peek_after(1)) {
                    (Kind::Word(word), Kind::Sign(":=")) => Some(slot(word).ok_or_else(|| cursor.expected("a slot"))?),
                    _ => None,
                };
                match slot {
                    Some(slot) => {
                        cursor.next();
                        cursor.next();
                        self.pending.push(Pending::Set(slot));
                    }
                    None => self.pending.push(Pending::Parenthesis),
                }
                continue;
            }
            let negative = cursor.is_sign("-");
            if negative && !matches!(cursor.peek_after(1), Kind::Number(_) | Kind::Word("inf")) {
                cursor.next();
                self.pending.push(Pending::Operator { op: ExprOp::Unary(Unary::Neg), binding: NEGATION });
                continue;
            }
            if negative || matches!(cursor.peek(), Kind::Number(_) | Kind::Word("inf")) {
                self.ops.push(ExprOp::Const(number(cursor)?));
                return Ok(());
            }
            if cursor.accept("$") {
                self.ops.push(ExprOp::Operand(cursor.integer("operand number")?));
                return Ok(());
            }
            match self.word(cursor)? {
                Some(op) => {
                    self.ops.push(op);
                    return Ok(());
                }
                None => continue,
            }
        }
    }

    /// A leaf that is spelt as a word, or nothing after the start of a call.
    fn word(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<ExprOp>, IrError> {
        let mark = cursor.mark();
        let word = cursor.word("an operand such as `$0`, a number or a function")?;
        let dtype = word.parse::<DType>().ok();
        if let Some(slot) = slot(word) {
            return Ok(Some(ExprOp::Get(slot)));
        }
        if let Some(dtype) = dtype
            && cursor.accept(":")
        {
            let text = cursor.number()?;
            let value = scalar(dtype, &text).ok_or_else(|| cursor.error_at(mark, format!("`{text}` is no {dtype}")))?;
            return Ok(Some(ExprOp::Const(value)));
        }
        match word {
            "true" | "false" => return Ok(Some(ExprOp::Const(Scalar::bool(word == "true")))),
            "index" => return index(cursor).map(Some),
            _ => {}
        }
        let unary = UNARY.iter().find(|(_, name)| *name == word).map(|(op, _)| (ExprOp::Unary(*op), 1));
        let binary = BINARY.iter().find(|(_, name)| *name == word).map(|(op, _)| (ExprOp::Binary(*op), 2));
        let cast = dtype.map(|dtype| (ExprOp::Cast(dtype), 1));
        let select = (word == "select").then_some((ExprOp::Select, 3));
        let (op, needs) = unary
            .or(binary)
            .or(cast)
            .or(select)
            .ok_or_else(|| cursor.error_at(mark, format!("`{word}` is no function")))?;
        cursor.sign("(")?;
        self.pending.push(Pending::Call { op, needs, has: 0 });
        Ok(None)
    }
}

/// The slot that `t0`, `t1`… name.
fn slot(word: &str) -> Option<u8> {
    integer(word.strip_prefix('t')?)
}

fn number(cursor: &mut Cursor<'_>) -> Result<Scalar, IrError> {
    let mark = cursor.mark();
    let text = cursor.number()?;
    let dtype = if cursor.accept(":") { dtype(cursor)? } else { plain_dtype(&text) };
    scalar(dtype, &text).ok_or_else(|| cursor.error_at(mark, format!("`{text}` is no {dtype}")))
}

/// An element type.
pub(super) fn dtype(cursor: &mut Cursor<'_>) -> Result<DType, IrError> {
    let mark = cursor.mark();
    let word = cursor.word("an element type")?;
    word.parse().map_err(|why: String| cursor.error_at(mark, why))
}

fn index(cursor: &mut Cursor<'_>) -> Result<ExprOp, IrError> {
    cursor.sign("(")?;
    let axis = cursor.integer("axis")?;
    let base = if cursor.accept(",") { rank_scalar(cursor)? } else { RankScalar::Uniform(0) };
    cursor.sign(")")?;
    Ok(ExprOp::Index { axis, base })
}

/// A number, or one by rank in `rank(…)`.
fn rank_scalar(cursor: &mut Cursor<'_>) -> Result<RankScalar, IrError> {
    if cursor.accept_word("rank") {
        return Ok(RankScalar::ByRank(cursor.list("(", ")", |cursor| cursor.integer("number"))?));
    }
    cursor.integer("number").map(RankScalar::Uniform)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(text: &str) -> Result<Expr, IrError> {
        let mut cursor = Cursor::new(text)?;
        let expr = read(&mut cursor)?;
        if *cursor.peek() == Kind::End { Ok(expr) } else { Err(cursor.expected("the end")) }
    }

    #[test]
    fn reads_as_people_write() {
        for text in [
            "$0 * sigmoid($0)",
            "select($0 < 3:i32, $1, -$1)",
            "($0 - $1) * ($2 - 0.5)",
            "$0 - ($1 - $2) - $3",
            "$0 / ($1 * $2) / -$3",
            "-($0 + $1) * neg(1.0)",
            "(t0 := exp($0)) / (t0 + 1.0)",
            "f32(index(1, rank(0, 4)) >= index(0, 7)) - -inf",
            "($0 < $1) == ($2 < $3)",
            "and(not($0), $1 != f32:0x7fc00000)",
            "max(neg(-$0), neg(-1.0))",
            "pow(0.5:f16, 1e-5:f64)",
        ] {
            assert_eq!(print(&read_all(text).unwrap()), text);
        }
    }

    #[test]
    fn postfix_follows_the_tree() {
        let expected = Expr::operand(0).binary(Binary::Sub, Expr::operand(1).binary(Binary::Mul, Expr::operand(2)));
        assert_eq!(read_all("$0 - $1 * $2").unwrap(), expected);
        let expected = Expr::operand(0).binary(Binary::Sub, Expr::operand(1)).binary(Binary::Sub, Expr::operand(2));
        assert_eq!(read_all("$0 - $1 - $2").unwrap(), expected);
    }

    #[test]
    fn deep_expressions_do_not_recurse() {
        let deep = (0..4000).fold(Expr::operand(0), |expr, _| expr.unary(Unary::Exp));
        assert_eq!(read_all(&print(&deep)).unwrap(), deep);
        let right = Expr { ops: [vec![ExprOp::Operand(0); 2000], vec![ExprOp::Binary(Binary::Sub); 1999]].concat() };
        assert_eq!(read_all(&print(&right)).unwrap(), right);
        assert!(read_all(&"(".repeat(100_000)).is_err());
        assert!(read_all(&"-".repeat(100_000)).is_err());
    }

    #[test]
    fn mistakes_are_located() {
        let cases = [
            ("$0 +", 5, "expected an operand"),
            ("select($0, $1)", 14, "2 arguments where 3"),
            ("exp($0, $1)", 7, "expected `)`"),
            ("foo($0)", 1, "`foo` is no function"),
            ("($0", 4, "expected `)`"),
            ("300:u8", 1, "`300` is no u8"),
            ("$0 $1", 4, "expected the end"),
        ];
        for (text, expected_column, expected) in cases {
            match read_all(text) {
                Err(IrError::Parse { line: 1, column, why }) => {
                    assert!(why.contains(expected) && column == expected_column, "{text}: {column}: {why}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
