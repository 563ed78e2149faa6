//! A plan with mutated content under valid hashes: decoded and verified. What `verify` accepts is run on virtual devices,
//! where it may compute anything, but not panic, take unbounded memory or hang. Most mutations are of the plan's structure
//! (see `fuzz::structure`), the others of its bytes; seeds are plans for hosts and for GPUs.
#![no_main]

use fuzz::{forge, mutation, structure, workplace};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use planfile::PlanFile;
use planfile::plan::Plan;
use runtime::{Devices, RuntimeError, Session, random_inputs};

/// Most memory of a plan that is run, in bytes: what is larger takes its time rightly.
const RUN_BYTES: u64 = 1 << 15;
/// Most devices and steps of a plan that is run.
const RUN_RANKS: u32 = 4;
const RUN_STEPS: usize = 256;

fuzz_target!(|data: &[u8]| {
    let Some(mut parts) = forge::sections(data) else { return };
    let image_bytes = planfile::codec::decode::<planfile::plan::Manifest>(&parts[0]);
    let image_bytes = image_bytes.map_or(0, |manifest| manifest.image_bytes);
    if image_bytes > RUN_BYTES {
        return;
    }
    parts[forge::WEIGHTS] = (0..image_bytes).map(|at| (at % 3) as u8).collect();
    let path = workplace::file("model.plan", &forge::assemble(&parts));
    let Ok(file) = PlanFile::open(&path) else { return };
    if !is_small(file.plan()) {
        return;
    }
    let Ok(session) = Session::load_file(file, Devices::Virtual, |_| {}) else { return };
    let Ok(mut context) = session.context() else { return };
    for entry in session.entries() {
        let Ok(inputs) = random_inputs(entry, 7) else { continue };
        if let Err(error @ RuntimeError::Panicked { .. }) = context.run(&entry.name, &inputs) {
            panic!("entry `{}`: {error}", entry.name);
        }
    }
});

fn is_small(plan: &Plan) -> bool {
    let manifest = &plan.manifest;
    let ports = manifest.entries.iter().flat_map(|entry| entry.inputs.iter().chain(&entry.outputs));
    let mut sizes = plan.programs.iter().map(|program| program.arena_bytes).chain(manifest.weight_arena_bytes.clone());
    let fits = |ty: &planfile::TensorType| ty.bytes().is_some_and(|bytes| bytes <= RUN_BYTES);
    manifest.ranks <= RUN_RANKS
        && plan.programs.iter().map(|program| program.steps.len()).sum::<usize>() <= RUN_STEPS
        && sizes.all(|bytes| bytes <= RUN_BYTES)
        && ports.into_iter().all(|port| fits(&port.ty))
        && plan.kernels.iter().all(|kernel| kernel.spec.types().is_ok_and(|types| types.iter().all(fits)))
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut random = mutation::Random(u64::from(seed));
    let Some(mut parts) = forge::sections(&data[..size]) else {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    };
    let plan = structure::decode(&parts).filter(|_| random.below(8) > 0);
    let mutated = plan.and_then(|mut plan| {
        for _ in 0..=random.below(3) {
            structure::mutate(&mut plan, &mut random);
        }
        structure::encode(&plan, &mut parts)
    });
    if mutated.is_none() {
        // Numbers anywhere in the bytes. Explanations and weights decide nothing.
        let chosen = random.below(4);
        mutation::mutate_section(&mut parts[chosen], &mut random);
    }
    mutation::hand_back(&mut data[..max_size], size, &forge::assemble(&parts))
});
