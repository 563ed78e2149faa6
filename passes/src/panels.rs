//! Chooses how weights lie in memory: for products on the host, in the panels that their tiles read.
//!
//! before  %y = conv %x, %w        after  %t = transpose %w2 [0, 2, 1]        # %w2's recipe: panels of %w's
//!                                        %u: f32[64, 64, 3, 3] = reshape %t
//!                                        %y = conv %x, %u
//!
//! What follows `%w2` there undoes its layout. It becomes part of the product's kernel, see [`crate::fuse`], which
//! reads the panels where they are: nothing is packed at run time.

use std::collections::HashMap;

use cpu::panels::{Packing, packing};
use ir::{Derived, Edit, Graph, IrError, Module, Node, Placement, Shard, ValueDef, ValueId, Weight, WeightId};
use planfile::{Buffer, DType, Op, Recipe, RecipeInput, Source, SpecNode, TensorType};

use crate::error::PassError;
use crate::phase::Sharded;
use crate::settings::Settings;

const NAME: &str = "panels";

/// Lays out the weights of products that every rank holds whole and nobody wants otherwise, for the host.
///
/// # Errors
/// [`PassError::Invalid`] if a weight's panels do not have the type they should.
pub fn run(Sharded(mut module): Sharded, settings: &Settings<'_>) -> Result<Sharded, PassError> {
    if !settings.target.device.architecture.is_host() {
        return Ok(Sharded(module));
    }
    let wanted = wanted(&module);
    let mut packed = Derived::new(&mut module.weights);
    for graph in &mut module.graphs {
        *graph = graph.rewrite(|edit, node| {
            let Some((id, packing)) = choose(&edit.old(), node) else { return Ok(edit.keep(node)?) };
            if wanted.get(&id) != Some(&Some(packing.clone())) {
                return Ok(edit.keep(node)?);
            }
            let panels = packed.get(id, (), |weight| pack(weight, &packing))?;
            unpacked(edit, node, panels, &packing).map_err(PassError::from)
        })?;
    }
    Ok(Sharded(module.without_unread_weights()))
}

/// For each weight the packing that all who read it want; none where they differ.
fn wanted(module: &Module) -> HashMap<WeightId, Option<Packing>> {
    let mut wanted: HashMap<WeightId, Option<Packing>> = HashMap::new();
    for graph in &module.graphs {
        for node in graph.nodes() {
            let chosen = choose(graph, node);
            for &operand in &node.operands {
                let ValueDef::Weight(id) = graph.value(operand).def else { continue };
                let own = chosen.as_ref().filter(|chosen| chosen.0 == id).map(|chosen| chosen.1.clone());
                let known = wanted.entry(id).or_insert_with(|| own.clone());
                if *known != own {
                    *known = None;
                }
            }
        }
        for output in graph.outputs() {
            if let ValueDef::Weight(id) = graph.value(output.value).def {
                wanted.insert(id, None);
            }
        }
    }
    wanted
}

/// The weight of a product, and the panels that suit it.
fn choose(graph: &Graph, node: &Node) -> Option<(WeightId, Packing)> {
    let &[_, operand] = node.operands.as_slice() else { return None };
    let value = graph.value(operand);
    let ValueDef::Weight(id) = value.def else { return None };
    let whole = value.shard.as_ref().is_none_or(|shard| shard.placement == Placement::replicated());
    packing(&node.op, &value.ty).filter(|_| whole).map(|packing| (id, packing))
}

/// The weight in panels.
fn pack(weight: &Weight, packing: &Packing) -> Result<Weight, PassError> {
    let Recipe { mut inputs, mut spec } = weight.recipe.clone();
    let [last] = spec.results.as_slice() else { return Err(PassError::invalid(NAME, "a recipe has several results")) };
    let mut last = *last;
    // Zero to pad with: inputs come first, so what nodes define moves up.
    let zero = spec.inputs.len() as u32;
    let moved = |value: u32| if value >= zero { value + 1 } else { value };
    let scalar = TensorType::new(DType::F32, &[]);
    inputs.push(RecipeInput { ty: scalar.clone(), source: Source::Inline(Buffer::from_bytes(&[0; 4])) });
    spec.inputs.push(scalar);
    for node in &mut spec.nodes {
        node.operands.iter_mut().for_each(|operand| *operand = moved(*operand));
    }
    last = moved(last);
    let defined = spec.types().map_err(|why| PassError::invalid(NAME, why))?.len() as u32;
    for (op, next) in packing.pack.iter().zip(defined..) {
        let operands = if matches!(op, Op::Pad { .. }) { vec![last, zero] } else { vec![last] };
        spec.nodes.push(SpecNode { op: op.clone(), operands });
        last = next;
    }
    spec.results = vec![last];
    match spec.result_types() {
        Ok(types) if types.as_slice() == std::slice::from_ref(&packing.ty) => {
            let recipe = Recipe { inputs, spec };
            Ok(Weight { name: weight.name.clone(), ty: packing.ty.clone(), recipe })
        }
        Ok(_) => Err(PassError::invalid(NAME, format!("panels of {} are no {}", weight.ty, packing.ty))),
        Err(why) => Err(PassError::invalid(NAME, why)),
    }
}

