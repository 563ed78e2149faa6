//! Recurrent layers, unrolled: the products with the input are one product over all steps, what depends on the state
//! is a chain.

use ir::ValueId;
use planfile::{Compare, DType, Expr, Op, Scalar, Unary};

use super::activation::{add, max, min, mul, sub};
use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("GRU",  7, |ctx| recurrent(ctx, Kind::Gru)),
    row("LSTM", 7, |ctx| recurrent(ctx, Kind::Lstm)),
    row("RNN",  7, |ctx| recurrent(ctx, Kind::Rnn)),
];

/// Steps that are unrolled at most, over both directions.
const STEPS_MAX: u64 = 2048;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Rnn,
    Gru,
    Lstm,
}

impl Kind {
    /// Blocks of `hidden` rows in the weights: update, reset, new; input, output, forget, cell.
    const fn gates(self) -> u64 {
        match self {
            Self::Rnn => 1,
            Self::Gru => 3,
            Self::Lstm => 4,
        }
    }

    const fn activations(self) -> &'static [&'static str] {
        match self {
            Self::Rnn => &["Tanh"],
            Self::Gru => &["Sigmoid", "Tanh"],
            Self::Lstm => &["Sigmoid", "Tanh", "Tanh"],
        }
    }
}

/// A function that a gate applies, with the parameters it has.
#[derive(Clone, Copy, Debug)]
enum Activation {
    Affine(f32, f32),
    HardSigmoid(f32, f32),
    LeakyRelu(f32),
    Relu,
    ScaledTanh(f32, f32),
    Sigmoid,
    Softsign,
    Tanh,
}

impl Activation {
    fn of(self, x: Expr, dtype: DType) -> Expr {
        let n = |value: f32| number(dtype, f64::from(value));
        match self {
            Self::Affine(alpha, beta) => add(mul(n(alpha), x), n(beta)),
            Self::HardSigmoid(alpha, beta) => max(n(0.0), min(n(1.0), add(mul(n(alpha), x), n(beta)))),
            Self::LeakyRelu(alpha) => x.clone().compare(Compare::Lt, n(0.0)).select(mul(n(alpha), x.clone()), x),
            Self::Relu => max(x, n(0.0)),
            Self::ScaledTanh(alpha, beta) => mul(n(alpha), mul(n(beta), x).unary(Unary::Tanh)),
            Self::Sigmoid => x.unary(Unary::Sigmoid),
            Self::Softsign => x.clone().binary(planfile::Binary::Div, add(n(1.0), x.unary(Unary::Abs))),
            Self::Tanh => x.unary(Unary::Tanh),
        }
    }
}

/// The functions of all directions, one after the other.
fn activations(ctx: &Context<'_>, kind: Kind, directions: usize) -> Result<Vec<Activation>, OpError> {
    let names = match ctx.strings("activations")?.filter(|names| !names.is_empty()) {
        Some(names) => names,
        None => kind.activations().repeat(directions).into_iter().map(str::to_owned).collect(),
    };
    if names.len() != kind.activations().len() * directions {
        return Err(ctx.invalid(&format!("{} activations for {directions} directions", names.len())));
    }
    // Parameters are listed for those functions alone that have some.
    let mut alphas = ctx.floats("activation_alpha")?.unwrap_or_default().into_iter();
    let mut betas = ctx.floats("activation_beta")?.unwrap_or_default().into_iter();
    let mut alpha = |default| alphas.next().unwrap_or(default);
    let mut beta = |default| betas.next().unwrap_or(default);
    let activation = |name: &String| match name.to_ascii_lowercase().as_str() {
        "affine" => Ok(Activation::Affine(alpha(1.0), beta(0.0))),
        "hardsigmoid" => Ok(Activation::HardSigmoid(alpha(0.2), beta(0.5))),
        "leakyrelu" => Ok(Activation::LeakyRelu(alpha(0.01))),
        "relu" => Ok(Activation::Relu),
        "scaledtanh" => Ok(Activation::ScaledTanh(alpha(1.0), beta(1.0))),
        "sigmoid" => Ok(Activation::Sigmoid),
        "softsign" => Ok(Activation::Softsign),
        "tanh" => Ok(Activation::Tanh),
        _ => Err(ctx.unsupported(&format!("activation `{name}`; export the layer as single operators"))),
    };
    names.iter().map(activation).collect()
}

