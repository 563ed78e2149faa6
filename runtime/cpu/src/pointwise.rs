//! Element-wise expressions, a block of elements at a time.

use bytemuck::Pod;
use planfile::{DType, Expr, ExprOp, Unary};
use rayon::prelude::*;

use crate::error::CpuError;
use crate::lane::{self, Lane};
use crate::number::{Convert, with_number, with_width};
use crate::program::{Access, Action, Place, Program, Step, Uniform, compile};
use crate::strided::{broadcast_strides, strides};
use crate::view::{View, ViewMut, is_half, narrow_half, product, sizes, slice, slice_mut, widen_half};

/// Elements of a block: registers of a few instructions stay in the first cache level.
const BLOCK: usize = 1024;

/// `result[i] = expr(operands broadcast to i)`.
pub(crate) fn pointwise(
    expr: &Expr,
    rank: usize,
    operands: &[View<'_>],
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let dims = sizes(result.ty);
    let count = product(&dims);
    let inputs: Vec<Input<'_>> = operands.iter().map(|operand| Input::new(operand, &dims)).collect();
    let access: Vec<(DType, Access)> = inputs.iter().map(|input| (input.dtype, input.access)).collect();
    let program = compile(expr, rank, &access)?;
    for input in &inputs {
        with_width!(input.dtype, T => slice::<T>(input.bytes, input.dtype).map(|_| ())?);
    }
    let dtype = result.ty.dtype;
    // Whole blocks for each thread, several so that one who is held up does not hold up all.
    let share = count.div_ceil(4 * rayon::current_num_threads()).max(WORTH_A_THREAD).next_multiple_of(BLOCK);
    result.bytes.par_chunks_mut(share * dtype.bytes()).enumerate().try_for_each(|(chunk, bytes)| {
        let mut machine = Machine::new(&program, &inputs, &dims, count.min(BLOCK))?;
        let starts = (chunk * share..count).step_by(BLOCK);
        for (start, bytes) in starts.zip(bytes.chunks_mut(BLOCK * dtype.bytes())) {
            let size = bytes.len() / dtype.bytes();
            for step in &program.steps {
                machine.run(step, start, size)?;
            }
            if is_half(dtype) {
                narrow_half(dtype, machine.get(program.result, start, size)?, slice_mut(bytes, dtype)?);
            } else {
                with_width!(dtype, T => {
                    slice_mut::<T>(bytes, dtype)?.copy_from_slice(machine.get(program.result, start, size)?);
                });
            }
        }
        Ok(())
    })
}

/// An expression of one operand, for calls on many short rows.
pub(crate) struct Function {
    program: Program,
    /// The whole of it, where it is one instruction.
    unary: Option<Unary>,
    dtype: DType,
}

impl Function {
    /// Compiles an expression that passed its type check: an operand and a result of this type, no indices.
    pub(crate) fn new(expr: &Expr, dtype: DType) -> Result<Self, CpuError> {
        let unary = match expr.ops.as_slice() {
            [ExprOp::Operand(0), ExprOp::Unary(unary)] => Some(*unary),
            _ => None,
        };
        Ok(Self { program: compile(expr, 0, &[(dtype, Access::Direct)])?, unary, dtype })
    }

    /// `y[i] = self(x[i])`, `T` being the type that it was compiled for.
    pub(crate) fn apply<T: Lane>(&self, x: &[T], y: &mut [T]) -> Result<(), CpuError> {
        if let Some(unary) = self.unary {
            T::unary(unary, y, x);
            return Ok(());
        }
        let bytes = bytemuck::cast_slice(x);
        let inputs = [Input { bytes, dtype: self.dtype, access: Access::Direct, walk: vec![(x.len(), 1)] }];
        let dims = [x.len()];
        let mut machine = Machine::new(&self.program, &inputs, &dims, x.len().min(BLOCK))?;
        for (start, y) in (0..x.len()).step_by(BLOCK).zip(y.chunks_mut(BLOCK)) {
            for step in &self.program.steps {
                machine.run(step, start, y.len())?;
            }
            y.copy_from_slice(machine.get(self.program.result, start, y.len())?);
        }
        Ok(())
    }
}

/// Elements that a thread takes at least.
const WORTH_A_THREAD: usize = 1 << 14;

/// An operand and how output positions map to its elements.
struct Input<'a> {
    bytes: &'a [u8],
    dtype: DType,
    access: Access,
    /// Dimensions of the output, of which neighbours with one stride are merged: size and stride.
    walk: Vec<(usize, usize)>,
}

