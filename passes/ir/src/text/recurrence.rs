//! Attributes of recurrent layers: `{lstm, lengths, forward [sigmoid($0), tanh($0), tanh($0)]}`.

use planfile::Op;
use planfile::attributes::{CELLS, DIRECTIONS};

use super::bag::missing;
use super::cursor::{Cursor, Mark};
use super::expr;
use super::op::lookup;
use crate::error::IrError;

/// The attributes at the cursor.
///
/// # Errors
/// [`IrError::Parse`] at what is no attribute, or at `mark`, the operation's name, where no cell is named.
pub(super) fn read(cursor: &mut Cursor<'_>, mark: Mark) -> Result<Op, IrError> {
    let (mut cell, mut reverse, mut functions) = (None, Vec::new(), Vec::new());
    let (mut bias, mut peepholes, mut lengths) = (false, false, false);
    cursor.list("{", "}", |cursor| {
        let mark = cursor.mark();
        let word = cursor.word("an attribute")?;
        if let Some(backwards) = lookup(&DIRECTIONS, word) {
            reverse.push(backwards);
            functions.extend(cursor.list("[", "]", expr::read)?);
            return Ok(());
        }
        match (lookup(&CELLS, word), word) {
            (known @ Some(_), _) => cell = known,
            (None, "bias") => bias = true,
            (None, "peepholes") => peepholes = true,
            (None, "lengths") => lengths = true,
            (None, _) => return Err(cursor.error_at(mark, format!("`{word}` is no attribute here"))),
        }
        Ok(())
    })?;
    let cell = cell.ok_or_else(|| cursor.error_at(mark, missing("rnn`, `gru` or `lstm")))?;
    Ok(Op::Recurrence { cell, reverse, functions, bias, peepholes, lengths })
}
