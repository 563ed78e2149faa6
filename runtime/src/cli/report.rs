//! Summaries for people.

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use planfile::frozen::FrozenSummary;
use planfile::summary::{DeviceMemory, EntrySummary, PortSummary, Summary};
use planfile::text::count;

/// What a plan is and needs: signature, mesh, memory per device, steps, predicted time.
pub fn summary_text(summary: &Summary) -> String {
    let mesh: Vec<String> = summary.mesh.iter().map(|axis| format!("{}={}", axis.name, axis.size)).collect();
    let mesh = if mesh.is_empty() { "one device".to_owned() } else { mesh.join(",") };
    let mut text = format!(
        "{} for {} ({}), {}: {mesh}\n",
        summary.model,
        summary.target,
        summary.architecture,
        count(u64::from(summary.ranks), "device"),
    );
    for entry in &summary.entries {
        text.push_str(&signature(entry));
    }
    text.push_str(&format!("\n{}\n\n{}\n", steps(summary), memory(summary)));
    let types: Vec<String> =
        summary.weight_bytes.iter().map(|(dtype, &bytes)| format!("{dtype} {}", bytes_text(bytes))).collect();
    if !types.is_empty() {
        text.push_str(&format!("weights: {}\n", types.join(", ")));
    }
    text
}

/// `main(ids: i64[1, 8]) → logits: f32[1, 8, 99], 12.3 µs predicted`.
fn signature(entry: &EntrySummary) -> String {
    let ports =
        |ports: &[PortSummary]| ports.iter().map(|port| format!("  {}: {}\n", port.name, port.ty)).collect::<String>();
    format!(
        "\nentry {}, {} predicted\n inputs\n{}{} outputs\n{}",
        entry.name,
        time_text(entry.predicted_ns as f64),
        ports(&entry.inputs),
        frozen_text(&entry.frozen),
        ports(&entry.outputs)
    )
}

/// The inputs that have one value for good, and why.
pub fn frozen_text(frozen: &[FrozenSummary]) -> String {
    if frozen.is_empty() {
        return String::new();
    }
    let lines: String = frozen.iter().map(|frozen| format!("  {}\n", frozen.text())).collect();
    format!(" frozen inputs: shapes or branches depend on their values; a run gives the same ones, or none\n{lines}")
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(header.to_vec());
    table
}

fn right(table: &mut Table, columns: std::ops::Range<usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// One row per entry, stage and kind of step.
fn steps(summary: &Summary) -> Table {
    let mut table = table(&["entry", "ranks", "steps", "count", "bytes sent per rank"]);
    for entry in &summary.entries {
        for stage in &entry.stages {
            for (kind, count) in &stage.steps {
                let sent = stage.collective_bytes.get(kind).map_or_else(String::new, |&bytes| bytes_text(bytes));
                table.add_row(vec![
                    entry.name.clone(),
                    ranks_text(&stage.ranks),
                    (*kind).to_owned(),
                    count.to_string(),
                    sent,
                ]);
            }
        }
    }
    right(&mut table, 3..5);
    table
}

/// One row per run of ranks that need the same.
fn memory(summary: &Summary) -> Table {
    let mut table = table(&["ranks", "weights", "activations", "peer memory", "states"]);
    let needs = |device: &DeviceMemory| {
        [device.weight_bytes, device.activation_bytes, device.peer_bytes, device.state_bytes].map(bytes_text)
    };
    for alike in summary.devices.chunk_by(|a, b| needs(a) == needs(b)) {
        let ranks: Vec<u32> = alike.iter().map(|device| device.rank).collect();
        let row = std::iter::once(ranks_text(&ranks)).chain(alike.first().map(needs).into_iter().flatten());
        table.add_row(row.collect::<Vec<_>>());
    }
    right(&mut table, 1..5);
    table
}

/// `0-3, 6`.
fn ranks_text(ranks: &[u32]) -> String {
    let runs = ranks.chunk_by(|a, b| a.checked_add(1) == Some(*b)).map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        _ => run.iter().map(u32::to_string).collect(),
    });
    runs.collect::<Vec<_>>().join(", ")
}

/// With a binary prefix.
pub(crate) fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

pub(crate) fn time_text(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{:.1} µs", ns / 1e3),
        ns if ns < 1e9 => format!("{:.1} ms", ns / 1e6),
        ns => format!("{:.2} s", ns / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use planfile::plan::PlanAxis;
    use planfile::summary::StageSummary;

    use super::*;

    #[test]
    fn equal_devices_share_a_row() {
        let device = |rank, weight_bytes| DeviceMemory { rank, weight_bytes, ..DeviceMemory::default() };
        let port = |name: &str, ty: &str| PortSummary { name: name.into(), ty: ty.into() };
        let stage = StageSummary {
            ranks: vec![0, 1, 2],
            steps: BTreeMap::from([("all_reduce", 2), ("launch", 40)]),
            collective_bytes: BTreeMap::from([("all_reduce", 4096)]),
            ..StageSummary::default()
        };
        let summary = Summary {
            model: "m".into(),
            producer: "p".into(),
            target: "cpu".into(),
            architecture: "cpu".into(),
            mesh: vec![PlanAxis { name: "tensor".into(), size: 3 }],
            ranks: 3,
            entries: vec![EntrySummary {
                name: "main".into(),
                inputs: vec![port("ids", "i64[1, 8]")],
                outputs: vec![port("y", "f32[8]")],
                frozen: vec![FrozenSummary {
                    input: "ids".into(),
                    ty: "i64[1, 8]".into(),
                    value: "[1, 2]".into(),
                    node: "/Reshape".into(),
                    nodes: 3,
                }],
                predicted_ns: 12_345,
                stages: vec![stage],
            }],
            devices: vec![device(0, 2048), device(1, 2048), device(2, 512)],
            weights: 2,
            weight_bytes: BTreeMap::from([("bf16", 2048), ("f32", 512)]),
            image_bytes: 0,
            kernels: 1,
            code_bytes: 0,
        };
        let text = summary_text(&summary);
        let line = |words: &[&str]| {
            let found = text.lines().find(|line| words.iter().all(|word| line.contains(word)));
            assert!(found.is_some(), "{words:?} in\n{text}");
        };
        line(&["m for cpu", "3 devices: tensor=3"]);
        line(&["entry main, 12.3 µs predicted"]);
        line(&["ids: i64[1, 8]"]);
        line(&["ids: i64[1, 8] = [1, 2], which node `/Reshape` and 2 more need"]);
        line(&["0-2", "all_reduce", "2", "4.0 KiB"]);
        line(&["0-1", "2.0 KiB"]);
        line(&["2", "512 B"]);
        line(&["weights: bf16 2.0 KiB, f32 512 B"]);
    }

    #[test]
    fn numbers_have_units() {
        assert_eq!([0, 1023, 1536, 3 << 30].map(bytes_text), ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]);
        assert_eq!([999.0, 1500.0, 2e7, 3e9].map(time_text), ["999 ns", "1.5 µs", "20.0 ms", "3.00 s"]);
        assert_eq!(ranks_text(&[0, 1, 2, 5]), "0-2, 5");
    }
}
