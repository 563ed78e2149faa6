//! cuDNN: convolutions with what is fused into them.
#![expect(unsafe_code, reason = "calls cuDNN")]

mod shape;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::cudnn::sys::{
    cudnnActivationMode_t, cudnnConvolutionFwdAlgo_t, cudnnConvolutionMode_t, cudnnDataType_t, cudnnDeterminism_t,
    cudnnMathType_t, cudnnNanPropagation_t, cudnnTensorFormat_t,
};
use planfile::DType;
use planfile::plan::Convolution;

use crate::driver::{Address, Gpu, Raw, Stream};
use crate::error::CudaError;
use crate::library::{LibraryName, functions, open_for_others};
use shape::{Shape, Tensor};

functions! {
    Cudnn of LibraryName::Cudnn; cudnnGetVersion,
    fn cudnnGetVersion() -> usize;
    fn cudnnGetErrorString(u32) -> *const c_char;
    fn cudnnCreate(*mut Raw) -> u32;
    fn cudnnDestroy(Raw) -> u32;
    fn cudnnSetStream(Raw, Raw) -> u32;
    fn cudnnCreateTensorDescriptor(*mut Raw) -> u32;
    fn cudnnDestroyTensorDescriptor(Raw) -> u32;
    fn cudnnSetTensorNdDescriptor(Raw, u32, c_int, *const c_int, *const c_int) -> u32;
    fn cudnnCreateFilterDescriptor(*mut Raw) -> u32;
    fn cudnnDestroyFilterDescriptor(Raw) -> u32;
    fn cudnnSetFilterNdDescriptor(Raw, u32, u32, c_int, *const c_int) -> u32;
    fn cudnnCreateConvolutionDescriptor(*mut Raw) -> u32;
    fn cudnnDestroyConvolutionDescriptor(Raw) -> u32;
    fn cudnnSetConvolutionNdDescriptor(Raw, c_int, *const c_int, *const c_int, *const c_int, u32, u32) -> u32;
    fn cudnnSetConvolutionGroupCount(Raw, c_int) -> u32;
    fn cudnnSetConvolutionMathType(Raw, u32) -> u32;
    fn cudnnCreateActivationDescriptor(*mut Raw) -> u32;
    fn cudnnDestroyActivationDescriptor(Raw) -> u32;
    fn cudnnSetActivationDescriptor(Raw, u32, u32, f64) -> u32;
    fn cudnnGetConvolutionForwardAlgorithm_v7(Raw, Raw, Raw, Raw, Raw, c_int, *mut c_int, *mut Performance) -> u32;
    fn cudnnGetConvolutionBackwardDataAlgorithm_v7(Raw, Raw, Raw, Raw, Raw, c_int, *mut c_int, *mut Performance) -> u32;
    fn cudnnConvolutionForward(
        Raw, *const c_void, Raw, *const c_void, Raw, *const c_void, Raw, u32, *mut c_void, usize, *const c_void, Raw,
        *mut c_void,
    ) -> u32;
    fn cudnnConvolutionBackwardData(
        Raw, *const c_void, Raw, *const c_void, Raw, *const c_void, Raw, u32, *mut c_void, usize, *const c_void, Raw,
        *mut c_void,
    ) -> u32;
    fn cudnnConvolutionBiasActivationForward(
        Raw, *const c_void, Raw, *const c_void, Raw, *const c_void, Raw, u32, *mut c_void, usize, *const c_void, Raw,
        *const c_void, Raw, *const c_void, Raw, Raw, *mut c_void,
    ) -> u32;
    fn cudnnAddTensor(Raw, *const c_void, Raw, *const c_void, *const c_void, Raw, *mut c_void) -> u32;
    fn cudnnActivationForward(Raw, Raw, *const c_void, Raw, *const c_void, *const c_void, Raw, *mut c_void) -> u32;
}

/// `cudnnConvolutionFwdAlgoPerf_t` and its sister, with enumerations as numbers.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Performance {
    algorithm: u32,
    status: u32,
    time: f32,
    memory: usize,
    determinism: u32,
    math: u32,
    reserved: [c_int; 3],
}

/// As many as there are of either kind, with and without tensor cores.
const ALGORITHMS: usize = 16;

