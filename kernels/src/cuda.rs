//! From a specification to what executes it on a CUDA device: a family of kernels, or a call into a library.
//!
//! [`FAMILIES`] is in order of preference: the first that takes a specification executes it. A family is a file here,
//! with the bodies of its kernels in `kernels/cuda`; libraries are called for large products and convolutions.

use planfile::plan::{Call, Library};
use planfile::text::few;
use planfile::{Cuda, LaunchRule, Op, Spec, Target};

mod attention;
mod block;
mod convolution;
mod curve;
mod epilogue;
mod generated;
mod limit;
mod norm;
mod product;
mod recurrence;
mod reduce;
mod scan;
mod scatter;
mod softmax;
mod top_k;
mod transpose;
mod view;

pub use attention::FEW_QUERIES;
pub use convolution::{channels_first, channels_last};

/// Blocks of a cluster that every device with clusters can run.
const CLUSTER_MAX: u64 = 8;

/// What kernels are chosen and made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaTarget {
    pub architecture: Cuda,
    /// Whether products of `f32` may round their operands to TF32.
    pub allow_tf32: bool,
}

impl CudaTarget {
    /// The GPUs of a machine; none where the host is what executes plans.
    pub fn of(target: &Target, allow_tf32: bool) -> Option<Self> {
        let architecture = target.device.architecture.cuda()?;
        Some(Self { architecture, allow_tf32 })
    }
}

/// What executes a specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selected {
    Launch(Launch),
    Library { library: Library, call: Call, workspace_bytes: u64 },
}

/// A kernel of ours, specialised: shapes, strides and constants are literals in the source.
///
/// Its parameters are those that [`planfile::launch`] names: a pointer for each input of the specification, one for each
/// result, each number that differs by rank as `long long`, and last, where the specification checks indices, a pointer to
/// its fault word. For an index that is out of range a kernel writes 1 to that word, a `u32`, and keeps out of memory
/// beyond its operands and results. It never reads the word, nor writes anything else there. What it may leave unreported
/// is said at [`planfile::plan::Argument::Fault`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Name of the function.
    pub symbol: String,
    /// A whole translation unit of CUDA C++ that includes nothing.
    pub source: String,
    /// Blocks, threads and dynamic shared memory, by formula.
    pub rule: LaunchRule,
}

#[cfg(test)]
impl Launch {
    /// Blocks of a launch for that specification.
    fn blocks(&self, spec: &Spec) -> i64 {
        self.rule.shape(spec).unwrap().grid[0].get(0).unwrap()
    }
}

/// The parameter of kernels that check indices.
const FAULT: &str = "u32* __restrict__ fault";

/// A way to execute some specifications.
struct Family {
    name: &'static str,
    select: fn(&Spec, &CudaTarget) -> Option<Selected>,
}

/// The family that takes almost everything, an element at a time.
const GENERATED: &str = "generated";

/// In order of preference.
const FAMILIES: &[Family] = &[
    Family { name: "attention", select: |spec, target| attention::select(spec, target).map(Selected::Launch) },
    Family { name: "product", select: product::select },
    Family { name: "convolution", select: convolution::select },
    Family { name: "recurrence", select: |spec, target| recurrence::select(spec, target).map(Selected::Launch) },
    Family { name: "softmax", select: |spec, target| softmax::select(spec, target).map(Selected::Launch) },
    Family { name: "norm", select: |spec, target| norm::select(spec, target).map(Selected::Launch) },
    Family { name: "reduce", select: |spec, target| reduce::select(spec, target).map(Selected::Launch) },
    Family { name: "transpose", select: |spec, target| transpose::select(spec, target).map(Selected::Launch) },
    Family { name: "scatter", select: |spec, target| scatter::select(spec, target).map(Selected::Launch) },
    Family { name: "scan", select: |spec, target| scan::select(spec, target).map(Selected::Launch) },
    Family { name: "top_k", select: |spec, target| top_k::select(spec, target).map(Selected::Launch) },
    Family { name: GENERATED, select: |spec, target| generated::select(spec, target).map(Selected::Launch) },
];

/// What executes the specification, with the family's name.
///
/// # Errors
/// The primitives of a specification that no family takes.
pub fn select(spec: &Spec, target: &CudaTarget) -> Result<(&'static str, Selected), String> {
    let found = FAMILIES.iter().find_map(|family| Some((family.name, (family.select)(spec, target)?)));
    found.ok_or_else(|| {
        let (names, types) = (few(spec.nodes.iter().map(|node| node.op.name())), few(&spec.inputs));
        let takes = |spec: &Spec| FAMILIES.iter().any(|family| (family.select)(spec, target).is_some());
        let size = limit::too_large(spec, &takes).map_or_else(String::new, |why| format!(": {why}"));
        format!("no kernel computes {names} of {types}{size}")
    })
}

/// Whether one kernel takes the whole specification and is the better for it: a family made for it, or a generated
/// kernel that computes nothing twice.
pub fn takes_along(spec: &Spec, target: &CudaTarget) -> bool {
    let made_for_it = |family: &Family| family.name != GENERATED && (family.select)(spec, target).is_some();
    FAMILIES.iter().any(made_for_it) || generated::accepts_fusion(spec) || pools_transposed(spec, target)
}

/// Whether this is a pool between transpositions: each element of it is computed once, wherever it is stored.
fn pools_transposed(spec: &Spec, target: &CudaTarget) -> bool {
    let count = |is: fn(&Op) -> bool| spec.nodes.iter().filter(|node| is(&node.op)).count();
    let pools = count(|op| matches!(op, Op::Pool { indices: None, .. }));
    let transposes = count(|op| matches!(op, Op::Transpose { .. }));
    pools == 1 && pools + transposes == spec.nodes.len() && generated::select(spec, target).is_some()
}
