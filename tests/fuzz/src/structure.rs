//! Mutations of what a plan says: its fields, lists and numbers change, and the file around them stays a plan.
//!
//! What decoders refuse is never made; what `verify` has to find is made often: steps in another order, places that
//! overlap, launches, scalars, rules and groups of other sizes. Half of the time labels of machine code follow what is
//! said of their kernels, as those of someone who makes the code as well.

use planfile::launch::{self, Factor, LABEL_BYTES};
use planfile::op::Combine;
use planfile::plan::*;
use planfile::{DType, Dim, ExprOp, Op, RankScalar, Spec, TensorType, codec};

use crate::forge::SECTIONS;
use crate::mutation::Random;

/// Alignment of places: numbers that are none are refused at once.
const ALIGN: u64 = 256;

/// The plan in these sections; `None` where any of them does not decode.
pub fn decode(parts: &[Vec<u8>; SECTIONS]) -> Option<Plan> {
    let [manifest, programs, kernels, code, explanations, _] = parts;
    Some(Plan {
        manifest: codec::decode(manifest).ok()?,
        programs: codec::decode(programs).ok()?,
        kernels: codec::decode(kernels).ok()?,
        code: codec::decode(code).ok()?,
        explanations: codec::decode(explanations).ok()?,
    })
}

/// Writes the plan into the sections; that of the weights stays.
pub fn encode(plan: &Plan, parts: &mut [Vec<u8>; SECTIONS]) -> Option<()> {
    let [manifest, programs, kernels, code, explanations, _] = parts;
    *manifest = codec::encode(&plan.manifest).ok()?;
    *programs = codec::encode(&plan.programs).ok()?;
    *kernels = codec::encode(&plan.kernels).ok()?;
    *code = codec::encode(&plan.code).ok()?;
    *explanations = codec::encode(&plan.explanations).ok()?;
    Some(())
}

/// Changes one thing, and sometimes what else is said about it.
pub fn mutate(plan: &mut Plan, random: &mut Random) {
    let before: Vec<Option<[u8; LABEL_BYTES]>> = plan.kernels.iter().map(label).collect();
    let kernels = plan.kernels.len();
    match random.below(16) {
        0..=8 => {
            let ranks = plan.manifest.ranks;
            if let Some(program) = chosen(&mut plan.programs, random) {
                mutate_program(program, kernels, ranks, random);
            }
        }
        9..=11 => {
            if let Some(kernel) = chosen(&mut plan.kernels, random) {
                mutate_kernel(kernel, plan.code.len(), random);
            }
        }
        12 => list(&mut plan.kernels, random, |_, _| {}),
        13 => list(&mut plan.code, random, |code, random| list(&mut code.cubin, random, |byte, random| byte_of(byte, random))),
        _ => mutate_manifest(&mut plan.manifest, random),
    }
    if random.below(2) == 0 {
        relabel(plan, &before);
    }
    if random.below(4) > 0 {
        agree(plan);
    }
}

fn byte_of(byte: &mut u8, random: &mut Random) {
    *byte = random.next() as u8;
}

fn chosen<'a, T>(items: &'a mut [T], random: &mut Random) -> Option<&'a mut T> {
    let position = random.below(items.len());
    items.get_mut(position)
}

/// Removes, repeats or swaps items of a list, or changes one.
fn list<T: Clone>(items: &mut Vec<T>, random: &mut Random, change: impl FnOnce(&mut T, &mut Random)) {
    let (first, second) = (random.below(items.len()), random.below(items.len()));
    match random.below(6) {
        _ if items.is_empty() => {}
        0 => {
            items.remove(first);
        }
        1 => items.insert(second, items[first].clone()),
        2 => items.swap(first, second),
        _ => change(&mut items[first], random),
    }
}

/// A number near the old one, at an edge, or of the size of a place.
fn number(value: u64, random: &mut Random) -> u64 {
    match random.below(6) {
        0 => value.wrapping_add(1),
        1 => value.wrapping_sub(1),
        2 => random.edge(),
        3 => value.wrapping_add(ALIGN),
        4 => value.wrapping_sub(ALIGN),
        _ => random.below(16) as u64 * ALIGN,
    }
}

