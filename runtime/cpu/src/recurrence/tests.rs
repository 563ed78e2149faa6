//! Recurrent layers against plain loops over `f64`, and against what can be worked out by hand.

use half::{bf16, f16};
use planfile::op::Cell;
use planfile::{Binary, DType, Expr, Op, Scalar, Tensor, TensorType, Unary};
use proptest::prelude::*;

use crate::evaluate;

const CELLS: [Cell; 5] = [
    Cell::Rnn,
    Cell::Gru { resets_late: false },
    Cell::Gru { resets_late: true },
    Cell::Lstm { coupled: false },
    Cell::Lstm { coupled: true },
];

/// A layer with all that it may have.
#[derive(Debug)]
struct Layer {
    cell: Cell,
    reverse: Vec<bool>,
    /// `[T, B, H]`
    sizes: [usize; 3],
    bias: bool,
    peepholes: bool,
    lengths: Option<Vec<i64>>,
    /// Whether gates clip.
    clips: bool,
}

impl Layer {
    fn functions(&self, dtype: DType) -> Vec<Expr> {
        let limit = |value: f64| Expr::constant(Scalar::from_f64(dtype.accumulator(), value));
        let x = if self.clips {
            Expr::operand(0).binary(Binary::Min, limit(0.5)).binary(Binary::Max, limit(-0.5))
        } else {
            Expr::operand(0)
        };
        let (sigmoid, tanh) = (x.clone().unary(Unary::Sigmoid), x.unary(Unary::Tanh));
        let one = match self.cell {
            Cell::Rnn => vec![tanh],
            Cell::Gru { .. } => vec![sigmoid, tanh],
            Cell::Lstm { .. } => vec![sigmoid, tanh, Expr::operand(0).unary(Unary::Tanh)],
        };
        vec![one; self.reverse.len()].concat()
    }

    fn op(&self, dtype: DType) -> Op {
        Op::Recurrence {
            cell: self.cell,
            reverse: self.reverse.clone(),
            functions: self.functions(dtype),
            bias: self.bias,
            peepholes: self.peepholes,
            lengths: self.lengths.is_some(),
        }
    }

    /// Operands but for the lengths: sizes and elements.
    fn operands(&self) -> Vec<(Vec<u64>, Vec<f64>)> {
        let [t, b, h] = self.sizes.map(|size| size as u64);
        let (d, gates) = (self.reverse.len() as u64, self.cell.gates() * h);
        let mut shapes = vec![vec![t, b, d, gates], vec![d, gates, h], vec![d, b, h]];
        shapes.extend(matches!(self.cell, Cell::Lstm { .. }).then(|| vec![d, b, h]));
        shapes.extend(self.bias.then(|| vec![d, h]));
        shapes.extend(self.peepholes.then(|| vec![d, 3 * h]));
        let numbers = |(position, sizes): (usize, Vec<u64>)| {
            let count: u64 = sizes.iter().product();
            let step = 7 + 4 * position as u64;
            // Exact in every type of floats; weights are small, for differences not to grow from step to step.
            let scale = if position == 1 { 64.0 } else { 16.0 };
            let elements = (0..count).map(|i| (((i * step + i / 5) % 33) as f64 - 16.0) / scale).collect();
            (sizes, elements)
        };
        shapes.into_iter().enumerate().map(numbers).collect()
    }

    fn run(&self, dtype: DType) -> Vec<Vec<f64>> {
        let mut tensors: Vec<Tensor> = self
            .operands()
            .into_iter()
            .map(|(sizes, elements)| {
                let bytes: Vec<u8> =
                    elements.iter().flat_map(|&value| Scalar::from_f64(dtype, value).to_bytes()).collect();
                Tensor::from_bytes(TensorType::new(dtype, &sizes), &bytes).unwrap()
            })
            .collect();
        tensors.extend(
            self.lengths.as_ref().map(|lengths| Tensor::from_elements(&[lengths.len() as u64], lengths).unwrap()),
        );
        let results = evaluate(&self.op(dtype), &tensors.iter().collect::<Vec<_>>()).unwrap();
        let numbers = |tensor: &Tensor| {
            let elements = tensor.data.bytes().chunks_exact(dtype.bytes());
            elements.map(|bytes| Scalar::from_bytes(dtype, bytes).unwrap().to_f64()).collect()
        };
        results.iter().map(numbers).collect()
    }