impl<'a> Input<'a> {
    fn new(view: &View<'a>, dims: &[usize]) -> Self {
        let from = sizes(view.ty);
        let dtype = view.ty.dtype;
        let mut walk: Vec<(usize, usize)> = Vec::with_capacity(dims.len());
        for (&size, stride) in dims.iter().zip(broadcast_strides(&from, dims.len())) {
            let stride = stride.cast_unsigned();
            match walk.last_mut() {
                _ if size == 1 => {}
                Some(last) if last.1 == stride * size => *last = (last.0 * size, stride),
                _ => walk.push((size, stride)),
            }
        }
        let access = match walk.as_slice() {
            [] | [(_, 0)] => Access::Uniform,
            [(_, 1)] if !is_half(dtype) => Access::Direct,
            _ => Access::Load,
        };
        Self { bytes: view.bytes, dtype, access, walk }
    }

    /// Elements at output positions from `start` on.
    fn load<T: Copy>(&self, start: usize, dst: &mut [T], src: &[T]) {
        let Some((&(inner, step), outer)) = self.walk.split_last() else {
            dst.fill(src[0]);
            return;
        };
        let mut row = start / inner;
        let mut first = start % inner;
        let mut rest = dst;
        while !rest.is_empty() {
            let mut base = 0;
            let mut index = row;
            for &(size, stride) in outer.iter().rev() {
                base += index % size * stride;
                index /= size;
            }
            let (run, after) = rest.split_at_mut((inner - first).min(rest.len()));
            // Row-major operands that are broadcast step by one element or by none along the innermost dimension.
            if step == 0 {
                run.fill(src[base]);
            } else {
                run.copy_from_slice(&src[base + first..][..run.len()]);
            }
            rest = after;
            row += 1;
            first = 0;
        }
    }
}

/// Registers, in words that hold one element of any type each.
struct Machine<'a> {
    inputs: &'a [Input<'a>],
    blocks: Vec<Vec<u64>>,
    uniform: Vec<Vec<u64>>,
    /// Bits of half-precision elements before they are widened.
    halves: Vec<u16>,
    dims: &'a [usize],
    strides: Vec<isize>,
}

/// The first elements of a register.
fn lanes<T: Pod>(words: &[u64], size: usize) -> &[T] {
    &bytemuck::cast_slice(words)[..size]
}

fn lanes_mut<T: Pod>(words: &mut [u64], size: usize) -> &mut [T] {
    &mut bytemuck::cast_slice_mut(words)[..size]
}

