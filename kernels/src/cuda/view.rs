//! Values of a specification that are only other views of an input: where their elements lie.

use planfile::types::strides;
use planfile::{Op, Spec};

/// A dimension of a view: its size and the distance between neighbours, in elements.
pub(super) type Axis = (u64, u64);

/// Elements of an input, seen in another order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    /// Which input of the specification.
    pub(super) input: u32,
    /// Of the first element.
    pub(super) offset: u64,
    pub(super) axes: Vec<Axis>,
}

/// The view that a value of the specification is, with the positions of the nodes that make it so; none where anything
/// is computed, or where no strides say it.
pub(super) fn view(spec: &Spec, value: u32) -> Option<(View, Vec<usize>)> {
    let mut chain = Vec::new();
    let mut source = value;
    while let Some(position) = producer(spec, source) {
        chain.push(position);
        let [operand] = spec.nodes[position].operands.as_slice() else { return None };
        source = *operand;
    }
    let ty = spec.inputs.get(source as usize)?;
    let sizes = ty.sizes();
    let mut view = View { input: source, offset: 0, axes: sizes.iter().copied().zip(strides(&sizes)).collect() };
    for &position in chain.iter().rev() {
        view = view.after(&spec.nodes[position].op)?;
    }
    Some((view, chain))
}

/// The node that makes a value, where all nodes have one result.
pub(super) fn producer(spec: &Spec, value: u32) -> Option<usize> {
    (value as usize).checked_sub(spec.inputs.len()).filter(|&position| position < spec.nodes.len())
}

impl View {
    fn after(self, op: &Op) -> Option<Self> {
        let Self { input, mut offset, axes } = self;
        let axes = match op {
            Op::Transpose { permutation } => {
                permutation.iter().map(|&from| axes.get(usize::from(from)).copied()).collect::<Option<_>>()?
            }
            Op::Reshape { dims } => reshaped(&axes, &dims.iter().map(|dim| dim.capacity()).collect::<Vec<_>>())?,
            Op::Broadcast { dims } => {
                let added = dims.len().checked_sub(axes.len())?;
                let old = |position: usize| position.checked_sub(added).map_or((1, 0), |position| axes[position]);
                let axis = |(position, size): (usize, u64)| match old(position) {
                    (1, _) if size != 1 => (size, 0),
                    same => same,
                };
                dims.iter().map(|dim| dim.capacity()).enumerate().map(axis).collect()
            }
            Op::Slice { starts, steps, sizes } => {
                let mut sliced = Vec::with_capacity(axes.len());
                for (dim, &(_, stride)) in axes.iter().enumerate() {
                    let planfile::RankScalar::Uniform(start) = starts.get(dim)? else { return None };
                    offset = offset.checked_add(u64::try_from(*start).ok()?.checked_mul(stride)?)?;
                    let step = u64::try_from(*steps.get(dim)?).ok()?;
                    sliced.push((*sizes.get(dim)?, stride.checked_mul(step)?));
                }
                sliced
            }
            _ => return None,
        };
        Some(Self { input, offset, axes })
    }
}

/// The same elements in the same order under other sizes, if strides can say it.
pub(super) fn reshaped(axes: &[Axis], sizes: &[u64]) -> Option<Vec<Axis>> {
    // Runs of axes that lie as one, then the new sizes cut from them.
    let mut runs: Vec<Axis> = Vec::new();
    for &(size, stride) in axes.iter().filter(|(size, _)| *size != 1) {
        match runs.last_mut() {
            Some(last) if last.1 == stride * size => *last = (last.0 * size, stride),
            _ => runs.push((size, stride)),
        }
    }
    let mut cut = Vec::with_capacity(sizes.len());
    let mut runs = runs.into_iter();
    let mut left: Axis = (1, 0);
    for &size in sizes {
        if size == 1 {
            cut.push((1, 0));
            continue;
        }
        if left.0 == 1 {
            left = runs.next()?;
        }
        if size == 0 || !left.0.is_multiple_of(size) {
            return None;
        }
        left.0 /= size;
        cut.push((size, left.0 * left.1));
    }
    (left.0 == 1 && runs.next().is_none()).then_some(cut)
}

/// Several axes as one, outermost first, if they lie so; axes of one element do not matter.
pub(super) fn merged(axes: &[Axis]) -> Option<Axis> {
    let mut merged: Option<Axis> = None;
    for &(size, stride) in axes.iter().filter(|(size, _)| *size != 1) {
        merged = Some(match merged {
            None => (size, stride),
            Some((count, outer)) if outer == stride * size => (count * size, stride),
            Some(_) => return None,
        });
    }
    Some(merged.unwrap_or((1, 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshapes_cut_and_merge_where_strides_allow() {
        let dense = [(6, 20), (4, 5), (5, 1)];
        assert_eq!(reshaped(&dense, &[120]), Some(vec![(120, 1)]));
        assert_eq!(reshaped(&dense, &[2, 1, 3, 20]), Some(vec![(2, 60), (1, 0), (3, 20), (20, 1)]));
        let transposed = [(4, 5), (6, 20), (5, 1)];
        assert_eq!(reshaped(&transposed, &[2, 2, 6, 5]), Some(vec![(2, 10), (2, 5), (6, 20), (5, 1)]));
        assert_eq!(reshaped(&transposed, &[24, 5]), None);
        assert_eq!(reshaped(&dense, &[7, 20]), None);
    }

    #[test]
    fn axes_merge_where_they_lie_as_one() {
        assert_eq!(merged(&[(6, 20), (1, 7), (20, 1)]), Some((120, 1)));
        assert_eq!(merged(&[(6, 40), (20, 1)]), None);
        assert_eq!(merged(&[(6, 0), (20, 0)]), Some((120, 0)));
        assert_eq!(merged(&[]), Some((1, 0)));
    }
}
