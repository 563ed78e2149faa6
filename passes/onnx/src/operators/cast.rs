//! Conversions between element types.

use ir::ValueId;
use planfile::{DType, Expr, Unary};

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
pub(super) fn element_type(ctx: &Context<'_>, number: i64) -> Result<DType, OpError> {
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
    let operand = || Expr::operand(0);
    let expr = match (from, to) {
        _ if from == to => return Ok(vec![x]),
        (_, _) if !from.is_float() && to.is_integer() => operand().cast(to),
        (DType::F32 | DType::F64, _) if to.is_integer() => operand().unary(Unary::Bits).cast(to),
        (_, DType::F32) if from.is_integer() => operand().cast(DType::I32).unary(Unary::FromBits),
        (_, DType::F64) if from.is_integer() => operand().cast(DType::I64).unary(Unary::FromBits),
        _ => {
            let hint = "only f32 and f64 have bits as integers, and only integers become other types; use Cast";
            return Err(ctx.unsupported(&format!("the bits of {from} as {to}: {hint}")));
        }
    };
    Ok(vec![ctx.pointwise(expr, &[x])?])
}

fn cast_like(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, like) = (ctx.operand(0)?, ctx.operand(1)?);
    let dtype = ctx.dtype(like);
    Ok(vec![ctx.cast(x, dtype)?])
}

#[cfg(test)]
mod tests {
    use planfile::Tensor;

    use crate::harness::{Case, bools, tensor};

    #[test]
    fn converts() {
        let case = |to| Case::new("Cast", 13).input(tensor(&[3], &[-1.7f32, 0.0, 2.9])).int("to", to);
        assert_eq!(case(7).one(), tensor(&[3], &[-1i64, 0, 2]));
        assert_eq!(case(9).one(), bools(&[3], &[true, false, true]));
        let same = case(1);
        assert!(same.import().unwrap().graphs[0].nodes().is_empty());
        let like = Case::new("CastLike", 15).input(tensor(&[1], &[2.5f32])).input(tensor(&[0], &[0i32; 0]));
        assert_eq!(like.one(), tensor(&[1], &[2i32]));
    }

    #[test]
    fn bits_stay() {
        let case = |x: Tensor, to| Case::new("BitCast", 26).input(x).int("to", to);
        let bytes = tensor(&[2], &[-1i8, 5]);
        assert_eq!(case(bytes.clone(), 2).one(), tensor(&[2], &[255u8, 5]));
        assert!(case(bytes, 6).error().contains("differ in size"));
        // A signalling NaN, which arithmetic would make quiet, and the smallest number there is.
        let (single, double) = (0x7f80_0001u32, 1u64);
        let floats = tensor(&[3], &[1f32, -0.0, f32::from_bits(single)]);
        let integers = [1f32.to_bits(), 1 << 31, single];
        assert_eq!(case(floats.clone(), 12).one(), tensor(&[3], &integers));
        assert_eq!(case(floats, 6).one(), tensor(&[3], &integers.map(u32::cast_signed)));
        let back = case(tensor(&[3], &integers), 1).one();
        assert_eq!(back.elements::<f32>().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>(), integers);
        assert_eq!(case(tensor(&[1], &[f64::from_bits(double)]), 7).one(), tensor(&[1], &[1i64]));
        assert_eq!(case(tensor(&[1], &[double]), 11).one(), tensor(&[1], &[f64::from_bits(double)]));
    }

    #[test]
    fn says_whose_bits_it_does_not_take() {
        let case = |x: Tensor, to| Case::new("BitCast", 26).input(x).int("to", to).error();
        for (x, to, pair) in [
            (tensor(&[1], &[half::f16::ONE]), 5, "f16 as i16"),
            (tensor(&[1], &[half::f16::ONE]), 16, "f16 as bf16"),
            (tensor(&[1], &[1i16]), 16, "i16 as bf16"),
            (tensor(&[1], &[2u8]), 9, "u8 as bool"),
        ] {
            let error = case(x, to);
            assert!(error.contains(&format!("the bits of {pair}")), "{error}");
        }
    }

    #[test]
    fn says_which_type_is_not_supported() {
        let strings = Case::new("Cast", 13).input(tensor(&[1], &[1f32])).int("to", 8);
        assert!(strings.error().contains("string"), "{}", strings.error());
        let missing = Case::new("Cast", 13).input(tensor(&[1], &[1f32]));
        assert!(missing.error().contains("`to` is missing"));
    }
}
