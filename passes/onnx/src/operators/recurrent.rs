//! Recurrent layers: one product of the input with the weights of all gates, steps and directions, and one primitive
//! for what depends on the state.

use ir::ValueId;
use planfile::op::Cell;
use planfile::{Compare, DType, Expr, Op, Unary};

use super::activation::{add, max, min, mul, sub};
use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("GRU",  7, |ctx| recurrent(ctx, Cell::Gru { resets_late: ctx.flag("linear_before_reset", false)? })),
    row("LSTM", 7, |ctx| recurrent(ctx, Cell::Lstm { coupled: ctx.flag("input_forget", false)? })),
    row("RNN",  7, |ctx| recurrent(ctx, Cell::Rnn)),
];

/// Functions of a direction where the model names none.
const fn usual(cell: Cell) -> &'static [&'static str] {
    match cell {
        Cell::Rnn => &["Tanh"],
        Cell::Gru { .. } => &["Sigmoid", "Tanh"],
        Cell::Lstm { .. } => &["Sigmoid", "Tanh", "Tanh"],
    }
}

/// A function that a gate applies, with the parameters it has.
#[derive(Clone, Copy, Debug)]
enum Activation {
    Affine(f32, f32),
    Elu(f32),
    HardSigmoid(f32, f32),
    LeakyRelu(f32),
    Relu,
    ScaledTanh(f32, f32),
    Sigmoid,
    Softplus,
    Softsign,
    Tanh,
    ThresholdedRelu(f32),
}

impl Activation {
    fn of(self, x: Expr, dtype: DType) -> Expr {
        let n = |value: f32| number(dtype, f64::from(value));
        match self {
            Self::Affine(alpha, beta) => add(mul(n(alpha), x), n(beta)),
            Self::Elu(alpha) => {
                let below = mul(n(alpha), sub(x.clone().unary(Unary::Exp), n(1.0)));
                x.clone().compare(Compare::Lt, n(0.0)).select(below, x)
            }
            Self::HardSigmoid(alpha, beta) => max(n(0.0), min(n(1.0), add(mul(n(alpha), x), n(beta)))),
            Self::LeakyRelu(alpha) => x.clone().compare(Compare::Lt, n(0.0)).select(mul(n(alpha), x.clone()), x),
            Self::Relu => max(x, n(0.0)),
            Self::ScaledTanh(alpha, beta) => mul(n(alpha), mul(n(beta), x).unary(Unary::Tanh)),
            Self::Sigmoid => x.unary(Unary::Sigmoid),
            // `log(1 + exp(x))`, without overflow.
            Self::Softplus => {
                let small = x.clone().unary(Unary::Abs).unary(Unary::Neg).unary(Unary::Exp);
                add(max(x, n(0.0)), add(n(1.0), small).unary(Unary::Log))
            }
            Self::Softsign => x.clone().binary(planfile::Binary::Div, add(n(1.0), x.unary(Unary::Abs))),
            Self::Tanh => x.unary(Unary::Tanh),
            Self::ThresholdedRelu(alpha) => x.clone().compare(Compare::Ge, n(alpha)).select(x, n(0.0)),
        }
    }
}

/// The functions of all directions, one after the other.
fn activations(ctx: &Context<'_>, cell: Cell, directions: usize) -> Result<Vec<Activation>, OpError> {
    let names = match ctx.strings("activations")?.filter(|names| !names.is_empty()) {
        Some(names) => names,
        None => usual(cell).repeat(directions).into_iter().map(str::to_owned).collect(),
    };
    if names.len() != usual(cell).len() * directions {
        return Err(ctx.invalid(&format!("{} activations for {directions} directions", names.len())));
    }
    // Parameters are listed for those functions alone that have some.
    let mut alphas = ctx.floats("activation_alpha")?.unwrap_or_default().into_iter();
    let mut betas = ctx.floats("activation_beta")?.unwrap_or_default().into_iter();
    let mut alpha = |default| alphas.next().unwrap_or(default);
    let mut beta = |default| betas.next().unwrap_or(default);
    let activation = |name: &String| match name.to_ascii_lowercase().as_str() {
        "affine" => Ok(Activation::Affine(alpha(1.0), beta(0.0))),
        "elu" => Ok(Activation::Elu(alpha(1.0))),
        "hardsigmoid" => Ok(Activation::HardSigmoid(alpha(0.2), beta(0.5))),
        "leakyrelu" => Ok(Activation::LeakyRelu(alpha(0.01))),
        "relu" => Ok(Activation::Relu),
        "scaledtanh" => Ok(Activation::ScaledTanh(alpha(1.0), beta(1.0))),
        "sigmoid" => Ok(Activation::Sigmoid),
        "softplus" => Ok(Activation::Softplus),
        "softsign" => Ok(Activation::Softsign),
        "tanh" => Ok(Activation::Tanh),
        "thresholdedrelu" => Ok(Activation::ThresholdedRelu(alpha(1.0))),
        _ => Err(ctx.unsupported(&format!("activation `{name}`; export the layer as single operators"))),
    };
    names.iter().map(activation).collect()
}

