//! Which boxes of which values of a recipe are needed for one box of its result, and their evaluation.

use std::collections::{BinaryHeap, HashMap};

use planfile::op::PadMode;
use planfile::{Dim, Expr, ExprOp, Op, RankScalar, Recipe, Spec, Tensor, TensorType, infer};

use super::reshape::{Cover, cover, gather};
use super::{RecipeError, Region, WeightBytes, ingredient};
use crate::view::{View, ViewMut};
use crate::{evaluate, execute};

/// Boxes that a reshape takes apart are bounded by this number per recipe; past it they are covered instead.
const MAX_DEMANDS: usize = 1 << 16;

/// One box of one value.
struct Demand {
    value: usize,
    region: Region,
    how: How,
    /// Demands that are evaluated before.
    needs: Vec<usize>,
}

/// How a box is made of those it needs.
enum How {
    /// Not decided yet.
    Open,
    Read,
    /// No elements.
    Empty,
    /// A primitive with attributes adjusted to the box.
    Apply(Op),
    /// A primitive on whole operands; the box is cut out of its result number `result`.
    Whole {
        op: Op,
        result: usize,
    },
    Reshape {
        first: u64,
        strides: Vec<u64>,
    },
}

/// A value of the spec: an input, or a node's result.
enum Origin {
    Input(usize),
    Result { node: usize, position: usize },
}

struct Values<'a> {
    recipe: &'a Recipe,
    types: Vec<TensorType>,
    origins: Vec<Origin>,
    result: usize,
}

impl<'a> Values<'a> {
    fn new(recipe: &'a Recipe) -> Result<Self, RecipeError> {
        let Recipe { inputs, spec } = recipe;
        let malformed = |why: String| RecipeError::Malformed(why);
        if !inputs.iter().map(|input| &input.ty).eq(&spec.inputs) {
            return Err(malformed("ingredients differ in type from what the primitives expect".to_owned()));
        }
        let types = spec.types().map_err(malformed)?;
        let mut origins: Vec<Origin> = (0..inputs.len()).map(Origin::Input).collect();
        for (node, step) in spec.nodes.iter().enumerate() {
            // Counted again for the positions; `types` above has proved that this succeeds.
            let operands: Vec<&TensorType> = step.operands.iter().map(|&operand| &types[operand as usize]).collect();
            let count = infer(&step.op, &operands).map_err(malformed)?.len();
            origins.extend((0..count).map(|position| Origin::Result { node, position }));
        }
        match spec.results.as_slice() {
            &[result] => Ok(Self { recipe, types, origins, result: result as usize }),
            results => Err(malformed(format!("{} results, not one", results.len()))),
        }
    }

    fn spec(&self) -> &Spec {
        &self.recipe.spec
    }
}

/// Type of a recipe's result.
pub(super) fn result_type(recipe: &Recipe) -> Result<TensorType, RecipeError> {
    let values = Values::new(recipe)?;
    Ok(values.types[values.result].clone())
}

