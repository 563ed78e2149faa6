//! `compile --check-support`: every operator of a model with its status.

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use onnx::{OnnxError, OperatorSupport};
use planwright::compiler::Request;
use runtime::cli::{Exit, Failure, print, print_json};
use serde_json::{Value, json};

use crate::failure;

/// Prints the list; ends with [`Exit::Invalid`] unless all is supported.
pub(crate) fn check(request: &Request, for_programs: bool) -> Result<Exit, Failure> {
    let (operators, unbound) = request.support().map_err(failure)?;
    let supported = operators.iter().all(|operator| operator.supported);
    if for_programs {
        let operators: Vec<Value> = operators.iter().map(row).collect();
        let report = json!({
            "model": request.model.to_string_lossy(), "supported": supported, "attributes_checked": unbound.is_none(),
            "operators": operators,
        });
        print_json(&report)
    } else {
        print(&table(&operators, unbound.as_ref()))
    }?;
    Ok(if supported { Exit::Success } else { Exit::Invalid })
}

fn row(operator: &OperatorSupport) -> Value {
    let OperatorSupport { domain, op, opset, count, supported, reason } = operator;
    json!({
        "domain": domain, "op": op, "opset": opset, "count": count, "supported": supported, "reason": reason,
    })
}

fn table(operators: &[OperatorSupport], unbound: Option<&OnnxError>) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(vec!["operator", "opset", "nodes", "status"]);
    for column in [1, 2] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for OperatorSupport { domain, op, opset, count, reason, .. } in operators {
        let name = if domain.is_empty() { op.clone() } else { format!("{domain}.{op}") };
        let status =
            reason.as_ref().map_or_else(|| "supported".to_owned(), |reason| format!("NOT SUPPORTED: {reason}"));
        table.add_row(vec![name, opset.to_string(), count.to_string(), status]);
    }
    let missing = operators.iter().filter(|operator| !operator.supported).count();
    let verdict = match missing {
        0 => format!("all {} operators are supported", operators.len()),
        _ => format!("{missing} of {} operators are not supported", operators.len()),
    };
    let open = unbound.map_or_else(String::new, |error| format!("\nattributes and shapes were not checked: {error}\n"));
    format!("{table}\n{verdict}\n{open}")
}
