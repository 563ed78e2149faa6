//! Plans for GPUs, of real models and with real machine code: all verify, and no lie about a kernel or a launch does,
//! whoever makes the hashes of the file valid again. What cannot be checked is named as taken on trust.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs;
use std::path::{Path, PathBuf};

use passes::settings::MeshChoice;
use passes::shard::parse_mesh;
use planfile::plan::*;
use planfile::trust::{Trusted, trusted};
use planfile::{DType, Finding, RankScalar, Target, verify};
use planwright::compiler::Request;
use runtime::tensor_file::TestData;

/// Where the models of the fixtures are.
fn models() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx");
    let mut models: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    models.retain(|model| model.join("model.onnx").is_file());
    models.sort();
    models
}

/// The plan for GPUs of this mesh, of one GPU where it is empty.
fn compile(model: &Path, mesh: &str, dtype: Option<DType>) -> Plan {
    let target = Target::from_json(include_str!("../fixtures/targets/h200x4.json")).unwrap();
    let mut request = Request::new(&model.join("model.onnx"), target);
    request.samples = TestData::read(&model.join("test_data_set_0")).unwrap().inputs;
    request.mesh = if mesh.is_empty() { MeshChoice::Devices(1) } else { MeshChoice::Fixed(parse_mesh(mesh).unwrap()) };
    request.options.dtype = dtype;
    // Look-up tables are split, so that ranks have rows of their own.
    request.split_table_bytes = 1;
    request.compile(&mut |_, _| {}).unwrap().unwrap().plan
}

/// Two ranks of the smallest mixture of experts: gathers, scatters, products and numbers that differ by rank.
fn mixture() -> Plan {
    let model = models().into_iter().find(|model| model.ends_with("tiny_mixtral")).unwrap();
    compile(&model, "tensor=2", None)
}

#[test]
fn honest_plans_verify() {
    for model in models() {
        for (mesh, dtype) in [("", Some(DType::BF16)), ("tensor=2", None), ("data=2", Some(DType::F16))] {
            let plan = compile(&model, mesh, dtype);
            assert_eq!(verify(&plan), Ok(()), "{} {mesh}", model.display());
            let code = trusted(&plan).iter().filter(|trusted| matches!(trusted, Trusted::Code { .. })).count();
            assert_eq!(code, plan.code.len(), "{} {mesh}", model.display());
        }
    }
}

/// The steps that launch machine code.
fn launches(plan: &Plan) -> Vec<(usize, usize)> {
    let steps = |(program, steps): (usize, &Program)| {
        let launches = steps.steps.iter().enumerate().filter(|(_, step)| matches!(step.action, Action::Launch { .. }));
        launches.map(|(step, _)| (program, step)).collect::<Vec<_>>()
    };
    plan.programs.iter().enumerate().flat_map(steps).collect()
}

type Launch<'a> = (&'a mut Vec<Argument>, &'a mut LaunchShape);

fn launch(plan: &mut Plan, (program, step): (usize, usize)) -> Launch<'_> {
    match &mut plan.programs[program].steps[step].action {
        Action::Launch { scalars, launch: Some(launch), .. } => (scalars, launch),
        _ => panic!("program {program}, step #{step} launches nothing"),
    }
}

fn findings(plan: &Plan) -> Vec<Finding> {
    verify(plan).err().unwrap_or_default()
}

