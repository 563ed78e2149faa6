//! Attributes of recurrent layers: `{lstm, lengths, forward [sigmoid($0), tanh($0), tanh($0)]}`.

use planfile::Op;
use planfile::op::Cell;

use super::bag::missing;
use super::cursor::{Cursor, Mark};
use super::expr;
use super::op::{lookup, named};
use crate::error::IrError;

const CELLS: [(Cell, &str); 5] = [
    (Cell::Rnn, "rnn"),
    (Cell::Gru { resets_late: false }, "gru"),
    (Cell::Gru { resets_late: true }, "gru_resets_late"),
    (Cell::Lstm { coupled: false }, "lstm"),
    (Cell::Lstm { coupled: true }, "lstm_coupled"),
];

const DIRECTIONS: [(bool, &str); 2] = [(false, "forward"), (true, "reverse")];

/// What is written of it: the cell, flags, and the functions of each direction.
pub(super) fn items(op: &Op) -> Vec<String> {
    let Op::Recurrence { cell, reverse, functions, bias, peepholes, lengths } = op else { return Vec::new() };
    let mut items = vec![named(&CELLS, cell).to_owned()];
    for (name, set) in [("bias", bias), ("peepholes", peepholes), ("lengths", lengths)] {
        items.extend(set.then(|| name.to_owned()));
    }
    let mut functions = functions.iter().map(expr::print);
    for backwards in reverse {
        let own: Vec<String> = functions.by_ref().take(cell.functions()).collect();
        items.push(format!("{} [{}]", named(&DIRECTIONS, backwards), own.join(", ")));
    }
    items
}

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