/// One direction of a layer.
struct Direction {
    kind: Kind,
    dtype: DType,
    hidden: u64,
    /// `[steps, batch, gates * hidden]`: products of the input, biases added where they commute with the rest.
    input: ValueId,
    /// `[gates * hidden, hidden]`
    weights: ValueId,
    /// `[gates * hidden]`, added to products of the state; where the reset gate scales these.
    bias: Option<ValueId>,
    /// `[3 * hidden]`: of input, output and forget gate.
    peepholes: Option<ValueId>,
    activations: Vec<Activation>,
    clip: Option<f32>,
    /// `1 - input gate` is the forget gate.
    coupled: bool,
}

/// `[batch, hidden]` each.
#[derive(Clone, Copy)]
struct State {
    hidden: ValueId,
    /// LSTM only.
    cell: Option<ValueId>,
}

impl Direction {
    /// The gate's function `index` of the sum of the operands that `expr` makes.
    fn gate(&self, ctx: &mut Context<'_>, index: usize, expr: Expr, operands: &[ValueId]) -> Result<ValueId, OpError> {
        let n = |value: f32| number(self.dtype, f64::from(value));
        let clipped = match self.clip {
            Some(limit) => max(n(-limit), min(n(limit), expr)),
            None => expr,
        };
        let activation = self.activations.get(index).copied().unwrap_or(Activation::Tanh);
        ctx.pointwise(activation.of(clipped, self.dtype), operands)
    }

    /// Block `gate` of a value whose last axis has them all.
    fn block(&self, ctx: &mut Context<'_>, value: ValueId, gate: u64) -> Result<ValueId, OpError> {
        let axis = ctx.rank(value).saturating_sub(1) as u8;
        ctx.slice_axis(value, axis, gate * self.hidden, self.hidden)
    }

    fn step(&self, ctx: &mut Context<'_>, step: u64, state: State) -> Result<State, OpError> {
        let sizes = ctx.sizes(self.input);
        let x = ctx.slice_axis(self.input, 0, step, 1)?;
        let x = ctx.reshape(x, &sizes[1..])?;
        match self.kind {
            Kind::Rnn => {
                let product = self.product(ctx, state.hidden, self.weights)?;
                let hidden = self.gate(ctx, 0, add(Expr::operand(0), Expr::operand(1)), &[x, product])?;
                Ok(State { hidden, cell: None })
            }
            Kind::Gru => self.gru(ctx, x, state.hidden),
            Kind::Lstm => self.lstm(ctx, x, state),
        }
    }

    /// `state · weightsᵀ`
    fn product(&self, ctx: &mut Context<'_>, state: ValueId, weights: ValueId) -> Result<ValueId, OpError> {
        let op =
            Op::Dot { batch: vec![], contract: vec![(1, 1)], accumulate: self.dtype.accumulator(), out: self.dtype };
        ctx.emit(op, &[state, weights])
    }

    fn gru(&self, ctx: &mut Context<'_>, x: ValueId, state: ValueId) -> Result<State, OpError> {
        let sum = || add(Expr::operand(0), Expr::operand(1));
        let gates = 2 * self.hidden;
        let (gate_weights, new_weights) =
            (ctx.slice_axis(self.weights, 0, 0, gates)?, ctx.slice_axis(self.weights, 0, gates, self.hidden)?);
        let mut product = self.product(ctx, state, gate_weights)?;
        if let Some(bias) = self.bias {
            let bias = ctx.slice_axis(bias, 0, 0, gates)?;
            product = ctx.pointwise(sum(), &[product, bias])?;
        }
        let mut gate = |index: u64| {
            let parts = [self.block(ctx, x, index)?, self.block(ctx, product, index)?];
            self.gate(ctx, 0, sum(), &parts)
        };
        let (update, reset) = (gate(0)?, gate(1)?);
        let new_x = self.block(ctx, x, 2)?;
        let new = match self.bias {
            // The reset gate scales what the state contributes.
            Some(bias) => {
                let product = self.product(ctx, state, new_weights)?;
                let bias = ctx.slice_axis(bias, 0, gates, self.hidden)?;
                let contribution = mul(Expr::operand(1), add(Expr::operand(2), Expr::operand(3)));
                self.gate(ctx, 1, add(Expr::operand(0), contribution), &[new_x, reset, product, bias])?
            }
            // The reset gate scales the state.
            None => {
                let scaled = ctx.pointwise(mul(Expr::operand(0), Expr::operand(1)), &[reset, state])?;
                let product = self.product(ctx, scaled, new_weights)?;
                self.gate(ctx, 1, sum(), &[new_x, product])?
            }
        };
        let one = number(self.dtype, 1.0);
        let mixed = add(mul(sub(one, Expr::operand(0)), Expr::operand(1)), mul(Expr::operand(0), Expr::operand(2)));
        Ok(State { hidden: ctx.pointwise(mixed, &[update, new, state])?, cell: None })
    }