/// The node on what undoes the panels of its weight.
fn unpacked(edit: &mut Edit<'_>, node: &Node, panels: WeightId, packing: &Packing) -> Result<Vec<ValueId>, IrError> {
    let mut operands = edit.operands(node)?;
    // Everything here is whole on each rank.
    let sharded = edit.new_graph().value(operands[1]).shard.is_some();
    let shard = sharded.then(|| Shard { global: packing.ty.sizes(), placement: Placement::replicated() });
    operands[1] = edit.add_placed_source(packing.ty.clone(), ValueDef::Weight(panels), shard);
    for op in &packing.unpack {
        operands[1] = edit.add_one(op.clone(), &operands[1..], &node.origin)?;
    }
    edit.add(node.op.clone(), &operands, &node.origin)
}

#[cfg(test)]
mod tests {
    use cpu::recipe::{NoFiles, read_all};
    use ir::{Mesh, MeshAxis, Value};
    use planfile::Tensor;

    use super::*;
    use crate::fuse::regions;
    use crate::harness::{CPU, Case, H200, Machine, parse};
    use crate::phase::Logical;

    fn selected(text: &str, target: &str) -> Module {
        Case::new(run, target).within(1e-5).run(text)
    }

    /// A product with a weight whose columns do not fill the last panel.
    const PRODUCT: &str = "%x: f32[4, 64]
        %w: f32[64, 70] = weight file 0 at 0
        %y = dot %x, %w {contract [1]x[0]}
        return %y";

    fn shapes(module: &Module) -> Vec<String> {
        let weight = |value: &&Value| matches!(value.def, ValueDef::Weight(_));
        module.graphs[0].values().iter().filter(weight).map(|value| value.ty.to_string()).collect()
    }

    /// The number of nodes of each step on the host.
    fn steps(module: &Module) -> Vec<usize> {
        let regions = regions(&module.graphs[0], None).unwrap();
        regions.into_iter().flatten().map(|region| region.nodes.len()).collect()
    }

    #[test]
    fn a_product_s_weight_lies_in_panels_that_its_kernel_undoes() {
        let module = selected(PRODUCT, CPU);
        assert_eq!(shapes(&module), ["f32[3, 64, 32]"]);
        let names: Vec<&str> = module.graphs[0].nodes().iter().map(|node| node.op.name()).collect();
        assert_eq!(names, ["transpose", "reshape", "slice", "reshape", "dot"]);
        assert_eq!(steps(&module), [5]);
    }

    #[test]
    fn other_devices_and_other_readers_keep_the_weight() {
        assert_eq!(shapes(&selected(PRODUCT, H200)), ["f32[64, 70]"]);
        let looked_up = "%x: f32[4, 64]
            %i: i64[4]
            %w: f32[64, 70] = weight file 0 at 0
            %y = dot %x, %w {contract [1]x[0]}
            %z = gather %w, %i {axis 0}
            return %y, %z";
        assert_eq!(shapes(&selected(looked_up, CPU)), ["f32[64, 70]"]);
    }

    #[test]
    fn two_products_share_panels() {
        let module = selected(
            "%x: f32[4, 64]
             %w: f32[64, 64] = weight file 0 at 0
             %y = dot %x, %w {contract [1]x[0]}
             %z = dot %y, %w {contract [1]x[0]}
             return %z",
            CPU,
        );
        assert_eq!(module.weights.len(), 1);
        assert_eq!(steps(&module), [4, 4]);
    }

    /// A recipe with nodes of its own, and an ingredient between them, is continued correctly.
    #[test]
    fn panels_hold_the_weight_s_elements() {
        let source = Tensor::from_elements(&[70, 64], &(0..70 * 64).map(|i| i as f32).collect::<Vec<_>>()).unwrap();
        let transpose = Op::Transpose { permutation: vec![1, 0] };
        let ingredient = RecipeInput { ty: source.ty.clone(), source: Source::Inline(source.data.clone()) };
        let spec = planfile::Spec::of(transpose.clone(), vec![source.ty.clone()]).unwrap();
        let recipe = Recipe { inputs: vec![ingredient], spec };
        let whole = cpu::evaluate(&transpose, &[&source]).unwrap().remove(0);
        let weight = Weight { name: "w".into(), ty: whole.ty.clone(), recipe };
        let op = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate: DType::F32, out: DType::F32 };
        let packing = packing(&op, &weight.ty).unwrap();
        let panels = read_all(&pack(&weight, &packing).unwrap().recipe, &NoFiles).unwrap();
        let unpacked =
            packing.unpack.iter().fold(panels, |panels, op| cpu::evaluate(op, &[&panels]).unwrap().remove(0));
        assert_eq!(unpacked, whole);
    }

    #[test]
    fn a_split_weight_keeps_its_layout() {
        let axes = vec![MeshAxis { name: "tensor".into(), factors: vec![2] }];
        let machine = Machine::new(CPU).with_mesh(Mesh { axes });
        let settings = machine.settings();
        let sharded = crate::shard::run(Logical(parse(PRODUCT)), &settings).unwrap();
        let selected = run(sharded.clone(), &settings).unwrap();
        assert_eq!(shapes(&selected.0), shapes(&sharded.0));
    }
}
