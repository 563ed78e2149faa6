//! The largest or smallest elements along an axis.

use ir::ValueId;
use planfile::Op;

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("TopK", 1, top_k),
];

/// `k` shapes the result, so it must be known: an attribute before opset 10, a constant input from then on.
fn top_k(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let axis = ctx.axis(ctx.int("axis", -1)?, ctx.rank(x))?;
    let k = match ctx.optional(1) {
        Some(k) => ctx.constant_i64(k)?,
        None => ctx.required_int("k")?,
    };
    let k = u64::try_from(k).map_err(|_| ctx.invalid(&format!("k is {k}")))?;
    let (largest, sorted) = (ctx.flag("largest", true)?, ctx.flag("sorted", true)?);
    ctx.emit_all(Op::TopK { axis, k, largest, sorted }, &[x])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn k_is_an_attribute_or_a_constant() {
        let x = || tensor(&[4], &[3f32, 9.0, 1.0, 9.0]);
        let old = Case::new("TopK", 7).int("k", 3).outputs(2).input(x()).run();
        assert_close(&old[0], &[3], &[9.0, 9.0, 3.0]);
        assert_eq!(old[1], tensor(&[3], &[1i64, 3, 0]));
        let new = Case::new("TopK", 11).int("largest", 0).outputs(2).input(x()).constant(tensor(&[1], &[2i64])).run();
        assert_close(&new[0], &[2], &[1.0, 3.0]);
        assert_eq!(new[1], tensor(&[2], &[2i64, 0]));
    }

    #[test]
    fn refuses_more_than_there_are() {
        let error = Case::new("TopK", 7).int("k", 3).outputs(2).input(tensor(&[1], &[3f32])).error();
        assert!(error.contains("k = 3 exceeds"), "{error}");
    }
}
