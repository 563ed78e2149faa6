//! What kernels share whose threads work together: literals printed above a body, and how rows go to threads.

use std::fmt::Write as _;

use planfile::launch::{Factor, SizeOf};
use planfile::{DType, LaunchRule, Op, Spec, TensorType};

use super::{FAULT, Launch};

const SCALAR: &str = include_str!("../../cuda/scalar.cuh");
const BLOCK: &str = include_str!("../../cuda/block.cuh");

/// A specification that is one primitive on static shapes.
pub(super) struct Only<'a> {
    pub(super) op: &'a Op,
    pub(super) operands: Vec<&'a TensorType>,
    /// The primitive's results, also those that the specification drops.
    pub(super) results: Vec<TensorType>,
    /// What the call passes: operands and results in the primitive's order, by the names of the parameters.
    arguments: Vec<String>,
    spec: &'a Spec,
}

/// Whether all sizes are known at compile time.
pub(super) fn is_static(ty: &TensorType) -> bool {
    ty.dims.iter().all(|dim| dim.fixed().is_some())
}

impl<'a> Only<'a> {
    /// `None` where there is more than one primitive, a size that is not static, or a result that is an input or
    /// stands twice.
    pub(super) fn of(spec: &'a Spec) -> Option<Self> {
        let [node] = spec.nodes.as_slice() else { return None };
        let types = spec.types().ok()?;
        let inputs = spec.inputs.len();
        let operands = node.operands.iter().map(|&operand| spec.inputs.get(operand as usize)).collect::<Option<_>>()?;
        let results = types.get(inputs..)?.to_vec();
        if !types.iter().all(is_static) {
            return None;
        }
        let mut arguments: Vec<String> = node.operands.iter().map(|operand| format!("in{operand}")).collect();
        let mut found = 0;
        for position in 0..results.len() {
            let value = (inputs + position) as u32;
            match spec.results.iter().position(|&result| result == value) {
                Some(out) => {
                    arguments.push(format!("out{out}"));
                    found += 1;
                }
                None => arguments.push("nullptr".to_owned()),
            }
        }
        (found == spec.results.len()).then_some(Self { op: &node.op, operands, results, arguments, spec })
    }

    /// A launch that does nothing, where no result has an element.
    pub(super) fn nothing(&self) -> Option<Launch> {
        let empty = self.results.iter().all(|result| result.elements() == Some(0));
        let body = "DEVICE void nothing() {}\n";
        empty
            .then(|| launch_for(self.spec, Unit::new(), "nothing", body, "nothing()", Shape::flat(Vec::new(), 32)))
            .flatten()
    }

    /// A launch of the function `symbol` of `body` on the operands and results.
    pub(super) fn launch(&self, unit: Unit, symbol: &str, body: &str, shape: Shape) -> Option<Launch> {
        self.launch_call(unit, symbol, body, &format!("{symbol}({})", self.arguments.join(", ")), shape)
    }

    /// As [`Self::launch`], of a function that checks indices: its last argument is the word that it marks.
    pub(super) fn launch_checked(&self, unit: Unit, symbol: &str, body: &str, shape: Shape) -> Option<Launch> {
        self.launch_call(unit, symbol, body, &format!("{symbol}({}, fault)", self.arguments.join(", ")), shape)
    }

    /// As [`Self::launch`], with the call spelled out.
    pub(super) fn launch_call(&self, unit: Unit, symbol: &str, body: &str, call: &str, shape: Shape) -> Option<Launch> {
        launch_for(self.spec, unit, symbol, body, call, shape)
    }

    /// Sizes of some axes of an operand, for the grid.
    pub(super) fn sizes_of_operand(&self, operand: usize, axes: impl IntoIterator<Item = usize>) -> Vec<SizeOf> {
        sizes_of(self.spec.nodes[0].operands[operand], axes)
    }

    /// What stands for an operand, or beyond them a result, in a call.
    pub(super) fn argument(&self, position: usize) -> &str {
        self.arguments.get(position).map_or("nullptr", String::as_str)
    }
}

/// Sizes of some axes of a value of the specification, for the grid.
pub(super) fn sizes_of(value: u32, axes: impl IntoIterator<Item = usize>) -> Vec<SizeOf> {
    axes.into_iter().map(|axis| SizeOf { value, axis: axis as u8 }).collect()
}

/// Blocks of `tile` elements each that cover the sizes.
pub(super) const fn tiles(sizes: Vec<SizeOf>, tile: u64) -> Factor {
    Factor::Tiles { sizes, tile }
}

