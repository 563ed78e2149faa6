//! What the generated source looks like, and what is refused. Results are compared with the CPU where devices are.

use planfile::op::{PoolKind, Window};
use planfile::{Binary, DType, Dim, Expr, ExprOp, Op, RankScalar, Scalar, Spec, SpecNode, TensorType, Unary};

use super::{CudaTarget, Launch, accepts_fusion, select};

fn dims(sizes: &[u64]) -> Vec<Dim> {
    sizes.iter().copied().map(Dim::Static).collect()
}

fn f16(sizes: &[u64]) -> TensorType {
    TensorType::new(DType::F16, sizes)
}

fn generate(spec: &Spec) -> Option<Launch> {
    select(spec, &CudaTarget { architecture: "sm_90a".parse().unwrap(), allow_tf32: false })
}

/// The function alone, without what all kernels begin with.
fn body(spec: &Spec) -> String {
    let source = generate(spec).unwrap().source;
    source[source.find("extern \"C\"").unwrap()..].to_owned()
}

/// A specification of these nodes; the last value is the result.
fn chain(inputs: Vec<TensorType>, nodes: Vec<(Op, Vec<u32>)>) -> Spec {
    let results = vec![(inputs.len() + nodes.len()) as u32 - 1];
    let nodes = nodes.into_iter().map(|(op, operands)| SpecNode { op, operands }).collect();
    Spec { inputs, nodes, results }
}

fn unary(op: Unary, sizes: &[u64]) -> Op {
    Op::Pointwise { expr: Expr::operand(0).unary(op), dims: dims(sizes) }
}

fn add(sizes: &[u64]) -> Op {
    Op::Pointwise { expr: Expr::operand(0).binary(Binary::Add, Expr::operand(1)), dims: dims(sizes) }
}

fn slice(starts: &[i64], sizes: &[u64]) -> Op {
    let starts: Vec<RankScalar> = starts.iter().copied().map(RankScalar::Uniform).collect();
    Op::Slice { steps: vec![1; starts.len()], starts, sizes: sizes.to_vec() }
}

#[test]
fn a_bias_and_an_activation() {
    let sizes = [1024, 16, 16];
    let relu = Expr::operand(0).binary(Binary::Max, Expr::constant(Scalar::from_f64(DType::F16, 0.0)));
    let relu = Op::Pointwise { expr: relu, dims: dims(&sizes) };
    let spec = chain(vec![f16(&sizes), f16(&[16, 16])], vec![(add(&sizes), vec![0, 1]), (relu, vec![2])]);
    let expected = r#"extern "C" __global__ void __launch_bounds__(256) pointwise(
    const f16* __restrict__ x0,
    const f16* __restrict__ x1,
    f16* __restrict__ y0) {
    const Index i = (blockIdx.x * 256u + threadIdx.x) * 8u;
    f32 v2[8];
    const Pack<f16, 8> k1 = *reinterpret_cast<const Pack<f16, 8>*>(x0 + (i));
    #pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        v2[j] = widen(k1.at[j]);
    }
    f32 v4[8];
    const Pack<f16, 8> k3 = *reinterpret_cast<const Pack<f16, 8>*>(x1 + (i % 256u));
    #pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        v4[j] = widen(k3.at[j]);
    }
    f32 v5[8];
    #pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        const f32 e6 = round_to<f16>(scalar::add(v2[j], v4[j]));
        v5[j] = e6;
    }
    f32 v7[8];
    #pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        const f32 e8 = round_to<f16>(scalar::larger(v5[j], 0.0f));
        v7[j] = e8;
    }
    Pack<f16, 8> k9;
    #pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        k9.at[j] = narrow<f16>(v7[j]);
    }
    *reinterpret_cast<Pack<f16, 8>*>(y0 + i) = k9;
}
"#;
    assert_eq!(body(&spec), expected);
    let launch = generate(&spec).unwrap();
    assert_eq!((launch.blocks(&spec), launch.rule.block), (128, [256, 1, 1]));
}

#[test]
fn widths_follow_alignment() {
    // A bias for each channel is one element for all lanes; a column of strides is read element by element.
    let sizes = [64, 32, 64];
    let text = body(&chain(vec![f16(&sizes), f16(&[32, 1])], vec![(add(&sizes), vec![0, 1])]));
    assert!(text.contains("widen(x1[i / 64u % 32u])"), "{text}");
    // An odd number of elements has no packs.
    let text = body(&chain(vec![f16(&[131_073])], vec![(unary(Unary::Neg, &[131_073]), vec![0])]));
    assert!(!text.contains("Pack") && text.contains("if (i >= 131073u) return;"), "{text}");
    // An offset of four elements of two bytes: eight bytes at a time.
    let text = body(&chain(vec![f16(&[4096, 72])], vec![(slice(&[0, 4], &[4096, 64]), vec![0])]));
    assert!(text.contains("const Pack<u16, 4> part"), "{text}");
    // Transposed: one element at a time, from a stride.
    let transpose = Op::Transpose { permutation: vec![1, 0] };
    let text = body(&chain(vec![f16(&[512, 512])], vec![(transpose, vec![0])]));
    assert!(text.contains("+ j * (512u)"), "{text}");
}

