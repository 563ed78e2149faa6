//! The node tests of ONNX, each compiled and run on one device and in several ways on two, against the committed table
//! of results.
//!
//! `tests/conformance/cases.tsv` lists the cases: those of class `core` run, the others say why they do not.
//! `tests/conformance/results.tsv` holds what became of each: the test fails when that changes, for the worse or for the
//! better. `UPDATE_CONFORMANCE=1` rewrites the table and its summary instead; `CONFORMANCE_ONLY=part_of_a_name` runs
//! some cases, prints their results in full and compares nothing.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may stop at the first surprise, in its own functions too"
)]

mod errata;
mod run;
mod table;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;
use std::{env, fs, slice, thread};

use table::{Case, Outcome, Row, Status};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance")
}

fn read(name: &str) -> String {
    let path = folder().join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The longest that a case may take in all its ways together; a few take a second on a busy machine.
const CASE_LIMIT: Duration = Duration::from_secs(120);

/// Runs a case, and gives up on it when it takes too long: its thread is left behind.
fn row_in_time(case: &Case) -> Row {
    let (sender, receiver) = mpsc::channel();
    let own = case.clone();
    thread::spawn(move || sender.send(run::row(&own)));
    receiver.recv_timeout(CASE_LIMIT).unwrap_or_else(|_| {
        let reason = format!("no result after {} s", CASE_LIMIT.as_secs());
        let mut outcomes = vec![Outcome { status: Status::Failed, reason }];
        outcomes.resize(table::DEVICES.len(), Outcome { status: Status::NotRun, reason: String::new() });
        Row { case: case.clone(), outcomes }
    })
}

/// Does the work for each case on as many threads as there are cores, 16 at most; results in the order of the cases.
fn each<T>(cases: &[Case], work: impl Fn(&Case) -> T + Sync) -> Vec<T>
where
    T: Send,
{
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(case) = cases.get(index) else { break };
            let result = work(case);
            results.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from).min(16) {
            scope.spawn(work);
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Rows in the order of the cases' names.
fn run_all(cases: &[Case]) -> Vec<Row> {
    let mut rows = each(cases, row_in_time);
    rows.sort_by(|a, b| a.case.name.cmp(&b.case.name));
    rows
}

#[test]
fn node_tests() {
    let mut cases = table::parse_cases(&read("cases.tsv"));
    let suite = run::suite();
    assert!(suite.is_dir(), "{} is missing; run `python3 fixtures/fetch.py`", suite.display());
    let hook = std::panic::take_hook();
    run::record_panics();
    if let Ok(part) = env::var("CONFORMANCE_ONLY") {
        cases.retain(|case| case.name.contains(&part));
        for row in run_all(&cases) {
            for (Outcome { status, reason }, (devices, _)) in row.outcomes.iter().zip(table::DEVICES) {
                println!("{} {devices}: {} {reason}", row.case.name, status.name());
            }
        }
        return;
    }
    let rows = run_all(&cases);
    std::panic::set_hook(hook);
    if env::var_os("UPDATE_CONFORMANCE").is_some() {
        fs::write(folder().join("results.tsv"), table::to_tsv(&rows)).unwrap();
        fs::write(folder().join("RESULTS.md"), table::summary(&rows)).unwrap();
        return;
    }
    let committed = table::parse_rows(&read("results.tsv"));
    let differences = table::differences(&committed, &rows);
    assert!(
        differences.is_empty(),
        "{} results differ from tests/conformance/results.tsv:\n{}\nMend what got worse; then UPDATE_CONFORMANCE=1 \
         rewrites the table.",
        differences.len(),
        differences.join("\n")
    );
}

/// Every case that passes on the CPU passes on a GPU, while up to 15 other sessions are loaded, captured and ended on it.
/// `CONFORMANCE_ONLY` picks some here, too.
#[test]
#[ignore = "needs a CUDA GPU, cuBLASLt, cuDNN and NVRTC"]
fn node_tests_on_a_gpu() {
    let part = env::var("CONFORMANCE_ONLY").unwrap_or_default();
    let committed = table::parse_rows(&read("results.tsv"));
    let passing = committed.into_iter().filter(|row| row.outcomes[0].status == Status::Passed).map(|row| row.case);
    let cases: Vec<Case> = passing.filter(|case| case.name.contains(&part)).collect();
    assert!(!cases.is_empty());
    let hook = std::panic::take_hook();
    run::record_panics();
    let outcomes = each(&cases, run::on_gpu);
    std::panic::set_hook(hook);
    let failures: Vec<String> = cases
        .iter()
        .zip(&outcomes)
        .filter(|(_, outcome)| outcome.status != Status::Passed)
        .map(|(case, outcome)| format!("{}: {} {}", case.name, outcome.status.name(), outcome.reason))
        .collect();
    println!("{} of {} cases pass on a GPU", cases.len() - failures.len(), cases.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// A case whose published values pass as well has no place among the errata.
#[test]
fn errata_are_needed() {
    for erratum in errata::ERRATA {
        assert_eq!(run::needs_its_erratum(erratum.case), Ok(true), "{}", erratum.case);
    }
}

/// The table and its summary are of each other and of the list of cases.
#[test]
fn the_summary_is_that_of_the_table() {
    let rows = table::parse_rows(&read("results.tsv"));
    assert_eq!(table::summary(&rows), read("RESULTS.md"), "UPDATE_CONFORMANCE=1 rewrites the summary");
    let mut cases = table::parse_cases(&read("cases.tsv"));
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(rows.into_iter().map(|row| row.case).collect::<Vec<_>>(), cases);
}

#[test]
fn differences_tell_worse_from_better() {
    let row = |status: Status| Row {
        case: Case { name: "test_x".to_owned(), operator: "X".to_owned(), class: "core".to_owned() },
        outcomes: [status, Status::Passed, Status::Whole]
            .map(|status| Outcome { status, reason: String::new() })
            .to_vec(),
    };
    let (passed, failed) = (row(Status::Passed), row(Status::Failed));
    assert!(table::differences(slice::from_ref(&passed), slice::from_ref(&passed)).is_empty());
    let worse = table::differences(slice::from_ref(&passed), slice::from_ref(&failed));
    assert_eq!(worse, ["WORSE   test_x, 1 device: passed, now failed "]);
    let better = table::differences(&[failed], &[passed]);
    assert_eq!(better, ["better  test_x, 1 device: failed, now passed "]);
}
