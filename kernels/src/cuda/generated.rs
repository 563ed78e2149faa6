//! Kernels generated from a specification: each thread computes one element of the result, or a few consecutive ones, by
//! pulling what it needs through all of the primitives.
//!
//! Every primitive that says where an element comes from can be pulled through: element-wise expressions, movement,
//! gathers, resampling, and, as plain loops, reductions, scans, pools, products and convolutions. What must share work
//! between threads has families of its own, which come first.
//!
//! ```text
//! inputs x: f16[64, 256], b: f16[256]             const Index i = (blockIdx.x * 256u + threadIdx.x) * 8u;
//! %2 = pointwise add(x, b)                  →     const Pack<f16, 8> k1 = *reinterpret_cast<…>(x0 + (i));
//! %3 = pointwise relu(%2)                         const Pack<f16, 8> k3 = *reinterpret_cast<…>(x1 + (i % 256u));
//!                                                 for (u32 j = 0; j < 8; ++j) { … scalar::add(v2[j], v4[j]) … }
//!                                                 *reinterpret_cast<Pack<f16, 8>*>(y0 + i) = …;
//! ```
//!
//! Shapes are literals, so divisions are multiplications; dimensions that are neighbours everywhere collapse (see
//! [`affine`]); memory is read 16 bytes at a time where the elements of a thread are consecutive there.

mod affine;
mod expression;
mod function;
mod kernel;
mod literal;
mod loops;
mod movement;
mod resize;
#[cfg(test)]
mod tests;

use planfile::op::{PoolKind, ResizeMode};
use planfile::{DType, LaunchRule, Op, Spec, TensorType};

use self::affine::Affine;
pub(super) use self::function::function;
use self::kernel::{ELEMENT, Kernel, Operand};
use self::literal::element;
use super::block::{sizes_of, tiles};
use super::{CudaTarget, FAULT, Launch};

const SCALAR: &str = include_str!("../../cuda/scalar.cuh");
const SHARED: &str = include_str!("../../cuda/generated.cuh");

/// Threads of a block.
const BLOCK: u64 = 256;
/// Bytes that one instruction reads or writes.
const VECTOR_BYTES: usize = 16;
/// Threads that keep a device busy: below, each computes fewer elements.
const BUSY_THREADS: u64 = 1 << 14;
/// Primitives of a specification; the generator recurses through them.
const NODES_MAX: usize = 256;
/// Elements of a tensor, so that positions are far from overflow.
const ELEMENTS_MAX: u64 = 1 << 40;
/// What a kernel may read: each operand is a pointer.
const OPERANDS_MAX: usize = 32;
/// Instructions of a fused kernel: registers and compile time.
const INSTRUCTIONS_MAX: usize = 256;

/// Takes every specification of supported primitives with one result, or several of one shape.
pub(super) fn select(spec: &Spec, _: &CudaTarget) -> Option<Launch> {
    let spec = &as_bits(spec);
    let plan = Plan::new(spec)?;
    let mut kernel = plan.kernel(spec)?;
    let mut body = String::new();
    if plan.count > 0 {
        plan.fill(&mut kernel)?;
        body = std::mem::take(&mut kernel.text);
    }
    plan.assemble(spec, &kernel, &body)
}

/// Whether the whole specification runs well as one generated kernel: expressions and movement only, nothing computed
/// more often than it has elements, and few enough operands and instructions.
pub(super) fn accepts_fusion(spec: &Spec) -> bool {
    fuses(spec).is_some()
}

fn fuses(spec: &Spec) -> Option<()> {
    let mut instructions = 0;
    for node in &spec.nodes {
        match &node.op {
            Op::Pointwise { expr, .. } => instructions += expr.ops.len(),
            op if is_movement(op) => {}
            _ => return None,
        }
    }
    if spec.inputs.len() > OPERANDS_MAX || instructions >= INSTRUCTIONS_MAX {
        return None;
    }
    let plan = Plan::new(spec)?;
    let mut kernel = plan.kernel(spec)?;
    if plan.count > 0 {
        plan.fill(&mut kernel)?;
    }
    let within = |(position, node): (usize, &planfile::SpecNode)| -> Option<bool> {
        let number = kernel.producers.iter().position(|own| *own == Some((position, 0)))?;
        // Constants and copies cost nothing to repeat.
        let is_computed = matches!(&node.op, Op::Pointwise { expr, .. } if expr.ops.len() > 1);
        Some(!is_computed || kernel.evaluations[number] <= kernel.types[number].elements()?)
    };
    spec.nodes.iter().enumerate().map(within).all(|fine| fine == Some(true)).then_some(())
}