#[test]
fn heads_split_and_merge_in_packs() {
    // [B, S, H·D] → [B, H, S, D]: consecutive features stay together, so that memory is read in packs.
    let split = Op::Reshape { dims: dims(&[4, 128, 8, 64]) };
    let transpose = Op::Transpose { permutation: vec![0, 2, 1, 3] };
    let merge = Op::Reshape { dims: dims(&[32, 128, 64]) };
    let text = body(&chain(vec![f16(&[4, 128, 512])], vec![(split, vec![0]), (transpose, vec![1]), (merge, vec![2])]));
    assert!(text.contains("const Pack<u16, 8>*>(x0 + ("), "{text}");
    assert!(!text.contains("const Index p"), "{text}");
}

#[test]
fn concatenations_branch_for_all_lanes_at_once() {
    let inputs = vec![f16(&[4096, 64]), f16(&[4096, 32])];
    let text = body(&chain(inputs, vec![(Op::Concat { axis: 1 }, vec![0, 1])]));
    assert!(text.contains("if (i % 96u < 64u) {") && text.contains("Pack<u16, 8>*>(x1 + ("), "{text}");
    let inputs = vec![f16(&[1024, 61]), f16(&[1024, 35])];
    let text = body(&chain(inputs, vec![(Op::Concat { axis: 1 }, vec![0, 1])]));
    assert!(text.contains("= i + j;") && !text.contains("const Pack"), "{text}");
}

#[test]
fn large_tensors_keep_several_loads_in_flight() {
    let sizes = [4096, 4096];
    let spec = chain(vec![f16(&sizes)], vec![(unary(Unary::Tanh, &sizes), vec![0])]);
    let launch = generate(&spec).unwrap();
    assert!(launch.source.contains("for (u32 u = 0; u < 4u; ++u)") && !launch.source.contains("return;\n    f32"));
    assert_eq!(launch.blocks(&spec), 4096 * 4096 / 8 / 256 / 4);
    // Positions beyond 31 bits.
    let sizes = [1 << 16, 1 << 15];
    let launch = generate(&chain(vec![f16(&sizes)], vec![(unary(Unary::Tanh, &sizes), vec![0])])).unwrap();
    assert!(launch.source.contains("typedef u64 Index;"));
}

#[test]
fn numbers_that_differ_by_rank_are_parameters() {
    let start = RankScalar::ByRank(vec![0, 8]);
    let part = Op::Slice { starts: vec![start.clone()], steps: vec![1], sizes: vec![8] };
    let index = Expr { ops: vec![ExprOp::Index { axis: 0, base: start }, ExprOp::Cast(DType::F16)] };
    let index = Op::Pointwise { expr: index.binary(Binary::Mul, Expr::operand(0)), dims: dims(&[8]) };
    let launch = generate(&chain(vec![f16(&[16])], vec![(part, vec![0]), (index, vec![1])])).unwrap();
    assert!(launch.source.contains("const i64 s0)"), "{}", launch.source);
}

#[test]
fn nothing_is_a_launch_that_does_nothing() {
    let spec = chain(vec![f16(&[0, 3])], vec![(unary(Unary::Neg, &[0, 3]), vec![0])]);
    let launch = generate(&spec).unwrap();
    assert_eq!(launch.blocks(&spec), 1);
    assert!(launch.source.ends_with("y0) {\n}\n"), "{}", launch.source);
}

#[test]
fn refuses_what_others_compute() {
    let softmax = Op::Softmax { axis: 0, log: false };
    assert_eq!(generate(&chain(vec![f16(&[8])], vec![(softmax, vec![0])])), None);
    let top = Op::TopK { axis: 0, k: 2, largest: true, sorted: true };
    assert_eq!(generate(&Spec::of(top, vec![f16(&[8])]).unwrap()), None);
    // Results of different shapes are no elements of one thread.
    let mut spec = chain(vec![f16(&[8])], vec![(unary(Unary::Neg, &[8]), vec![0]), (slice(&[0], &[4]), vec![1])]);
    assert!(generate(&spec).is_some());
    spec.results = vec![1, 2];
    assert_eq!(generate(&spec), None);
    let one = |n| vec![n; 1];
    let window = Window { sizes: one(2), strides: one(1), dilations: one(1), pads: vec![(0, 0)] };
    let pool = Op::Pool { kind: PoolKind::Average { count_pads: false }, window, ceil: false, indices: None };
    let of = |dtype| Spec::of(pool.clone(), vec![TensorType::new(dtype, &[1, 1, 8])]).unwrap();
    assert!(generate(&of(DType::F16)).is_some());
    assert_eq!(generate(&of(DType::I32)), None);
}