impl Cudnn {
    /// The library. What it opens by bare name itself is opened first, from wherever it lies.
    pub fn ready() -> Result<&'static Self, CudaError> {
        static DEPENDENCIES: std::sync::Once = std::sync::Once::new();
        DEPENDENCIES.call_once(|| {
            open_for_others(&["libcublasLt.so.13", "libcublasLt.so.12"], LibraryName::CublasLt);
            open_for_others(&["libcublas.so.13", "libcublas.so.12"], LibraryName::CublasLt);
            open_for_others(&["libnvrtc.so.13", "libnvrtc.so.12"], LibraryName::Nvrtc);
        });
        Self::get()
    }

    fn check(&self, call: &'static str, status: u32) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: returns a string that stays, for any number.
        let text = unsafe { CStr::from_ptr((self.cudnnGetErrorString)(status)) }.to_string_lossy().into_owned();
        Err(CudaError::Call { call, status: text, next: "CUDNN_LOGLEVEL_DBG=2 makes cuDNN say more" })
    }

    /// Such as `9.14.0`.
    pub fn version(&self) -> String {
        // SAFETY: reads a constant.
        let version = unsafe { (self.cudnnGetVersion)() };
        format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
    }
}

/// An object of cuDNN's, destroyed when dropped.
struct Owned {
    raw: Raw,
    destroy: unsafe extern "C" fn(Raw) -> u32,
}

impl Owned {
    fn new(
        library: &Cudnn,
        (call, create): (&'static str, unsafe extern "C" fn(*mut Raw) -> u32),
        destroy: unsafe extern "C" fn(Raw) -> u32,
    ) -> Result<Self, CudaError> {
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle.
        library.check(call, unsafe { create(&mut raw) })?;
        Ok(Self { raw, destroy })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: created together with the function that ends it.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

/// cuDNN for one rank's thread, which has entered its GPU.
pub struct Handle {
    library: &'static Cudnn,
    raw: Raw,
    gpu: Arc<Gpu>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _alone = self.gpu.alone();
        // SAFETY: created in `new`; what was prepared with it is gone, and its rank's work is over.
        let _ = unsafe { (self.library.cudnnDestroy)(self.raw) };
    }
}

/// Where a convolution finds its operands.
pub struct Operands<'a> {
    /// Address and type of each operand of the step.
    pub operands: &'a [(Address, DType)],
    pub result: (Address, DType),
    pub workspace: (Address, u64),
}

/// How what is fused is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fusion {
    /// All in one call.
    Whole,
    /// All in one call that makes zeros of what is not a number, as older versions of it do alone.
    WholeOfNumbers,
    /// One call after the other, in place.
    Parts,
}

/// A convolution whose algorithm is chosen.
pub struct PreparedConvolution {
    library: &'static Cudnn,
    handle: Raw,
    input: Owned,
    filter: Owned,
    result: Owned,
    /// One element for each channel.
    bias: Owned,
    convolution: Owned,
    activation: Owned,
    activation_of_numbers: Owned,
    relu: bool,
    transposed: bool,
    double: bool,
    input_at: Address,
    filter_at: Address,
    bias_at: Option<Address>,
    residual_at: Option<Address>,
    result_at: Address,
    workspace: (Address, u64),
    algorithm: u32,
    fusion: Fusion,
}