/// A launch of `call`; pointers are named `in0…` and `out0…`. `None` where the specification has numbers that differ by
/// rank, or where its grid is larger than a launch takes.
pub(super) fn launch_for(spec: &Spec, unit: Unit, name: &str, body: &str, call: &str, shape: Shape) -> Option<Launch> {
    let rule =
        LaunchRule { grid: [shape.blocks, vec![], vec![]], block: shape.block, shared_bytes: shape.shared_bytes };
    if !spec.rank_scalars().is_empty() || rule.shape(spec).is_err() {
        return None;
    }
    let inputs = (0..spec.inputs.len()).map(|i| format!("const void* __restrict__ in{i}"));
    let results = (0..spec.results.len()).map(|i| format!("void* __restrict__ out{i}"));
    let fault = spec.checks_indices().then(|| FAULT.to_owned());
    let parameters: Vec<String> = inputs.chain(results).chain(fault).collect();
    let threads: u32 = shape.block.iter().product();
    let symbol = format!("{name}_kernel");
    let cluster = if shape.cluster > 1 { format!("__cluster_dims__({}, 1, 1) ", shape.cluster) } else { String::new() };
    let source = format!(
        "{SCALAR}\n{BLOCK}\n{}\n{body}\n\
         extern \"C\" __global__ void {cluster}__launch_bounds__({threads}, {}) {symbol}(\n    {}) {{\n\
         \x20   {call};\n}}\n",
        unit.text,
        shape.resident,
        parameters.join(",\n    "),
    );
    Some(Launch { symbol, source, rule })
}

/// Blocks and threads of a launch.
#[derive(Clone)]
pub(super) struct Shape {
    blocks: Vec<Factor>,
    block: [u32; 3],
    shared_bytes: u32,
    /// Blocks per multiprocessor that registers are to leave room for.
    resident: u32,
    /// Neighbouring blocks that run at once and reach each other's shared memory.
    cluster: u32,
}

impl Shape {
    /// As many blocks as the product of the factors, at least one.
    pub(super) fn flat(blocks: impl Into<Vec<Factor>>, threads: u32) -> Self {
        Self::plane(blocks, [threads, 1])
    }

    pub(super) fn plane(blocks: impl Into<Vec<Factor>>, threads: [u32; 2]) -> Self {
        let block = [threads[0], threads[1], 1];
        Self { blocks: blocks.into(), block, shared_bytes: 0, resident: 1, cluster: 1 }
    }

    pub(super) fn shared(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }

    pub(super) fn resident(self, blocks: u32) -> Self {
        Self { resident: blocks, ..self }
    }

    /// In clusters of so many blocks, of which the grid is a multiple; needs `sm_90` where there is more than one.
    pub(super) fn cluster(self, blocks: u32) -> Self {
        Self { cluster: blocks, ..self }
    }
}

/// Declarations that stand above a body.
pub(super) struct Unit {
    text: String,
}

impl Unit {
    pub(super) fn new() -> Self {
        Self { text: String::new() }
    }

    /// Indices and counts are 32 bits wide where all of these tensors allow it.
    pub(super) fn indexing(types: &[&TensorType]) -> Self {
        let wide = types.iter().any(|ty| ty.elements().is_none_or(|elements| elements >= 1 << 31));
        let mut unit = Self::new();
        unit.line(&format!("typedef {} Index;", if wide { "u64" } else { "u32" }));
        unit
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// `constexpr Index NAME = value;`
    pub(super) fn size(&mut self, name: &str, value: u64) {
        self.line(&format!("[[maybe_unused]] constexpr Index {name} = {value}ull;"));
    }

    pub(super) fn int(&mut self, name: &str, value: i64) {
        self.line(&format!("[[maybe_unused]] constexpr int {name} = {value};"));
    }

    pub(super) fn flag(&mut self, name: &str, value: bool) {
        self.line(&format!("[[maybe_unused]] constexpr bool {name} = {value};"));
    }

    /// Exact: printed so that reading it gives the same bits.
    pub(super) fn real(&mut self, name: &str, value: f64) {
        let text = if value.is_nan() {
            "__longlong_as_double(0x7ff8000000000000ll)".to_owned()
        } else if value.is_infinite() {
            let sign = if value < 0.0 { "-" } else { "" };
            format!("{sign}__longlong_as_double(0x7ff0000000000000ll)")
        } else {
            format!("{value:e}")
        };
        self.line(&format!("#define {name} ({text})"));
    }

    pub(super) fn alias(&mut self, name: &str, dtype: DType) {
        self.line(&format!("typedef {} {name};", type_name(dtype)));
    }

    /// `Index name(Index i)`: position `i` in row-major order of `sizes`, moved by `strides`.
    pub(super) fn offset(&mut self, name: &str, dims: &[Axis]) {
        let mut terms = Vec::new();
        let mut below = 1u64;
        let mut dims: Vec<Axis> = dims.iter().copied().filter(|dim| dim.size != 1).collect();
        let empty = dims.iter().any(|dim| dim.size == 0);
        if !empty {
            dims = collapse(&dims);
            for (position, dim) in dims.iter().enumerate().rev() {
                let quotient = if below == 1 { "i".to_owned() } else { format!("i / {below}u") };
                let index = if position == 0 { quotient } else { format!("({quotient}) % {}u", dim.size) };
                if dim.stride != 0 {
                    terms.push(format!("({index}) * static_cast<Index>({}ull)", dim.stride));
                }
                below = below.saturating_mul(dim.size);
            }
        }
        let sum = if terms.is_empty() { "0".to_owned() } else { terms.join(" + ") };
        self.line(&format!("DEVICE Index {name}(Index i) {{ return {sum}; }}"));
    }

    /// Further declarations, as they are.
    pub(super) fn text(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.text.write_fmt(text);
        self.text.push('\n');
    }
}

/// A dimension as a kernel walks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Axis {
    pub(super) size: u64,
    /// In elements.
    pub(super) stride: u64,
}

