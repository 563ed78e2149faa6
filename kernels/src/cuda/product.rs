//! Matrix products by cuBLASLt: strides take transpositions, reshapes and slices of the operands along, and what
//! follows is done before the result is stored.
//!
//! before  %t = transpose %w [1, 0]        after  Matmul { m, n, k, strides of %x and %w, bias %b, Relu }
//!         %h = dot %x, %t {contract [1]x[0]}
//!         %y = pointwise %h, %b {max($0 + $1, 0.0)}

use planfile::plan::{Call, Library, Matmul, Matrix};
use planfile::types::strides;
use planfile::{DType, Op, Real, Spec, SpecNode, TensorType};

use super::epilogue::{Epilogue, epilogue};
use super::view::{Axis, View, merged, producer, view};
use super::{CudaTarget, Selected};

/// What the library may use beside operands and result.
const WORKSPACE_BYTES: u64 = 32 << 20;
/// Products of fewer multiplications are done before a workspace pays.
const SMALL_PRODUCT: u64 = 1 << 20;

/// A product, alone or with views before it and an epilogue or a transposition after it.
pub(super) fn select(spec: &Spec, target: &CudaTarget) -> Option<Selected> {
    let types = spec.types().ok()?;
    let dot = spec.nodes.iter().position(|node| matches!(node.op, Op::Dot { .. }))?;
    let node = &spec.nodes[dot];
    let Op::Dot { batch, contract, accumulate, .. } = &node.op else { return None };
    let (mut used, value) = (vec![dot], (spec.inputs.len() + dot) as u32);
    let ((a, a_nodes), (b, b_nodes)) = (view(spec, node.operands[0])?, view(spec, node.operands[1])?);
    used.extend(a_nodes.into_iter().chain(b_nodes));
    let sides = Sides::new(&a, &b, batch, contract)?;

    let &[result] = spec.results.as_slice() else { return None };
    let sizes = types[value as usize].sizes();
    let mut how = Epilogue::PLAIN;
    // Where each dimension of the product lies in the result.
    let mut at = strides(&sizes);
    match producer(spec, result).map(|last| (last, &spec.nodes[last])) {
        Some((last, SpecNode { op: Op::Transpose { permutation }, operands })) if *operands == [value] => {
            used.push(last);
            let moved: Vec<u64> = permutation.iter().map(|&from| sizes[usize::from(from)]).collect();
            for (&from, stride) in permutation.iter().zip(strides(&moved)) {
                at[usize::from(from)] = stride;
            }
        }
        _ if result != value => {
            let (found, nodes) = epilogue(spec, &types, value, sizes.len().checked_sub(1)?)?;
            how = found;
            used.extend(nodes);
        }
        _ => {}
    }
    used.sort_unstable();
    used.dedup();
    // Nothing may be left that this would not compute.
    if used.len() != spec.nodes.len() {
        return None;
    }
    let places: Vec<Axis> = sizes.iter().copied().zip(at).collect();
    let (batches, rest) = places.split_at(batch.len());
    let (rows, columns) = rest.split_at(sides.a_free.len());
    let (rows, columns, batches) = (merged(rows)?, merged(columns)?, merged(batches)?);
    let (m, n, k, count) = (rows.0, columns.0, sides.k().0, batches.0);
    let elements = [m, n, k, count].into_iter().try_fold(1u64, |product, size| product.checked_mul(size))?;
    if elements == 0 || [m, n, k, count].iter().any(|&size| size > i32::MAX as u64) {
        return None;
    }
    let left = matrix(&a, merged(&sides.a_free)?, merged(&sides.a_contract)?, merged(&sides.a_batch)?)?;
    let right = matrix(&b, merged(&sides.b_contract)?, merged(&sides.b_free)?, merged(&sides.b_batch)?)?;
    let whole = View { input: 0, offset: 0, axes: Vec::new() };
    let stored = matrix(&whole, rows, columns, batches).filter(|stored| stored.column_stride == 1)?;
    let out = &types[result as usize];
    let mut added = [how.bias, how.residual].into_iter().flatten();
    let fused = added.all(|operand| spec.inputs[operand as usize].dtype == out.dtype);
    let left_dtype = spec.inputs[a.input as usize].dtype;
    // Epilogues are made for results of the operands' type, and not for `f64`.
    let plain = how == Epilogue::PLAIN || (out.dtype == left_dtype && out.dtype != DType::F64);
    if !fused || !plain || !has_types(&spec.inputs, &a, &b, *accumulate, out.dtype) {
        return None;
    }
    let call = Call::Matmul(Matmul {
        m,
        n,
        k,
        batch: count,
        a: left,
        b: right,
        result: stored,
        scale: Real(how.scale),
        bias: how.bias,
        residual: how.residual,
        activation: how.activation,
        allow_tf32: target.allow_tf32,
    });
    call.check(&spec.inputs, std::slice::from_ref(out)).ok()?;
    let workspace_bytes = if elements < SMALL_PRODUCT { 0 } else { WORKSPACE_BYTES };
    Some(Selected::Library { library: Library::CublasLt, call, workspace_bytes })
}