impl Handle {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let library = Cudnn::ready()?;
        let _alone = gpu.alone();
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle.
        library.check("cudnnCreate", unsafe { (library.cudnnCreate)(&mut raw) })?;
        Ok(Self { library, raw, gpu: Arc::clone(gpu) })
    }

    /// Chooses how to compute a convolution, deterministically, within its workspace, and tries it out on the stream.
    ///
    /// # Safety
    /// The addresses are memory of the stream's GPU, as long as the call says, and nobody needs what is in the result
    /// and the workspace.
    pub unsafe fn prepare(
        &self,
        call: &Convolution,
        at: &Operands<'_>,
        stream: &Stream,
    ) -> Result<PreparedConvolution, CudaError> {
        let library = self.library;
        // Code is loaded for the first call of its kind.
        let _alone = self.gpu.alone();
        let find = |operand: u32| match at.operands.get(operand as usize) {
            Some(&(address, dtype)) if dtype == at.result.1 => Ok(address),
            Some((_, dtype)) => {
                Err(CudaError::contradiction(format!("a convolution to {} reads {dtype}", at.result.1)))
            }
            None => Err(CudaError::contradiction(format!("a convolution reads operand {operand}, which is not there"))),
        };
        let shape = Shape::new(call)?;
        let dtype = at.result.1;
        let (number, double) = (data_type(dtype)?, dtype == DType::F64);
        let tensor = |tensor: &Tensor| {
            let create = ("cudnnCreateTensorDescriptor", library.cudnnCreateTensorDescriptor);
            let made = Owned::new(library, create, library.cudnnDestroyTensorDescriptor)?;
            let count = tensor.sizes.len() as c_int;
            // SAFETY: as many sizes and strides as said.
            let status = unsafe {
                (library.cudnnSetTensorNdDescriptor)(
                    made.raw,
                    number,
                    count,
                    tensor.sizes.as_ptr(),
                    tensor.strides.as_ptr(),
                )
            };
            library.check("cudnnSetTensorNdDescriptor", status)?;
            Ok::<_, CudaError>(made)
        };
        let create = ("cudnnCreateFilterDescriptor", library.cudnnCreateFilterDescriptor);
        let filter = Owned::new(library, create, library.cudnnDestroyFilterDescriptor)?;
        let format = if call.channels_last {
            cudnnTensorFormat_t::CUDNN_TENSOR_NHWC
        } else {
            cudnnTensorFormat_t::CUDNN_TENSOR_NCHW
        };
        let sizes = &shape.filter;
        // SAFETY: as many sizes as said.
        let status = unsafe {
            (library.cudnnSetFilterNdDescriptor)(
                filter.raw,
                number,
                format as u32,
                sizes.len() as c_int,
                sizes.as_ptr(),
            )
        };
        library.check("cudnnSetFilterNdDescriptor", status)?;
        let mut prepared = PreparedConvolution {
            library,
            handle: self.raw,
            input: tensor(&shape.input)?,
            filter,
            result: tensor(&shape.result)?,
            bias: tensor(&shape.bias)?,
            convolution: self.convolution(call, &shape, dtype)?,
            activation: self.activation(call.relu, cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN)?,
            activation_of_numbers: self.activation(call.relu, cudnnNanPropagation_t::CUDNN_NOT_PROPAGATE_NAN)?,
            relu: call.relu,
            transposed: call.transposed,
            double,
            input_at: find(call.input)?,
            filter_at: find(call.filter)?,
            bias_at: call.bias.map(find).transpose()?,
            residual_at: call.residual.map(find).transpose()?,
            result_at: at.result.0,
            workspace: at.workspace,
            algorithm: 0,
            fusion: Fusion::Parts,
        };
        let ways = self.ways(&prepared, call, dtype)?;
        let mut refusal = None;
        for (algorithm, math, fusion) in ways {
            // SAFETY: the descriptor lives.
            let status = unsafe { (library.cudnnSetConvolutionMathType)(prepared.convolution.raw, math) };
            library.check("cudnnSetConvolutionMathType", status)?;
            (prepared.algorithm, prepared.fusion) = (algorithm, fusion);
            // What the heuristic lists may still be refused when it is called.
            // SAFETY: the caller's promise.
            match unsafe { prepared.enqueue(stream) } {
                Ok(()) => return Ok(prepared),
                Err(error) => refusal = Some(error),
            }
        }
        Err(refusal.unwrap_or_else(|| CudaError::Refused {
            library: LibraryName::Cudnn,
            what: format!(
                "a convolution {:?} of {} channels to {} ({dtype}, {} groups) in {} bytes of workspace",
                call.window, call.input_channels, call.output_channels, call.groups, at.workspace.1
            ),
            next: "another version of the library may have it; or report it with the plan",
        }))
    }

    fn activation(&self, relu: bool, not_numbers: cudnnNanPropagation_t) -> Result<Owned, CudaError> {
        let library = self.library;
        let create = ("cudnnCreateActivationDescriptor", library.cudnnCreateActivationDescriptor);
        let made = Owned::new(library, create, library.cudnnDestroyActivationDescriptor)?;
        let mode = if relu {
            cudnnActivationMode_t::CUDNN_ACTIVATION_RELU
        } else {
            cudnnActivationMode_t::CUDNN_ACTIVATION_IDENTITY
        };
        // SAFETY: the descriptor lives.
        let status = unsafe { (library.cudnnSetActivationDescriptor)(made.raw, mode as u32, not_numbers as u32, 0.0) };
        library.check("cudnnSetActivationDescriptor", status)?;
        Ok(made)
    }

    fn convolution(&self, call: &Convolution, shape: &Shape, dtype: DType) -> Result<Owned, CudaError> {
        let library = self.library;
        let create = ("cudnnCreateConvolutionDescriptor", library.cudnnCreateConvolutionDescriptor);
        let made = Owned::new(library, create, library.cudnnDestroyConvolutionDescriptor)?;
        let accumulator = data_type(dtype.accumulator())?;
        // Windows are not flipped, as in ONNX.
        let mode = cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION as u32;
        // SAFETY: as many pads, strides and dilations as said.
        let status = unsafe {
            (library.cudnnSetConvolutionNdDescriptor)(
                made.raw,
                shape.pads.len() as c_int,
                shape.pads.as_ptr(),
                shape.strides.as_ptr(),
                shape.dilations.as_ptr(),
                mode,
                accumulator,
            )
        };
        library.check("cudnnSetConvolutionNdDescriptor", status)?;
        // SAFETY: the descriptor lives.
        let status = unsafe { (library.cudnnSetConvolutionGroupCount)(made.raw, shape::int(call.groups)?) };
        library.check("cudnnSetConvolutionGroupCount", status)?;
        // SAFETY: as above.
        let status = unsafe { (library.cudnnSetConvolutionMathType)(made.raw, math_of(call, dtype)) };
        library.check("cudnnSetConvolutionMathType", status)?;
        Ok(made)
    }

    /// Algorithm, kind of arithmetic and fusion of every way that is allowed, the most promising first.
    fn ways(
        &self,
        prepared: &PreparedConvolution,
        call: &Convolution,
        dtype: DType,
    ) -> Result<Vec<(u32, u32, Fusion)>, CudaError> {
        let library = self.library;
        let (mut found, mut count) = ([Performance::default(); ALGORITHMS], 0);
        let (handle, convolution) = (self.raw, prepared.convolution.raw);
        let (input, filter, result) = (prepared.input.raw, prepared.filter.raw, prepared.result.raw);
        let status = if call.transposed {
            // SAFETY: all objects live; writes at most as many results as there is room for.
            unsafe {
                (library.cudnnGetConvolutionBackwardDataAlgorithm_v7)(
                    handle,
                    filter,
                    input,
                    convolution,
                    result,
                    ALGORITHMS as c_int,
                    &mut count,
                    found.as_mut_ptr(),
                )
            }
        } else {
            // SAFETY: as above.
            unsafe {
                (library.cudnnGetConvolutionForwardAlgorithm_v7)(
                    handle,
                    input,
                    filter,
                    convolution,
                    result,
                    ALGORITHMS as c_int,
                    &mut count,
                    found.as_mut_ptr(),
                )
            }
        };
        library.check("cudnnGetConvolutionAlgorithm", status)?;
        let mut ways = Vec::new();
        let count = usize::try_from(count).unwrap_or(0).min(ALGORITHMS);
        let precise = dtype == DType::F32 && !call.allow_tf32;
        for one in &found[..count] {
            let math = if precise { cudnnMathType_t::CUDNN_FMA_MATH as u32 } else { one.math };
            let deterministic = one.determinism == cudnnDeterminism_t::CUDNN_DETERMINISTIC as u32;
            if one.status != 0 || !deterministic || one.memory as u64 > prepared.workspace.1 {
                continue;
            }
            // Half types are not converted to anything narrower.
            if math == cudnnMathType_t::CUDNN_TENSOR_OP_MATH_ALLOW_CONVERSION as u32 {
                continue;
            }
            ways.push((one.algorithm, math));
        }
        let fuses = !call.transposed && call.bias.is_some();
        // Without an activation, only this one adds what is fused.
        let only = cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM as u32;
        let whole = |fusion| {
            let able = ways.iter().filter(|(algorithm, _)| fuses && (call.relu || *algorithm == only));
            able.map(move |&(algorithm, math)| (algorithm, math, fusion))
        };
        let parts = ways.iter().map(|&(algorithm, math)| (algorithm, math, Fusion::Parts));
        Ok(whole(Fusion::Whole).chain(whole(Fusion::WholeOfNumbers)).chain(parts).collect())
    }
}