/// All demands of one box of a recipe's result.
pub(super) struct Plan<'a> {
    values: Values<'a>,
    demands: Vec<Demand>,
    known: HashMap<(usize, Region), usize>,
    /// Open demands, latest value first; of one value the largest box first, since boxes are taken apart.
    open: BinaryHeap<(usize, u64, usize)>,
    /// Order of evaluation, backwards.
    order: Vec<usize>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(recipe: &'a Recipe, region: &Region) -> Result<Self, RecipeError> {
        let values = Values::new(recipe)?;
        if !region.fits(&values.types[values.result]) {
            return Err(RecipeError::Region { region: region.clone(), ty: values.types[values.result].clone() });
        }
        let (demands, known, open, order) = (Vec::new(), HashMap::new(), BinaryHeap::new(), Vec::new());
        let mut plan = Self { values, demands, known, open, order };
        plan.demand(plan.values.result, region.clone());
        while let Some((_, _, id)) = plan.open.pop() {
            let (how, needs) = plan.decide(id);
            plan.demands[id].how = how;
            plan.demands[id].needs = needs;
            plan.order.push(id);
        }
        Ok(plan)
    }

    pub(super) fn result_type(&self) -> &TensorType {
        &self.values.types[self.values.result]
    }

    fn demand(&mut self, value: usize, region: Region) -> usize {
        if let Some(&id) = self.known.get(&(value, region.clone())) {
            return id;
        }
        let id = self.demands.len();
        self.known.insert((value, region.clone()), id);
        self.open.push((value, region.elements(), id));
        self.demands.push(Demand { value, region, how: How::Open, needs: Vec::new() });
        id
    }

    /// How a box is made, and of what. Only boxes of earlier values, or smaller ones of the same, are demanded.
    fn decide(&mut self, id: usize) -> (How, Vec<usize>) {
        let Demand { value, region, .. } = &self.demands[id];
        let (value, region) = (*value, region.clone());
        if region.elements() == 0 {
            return (How::Empty, Vec::new());
        }
        let (node, position) = match self.values.origins[value] {
            Origin::Input(_) => return (How::Read, Vec::new()),
            Origin::Result { node, position } => (node, position),
        };
        let step = &self.values.spec().nodes[node];
        let (op, operands) = (step.op.clone(), step.operands.clone());
        let types: Vec<TensorType> =
            operands.iter().map(|&operand| self.values.types[operand as usize].clone()).collect();
        if let (Op::Reshape { .. }, Some(ty)) = (&op, types.first()) {
            let cover = cover(&ty.sizes(), &self.values.types[value].sizes(), &region);
            return self.reshape(value, &region, operands[0] as usize, cover);
        }
        let (how, regions) = match localise(&op, &types, &region) {
            Some((op, regions)) => (How::Apply(op), regions),
            None => {
                let regions = types.iter().map(|ty| Some(Region::whole(ty))).collect();
                (How::Whole { op, result: position }, regions)
            }
        };
        let wanted = operands.iter().zip(regions).filter_map(|(&operand, region)| Some((operand as usize, region?)));
        (how, wanted.collect::<Vec<_>>().into_iter().map(|(value, region)| self.demand(value, region)).collect())
    }

    fn reshape(&mut self, value: usize, region: &Region, operand: usize, cover: Cover) -> (How, Vec<usize>) {
        let wasteful = cover.region.elements() / 2 > region.elements();
        if let Some(axis) = cover.loose
            && wasteful
            && self.demands.len() as u64 + region.sizes[axis] <= MAX_DEMANDS as u64
        {
            let slices = (0..region.sizes[axis]).map(|offset| {
                let mut slice = region.clone();
                slice.starts[axis] += offset;
                slice.sizes[axis] = 1;
                slice
            });
            let needs = slices.collect::<Vec<_>>().into_iter().map(|slice| self.demand(value, slice)).collect();
            return (How::Apply(Op::Concat { axis: axis as u8 }), needs);
        }
        (How::Reshape { first: cover.first, strides: cover.strides }, vec![self.demand(operand, cover.region)])
    }

    /// What reading the ingredients costs, as bytes of a plain read. Saturates.
    pub(super) fn read_cost(&self) -> u64 {
        let cost = |demand: &Demand| match (&demand.how, &self.values.origins[demand.value]) {
            (How::Read, Origin::Input(input)) => ingredient::cost(&self.values.recipe.inputs[*input], &demand.region),
            _ => 0,
        };
        self.demands.iter().map(cost).fold(0, u64::saturating_add)
    }

    /// Evaluates everything; the box goes to `out`, whose length the caller checked.
    pub(super) fn evaluate_into(&self, bytes: &dyn WeightBytes, out: &mut [u8]) -> Result<(), RecipeError> {
        // The first demand is the box itself; read in place when it is part of an ingredient.
        if let (How::Read, Origin::Input(input)) = (&self.demands[0].how, &self.values.origins[self.values.result]) {
            return ingredient::read(&self.values.recipe.inputs[*input], &self.demands[0].region, bytes, out);
        }
        let mut readers = vec![0usize; self.demands.len()];
        for &need in self.demands.iter().flat_map(|demand| &demand.needs) {
            readers[need] += 1;
        }
        let mut tensors: Vec<Option<Tensor>> = self.demands.iter().map(|_| None).collect();
        for &id in self.order.iter().rev() {
            let demand = &self.demands[id];
            let operands: Option<Vec<&Tensor>> = demand.needs.iter().map(|&need| tensors[need].as_ref()).collect();
            let operands =
                operands.ok_or_else(|| RecipeError::Malformed("a value is read before it is made".to_owned()))?;
            // The box itself comes last: made in place, where the memory suits the type.
            if let (0, How::Apply(op)) = (id, &demand.how)
                && out.as_ptr().addr().is_multiple_of(self.result_type().dtype.bytes())
            {
                let operands: Vec<View<'_>> = operands.into_iter().map(View::from).collect();
                let ty = demand.region.ty(self.result_type().dtype);
                return Ok(execute(op, 0, &operands, &mut [ViewMut { ty: &ty, bytes: out }])?);
            }
            let tensor = self.evaluate(demand, &operands, bytes)?;
            for &need in &demand.needs {
                readers[need] -= 1;
                if readers[need] == 0 {
                    tensors[need] = None;
                }
            }
            tensors[id] = Some(tensor);
        }
        match tensors.first().and_then(Option::as_ref) {
            Some(tensor) if tensor.data.len() == out.len() => out.copy_from_slice(tensor.data.bytes()),
            _ => return Err(RecipeError::Malformed("the result has another length than its type".to_owned())),
        }
        Ok(())
    }

    fn evaluate(&self, demand: &Demand, operands: &[&Tensor], bytes: &dyn WeightBytes) -> Result<Tensor, RecipeError> {
        let ty = demand.region.ty(self.values.types[demand.value].dtype);
        let zeroed = || Tensor::zeroed(ty.clone()).ok_or_else(|| RecipeError::memory(&ty));
        match (&demand.how, &self.values.origins[demand.value]) {
            (How::Read, Origin::Input(input)) => {
                let mut tensor = zeroed()?;
                ingredient::read(&self.values.recipe.inputs[*input], &demand.region, bytes, tensor.data.bytes_mut())?;
                Ok(tensor)
            }
            (How::Apply(op), _) => nth(evaluate(op, operands)?, 0),
            (How::Whole { op, result }, _) => {
                let whole = nth(evaluate(op, operands)?, *result)?;
                if whole.ty.sizes() == demand.region.sizes {
                    return Ok(whole);
                }
                let starts = demand.region.starts.iter().map(|&start| RankScalar::Uniform(start as i64)).collect();
                let (steps, sizes) = (vec![1; demand.region.sizes.len()], demand.region.sizes.clone());
                nth(evaluate(&Op::Slice { starts, steps, sizes }, &[&whole])?, 0)
            }
            (How::Reshape { first, strides }, _) => {
                let mut tensor = zeroed()?;
                let from = operands.first().map_or(&[][..], |operand| operand.data.bytes());
                gather(from, *first, strides, &demand.region.sizes, ty.dtype.bytes(), tensor.data.bytes_mut());
                Ok(tensor)
            }
            (How::Empty | How::Open | How::Read, _) => zeroed(),
        }
    }
}

