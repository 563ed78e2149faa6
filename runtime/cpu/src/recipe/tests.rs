//! Boxes equal the same boxes of the whole, over random recipes; what is read stays near what is wanted.

use std::sync::atomic::{AtomicU64, Ordering};

use planfile::op::{PadMode, ReduceKind};
use planfile::{
    Binary, Buffer, Combine, DType, Dim, Expr, Op, RankScalar, Recipe, RecipeInput, Source, Spec, SpecNode, Tensor,
    TensorType,
};
use proptest::prelude::*;

use super::*;
use crate::evaluate;

/// One file in memory that counts what is read of it.
struct Memory {
    file: Vec<u8>,
    read: AtomicU64,
}

impl Memory {
    fn numbered(elements: usize) -> Self {
        let file = (0..elements).flat_map(|index| (index as f32).to_le_bytes()).collect();
        Self { file, read: AtomicU64::new(0) }
    }
}

impl WeightBytes for Memory {
    fn read(&self, file: u32, offset: u64, into: &mut [u8]) -> Result<(), WeightReadError> {
        self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
        let bytes = into.len() as u64;
        let found = self.file.get(offset as usize..offset as usize + into.len());
        let found = found.filter(|_| file == 0);
        let why = || WeightReadError { file, offset, bytes, why: "out of range".to_owned() };
        into.copy_from_slice(found.ok_or_else(why)?);
        Ok(())
    }
}

/// Numbers for choices, one after the other.
struct Choices(Vec<u64>);

impl Choices {
    fn below(&mut self, bound: u64) -> u64 {
        let next = self.0.pop().unwrap_or(0);
        next % bound.max(1)
    }
}

fn file_input(sizes: &[u64], offset: u64) -> RecipeInput {
    RecipeInput { ty: TensorType::new(DType::F32, sizes), source: Source::File { file: 0, offset } }
}

fn scalar_input(value: f32) -> RecipeInput {
    let source = Source::Inline(Buffer::from_bytes(&value.to_le_bytes()));
    RecipeInput { ty: TensorType::new(DType::F32, &[]), source }
}

/// A random primitive on value `x` of these sizes; value 1 is a scalar.
fn random_node(sizes: &[u64], x: u32, choices: &mut Choices) -> SpecNode {
    let rank = sizes.len() as u64;
    let axis = choices.below(rank) as usize;
    let statics = |sizes: &[u64]| sizes.iter().copied().map(Dim::Static).collect::<Vec<_>>();
    let op = match choices.below(9) {
        0 => {
            let mut permutation: Vec<u8> = (0..rank as u8).collect();
            permutation.rotate_left(axis);
            permutation.swap(0, choices.below(rank) as usize);
            Op::Transpose { permutation }
        }
        1 => {
            let (mut starts, mut steps, mut taken) = (Vec::new(), Vec::new(), Vec::new());
            for &size in sizes {
                let start = choices.below(size);
                let step = [1, 1, 2, -1][choices.below(4) as usize];
                let room = if step > 0 { (size - start).div_ceil(step as u64) } else { start + 1 };
                starts.push(RankScalar::Uniform(start as i64));
                steps.push(step);
                taken.push(1 + choices.below(room));
            }
            Op::Slice { starts, steps, sizes: taken }
        }
        2 => return SpecNode { op: Op::Concat { axis: axis as u8 }, operands: vec![x, x] },
        3 => {
            let mut amounts = || (0..rank).map(|_| choices.below(3) as i64).collect::<Vec<_>>();
            let (low, high) = (amounts(), amounts());
            return SpecNode { op: Op::Pad { low, high, mode: PadMode::Constant }, operands: vec![x, 1] };
        }
        4 => {
            let mut dims = sizes.to_vec();
            dims.insert(0, 1 + choices.below(3));
            if dims.len() > 5 {
                dims = sizes.to_vec();
            }
            Op::Broadcast { dims: statics(&dims) }
        }
        5 => {
            let expr = Expr::operand(0).binary(Binary::Mul, Expr::index(axis as u8).cast(DType::F32));
            let expr = expr.binary(Binary::Add, Expr::operand(1));
            return SpecNode { op: Op::Pointwise { expr, dims: statics(sizes) }, operands: vec![x, 1] };
        }
        6 => {
            let product: u64 = sizes.iter().product();
            Op::Reshape { dims: statics(&[product]) }
        }
        7 => {
            // Split each dimension that has a small factor.
            let split = sizes.iter().flat_map(|&size| match [2, 3].iter().find(|&&factor| size % factor == 0) {
                Some(factor) => vec![size / factor, *factor],
                None => vec![size],
            });
            Op::Reshape { dims: statics(&split.take(6).collect::<Vec<_>>()) }
        }
        _ => Op::Reduce { kind: ReduceKind::Combine(Combine::Sum), axes: vec![axis as u8], keep: true },
    };
    SpecNode { op, operands: vec![x] }
}

