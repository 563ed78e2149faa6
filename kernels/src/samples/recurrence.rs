//! Recurrent layers: cells, directions and options on widths that fill no block and on widths that fill many.

use planfile::op::Cell;
use planfile::{Binary, DType, Expr, Op, Scalar, Unary};

use super::{List, ty};
use DType::{BF16, F16, F32, F64, I32, I64};

const RNN: Cell = Cell::Rnn;
const EARLY: Cell = Cell::Gru { resets_late: false };
const LATE: Cell = Cell::Gru { resets_late: true };
const LSTM: Cell = Cell::Lstm { coupled: false };
const COUPLED: Cell = Cell::Lstm { coupled: true };

/// A layer on `[T, B, H]`.
#[derive(Clone, Copy)]
struct Layer {
    cell: Cell,
    dtype: DType,
    reverse: &'static [bool],
    sizes: [u64; 3],
    bias: bool,
    peepholes: bool,
    lengths: Option<DType>,
    /// Functions other than those that everybody has, clipped.
    unusual: bool,
}

fn layer(cell: Cell, dtype: DType, reverse: &'static [bool], sizes: [u64; 3]) -> Layer {
    Layer { cell, dtype, reverse, sizes, bias: cell == LATE, peepholes: false, lengths: None, unusual: false }
}

/// The functions of one direction.
fn functions(cell: Cell, dtype: DType, unusual: bool) -> Vec<Expr> {
    let n = |value: f64| Expr::constant(Scalar::from_f64(dtype.accumulator(), value));
    let x = || Expr::operand(0);
    let clipped = || x().binary(Binary::Min, n(1.5)).binary(Binary::Max, n(-1.5));
    let [gate, new, shown] = if unusual {
        // A hard sigmoid, `x / (1 + |x|)`, and what shows the cell state a little changed.
        let hard = clipped().binary(Binary::Mul, n(0.2)).binary(Binary::Add, n(0.5));
        let hard = hard.binary(Binary::Min, n(1.0)).binary(Binary::Max, n(0.0));
        let soft = clipped().binary(Binary::Div, clipped().unary(Unary::Abs).binary(Binary::Add, n(1.0)));
        [hard, soft, x().binary(Binary::Mul, n(0.75)).unary(Unary::Tanh).binary(Binary::Mul, n(1.25))]
    } else {
        [x().unary(Unary::Sigmoid), x().unary(Unary::Tanh), x().unary(Unary::Tanh)]
    };
    match cell {
        Cell::Rnn => vec![new],
        Cell::Gru { .. } => vec![gate, new],
        Cell::Lstm { .. } => vec![gate, new, shown],
    }
}

fn put(list: &mut List, layer: Layer) {
    let Layer { cell, dtype, reverse, sizes: [steps, batch, width], bias, peepholes, lengths, unusual } = layer;
    let directions = reverse.len() as u64;
    let gates = cell.gates() * width;
    let functions = vec![functions(cell, dtype, unusual); reverse.len()].concat();
    let state = ty(dtype, &[directions, batch, width]);
    let mut operands = vec![ty(dtype, &[steps, batch, directions, gates]), ty(dtype, &[directions, gates, width])];
    operands.push(state.clone());
    operands.extend(matches!(cell, Cell::Lstm { .. }).then_some(state));
    operands.extend(bias.then(|| ty(dtype, &[directions, width])));
    operands.extend(peepholes.then(|| ty(dtype, &[directions, 3 * width])));
    operands.extend(lengths.map(|dtype| ty(dtype, &[batch])));
    let reverse = reverse.to_vec();
    list.one(Op::Recurrence { cell, reverse, functions, bias, peepholes, lengths: lengths.is_some() }, operands);
}

pub(super) fn recurrence(list: &mut List) {
    const FORWARD: &[bool] = &[false];
    const REVERSE: &[bool] = &[true];
    const BOTH: &[bool] = &[false, true];
    for cell in [RNN, EARLY, LATE, LSTM, COUPLED] {
        put(list, layer(cell, F32, FORWARD, [6, 2, 5]));
        put(list, layer(cell, F32, REVERSE, [5, 17, 33]));
        put(list, layer(cell, F32, BOTH, [7, 1, 100]));
        put(list, Layer { lengths: Some(I32), ..layer(cell, F32, BOTH, [9, 5, 33]) });
        put(list, Layer { lengths: Some(I64), unusual: true, ..layer(cell, F32, REVERSE, [8, 4, 64]) });
        put(list, layer(cell, F16, BOTH, [5, 3, 64]));
        put(list, Layer { unusual: true, lengths: Some(I32), ..layer(cell, BF16, BOTH, [6, 3, 33]) });
        put(list, Layer { unusual: true, ..layer(cell, F64, BOTH, [4, 2, 33]) });
        put(list, layer(cell, F32, FORWARD, [20, 3, 256]));
        put(list, layer(cell, F32, FORWARD, [1, 1, 128]));
        // Without steps, states pass through.
        put(list, layer(cell, F32, BOTH, [0, 2, 5]));
        put(list, layer(cell, BF16, FORWARD, [3, 17, 128]));
    }
    put(list, Layer { bias: false, ..layer(LATE, F32, BOTH, [6, 3, 33]) });
    for cell in [LSTM, COUPLED] {
        put(list, Layer { peepholes: true, ..layer(cell, F32, BOTH, [6, 3, 33]) });
        put(list, Layer { peepholes: true, lengths: Some(I32), unusual: true, ..layer(cell, F16, BOTH, [6, 3, 64]) });
        put(list, Layer { peepholes: true, ..layer(cell, F64, REVERSE, [3, 1, 5]) });
    }
    for (cell, dtype) in [(LSTM, F32), (LSTM, F16), (EARLY, F32), (LATE, BF16)] {
        put(list, layer(cell, dtype, FORWARD, [10, 1, 640]));
        put(list, layer(cell, dtype, BOTH, [50, 8, 256]));
    }
    put(list, Layer { lengths: Some(I64), ..layer(LSTM, F32, BOTH, [12, 40, 96]) });
    put(list, layer(RNN, F32, FORWARD, [300, 1, 16]));
    // Weights that do not all stay where they are used, rows that no wide load fits, several tiles of samples.
    put(list, layer(LSTM, F32, FORWARD, [2, 2, 1100]));
    put(list, layer(LSTM, F16, FORWARD, [3, 200, 200]));
    put(list, layer(LATE, F16, FORWARD, [2, 3, 1001]));
    put(list, layer(RNN, BF16, BOTH, [2, 9, 1504]));
    put(list, layer(LSTM, F64, BOTH, [3, 2, 300]));
    // Not a state, nor a sample.
    put(list, layer(LSTM, F32, FORWARD, [3, 2, 0]));
    put(list, layer(EARLY, F32, FORWARD, [3, 0, 4]));
}