fn index(value: &mut u32, random: &mut Random) {
    *value = if random.below(4) == 0 { random.edge() as u32 } else { random.below(8) as u32 };
}

fn scalar(value: &mut RankScalar, random: &mut Random) {
    match value {
        RankScalar::ByRank(table) if random.below(4) > 0 => list(table, random, |value, random| {
            *value = number(*value as u64, random) as i64;
        }),
        _ if random.below(2) == 0 => *value = RankScalar::Uniform(number(0, random) as i64),
        _ => *value = RankScalar::ByRank((0..random.below(4)).map(|_| random.below(4) as i64).collect()),
    }
}

fn ty(ty: &mut TensorType, random: &mut Random) {
    const DTYPES: [DType; 6] = [DType::F32, DType::F16, DType::I64, DType::I32, DType::Bool, DType::F64];
    if random.below(4) == 0 {
        ty.dtype = DTYPES[random.below(DTYPES.len())];
        return;
    }
    list(&mut ty.dims, random, |dim, random| {
        *dim = Dim::Static(if random.below(4) == 0 { random.edge() } else { random.below(9) as u64 });
    });
}

fn argument(at: &mut Argument, random: &mut Random) {
    let offset = random.below(16) as u64 * ALIGN;
    let kind = random.below(12);
    *at = match (kind, at.clone()) {
        (0, _) => Argument::Weights { offset },
        (1, _) => Argument::Peer { rank: RankScalar::ByRank(vec![0, 1]), offset },
        (2, _) => Argument::State { state: random.below(2) as u32, offset },
        (3, _) => Argument::Scalar { value: (random.edge() as i64).into() },
        (4, _) => Argument::Fault { word: random.below(3) as u32 },
        (5, _) => Argument::Epoch,
        (_, Argument::Arena { offset }) => Argument::Arena { offset: number(offset, random) },
        (_, Argument::Weights { offset }) => Argument::Weights { offset: number(offset, random) },
        (_, Argument::Peer { mut rank, offset }) => {
            scalar(&mut rank, random);
            Argument::Peer { rank, offset }
        }
        (_, Argument::Scalar { mut value }) => {
            scalar(&mut value, random);
            Argument::Scalar { value }
        }
        (_, other) => other,
    };
}

fn place(place: &mut Place, random: &mut Random) {
    if random.below(4) == 0 { ty(&mut place.ty, random) } else { argument(&mut place.at, random) }
}

fn mutate_program(program: &mut Program, kernels: usize, ranks: u32, random: &mut Random) {
    match random.below(16) {
        0 => program.arena_bytes = number(program.arena_bytes, random),
        1 => program.peer_arena_bytes = number(program.peer_arena_bytes, random),
        2 => index(&mut program.streams, random),
        3 => list(&mut program.ranks, random, |rank, random| *rank = random.below(ranks as usize + 1) as u32),
        4 => list(&mut program.inputs, random, binding),
        5 => list(&mut program.outputs, random, binding),
        _ => list(&mut program.steps, random, |step, random| mutate_step(step, kernels, random)),
    }
}

fn binding(binding: &mut Binding, random: &mut Random) {
    match random.below(4) {
        0 => index(&mut binding.port, random),
        1 => list(&mut binding.splits, random, split),
        _ => place(&mut binding.place, random),
    }
}

fn split(split: &mut SplitDim, random: &mut Random) {
    if random.below(4) == 0 {
        split.dim = random.below(4) as u8;
        return;
    }
    list(&mut split.pieces, random, |pieces, random| {
        list(pieces, random, |piece, random| {
            let field = [&mut piece.global, &mut piece.local, &mut piece.len];
            *field[random.below(3)] = random.below(9) as u64;
        });
    });
}

fn mutate_step(step: &mut Step, kernels: usize, random: &mut Random) {
    match random.below(12) {
        0 => step.stream = random.below(4) as u32,
        1 => list(&mut step.waits, random, |edge, random| {
            index(&mut edge.from, random);
            if random.below(4) == 0 {
                edge.kind = EdgeKind::Programmatic;
            }
        }),
        2 => step.waits.push(Edge { from: random.below(8) as u32, kind: EdgeKind::Full }),
        3 => {
            let cost = &mut step.cost;
            let field = [&mut cost.predicted_ns, &mut cost.operations, &mut cost.memory_bytes, &mut cost.link_bytes];
            *field[random.below(4)] = random.edge();
        }
        _ => action(&mut step.action, kernels, random),
    }
}

