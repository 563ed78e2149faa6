//! Expressions compiled for blocks: every value has a register, a constant one or the operand's memory.
//!
//! Stack slots and [`ExprOp::Set`] cost nothing here: a program names its values, and a register is free again after
//! the last instruction that reads it. An instruction never writes a register that it reads.

use std::collections::BTreeMap;

use planfile::{Binary, Compare, DType, Expr, ExprOp, Scalar, Unary};

use crate::error::CpuError;

/// Where a value is while a block is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A register that instructions write, by number.
    Block(usize),
    /// A register filled once, with entry `.0` of [`Program::uniform`].
    Uniform(usize),
    /// The operand's own memory, at the output's position.
    Direct(usize),
}

/// What is filled into a register once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Uniform {
    Const(Scalar),
    /// An operand of one element.
    Operand(usize),
}

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Broadcasts, or widens, an operand.
    Load(usize),
    /// `base +` the index along `axis`.
    Index {
        axis: usize,
        base: i64,
    },
    Cast,
    Unary(Unary),
    Binary(Binary),
    Compare(Compare),
    Select,
}

/// `dst = action(args)`; `from` is the element type of the last argument, `to` of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) action: Action,
    pub(crate) from: DType,
    pub(crate) to: DType,
    pub(crate) dst: usize,
    /// As many as the action takes; the rest repeat the first.
    pub(crate) args: [Place; 3],
}

/// How an operand is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// One element for all positions.
    Uniform,
    /// Element `i` at position `i`, in the type that is computed in.
    Direct,
    /// Through an instruction.
    Load,
}

#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) steps: Vec<Step>,
    pub(crate) uniform: Vec<Uniform>,
    /// Number of block registers.
    pub(crate) blocks: usize,
    pub(crate) result: Place,
}

/// A value before registers are assigned: its source and type.
#[derive(Clone, Copy)]
struct Value {
    place: Option<Place>,
    dtype: DType,
}

/// An instruction before registers are assigned.
struct Draft {
    action: Action,
    dst: usize,
    args: Vec<usize>,
}

#[derive(Default)]
struct Drafts {
    values: Vec<Value>,
    steps: Vec<Draft>,
    uniform: Vec<Uniform>,
    operands: BTreeMap<usize, usize>,
    constants: BTreeMap<Scalar, usize>,
}

impl Drafts {
    fn place(&mut self, place: Place, dtype: DType) -> usize {
        self.values.push(Value { place: Some(place), dtype });
        self.values.len() - 1
    }

    fn uniform(&mut self, uniform: Uniform, dtype: DType) -> usize {
        self.uniform.push(uniform);
        self.place(Place::Uniform(self.uniform.len() - 1), dtype)
    }

    fn step(&mut self, action: Action, args: Vec<usize>, dtype: DType) -> usize {
        self.values.push(Value { place: None, dtype });
        let dst = self.values.len() - 1;
        self.steps.push(Draft { action, dst, args });
        dst
    }

    fn operand(&mut self, index: usize, dtype: DType, access: Access) -> usize {
        if let Some(&value) = self.operands.get(&index) {
            return value;
        }
        let value = match access {
            Access::Uniform => self.uniform(Uniform::Operand(index), dtype),
            Access::Direct => self.place(Place::Direct(index), dtype),
            Access::Load => self.step(Action::Load(index), vec![], dtype),
        };
        self.operands.insert(index, value);
        value
    }

    fn constant(&mut self, scalar: Scalar) -> usize {
        if let Some(&value) = self.constants.get(&scalar) {
            return value;
        }
        let value = self.uniform(Uniform::Const(scalar), scalar.dtype);
        self.constants.insert(scalar, value);
        value
    }
}

fn malformed(why: &str) -> CpuError {
    CpuError::Type(format!("pointwise: {why}"))
}

