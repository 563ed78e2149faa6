//! Sizes as values. Shapes are static, so they are constants.

use ir::ValueId;
use planfile::{DType, Scalar, Tensor, TensorType};

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Shape", 1, shape),
    row("Size",  1, size),
];

/// Sizes from dimension `start` to before `end`, which clamp to the rank.
fn shape(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let sizes = ctx.sizes(x);
    let rank = sizes.len() as i64;
    let clamped = |value: i64| if value < 0 { value.saturating_add(rank) } else { value }.clamp(0, rank) as usize;
    let (start, end) = (clamped(ctx.int("start", 0)?), clamped(ctx.int("end", rank)?));
    // Sizes of a tensor have at most 63 bits.
    let sizes: Vec<i64> = sizes.get(start..end).unwrap_or_default().iter().map(|&size| size.cast_signed()).collect();
    Ok(vec![ctx.literal_i64s(&sizes)])
}

fn size(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let count = ctx.count(&ctx.sizes(x))?;
    let data = planfile::Buffer::from_bytes(&Scalar::i64(count.cast_signed()).to_bytes());
    Ok(vec![ctx.literal(Tensor { ty: TensorType::new(DType::I64, &[]), data })])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, tensor};

    #[test]
    fn sizes_are_constants() {
        let x = tensor(&[2, 1, 3], &[0f32; 6]);
        let case = Case::new("Shape", 15).input(x.clone());
        assert_eq!(case.one(), tensor(&[3], &[2i64, 1, 3]));
        assert!(case.import().unwrap().graphs[0].nodes().is_empty());
        assert_eq!(case.clone().int("start", 1).int("end", -1).one(), tensor(&[1], &[1i64]));
        assert_eq!(case.clone().int("start", -9).int("end", 9).one(), tensor(&[3], &[2i64, 1, 3]));
        assert_eq!(case.int("start", 2).int("end", 1).one(), tensor(&[0], &[0i64; 0]));
        assert_eq!(Case::new("Size", 13).input(x).one(), tensor(&[], &[6i64]));
    }
}