/// The functions of all directions of operand 0 in `dtype`, those of gates clipped.
fn functions(ctx: &Context<'_>, cell: Cell, directions: usize, dtype: DType) -> Result<Vec<Expr>, OpError> {
    let clip = if ctx.has("clip") { Some(ctx.float("clip", 0.0)?) } else { None };
    let n = |value: f32| number(dtype, f64::from(value));
    let clipped = |x: Expr| match clip {
        Some(limit) => max(n(-limit), min(n(limit), x)),
        None => x,
    };
    let activations = activations(ctx, cell, directions)?;
    let function = |(index, activation): (usize, Activation)| {
        // The last of an LSTM's is of the cell state, not of a gate.
        let of_state = index % cell.functions() == 2;
        let x = Expr::operand(0);
        activation.of(if of_state { x } else { clipped(x) }, dtype)
    };
    Ok(activations.into_iter().enumerate().map(function).collect())
}

/// Sizes that operands share.
struct Sizes {
    directions: u64,
    batch: u64,
    hidden: u64,
    /// Rows of the weights of a direction.
    rows: u64,
}

/// The bias that is added to products of the input, `[directions * rows]`, and that which the reset gate scales,
/// `[directions, hidden]`.
fn biases(
    ctx: &mut Context<'_>,
    cell: Cell,
    both: ValueId,
    sizes: &Sizes,
) -> Result<(ValueId, Option<ValueId>), OpError> {
    let &Sizes { directions, hidden, rows, .. } = sizes;
    if ctx.sizes(both) != [directions, ctx.count(&[2, rows])?] {
        return Err(ctx.invalid(&format!("the bias is {}, expected [{directions}, 2 * {rows}]", ctx.ty(both))));
    }
    let sum = || add(Expr::operand(0), Expr::operand(1));
    let of_input = ctx.slice_axis(both, 1, 0, rows)?;
    let of_state = ctx.slice_axis(both, 1, rows, rows)?;
    let (total, late) = if matches!(cell, Cell::Gru { resets_late: true }) {
        let gates = rows - hidden;
        let parts = [ctx.slice_axis(of_input, 1, 0, gates)?, ctx.slice_axis(of_state, 1, 0, gates)?];
        let first = ctx.pointwise(sum(), &parts)?;
        let last = ctx.slice_axis(of_input, 1, gates, hidden)?;
        (ctx.concat(&[first, last], 1)?, Some(ctx.slice_axis(of_state, 1, gates, hidden)?))
    } else {
        (ctx.pointwise(sum(), &[of_input, of_state])?, None)
    };
    let count = ctx.count(&[directions, rows])?;
    Ok((ctx.reshape(total, &[count])?, late))
}

/// An initial state `[directions, batch, hidden]` (batch first if so laid out), or zeros.
fn initial(
    ctx: &mut Context<'_>,
    given: Option<ValueId>,
    batch_first: bool,
    dtype: DType,
    sizes: &Sizes,
) -> Result<ValueId, OpError> {
    match given {
        Some(given) if batch_first && ctx.rank(given) == 3 => ctx.transpose(given, &[1, 0, 2]),
        Some(given) => Ok(given),
        None => {
            let zero = ctx.scalar(dtype, 0.0);
            ctx.broadcast(zero, &[sizes.directions, sizes.batch, sizes.hidden])
        }
    }
}