    fn lstm(&self, ctx: &mut Context<'_>, x: ValueId, state: State) -> Result<State, OpError> {
        let Some(cell) = state.cell else { return Err(ctx.invalid("the cell state is missing")) };
        let product = self.product(ctx, state.hidden, self.weights)?;
        let sum = |ctx: &mut Context<'_>, gate: u64, function: usize, peephole: Option<(u64, ValueId)>| {
            let mut operands = vec![self.block(ctx, x, gate)?, self.block(ctx, product, gate)?];
            let mut expr = add(Expr::operand(0), Expr::operand(1));
            if let (Some(weights), Some((index, cell))) = (self.peepholes, peephole) {
                operands.push(ctx.slice_axis(weights, 0, index * self.hidden, self.hidden)?);
                operands.push(cell);
                expr = add(expr, mul(Expr::operand(2), Expr::operand(3)));
            }
            self.gate(ctx, function, expr, &operands)
        };
        let input = sum(ctx, 0, 0, Some((0, cell)))?;
        let forget = if self.coupled {
            ctx.pointwise(sub(number(self.dtype, 1.0), Expr::operand(0)), &[input])?
        } else {
            sum(ctx, 2, 0, Some((2, cell)))?
        };
        let new = sum(ctx, 3, 1, None)?;
        let kept = mul(Expr::operand(0), Expr::operand(1));
        let mixed = add(kept, mul(Expr::operand(2), Expr::operand(3)));
        let next = ctx.pointwise(mixed, &[forget, cell, input, new])?;
        let output = sum(ctx, 1, 0, Some((1, next)))?;
        let shown = self.activations.get(2).copied().unwrap_or(Activation::Tanh).of(Expr::operand(1), self.dtype);
        let hidden = ctx.pointwise(mul(Expr::operand(0), shown), &[output, next])?;
        Ok(State { hidden, cell: Some(next) })
    }
}

/// Row `index` of a parameter with a row per direction.
fn row_of(ctx: &mut Context<'_>, value: ValueId, index: u64) -> Result<ValueId, OpError> {
    let sizes = ctx.sizes(value);
    let part = ctx.slice_axis(value, 0, index, 1)?;
    ctx.reshape(part, &sizes[1..])
}

fn direction(
    ctx: &mut Context<'_>,
    kind: Kind,
    x: ValueId,
    index: u64,
    activations: &[Activation],
) -> Result<Direction, OpError> {
    let dtype = ctx.dtype(x);
    let (w, r) = (ctx.operand(1)?, ctx.operand(2)?);
    let (weights, recurrence) = (row_of(ctx, w, index)?, row_of(ctx, r, index)?);
    let hidden = ctx.sizes(recurrence).get(1).copied().unwrap_or(0);
    let rows = ctx.count(&[kind.gates(), hidden])?;
    if ctx.sizes(recurrence) != [rows, hidden] || ctx.sizes(weights).first() != Some(&rows) {
        return Err(ctx.invalid(&format!("weights are {} and {}", ctx.ty(w), ctx.ty(r))));
    }
    let product = Op::Dot { batch: vec![], contract: vec![(2, 1)], accumulate: dtype.accumulator(), out: dtype };
    let mut input = ctx.emit(product, &[x, weights])?;
    let scaled = kind == Kind::Gru && ctx.flag("linear_before_reset", false)?;
    let mut bias = None;
    if let Some(both) = ctx.optional(3) {
        let both = row_of(ctx, both, index)?;
        let of_input = ctx.slice_axis(both, 0, 0, rows)?;
        let of_state = ctx.slice_axis(both, 0, rows, rows)?;
        if scaled {
            bias = Some(of_state);
            input = ctx.pointwise(add(Expr::operand(0), Expr::operand(1)), &[input, of_input])?;
        } else {
            let sum = add(Expr::operand(0), add(Expr::operand(1), Expr::operand(2)));
            input = ctx.pointwise(sum, &[input, of_input, of_state])?;
        }
    } else if scaled {
        let zero = ctx.scalar(dtype, 0.0);
        bias = Some(ctx.broadcast(zero, &[rows])?);
    }
    let peepholes = match ctx.optional(7).filter(|_| kind == Kind::Lstm) {
        Some(weights) => Some(row_of(ctx, weights, index)?),
        None => None,
    };
    let functions = kind.activations().len();
    let activations = activations.iter().copied().skip(index as usize * functions).take(functions).collect();
    let clip = if ctx.has("clip") { Some(ctx.float("clip", 0.0)?) } else { None };
    let coupled = kind == Kind::Lstm && ctx.flag("input_forget", false)?;
    Ok(Direction { kind, dtype, hidden, input, weights: recurrence, bias, peepholes, activations, clip, coupled })
}

