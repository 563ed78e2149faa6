//! Plan files made to break what reads them: the binary `plan` refuses each with a reason, in bounded memory.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "../../tests/fuzz/src/forge.rs"]
#[expect(unreachable_pub, reason = "a fuzz target has it as a public module")]
mod forge;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use planfile::codec::encode;
use planfile::op::Combine;
use planfile::plan::*;
use planfile::{DType, Expr, Op, RankScalar, Recipe, Source, Spec, TensorType, Unary};

/// Address space of a command, in KiB: code, stacks and all else included.
const ADDRESS_SPACE_KIB: u64 = 1 << 20;

/// Names of the sections in the order of the file.
const NAMES: [&str; 6] = ["manifest", "programs", "kernels", "code", "explanations", "weights"];

fn f32s(sizes: &[u64]) -> TensorType {
    TensorType::new(DType::F32, sizes)
}

fn arena(offset: u64) -> Place {
    Place { ty: f32s(&[4]), at: Argument::Arena { offset } }
}

fn weight() -> Place {
    Place { ty: f32s(&[4]), at: Argument::Weights { offset: 0 } }
}

fn step(action: Action) -> Step {
    Step { action, stream: 0, waits: vec![], origin: vec![0], cost: StepCost::default() }
}

fn launch(kernel: u32, operands: Vec<Place>, results: Vec<Place>) -> Step {
    step(Action::Launch { kernel, operands, results, scalars: vec![], launch: None })
}

fn collective(op: Op, operands: Vec<Place>, results: Vec<Place>) -> Step {
    step(Action::Collective { op, operands, results, algorithm: CollectiveAlgorithm::Host })
}

fn all_reduce(from: u64, to: u64) -> Step {
    let op = Op::AllReduce { combine: Combine::Sum, groups: vec![vec![0, 1]] };
    collective(op, vec![arena(from)], vec![arena(to)])
}

/// `y = -(x + x + 2 w)` on two ranks: -x - w on each, then an all-reduce.
fn sum() -> Plan {
    let add = Expr::operand(0).binary(planfile::Binary::Add, Expr::operand(1)).unary(Unary::Neg);
    let add = Op::Pointwise { expr: add, dims: f32s(&[4]).dims };
    let port = |name: &str| PlanPort { name: name.to_owned(), ty: f32s(&[4]) };
    let bind = |offset| vec![Binding { port: 0, place: arena(offset), splits: vec![] }];
    Plan {
        manifest: Manifest {
            producer: "test".to_owned(),
            model: "sum".to_owned(),
            files: vec![],
            fingerprint: Default::default(),
            mesh: vec![PlanAxis { name: "tensor".to_owned(), size: 2 }],
            ranks: 2,
            target: TargetRef { name: "cpu".to_owned(), architecture: "cpu".to_owned() },
            entries: vec![PlanEntry {
                name: "main".to_owned(),
                inputs: vec![port("x")],
                outputs: vec![port("y")],
                frozen: vec![],
                programs: vec![0],
                predicted_ns: 0,
            }],
            weights: vec![PlanWeight {
                name: "w".to_owned(),
                ty: f32s(&[4]),
                recipe: Recipe::source(f32s(&[4]), Source::Random { seed: 1 }),
            }],
            placed: vec![PlacedWeight {
                weight: 0,
                stage: 0,
                ranks: vec![0, 1],
                ty: f32s(&[4]),
                arena_offset: 0,
                splits: vec![],
                images: vec![0, 0],
            }],
            weight_arena_bytes: vec![256, 256],
            image_bytes: 16,
            states: vec![],
            links: vec![],
        },
        programs: vec![Program {
            entry: 0,
            stage: 0,
            ranks: vec![0, 1],
            inputs: bind(0),
            outputs: bind(512),
            steps: vec![launch(0, vec![arena(0), weight()], vec![arena(256)]), all_reduce(256, 512)],
            arena_bytes: 1024,
            peer_arena_bytes: 0,
            streams: 2,
        }],
        kernels: vec![Kernel {
            name: "add".to_owned(),
            spec: Spec::of(add, vec![f32s(&[4]), f32s(&[4])]).unwrap(),
            implementation: Implementation::Reference,
        }],
        code: vec![],
        explanations: Explanations { names: vec!["/Add".to_owned()], ..Explanations::default() },
    }
}