/// The kind of arithmetic that is asked for.
fn math_of(call: &Convolution, dtype: DType) -> u32 {
    let math = match dtype {
        DType::F16 | DType::BF16 => cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        DType::F32 if !call.allow_tf32 => cudnnMathType_t::CUDNN_FMA_MATH,
        _ => cudnnMathType_t::CUDNN_DEFAULT_MATH,
    };
    math as u32
}

impl PreparedConvolution {
    /// Puts the convolution on the stream.
    ///
    /// # Safety
    /// The addresses it was prepared with are memory of the stream's GPU, as long as the call says, until the stream is
    /// done. The handle it was prepared by lives.
    pub unsafe fn enqueue(&self, stream: &Stream) -> Result<(), CudaError> {
        let (library, handle) = (self.library, self.handle);
        // SAFETY: both live, on this thread.
        library.check("cudnnSetStream", unsafe { (library.cudnnSetStream)(handle, stream.raw) })?;
        match self.fusion {
            // SAFETY: the caller's promise.
            Fusion::Whole => unsafe { self.whole(&self.activation) },
            // SAFETY: the caller's promise.
            Fusion::WholeOfNumbers => unsafe { self.whole(&self.activation_of_numbers) },
            // SAFETY: the caller's promise.
            Fusion::Parts => unsafe { self.parts() },
        }
    }

