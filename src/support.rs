//! `compile --check-support`: every operator of a model with its status.

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use onnx::support::{Reason, TRIAL_SIZES};
use onnx::{OperatorSupport, Status, SupportReport};
use planfile::frozen::FrozenSummary;
use planwright::compiler::Request;
use runtime::cli::{Exit, Failure, frozen_text, print, print_json};
use serde_json::{Value, json};

use crate::failure;

/// Prints the list; ends with [`Exit::Invalid`] where an operator is not supported, or the model contradicts itself. What
/// is unknown until it is bound does not count.
pub(crate) fn check(request: &Request, for_programs: bool) -> Result<Exit, Failure> {
    let report = request.support().map_err(failure)?;
    match for_programs {
        true => print_json(&value(request, &report)),
        false => print(&text(&report)),
    }?;
    Ok(match report.status() {
        Status::Supported | Status::Unknown => Exit::Success,
        Status::Invalid | Status::Unsupported => Exit::Invalid,
    })
}

fn value(request: &Request, report: &SupportReport) -> Value {
    let supported = match report.status() {
        Status::Supported => Some(true),
        Status::Unknown => None,
        Status::Invalid | Status::Unsupported => Some(false),
    };
    let unbound = report.unbound.iter();
    let unbound =
        unbound.map(|dim| json!({"input": dim.input, "axis": dim.axis, "name": dim.name, "flag": dim.flag()}));
    json!({
        "model": request.model.to_string_lossy(),
        "supported": supported,
        "operators": report.operators.iter().map(row).collect::<Vec<_>>(),
        "unbound": unbound.collect::<Vec<_>>(),
        "frozen": frozen(report),
        "advice": report.advice,
    })
}

fn row(operator: &OperatorSupport) -> Value {
    let OperatorSupport { domain, op, opset, count, status, reasons } = operator;
    let reason = |Reason { text, node, nodes }: &Reason| json!({"reason": text, "node": node, "nodes": nodes});
    json!({
        "domain": domain, "op": op, "opset": opset, "count": count, "status": name(*status),
        "reasons": reasons.iter().map(reason).collect::<Vec<_>>(),
    })
}

fn name(status: Status) -> &'static str {
    match status {
        Status::Supported => "supported",
        Status::Unknown => "unknown",
        Status::Invalid => "invalid",
        Status::Unsupported => "not supported",
    }
}

fn frozen(report: &SupportReport) -> Vec<FrozenSummary> {
    report.frozen.iter().map(FrozenSummary::from).collect()
}

fn text(report: &SupportReport) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(vec!["operator", "opset", "nodes", "status"]);
    for column in [1, 2] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for operator in &report.operators {
        let OperatorSupport { domain, op, opset, count, .. } = operator;
        let name = if domain.is_empty() { op.clone() } else { format!("{domain}.{op}") };
        table.add_row(vec![name, opset.to_string(), count.to_string(), status_text(operator)]);
    }
    let mut text = format!("{table}\n{}\n", verdict(&report.operators));
    for advice in &report.advice {
        text.push_str(&format!("{advice}\n"));
    }
    if !report.unbound.is_empty() {
        let [first, second] = TRIAL_SIZES;
        text.push_str(&format!(
            "\nunknown until dimensions are bound ({first} and {second} were tried in their place); bind them, or give sample \
             inputs with --like DIR\n"
        ));
        let line =
            |dim: &onnx::error::UnboundDim| format!("  {} (input `{}`, axis {})\n", dim.flag(), dim.input, dim.axis);
        text.extend(report.unbound.iter().map(line));
    }
    let frozen = frozen_text(&frozen(report));
    if !frozen.is_empty() {
        text.push_str(&format!("\n{}", frozen.trim_start()));
    }
    text
}

/// In capitals what is in the way, a reason a line.
fn status_text(operator: &OperatorSupport) -> String {
    let reasons = operator.reason_texts();
    let (word, alone) = match operator.status {
        Status::Supported => ("supported", "supported"),
        Status::Unknown => ("unknown", "unknown until bound"),
        Status::Invalid => ("INVALID", "INVALID"),
        Status::Unsupported => ("NOT SUPPORTED", "NOT SUPPORTED"),
    };
    if reasons.is_empty() { alone.to_owned() } else { format!("{word}: {}", reasons.join("\n")) }
}

/// How many operators have which status.
fn verdict(operators: &[OperatorSupport]) -> String {
    let count = |status| operators.iter().filter(|operator| operator.status == status).count();
    let counts = [
        (count(Status::Unsupported), "not supported"),
        (count(Status::Invalid), "invalid"),
        (count(Status::Unknown), "unknown"),
    ];
    let parts: Vec<String> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    let refused = count(Status::Unsupported) + count(Status::Invalid);
    match (operators.len(), parts.as_slice()) {
        (1, []) => "the only operator is supported".to_owned(),
        (all, []) => format!("all {all} operators are supported"),
        (all, _) if refused == 0 => format!("of {all} operators none is refused; {}", parts.join(", ")),
        (all, parts) => format!("of {all} operators: {}", parts.join(", ")),
    }
}
