//! Each sample of a kernel as an entry of one plan, run on a GPU and on the CPU on the same inputs.

use std::collections::BTreeMap;

use cuda::nvrtc::Nvrtc;
use kernels::samples::{inputs, samples};
use planfile::plan::Plan;
use planfile::{DType, Op, Spec, write_plan};
use runtime::{Devices, Session};

use crate::{error, error_by_row, kernel_tolerance, sample_plan};

const ARCHITECTURE: &str = "sm_90a";

fn plan(samples: &[(String, Spec)], allow_tf32: bool) -> Plan {
    let compile = |sources: &[(&str, &str)]| Nvrtc::load().and_then(|nvrtc| nvrtc.compile(sources, ARCHITECTURE));
    sample_plan::plan(samples, ARCHITECTURE, allow_tf32, |sources| compile(sources).unwrap())
}

/// Whether each row of the result is as large as it is, whatever the others are.
fn by_row(spec: &Spec) -> bool {
    spec.nodes.iter().any(|node| matches!(node.op, Op::Softmax { .. } | Op::Norm { .. } | Op::Attention { .. }))
}

fn check(samples: &[(String, Spec)], seeds: std::ops::Range<u64>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernels.plan");
    write_plan(&path, &plan(samples, false), |_| Ok::<(), planfile::PlanError>(())).unwrap();
    let on_cpu = Session::load(&path, Devices::Virtual).unwrap();
    let on_gpu = Session::load(&path, Devices::Cuda { ordinals: None }).unwrap();
    let (mut cpu, mut gpu) = (on_cpu.context().unwrap(), on_gpu.context().unwrap());
    let (mut failures, mut worst): (Vec<String>, BTreeMap<DType, f64>) = (Vec::new(), BTreeMap::new());
    for (index, (name, spec)) in samples.iter().enumerate() {
        for seed in seeds.clone() {
            let given = inputs(spec, seed).into_iter().enumerate();
            let given: BTreeMap<String, _> = given.map(|(position, x)| (format!("x{position}"), x)).collect();
            let entry = index.to_string();
            let expected = cpu.run(&entry, &given).unwrap_or_else(|error| panic!("{name}: {error}"));
            let actual = match gpu.run(&entry, &given) {
                Ok(actual) => actual,
                Err(error) => {
                    failures.push(format!("{name}: {error}"));
                    continue;
                }
            };
            let again = gpu.run(&entry, &given).unwrap();
            for (((output, actual), (_, expected)), (_, again)) in actual.iter().zip(&expected).zip(&again) {
                let dtype = expected.ty.dtype;
                let off = if by_row(spec) { error_by_row(actual, expected) } else { error(actual, expected) };
                let seen = worst.entry(dtype).or_default();
                *seen = seen.max(off);
                if off > kernel_tolerance(dtype) {
                    failures.push(format!("{name} seed {seed}, {output}: {off:.1e} off"));
                }
                if actual.data.bytes() != again.data.bytes() {
                    failures.push(format!("{name} seed {seed}, {output}: another result in the second run"));
                }
            }
        }
    }
    println!("{} kernels on {} seeds, largest errors {worst:?}", samples.len(), seeds.end - seeds.start);
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// `KERNELS_ONLY=part_of_a_name` picks some.
#[test]
#[ignore = "needs a CUDA GPU of architecture sm_90, cuBLASLt, cuDNN and NVRTC"]
fn kernels_agree_with_the_cpu() {
    let part = std::env::var("KERNELS_ONLY").unwrap_or_default();
    let picked: Vec<(String, Spec)> = samples().into_iter().filter(|(name, _)| name.contains(&part)).collect();
    assert!(!picked.is_empty());
    check(&picked, 0..3);
}