fn nth(mut results: Vec<Tensor>, position: usize) -> Result<Tensor, RecipeError> {
    let missing = || RecipeError::Malformed(format!("a primitive has no result {position}"));
    (position < results.len()).then(|| results.swap_remove(position)).ok_or_else(missing)
}

/// The primitive that makes just `region` (not empty), and the boxes of its operands; an operand without a box is left
/// out. `None` for primitives that need whole operands. Types were checked by inference.
fn localise(op: &Op, operands: &[TensorType], region: &Region) -> Option<(Op, Vec<Option<Region>>)> {
    let dims: Vec<Dim> = region.sizes.iter().copied().map(Dim::Static).collect();
    let broadcast = |ty: &TensorType| Some(behind_broadcast(ty, region));
    Some(match op {
        Op::Pointwise { expr, .. } => {
            let op = Op::Pointwise { expr: shift_indices(expr, &region.starts), dims };
            (op, operands.iter().map(broadcast).collect())
        }
        Op::Broadcast { .. } => (Op::Broadcast { dims }, operands.iter().map(broadcast).collect()),
        Op::Transpose { permutation } => {
            let mut operand = region.clone();
            for (axis, &from) in permutation.iter().enumerate() {
                operand.starts[usize::from(from)] = region.starts[axis];
                operand.sizes[usize::from(from)] = region.sizes[axis];
            }
            (op.clone(), vec![Some(operand)])
        }
        Op::Slice { starts, steps, .. } => {
            let (mut operand, mut local) = (region.clone(), Vec::new());
            for axis in 0..steps.len() {
                let at = |index: u64| Some(starts[axis].get(0)? + steps[axis] * index as i64);
                let (first, last) = (at(region.starts[axis])?, at(region.starts[axis] + region.sizes[axis] - 1)?);
                operand.starts[axis] = first.min(last).cast_unsigned();
                operand.sizes[axis] = first.abs_diff(last) + 1;
                local.push(RankScalar::Uniform(first - first.min(last)));
            }
            (Op::Slice { starts: local, steps: steps.clone(), sizes: region.sizes.clone() }, vec![Some(operand)])
        }
        Op::Concat { axis } => {
            let along = usize::from(*axis);
            let (mut offset, mut regions) = (0, Vec::new());
            let end = region.starts[along] + region.sizes[along];
            for ty in operands {
                let (low, high) = (region.starts[along].max(offset), end.min(offset + ty.size(along)));
                regions.push((low < high).then(|| {
                    let mut part = region.clone();
                    (part.starts[along], part.sizes[along]) = (low - offset, high - low);
                    part
                }));
                offset += ty.size(along);
            }
            (op.clone(), regions)
        }
        Op::Pad { low, high: _, mode: PadMode::Constant } => localise_pad(operands.first()?, low, region)?,
        _ => return None,
    })
}