    /// The definition, one sum at a time.
    fn expected(&self) -> Vec<Vec<f64>> {
        let [t, b, h] = self.sizes;
        let (d, g) = (self.reverse.len(), self.cell.gates() as usize);
        let operands: Vec<Vec<f64>> = self.operands().into_iter().map(|(_, elements)| elements).collect();
        let (x, w) = (&operands[0], &operands[1]);
        let mut rest = operands[3..].iter();
        let lstm = matches!(self.cell, Cell::Lstm { .. });
        let mut hidden = operands[2].clone();
        let mut cell = if lstm { rest.next().unwrap().clone() } else { vec![0.0; hidden.len()] };
        let bias = self.bias.then(|| rest.next().unwrap());
        let peepholes = self.peepholes.then(|| rest.next().unwrap());
        let mut shown = vec![0.0; t * d * b * h];
        let clip = |x: f64| if self.clips { x.clamp(-0.5, 0.5) } else { x };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-clip(x)).exp());
        let tanh = |x: f64| clip(x).tanh();
        for direction in 0..d {
            for sample in 0..b {
                let length = self.lengths.as_ref().map_or(t, |all| all[sample].clamp(0, t as i64) as usize);
                let state = (direction * b + sample) * h..(direction * b + sample + 1) * h;
                for step in 0..length {
                    let time = if self.reverse[direction] { length - 1 - step } else { step };
                    let x = |gate: usize, i: usize| x[((time * b + sample) * d + direction) * g * h + gate * h + i];
                    let product = |gate: usize, i: usize, state: &[f64]| -> f64 {
                        let row = &w[((direction * g + gate) * h + i) * h..][..h];
                        row.iter().zip(state).map(|(w, h)| w * h).sum()
                    };
                    let peep = |gate: usize, i: usize, cell: &[f64]| {
                        peepholes.map_or(0.0, |all| all[direction * 3 * h + gate * h + i] * cell[i])
                    };
                    let (old, old_cell) = (hidden[state.clone()].to_vec(), cell[state.clone()].to_vec());
                    let sum = |gate: usize, i: usize| x(gate, i) + product(gate, i, &old);
                    let mut next = old.clone();
                    let mut next_cell = old_cell.clone();
                    for i in 0..h {
                        next[i] = match self.cell {
                            Cell::Rnn => tanh(sum(0, i)),
                            Cell::Gru { resets_late } => {
                                let update = sigmoid(sum(0, i));
                                let new = if resets_late {
                                    let bias = bias.map_or(0.0, |bias| bias[direction * h + i]);
                                    tanh(x(2, i) + sigmoid(sum(1, i)) * (product(2, i, &old) + bias))
                                } else {
                                    let reset: Vec<f64> = (0..h).map(|i| sigmoid(sum(1, i)) * old[i]).collect();
                                    tanh(x(2, i) + product(2, i, &reset))
                                };
                                (1.0 - update) * new + update * old[i]
                            }
                            Cell::Lstm { coupled } => {
                                let input = sigmoid(sum(0, i) + peep(0, i, &old_cell));
                                let forget =
                                    if coupled { 1.0 - input } else { sigmoid(sum(2, i) + peep(2, i, &old_cell)) };
                                next_cell[i] = forget * old_cell[i] + input * tanh(sum(3, i));
                                sigmoid(sum(1, i) + peep(1, i, &next_cell)) * next_cell[i].tanh()
                            }
                        };
                    }
                    let at = ((time * d + direction) * b + sample) * h;
                    shown[at..at + h].copy_from_slice(&next);
                    hidden[state.clone()].copy_from_slice(&next);
                    cell[state.clone()].copy_from_slice(&next_cell);
                }
            }
        }
        if lstm { vec![shown, hidden, cell] } else { vec![shown, hidden] }
    }
}

fn layers() -> impl Strategy<Value = Layer> {
    let sizes = (0..5usize, prop_oneof![1..4usize, 16..18usize], prop_oneof![1..7usize, 30..40usize]);
    let reverse = prop::collection::vec(any::<bool>(), 1..3);
    let lengths = prop::option::of(prop::collection::vec(-1..7i64, 18));
    (0..5usize, reverse, sizes, any::<[bool; 3]>(), lengths).prop_map(|(cell, reverse, (t, b, h), flags, lengths)| {
        let cell = CELLS[cell];
        Layer {
            cell,
            reverse,
            sizes: [t, b, h],
            bias: flags[0] && cell == Cell::Gru { resets_late: true },
            peepholes: flags[1] && matches!(cell, Cell::Lstm { .. }),
            lengths: lengths.map(|lengths| lengths[..b].to_vec()),
            clips: flags[2],
        }
    })
}

