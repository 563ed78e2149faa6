//! Machine code against what its kernels are said to be: it is for the plan's architecture, has each kernel with the
//! parameters and threads that its launches give it, needs no more than a device has, and holds the labels of its
//! kernels. What the instructions do is not looked at.

use std::collections::{BTreeMap, BTreeSet};

use super::Report;
use crate::architecture::{Architecture, Cuda};
use crate::cubin::{Cubin, Function};
use crate::launch::{self, LABEL_BYTES, LaunchRule};
use crate::plan::{LaunchShape, Plan};
use crate::spec::Spec;

/// Registers of a multiprocessor, all of which a block may have; each warp gets them by the thousand or so.
const REGISTERS: u64 = 65_536;
const REGISTERS_UNIT: u64 = 8;
const WARP: u64 = 32;
/// Shared memory that the system keeps of each block, and compilers count as the kernel's from `sm_90` on.
const RESERVED_BYTES: u64 = 1024;
/// Bytes of every parameter: an address or an integer.
const PARAMETER_BYTES: u64 = 8;

/// The machine code of a plan, read.
pub(super) struct Files<'a> {
    cuda: Option<Cuda>,
    files: Vec<Option<File<'a>>>,
    /// What was read of kernels, by code and symbol: many specifications may share one.
    functions: BTreeMap<(usize, &'a str), Result<Function, String>>,
}

struct File<'a> {
    cubin: Cubin<'a>,
    labels: BTreeSet<&'a [u8; LABEL_BYTES]>,
}

impl<'a> Files<'a> {
    /// Reads all code of a plan whose architecture is known.
    pub(super) fn read(plan: &'a Plan, report: &mut Report) -> Self {
        let target = &plan.manifest.target.architecture;
        let cuda = target.parse::<Architecture>().ok().and_then(Architecture::cuda);
        let mut files = Vec::with_capacity(plan.code.len());
        for (index, code) in plan.code.iter().enumerate() {
            let at = format_args!("code {index}");
            report.require(code.architecture == *target, at, || {
                format!("is for {}, the plan is for {target}", code.architecture)
            });
            let file = cuda.ok_or_else(|| format!("is in a plan for {target}")).and_then(|cuda| {
                let cubin = Cubin::parse(&code.cubin)?;
                if cubin.architecture != cuda.number {
                    return Err(format!("holds code for sm_{}, the plan is for {target}", cubin.architecture));
                }
                let labels = cubin.labels()?.into_iter().collect();
                Ok(File { cubin, labels })
            });
            files.push(file.map_err(|what| report.add(at, what)).ok());
        }
        Self { cuda, files, functions: BTreeMap::new() }
    }

    /// Whether a function computes the specification as far as its file tells; how it is launched.
    pub(super) fn check(
        &mut self,
        (code, symbol): (u32, &'a str),
        rule: &LaunchRule,
        spec: &Spec,
    ) -> Result<LaunchShape, String> {
        let (index, count) = (code as usize, self.files.len());
        // Code that could not be read is a finding of its own.
        let file = self.files.get(index).ok_or_else(|| format!("code {code} of {count}"))?.as_ref();
        let (Some(file), Some(cuda)) = (file, self.cuda) else { return Err(format!("code {code} is not sound")) };
        let function = self.functions.entry((index, symbol)).or_insert_with(|| file.cubin.function(symbol));
        let function = function.as_ref().map_err(|what| format!("code {code} {what}"))?;
        let shape = rule.shape(spec).map_err(|what| format!("its launch: {what}"))?;
        let taken = parameters(spec);
        if function.parameters.len() as u64 != taken || function.parameters.iter().any(|&own| own != PARAMETER_BYTES) {
            let found = &function.parameters;
            return Err(format!(
                "`{symbol}` has parameters of {found:?} bytes, its specification gives it {taken} of 8"
            ));
        }
        check_threads(function, &shape, cuda)?;
        let static_bytes = function.shared_bytes;
        let shared = static_bytes.saturating_add(u64::from(shape.shared_bytes));
        if shared > u64::from(cuda.shared_bytes_max()) + RESERVED_BYTES {
            let (dynamic, most) = (shape.shared_bytes, cuda.shared_bytes_max());
            return Err(format!("{static_bytes} and {dynamic} bytes of shared memory, a block has {most}"));
        }
        let label = launch::label(spec, symbol, rule)?;
        let held = file.labels.contains(&label);
        held.then_some(shape).ok_or_else(|| {
            format!(
                "code {code} is not labelled as `{symbol}` of this specification and launch: it is another kernel's"
            )
        })
    }
}

/// Operands, results, numbers that differ by rank, and the fault word.
fn parameters(spec: &Spec) -> u64 {
    let pointers = spec.inputs.len() + spec.results.len();
    (pointers + spec.rank_scalars().len() + usize::from(spec.checks_indices())) as u64
}

fn check_threads(function: &Function, shape: &LaunchShape, cuda: Cuda) -> Result<(), String> {
    let product = |sizes: [u32; 3]| sizes.iter().fold(1u64, |product, &size| product.saturating_mul(u64::from(size)));
    let threads = product(shape.block);
    let Some(most) = function.max_threads.or(function.required_threads) else {
        return Err("its code does not say for how many threads it is".to_owned());
    };
    if product(most) != threads || function.required_threads.is_some_and(|required| required != shape.block) {
        return Err(format!("a block of {:?} threads, its code is for {most:?}", shape.block));
    }
    let each = u64::from(function.registers).next_multiple_of(REGISTERS_UNIT);
    if threads.next_multiple_of(WARP).saturating_mul(each) > REGISTERS {
        let registers = function.registers;
        return Err(format!("{threads} threads of {registers} registers, a block has {REGISTERS}"));
    }
    let Some(cluster) = function.cluster else { return Ok(()) };
    let whole = shape.grid.iter().zip(cluster).all(|(blocks, own)| {
        own > 0 && blocks.get(0).is_some_and(|blocks| blocks.cast_unsigned().is_multiple_of(u64::from(own)))
    });
    let fine = whole && (cuda.has_clusters() || product(cluster) == 1);
    fine.then_some(()).ok_or_else(|| format!("clusters of {cluster:?} blocks do not make its grid"))
}