fn action(action: &mut Action, kernels: usize, random: &mut Random) {
    match action {
        Action::Launch { kernel, operands, results, scalars, launch } => match random.below(8) {
            0 => *kernel = random.below(kernels + 1) as u32,
            1 => list(scalars, random, argument),
            2 => scalars.push(Argument::Fault { word: random.below(3) as u32 }),
            3 => match launch {
                Some(launch) => shape(launch, random),
                None => *launch = Some(LaunchShape { grid: [1, 1, 1].map(Into::into), block: [1; 3], shared_bytes: 0 }),
            },
            4 => *launch = None,
            5 | 6 => list(operands, random, place),
            _ => list(results, random, place),
        },
        Action::Library { kernel, operands, results, workspace, algorithm } => match random.below(6) {
            0 => *kernel = random.below(kernels + 1) as u32,
            1 => *algorithm = vec![7; [0, 3, 63, 64, 65][random.below(5)]],
            2 => match workspace {
                Some(workspace) => place(workspace, random),
                None => *workspace = results.first().cloned(),
            },
            3 => list(results, random, place),
            _ => list(operands, random, place),
        },
        Action::Collective { op, operands, results, algorithm } => match random.below(6) {
            0 => {
                let all = [CollectiveAlgorithm::Host, CollectiveAlgorithm::Nccl, CollectiveAlgorithm::OneShot];
                *algorithm = all[random.below(3)];
            }
            1 => list(results, random, place),
            2 => list(operands, random, place),
            _ => collective(op, random),
        },
        Action::Copy { from, to } => place(if random.below(2) == 0 { from } else { to }, random),
        Action::Persistent { tasks, counters, .. } => match random.below(3) {
            0 => list(counters, random, |counter, random| index(&mut counter.threshold, random)),
            _ => list(tasks, random, |task, random| match random.below(5) {
                0 => index(&mut task.block, random),
                1 => list(&mut task.waits, random, index),
                2 => list(&mut task.signals, random, index),
                3 => list(&mut task.results, random, place),
                _ => list(&mut task.operands, random, place),
            }),
        },
    }
}

fn collective(op: &mut Op, random: &mut Random) {
    match op {
        Op::AllReduce { groups, combine } | Op::ReduceScatter { groups, combine, .. } if random.below(3) > 0 => {
            *combine = [Combine::Sum, Combine::Prod, Combine::Max, Combine::Min][random.below(4)];
            list(groups, random, |group, random| list(group, random, index));
        }
        Op::AllReduce { groups, .. } => list(groups, random, |group, random| list(group, random, index)),
        Op::AllGather { groups, axis } | Op::ReduceScatter { groups, axis, .. } => {
            *axis = random.below(4) as u8;
            list(groups, random, |group, random| list(group, random, index));
        }
        Op::AllToAll { groups, split, concat } => {
            (*split, *concat) = (random.below(4) as u8, random.below(4) as u8);
            list(groups, random, |group, random| list(group, random, index));
        }
        Op::Send { channel, peers } => {
            *channel = random.below(4) as u32;
            list(peers, random, index);
        }
        Op::Recv { channel, peers, ty: received } => match random.below(3) {
            0 => *channel = random.below(4) as u32,
            1 => list(peers, random, index),
            _ => ty(received, random),
        },
        _ => {}
    }
}

fn shape(launch: &mut LaunchShape, random: &mut Random) {
    match random.below(4) {
        0 => launch.shared_bytes = random.edge() as u32,
        1 => launch.block[random.below(3)] = random.edge() as u32,
        _ => scalar(&mut launch.grid[random.below(3)], random),
    }
}

