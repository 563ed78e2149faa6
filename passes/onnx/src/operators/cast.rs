//! Conversions between element types.

use ir::ValueId;

use super::{Operator, row};
use crate::context::{Context, OpError};
use crate::tensor_data::ElemType;

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("BitCast",  26, bit_cast),
    row("Cast",     6,  cast),
    row("CastLike", 15, cast_like),
];

/// Our element type of a number in an attribute such as `to`.
pub(super) fn element_type(ctx: &Context<'_>, number: i64) -> Result<planfile::DType, OpError> {
    let elem_type = ElemType(i32::try_from(number).unwrap_or(i32::MAX));
    elem_type.dtype().map_err(|problem| ctx.unsupported(&problem.to_string()))
}

fn cast(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let to = element_type(ctx, ctx.required_int("to")?)?;
    Ok(vec![ctx.cast(x, to)?])
}

/// The same bits as another type of the same size.
fn bit_cast(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let (from, to) = (ctx.dtype(x), element_type(ctx, ctx.required_int("to")?)?);
    if from.bytes() != to.bytes() {
        return Err(ctx.invalid(&format!("{from} and {to} differ in size")));
    }
    // Between integers, conversion wraps: the bits stay. A boolean is 0 or 1 in either.
    if from != to && (from.is_float() || !to.is_integer()) {
        return Err(ctx.unsupported(&format!("the bits of {from} as {to}; use Cast, or bits of integers alone")));
    }
    Ok(vec![ctx.cast(x, to)?])
}

fn cast_like(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, like) = (ctx.operand(0)?, ctx.operand(1)?);
    let dtype = ctx.dtype(like);
    Ok(vec![ctx.cast(x, dtype)?])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, bools, tensor};

    #[test]
    fn converts() {
        let case = |to| Case::new("Cast", 13).input(tensor(&[3], &[-1.7f32, 0.0, 2.9])).int("to", to);
        assert_eq!(case(7).one(), tensor(&[3], &[-1i64, 0, 2]));
        assert_eq!(case(9).one(), bools(&[3], &[true, false, true]));
        let same = case(1);
        assert!(same.import().unwrap().graphs[0].nodes.is_empty());
        let like = Case::new("CastLike", 15).input(tensor(&[1], &[2.5f32])).input(tensor(&[0], &[0i32; 0]));
        assert_eq!(like.one(), tensor(&[1], &[2i32]));
    }

    #[test]
    fn bits_of_integers_stay() {
        let case = |to| Case::new("BitCast", 26).input(tensor(&[2], &[-1i8, 5])).int("to", to);
        assert_eq!(case(2).one(), tensor(&[2], &[255u8, 5]));
        assert!(case(6).error().contains("differ in size"));
        let float = Case::new("BitCast", 26).input(tensor(&[1], &[1f32])).int("to", 6);
        assert!(float.error().contains("bits of f32"), "{}", float.error());
    }

    #[test]
    fn says_which_type_is_not_supported() {
        let strings = Case::new("Cast", 13).input(tensor(&[1], &[1f32])).int("to", 8);
        assert!(strings.error().contains("string"), "{}", strings.error());
        let missing = Case::new("Cast", 13).input(tensor(&[1], &[1f32]));
        assert!(missing.error().contains("`to` is missing"));
    }
}