/// `yes` for samples whose sequence has not ended at `step`, `no` for the others.
fn until_end(
    ctx: &mut Context<'_>,
    lengths: Option<ValueId>,
    step: u64,
    yes: ValueId,
    no: ValueId,
) -> Result<ValueId, OpError> {
    let Some(lengths) = lengths else { return Ok(yes) };
    let running = Expr::operand(0).cast(DType::I64).compare(Compare::Gt, Expr::constant(Scalar::i64(step as i64)));
    ctx.pointwise(running.select(Expr::operand(1), Expr::operand(2)), &[lengths, yes, no])
}

/// An initial state, `[directions, batch, hidden]` (batch first if so laid out), or zeros; `[batch, hidden]`.
fn initial(
    ctx: &mut Context<'_>,
    given: Option<ValueId>,
    index: u64,
    batch_first: bool,
    (dtype, sizes): (DType, [u64; 2]),
) -> Result<ValueId, OpError> {
    match given {
        Some(given) => {
            let given = if batch_first { ctx.transpose(given, &[1, 0, 2])? } else { given };
            row_of(ctx, given, index)
        }
        None => {
            let zero = ctx.scalar(dtype, 0.0);
            ctx.broadcast(zero, &sizes)
        }
    }
}

fn recurrent(ctx: &mut Context<'_>, kind: Kind) -> Result<Vec<ValueId>, OpError> {
    let batch_first = ctx.int("layout", 0)? != 0;
    let mut x = ctx.operand(0)?;
    if ctx.rank(x) != 3 || (1..3).any(|index| ctx.optional(index).is_some_and(|w| ctx.rank(w) != 3)) {
        return Err(ctx.invalid("input and weights must have three dimensions"));
    }
    if batch_first {
        x = ctx.transpose(x, &[1, 0, 2])?;
    }
    let (steps, batch) = (ctx.sizes(x)[0], ctx.sizes(x)[1]);
    let reversed: &[bool] = match ctx.string("direction", "forward")?.as_str() {
        "forward" => &[false],
        "reverse" => &[true],
        "bidirectional" => &[false, true],
        other => return Err(ctx.invalid(&format!("`direction` is `{other}`"))),
    };
    if steps == 0 || steps > STEPS_MAX {
        return Err(ctx.unsupported(&format!("{steps} steps; sequences of 1 to {STEPS_MAX} steps are unrolled")));
    }
    let activations = activations(ctx, kind, reversed.len())?;
    let lengths = match ctx.optional(4) {
        Some(lengths) => Some(ctx.reshape(lengths, &[batch, 1])?),
        None => None,
    };
    let (mut outputs, mut hiddens, mut cells) = (Vec::new(), Vec::new(), Vec::new());
    for (index, &backwards) in (0u64..).zip(reversed) {
        let direction = direction(ctx, kind, x, index, &activations)?;
        let sizes = [batch, direction.hidden];
        let ty = (direction.dtype, sizes);
        let given = (ctx.optional(5), ctx.optional(6).filter(|_| kind == Kind::Lstm));
        let hidden = initial(ctx, given.0, index, batch_first, ty)?;
        let cell = if kind == Kind::Lstm { Some(initial(ctx, given.1, index, batch_first, ty)?) } else { None };
        let mut state = State { hidden, cell };
        let mut shown = Vec::new();
        let order: Vec<u64> = if backwards { (0..steps).rev().collect() } else { (0..steps).collect() };
        for step in order {
            let next = direction.step(ctx, step, state)?;
            if ctx.wants(0) {
                let zero = ctx.scalar(direction.dtype, 0.0);
                let output = until_end(ctx, lengths, step, next.hidden, zero)?;
                shown.push(ctx.reshape(output, &[1, 1, batch, direction.hidden])?);
            }
            let hidden = until_end(ctx, lengths, step, next.hidden, state.hidden)?;
            let cell = match (next.cell, state.cell) {
                (Some(next), Some(last)) => Some(until_end(ctx, lengths, step, next, last)?),
                _ => None,
            };
            state = State { hidden, cell };
        }
        if backwards {
            shown.reverse();
        }
        if ctx.wants(0) {
            outputs.push(ctx.concat(&shown, 0)?);
        }
        hiddens.push(ctx.unsqueeze(state.hidden, &[0])?);
        if let Some(cell) = state.cell {
            cells.push(ctx.unsqueeze(cell, &[0])?);
        }
    }
    let last = |ctx: &mut Context<'_>, parts: &[ValueId]| {
        let all = ctx.concat(parts, 0)?;
        if batch_first { ctx.transpose(all, &[1, 0, 2]) } else { Ok(all) }
    };
    let hidden = last(ctx, &hiddens)?;
    let output = if ctx.wants(0) {
        let all = ctx.concat(&outputs, 1)?;
        if batch_first { ctx.transpose(all, &[2, 0, 1, 3])? } else { all }
    } else {
        hidden
    };
    let mut results = vec![output, hidden];
    if kind == Kind::Lstm {
        results.push(last(ctx, &cells)?);
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    fn rnn(steps: u64, x: &[f32]) -> Case {
        let case = Case::new("RNN", 14).input(tensor(&[steps, 1, 1], x));
        let case = case.constant(tensor(&[1, 1, 1], &[1f32])).constant(tensor(&[1, 1, 1], &[0.5f32]));
        case.attr("activations", crate::flat::Attribute::Strings(vec!["Affine".to_owned()]))
    }

    #[test]
    fn states_run_through_the_steps() {
        let found = rnn(3, &[1.0, 2.0, 4.0]).outputs(2).run();
        assert_close(&found[0], &[3, 1, 1, 1], &[1.0, 2.5, 5.25]);
        assert_close(&found[1], &[1, 1, 1], &[5.25]);
        let back = rnn(3, &[1.0, 2.0, 4.0]).string("direction", "reverse").outputs(2).run();
        assert_close(&back[0], &[3, 1, 1, 1], &[3.0, 4.0, 4.0]);
        assert_close(&back[1], &[1, 1, 1], &[3.0]);
    }

    #[test]
    fn short_sequences_keep_their_last_state() {
        let case = rnn(3, &[1.0, 2.0, 4.0]).without().constant(tensor(&[1], &[2i32])).outputs(2);
        let found = case.clone().run();
        assert_close(&found[0], &[3, 1, 1, 1], &[1.0, 2.5, 0.0]);
        assert_close(&found[1], &[1, 1, 1], &[2.5]);
        let back = case.string("direction", "reverse").run();
        assert_close(&back[0], &[3, 1, 1, 1], &[2.0, 2.0, 0.0]);
    }

    #[test]
    fn gates_of_lstm_and_gru() {
        // All gates see 0: sigmoid 0.5, tanh 0. The cell halves.
        let zeros = |sizes: &[u64]| tensor(sizes, &vec![0f32; sizes.iter().product::<u64>() as usize]);
        let lstm = Case::new("LSTM", 14).input(zeros(&[1, 1, 1])).constant(zeros(&[1, 4, 1]));
        let lstm = lstm.constant(zeros(&[1, 4, 1])).without().without().without();
        let found = lstm.constant(tensor(&[1, 1, 1], &[1f32])).outputs(3).run();
        assert_close(&found[2], &[1, 1, 1], &[0.5]);
        assert_close(&found[1], &[1, 1, 1], &[0.5 * 0.5f32.tanh()]);
        let gru = Case::new("GRU", 14).input(zeros(&[1, 1, 1])).constant(zeros(&[1, 3, 1]));
        let gru = gru.constant(zeros(&[1, 3, 1])).without().without().constant(tensor(&[1, 1, 1], &[1f32]));
        assert_close(&gru.outputs(2).run()[1], &[1, 1, 1], &[0.5]);
    }

    #[test]
    fn long_sequences_are_refused() {
        assert!(rnn(4000, &[0.0; 4000]).error().contains("4000 steps"));
    }
}