proptest! {
    /// All cells, directions and options.
    #[test]
    fn matches_the_definition(layer in layers(), threads in 1usize..4) {
        let expected = layer.expected();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
            let found = pool.install(|| layer.run(dtype));
            prop_assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                prop_assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(expected) {
                    prop_assert!((found - expected).abs() <= tolerance, "{} {} for {}", dtype, found, expected);
                }
            }
        }
    }
}

#[test]
fn wide_layers_match_the_definition_on_any_number_of_threads() {
    for cell in CELLS {
        let (reverse, sizes) = (vec![false, true], [3, 20, 130]);
        let lengths = Some((0..20).map(|sample| sample % 5).collect());
        let layer = Layer { cell, reverse, sizes, bias: false, peepholes: false, lengths, clips: false };
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| layer.run(DType::F32))
        };
        let found = run(1);
        assert!(found == run(3));
        for (found, expected) in found.iter().flatten().zip(layer.expected().iter().flatten()) {
            assert!((found - expected).abs() <= 1e-4, "{cell:?}: {found} for {expected}");
        }
    }
}

fn accumulator(dtype: DType, steps: usize, each: f64, start: f64) -> Vec<Tensor> {
    let make = |sizes: &[u64], value: f64| {
        let count: u64 = sizes.iter().product();
        let bytes: Vec<u8> = (0..count).flat_map(|_| Scalar::from_f64(dtype, value).to_bytes()).collect();
        Tensor::from_bytes(TensorType::new(dtype, sizes), &bytes).unwrap()
    };
    let op = Op::Recurrence {
        cell: Cell::Rnn,
        reverse: vec![false],
        functions: vec![Expr::operand(0)],
        bias: false,
        peepholes: false,
        lengths: false,
    };
    let operands = [make(&[steps as u64, 1, 1, 1], each), make(&[1, 1, 1], 1.0), make(&[1, 1, 1], start)];
    evaluate(&op, &operands.iter().collect::<Vec<_>>()).unwrap()
}

#[test]
fn halves_round_the_hidden_state_in_each_step() {
    // 2048 + 1 rounds to 2048 in f16, 256 + 1 to 256 in bf16.
    let found = accumulator(DType::F16, 3, 1.0, 2048.0);
    assert_eq!(found[1].elements::<f16>().unwrap(), [f16::from_f32(2048.0)]);
    let found = accumulator(DType::BF16, 3, 1.0, 256.0);
    assert_eq!(found[0].elements::<bf16>().unwrap(), [bf16::from_f32(256.0); 3]);
    assert_eq!(accumulator(DType::F32, 3, 1.0, 2048.0)[1].elements::<f32>().unwrap(), [2051.0]);
}

#[test]
fn the_cell_state_of_halves_is_not_rounded_between_steps() {
    // All gates are 1, what is new is 1: the cell state counts steps, from where f16 has even numbers only.
    let (steps, start) = (4, f16::from_f32(2048.0));
    let tensor = |sizes: &[u64], value: f16| {
        let count: u64 = sizes.iter().product();
        Tensor::from_elements(sizes, &vec![value; count as usize]).unwrap()
    };
    let one = Expr::constant(Scalar::f32(1.0));
    let op = Op::Recurrence {
        cell: Cell::Lstm { coupled: false },
        reverse: vec![false],
        functions: vec![one.clone(), one, Expr::operand(0)],
        bias: false,
        peepholes: false,
        lengths: false,
    };
    let operands = [
        tensor(&[steps, 1, 1, 4], f16::ZERO),
        tensor(&[1, 4, 1], f16::ZERO),
        tensor(&[1, 1, 1], f16::ZERO),
        tensor(&[1, 1, 1], start),
    ];
    let found = evaluate(&op, &operands.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(found[2].elements::<f16>().unwrap(), [f16::from_f32(2052.0)]);
    let shown: Vec<f32> = found[0].elements::<f16>().unwrap().iter().map(|x| x.to_f32()).collect();
    // Halfway cases go to even.
    assert_eq!(shown, [2048.0, 2050.0, 2052.0, 2052.0]);
}