impl<'a> Machine<'a> {
    fn new(program: &Program, inputs: &'a [Input<'a>], dims: &'a [usize], block: usize) -> Result<Self, CpuError> {
        let mut machine = Self {
            inputs,
            blocks: vec![vec![0; block]; program.blocks],
            uniform: Vec::with_capacity(program.uniform.len()),
            halves: vec![0; block],
            dims,
            strides: strides(dims),
        };
        for uniform in &program.uniform {
            let mut words = vec![0u64; block];
            match *uniform {
                Uniform::Const(scalar) if is_half(scalar.dtype) => {
                    lanes_mut::<f32>(&mut words, block).fill(scalar.to_f64() as f32);
                }
                Uniform::Const(scalar) => with_width!(scalar.dtype, T => {
                    lanes_mut::<T>(&mut words, block).fill(scalar.bits as T);
                }),
                Uniform::Operand(index) => machine.load(index, 0, &mut words, block)?,
            }
            machine.uniform.push(words);
        }
        Ok(machine)
    }

    fn get<T: Pod>(&self, place: Place, start: usize, size: usize) -> Result<&[T], CpuError> {
        Ok(match place {
            Place::Block(register) => lanes(&self.blocks[register], size),
            Place::Uniform(register) => lanes(&self.uniform[register], size),
            Place::Direct(index) => &slice(self.inputs[index].bytes, self.inputs[index].dtype)?[start..start + size],
        })
    }

    fn load(&mut self, index: usize, start: usize, dst: &mut [u64], size: usize) -> Result<(), CpuError> {
        let inputs = self.inputs;
        let input = &inputs[index];
        if is_half(input.dtype) {
            let halves = &mut self.halves[..size];
            input.load(start, halves, slice(input.bytes, input.dtype)?);
            widen_half(input.dtype, halves, lanes_mut(dst, size));
        } else {
            with_width!(input.dtype, T => {
                input.load::<T>(start, lanes_mut(dst, size), slice(input.bytes, input.dtype)?);
            });
        }
        Ok(())
    }

    fn run(&mut self, step: &Step, start: usize, size: usize) -> Result<(), CpuError> {
        // Instructions never read the register that they write.
        let mut dst = std::mem::take(&mut self.blocks[step.dst]);
        let done = self.compute(step, start, size, &mut dst);
        if is_half(step.to) && !matches!(step.action, Action::Load(_) | Action::Select) {
            let (values, halves) = (lanes_mut::<f32>(&mut dst, size), &mut self.halves[..size]);
            narrow_half(step.to, values, halves);
            widen_half(step.to, halves, values);
        }
        self.blocks[step.dst] = dst;
        done
    }

    fn compute(&mut self, step: &Step, start: usize, size: usize, dst: &mut [u64]) -> Result<(), CpuError> {
        let [a, b, c] = step.args;
        match step.action {
            Action::Load(index) => self.load(index, start, dst, size)?,
            Action::Index { axis, base } => self.index(axis, base, start, lanes_mut(dst, size)),
            Action::Cast => self.cast(step, start, size, dst)?,
            Action::Unary(unary @ (Unary::IsNan | Unary::IsInf)) => with_number!(step.from, T => {
                lane::classify::<T>(unary == Unary::IsInf, lanes_mut(dst, size), self.get(a, start, size)?);
            }),
            Action::Unary(Unary::Bits | Unary::FromBits) => with_width!(step.from, T => {
                lanes_mut::<T>(dst, size).copy_from_slice(self.get(a, start, size)?);
            }),
            Action::Unary(Unary::Not) if step.from == DType::Bool => {
                lane::not(lanes_mut(dst, size), self.get(a, start, size)?);
            }
            Action::Unary(unary) => with_number!(step.from, T => {
                <T as Lane>::unary(unary, lanes_mut(dst, size), self.get(a, start, size)?);
            }),
            Action::Binary(binary) => with_number!(step.from, T => {
                let (a, b) = (self.get(a, start, size)?, self.get(b, start, size)?);
                <T as Lane>::binary(binary, lanes_mut(dst, size), a, b);
            }),
            Action::Compare(compare) => with_number!(step.from, T => {
                let (a, b) = (self.get::<T>(a, start, size)?, self.get(b, start, size)?);
                lane::compare(compare, lanes_mut(dst, size), a, b);
            }),
            Action::Select => {
                let condition = self.get(a, start, size)?;
                // Half types are in registers as `f32`.
                let dtype = if is_half(step.to) { DType::F32 } else { step.to };
                with_width!(dtype, T => {
                    let (yes, no) = (self.get::<T>(b, start, size)?, self.get(c, start, size)?);
                    lane::select(lanes_mut(dst, size), condition, yes, no);
                });
            }
        }
        Ok(())
    }

    fn cast(&self, step: &Step, start: usize, size: usize, dst: &mut [u64]) -> Result<(), CpuError> {
        let x = step.args[0];
        if step.to == DType::Bool {
            with_number!(step.from, A => {
                let zero = <A as crate::number::Number>::ZERO;
                for (dst, &x) in lanes_mut::<u8>(dst, size).iter_mut().zip(self.get::<A>(x, start, size)?) {
                    *dst = u8::from(x != zero);
                }
            });
            return Ok(());
        }
        with_number!(step.from, A => with_number!(step.to, B => {
            for (dst, &x) in lanes_mut::<B>(dst, size).iter_mut().zip(self.get::<A>(x, start, size)?) {
                *dst = x.convert();
            }
        }));
        Ok(())
    }

    fn index(&self, axis: usize, base: i64, start: usize, dst: &mut [i64]) {
        let (size, inner) = (self.dims[axis], self.strides[axis].cast_unsigned());
        let mut index = start / inner % size;
        let mut left = inner - start % inner;
        for dst in dst {
            *dst = base.wrapping_add(index as i64);
            left -= 1;
            if left == 0 {
                left = inner;
                index = (index + 1) % size;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use planfile::{
        Binary, Compare, DType, Dim, Element, Expr, ExprOp, Op, RankScalar, Scalar, Tensor, TensorType, Unary,
    };
    use proptest::prelude::*;

    use crate::{View, ViewMut, evaluate, execute};

    fn run(expr: Expr, sizes: &[u64], operands: &[&Tensor]) -> Tensor {
        let dims = sizes.iter().copied().map(Dim::Static).collect();
        evaluate(&Op::Pointwise { expr, dims }, operands).unwrap().remove(0)
    }

    fn vector<T: Element>(elements: &[T]) -> Tensor {
        Tensor::from_elements(&[elements.len() as u64], elements).unwrap()
    }

    fn add() -> Expr {
        Expr::operand(0).binary(Binary::Add, Expr::operand(1))
    }

    #[test]
    fn halves_round_after_each_instruction() {
        // 2048 + 1 rounds to 2048 in f16, so adding 1 twice changes nothing; in f32 it would give 2050.
        let expr = add().binary(Binary::Add, Expr::operand(1));
        let y = run(expr.clone(), &[1], &[&vector(&[f16::from_f32(2048.0)]), &vector(&[f16::ONE])]);
        assert_eq!(y.elements::<f16>().unwrap()[0].to_f32(), 2048.0);
        let y = run(expr, &[1], &[&vector(&[bf16::from_f32(256.0)]), &vector(&[bf16::ONE])]);
        assert_eq!(y.elements::<bf16>().unwrap()[0].to_f32(), 256.0);
    }

    #[test]
    fn casts_saturate_wrap_and_test() {
        let x = vector(&[-1.5f32, 300.7, f32::NAN, f32::INFINITY, 0.0]);
        let cast = |dtype| run(Expr::operand(0).cast(dtype), &[5], &[&x]);
        assert_eq!(cast(DType::I8).elements::<i8>().unwrap(), [-1, 127, 0, 127, 0]);
        assert_eq!(cast(DType::U8).elements::<u8>().unwrap(), [0, 255, 0, 255, 0]);
        assert_eq!(cast(DType::Bool).elements::<u8>().unwrap(), [1, 1, 1, 1, 0]);
        let wrapped = run(Expr::operand(0).cast(DType::I8), &[2], &[&vector(&[300i32, -129])]);
        assert_eq!(wrapped.elements::<i8>().unwrap(), [44, 127]);
        let half = run(Expr::operand(0).cast(DType::F16).cast(DType::I32), &[2], &[&vector(&[2049i64, -3])]);
        assert_eq!(half.elements::<i32>().unwrap(), [2048, -3]);
    }

    #[test]
    fn indexes_add_a_base_by_rank() {
        let expr = Expr {
            ops: vec![
                ExprOp::Index { axis: 0, base: RankScalar::ByRank(vec![0, 100]) },
                ExprOp::Const(Scalar::i64(10)),
                ExprOp::Binary(Binary::Mul),
                ExprOp::Index { axis: 1, base: 0.into() },
                ExprOp::Binary(Binary::Add),
            ],
        };
        let op = Op::Pointwise { expr, dims: vec![2.into(), 3.into()] };
        let mut y = Tensor::zeroed(TensorType::new(DType::I64, &[2, 3])).unwrap();
        execute(&op, 0, &[], &mut [ViewMut::from(&mut y)]).unwrap();
        assert_eq!(y.elements::<i64>().unwrap(), [0, 1, 2, 10, 11, 12]);
        execute(&op, 1, &[], &mut [ViewMut::from(&mut y)]).unwrap();
        assert_eq!(y.elements::<i64>().unwrap(), [1000, 1001, 1002, 1010, 1011, 1012]);
        assert!(execute(&op, 2, &[], &mut [ViewMut::from(&mut y)]).is_err());
    }

    #[test]
    fn selects_every_width() {
        let flags = run(
            Expr::operand(0).compare(Compare::Lt, Expr::constant(Scalar::i64(0))),
            &[3],
            &[&vector(&[-1i64, 0, 1])],
        );
        assert_eq!(flags.ty.dtype, DType::Bool);
        for dtype in DType::ALL.into_iter().filter(|dtype| *dtype != DType::Bool) {
            let (yes, no) = (Scalar::from_i64(dtype, 5), Scalar::from_i64(dtype, 9));
            let expr = Expr::operand(0).select(Expr::constant(yes), Expr::constant(no));
            let y = run(expr, &[3], &[&flags]);
            let expected = [yes, no, no].map(Scalar::to_bytes).concat();
            assert_eq!(y.data.bytes(), expected, "{dtype}");
        }
    }

    #[test]
    fn bounded_dimensions_take_their_capacity() {
        let dim = Dim::Bounded { capacity: 3, extent: planfile::ExtentId(0) };
        let ty = TensorType { dtype: DType::F32, dims: vec![dim] };
        let x = vector(&[1.0f32, 2.0, 3.0]);
        let mut y = Tensor::zeroed(ty.clone()).unwrap();
        let op = Op::Pointwise { expr: Expr::operand(0).unary(Unary::Neg), dims: vec![dim] };
        execute(&op, 0, &[View { ty: &ty, bytes: x.data.bytes() }], &mut [ViewMut::from(&mut y)]).unwrap();
        assert_eq!(y.elements::<f32>().unwrap(), [-1.0, -2.0, -3.0]);
    }

    #[test]
    fn blocks_join_seamlessly() {
        let x: Vec<f32> = (0..5000).map(|i| i as f32).collect();
        let y = run(Expr::operand(0).binary(Binary::Mul, Expr::operand(0)), &[5000], &[&vector(&x)]);
        assert!(y.elements::<f32>().unwrap().iter().zip(&x).all(|(y, x)| *y == x * x));
    }

    /// A result shape and operands of which some dimensions are 1 or missing.
    fn shapes() -> impl Strategy<Value = (Vec<u64>, Vec<u64>, Vec<u64>)> {
        let dim = (prop_oneof![0u64..3, 1u64..20], any::<bool>(), any::<bool>());
        (prop::collection::vec(dim, 0..5), 0usize..4, 0usize..4).prop_map(|(dims, skip_a, skip_b)| {
            let result: Vec<u64> = dims.iter().map(|dim| dim.0).collect();
            let a: Vec<u64> = dims.iter().map(|dim| if dim.1 { 1 } else { dim.0 }).collect();
            let b: Vec<u64> = dims.iter().map(|dim| if dim.2 { 1 } else { dim.0 }).collect();
            let (skip_a, skip_b) = (skip_a.min(a.len()), skip_b.min(b.len()));
            (result, a[skip_a..].to_vec(), b[skip_b..].to_vec())
        })
    }

    fn at(linear: usize, sizes: &[u64], operand: &[u64]) -> usize {
        let (mut linear, mut offset, mut stride) = (linear, 0, 1);
        for (position, &size) in sizes.iter().rev().enumerate() {
            let index = linear % size as usize;
            linear /= size as usize;
            if let Some(&own) = operand.iter().rev().nth(position) {
                offset += if own == 1 { 0 } else { index * stride };
                stride *= own as usize;
            }
        }
        offset
    }

    proptest! {
        #[test]
        fn broadcasts_like_the_definition((result, a, b) in shapes()) {
            let fill = |sizes: &[u64], step: i32| -> Tensor {
                let count: u64 = sizes.iter().product();
                Tensor::from_elements(sizes, &(0..count as i32).map(|i| i * step).collect::<Vec<_>>()).unwrap()
            };
            let (x, y) = (fill(&a, 1), fill(&b, 100_000));
            let sum = run(add(), &result, &[&x, &y]);
            let (x, y) = (x.elements::<i32>().unwrap(), y.elements::<i32>().unwrap());
            for (linear, &value) in sum.elements::<i32>().unwrap().iter().enumerate() {
                let expected = x[at(linear, &result, &a)] + y[at(linear, &result, &b)];
                prop_assert_eq!(value, expected);
            }
        }
    }
}