/// Fewer dimensions for the same walk: neighbours that one stride serves become one, those of size 1 go.
pub(super) fn collapse(dims: &[Axis]) -> Vec<Axis> {
    let whole = |group: &Vec<usize>| {
        let size = group.iter().fold(1u64, |size, &position| size.saturating_mul(dims[position].size));
        Axis { size, stride: group.last().map_or(0, |&position| dims[position].stride) }
    };
    neighbours(dims).iter().map(whole).collect()
}

/// The positions of the dimensions that [`collapse`] makes one of.
pub(super) fn neighbours(dims: &[Axis]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (position, dim) in dims.iter().enumerate().filter(|(_, dim)| dim.size != 1) {
        let before = groups.last().and_then(|group| group.last()).map(|&last| dims[last].stride);
        match groups.last_mut().filter(|_| before == Some(dim.stride.saturating_mul(dim.size))) {
            Some(group) => group.push(position),
            None => groups.push(vec![position]),
        }
    }
    groups
}

/// The dimensions of a dense tensor.
pub(super) fn dense(ty: &TensorType) -> Vec<Axis> {
    let sizes = ty.sizes();
    let strides = planfile::types::strides(&sizes);
    sizes.into_iter().zip(strides).map(|(size, stride)| Axis { size, stride }).collect()
}

/// Sizes before, at and after an axis, multiplied.
pub(super) fn around(ty: &TensorType, axis: usize) -> [u64; 3] {
    let sizes = ty.sizes();
    let product = |sizes: &[u64]| sizes.iter().fold(1u64, |product, &size| product.saturating_mul(size));
    [product(&sizes[..axis]), sizes[axis], product(&sizes[axis + 1..])]
}

/// Element types in kernels: booleans are bytes.
pub(super) fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "u8",
        other => other.name(),
    }
}

/// How a contiguous row goes to threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// Elements moved at once.
    pub(super) vector: u64,
    /// Threads that share a row: a power of two.
    pub(super) threads: u32,
    /// Packs of `vector` elements of each thread.
    pub(super) packs: u64,
    /// Threads of a block: a multiple of `threads`.
    pub(super) block: u32,
}

/// Values that a thread holds in registers, at most.
const HELD_MAX: u64 = 32;

impl Row {
    /// For dense rows of `length` elements of `bytes` bytes each.
    pub(super) fn of(length: u64, bytes: usize) -> Self {
        let vector = widest(bytes, &[length]);
        let packs = length / vector;
        let each = (HELD_MAX / 2 / vector).max(1);
        let threads = if packs <= 32 * each { packs.clamp(1, 32) } else { packs.div_ceil(each).min(1024) };
        let threads = threads.next_power_of_two();
        Self { vector, threads: threads as u32, packs: packs.div_ceil(threads), block: threads.max(128) as u32 }
    }

    /// Whether a thread's share fits in its registers.
    pub(super) const fn is_held(self) -> bool {
        self.packs * self.vector <= HELD_MAX
    }

    /// Blocks for rows of which there are as many as the sizes make.
    pub(super) fn blocks(self, rows: Vec<SizeOf>) -> [Factor; 1] {
        [tiles(rows, u64::from(self.block / self.threads))]
    }

    /// Declares `VECTOR`, `THREADS`, `PACKS` and `ROWS_PER_BLOCK`.
    pub(super) fn declare(self, unit: &mut Unit) {
        unit.int("VECTOR", self.vector.cast_signed());
        unit.int("THREADS", i64::from(self.threads));
        unit.int("PACKS", self.packs.cast_signed());
        unit.int("ROWS_PER_BLOCK", i64::from(self.block / self.threads));
    }
}

