//! The samples of all kernels as one plan.

use kernels::cuda::{CudaTarget, Launch, Selected, select};
use planfile::fingerprint::Fingerprint;
use planfile::plan::{
    Action, Argument, Binding, Code, Explanations, Implementation, Kernel, Manifest, Place, Plan, PlanEntry, PlanPort,
    Program, Step, StepCost, TargetRef,
};
use planfile::{DType, Spec, TensorType, launch};

/// Places in an arena, one after the other.
#[derive(Default)]
struct Arena {
    bytes: u64,
}

impl Arena {
    fn place(&mut self, ty: &TensorType) -> Place {
        let offset = self.bytes;
        self.bytes += ty.bytes().unwrap().max(1).next_multiple_of(256);
        Place { ty: ty.clone(), at: Argument::Arena { offset } }
    }
}

/// A plan of one entry for each sample; entries are named by number. `compile` makes machine code of named sources, in
/// their order.
pub(crate) fn plan(
    samples: &[(String, Spec)],
    architecture: &str,
    allow_tf32: bool,
    compile: impl FnOnce(&[(&str, &str)]) -> Vec<Vec<u8>>,
) -> Plan {
    let target = CudaTarget { architecture: architecture.parse().unwrap(), allow_tf32 };
    let selected: Vec<Selected> = samples.iter().map(|(_, spec)| select(spec, &target).unwrap().1).collect();
    let launches = samples.iter().zip(&selected).filter_map(|((_, spec), selected)| match selected {
        Selected::Launch(launch) => Some((spec, launch)),
        Selected::Library { .. } => None,
    });
    let labelled = |(spec, launch): (&Spec, &Launch)| {
        let label = launch::label(spec, &launch.symbol, &launch.rule).unwrap();
        (launch.symbol.clone(), format!("{}\n{}", launch.source, launch::declaration(&[label])))
    };
    let labelled: Vec<(String, String)> = launches.map(labelled).collect();
    let sources: Vec<(&str, &str)> =
        labelled.iter().map(|(symbol, source)| (symbol.as_str(), source.as_str())).collect();
    let code = |cubin| Code { architecture: architecture.to_owned(), cubin };
    let code = compile(&sources).into_iter().map(code).collect();
    let (mut kernels, mut programs, mut entries, mut next_code) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (index, ((name, spec), selected)) in samples.iter().zip(&selected).enumerate() {
        let mut arena = Arena::default();
        let operands: Vec<Place> = spec.inputs.iter().map(|ty| arena.place(ty)).collect();
        let types = spec.result_types().unwrap();
        let results: Vec<Place> = types.iter().map(|ty| arena.place(ty)).collect();
        let kernel = index as u32;
        let bind = |places: &[Place]| {
            let binding = |(port, place): (u32, &Place)| Binding { port, place: place.clone(), splits: vec![] };
            (0u32..).zip(places).map(binding).collect()
        };
        let (inputs, outputs) = (bind(&operands), bind(&results));
        let (implementation, action) = match selected {
            Selected::Launch(launch) => {
                let (symbol, rule) = (launch.symbol.clone(), launch.rule.clone());
                let shape = rule.shape(spec).unwrap();
                let implementation = Implementation::Cuda { code: next_code, symbol, rule };
                next_code += 1;
                let scalars = spec.rank_scalars().into_iter().map(|value| Argument::Scalar { value });
                let scalars = scalars.chain(spec.checks_indices().then_some(Argument::Fault { word: 0 })).collect();
                (implementation, Action::Launch { kernel, operands, results, scalars, launch: Some(shape) })
            }
            Selected::Library { library, call, workspace_bytes } => {
                let (library, call, version) = (*library, call.clone(), String::new());
                let workspace =
                    (*workspace_bytes > 0).then(|| arena.place(&TensorType::new(DType::U8, &[*workspace_bytes])));
                let action = Action::Library { kernel, operands, results, workspace, algorithm: vec![] };
                (Implementation::Library { library, version, call }, action)
            }
        };
        kernels.push(Kernel { name: name.clone(), spec: spec.clone(), implementation });
        let step = Step { action, stream: 0, waits: vec![], origin: vec![], cost: StepCost::default() };
        programs.push(Program {
            entry: index as u32,
            stage: 0,
            ranks: vec![0],
            inputs,
            outputs,
            steps: vec![step],
            arena_bytes: arena.bytes,
            peer_arena_bytes: 0,
            streams: 1,
        });
        let port = |kind: &str, (position, ty): (usize, &TensorType)| PlanPort {
            name: format!("{kind}{position}"),
            ty: ty.clone(),
        };
        entries.push(PlanEntry {
            name: index.to_string(),
            inputs: spec.inputs.iter().enumerate().map(|input| port("x", input)).collect(),
            outputs: types.iter().enumerate().map(|output| port("y", output)).collect(),
            frozen: vec![],
            programs: vec![index as u32],
            predicted_ns: 0,
        });
    }
    let manifest = Manifest {
        producer: "tests".to_owned(),
        model: "kernels".to_owned(),
        files: vec![],
        fingerprint: Fingerprint::default(),
        mesh: vec![],
        ranks: 1,
        target: TargetRef { name: "test".to_owned(), architecture: architecture.to_owned() },
        entries,
        weights: vec![],
        placed: vec![],
        weight_arena_bytes: vec![0],
        image_bytes: 0,
        states: vec![],
        links: vec![],
    };
    Plan { manifest, programs, kernels, code, explanations: Explanations::default() }
}