/// Whether the primitive moves elements without looking at them.
const fn is_movement(op: &Op) -> bool {
    matches!(
        op,
        Op::Pad { .. }
            | Op::Reshape { .. }
            | Op::Transpose { .. }
            | Op::Slice { .. }
            | Op::Broadcast { .. }
            | Op::Concat { .. }
            | Op::Gather { .. }
            | Op::GatherElements { .. }
            | Op::GatherNd { .. }
    )
}

/// Half types as bits where nothing is computed, so that all of them survive.
fn as_bits(spec: &Spec) -> Spec {
    let mut spec = spec.clone();
    if spec.nodes.iter().all(|node| is_movement(&node.op)) {
        for input in spec.inputs.iter_mut().filter(|input| literal::is_half(input.dtype)) {
            input.dtype = DType::U16;
        }
    }
    spec
}

/// Whether the primitive is one of those that can be pulled through, on these operands.
fn is_supported(op: &Op, operands: &[&TensorType]) -> bool {
    let floats = operands.iter().all(|operand| operand.dtype.is_float());
    match op {
        Op::Pointwise { .. }
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::Broadcast { .. }
        | Op::Gather { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::Scan { .. }
        | Op::Resize { .. } => true,
        Op::Reduce { kind, axes, .. } => {
            let is_arg =
                matches!(kind, planfile::op::ReduceKind::ArgMax { .. } | planfile::op::ReduceKind::ArgMin { .. });
            !is_arg || axes.iter().all(|&axis| operands[0].size(usize::from(axis)) > 0)
        }
        Op::Dot { accumulate, .. } => *accumulate != DType::Bool,
        Op::Conv { .. } => operands[0].dtype == operands[1].dtype,
        Op::Pool { kind, .. } => *kind == PoolKind::Max || floats,
        Op::Rotary { .. } => floats,
        Op::ScatterElements { .. }
        | Op::ScatterNd { .. }
        | Op::TopK { .. }
        | Op::Append { .. }
        | Op::Softmax { .. }
        | Op::Norm { .. }
        | Op::Attention { .. }
        | Op::AllReduce { .. }
        | Op::AllGather { .. }
        | Op::ReduceScatter { .. }
        | Op::AllToAll { .. }
        | Op::Send { .. }
        | Op::Recurrence { .. }
        | Op::Recv { .. } => false,
    }
}

/// Whether the primitive is a loop: such kernels compute one element per thread.
const fn is_loop(op: &Op) -> bool {
    match op {
        Op::Resize { mode, .. } => !matches!(mode, ResizeMode::Nearest(_)),
        Op::Reduce { .. } | Op::Scan { .. } | Op::Dot { .. } | Op::Conv { .. } | Op::Pool { .. } => true,
        _ => false,
    }
}

/// How the elements of the result are divided among threads.
struct Plan {
    types: Vec<TensorType>,
    /// Elements of each result.
    count: u64,
    /// Consecutive elements of a thread.
    lanes: u64,
    /// Groups of lanes of a thread, a block apart, so that several loads are in flight.
    rounds: u64,
    block: u64,
    wide: bool,
}

impl Plan {
    fn new(spec: &Spec) -> Option<Self> {
        let types = spec.types().ok()?;
        let results: Vec<&TensorType> =
            spec.results.iter().map(|&result| types.get(result as usize)).collect::<Option<_>>()?;
        let first = *results.first()?;
        if spec.nodes.len() > NODES_MAX || results.iter().any(|result| result.sizes() != first.sizes()) {
            return None;
        }
        if types.iter().any(|ty| ty.elements().is_none_or(|count| count > ELEMENTS_MAX)) {
            return None;
        }
        for node in &spec.nodes {
            let operands: Vec<&TensorType> = node.operands.iter().map(|&operand| &types[operand as usize]).collect();
            if !is_supported(&node.op, &operands) {
                return None;
            }
        }
        let count = first.elements()?;
        let wide = types.iter().any(|ty| ty.elements().is_some_and(|count| count >= 1 << 31))
            || spec.nodes.iter().any(|node| reaches_far(&node.op));
        let large = |ty: &&TensorType| ty.elements().is_some_and(|own| own >= count / 4);
        let widest =
            spec.inputs.iter().filter(large).chain(results.iter().copied()).map(|ty| ty.dtype.bytes()).max()?;
        let mut lanes =
            if spec.nodes.iter().any(|node| is_loop(&node.op)) { 1 } else { (VECTOR_BYTES / widest) as u64 };
        while lanes > 1 && (!count.is_multiple_of(lanes) || count / lanes < BUSY_THREADS) {
            lanes /= 2;
        }
        let threads = count / lanes;
        let block = if threads < BUSY_THREADS { BLOCK / 4 } else { BLOCK };
        // One input in flight needs more of them than two.
        let wanted = if spec.inputs.iter().filter(large).count() > 1 { 2 } else { 4 };
        let fits =
            |rounds: &u64| lanes > 1 && threads.is_multiple_of(block * rounds) && threads / rounds >= 16 * BUSY_THREADS;
        let rounds = [wanted, 2].into_iter().find(fits).unwrap_or(1);
        Some(Self { types, count, lanes, rounds, block, wide })
    }

    fn kernel<'a>(&self, spec: &'a Spec) -> Option<Kernel<'a>> {
        Kernel::new(spec, self.types.clone(), self.count, self.lanes, self.wide)
    }

    /// Writes the computation of a thread.
    fn fill(&self, kernel: &mut Kernel<'_>) -> Option<()> {
        let number = |number| kernel.number(number);
        let (block, lanes, rounds) = (number(self.block), number(self.lanes), number(self.rounds));
        let threads = self.count / self.lanes;
        let is_exact = threads.is_multiple_of(self.block * self.rounds);
        let limit = number(self.count);
        let group = if self.rounds > 1 { format!("(blockIdx.x * {rounds} + u)") } else { "blockIdx.x".to_owned() };
        let group = if self.wide { format!("static_cast<Index>({group})") } else { group };
        let scaled = if self.lanes > 1 { format!(" * {lanes}") } else { String::new() };
        let thread = format!("({group} * {block} + threadIdx.x){scaled}");
        let body = |kernel: &mut Kernel<'_>| {
            kernel.line(&format!("const Index i = {thread};"));
            if !is_exact {
                kernel.line(&format!("if (i >= {limit}) return;"));
            }
            self.store(kernel)
        };
        if self.rounds == 1 {
            return body(kernel);
        }
        kernel.line("#pragma unroll");
        kernel.block(&format!("for (u32 u = 0; u < {rounds}; ++u)"), body)
    }

    /// Computes each result and stores it.
    fn store(&self, kernel: &mut Kernel<'_>) -> Option<()> {
        for (position, &result) in kernel.spec.results.iter().enumerate() {
            let (sizes, ty) = (kernel.sizes(result), element(kernel.dtype(result)));
            let index = Affine::digit(ELEMENT, 1, self.count).split(&sizes)?;
            let own = kernel.value(result, index)?;
            if self.lanes == 1 {
                kernel.line(&format!("y{position}[i] = narrow<{ty}>({});", own.name));
                continue;
            }
            let (pack, whole) = (kernel.fresh('k'), format!("Pack<{ty}, {}>", self.lanes));
            kernel.line(&format!("{whole} {pack};"));
            kernel.each_lane(|kernel| {
                kernel.line(&format!("{pack}.at[j] = narrow<{ty}>({});", own.lane()));
                Some(())
            })?;
            kernel.line(&format!("*reinterpret_cast<{whole}*>(y{position} + i) = {pack};"));
        }
        Some(())
    }

    /// The translation unit and its launch.
    fn assemble(&self, spec: &Spec, kernel: &Kernel<'_>, body: &str) -> Option<Launch> {
        let pointer = |ty: &TensorType| element(ty.dtype);
        let inputs = spec.inputs.iter().enumerate().map(|(n, ty)| format!("const {}* __restrict__ x{n}", pointer(ty)));
        let results = spec.results.iter().enumerate();
        let results =
            results.map(|(n, &result)| format!("{}* __restrict__ y{n}", pointer(&self.types[result as usize])));
        let scalars = (0..kernel.scalars.len()).map(|n| format!("const i64 s{n}"));
        let fault = spec.checks_indices().then(|| FAULT.to_owned());
        let parameters: Vec<String> = inputs.chain(results).chain(scalars).chain(fault).collect();
        let symbol = symbol(spec);
        let index = if self.wide { "u64" } else { "u32" };
        let source = format!(
            "{SCALAR}\ntypedef {index} Index;\n\n{SHARED}\n\
             extern \"C\" __global__ void __launch_bounds__({}) {symbol}(\n    {}) {{\n{body}}}\n",
            self.block,
            parameters.join(",\n    "),
        );
        let result = *spec.results.first()?;
        let sizes = sizes_of(result, 0..self.types[result as usize].rank());
        let blocks = vec![tiles(sizes, self.lanes * self.block * self.rounds)];
        let block = [u32::try_from(self.block).ok()?, 1, 1];
        let rule = LaunchRule { grid: [blocks, vec![], vec![]], block, shared_bytes: 0 };
        rule.shape(spec).ok()?;
        Some(Launch { symbol, source, rule })
    }
}