/// The axes of both operands by the part they play.
struct Sides {
    a_batch: Vec<Axis>,
    a_free: Vec<Axis>,
    a_contract: Vec<Axis>,
    b_batch: Vec<Axis>,
    b_contract: Vec<Axis>,
    b_free: Vec<Axis>,
}

impl Sides {
    fn new(a: &View, b: &View, batch: &[(u8, u8)], contract: &[(u8, u8)]) -> Option<Self> {
        let pick = |view: &View, dims: &[u8]| -> Option<Vec<Axis>> {
            dims.iter().map(|&dim| view.axes.get(usize::from(dim)).copied()).collect()
        };
        let left = |pairs: &[(u8, u8)]| pairs.iter().map(|pair| pair.0).collect::<Vec<u8>>();
        let right = |pairs: &[(u8, u8)]| pairs.iter().map(|pair| pair.1).collect::<Vec<u8>>();
        let free = |view: &View, taken: &[u8]| {
            (0..view.axes.len() as u8).filter(|dim| !taken.contains(dim)).collect::<Vec<u8>>()
        };
        let a_free = free(a, &[left(batch), left(contract)].concat());
        let b_free = free(b, &[right(batch), right(contract)].concat());
        Some(Self {
            a_batch: pick(a, &left(batch))?,
            a_free: pick(a, &a_free)?,
            a_contract: pick(a, &left(contract))?,
            b_batch: pick(b, &right(batch))?,
            b_contract: pick(b, &right(contract))?,
            b_free: pick(b, &b_free)?,
        })
    }

    fn k(&self) -> Axis {
        (self.a_contract.iter().map(|axis| axis.0).product(), 0)
    }
}

/// A matrix of these rows and columns, if a library can read it: one of the strides is 1, the other skips no less than a
/// line.
fn matrix(view: &View, rows: Axis, columns: Axis, batch: Axis) -> Option<Matrix> {
    let place = |row_stride, column_stride| Matrix {
        operand: view.input,
        offset: view.offset,
        row_stride,
        column_stride,
        batch_stride: if batch.0 == 1 { 0 } else { batch.1 },
    };
    let row_stride = if rows.0 == 1 { rows.1.max(columns.0) } else { rows.1 };
    if (columns.1 == 1 || columns.0 == 1) && row_stride >= columns.0 {
        return Some(place(row_stride, 1));
    }
    let column_stride = if columns.0 == 1 { columns.1.max(rows.0) } else { columns.1 };
    ((rows.1 == 1 || rows.0 == 1) && column_stride >= rows.0).then(|| place(1, column_stride))
}

