//! Which keys a query of attention sees by where it is: causal attention, windows, and lengths of a cache outside.

use ir::ValueId;
use planfile::op::Causal;
use planfile::{Binary, Compare, DType, Dim, Expr, Op, Scalar};

use crate::context::{Context, OpError};

/// Positions beyond any that a tensor has keys for, and far from overflow.
const FAR: i64 = 1 << 48;

/// Which keys a query sees by its own position among them.
pub(super) struct Sight {
    first: First,
    /// How many keys it sees before its own position; all of them unless stated.
    left: Option<i64>,
    /// And after it.
    right: Option<i64>,
}

/// Where the first query is.
enum First {
    /// Behind so many past keys.
    Past(u64),
    /// Where the last query is at the last valid key: their number in each sample.
    Valid(ValueId),
}

impl Sight {
    pub(super) fn new(ctx: &Context<'_>, past: Option<u64>) -> Result<Self, OpError> {
        let first = match (past, ctx.optional(6)) {
            (past, None) => First::Past(past.unwrap_or(0)),
            (None, Some(lengths)) => First::Valid(lengths),
            (Some(_), Some(_)) => {
                return Err(ctx.invalid("`nonpad_kv_seqlen` does not go together with past keys and values"));
            }
        };
        let bound = |name: &str| match ctx.int(name, -1)? {
            -1 => Ok(None),
            bound @ 0.. => Ok(Some(bound.min(FAR))),
            bound => Err(ctx.invalid(&format!("`{name}` is {bound}, expected -1 or more"))),
        };
        let (left, right) = (bound("left_window_size")?, bound("right_window_size")?);
        let right = if ctx.flag("is_causal", false)? { Some(0) } else { right };
        Ok(Self { first, left, right })
    }

    /// What the primitive sees to by itself.
    pub(super) fn causal(&self, queries: u64, keys: u64) -> Option<Causal> {
        match (self.right, &self.first) {
            (Some(0), First::Past(0)) => Some(Causal::FromStart),
            (Some(0), First::Past(past)) if queries.checked_add(*past) == Some(keys) => Some(Causal::FromEnd),
            _ => None,
        }
    }

    /// Where a query sees a key, if that takes a mask: `[queries, keys]`, or `[batch, 1, queries or 1, keys]` where it
    /// differs by sample. `causal`: what is after a query is hidden without.
    pub(super) fn mask(
        &self,
        ctx: &mut Context<'_>,
        causal: bool,
        sizes: [u64; 3],
    ) -> Result<Option<ValueId>, OpError> {
        let [batch, queries, keys] = sizes;
        let constant = |value| Expr::constant(Scalar::i64(value));
        let valid = || Expr::operand(0).cast(DType::I64);
        let (first, mut sizes, operands) = match self.first {
            First::Past(past) => (constant(past.cast_signed()), vec![queries, keys], vec![]),
            First::Valid(lengths) => {
                let first = valid().binary(Binary::Sub, constant(queries.cast_signed()));
                (first, vec![batch, 1, queries, keys], vec![ctx.reshape(lengths, &[batch, 1, 1, 1])?])
            }
        };
        let axis = sizes.len() - 2;
        let query = Expr::index(axis as u8).binary(Binary::Add, first);
        let key = Expr::index(axis as u8 + 1);
        let right = self.right.filter(|_| !causal);
        let mut rules = Vec::new();
        if let Some(right) = right {
            rules.push(key.clone().compare(Compare::Le, query.clone().binary(Binary::Add, constant(right))));
        }
        if let Some(left) = self.left {
            rules.push(key.clone().binary(Binary::Add, constant(left)).compare(Compare::Ge, query));
        }
        if rules.is_empty() {
            sizes[axis] = 1;
        }
        // The last query is at the last valid key: what is at no query's right is valid.
        if matches!(self.first, First::Valid(_)) && right != Some(0) {
            rules.push(key.compare(Compare::Lt, valid()));
        }
        let Some(expr) = rules.into_iter().reduce(|all, rule| all.binary(Binary::And, rule)) else { return Ok(None) };
        let dims = sizes.into_iter().map(Dim::Static).collect();
        Ok(Some(ctx.emit(Op::Pointwise { expr, dims }, &operands)?))
    }
}