/// Whether positions of a window leave 32 bits on their way.
fn reaches_far(op: &Op) -> bool {
    let (Op::Conv { window, .. } | Op::Pool { window, .. }) = op else { return false };
    let amounts = [&window.sizes, &window.strides, &window.dilations];
    amounts.into_iter().flatten().any(|&amount| amount >= 1 << 14)
        || window.pads.iter().any(|pad| pad.0.unsigned_abs().max(pad.1.unsigned_abs()) >= 1 << 28)
}

/// A name that says what the kernel does: its primitives, each once.
fn symbol(spec: &Spec) -> String {
    let mut names: Vec<&str> = Vec::new();
    for node in &spec.nodes {
        if !names.contains(&node.op.name()) && names.len() < 4 {
            names.push(node.op.name());
        }
    }
    if names.is_empty() { "copy".to_owned() } else { names.join("_") }
}

impl Kernel<'_> {
    /// Computes a result of a node at an index.
    fn node(&mut self, position: usize, result: usize, index: &[Affine]) -> Option<Operand> {
        // The specification outlives the kernel's text.
        let spec = self.spec;
        let node = spec.nodes.get(position)?;
        let number = u32::try_from(self.producers.iter().position(|own| *own == Some((position, result)))?).ok()?;
        let operands = node.operands.as_slice();
        let pair = || -> Option<[u32; 2]> { operands.try_into().ok() };
        let x = operands.first().copied();
        match &node.op {
            Op::Pointwise { expr, .. } => self.pointwise(expr, operands, number, index),
            Op::Reshape { .. } => self.reshape(x?, number, index),
            Op::Transpose { permutation } => self.transpose(permutation, x?, index),
            Op::Slice { starts, steps, .. } => self.slice(starts, steps, x?, index),
            Op::Pad { low, high, mode } => self.pad((low, high), *mode, operands, number, index),
            Op::Concat { axis } => self.concat(usize::from(*axis), operands, number, index),
            Op::Broadcast { .. } => {
                let source = expression::broadcast(index, &self.sizes(x?));
                self.value(x?, source)
            }
            Op::Gather { axis } => self.gather(usize::from(*axis), pair()?, number, index),
            Op::GatherElements { axis } => self.gather_elements(usize::from(*axis), pair()?, number, index),
            Op::GatherNd { batch } => self.gather_nd(usize::from(*batch), pair()?, number, index),
            Op::Resize { mode, coordinates, scales, region, .. } => {
                self.resize((*mode, *coordinates), scales, region, x?, number, index)
            }
            Op::Rotary { interleaved, rotary } => self.rotary(*interleaved, *rotary, operands, number, index),
            Op::Reduce { kind, axes, keep } => self.reduce(*kind, axes, *keep, x?, index),
            Op::Scan { combine, axis, exclusive, reverse } => {
                self.scan(*combine, usize::from(*axis), (*exclusive, *reverse), x?, index)
            }
            Op::Dot { batch, contract, accumulate, .. } => {
                self.dot(batch, contract, *accumulate, pair()?, number, index)
            }
            Op::Conv { window, groups, transposed, .. } => {
                self.conv(window, *groups, *transposed, pair()?, number, index)
            }
            Op::Pool { kind, window, indices, .. } => {
                let results = self.pool(*kind, window, *indices, x?, index)?;
                for (other, operand) in results.iter().enumerate() {
                    let other = self.producers.iter().position(|own| *own == Some((position, other)))?;
                    self.remember(u32::try_from(other).ok()?, index.to_vec(), operand);
                }
                results.into_iter().nth(result)
            }
            _ => None,
        }
    }
}