/// `None` when coordinates overflow.
fn localise_pad(x: &TensorType, low: &[i64], region: &Region) -> Option<(Op, Vec<Option<Region>>)> {
    let mut operand = region.clone();
    let (mut lows, mut highs) = (Vec::new(), Vec::new());
    for (axis, &low) in low.iter().enumerate() {
        // The box in the operand's coordinates, then what of it exists. Sizes fit in 63 bits.
        let (size, len) = (x.size(axis) as i64, region.sizes[axis] as i64);
        let start = (region.starts[axis] as i64).checked_sub(low)?;
        let (first, last) = (start.clamp(0, size), start.checked_add(len)?.clamp(0, size));
        (operand.starts[axis], operand.sizes[axis]) = (first.cast_unsigned(), (last - first).cast_unsigned());
        let before = if first == last { len } else { first - start };
        lows.push(before);
        highs.push(len - before - (last - first));
    }
    let value = Region { starts: Vec::new(), sizes: Vec::new() };
    Some((Op::Pad { low: lows, high: highs, mode: PadMode::Constant }, vec![Some(operand), Some(value)]))
}

/// The box of an operand that is broadcast, from the box of the result.
fn behind_broadcast(ty: &TensorType, region: &Region) -> Region {
    let skipped = region.sizes.len() - ty.rank();
    let pick = |axis: usize| match ty.size(axis) {
        1 => (0, 1),
        _ => (region.starts[axis + skipped], region.sizes[axis + skipped]),
    };
    let (starts, sizes) = (0..ty.rank()).map(pick).unzip();
    Region { starts, sizes }
}

/// The expression with its indices counted from the start of the box.
fn shift_indices(expr: &Expr, starts: &[u64]) -> Expr {
    let shifted = expr.ops.iter().map(|op| match op {
        ExprOp::Index { axis, base } => {
            let start = starts[usize::from(*axis)] as i64;
            let base = match base {
                RankScalar::Uniform(base) => RankScalar::Uniform(base.wrapping_add(start)),
                RankScalar::ByRank(table) => {
                    RankScalar::ByRank(table.iter().map(|base| base.wrapping_add(start)).collect())
                }
            };
            ExprOp::Index { axis: *axis, base }
        }
        other => other.clone(),
    });
    Expr { ops: shifted.collect() }
}
