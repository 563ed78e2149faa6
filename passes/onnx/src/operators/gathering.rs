//! Elements picked by computed positions.

use ir::ValueId;
use planfile::{Binary, Compare, DType, Dim, Expr, Op, Scalar};

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Gather",          1,  gather),
    row("GatherElements",  11, gather_elements),
    row("GatherND",        11, gather_nd),
    row("ReverseSequence", 10, reverse_sequence),
];

fn gather(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, indices) = (ctx.operand(0)?, ctx.operand(1)?);
    let axis = ctx.axis(ctx.int("axis", 0)?, ctx.rank(x))?;
    Ok(vec![ctx.emit(Op::Gather { axis }, &[x, indices])?])
}

fn gather_elements(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, indices) = (ctx.operand(0)?, ctx.operand(1)?);
    let axis = ctx.axis(ctx.int("axis", 0)?, ctx.rank(x))?;
    Ok(vec![ctx.emit(Op::GatherElements { axis }, &[x, indices])?])
}

fn gather_nd(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, indices) = (ctx.operand(0)?, ctx.operand(1)?);
    let batch = ctx.int("batch_dims", 0)?;
    let batch = u8::try_from(batch).map_err(|_| ctx.invalid(&format!("attribute `batch_dims` is {batch}")))?;
    Ok(vec![ctx.emit(Op::GatherNd { batch }, &[x, indices])?])
}

/// Each sample's first elements along the time axis, as many as its length says, in reverse; the rest as it is.
fn reverse_sequence(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, lengths) = (ctx.operand(0)?, ctx.operand(1)?);
    let sizes = ctx.sizes(x);
    let time = ctx.axis(ctx.int("time_axis", 0)?, sizes.len())?;
    let batch = ctx.axis(ctx.int("batch_axis", 1)?, sizes.len())?;
    let mut by_sample = vec![1; sizes.len()];
    by_sample[usize::from(batch)] = sizes[usize::from(batch)];
    if time == batch || ctx.sizes(lengths) != [sizes[usize::from(batch)]] {
        return Err(ctx.invalid(&format!("lengths {} for {}", ctx.ty(lengths), ctx.ty(x))));
    }
    let lengths = ctx.reshape(lengths, &by_sample)?;
    let (place, length) = (|| Expr::index(time), || Expr::operand(0).cast(DType::I64));
    let mirrored = length().binary(Binary::Sub, place()).binary(Binary::Sub, Expr::constant(Scalar::i64(1)));
    let expr = place().compare(Compare::Lt, length()).select(mirrored, place());
    let dims = sizes.into_iter().map(Dim::Static).collect();
    let places = ctx.emit(Op::Pointwise { expr, dims }, &[lengths])?;
    Ok(vec![ctx.emit(Op::GatherElements { axis: time }, &[x, places])?])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, tensor};

    fn x() -> planfile::Tensor {
        tensor(&[2, 3], &[0f32, 1., 2., 3., 4., 5.])
    }

    #[test]
    fn gathers_rows_and_columns() {
        let rows = Case::new("Gather", 13).input(x()).input(tensor(&[1, 2], &[1i64, -2]));
        assert_eq!(rows.one(), tensor(&[1, 2, 3], &[3f32, 4., 5., 0., 1., 2.]));
        let column = Case::new("Gather", 13).input(x()).constant(tensor(&[], &[2i32])).int("axis", -1);
        assert_eq!(column.one(), tensor(&[2], &[2f32, 5.]));
        let floats = Case::new("Gather", 13).input(x()).input(tensor(&[1], &[1f32]));
        assert!(floats.error().contains("(`indices`) is f32; allowed: i32 or i64"));
    }

    #[test]
    fn gathers_elements() {
        let case = Case::new("GatherElements", 13).input(x()).input(tensor(&[2, 1], &[2i64, 0])).int("axis", 1);
        assert_eq!(case.one(), tensor(&[2, 1], &[2f32, 3.]));
    }

    #[test]
    fn gathers_by_coordinates() {
        let case = Case::new("GatherND", 12).input(x()).input(tensor(&[2, 2], &[0i64, 1, 1, 2]));
        assert_eq!(case.one(), tensor(&[2], &[1f32, 5.]));
        let batched = Case::new("GatherND", 12).input(x()).input(tensor(&[2, 1], &[2i64, 0])).int("batch_dims", 1);
        assert_eq!(batched.one(), tensor(&[2], &[2f32, 3.]));
        let wrong = Case::new("GatherND", 12).input(x()).input(tensor(&[2, 1], &[2i64, 0])).int("batch_dims", -1);
        assert!(wrong.error().contains("batch_dims"));
    }

    #[test]
    fn sequences_are_reversed_up_to_their_length() {
        let case = Case::new("ReverseSequence", 10).input(tensor(&[3, 2], &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let found = case.input(tensor(&[2], &[2i64, 3])).one();
        assert_eq!(found, tensor(&[3, 2], &[3f32, 6.0, 1.0, 4.0, 5.0, 2.0]));
    }
}
