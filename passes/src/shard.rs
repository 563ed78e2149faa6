//! Places tensors on a mesh of devices and inserts the collectives between placements.
//!
//! before  %h: f32[8, 256] = dot %x, %w1          after  %h: f32[8, 64] of [8, 256] split(1: tensor) = dot %x, %w1
//!         %y: f32[8, 64] = dot %h, %w2                  %p: f32[8, 64] partial(sum: tensor) = dot %h, %w2
//!                                                       %y: f32[8, 64] = all_reduce %p
//!
//! Each rank runs the same graph at its local sizes. Inputs with a batch dimension are split over the axis `data`;
//! products with weights alternate columns and rows over the axis `tensor`; the graph is cut in stages over `pipe`.

mod coverage;
mod decide;
mod factors;
mod hints;
mod reshape;
mod reshard;
mod walk;

pub use coverage::{IdleAxis, Whole, idle_axes, whole};
use ir::{Graph, Mesh, MeshAxis, Module, Placement, Split, SubAxes};
use planfile::{Dim, Target};

use crate::cost;
use crate::error::PassError;
use crate::phase::{Logical, Sharded};
use crate::settings::{MeshChoice, Settings};
use decide::Policy;
use walk::{AddedWeights, Walk, single};

/// Axes that a mesh may have.
pub const AXES: [&str; 3] = ["data", "pipe", "tensor"];

/// Reads `data=2,tensor=4`. Axes are ordered data, pipe, tensor, so that tensor neighbours are adjacent ranks.
///
/// # Errors
/// A sentence that names the part at fault and what is expected.
pub fn parse_mesh(text: &str) -> Result<Mesh, String> {
    let mut sizes = [None; AXES.len()];
    for part in text.split(',') {
        let (name, size) = part.split_once('=').ok_or_else(|| format!("`{part}`: expected AXIS=SIZE"))?;
        let axis = AXES.iter().position(|axis| *axis == name.trim());
        let axis = axis.ok_or_else(|| format!("`{name}` is no axis; there are {}", AXES.join(", ")))?;
        let size: u32 = size.trim().parse().map_err(|_| format!("`{size}` is no number of devices"))?;
        if size == 0 || size > MAX_RANKS || sizes[axis].replace(size).is_some() {
            return Err(format!("`{part}`: sizes are 1 to {MAX_RANKS}, each axis once"));
        }
    }
    mesh_of(sizes.map(|size| size.unwrap_or(1))).ok_or_else(|| format!("`{text}` has more than {MAX_RANKS} devices"))
}

/// Most devices of a mesh.
pub const MAX_RANKS: u32 = 1024;

/// A mesh of the given data, pipe and tensor sizes; `None` beyond [`MAX_RANKS`].
pub fn mesh_of(sizes: [u32; 3]) -> Option<Mesh> {
    let ranks = sizes.iter().try_fold(1u32, |ranks, &size| ranks.checked_mul(size))?;
    let axes = AXES.iter().zip(sizes).map(|(name, size)| MeshAxis::new(name, size));
    (ranks > 0 && ranks <= MAX_RANKS).then(|| Mesh { axes: axes.filter(|axis| axis.size() > 1).collect() })
}

/// Meshes worth trying for so many devices: every divisor as data axis that the batch can fill, the rest tensor.
pub fn candidate_meshes(module: &Module, devices: u32, batch_dim: usize) -> Vec<Mesh> {
    let batch = module.entries.iter().filter_map(|entry| batch_size(entry, batch_dim)).min().unwrap_or(1);
    let fits = |data: &u32| devices.is_multiple_of(*data) && u64::from(*data) <= batch.max(1);
    (1..=devices).filter(fits).filter_map(|data| mesh_of([data, 1, devices / data])).collect()
}

/// The size of the batch dimension in the first input that has one.
fn batch_size(entry: &ir::Entry, batch_dim: usize) -> Option<u64> {
    entry.inputs.iter().find_map(|input| input.ty.dims.get(batch_dim)).map(|dim| dim.capacity())
}

