//! Lies about machine code, in plans for GPUs: each is refused, or named as taken on trust.

use super::*;
use crate::cubin::forge::{Forged, forge};
use crate::launch::{Factor, LABEL_BYTES, SizeOf, label};
use crate::trust::{Trusted, trusted};

#[track_caller]
fn lie(expected: &str, change: impl FnOnce(&mut Plan)) {
    refused_in(sample::gpu(), expected, change);
}

fn shape(plan: &mut Plan, step: usize) -> &mut LaunchShape {
    match &mut plan.programs[0].steps[step].action {
        Action::Launch { launch: Some(launch), .. } => launch,
        _ => panic!("step {step} has no grid"),
    }
}

fn given(plan: &mut Plan, step: usize) -> &mut Vec<Argument> {
    match &mut plan.programs[0].steps[step].action {
        Action::Launch { scalars, .. } => scalars,
        _ => panic!("step {step} has no scalars"),
    }
}

fn rule(plan: &mut Plan, kernel: usize) -> &mut LaunchRule {
    match &mut plan.kernels[kernel].implementation {
        Implementation::Cuda { rule, .. } => rule,
        _ => panic!("kernel {kernel} has no rule"),
    }
}

#[test]
fn grids_follow_from_the_specification() {
    for blocks in [1, 4000, i64::MAX, -1, 0] {
        lie("step #3: launches grid [", |plan| shape(plan, 3).grid[0] = blocks.into());
    }
    lie("and its kernel's rule gives grid [4, 1, 1] block [128, 1, 1] shared 4096", |plan| {
        shape(plan, 3).grid[0] = RankScalar::ByRank(vec![4, 4]);
    });
    lie("step #3: launches grid [4, 2, 1]", |plan| shape(plan, 3).grid[1] = 2.into());
    lie("step #3: launches device code without a grid", |plan| {
        if let Action::Launch { launch, .. } = &mut steps(plan)[3].action {
            *launch = None;
        }
    });
}

#[test]
fn blocks_and_shared_memory_follow_from_the_specification() {
    lie("step #3: launches grid [4, 1, 1] block [1, 1, 1]", |plan| shape(plan, 3).block = [1, 1, 1]);
    lie("step #3: launches grid [4, 1, 1] block [1, 128, 1]", |plan| shape(plan, 3).block = [1, 128, 1]);
    lie("step #3: a block of [0, 1, 1] threads", |plan| shape(plan, 3).block[0] = 0);
    lie("step #3: a block of [1, 1, 128] threads", |plan| shape(plan, 3).block = [1, 1, 128]);
    lie("step #3: a block of [4294967295, 4294967295, 64] threads", |plan| {
        shape(plan, 3).block = [u32::MAX, u32::MAX, 64]
    });
    for bytes in [0, 1 << 20] {
        lie(&format!("block [128, 1, 1] shared {bytes}, and its kernel's rule"), |plan| {
            shape(plan, 3).shared_bytes = bytes
        });
    }
}

#[test]
fn scalars_follow_from_the_specification() {
    let wrong = "step #3: scalar 0 is not rank(0, 2), as its kernel has it";
    lie(wrong, |plan| given(plan, 3)[0] = Argument::Scalar { value: i64::MAX.into() });
    lie(wrong, |plan| given(plan, 3)[0] = Argument::Scalar { value: RankScalar::ByRank(vec![2, 0]) });
    for other in [Argument::Fault { word: 0 }, Argument::Epoch, Argument::Extent { extent: ExtentId(0) }, arena(0)] {
        lie(wrong, |plan| given(plan, 3)[0] = other.clone());
    }
    lie("step #3: 2 scalars, its kernel takes 1", |plan| given(plan, 3).push(Argument::Scalar { value: 0.into() }));
    lie("step #3: 0 scalars, its kernel takes 1", |plan| given(plan, 3).clear());
    lie("step #1: 0 scalars, its kernel takes 1", |plan| given(plan, 1).clear());
    lie("step #1: 2 scalars, its kernel takes 1", |plan| given(plan, 1).push(Argument::Fault { word: 2 }));
}

/// Whoever changes the rule as well has to change the code.
#[test]
fn rules_and_specifications_are_those_of_the_code() {
    let labelled = "is not labelled as";
    lie(labelled, |plan| {
        rule(plan, 2).grid[0][0] = Factor::Count(2000);
        shape(plan, 3).grid[0] = 4000.into();
    });
    lie(labelled, |plan| {
        rule(plan, 2).shared_bytes = 0;
        shape(plan, 3).shared_bytes = 0;
    });
    lie(labelled, |plan| {
        let (Op::Pointwise { expr, .. }, sum) = (&mut plan.kernels[2].spec.nodes[0].op, crate::Binary::Sub) else {
            panic!("a sum")
        };
        *expr.ops.last_mut().unwrap() = crate::ExprOp::Binary(sum);
    });
    lie("clusters of [2, 1, 1] blocks do not make its grid", |plan| rule(plan, 2).grid[0] = vec![Factor::Count(3)]);
    lie("its launch: tiles of nothing", |plan| rule(plan, 2).grid[0] = vec![Factor::Tiles { sizes: vec![], tile: 0 }]);
    lie("its launch: a size of value 9", |plan| {
        rule(plan, 2).grid[0] = vec![Factor::Tiles { sizes: vec![SizeOf { value: 9, axis: 0 }], tile: 1 }];
    });
    lie("a block of [1, 1, 1] threads, its code is for [128, 1, 1]", |plan| rule(plan, 2).block = [1, 1, 1]);
    lie("1024 and 1048576 bytes of shared memory, a block has 232448", |plan| rule(plan, 2).shared_bytes = 1 << 20);
}