#[test]
fn fuses_what_computes_nothing_twice() {
    let sizes = [64, 64];
    let exp = || unary(Unary::Exp, &sizes);
    // A diamond at one position, and each half of a value once.
    let diamond = vec![(exp(), vec![0]), (exp(), vec![1]), (exp(), vec![1]), (add(&sizes), vec![2, 3])];
    assert!(accepts_fusion(&chain(vec![f16(&sizes)], diamond)));
    let halves = [slice(&[0, 32], &[64, 32]), slice(&[0, 0], &[64, 32])];
    let [right, left] = halves;
    let rotated = vec![(exp(), vec![0]), (right, vec![1]), (left, vec![1]), (Op::Concat { axis: 1 }, vec![2, 3])];
    assert!(accepts_fusion(&chain(vec![f16(&sizes)], rotated.clone())));
    // The same beside the value itself would compute it twice for each element.
    let twice = [rotated, vec![(add(&sizes), vec![1, 4])]].concat();
    assert!(!accepts_fusion(&chain(vec![f16(&sizes)], twice)));
}

#[test]
fn refuses_to_fuse_what_is_read_more_often_than_it_has_elements() {
    let sizes = [64, 64];
    let row = unary(Unary::Exp, &[64]);
    assert!(!accepts_fusion(&chain(vec![f16(&[64]), f16(&sizes)], vec![(row, vec![0]), (add(&sizes), vec![1, 2])])));
    let exp = unary(Unary::Exp, &sizes);
    let indices = TensorType::new(DType::I64, &[200]);
    let gather = Op::Gather { axis: 0 };
    assert!(!accepts_fusion(&chain(vec![f16(&sizes), indices], vec![(exp.clone(), vec![0]), (gather, vec![2, 1])])));
    // Loops share nothing between threads, long expressions run out of registers.
    let sum = Op::Reduce { kind: planfile::op::ReduceKind::Mean, axes: vec![1], keep: false };
    assert!(!accepts_fusion(&chain(vec![f16(&sizes)], vec![(exp.clone(), vec![0]), (sum, vec![1])])));
    let long = (0..200).map(|n| (exp.clone(), vec![n])).collect();
    assert!(!accepts_fusion(&chain(vec![f16(&sizes)], long)));
}

#[test]
fn gathers_report_indices_that_are_outside() {
    let indices = |sizes: &[u64]| TensorType::new(DType::I64, sizes);
    let spec = chain(
        vec![f16(&[10, 7]), indices(&[3])],
        vec![(Op::Gather { axis: 0 }, vec![0, 1]), (unary(Unary::Tanh, &[3, 7]), vec![2])],
    );
    let text = body(&spec);
    assert!(text.contains("y0,\n    u32* __restrict__ fault) {"), "{text}");
    // Threads beyond the last element have returned before.
    let (end, check) = (text.find("if (i >= 21u) return;").unwrap(), text.find(", 10, fault);").unwrap());
    assert!(end < check, "{text}");
    // The word comes after numbers that differ by rank.
    let part = Op::Slice { starts: vec![RankScalar::ByRank(vec![0, 5])], steps: vec![1], sizes: vec![5] };
    let spec = chain(vec![f16(&[10]), indices(&[3])], vec![(part, vec![0]), (Op::Gather { axis: 0 }, vec![2, 1])]);
    let text = body(&spec);
    assert!(text.contains("const i64 s0,\n    u32* __restrict__ fault) {"), "{text}");
    // Each level of an index tuple has a bound of its own.
    let text = body(&Spec::of(Op::GatherNd { batch: 0 }, vec![f16(&[4, 5, 6]), indices(&[7, 2])]).unwrap());
    assert!(text.contains(", 4, fault)") && text.contains(", 5, fault)"), "{text}");
    let text = body(&chain(vec![f16(&[8])], vec![(unary(Unary::Neg, &[8]), vec![0])]));
    assert!(!text.contains("fault"), "{text}");
}

#[test]
fn nothing_is_read_where_there_is_nothing() {
    let spec = Spec::of(Op::Gather { axis: 0 }, vec![f16(&[0, 7]), TensorType::new(DType::I64, &[3])]).unwrap();
    let text = body(&spec);
    assert!(text.contains("*fault = 1;"), "{text}");
    assert!(!text.contains("x0["), "{text}");
}
