//! Chooses what executes each step: an algorithm for an exchange, on the host the specification itself, on GPUs a kernel
//! or a call into a library, with its price.

use std::collections::HashMap;
use std::sync::Arc;

use ir::Graph;
use kernels::cuda::{self, CudaTarget};
use planfile::Spec;
use planfile::plan::CollectiveAlgorithm;

use crate::cost;
use crate::error::{NoKernel, PassError};
use crate::phase::{Execution, Fused, Region, Selected, Step};
use crate::settings::Settings;

/// Chooses for every graph.
///
/// # Errors
/// [`PassError::NoKernels`] with all regions that nothing executes; [`PassError::Invalid`] where types do not fit.
pub fn run(fused: Fused, settings: &Settings<'_>) -> Result<Selected, PassError> {
    let Fused { module, regions } = fused;
    let mut choice = Choice { cuda: settings.cuda(), known: HashMap::new(), missing: Vec::new() };
    let mut steps = Vec::with_capacity(regions.len());
    for (graph, regions) in module.graphs.iter().zip(regions) {
        let mut of_graph = Vec::with_capacity(regions.len());
        for region in regions {
            let Some((region, execution)) = region.and_then(|region| choice.of(graph, region)) else {
                of_graph.push(None);
                continue;
            };
            let cost = cost::step(&region.spec, &execution, settings.target);
            let cost = cost.map_err(|why| PassError::invalid("select", why))?.capped();
            of_graph.push(Some(Step { region, execution, cost }));
        }
        steps.push(of_graph);
    }
    match choice.missing.is_empty() {
        true => Ok(Selected { module, steps }),
        false => Err(PassError::NoKernels(choice.missing)),
    }
}

/// What was chosen so far.
struct Choice {
    cuda: Option<CudaTarget>,
    /// For GPUs, by what is computed.
    known: HashMap<Spec, Result<Arc<Execution>, String>>,
    missing: Vec<NoKernel>,
}

impl Choice {
    /// What executes the region. Where there is nothing it is noted.
    fn of(&mut self, graph: &Graph, region: Region) -> Option<(Region, Arc<Execution>)> {
        let spec = &region.spec;
        let is_exchange = spec.nodes.iter().any(|node| node.op.is_collective());
        let execution = match &self.cuda {
            None if is_exchange => Ok(Arc::new(Execution::Collective(CollectiveAlgorithm::Host))),
            None => Ok(Arc::new(Execution::Reference)),
            Some(_) if is_exchange => Ok(Arc::new(Execution::Collective(CollectiveAlgorithm::Nccl))),
            Some(cuda) => self.known.get(spec).cloned().unwrap_or_else(|| {
                let selected = cuda::select(spec, cuda).map(|(_, selected)| Arc::new(selected.into()));
                self.known.insert(spec.clone(), selected.clone());
                selected
            }),
        };
        match (execution, region.nodes.last()) {
            (Ok(execution), _) => Some((region, execution)),
            (Err(why), last) => {
                let node = last.map(|&last| graph.node(last));
                let origin = node.iter().flat_map(|node| node.origin.iter().map(ToString::to_string)).collect();
                let op = node.map_or("", |node| node.op.name()).to_owned();
                self.missing.push(NoKernel { origin, op, why });
                None
            }
        }
    }
}

impl From<cuda::Selected> for Execution {
    fn from(selected: cuda::Selected) -> Self {
        match selected {
            cuda::Selected::Launch(launch) => Self::Kernel(launch),
            cuda::Selected::Library { library, call, workspace_bytes } => Self::Call { library, call, workspace_bytes },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse;
    use crate::harness::{CPU, H200, Machine, parse};
    use crate::phase::Sharded;

    fn selected(text: &str, target: &str) -> Result<Vec<Step>, PassError> {
        let machine = Machine::new(target);
        let fused = fuse::run(Sharded(parse(text)), &machine.settings()).unwrap();
        let steps = run(fused, &machine.settings())?.steps;
        Ok(steps.into_iter().flatten().flatten().collect())
    }

    #[test]
    fn all_nodes_without_a_kernel_are_named_with_the_size_at_fault() {
        let text = "%x: f32[4294967296]
             %a: f32[2], %i: i64[2] = top_k %x {k 2, axis 0}
             %b: f32[3], %j: i64[3] = top_k %x {k 3, axis 0}
             return %a, %b";
        let error = selected(text, H200).unwrap_err();
        let PassError::NoKernels(missing) = &error else { panic!("{error}") };
        assert_eq!(missing.iter().map(|node| node.op.as_str()).collect::<Vec<_>>(), ["top_k", "top_k"]);
        assert!(error.to_string().contains("its 4294967296 elements to choose from are more than the "), "{error}");
    }

    #[test]
    fn what_computes_the_same_shares_what_executes_it() {
        let text = "%x: f32[64, 64]
             %y: f32[64] = reduce %x {sum [1]}
             %z: f32[64, 64]
             %w: f32[64] = reduce %z {sum [1]}
             %a: f32[128] = all_gather %y {axis 0, groups [[0, 1]]}
             return %a, %w";
        let steps = selected(text, H200).unwrap();
        let [first, second, gather] = steps.as_slice() else { panic!("{steps:?}") };
        assert!(Arc::ptr_eq(&first.execution, &second.execution) && matches!(*first.execution, Execution::Kernel(_)));
        assert_eq!(*gather.execution, Execution::Collective(CollectiveAlgorithm::Nccl));
        let on_host: Vec<Execution> =
            selected(text, CPU).unwrap().iter().map(|step| (*step.execution).clone()).collect();
        let expected = [Execution::Reference, Execution::Reference, Execution::Collective(CollectiveAlgorithm::Host)];
        assert_eq!(on_host, expected);
        assert!(steps.iter().all(|step| step.cost.predicted_ns > 0));
    }
}