fn symbol(plan: &mut Plan, kernel: usize, to: &str) {
    if let Implementation::Cuda { symbol, .. } = &mut plan.kernels[kernel].implementation {
        *symbol = to.to_owned();
    }
}

#[test]
fn code_is_that_of_the_kernel() {
    let code = |plan: &mut Plan, kernel: usize, to: u32| {
        if let Implementation::Cuda { code, .. } = &mut plan.kernels[kernel].implementation {
            *code = to;
        }
    };
    lie("kernel 2 (`add3`): code 0 has no kernel `add3_kernel`", |plan| code(plan, 2, 0));
    lie("kernel 2 (`add3`): code 2 of 2", |plan| code(plan, 2, 2));
    lie("code 1 has no kernel `absent`", |plan| symbol(plan, 2, "absent"));
    lie("code 1 has no kernel ``", |plan| symbol(plan, 2, ""));
    lie("kernel 2 (`add3`): has no code for sm_90a", |plan| {
        plan.kernels[2].implementation = Implementation::Reference;
    });
    // Under its name, with as many parameters.
    lie("code 1 is not labelled as `add3_kernel`", |plan| plan.code[1].cubin = forge(&add3()));
}

/// What the code of the kernel `add3` says of itself, but for its labels.
fn add3() -> Forged {
    Forged {
        architecture: 90,
        symbol: "add3_kernel".to_owned(),
        parameters: 5,
        threads: 128,
        registers: 32,
        shared_bytes: 1024,
        cluster: 2,
        labels: vec![[3; LABEL_BYTES]],
    }
}

/// The code of `add3`, labelled as it should be.
fn labelled(plan: &Plan, forged: Forged) -> Vec<u8> {
    let kernel = &plan.kernels[2];
    let Implementation::Cuda { symbol, rule, .. } = &kernel.implementation else { panic!("no code") };
    forge(&Forged { labels: vec![label(&kernel.spec, symbol, rule).unwrap()], ..forged })
}

#[test]
fn code_takes_what_it_is_given_and_fits_the_device() {
    #[track_caller]
    fn code(expected: &str, forged: Forged) {
        lie(expected, |plan| plan.code[1].cubin = labelled(plan, forged));
    }
    let mut plan = sample::gpu();
    plan.code[1].cubin = labelled(&plan, add3());
    assert_eq!(verify(&plan), Ok(()));
    code("code 1: holds code for sm_80, the plan is for sm_90a", Forged { architecture: 80, ..add3() });
    let parameters = "`add3_kernel` has parameters of [8, 8, 8, 8] bytes, its specification gives it 5 of 8";
    code(parameters, Forged { parameters: 4, ..add3() });
    code("has parameters of [8, 8, 8, 8, 8, 8] bytes", Forged { parameters: 6, ..add3() });
    code("its code is for [256, 1, 1]", Forged { threads: 256, ..add3() });
    code("clusters of [8, 1, 1] blocks do not make its grid", Forged { cluster: 8, ..add3() });
    code("128 threads of 520 registers, a block has 65536", Forged { registers: 520, ..add3() });
    code("233472 and 4096 bytes of shared memory, a block has 232448", Forged { shared_bytes: 228 << 10, ..add3() });
}

#[test]
fn damaged_code_is_no_code() {
    lie("code 0: is no ELF file: it has 1 byte", |plan| plan.code[0].cubin.truncate(1));
    lie("code 0: is no ELF file: it has 0 bytes", |plan| plan.code[0].cubin.clear());
    lie("code 0: segment ", |plan| *plan.code[0].cubin.last_mut().unwrap() ^= 0xff);
    lie("code 0: ", |plan| {
        let half = plan.code[0].cubin.len() / 2;
        plan.code[0].cubin.truncate(half);
    });
    lie("code 0: has ", |plan| plan.code[0].cubin.push(0));
    lie("code 0: is for sm_80, the plan is for sm_90a", |plan| plan.code[0].architecture = "sm_80".to_owned());
}

#[test]
fn architectures_are_known() {
    for name in ["", "sm_42", "sm_90b", "gpu"] {
        lie(&format!("manifest: the architecture `{name}` is not known"), |plan| {
            plan.manifest.target.architecture = name.to_owned();
            plan.code.iter_mut().for_each(|code| code.architecture = name.to_owned());
        });
    }
    lie("kernel 0 (`dot_f32`): is for GPUs, the plan is for cpu", |plan| {
        plan.manifest.target.architecture = "cpu".to_owned();
    });
}