fn random_recipe(choices: &mut Choices) -> Recipe {
    let sizes: Vec<u64> = (0..1 + choices.below(3)).map(|_| 1 + choices.below(6)).collect();
    let inputs = vec![file_input(&sizes, 4), scalar_input(0.5)];
    let mut spec =
        Spec { inputs: inputs.iter().map(|input| input.ty.clone()).collect(), nodes: vec![], results: vec![0] };
    for value in 2..2 + choices.below(6) as u32 {
        let types = spec.types().unwrap();
        let x = if value == 2 { 0 } else { value - 1 };
        spec.nodes.push(random_node(&types[x as usize].sizes(), x, choices));
        let legal = spec.types().ok().and_then(|types| types.last()?.elements()).is_some_and(|count| count < 5000);
        if !legal {
            spec.nodes.pop();
            break;
        }
        spec.results = vec![value];
    }
    Recipe { inputs, spec }
}

/// Evaluates the recipe without regions: primitive by primitive.
fn reference(recipe: &Recipe, bytes: &Memory) -> Tensor {
    let mut values: Vec<Tensor> = recipe
        .inputs
        .iter()
        .map(|input| read_all(&Recipe::source(input.ty.clone(), input.source.clone()), bytes).unwrap())
        .collect();
    for node in &recipe.spec.nodes {
        let operands: Vec<&Tensor> = node.operands.iter().map(|&operand| &values[operand as usize]).collect();
        values.extend(evaluate(&node.op, &operands).unwrap());
    }
    values.swap_remove(recipe.spec.results[0] as usize)
}