/// Shards every entry of the module on the mesh that the settings fix.
///
/// # Errors
/// [`PassError::Unsupported`] for bounded dimensions; [`PassError::Invalid`] is a bug here.
pub fn run(Logical(module): Logical, settings: &Settings<'_>) -> Result<Sharded, PassError> {
    match &settings.shard.mesh {
        MeshChoice::Fixed(mesh) => place(module, mesh.clone(), settings).map(Sharded),
        MeshChoice::Devices(_) => Err(PassError::invalid("shard", "no mesh was chosen")),
    }
}

fn place(mut module: Module, mesh: Mesh, settings: &Settings<'_>) -> Result<Module, PassError> {
    let (options, target) = (&settings.shard, settings.target);
    module.mesh = mesh.clone();
    let mut weights = AddedWeights { first: module.weights.len() as u32, zeros: Vec::new() };
    let (mut graphs, mut entries) = (Vec::new(), Vec::new());
    for entry in &module.entries {
        let [graph] = entry.stages.as_slice() else {
            return Err(PassError::invalid("shard", format!("entry `{}` is sharded already", entry.name)));
        };
        let source = module.graph(*graph);
        let bounded = |value: &ir::Value| value.ty.dims.iter().any(|dim| matches!(dim, Dim::Bounded { .. }));
        if source.values().iter().any(bounded) {
            let hint = "bind the dimension to a fixed size with --dim".to_owned();
            let op = "a bounded dimension".to_owned();
            return Err(PassError::Unsupported { node: entry.name.clone(), op, hint });
        }
        let policy = Policy {
            mesh: &mesh,
            tensor: mesh.axis("tensor"),
            hints: hints::hints(source),
            split_table_bytes: options.split_table_bytes,
        };
        let inputs = place_inputs(&policy, entry, mesh.axis("data"), options.batch_dim);
        let stage_count = mesh.chunks(mesh.axis("pipe")) as usize;
        let stage_of = stages(source, stage_count, target);
        let empty = (0..stage_count).map(|stage| stage_graph(&mesh, source, stage, stage_count)).collect();
        let sharded = Walk::new(source, &policy, &stage_of, inputs, empty, &mut weights).run()?;
        let first = graphs.len() as u32;
        graphs.extend(sharded);
        let stages = (first..graphs.len() as u32).map(ir::GraphId).collect();
        entries.push(ir::Entry { stages, ..entry.clone() });
    }
    weights.finish(&mut module);
    Ok(Module { graphs, entries, ..module })
}

/// Inputs that share the batch dimension are split over the data axis, as far as the batch fills it.
fn place_inputs(policy: &Policy<'_>, entry: &ir::Entry, data: SubAxes, batch_dim: usize) -> Vec<Placement> {
    let batch = batch_size(entry, batch_dim);
    let place = |port: &ir::Port| {
        let own = port.ty.dims.get(batch_dim).map(|dim| dim.capacity());
        let over = own.filter(|_| own == batch).map(|size| (size, policy.fit(data, &single(size))));
        let splits =
            over.filter(|(_, over)| !over.is_empty()).map(|(size, over)| Split::simple(batch_dim as u8, over, size, 1));
        Placement { splits: splits.into_iter().collect(), partial: None }
    };
    entry.inputs.iter().map(place).collect()
}

/// An empty graph with the ranks of a stage.
fn stage_graph(mesh: &Mesh, source: &Graph, stage: usize, stages: usize) -> Graph {
    let pipe = mesh.axis("pipe");
    let ranks = (0..mesh.ranks()).filter(|&rank| mesh.chunk(pipe, rank) == stage as u64).collect();
    let name = if stages == 1 { source.name().to_owned() } else { format!("{}.{stage}", source.name()) };
    Graph::on_ranks(&name, ranks)
}

/// Cuts the nodes, in their order, into stages of about equal predicted time.
fn stages(graph: &Graph, count: usize, target: &Target) -> Vec<usize> {
    if count == 1 {
        return vec![0; graph.nodes().len()];
    }
    let times: Vec<u64> = graph.nodes().iter().map(|node| cost::node(graph, node, target).predicted_ns).collect();
    let total = times.iter().map(|&time| u128::from(time)).sum::<u128>().max(1);
    let mut before = 0u128;
    let stage = |&time: &u64| {
        let middle = before + u128::from(time) / 2;
        before += u128::from(time);
        ((middle * count as u128 / total) as usize).min(count - 1)
    };
    times.iter().map(stage).collect()
}