/// A lie about a launch; it does nothing where it would be the truth.
type Lie = fn(&mut Launch<'_>);

fn blocks(launch: &Launch<'_>) -> i64 {
    launch.1.grid[0].get(0).unwrap()
}

const LIES: &[(&str, Lie)] = &[
    ("grid × 1,000", |launch| launch.1.grid[0] = (blocks(launch) * 1000).into()),
    ("grid of one block", |launch| launch.1.grid[0] = 1.into()),
    ("a second row of blocks", |launch| launch.1.grid[1] = 2.into()),
    ("a grid by rank", |launch| launch.1.grid[0] = RankScalar::ByRank(vec![blocks(launch); 2])),
    ("block of one thread", |launch| launch.1.block = [1, 1, 1]),
    ("block of 1,024 threads", |launch| launch.1.block = [1024, 1, 1]),
    ("no shared memory", |launch| launch.1.shared_bytes = 0),
    ("1 MiB of shared memory", |launch| launch.1.shared_bytes = 1 << 20),
    ("a scalar of i64::MAX", |launch| {
        if let Some(Argument::Scalar { value }) = launch.0.first_mut() {
            *value = i64::MAX.into();
        }
    }),
    ("one scalar more", |launch| launch.0.insert(0, Argument::Scalar { value: 7.into() })),
    ("one fault word more", |launch| launch.0.push(Argument::Fault { word: 0 })),
    ("no scalars", |launch| launch.0.retain(|scalar| matches!(scalar, Argument::Fault { .. }))),
    ("no fault word", |launch| launch.0.retain(|scalar| !matches!(scalar, Argument::Fault { .. }))),
];

#[test]
fn lies_about_launches_are_refused() {
    let honest = mixture();
    assert_eq!(verify(&honest), Ok(()));
    let mut told = vec![0; LIES.len()];
    for at in launches(&honest) {
        for ((name, lie), told) in LIES.iter().zip(&mut told) {
            let mut plan = honest.clone();
            lie(&mut launch(&mut plan, at));
            if plan == honest {
                continue;
            }
            *told += 1;
            let step = format!("program {}, step #{}", at.0, at.1);
            let found = findings(&plan);
            assert!(found.iter().any(|finding| finding.at == step), "{name} of {step}: {found:?}");
        }
    }
    // None is the truth everywhere.
    let names: Vec<&str> = LIES.iter().zip(&told).filter(|(_, told)| **told == 0).map(|((name, _), _)| *name).collect();
    assert!(names.is_empty(), "nowhere told: {names:?}");
}

/// Code and symbol of a kernel that has them.
fn coded(plan: &mut Plan, kernel: usize) -> Option<(&mut u32, &mut String)> {
    match &mut plan.kernels[kernel].implementation {
        Implementation::Cuda { code, symbol, .. } => Some((code, symbol)),
        Implementation::Reference | Implementation::Library { .. } => None,
    }
}

#[test]
fn lies_about_kernels_are_refused() {
    let honest = mixture();
    let refused = |kernel: usize, lie: &str, plan: &Plan| {
        assert!(plan != &honest);
        let at = format!("kernel {kernel} (`{}`)", plan.kernels[kernel].name);
        let found = findings(plan);
        assert!(found.iter().any(|finding| finding.at == at), "{lie} of {at}: {found:?}");
    };
    let mut swapped = 0;
    for kernel in 0..honest.kernels.len() {
        let mut absent = honest.clone();
        let Some((own, symbol)) = coded(&mut absent, kernel) else { continue };
        let (own, named) = (*own, std::mem::replace(symbol, "absent".to_owned()));
        refused(kernel, "an absent symbol", &absent);
        for code in (0..honest.code.len()).filter(|&code| code != own as usize) {
            let mut plan = honest.clone();
            *coded(&mut plan, kernel).unwrap().0 = code as u32;
            refused(kernel, "another kernel's code", &plan);
            // With its symbol as well, whose rule and parameters may be the same.
            let user = (0..honest.kernels.len()).find_map(|other| match &honest.kernels[other].implementation {
                Implementation::Cuda { code: of, symbol, .. } if *of as usize == code => Some(symbol.clone()),
                _ => None,
            });
            if let Some(user) = user {
                swapped += usize::from(user == named);
                *coded(&mut plan, kernel).unwrap().1 = user;
                refused(kernel, "another kernel's code and symbol", &plan);
            }
        }
        let mut plan = honest.clone();
        plan.kernels[kernel].implementation = Implementation::Reference;
        refused(kernel, "no code", &plan);
    }
    assert!(swapped > 0, "no two kernels have one name");
}

#[test]
fn damaged_code_is_refused() {
    let honest = mixture();
    for code in 0..honest.code.len() {
        let refused = |lie: &str, change: &dyn Fn(&mut Vec<u8>)| {
            let mut plan = honest.clone();
            change(&mut plan.code[code].cubin);
            let found = findings(&plan);
            assert!(
                found.iter().any(|finding| finding.at == format!("code {code}")),
                "{lie} of code {code}: {found:?}"
            );
        };
        refused("nothing", &|cubin| cubin.clear());
        refused("one byte", &|cubin| cubin.truncate(1));
        refused("half", &|cubin| cubin.truncate(cubin.len() / 2));
        refused("all but a byte", &|cubin| cubin.truncate(cubin.len() - 1));
        refused("a byte more", &|cubin| cubin.push(0));
        for back in 1..=16 {
            refused("another end", &|cubin| {
                let at = cubin.len() - back;
                cubin[at] ^= 0x5a;
            });
        }
        refused("another machine", &|cubin| cubin[18] = 62);
        refused("another architecture", &|cubin| cubin[49] = 80);
    }
}

/// Instructions are not read: they are what is trusted, by name.
#[test]
fn instructions_are_taken_on_trust_by_name() {
    let mut plan = mixture();
    let cubin = &mut plan.code[0].cubin;
    let number = |at: usize| usize::try_from(u64::from_le_bytes(cubin[at..at + 8].try_into().unwrap())).unwrap();
    let sections = (0..usize::from(cubin[60])).map(|section| number(40) + section * 64);
    // Flag 4: instructions.
    let first = sections.filter(|&section| number(section + 8) & 4 != 0).map(|section| number(section + 24)).next();
    cubin[first.unwrap()] ^= 1;
    assert_eq!(verify(&plan), Ok(()));
    let (bytes, trusted) = (plan.code[0].cubin.len(), trusted(&plan));
    let named =
        trusted.iter().any(|trusted| matches!(trusted, Trusted::Code { code: 0, bytes: own, .. } if *own == bytes));
    assert!(named, "{trusted:?}");
}

/// What is no launch and no kernel.
#[test]
fn lies_about_the_rest_are_refused() {
    let honest = mixture();
    let refused = |expected: &str, change: &dyn Fn(&mut Plan)| {
        let mut plan = honest.clone();
        change(&mut plan);
        let found = findings(&plan);
        assert!(found.iter().any(|finding| finding.to_string().contains(expected)), "`{expected}`: {found:?}");
    };
    fn actions(plan: &mut Plan) -> impl Iterator<Item = &mut Action> {
        plan.programs.iter_mut().flat_map(|program| &mut program.steps).map(|step| &mut step.action)
    }
    for other in [CollectiveAlgorithm::Host, CollectiveAlgorithm::OneShot] {
        refused(&format!("by {other:?} is not for sm_90a"), &|plan| {
            let mut algorithms = actions(plan).filter_map(|action| match action {
                Action::Collective { algorithm, .. } => Some(algorithm),
                _ => None,
            });
            *algorithms.next().unwrap() = other;
        });
    }
    fn algorithm(plan: &mut Plan) -> &mut Vec<u8> {
        let mut algorithms = actions(plan).filter_map(|action| match action {
            Action::Library { algorithm, .. } => Some(algorithm),
            _ => None,
        });
        algorithms.next().unwrap()
    }
    refused("an algorithm of 3 bytes", &|plan| *algorithm(plan) = vec![1, 2, 3]);
    let mut random = honest.clone();
    *algorithm(&mut random) = (0..64u8).map(|byte| byte.wrapping_mul(151)).collect();
    assert_eq!(verify(&random), Ok(()));
    assert!(trusted(&random).iter().any(|trusted| matches!(trusted, Trusted::Algorithm { bytes: 64, .. })));
    for name in ["", "sm_1", "gpu"] {
        refused(&format!("the architecture `{name}` is not known"), &|plan| {
            plan.manifest.target.architecture = name.to_owned();
        });
    }
    refused("is for GPUs, the plan is for cpu", &|plan| plan.manifest.target.architecture = "cpu".to_owned());
    refused("holds code for sm_90, the plan is for sm_80", &|plan| {
        plan.manifest.target.architecture = "sm_80".to_owned();
        plan.code.iter_mut().for_each(|code| code.architecture = "sm_80".to_owned());
    });
    for ranks in [(0, 2), (5, 6), (1, 1), (1, 0)] {
        refused("which do not exchange", &|plan| plan.manifest.links[0].ranks = ranks);
    }
    refused("is predicted to take 18446744073709551615 ns", &|plan| {
        plan.manifest.entries[0].predicted_ns = u64::MAX;
    });
    refused("is said to take 18446744073709551615 ns", &|plan| {
        plan.programs[0].steps[0].cost.predicted_ns = u64::MAX;
    });
}