    /// One and zero, as factors are given: in the type of the accumulation.
    fn factors(&self) -> (*const c_void, *const c_void) {
        static DOUBLES: [f64; 2] = [1.0, 0.0];
        static FLOATS: [f32; 2] = [1.0, 0.0];
        if self.double {
            (ptr::from_ref(&DOUBLES[0]).cast(), ptr::from_ref(&DOUBLES[1]).cast())
        } else {
            (ptr::from_ref(&FLOATS[0]).cast(), ptr::from_ref(&FLOATS[1]).cast())
        }
    }

    /// # Safety
    /// As for [`Self::enqueue`].
    unsafe fn whole(&self, activation: &Owned) -> Result<(), CudaError> {
        let library = self.library;
        let (one, zero) = self.factors();
        let (added_by, added) = match self.residual_at {
            Some(residual) => (one, residual),
            // Not read when its factor is zero.
            None => (zero, self.result_at),
        };
        let bias = self.bias_at.unwrap_or_default();
        // SAFETY: the caller's promise.
        let status = unsafe {
            (library.cudnnConvolutionBiasActivationForward)(
                self.handle,
                one,
                self.input.raw,
                self.input_at as *const c_void,
                self.filter.raw,
                self.filter_at as *const c_void,
                self.convolution.raw,
                self.algorithm,
                self.workspace.0 as *mut c_void,
                self.workspace.1 as usize,
                added_by,
                self.result.raw,
                added as *const c_void,
                self.bias.raw,
                bias as *const c_void,
                activation.raw,
                self.result.raw,
                self.result_at as *mut c_void,
            )
        };
        library.check("cudnnConvolutionBiasActivationForward", status)
    }

    /// # Safety
    /// As for [`Self::enqueue`].
    unsafe fn parts(&self) -> Result<(), CudaError> {
        let library = self.library;
        let (one, zero) = self.factors();
        let result = self.result_at as *mut c_void;
        let (input, filter) = (self.input_at as *const c_void, self.filter_at as *const c_void);
        let (workspace, bytes) = (self.workspace.0 as *mut c_void, self.workspace.1 as usize);
        let convolution = (self.convolution.raw, self.algorithm);
        let status = if self.transposed {
            // SAFETY: the caller's promise.
            unsafe {
                (library.cudnnConvolutionBackwardData)(
                    self.handle,
                    one,
                    self.filter.raw,
                    filter,
                    self.input.raw,
                    input,
                    convolution.0,
                    convolution.1,
                    workspace,
                    bytes,
                    zero,
                    self.result.raw,
                    result,
                )
            }
        } else {
            // SAFETY: the caller's promise.
            unsafe {
                (library.cudnnConvolutionForward)(
                    self.handle,
                    one,
                    self.input.raw,
                    input,
                    self.filter.raw,
                    filter,
                    convolution.0,
                    convolution.1,
                    workspace,
                    bytes,
                    zero,
                    self.result.raw,
                    result,
                )
            }
        };
        library.check("cudnnConvolution", status)?;
        let added = [self.bias_at.map(|at| (&self.bias, at)), self.residual_at.map(|at| (&self.result, at))];
        for (tensor, at) in added.into_iter().flatten() {
            // SAFETY: the caller's promise.
            let status = unsafe {
                (library.cudnnAddTensor)(
                    self.handle,
                    one,
                    tensor.raw,
                    at as *const c_void,
                    one,
                    self.result.raw,
                    result,
                )
            };
            library.check("cudnnAddTensor", status)?;
        }
        if self.relu {
            let (handle, activation, tensor) = (self.handle, self.activation.raw, self.result.raw);
            // SAFETY: the caller's promise; in place is allowed with one descriptor.
            let status = unsafe {
                (library.cudnnActivationForward)(handle, activation, one, tensor, result, zero, tensor, result)
            };
            library.check("cudnnActivationForward", status)?;
        }
        Ok(())
    }
}

/// How cuDNN numbers an element type.
fn data_type(dtype: DType) -> Result<u32, CudaError> {
    let found = match dtype {
        DType::F16 => cudnnDataType_t::CUDNN_DATA_HALF,
        DType::BF16 => cudnnDataType_t::CUDNN_DATA_BFLOAT16,
        DType::F32 => cudnnDataType_t::CUDNN_DATA_FLOAT,
        DType::F64 => cudnnDataType_t::CUDNN_DATA_DOUBLE,
        other => return Err(CudaError::contradiction(format!("cuDNN is asked for a convolution of {other}"))),
    };
    Ok(found as u32)
}