/// Compiles an expression that passed its type check. `operands`: type and access of each.
pub(crate) fn compile(expr: &Expr, rank: usize, operands: &[(DType, Access)]) -> Result<Program, CpuError> {
    let mut drafts = Drafts::default();
    let mut stack: Vec<usize> = Vec::new();
    let mut slots: BTreeMap<u8, usize> = BTreeMap::new();
    for op in &expr.ops {
        let mut pop = || stack.pop().ok_or_else(|| malformed("the stack is empty"));
        let value = match op {
            ExprOp::Operand(index) => {
                let index = usize::from(*index);
                let (dtype, access) = *operands.get(index).ok_or_else(|| malformed("no such operand"))?;
                drafts.operand(index, dtype, access)
            }
            ExprOp::Const(scalar) => drafts.constant(*scalar),
            ExprOp::Index { axis, base } => {
                let missing = || CpuError::Type(format!("pointwise: no index base for rank {rank} in {base}"));
                let base = base.get(rank).ok_or_else(missing)?;
                drafts.step(Action::Index { axis: usize::from(*axis), base }, vec![], DType::I64)
            }
            ExprOp::Set(slot) => {
                let value = pop()?;
                slots.insert(*slot, value);
                value
            }
            ExprOp::Get(slot) => *slots.get(slot).ok_or_else(|| malformed("a slot is read before it is set"))?,
            ExprOp::Cast(dtype) => {
                let x = pop()?;
                if drafts.values[x].dtype == *dtype { x } else { drafts.step(Action::Cast, vec![x], *dtype) }
            }
            ExprOp::Unary(unary) => {
                let x = pop()?;
                let dtype = unary.result(drafts.values[x].dtype).ok_or_else(|| malformed("an operand's type"))?;
                drafts.step(Action::Unary(*unary), vec![x], dtype)
            }
            ExprOp::Binary(binary) => {
                let (b, a) = (pop()?, pop()?);
                drafts.step(Action::Binary(*binary), vec![a, b], drafts.values[a].dtype)
            }
            ExprOp::Compare(compare) => {
                let (b, a) = (pop()?, pop()?);
                drafts.step(Action::Compare(*compare), vec![a, b], DType::Bool)
            }
            ExprOp::Select => {
                let (no, yes, condition) = (pop()?, pop()?, pop()?);
                drafts.step(Action::Select, vec![condition, yes, no], drafts.values[yes].dtype)
            }
        };
        stack.push(value);
    }
    let result = stack.pop().ok_or_else(|| malformed("the expression is empty"))?;
    Ok(assign(drafts, result))
}

/// Gives each value a register, from its instruction to the last that reads it.
fn assign(drafts: Drafts, result: usize) -> Program {
    let Drafts { mut values, steps: drafts, uniform, .. } = drafts;
    let mut last_use: Vec<usize> = vec![0; values.len()];
    for (position, draft) in drafts.iter().enumerate() {
        last_use[draft.dst] = position;
        for &arg in &draft.args {
            last_use[arg] = position;
        }
    }
    last_use[result] = usize::MAX;
    let (mut free, mut blocks) = (Vec::new(), 0);
    let mut steps = Vec::with_capacity(drafts.len());
    for (position, Draft { action, dst, args }) in drafts.into_iter().enumerate() {
        let register = free.pop().unwrap_or_else(|| {
            blocks += 1;
            blocks - 1
        });
        values[dst].place = Some(Place::Block(register));
        // Arguments were placed before; `Uniform(0)` is never read for a missing one.
        let place = |index: usize| args.get(index).or(args.first()).and_then(|&arg| values[arg].place);
        let places = [0, 1, 2].map(|index| place(index).unwrap_or(Place::Uniform(0)));
        let from = args.last().map_or(values[dst].dtype, |&arg| values[arg].dtype);
        steps.push(Step { action, from, to: values[dst].dtype, dst: register, args: places });
        let mut done: Vec<usize> = args;
        done.push(dst);
        done.sort_unstable();
        done.dedup();
        for value in done {
            if let Some(Place::Block(register)) = values[value].place
                && last_use[value] == position
            {
                free.push(register);
            }
        }
    }
    Program { steps, uniform, blocks, result: values[result].place.unwrap_or(Place::Uniform(0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_chain_needs_two_registers() {
        let mut expr = Expr::operand(0);
        for _ in 0..50 {
            expr = expr.binary(Binary::Mul, Expr::operand(1)).unary(Unary::Exp);
        }
        let program = compile(&expr, 0, &[(DType::F32, Access::Direct), (DType::F32, Access::Uniform)]).unwrap();
        assert_eq!((program.steps.len(), program.blocks, program.uniform.len()), (100, 2, 1));
        assert!(program.steps.iter().all(|step| step.args[0] != Place::Block(step.dst)));
    }

    #[test]
    fn a_slot_keeps_its_register_until_its_last_reader() {
        let ops = vec![
            ExprOp::Operand(0),
            ExprOp::Unary(Unary::Exp),
            ExprOp::Set(3),
            ExprOp::Unary(Unary::Neg),
            ExprOp::Unary(Unary::Tanh),
            ExprOp::Get(3),
            ExprOp::Binary(Binary::Add),
        ];
        let program = compile(&Expr { ops }, 0, &[(DType::F32, Access::Direct)]).unwrap();
        let kept = program.steps[0].dst;
        assert!(program.steps[1..3].iter().all(|step| step.dst != kept));
        assert_eq!(program.steps[3].args[1], Place::Block(kept));
    }
}