fn recurrent(ctx: &mut Context<'_>, cell: Cell) -> Result<Vec<ValueId>, OpError> {
    let batch_first = ctx.int("layout", 0)? != 0;
    let mut x = ctx.operand(0)?;
    let (weights, recurrence) = (ctx.operand(1)?, ctx.operand(2)?);
    if [x, weights, recurrence].iter().any(|&value| ctx.rank(value) != 3) {
        return Err(ctx.invalid("input and weights must have three dimensions"));
    }
    if batch_first {
        x = ctx.transpose(x, &[1, 0, 2])?;
    }
    let reverse = match ctx.string("direction", "forward")?.as_str() {
        "forward" => vec![false],
        "reverse" => vec![true],
        "bidirectional" => vec![false, true],
        other => return Err(ctx.invalid(&format!("`direction` is `{other}`"))),
    };
    let dtype = ctx.dtype(x);
    let functions = functions(ctx, cell, reverse.len(), dtype.accumulator())?;
    let (steps, batch) = (ctx.sizes(x)[0], ctx.sizes(x)[1]);
    let (directions, hidden) = (reverse.len() as u64, ctx.sizes(recurrence)[2]);
    let rows = ctx.count(&[cell.gates(), hidden])?;
    let sizes = Sizes { directions, batch, hidden, rows };
    if ctx.sizes(recurrence) != [directions, rows, hidden] || ctx.sizes(weights)[..2] != [directions, rows] {
        return Err(ctx.invalid(&format!("weights are {} and {}", ctx.ty(weights), ctx.ty(recurrence))));
    }
    let stated = ctx.int("hidden_size", hidden as i64)?;
    if stated != hidden as i64 {
        return Err(
            ctx.invalid(&format!("`hidden_size` is {stated}, and {hidden} in the weights {}", ctx.ty(recurrence)))
        );
    }
    let all = ctx.count(&[directions, rows])?;
    let features = ctx.sizes(weights)[2];
    let weights = ctx.reshape(weights, &[all, features])?;
    let product = Op::Dot { batch: vec![], contract: vec![(2, 1)], accumulate: dtype.accumulator(), out: dtype };
    let mut input = ctx.emit(product, &[x, weights])?;
    let mut late = None;
    if let Some(both) = ctx.optional(3) {
        let (bias, scaled) = biases(ctx, cell, both, &sizes)?;
        input = ctx.pointwise(add(Expr::operand(0), Expr::operand(1)), &[input, bias])?;
        late = scaled;
    }
    let input = ctx.reshape(input, &[steps, batch, directions, rows])?;
    let lstm = matches!(cell, Cell::Lstm { .. });
    let mut operands = vec![input, recurrence, initial(ctx, ctx.optional(5), batch_first, dtype, &sizes)?];
    if lstm {
        operands.push(initial(ctx, ctx.optional(6), batch_first, dtype, &sizes)?);
    }
    operands.extend(late);
    let peepholes = ctx.optional(7).filter(|_| lstm);
    operands.extend(peepholes);
    let lengths = ctx.optional(4);
    operands.extend(lengths);
    let (bias, peepholes, lengths) = (late.is_some(), peepholes.is_some(), lengths.is_some());
    let results = ctx.emit_all(Op::Recurrence { cell, reverse, functions, bias, peepholes, lengths }, &operands)?;
    if !batch_first {
        return Ok(results);
    }
    // `[steps, directions, batch, hidden]`, then the states.
    let permuted = |(position, result)| ctx.transpose(result, if position == 0 { &[2, 0, 1, 3] } else { &[1, 0, 2] });
    results.into_iter().enumerate().map(permuted).collect()
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
    fn sequences_have_any_length() {
        let found = rnn(4000, &[1.0; 4000]).outputs(2).run();
        assert_close(&found[1], &[1, 1, 1], &[2.0]);
        let found = rnn(0, &[]).without().without().constant(tensor(&[1, 1, 1], &[3f32])).outputs(2).run();
        assert_close(&found[0], &[0, 1, 1, 1], &[]);
        assert_close(&found[1], &[1, 1, 1], &[3.0]);
    }

    /// One direction of each, worked out by hand: all functions are the identity, so that states are sums.
    #[test]
    fn directions_biases_and_peepholes() {
        let identity = |count| crate::flat::Attribute::Strings(vec!["Affine".to_owned(); count]);
        // Forward: h' = 2x + 1 + 0.5h; backward: h' = 3x + 0.25h - 1.
        let both = Case::new("RNN", 14).input(tensor(&[2, 1, 1], &[1f32, 2.0]));
        let both = both.constant(tensor(&[2, 1, 1], &[2f32, 3.0])).constant(tensor(&[2, 1, 1], &[0.5f32, 0.25]));
        let both = both.constant(tensor(&[2, 2], &[0.25f32, 0.75, 1.0, -2.0])).string("direction", "bidirectional");
        let found = both.attr("activations", identity(2)).outputs(2).run();
        assert_close(&found[0], &[2, 2, 1, 1], &[3.0, 3.25, 6.5, 5.0]);
        assert_close(&found[1], &[2, 1, 1], &[6.5, 3.25]);
        // Gates of an LSTM: i = 1 + 0.5c, o = 2 + 0.25c', f = 3 + 0.125c, new = 4, from c = 8.
        let lstm = Case::new("LSTM", 14).input(tensor(&[1, 1, 1], &[1f32]));
        let lstm = lstm.constant(tensor(&[1, 4, 1], &[1f32, 2.0, 3.0, 4.0])).constant(tensor(&[1, 4, 1], &[0f32; 4]));
        let lstm = lstm.without().without().without().constant(tensor(&[1, 1, 1], &[8f32]));
        let lstm = lstm.constant(tensor(&[1, 3], &[0.5f32, 0.25, 0.125])).attr("activations", identity(3)).outputs(3);
        let found = lstm.clone().run();
        let cell = (3.0 + 1.0) * 8.0 + (1.0 + 4.0) * 4.0;
        assert_close(&found[2], &[1, 1, 1], &[cell]);
        assert_close(&found[0], &[1, 1, 1, 1], &[(2.0 + 0.25 * cell) * cell]);
        // Coupled: f = 1 - i = -4.
        assert_close(&lstm.int("input_forget", 1).run()[2], &[1, 1, 1], &[-4.0 * 8.0 + 5.0 * 4.0]);
    }

    #[test]
    fn a_gru_resets_before_or_after_its_product() {
        // z = 0.5, r = 2 + 1 (bias), W = 4 for what is new, biases 5 of the input and 6 of the state, h = 7.
        let gru =
            Case::new("GRU", 14).input(tensor(&[1, 1, 1], &[1f32])).constant(tensor(&[1, 3, 1], &[0.5f32, 2.0, 0.0]));
        let gru = gru.constant(tensor(&[1, 3, 1], &[0f32, 0.0, 4.0]));
        let gru = gru.constant(tensor(&[1, 6], &[0f32, 0.25, 5.0, 0.0, 0.75, 6.0])).without();
        let gru = gru.constant(tensor(&[1, 1, 1], &[7f32])).outputs(2);
        let gru = gru.attr("activations", crate::flat::Attribute::Strings(vec!["Affine".to_owned(); 2]));
        let early = 5.0 + 6.0 + 4.0 * (3.0 * 7.0);
        assert_close(&gru.clone().run()[1], &[1, 1, 1], &[0.5 * early + 0.5 * 7.0]);
        let late = 5.0 + 3.0 * (4.0 * 7.0 + 6.0);
        assert_close(&gru.int("linear_before_reset", 1).run()[1], &[1, 1, 1], &[0.5 * late + 0.5 * 7.0]);
    }

    #[test]
    fn a_layer_is_one_product_and_one_recurrence() {
        let lstm = Case::new("LSTM", 14).input(tensor(&[100, 2, 3], &[0.5f32; 600]));
        let lstm = lstm.constant(tensor(&[2, 16, 3], &[0.25f32; 96])).constant(tensor(&[2, 16, 4], &[0.125f32; 128]));
        let module = lstm.string("direction", "bidirectional").outputs(3).import().unwrap();
        let count = |name: &str| module.graphs[0].nodes().iter().filter(|node| node.op.name() == name).count();
        assert_eq!((count("dot"), count("recurrence")), (1, 1));
    }

    #[test]
    fn batches_come_first_in_the_other_layout() {
        let case = Case::new("RNN", 14).input(tensor(&[2, 3, 1], &[1f32, 2.0, 4.0, 8.0, 16.0, 32.0]));
        let case = case.constant(tensor(&[1, 1, 1], &[1f32])).constant(tensor(&[1, 1, 1], &[0.5f32])).int("layout", 1);
        let case = case.attr("activations", crate::flat::Attribute::Strings(vec!["Affine".to_owned()]));
        let found = case.outputs(2).run();
        assert_close(&found[0], &[2, 3, 1, 1], &[1.0, 2.5, 5.25, 8.0, 20.0, 42.0]);
        assert_close(&found[1], &[2, 1, 1], &[5.25, 42.0]);
    }

    #[test]
    fn functions_with_their_parameters() {
        let run = |name: &str, alphas: &[f32], betas: &[f32], clip: Option<f32>, x: f32| {
            let floats = |values: &[f32]| crate::flat::Attribute::Floats(values.to_vec());
            let case = rnn(1, &[x]).attr("activations", crate::flat::Attribute::Strings(vec![name.to_owned()]));
            let case = case.attr("activation_alpha", floats(alphas)).attr("activation_beta", floats(betas));
            let case = if let Some(clip) = clip { case.float("clip", clip) } else { case };
            case.outputs(2).run()[1].elements::<f32>().unwrap()[0]
        };
        for (name, alphas, betas, clip, x, expected) in [
            ("Affine", &[2.0][..], &[3.0][..], None, 5.0, 13.0),
            ("Affine", &[2.0], &[3.0], Some(4.0), 5.0, 11.0),
            ("Affine", &[2.0], &[3.0], Some(4.0), -5.0, -5.0),
            ("Elu", &[2.0], &[], None, -1.0, 2.0 * (f32::exp(-1.0) - 1.0)),
            ("HardSigmoid", &[], &[], None, 1.0, 0.7),
            ("LeakyRelu", &[0.5], &[], None, -3.0, -1.5),
            ("Relu", &[], &[], None, -3.0, 0.0),
            ("ScaledTanh", &[2.0], &[0.5], None, 3.0, 2.0 * f32::tanh(1.5)),
            ("Sigmoid", &[], &[], None, 0.0, 0.5),
            ("Softplus", &[], &[], None, 1.0, f32::ln(1.0 + f32::exp(1.0))),
            ("Softplus", &[], &[], None, 200.0, 200.0),
            ("Softsign", &[], &[], None, -3.0, -0.75),
            ("ThresholdedRelu", &[2.0], &[], None, 1.5, 0.0),
            ("ThresholdedRelu", &[2.0], &[], None, 2.5, 2.5),
        ] {
            let found = run(name, alphas, betas, clip, x);
            assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{name} of {x}: {found}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let unknown = rnn(3, &[0.0; 3]).attr("activations", crate::flat::Attribute::Strings(vec!["Gelu".to_owned()]));
        assert!(unknown.error().contains("activation `Gelu`"));
        assert!(rnn(3, &[0.0; 3]).string("direction", "sideways").error().contains("sideways"));
        assert!(rnn(3, &[0.0; 3]).int("hidden_size", 1).import().is_ok());
        assert!(rnn(3, &[0.0; 3]).int("hidden_size", 2).error().contains("`hidden_size` is 2, and 1 in the weights"));
        assert!(rnn(3, &[0.0; 3]).string("direction", "bidirectional").error().contains("1 activations"));
        assert!(rnn(3, &[0.0; 3]).constant(tensor(&[1, 3], &[0f32; 3])).error().contains("the bias is"));
        let lengths = rnn(3, &[0.0; 3]).without().constant(tensor(&[2], &[1i32, 2]));
        assert!(lengths.error().contains("one for each sample"));
    }
}