/// Two stages of a rank each that send each other `x` and what came of it.
fn staged() -> Plan {
    let mut plan = sum();
    plan.manifest.mesh[0].name = "pipe".to_owned();
    plan.manifest.entries[0].programs = vec![0, 1];
    plan.manifest.weights.clear();
    plan.manifest.placed.clear();
    plan.manifest.weight_arena_bytes = vec![0, 0];
    plan.manifest.image_bytes = 0;
    plan.kernels.clear();
    let send = |channel, peer, from| collective(Op::Send { channel, peers: vec![peer] }, vec![arena(from)], vec![]);
    let recv = |channel, peer, to| {
        collective(Op::Recv { channel, peers: vec![peer], ty: f32s(&[4]) }, vec![], vec![arena(to)])
    };
    let first = Program {
        ranks: vec![0],
        steps: vec![send(7, 1, 0), send(8, 1, 0), recv(9, 1, 512)],
        ..plan.programs[0].clone()
    };
    let second = Program {
        stage: 1,
        ranks: vec![1],
        inputs: vec![],
        outputs: vec![],
        steps: vec![recv(7, 0, 0), recv(8, 0, 256), send(9, 0, 256)],
        ..plan.programs[0].clone()
    };
    plan.programs = vec![first, second];
    plan
}

/// The sections of a plan, whatever the plan is like.
fn sections(plan: &Plan) -> [Vec<u8>; forge::SECTIONS] {
    let weights: Vec<u8> = (0..plan.manifest.image_bytes.min(4096)).map(|at| at as u8).collect();
    [
        encode(&plan.manifest).unwrap(),
        encode(&plan.programs).unwrap(),
        encode(&plan.kernels).unwrap(),
        encode(&plan.code).unwrap(),
        encode(&plan.explanations).unwrap(),
        weights,
    ]
}

fn file(plan: &Plan) -> Vec<u8> {
    forge::assemble(&sections(plan))
}

/// Runs `plan COMMAND` on a file with these bytes, with little room: its exit code and what it said.
fn run(command: &str, bytes: &[u8]) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.plan");
    fs::write(&path, bytes).unwrap();
    run_file(command, &path)
}

fn run_file(command: &str, path: &Path) -> (i32, String) {
    let script = format!("ulimit -v {ADDRESS_SPACE_KIB} && exec \"$0\" \"$@\"");
    let Output { status, stdout, stderr } =
        Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_plan"), command]).arg(path).output().unwrap();
    let said = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    assert!(!said.contains("panicked"), "{said}");
    (status.code().unwrap_or_else(|| panic!("`plan {command}` was killed: {said}")), said)
}

/// Every command refuses these bytes, and says `words`.
#[track_caller]
fn refused(bytes: &[u8], words: &str) {
    for (command, expected) in [("verify", 1), ("inspect", 3), ("run", 3)] {
        let (code, said) = run(command, bytes);
        // Lines are broken to the width of the terminal.
        let said = said.replace('│', " ").split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(code, expected, "plan {command}: {said}");
        assert!(said.contains(words), "`{words}` is not in\n{said}");
    }
}

/// A plan with this change and valid hashes is refused.
#[track_caller]
fn forged(mut plan: Plan, words: &str, change: impl FnOnce(&mut Plan)) {
    change(&mut plan);
    refused(&file(&plan), words);
}

#[test]
fn what_is_forged_here_is_otherwise_sound() {
    for plan in [sum(), staged()] {
        let bytes = file(&plan);
        assert_eq!(forge::sections(&bytes), Some(sections(&plan)));
        for command in ["verify", "inspect", "run"] {
            let (code, said) = run(command, &bytes);
            assert_eq!(code, 0, "plan {command}: {said}");
        }
    }
}

/// First byte and end of each section.
fn spans(bytes: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    (0..forge::SECTIONS)
        .map(|section| 64 + section * 24)
        .map(|row| (number(row + 8), number(row + 8) + number(row + 16)))
        .collect()
}

#[test]
fn a_cut_at_any_boundary_is_refused() {
    let bytes = file(&sum());
    let ends = spans(&bytes).into_iter().flat_map(|(first, end)| [first, end]);
    let mut cuts: Vec<usize> = ends.chain([8, 12, 64, 208, 4095, 4096]).filter(|&cut| cut < bytes.len()).collect();
    cuts.sort_unstable();
    cuts.dedup();
    assert!(cuts.len() >= 12, "{cuts:?}");
    for cut in cuts {
        refused(&bytes[..cut], "cut");
    }
}

