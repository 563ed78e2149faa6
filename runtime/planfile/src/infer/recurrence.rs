//! Result types of recurrent layers.

use super::{Inferred, check_indices, require_float};
use crate::op::{Cell, Op};
use crate::types::{Dim, TensorType};

/// Operand counts were checked by the caller.
pub(super) fn infer_recurrence(op: &Op, operands: &[&TensorType]) -> Inferred {
    let Op::Recurrence { cell, reverse, functions, bias, peepholes, lengths } = op else {
        return Err(format!("{} is no recurrence", op.name()));
    };
    let directions = reverse.len();
    if !matches!(directions, 1 | 2) {
        return Err(format!("{directions} directions, expected 1 or 2"));
    }
    if *bias && !matches!(cell, Cell::Gru { resets_late: true }) {
        return Err("only a GRU that resets late has a bias of its own".to_owned());
    }
    if *peepholes && !matches!(cell, Cell::Lstm { .. }) {
        return Err("only an LSTM has peepholes".to_owned());
    }
    let (x, hidden) = (operands[0], operands[2]);
    require_float(x)?;
    if [x.rank(), hidden.rank()] != [4, 3] {
        return Err(format!("x {x}, hidden {hidden}: expected [T, B, D, G·H] and [D, B, H]"));
    }
    let [steps, batch, width] = [x.dims[0], x.dims[1], hidden.dims[2]];
    let along = Dim::Static(directions as u64);
    let rows = |count: u64| {
        let rows = width.fixed().and_then(|width| width.checked_mul(count));
        rows.map(Dim::Static).ok_or_else(|| format!("{count} times the width of {hidden} is no size"))
    };
    let gates = rows(cell.gates())?;
    let expect = |what: &str, operand: &TensorType, dims: &[Dim]| {
        let expected = TensorType { dtype: x.dtype, dims: dims.to_vec() };
        (*operand == expected).then_some(()).ok_or_else(|| format!("{what} is {operand}, expected {expected}"))
    };
    let state = [along, batch, width];
    expect("x", x, &[steps, batch, along, gates])?;
    expect("weights", operands[1], &[along, gates, width])?;
    expect("hidden", hidden, &state)?;
    let mut rest = operands[3..].iter();
    let mut next = |what: &str| rest.next().copied().ok_or_else(|| format!("{what} is missing"));
    let lstm = matches!(cell, Cell::Lstm { .. });
    if lstm {
        expect("cell", next("cell")?, &state)?;
    }
    if *bias {
        expect("bias", next("bias")?, &[along, width])?;
    }
    if *peepholes {
        expect("peepholes", next("peepholes")?, &[along, rows(3)?])?;
    }
    if *lengths {
        let lengths = next("lengths")?;
        check_indices(lengths).map_err(|_| format!("lengths are {lengths}, expected i32 or i64"))?;
        if lengths.dims != [batch] {
            return Err(format!("lengths are {lengths}, expected one for each sample of {x}"));
        }
    }
    if functions.len() != cell.functions() * directions {
        let needed = cell.functions();
        return Err(format!("{} functions, expected {needed} for each of {directions} directions", functions.len()));
    }
    let computing = x.dtype.accumulator();
    for (position, function) in functions.iter().enumerate() {
        let result = function.check(&[computing], 0).map_err(|why| format!("function {position}: {why}"))?;
        if result != computing {
            return Err(format!("function {position} results in {result}, expected {computing}"));
        }
    }
    let mut results = vec![TensorType { dtype: x.dtype, dims: vec![steps, along, batch, width] }, hidden.clone()];
    results.extend(lstm.then(|| hidden.clone()));
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::expr::{Expr, Scalar, Unary};
    use crate::infer::infer;

    fn ty(sizes: &[u64]) -> TensorType {
        TensorType::new(DType::F32, sizes)
    }

    fn op(cell: Cell, directions: usize) -> Op {
        let functions = vec![Expr::operand(0).unary(Unary::Tanh); cell.functions() * directions];
        let reverse = (0..directions).map(|direction| direction == 1).collect();
        Op::Recurrence { cell, reverse, functions, bias: false, peepholes: false, lengths: false }
    }

    /// Of `[T, B, D, H]`.
    fn operands(cell: Cell, [t, b, d, h]: [u64; 4]) -> Vec<TensorType> {
        let gates = cell.gates() * h;
        let cells = usize::from(matches!(cell, Cell::Lstm { .. }));
        [vec![ty(&[t, b, d, gates]), ty(&[d, gates, h]), ty(&[d, b, h])], vec![ty(&[d, b, h]); cells]].concat()
    }

    fn run(op: &Op, operands: &[TensorType]) -> Result<Vec<TensorType>, String> {
        infer(op, &operands.iter().collect::<Vec<_>>())
    }

    const LSTM: Cell = Cell::Lstm { coupled: false };

    #[test]
    fn results_are_the_states() {
        let found = run(&op(LSTM, 2), &operands(LSTM, [7, 3, 2, 5])).unwrap();
        assert_eq!(found, [ty(&[7, 2, 3, 5]), ty(&[2, 3, 5]), ty(&[2, 3, 5])]);
        let gru = Cell::Gru { resets_late: false };
        assert_eq!(run(&op(gru, 1), &operands(gru, [0, 3, 1, 5])).unwrap(), [ty(&[0, 1, 3, 5]), ty(&[1, 3, 5])]);
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let fine = operands(LSTM, [7, 3, 2, 5]);
        assert!(run(&op(LSTM, 2), &fine[..3]).unwrap_err().contains("takes 4 operands"));
        assert!(run(&op(LSTM, 1), &fine).unwrap_err().contains("expected f32[7, 3, 1, 20]"));
        for (position, wrong) in [(0, ty(&[7, 3, 40])), (1, ty(&[2, 20, 6])), (2, ty(&[2, 4, 5])), (3, ty(&[2, 3, 6]))]
        {
            let mut operands = fine.clone();
            operands[position] = wrong;
            assert!(run(&op(LSTM, 2), &operands).unwrap_err().contains("expected"), "{position}");
            operands[position] = fine[position].with_dtype(DType::F16);
            assert!(run(&op(LSTM, 2), &operands).is_err(), "{position}");
        }
        let integers: Vec<TensorType> = fine.iter().map(|ty| ty.with_dtype(DType::I32)).collect();
        assert!(run(&op(LSTM, 2), &integers).unwrap_err().contains("floating-point"));
        let mut lengths = op(LSTM, 2);
        if let Op::Recurrence { lengths, .. } = &mut lengths {
            *lengths = true;
        }
        for (last, works) in [
            (TensorType::new(DType::I32, &[3]), true),
            (TensorType::new(DType::I64, &[3]), true),
            (ty(&[3]), false),
            (TensorType::new(DType::I32, &[2]), false),
        ] {
            assert_eq!(run(&lengths, &[fine.clone(), vec![last]].concat()).is_ok(), works);
        }
    }

    #[test]
    fn attributes_that_do_not_fit_are_refused() {
        let fine = operands(LSTM, [7, 3, 2, 5]);
        assert!(run(&op(LSTM, 3), &fine).unwrap_err().contains("3 directions"));
        let with = |change: &dyn Fn(&mut Vec<Expr>, &mut bool)| {
            let mut op = op(LSTM, 2);
            if let Op::Recurrence { functions, bias, .. } = &mut op {
                change(functions, bias);
            }
            let mut operands = fine.clone();
            if matches!(op, Op::Recurrence { bias: true, .. }) {
                operands.push(ty(&[2, 5]));
            }
            run(&op, &operands)
        };
        assert!(with(&|functions, _| functions.truncate(5)).unwrap_err().contains("5 functions"));
        assert!(with(&|_, bias| *bias = true).unwrap_err().contains("resets late"));
        assert!(with(&|functions, _| functions[1] = Expr::operand(1)).unwrap_err().contains("function 1"));
        assert!(with(&|functions, _| functions[4] = Expr::index(0)).unwrap_err().contains("function 4"));
        let f64s = Expr::constant(Scalar::from_f64(DType::F64, 1.0));
        assert!(with(&|functions, _| functions[0] = f64s.clone()).unwrap_err().contains("results in f64"));
    }

    #[test]
    fn widths_that_overflow_are_refused() {
        let width = 1 << 62;
        let all = [ty(&[0, 0, 1, 0]), ty(&[1, 0, width]), ty(&[1, 0, width]), ty(&[1, 0, width])];
        assert!(run(&op(LSTM, 1), &all).unwrap_err().contains("is no size"));
    }
}