fn mutate_kernel(kernel: &mut Kernel, code: usize, random: &mut Random) {
    if random.below(2) == 0 {
        return mutate_spec(&mut kernel.spec, random);
    }
    match &mut kernel.implementation {
        Implementation::Cuda { code: own, symbol, rule } => match random.below(6) {
            0 => *own = random.below(code + 1) as u32,
            1 => symbol.push('x'),
            2 => rule.shared_bytes = random.edge() as u32,
            3 => rule.block[random.below(3)] = random.edge() as u32,
            _ => list(&mut rule.grid[random.below(3)], random, |factor, random| match factor {
                Factor::Tiles { sizes, tile } if random.below(3) > 0 => {
                    *tile = number(*tile, random);
                    list(sizes, random, |size, random| {
                        index(&mut size.value, random);
                        size.axis = random.below(4) as u8;
                    });
                }
                _ => *factor = Factor::Count(random.edge()),
            }),
        },
        Implementation::Library { call, library, .. } => match (random.below(4), call) {
            (0, _) => *library = Library::Cudnn,
            (_, Call::Matmul(call)) => {
                let fields = [
                    &mut call.m,
                    &mut call.n,
                    &mut call.k,
                    &mut call.batch,
                    &mut call.a.offset,
                    &mut call.a.row_stride,
                    &mut call.b.column_stride,
                    &mut call.result.batch_stride,
                ];
                let chosen = random.below(fields.len());
                if let Some(field) = fields.into_iter().nth(chosen) {
                    *field = number(*field, random);
                }
            }
            (_, Call::Convolution(call)) => {
                let lists = [&mut call.input_sizes, &mut call.output_sizes, &mut call.window, &mut call.pads];
                let chosen = random.below(lists.len());
                if let Some(sizes) = lists.into_iter().nth(chosen) {
                    list(sizes, random, |size, random| *size = number(*size, random));
                }
            }
        },
        Implementation::Reference => {
            if code > 0 {
                let rule = planfile::LaunchRule { grid: Default::default(), block: [32, 1, 1], shared_bytes: 0 };
                kernel.implementation = Implementation::Cuda { code: 0, symbol: "k".to_owned(), rule };
            }
        }
    }
}

fn mutate_spec(spec: &mut Spec, random: &mut Random) {
    match random.below(6) {
        0 => list(&mut spec.inputs, random, ty),
        1 => list(&mut spec.results, random, index),
        _ => list(&mut spec.nodes, random, |node, random| match (&mut node.op, random.below(3)) {
            (_, 0) => list(&mut node.operands, random, index),
            (Op::Pointwise { expr, .. }, _) => list(&mut expr.ops, random, |op, random| match op {
                ExprOp::Operand(operand) => *operand = random.below(4) as u16,
                ExprOp::Index { axis, base } => {
                    *axis = random.below(4) as u8;
                    scalar(base, random);
                }
                ExprOp::Set(slot) | ExprOp::Get(slot) => *slot = random.next() as u8,
                _ => *op = ExprOp::Operand(0),
            }),
            (Op::Slice { starts, steps, sizes }, _) => match random.below(3) {
                0 => list(starts, random, scalar),
                1 => list(steps, random, |step, random| *step = number(*step as u64, random) as i64),
                _ => list(sizes, random, |size, random| *size = number(*size, random)),
            },
            (Op::Transpose { permutation }, _) => list(permutation, random, |axis, random| *axis = random.below(4) as u8),
            (Op::Reshape { dims } | Op::Broadcast { dims }, _) => list(dims, random, |dim, random| {
                *dim = Dim::Static(random.below(9) as u64);
            }),
            (Op::Reduce { axes, .. }, _) => list(axes, random, |axis, random| *axis = random.below(4) as u8),
            (Op::Pad { low, high, .. }, _) => {
                let side = if random.below(2) == 0 { low } else { high };
                list(side, random, |amount, random| *amount = number(*amount as u64, random) as i64);
            }
            (
                Op::Gather { axis }
                | Op::GatherElements { axis }
                | Op::GatherNd { batch: axis }
                | Op::ScatterElements { axis, .. }
                | Op::Concat { axis }
                | Op::Softmax { axis, .. }
                | Op::Norm { axis, .. }
                | Op::Scan { axis, .. }
                | Op::TopK { axis, .. },
                _,
            ) => *axis = random.below(5) as u8,
            (Op::Conv { window, .. } | Op::Pool { window, .. }, _) => match random.below(4) {
                0 => list(&mut window.sizes, random, |size, random| *size = number(*size, random)),
                1 => list(&mut window.strides, random, |size, random| *size = number(*size, random)),
                2 => list(&mut window.dilations, random, |size, random| *size = number(*size, random)),
                _ => list(&mut window.pads, random, |pad, random| pad.0 = number(pad.0 as u64, random) as i64),
            },
            _ => {}
        }),
    }
}