#[test]
fn a_flipped_bit_in_any_section_is_found() {
    let bytes = file(&sum());
    for (name, (first, end)) in NAMES.iter().zip(spans(&bytes)) {
        assert!(first < end, "section {name} is empty");
        for (at, bit) in [(first, 0), (first + (end - first) / 2, 3), (end - 1, 7)] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            refused(&damaged, "damaged");
        }
    }
    for at in [32, 64, 72, 80, 208, 4000] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        refused(&damaged, "damaged");
    }
}

/// The table says `offset` and `length` of a section, under a root that matches.
fn moved(section: usize, offset: Option<u64>, length: Option<u64>) -> Vec<u8> {
    let mut bytes = file(&sum());
    let row = 64 + section * 24;
    for (at, number) in [(row + 8, offset), (row + 16, length)] {
        if let Some(number) = number {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
    }
    forge::rehash(&mut bytes);
    bytes
}

#[test]
fn sections_that_overlap_or_lie_outside_are_refused() {
    for section in 0..forge::SECTIONS {
        let before = spans(&file(&sum()))[section.saturating_sub(1)].0 as u64;
        for offset in [0, 64, before + 4096 * 100, u64::MAX, 1 << 63] {
            refused(&moved(section, Some(offset), None), "is said to begin at");
        }
        if section > 0 {
            refused(&moved(section, Some(before), None), "is said to begin at");
        }
        for length in [1 << 20, 1 << 40, 1 << 62] {
            refused(&moved(section, None, Some(length)), "the sections make");
        }
        for length in [u64::MAX, i64::MAX as u64] {
            refused(&moved(section, None, Some(length)), "the sections overflow");
        }
    }
}

#[test]
fn counts_of_all_ones_are_refused() {
    for (at, width, words) in [(12, 4, "4294967295 sections"), (16, 8, "cut"), (24, 8, "do not make")] {
        let mut bytes = file(&sum());
        bytes[at..at + width].fill(0xff);
        forge::rehash(&mut bytes);
        refused(&bytes, words);
    }
    // Under valid hashes, in the place of every byte of every section: every count is among them.
    let parts = sections(&sum());
    for (section, name) in NAMES.iter().enumerate().take(forge::WEIGHTS) {
        let mut hostile = parts.clone();
        hostile[section] = [vec![253], vec![0xff; 8]].concat();
        refused(&forge::assemble(&hostile), &format!("section {name}"));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.plan");
    for section in 0..forge::WEIGHTS {
        for at in 0..parts[section].len() {
            let mut hostile = parts.clone();
            hostile[section].splice(at..at + 1, [253, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
            fs::write(&path, forge::assemble(&hostile)).unwrap();
            // A number that nothing depends on, such as a predicted time, may be anything.
            if let Ok(file) = planfile::PlanFile::open(&path) {
                assert_eq!(file.plan().manifest.ranks, 2, "section {section}, byte {at}");
            }
        }
    }
}

fn results(plan: &mut Plan, step: usize) -> &mut Vec<Place> {
    match &mut plan.programs[0].steps[step].action {
        Action::Launch { results, .. } | Action::Collective { results, .. } => results,
        _ => panic!("step {step} has no results"),
    }
}

#[test]
fn offsets_outside_of_the_arena_are_refused() {
    for offset in [1024, 1 << 40, u64::MAX - 255] {
        forged(sum(), &format!("16 bytes at {offset} of 1024 of the arena"), |plan| {
            results(plan, 0)[0].at = Argument::Arena { offset };
        });
    }
    forged(sum(), "16 bytes at 256 of 256 of the weight arena", |plan| {
        if let Action::Launch { operands, .. } = &mut plan.programs[0].steps[0].action {
            operands[1].at = Argument::Weights { offset: 256 };
        }
    });
    forged(sum(), "placed weight 0", |plan| plan.manifest.placed[0].arena_offset = 1 << 62);
    forged(sum(), "placed weight 0", |plan| plan.manifest.placed[0].images[1] = u64::MAX);
}

#[test]
fn wrong_ranks_are_refused() {
    // Of a tensor.
    forged(sum(), "result 0 is f32[2, 2]", |plan| results(plan, 0)[0].ty = f32s(&[2, 2]));
    forged(sum(), "rank 65 exceeds 64", |plan| {
        plan.kernels[0].spec.inputs[0] = f32s(&[1; 65]);
    });
    // Of devices.
    forged(sum(), "groups [[0, 2]] are not ranks [0, 1]", |plan| {
        plan.programs[0].steps[1] = collective(
            Op::AllReduce { combine: Combine::Sum, groups: vec![vec![0, 2]] },
            vec![arena(256)],
            vec![arena(512)],
        );
    });
    forged(sum(), "ranks", |plan| plan.programs[0].ranks = vec![0, 7]);
    forged(sum(), "ranks", |plan| plan.manifest.ranks = u32::MAX);
    forged(sum(), "peer 5 is not a rank of this program", |plan| {
        plan.programs[0].peer_arena_bytes = 256;
        let at = Argument::Peer { rank: RankScalar::Uniform(5), offset: 0 };
        results(plan, 0)[0].at = at;
    });
}

#[test]
fn writes_that_alias_are_refused() {
    // Two streams write the same bytes.
    forged(sum(), "step #2: arena: writes 0x200..0x210, which step #1 writes, with no order", |plan| {
        let mut step = launch(0, vec![arena(0), weight()], vec![arena(512)]);
        step.stream = 1;
        plan.programs[0].steps.push(step);
    });
    // A step writes what an unordered one reads.
    forged(sum(), "step #2: arena: writes 0x100..0x110, which step #0 writes, with no order", |plan| {
        let mut step = launch(0, vec![arena(0), weight()], vec![arena(256)]);
        step.stream = 1;
        plan.programs[0].steps.push(step);
    });
    // A result over the weights, that all ranks and runs share.
    forged(sum(), "step #0", |plan| results(plan, 0)[0].at = Argument::Weights { offset: 0 });
    // Two results in the same place.
    forged(sum(), "step #0", |plan| {
        plan.kernels[0].spec.results = vec![2, 2];
        results(plan, 0).push(arena(256));
    });
}

#[test]
fn ranks_that_disagree_on_the_order_of_collectives_are_refused() {
    // One sends on 7 then 8, the other receives on 8 then 7: each waits for the other.
    forged(staged(), "cycle of waits", |plan| plan.programs[1].steps.swap(0, 1));
    // A rank that is in no group would never come.
    forged(sum(), "groups [[0]] are not ranks [0, 1]", |plan| {
        plan.programs[0].steps[1] = collective(
            Op::AllReduce { combine: Combine::Sum, groups: vec![vec![0]] },
            vec![arena(256)],
            vec![arena(512)],
        );
    });
    forged(sum(), "groups must be disjoint", |plan| {
        let groups = vec![vec![0, 1], vec![1, 0]];
        plan.programs[0].steps[1] =
            collective(Op::AllReduce { combine: Combine::Sum, groups }, vec![arena(256)], vec![arena(512)]);
    });
    // One side knows of an exchange, the other does not.
    forged(staged(), "channel 8 has no receive", |plan| {
        plan.programs[1].steps.remove(1);
        plan.programs[1].steps[1] = collective(Op::Send { channel: 9, peers: vec![0] }, vec![arena(0)], vec![]);
    });
}

#[test]
fn cycles_of_waits_are_refused() {
    // Both sides wait to receive before they send.
    forged(staged(), "cycle of waits", |plan| {
        let last = plan.programs[0].steps.pop().unwrap();
        plan.programs[0].steps.insert(0, last);
    });
    // A step waits for itself, or for one that comes later.
    for from in [1, 9, u32::MAX] {
        forged(sum(), &format!("waits for step #{from}, which does not come before it"), |plan| {
            plan.programs[0].steps[1].waits.push(Edge { from, kind: EdgeKind::Full });
        });
    }
}

/// Step 0 as two tasks of a persistent kernel, the second after the first.
fn with_tasks(plan: &mut Plan, threshold: u32, waits: [&[u32]; 2], signals: [&[u32]; 2]) {
    let task = |block: u32, to: u64| Task {
        kernel: 0,
        block,
        tiles: (0, 1),
        operands: vec![arena(0), weight()],
        results: vec![arena(to)],
        waits: waits[block as usize].to_vec(),
        signals: signals[block as usize].to_vec(),
    };
    let tasks = vec![task(0, 256), task(1, 768)];
    let counters = vec![Counter { threshold }, Counter { threshold: 1 }];
    plan.programs[0].steps[0].action = Action::Persistent { tasks, counters, launch: None };
}

#[test]
fn thresholds_that_no_producer_reaches_are_refused() {
    for threshold in [0, 2, u32::MAX] {
        forged(sum(), &format!("counter 0 has threshold {threshold} and 1 signals"), |plan| {
            with_tasks(plan, threshold, [&[], &[0]], [&[0], &[1]]);
        });
    }
    forged(sum(), "task 1 waits for counter 4294967295 of 2", |plan| {
        with_tasks(plan, 1, [&[], &[u32::MAX]], [&[0], &[1]]);
    });
    forged(sum(), "cycle of waits: task 0 never starts", |plan| {
        with_tasks(plan, 1, [&[1], &[0]], [&[0], &[1]]);
    });
}

/// A header may state any length: the file need not take it on disk.
#[test]
fn a_length_that_is_not_there_is_not_allocated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.plan");
    let length = 8u64 << 30;
    // All of it hashes; as many as such a file has; and a length beyond what fits in any memory.
    for (length, chunks) in [(length, (length - 4096) / 32), (length, 512), (1 << 43, ((1u64 << 43) - 4096) / 32)] {
        let mut head = b"\x89plan\r\n\x1a".to_vec();
        head.extend(planfile::container::FORMAT_VERSION.to_le_bytes());
        head.extend((forge::SECTIONS as u32).to_le_bytes());
        head.extend(length.to_le_bytes());
        head.extend(chunks.to_le_bytes());
        head.resize(4096, 0);
        fs::write(&path, &head).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        for (command, expected) in [("verify", 1), ("inspect", 3), ("run", 3)] {
            let (code, said) = run_file(command, &path);
            assert_eq!(code, expected, "{said}");
            assert!(said.contains("chunks of") || said.contains("do not match their hash"), "{said}");
        }
    }
}

#[test]
fn names_cannot_command_a_terminal() {
    let hostile = "a\u{1b}[2J\u{9b}\r\nb";
    let changes: [&dyn Fn(&mut Plan); 7] = [
        &|plan| plan.manifest.model = hostile.to_owned(),
        &|plan| plan.manifest.entries[0].name = hostile.to_owned(),
        &|plan| plan.manifest.entries[0].inputs[0].name = hostile.to_owned(),
        &|plan| plan.manifest.weights[0].name = hostile.to_owned(),
        &|plan| plan.kernels[0].name = hostile.to_owned(),
        &|plan| plan.explanations.names[0] = hostile.to_owned(),
        &|plan| plan.explanations.sharding.push(hostile.to_owned()),
    ];
    for change in changes {
        let mut plan = sum();
        change(&mut plan);
        for command in ["verify", "inspect", "run"] {
            let (code, said) = run(command, &file(&plan));
            assert!(code == 1 || code == 3, "{code} {said}");
            assert!(said.contains("control characters") && said.contains("\\u{1b}[2J"), "{said}");
            assert!(!said.contains(|letter: char| letter.is_control() && letter != '\n'), "{said:?}");
        }
    }
}

#[test]
fn memory_that_no_machine_has_is_refused_before_it_is_taken() {
    // Sound, but for a machine with a pebibyte.
    let mut plan = sum();
    plan.programs[0].arena_bytes = 1 << 50;
    let (code, said) = run("verify", &file(&plan));
    assert_eq!(code, 0, "{said}");
    let (code, said) = run("run", &file(&plan));
    assert_eq!(code, 3, "{said}");
    assert!(said.contains("1125899906842624 bytes"), "{said}");
    // As much between two primitives of a kernel, where no arena shows it.
    let mut plan = sum();
    let wide = Op::Broadcast { dims: f32s(&[1 << 48, 4]).dims };
    let narrow = Op::Reduce { kind: planfile::op::ReduceKind::Combine(Combine::Max), axes: vec![0], keep: false };
    plan.kernels[0].spec.nodes =
        vec![planfile::SpecNode { op: wide, operands: vec![0] }, planfile::SpecNode { op: narrow, operands: vec![2] }];
    plan.kernels[0].spec.results = vec![3];
    let (code, said) = run("run", &file(&plan));
    assert!(code != 0, "{said}");
    assert!(said.contains("bytes"), "{said}");
}