#[test]
fn collectives_are_by_nccl() {
    for other in [CollectiveAlgorithm::Host, CollectiveAlgorithm::OneShot] {
        lie(&format!("step #2: all_reduce by {other:?} is not for sm_90a"), |plan| {
            if let Action::Collective { algorithm, .. } = &mut steps(plan)[2].action {
                *algorithm = other;
            }
        });
    }
    lie("step #1: a persistent step has no machine code", |plan| {
        let task = Task {
            kernel: 1,
            block: 0,
            tiles: (0, 1),
            operands: operands(plan, 1).clone(),
            results: results(plan, 1).clone(),
            waits: vec![],
            signals: vec![],
        };
        steps(plan)[1].action = Action::Persistent { tasks: vec![task], counters: vec![], launch: None };
    });
}

fn algorithm(plan: &mut Plan, bytes: usize) {
    if let Action::Library { algorithm, .. } = &mut steps(plan)[0].action {
        *algorithm = (0..bytes).map(|byte| byte as u8).collect();
    }
}

#[test]
fn algorithms_are_of_their_library() {
    for bytes in [1, 3, 63, 65, 128] {
        let given = crate::text::count(bytes as u64, "byte");
        let expected = format!("step #0: an algorithm of {given}, its library's have 64");
        lie(&expected, |plan| algorithm(plan, bytes));
    }
    // What 64 bytes mean is known to cuBLASLt alone.
    let mut plan = sample::gpu();
    algorithm(&mut plan, 64);
    assert_eq!(verify(&plan), Ok(()));
    assert!(trusted(&plan).contains(&Trusted::Algorithm { program: 0, step: 0, bytes: 64 }));
}

#[test]
fn what_is_trusted_is_named() {
    let plan = sample::gpu();
    let lines: Vec<String> = trusted(&plan).iter().map(ToString::to_string).collect();
    let [first, second] = [0, 1].map(|code| plan.code[code].cubin.len());
    let expected = [
        format!("the instructions in code 0 ({first} bytes): gather"),
        format!("the instructions in code 1 ({second} bytes): add3"),
        "cuBLASLt's results: dot_f32".to_owned(),
        "predicted times and amounts of work, on which nothing that runs depends".to_owned(),
    ];
    assert_eq!(lines, expected);
    assert_eq!(trusted(&sample::plan()), [Trusted::Predictions]);
}

#[test]
fn predictions_are_numbers_that_add_up() {
    let unsound = "is said to take 18446744073709551615 ns";
    lie(unsound, |plan| steps(plan)[0].cost.predicted_ns = u64::MAX);
    lie("entry `main`: is predicted to take 18446744073709551615 ns, its steps take 6000", |plan| {
        plan.manifest.entries[0].predicted_ns = u64::MAX;
    });
    lie("explanations: an alternative is predicted to take 18446744073709551615 ns", |plan| {
        plan.explanations.alternatives[0].predicted_ns = u64::MAX;
    });
    lie("18446744073709551615 operations", |plan| steps(plan)[0].cost.operations = u64::MAX);
    let mut plan = sample::gpu();
    steps(&mut plan).iter_mut().for_each(|step| step.cost.predicted_ns = MAX_PREDICTED_NS);
    plan.manifest.entries[0].predicted_ns = MAX_PREDICTED_NS;
    assert_eq!(verify(&plan), Ok(()));
}

/// Plans for hosts have no code, no grids and no scalars.
#[test]
fn hosts_launch_nothing() {
    refused("step #0: a grid or scalars for a kernel without code", |plan| {
        if let Action::Launch { scalars, .. } = &mut steps(plan)[0].action {
            scalars.push(Argument::Scalar { value: 0.into() });
        }
    });
    refused("step #0: a grid or scalars for a kernel without code", |plan| {
        if let Action::Launch { launch, .. } = &mut steps(plan)[0].action {
            *launch = Some(LaunchShape { grid: [1, 1, 1].map(Into::into), block: [32, 1, 1], shared_bytes: 0 });
        }
    });
    refused("step #1: a persistent step has no machine code", |plan| {
        with_tasks(plan, &[0]);
        if let Action::Persistent { launch, .. } = &mut steps(plan)[1].action {
            *launch = Some(LaunchShape { grid: [1, 1, 1].map(Into::into), block: [32, 1, 1], shared_bytes: 0 });
        }
    });
    refused("kernel 1 (`gather`): is for GPUs, the plan is for cpu", |plan| {
        plan.kernels[1] = sample::gpu().kernels[1].clone();
    });
    refused("code 0: is for sm_90a, the plan is for cpu", |plan| plan.code = sample::gpu().code);
    refused("step #2: all_reduce by Nccl is not for cpu", |plan| {
        if let Action::Collective { algorithm, .. } = &mut steps(plan)[2].action {
            *algorithm = CollectiveAlgorithm::Nccl;
        }
    });
}