/// Elements moved by one access of up to 16 bytes, so that all these lengths and strides are whole numbers of it.
pub(super) fn widest(bytes: usize, lengths: &[u64]) -> u64 {
    let fits = |vector: &u64| lengths.iter().all(|length| length.is_multiple_of(*vector));
    let most = 16 / bytes as u64;
    std::iter::successors(Some(most), |vector| (*vector > 1).then_some(vector / 2)).find(fits).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::super::{CudaTarget, Selected, select};
    use super::*;

    #[test]
    fn rows_take_wide_accesses_and_enough_threads() {
        assert_eq!(Row::of(3, 4), Row { vector: 1, threads: 4, packs: 1, block: 128 });
        assert_eq!(Row::of(128, 4), Row { vector: 4, threads: 32, packs: 1, block: 128 });
        assert_eq!(Row::of(1024, 2), Row { vector: 8, threads: 64, packs: 2, block: 128 });
        assert!(Row::of(32_768, 4).is_held());
        assert!(!Row::of(50_257, 4).is_held());
        let long = Row::of(1 << 20, 4);
        assert_eq!([long.threads, long.block], [1024, 1024]);
    }

    #[test]
    fn neighbours_collapse() {
        let axis = |size, stride| Axis { size, stride };
        assert_eq!(collapse(&[axis(2, 12), axis(3, 4), axis(1, 9), axis(4, 1)]), [axis(24, 1)]);
        assert_eq!(collapse(&[axis(2, 4), axis(3, 8), axis(4, 1)]), [axis(2, 4), axis(3, 8), axis(4, 1)]);
    }

    #[test]
    fn results_that_are_dropped_are_null() {
        let x = TensorType::new(DType::F32, &[4]);
        let mut spec = Spec::of(Op::TopK { axis: 0, k: 2, largest: true, sorted: true }, vec![x]).unwrap();
        spec.results = vec![2];
        assert_eq!(Only::of(&spec).unwrap().arguments, ["in0", "nullptr", "out0"]);
        spec.results = vec![0];
        assert!(Only::of(&spec).is_none());
    }

    #[test]
    fn walks_divide_by_what_is_below() {
        let mut unit = Unit::new();
        let dims = [Axis { size: 4, stride: 100 }, Axis { size: 5, stride: 0 }, Axis { size: 6, stride: 2 }];
        unit.offset("walk", &dims);
        let (outer, inner) = ("(i / 30u) * static_cast<Index>(100ull)", "((i) % 6u) * static_cast<Index>(2ull)");
        assert!(unit.text.contains(outer) && unit.text.contains(inner), "{}", unit.text);
    }

    /// The family whose kernels let threads work together on a primitive.
    fn family(op: &Op) -> Option<&'static str> {
        Some(match op {
            Op::Reduce { .. } => "reduce",
            Op::Softmax { .. } => "softmax",
            Op::Norm { .. } => "norm",
            Op::Transpose { .. } => "transpose",
            Op::ScatterElements { .. } | Op::ScatterNd { .. } => "scatter",
            Op::Scan { .. } => "scan",
            Op::TopK { .. } => "top_k",
            Op::Attention { .. } => "attention",
            Op::Recurrence { .. } => "recurrence",
            _ => return None,
        })
    }

    #[test]
    fn every_sample_has_a_launch_that_devices_accept() {
        let target = CudaTarget { architecture: "sm_80".parse().unwrap(), allow_tf32: false };
        for (name, spec) in crate::samples::samples() {
            let Some(family) = spec.nodes.iter().find_map(|node| family(&node.op).filter(|_| spec.nodes.len() == 1))
            else {
                continue;
            };
            let (found, selected) = select(&spec, &target).unwrap_or_else(|why| panic!("{name}: {why}"));
            let Selected::Launch(launch) = selected else { panic!("{name}: a library") };
            assert_eq!(found, family, "{name}");
            let shape = launch.rule.shape(&spec).unwrap();
            let threads: u32 = shape.block.iter().product();
            assert!((32..=1024).contains(&threads) && threads.is_multiple_of(32), "{name}: {threads} threads");
            assert!(shape.grid.iter().all(|blocks| *blocks != 0.into()), "{name}");
            assert!(shape.shared_bytes <= 163 << 10, "{name}: {} bytes", shape.shared_bytes);
            assert!(launch.source.contains(&format!(" {}(", launch.symbol)), "{name}");
        }
    }

    #[test]
    fn sizes_that_are_not_static_are_refused() {
        let mut x = TensorType::new(DType::F32, &[4, 8]);
        x.dims[0] = planfile::Dim::Bounded { capacity: 4, extent: planfile::ExtentId(0) };
        let spec = Spec::of(Op::Softmax { axis: 1, log: false }, vec![x]).unwrap();
        assert!(Only::of(&spec).is_none());
    }
}