fn mutate_manifest(manifest: &mut Manifest, random: &mut Random) {
    match random.below(12) {
        0 => list(&mut manifest.links, random, |link, random| link.ranks.1 = random.below(5) as u32),
        1 => {
            let names = ["", "cpu", "sm_80", "sm_90a", "sm_1"];
            names[random.below(names.len())].clone_into(&mut manifest.target.architecture);
        }
        2 => index(&mut manifest.ranks, random),
        3 => list(&mut manifest.mesh, random, |axis, random| index(&mut axis.size, random)),
        4 => list(&mut manifest.weight_arena_bytes, random, |bytes, random| *bytes = number(*bytes, random)),
        5 => manifest.image_bytes = number(manifest.image_bytes, random),
        6 => list(&mut manifest.weights, random, |weight, random| ty(&mut weight.ty, random)),
        7 | 8 => list(&mut manifest.placed, random, |placed, random| match random.below(6) {
            0 => index(&mut placed.weight, random),
            1 => index(&mut placed.stage, random),
            2 => list(&mut placed.splits, random, split),
            3 => list(&mut placed.images, random, |image, random| *image = number(*image, random)),
            4 => ty(&mut placed.ty, random),
            _ => placed.arena_offset = number(placed.arena_offset, random),
        }),
        9 => list(&mut manifest.states, random, |state, random| state.arena_offset = number(state.arena_offset, random)),
        _ => list(&mut manifest.entries, random, |entry, random| match random.below(6) {
            0 => list(&mut entry.inputs, random, |port, random| ty(&mut port.ty, random)),
            1 => list(&mut entry.outputs, random, |port, random| ty(&mut port.ty, random)),
            2 => list(&mut entry.programs, random, index),
            3 => entry.predicted_ns = random.edge(),
            _ => list(&mut entry.frozen, random, |frozen, random| ty(&mut frozen.value.ty, random)),
        }),
    }
}

fn label(kernel: &Kernel) -> Option<[u8; LABEL_BYTES]> {
    match &kernel.implementation {
        Implementation::Cuda { symbol, rule, .. } => launch::label(&kernel.spec, symbol, rule).ok(),
        Implementation::Reference | Implementation::Library { .. } => None,
    }
}

/// Puts labels into code where those of before are, and launches of kernels into their steps.
fn relabel(plan: &mut Plan, before: &[Option<[u8; LABEL_BYTES]>]) {
    for (kernel, old) in plan.kernels.iter().zip(before) {
        let (Some(old), Some(new)) = (old, label(kernel)) else { continue };
        for code in plan.code.iter_mut().filter(|_| *old != new) {
            let found = code.cubin.windows(LABEL_BYTES).position(|window| window == old);
            if let Some(at) = found {
                code.cubin[at..at + LABEL_BYTES].copy_from_slice(&new);
            }
        }
    }
}

/// What is said twice agrees: launches with their rules, times with their sums.
fn agree(plan: &mut Plan) {
    let kernels = &plan.kernels;
    for step in plan.programs.iter_mut().flat_map(|program| &mut program.steps) {
        if let Action::Launch { kernel, launch: Some(launch), .. } = &mut step.action
            && let Some(Kernel { spec, implementation: Implementation::Cuda { rule, .. }, .. }) =
                kernels.get(*kernel as usize)
            && let Ok(shape) = rule.shape(spec)
        {
            *launch = shape;
        }
    }
    for entry in &mut plan.manifest.entries {
        let own = entry.programs.iter().filter_map(|&program| plan.programs.get(program as usize));
        entry.predicted_ns = predicted_ns(own);
    }
}