fn crop(whole: &Tensor, region: &Region) -> Tensor {
    let starts = region.starts.iter().map(|&start| RankScalar::Uniform(start as i64)).collect();
    let op = Op::Slice { starts, steps: vec![1; region.sizes.len()], sizes: region.sizes.clone() };
    evaluate(&op, &[whole]).unwrap().remove(0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn boxes_equal_boxes_of_the_whole(numbers in proptest::collection::vec(any::<u64>(), 120)) {
        let mut choices = Choices(numbers);
        let recipe = random_recipe(&mut choices);
        let bytes = Memory::numbered(6 * 6 * 6 + 1);
        let whole = reference(&recipe, &bytes);
        prop_assert_eq!(&read_all(&recipe, &bytes).unwrap(), &whole);
        for _ in 0..4 {
            let starts: Vec<u64> = whole.ty.sizes().iter().map(|&size| choices.below(size)).collect();
            let rooms = whole.ty.sizes().into_iter().zip(&starts);
            let sizes = rooms.map(|(size, start)| choices.below(size - start + 1)).collect();
            let region = Region { starts, sizes };
            let mut part = Tensor::zeroed(region.ty(whole.ty.dtype)).unwrap();
            read_region(&recipe, &region, &bytes, part.data.bytes_mut()).unwrap();
            prop_assert_eq!(&part, &crop(&whole, &region), "{} of {:?}", region, recipe);
        }
    }
}

fn movement(inputs: Vec<RecipeInput>, nodes: Vec<SpecNode>) -> Recipe {
    let result = (inputs.len() + nodes.len() - 1) as u32;
    let spec = Spec { inputs: inputs.iter().map(|input| input.ty.clone()).collect(), nodes, results: vec![result] };
    Recipe { inputs, spec }
}

#[test]
fn reads_only_what_a_box_needs() {
    // Rows of a transposed, concatenated pair are columns of the files' tensors.
    let inputs = vec![file_input(&[64, 4096], 0), file_input(&[64, 4096], 64 * 4096 * 4)];
    let recipe = movement(
        inputs,
        vec![
            SpecNode { op: Op::Concat { axis: 1 }, operands: vec![0, 1] },
            SpecNode { op: Op::Transpose { permutation: vec![1, 0] }, operands: vec![2] },
        ],
    );
    let bytes = Memory::numbered(2 * 64 * 4096);
    let region = Region { starts: vec![4100, 3], sizes: vec![2, 5] };
    let mut part = Tensor::zeroed(region.ty(DType::F32)).unwrap();
    read_region(&recipe, &region, &bytes, part.data.bytes_mut()).unwrap();
    let at = |row: usize, column: usize| (64 * 4096 + row * 4096 + column) as f32;
    let expected: Vec<f32> = (4..6).flat_map(|column| (3..8).map(move |row| at(row, column))).collect();
    assert_eq!(part.elements::<f32>(), Some(&expected[..]));
    assert_eq!(bytes.read.load(Ordering::Relaxed), 2 * 5 * 4, "rows far apart are read one by one");
}

#[test]
fn takes_loose_reshapes_apart() {
    // Half of each head's features: no single run of the merged dimension.
    let dims = [64u64, 32, 16].map(Dim::Static).to_vec();
    let recipe = movement(
        vec![file_input(&[64 * 32, 16], 0)],
        vec![
            SpecNode { op: Op::Reshape { dims: vec![Dim::Static(64 * 32 * 16)] }, operands: vec![0] },
            SpecNode { op: Op::Reshape { dims }, operands: vec![1] },
        ],
    );
    let bytes = Memory::numbered(64 * 32 * 16);
    let region = Region { starts: vec![8, 0, 0], sizes: vec![16, 4, 16] };
    let mut part = Tensor::zeroed(region.ty(DType::F32)).unwrap();
    read_region(&recipe, &region, &bytes, part.data.bytes_mut()).unwrap();
    assert_eq!(part, crop(&reference(&recipe, &Memory::numbered(64 * 32 * 16)), &region));
    assert_eq!(bytes.read.load(Ordering::Relaxed), 16 * 4 * 16 * 4);
}

#[test]
fn noise_depends_on_the_index_alone() {
    let recipe = Recipe::source(TensorType::new(DType::F32, &[40, 30]), Source::Random { seed: 7 });
    let whole = read_all(&recipe, &NoFiles).unwrap();
    let region = Region { starts: vec![3, 4], sizes: vec![5, 6] };
    let mut part = Tensor::zeroed(region.ty(DType::F32)).unwrap();
    read_region(&recipe, &region, &NoFiles, part.data.bytes_mut()).unwrap();
    assert_eq!(part, crop(&whole, &region));
    let values = whole.elements::<f32>().unwrap();
    assert!(values.iter().all(|value| value.abs() <= 0.05));
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    assert!(mean.abs() < 0.005 && values.iter().any(|value| value.abs() > 0.045), "mean {mean}");
    let other = Recipe::source(whole.ty.clone(), Source::Random { seed: 8 });
    assert_ne!(read_all(&other, &NoFiles).unwrap(), whole);
}

#[test]
fn refuses_what_does_not_fit() {
    let ty = TensorType::new(DType::F32, &[4]);
    let recipe = Recipe::source(ty.clone(), Source::File { file: 0, offset: 8 });
    let bytes = Memory::numbered(4);
    let outside = Region { starts: vec![2], sizes: vec![3] };
    let error = read_region(&recipe, &outside, &bytes, &mut [0; 12]).unwrap_err();
    assert_eq!(error, RecipeError::Region { region: outside, ty: ty.clone() });
    let inside = Region { starts: vec![2], sizes: vec![2] };
    assert!(matches!(read_region(&recipe, &inside, &bytes, &mut [0; 12]), Err(RecipeError::Region { .. })));
    assert!(matches!(read_all(&recipe, &bytes), Err(RecipeError::Read(WeightReadError { offset: 8, bytes: 16, .. }))));
    let short = Recipe::source(ty, Source::Inline(Buffer::zeroed(12)));
    assert!(matches!(read_all(&short, &NoFiles), Err(RecipeError::Malformed(_))));
}
