//! Cumulative sums and products along a constant axis.

use ir::ValueId;
use planfile::{Combine, Op};

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("CumSum",  11, |ctx| scan(ctx, Combine::Sum)),
    row("CumProd", 26, |ctx| scan(ctx, Combine::Prod)),
];

fn scan(ctx: &mut Context<'_>, combine: Combine) -> Result<Vec<ValueId>, OpError> {
    let (x, axis) = (ctx.operand(0)?, ctx.operand(1)?);
    let axis = ctx.constant_i64(axis)?;
    let axis = ctx.axis(axis, ctx.rank(x))?;
    let (exclusive, reverse) = (ctx.flag("exclusive", false)?, ctx.flag("reverse", false)?);
    Ok(vec![ctx.emit(Op::Scan { combine, axis, exclusive, reverse }, &[x])?])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn sums_and_products_either_way() {
        let case = |op: &str, exclusive, reverse| {
            let case = Case::new(op, 26).int("exclusive", exclusive).int("reverse", reverse);
            case.input(tensor(&[3], &[2f32, 3.0, 4.0])).constant(tensor(&[], &[-1i64])).one()
        };
        assert_close(&case("CumSum", 0, 0), &[3], &[2.0, 5.0, 9.0]);
        assert_close(&case("CumSum", 1, 1), &[3], &[7.0, 4.0, 0.0]);
        assert_close(&case("CumProd", 1, 0), &[3], &[1.0, 2.0, 6.0]);
    }
}