/// Whether the library multiplies these types.
fn has_types(inputs: &[TensorType], a: &View, b: &View, accumulate: DType, out: DType) -> bool {
    let [left, right] = [a, b].map(|view| inputs[view.input as usize].dtype);
    left == right
        && match left {
            DType::F64 => (accumulate, out) == (DType::F64, DType::F64),
            DType::F32 => (accumulate, out) == (DType::F32, DType::F32),
            DType::F16 | DType::BF16 => accumulate == DType::F32 && (out == left || out == DType::F32),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use planfile::plan::Activation;
    use planfile::{Binary, Dim, Expr, Scalar};

    use super::*;

    fn node(op: Op, operands: &[u32]) -> SpecNode {
        SpecNode { op, operands: operands.to_vec() }
    }

    fn dot(batch: &[(u8, u8)], contract: (u8, u8)) -> Op {
        Op::Dot { batch: batch.to_vec(), contract: vec![contract], accumulate: DType::F32, out: DType::F16 }
    }

    fn selected(inputs: &[&[u64]], nodes: Vec<SpecNode>) -> Option<Matmul> {
        let inputs: Vec<TensorType> = inputs.iter().map(|sizes| TensorType::new(DType::F16, sizes)).collect();
        let results = vec![(inputs.len() + nodes.len() - 1) as u32];
        let spec = Spec { inputs, nodes, results };
        spec.types().unwrap();
        match select(&spec, &CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false })? {
            Selected::Library { call: Call::Matmul(call), .. } => Some(call),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_linear_layer_with_bias_and_relu_is_one_call() {
        let zero = Expr::constant(Scalar::from_f64(DType::F16, 0.0));
        let expr = Expr::operand(0).binary(Binary::Add, Expr::operand(1)).binary(Binary::Max, zero);
        let dims = vec![Dim::Static(2), Dim::Static(16), Dim::Static(24)];
        let nodes = vec![
            node(Op::Transpose { permutation: vec![1, 0] }, &[1]),
            node(dot(&[], (2, 0)), &[0, 3]),
            node(Op::Pointwise { expr, dims }, &[4, 2]),
        ];
        let call = selected(&[&[2, 16, 32], &[24, 32], &[24]], nodes).unwrap();
        assert_eq!([call.m, call.n, call.k, call.batch], [32, 24, 32, 1]);
        assert_eq!((call.b.row_stride, call.b.column_stride), (1, 32));
        assert_eq!((call.bias, call.activation), (Some(2), Activation::Relu));
    }

    #[test]
    fn heads_are_a_batch_of_strides() {
        // Scores of one sequence: [S, H, D] read as [H, S, D].
        let heads = Op::Transpose { permutation: vec![1, 0, 2] };
        let nodes = vec![node(heads.clone(), &[0]), node(heads, &[1]), node(dot(&[(0, 0)], (2, 2)), &[2, 3])];
        let call = selected(&[&[16, 4, 8], &[16, 4, 8]], nodes).unwrap();
        assert_eq!([call.m, call.n, call.k, call.batch], [16, 16, 8, 4]);
        assert_eq!((call.a.row_stride, call.a.batch_stride), (32, 8));
        assert_eq!((call.b.row_stride, call.b.column_stride, call.b.batch_stride), (1, 32, 8));
    }

    #[test]
    fn a_transposed_result_is_stored_so() {
        // Probabilities times values, stored as [S, H, E].
        let nodes =
            vec![node(dot(&[(0, 0)], (2, 1)), &[0, 1]), node(Op::Transpose { permutation: vec![1, 0, 2] }, &[2])];
        let call = selected(&[&[4, 16, 16], &[4, 16, 8]], nodes).unwrap();
        assert_eq!((call.result.row_stride, call.result.batch_stride), (32, 8));
    }

    #[test]
    fn a_product_that_is_broadcast_afterwards_is_refused() {
        let zero = Expr::constant(Scalar::from_f64(DType::F16, 0.0));
        let expr = Expr::operand(0).binary(Binary::Max, zero);
        let dims = [8, 6].map(Dim::Static).to_vec();
        let nodes = vec![node(dot(&[], (1, 0)), &[0, 1]), node(Op::Pointwise { expr, dims }, &[2])];
        assert_eq!(selected(&[&[1, 4], &[4, 6]], nodes), None);
    }

    #[test]
    fn what_strides_cannot_say_is_refused() {
        let two_batches = vec![
            node(Op::Transpose { permutation: vec![0, 2, 1, 3] }, &[0]),
            node(dot(&[(0, 0), (1, 1)], (3, 3)), &[2, 1]),
        ];
        assert_eq!(selected(&[&[2, 16, 4, 8], &[2, 4, 16, 8]], two_batches), None);
        let empty = vec![node(dot(&[], (1, 0)), &[0, 1])];
        assert_eq!(selected(&[&[4, 0], &[0, 8]], empty), None);
    }
}
