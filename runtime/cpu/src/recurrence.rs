//! Recurrent layers: the product with the states of all samples and directions at once, then a row of gates for each.

use planfile::op::Cell;
use planfile::{DType, Expr};
use rayon::prelude::*;

use crate::error::CpuError;
use crate::lane::Lane;
use crate::number::{Float, Number, with_float};
use crate::panels::COLUMNS as PANEL;
use crate::pointwise::Function;
use crate::product::{Job, Left, Matrix, Product, RightPanels};
use crate::view::{View, ViewMut, is_half, read, sizes, slice, write};

/// Elements of gates that a thread takes at least.
const WORTH_A_THREAD: usize = 1 << 12;

/// Attributes of a layer, see [`planfile::Op::Recurrence`].
pub(crate) struct Layer<'a> {
    pub(crate) cell: Cell,
    pub(crate) reverse: &'a [bool],
    pub(crate) functions: &'a [Expr],
}

/// All steps of a layer. `present`: whether there are a bias, peepholes and lengths among the operands.
pub(crate) fn recurrence(
    layer: &Layer<'_>,
    present: [bool; 3],
    operands: &[View<'_>],
    shown: &mut ViewMut<'_>,
    last: &mut [ViewMut<'_>],
) -> Result<(), CpuError> {
    let lstm = matches!(layer.cell, Cell::Lstm { .. });
    // Operand counts follow from these flags, and were checked.
    let mut rest = operands[3..].iter();
    let mut next = |present: bool| if present { rest.next() } else { None };
    let cell = next(lstm);
    let [bias, peepholes, lengths] = present.map(next);
    let sizes = sizes(operands[0].ty);
    let (steps, batch) = (sizes[0], sizes[1]);
    let lengths = match lengths {
        Some(lengths) => read_lengths(lengths, steps)?,
        None => vec![steps; batch],
    };
    let width = last.first().and_then(|hidden| hidden.ty.sizes().last().copied()).unwrap_or(0);
    let shape = Shape { steps, batch, directions: layer.reverse.len(), width: width as usize, gates: sizes[3] };
    let dtype = shown.ty.dtype;
    with_float!("recurrence", dtype, T => {
        let functions = layer.functions.iter().map(|expr| Function::new(expr, DType::accumulator(dtype)));
        let (x, weights) = (read::<T>(&operands[0])?, read::<T>(&operands[1])?);
        let (bias, peepholes) = (bias.map(read::<T>).transpose()?, peepholes.map(read::<T>).transpose()?);
        let rule = Rule {
            shape,
            cell: layer.cell,
            reverse: layer.reverse,
            functions: functions.collect::<Result<Vec<_>, _>>()?,
            bias: bias.as_deref(),
            peepholes: peepholes.as_deref(),
            lengths,
            dtype,
        };
        let mut hidden = read::<T>(&operands[2])?.into_owned();
        let mut cells = match cell {
            Some(cell) => read::<T>(cell)?.into_owned(),
            None => vec![<T as Number>::ZERO; hidden.len()],
        };
        write(shown, |y| rule.run(&x, &weights, &mut hidden, &mut cells, y))?;
        for (result, state) in last.iter_mut().zip([&hidden, &cells]) {
            write(result, |last| {
                last.copy_from_slice(state);
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// Steps of each sample, within those that there are.
fn read_lengths(lengths: &View<'_>, steps: usize) -> Result<Vec<usize>, CpuError> {
    let clamp = |length: i64| usize::try_from(length).unwrap_or(0).min(steps);
    let dtype = lengths.ty.dtype;
    Ok(if dtype == DType::I32 {
        slice::<i32>(lengths.bytes, dtype)?.iter().map(|&length| clamp(i64::from(length))).collect()
    } else {
        slice::<i64>(lengths.bytes, dtype)?.iter().map(|&length| clamp(length)).collect()
    })
}

#[derive(Clone, Copy)]
struct Shape {
    steps: usize,
    batch: usize,
    directions: usize,
    /// Of the states.
    width: usize,
    /// Rows of the weights.
    gates: usize,
}

/// What a layer computes, with its small operands.
struct Rule<'a, T> {
    shape: Shape,
    cell: Cell,
    reverse: &'a [bool],
    functions: Vec<Function>,
    /// `[directions, width]`
    bias: Option<&'a [T]>,
    /// `[directions, 3 * width]`
    peepholes: Option<&'a [T]>,
    /// By sample.
    lengths: Vec<usize>,
    /// That states are rounded to.
    dtype: DType,
}

/// One sample in one direction, and memory for its step.
struct Row<'a, T> {
    hidden: &'a mut [T],
    cell: &'a mut [T],
    /// Products of the state with all gates' weights, or with those of the first two where a reset comes between.
    product: &'a mut [T],
    /// The state that is reset.
    scaled: &'a mut [T],
    /// Products of [`Self::scaled`] with the weights of what is new.
    new: &'a mut [T],
    /// Gates after their functions, as wide as all gates.
    gates: &'a mut [T],
}

/// Memory for a step, by rows.
struct Memory<T> {
    product: Vec<T>,
    scaled: Vec<T>,
    new: Vec<T>,
    gates: Vec<T>,
}

/// Rows of the weights of each direction as panels for the right side of a product.
struct Weights<T> {
    directions: Vec<Vec<T>>,
    rows: usize,
    depth: usize,
}

impl<T: Float + Product> Weights<T> {
    fn new(shape: Shape, weights: &[T], rows: std::ops::Range<usize>) -> Self {
        let Shape { width, gates, .. } = shape;
        let pack = |weights: &[T]| {
            let mut panels = vec![T::ZERO; rows.len().next_multiple_of(PANEL) * width];
            for (column, row) in rows.clone().enumerate() {
                let first = column / PANEL * width * PANEL + column % PANEL;
                let row = &weights[row * width..][..width];
                for (&from, to) in row.iter().zip(panels[first..].iter_mut().step_by(PANEL)) {
                    *to = from;
                }
            }
            panels
        };
        let directions = weights.chunks_exact(gates * width).map(pack).collect();
        Self { directions, rows: rows.len(), depth: width }
    }

    /// `results = states · weightsᵀ`, in each direction.
    fn multiply(&self, states: &[T], results: &mut [T]) {
        let batch = states.len() / (self.depth * self.directions.len());
        let states = states.chunks_exact(batch * self.depth);
        let results = results.chunks_exact_mut(batch * self.rows);
        let mut jobs: Vec<Job<'_, T, RightPanels<'_, T>>> = (self.directions.iter().zip(states).zip(results))
            .map(|((data, states), c)| {
                let b = RightPanels { data, depth: self.depth };
                Job { a: Left::Matrix(Matrix::packed(states, self.depth)), b, c }
            })
            .collect();
        T::multiply([batch, self.rows, self.depth], &mut jobs);
    }
}

impl<T: Float + Product + Lane> Rule<'_, T> {
    /// Steps through all samples; `y` is `[steps, directions, batch, width]`.
    fn run(&self, x: &[T], weights: &[T], hidden: &mut [T], cell: &mut [T], y: &mut [T]) -> Result<(), CpuError> {
        let Shape { steps, batch, directions, width, gates } = self.shape;
        // The reset gate scales the state before its product with the last block of weights.
        let resets = matches!(self.cell, Cell::Gru { resets_late: false });
        let first = if resets { 2 * width } else { gates };
        let (before, after) =
            (Weights::new(self.shape, weights, 0..first), Weights::new(self.shape, weights, first..gates));
        let rows = directions * batch;
        let memory = |width: usize| vec![T::ZERO; rows * width];
        let mut memory =
            Memory { product: memory(first), scaled: memory(width), new: memory(width), gates: memory(gates) };
        y.fill(T::ZERO);
        for step in 0..steps {
            before.multiply(hidden, &mut memory.product);
            if resets {
                self.each(step, x, hidden, cell, &mut memory, Self::reset)?;
                after.multiply(&memory.scaled, &mut memory.new);
            }
            self.each(step, x, hidden, cell, &mut memory, Self::step)?;
            for (row, hidden) in hidden.chunks_exact(width).enumerate() {
                if let Some(time) = self.time(step, row) {
                    y[(time * rows + row) * width..][..width].copy_from_slice(hidden);
                }
            }
        }
        Ok(())
    }

    /// Which position of the sequence a row is at; none after its end.
    fn time(&self, step: usize, row: usize) -> Option<usize> {
        let (direction, sample) = (row / self.shape.batch, row % self.shape.batch);
        let last = self.lengths[sample].checked_sub(step + 1)?;
        Some(if self.reverse[direction] { last } else { step })
    }

    /// Calls a part of the step with the direction, the products of the input and the row, for all rows that have not
    /// ended.
    fn each(
        &self,
        step: usize,
        x: &[T],
        hidden: &mut [T],
        cell: &mut [T],
        memory: &mut Memory<T>,
        part: impl Fn(&Self, usize, &[T], Row<'_, T>) -> Result<(), CpuError> + Sync,
    ) -> Result<(), CpuError> {
        let Shape { batch, directions, width, gates, .. } = self.shape;
        let columns = memory.product.len() / (directions * batch);
        let states = hidden.par_chunks_exact_mut(width).zip(cell.par_chunks_exact_mut(width));
        let scratch = memory.scaled.par_chunks_exact_mut(width).zip(memory.new.par_chunks_exact_mut(width));
        let products = memory.product.par_chunks_exact_mut(columns).zip(memory.gates.par_chunks_exact_mut(gates));
        let rows = states.zip(products).zip(scratch).enumerate().with_min_len(WORTH_A_THREAD / gates + 1);
        rows.try_for_each(|(row, (((hidden, cell), (product, gates)), (scaled, new)))| {
            let Some(time) = self.time(step, row) else { return Ok(()) };
            let (direction, sample) = (row / batch, row % batch);
            let at = (time * batch + sample) * directions + direction;
            let x = &x[at * gates.len()..][..gates.len()];
            part(self, direction, x, Row { hidden, cell, product, scaled, new, gates })
        })
    }

    fn function(&self, direction: usize, index: usize, x: &[T], y: &mut [T]) -> Result<(), CpuError> {
        self.functions[direction * self.cell.functions() + index].apply(x, y)
    }

    /// The gates of a GRU that resets early, and the state that it resets.
    fn reset(&self, direction: usize, x: &[T], row: Row<'_, T>) -> Result<(), CpuError> {
        let width = self.shape.width;
        add(row.product, x);
        self.function(direction, 0, row.product, &mut row.gates[..2 * width])?;
        let reset = &row.gates[width..2 * width];
        for ((scaled, &reset), &hidden) in row.scaled.iter_mut().zip(reset).zip(&*row.hidden) {
            *scaled = reset * hidden;
        }
        Ok(())
    }

    fn step(&self, direction: usize, x: &[T], row: Row<'_, T>) -> Result<(), CpuError> {
        let Row { hidden, cell, product, scaled: _, new, gates } = row;
        let width = self.shape.width;
        match self.cell {
            Cell::Rnn => {
                add(product, x);
                self.function(direction, 0, product, hidden)?;
            }
            Cell::Gru { resets_late } => {
                let (gates, fresh) = gates.split_at_mut(2 * width);
                if resets_late {
                    let (first, last) = product.split_at_mut(2 * width);
                    add(first, x);
                    self.function(direction, 0, first, gates)?;
                    if let Some(bias) = self.bias {
                        add(last, &bias[direction * width..]);
                    }
                    for ((new, &last), &reset) in new.iter_mut().zip(&*last).zip(&gates[width..]) {
                        *new = reset * last;
                    }
                }
                add(new, &x[2 * width..]);
                self.function(direction, 1, new, fresh)?;
                for ((hidden, &update), &new) in hidden.iter_mut().zip(&*gates).zip(&*fresh) {
                    *hidden = (T::ONE - update) * new + update * *hidden;
                }
            }
            Cell::Lstm { coupled } => {
                add(product, x);
                let peepholes = self.peepholes.map(|all| &all[direction * 3 * width..]);
                let peep = |gate: usize, cell: &[T], sums: &mut [T]| {
                    if let Some(peepholes) = peepholes {
                        for ((sum, &weight), &cell) in sums.iter_mut().zip(&peepholes[gate * width..]).zip(cell) {
                            *sum = *sum + weight * cell;
                        }
                    }
                };
                let (inputs, rest) = product.split_at_mut(width);
                let (outputs, rest) = rest.split_at_mut(width);
                let (forgets, news) = rest.split_at_mut(width);
                let (input, rest) = gates.split_at_mut(width);
                let (output, rest) = rest.split_at_mut(width);
                let (forget, new) = rest.split_at_mut(width);
                peep(0, cell, inputs);
                self.function(direction, 0, inputs, input)?;
                if coupled {
                    for (forget, &input) in forget.iter_mut().zip(&*input) {
                        *forget = T::ONE - input;
                    }
                } else {
                    peep(2, cell, forgets);
                    self.function(direction, 0, forgets, forget)?;
                }
                self.function(direction, 1, news, new)?;
                for (((cell, &forget), &input), &new) in cell.iter_mut().zip(&*forget).zip(&*input).zip(&*new) {
                    *cell = forget * *cell + input * new;
                }
                peep(1, cell, outputs);
                self.function(direction, 0, outputs, output)?;
                // What is shown of the cell state; nobody reads the sums any more.
                self.function(direction, 2, cell, news)?;
                for ((hidden, &output), &shown) in hidden.iter_mut().zip(&*output).zip(&*news) {
                    *hidden = output * shown;
                }
            }
        }
        self.round(hidden);
        Ok(())
    }

    /// Rounds to the type of the states where that is a half type.
    fn round(&self, state: &mut [T]) {
        match self.dtype {
            dtype if !is_half(dtype) => {}
            DType::F16 => state.iter_mut().for_each(|x| *x = T::from_f32(half::f16::from_f32(x.to_f32()).to_f32())),
            _ => state.iter_mut().for_each(|x| *x = T::from_f32(half::bf16::from_f32(x.to_f32()).to_f32())),
        }
    }
}

/// `sums += terms`, as many as there are sums.
fn add<T: Float>(sums: &mut [T], terms: &[T]) {
    for (sum, &term) in sums.iter_mut().zip(terms) {
        *sum = *sum + term;
    }
}

#[cfg(test)]
mod tests;
