//! cuBLASLt: matrix products with what is fused into them.
#![expect(unsafe_code, reason = "calls cuBLASLt")]

mod layout;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::size_of_val;
use std::ptr;
use std::sync::Arc;

use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtMatmulDescAttributes_t, cublasLtMatmulPreferenceAttributes_t,
    cublasLtMatrixLayoutAttribute_t, cublasLtReductionScheme_t, cudaDataType_t,
};
use planfile::DType;
use planfile::plan::Matmul;

use crate::driver::{Address, Gpu, Raw, Stream};
use crate::error::CudaError;
use crate::library::{LibraryName, functions};
use layout::{ColumnMajor, Product, epilogue};

functions! {
    CublasLt of LibraryName::CublasLt; cublasLtGetVersion,
    fn cublasLtGetVersion() -> usize;
    fn cublasLtGetStatusString(u32) -> *const c_char;
    fn cublasLtGetStatusName(u32) -> *const c_char;
    fn cublasLtCreate(*mut Raw) -> u32;
    fn cublasLtDestroy(Raw) -> u32;
    fn cublasLtMatmulDescCreate(*mut Raw, u32, u32) -> u32;
    fn cublasLtMatmulDescDestroy(Raw) -> u32;
    fn cublasLtMatmulDescSetAttribute(Raw, u32, *const c_void, usize) -> u32;
    fn cublasLtMatrixLayoutCreate(*mut Raw, u32, u64, u64, i64) -> u32;
    fn cublasLtMatrixLayoutDestroy(Raw) -> u32;
    fn cublasLtMatrixLayoutSetAttribute(Raw, u32, *const c_void, usize) -> u32;
    fn cublasLtMatmulPreferenceCreate(*mut Raw) -> u32;
    fn cublasLtMatmulPreferenceDestroy(Raw) -> u32;
    fn cublasLtMatmulPreferenceSetAttribute(Raw, u32, *const c_void, usize) -> u32;
    fn cublasLtMatmulAlgoGetHeuristic(Raw, Raw, Raw, Raw, Raw, Raw, Raw, c_int, *mut Heuristic, *mut c_int) -> u32;
    fn cublasLtMatmulAlgoCheck(Raw, Raw, Raw, Raw, Raw, Raw, *const [u64; 8], *mut Heuristic) -> u32;
    fn cublasLtMatmul(
        Raw, Raw, *const c_void, *const c_void, Raw, *const c_void, Raw, *const c_void, *const c_void, Raw, *mut c_void,
        Raw, *const [u64; 8], *mut c_void, usize, Raw,
    ) -> u32;
}

/// `cublasLtMatmulHeuristicResult_t`, with its status as a number.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace_bytes: usize,
    status: u32,
    waves: f32,
    reserved: [c_int; 4],
}

impl CublasLt {
    fn check(&self, call: &'static str, status: u32) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: both return strings that stay, for any number.
        let texts = unsafe { [(self.cublasLtGetStatusName)(status), (self.cublasLtGetStatusString)(status)] };
        let texts = texts.into_iter().filter(|text| !text.is_null());
        // SAFETY: as above.
        let texts: Vec<_> = texts.map(|text| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()).collect();
        let next = "CUBLASLT_LOG_LEVEL=2 makes cuBLASLt say more";
        Err(CudaError::Call { call, status: texts.join(": "), next })
    }

    /// Such as `13.0.2`.
    pub fn version(&self) -> String {
        // SAFETY: reads a constant.
        let version = unsafe { (self.cublasLtGetVersion)() };
        format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
    }
}

/// A kind of object of cuBLASLt's.
type Destroy = unsafe extern "C" fn(Raw) -> u32;

/// An object of cuBLASLt's, destroyed when dropped.
struct Owned {
    raw: Raw,
    destroy: Destroy,
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: created together with the function that ends it.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

/// cuBLASLt for one rank's thread, which has entered its GPU.
pub struct Handle {
    library: &'static CublasLt,
    raw: Raw,
    gpu: Arc<Gpu>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _alone = self.gpu.alone();
        // SAFETY: created in `new`; what was prepared with it is gone, and its rank's work is over.
        let _ = unsafe { (self.library.cublasLtDestroy)(self.raw) };
    }
}

/// Where a product finds its operands.
pub struct Operands<'a> {
    /// Address and type of each operand of the step.
    pub operands: &'a [(Address, DType)],
    pub result: (Address, DType),
    pub workspace: (Address, u64),
    /// A closed choice of `plan tune`; empty leaves it to the library.
    pub algorithm: &'a [u8],
}

/// A product whose algorithm is chosen.
pub struct PreparedMatmul {
    library: &'static CublasLt,
    handle: Raw,
    description: Owned,
    layouts: [Owned; 3],
    /// Left, right, added and result, as cuBLASLt sees them.
    addresses: [Address; 4],
    scale: f64,
    /// Whether there is something to add.
    adds: bool,
    double: bool,
    algorithm: [u64; 8],
    workspace: (Address, u64),
}

impl Handle {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let library = CublasLt::get()?;
        let _alone = gpu.alone();
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle.
        library.check("cublasLtCreate", unsafe { (library.cublasLtCreate)(&mut raw) })?;
        Ok(Self { library, raw, gpu: Arc::clone(gpu) })
    }

    /// Chooses how to compute a product, deterministically, within its workspace.
    pub fn prepare(&self, matmul: &Matmul, at: &Operands<'_>) -> Result<PreparedMatmul, CudaError> {
        let library = self.library;
        let find = |operand: u32| {
            let found = at.operands.get(operand as usize).copied();
            found.ok_or_else(|| {
                CudaError::contradiction(format!("a product reads operand {operand}, which is not there"))
            })
        };
        let product = Product::new(matmul)?;
        let result_dtype = at.result.1;
        let double = result_dtype == DType::F64;
        let compute = match result_dtype {
            DType::F64 => cublasComputeType_t::CUBLAS_COMPUTE_64F,
            DType::F32 if matmul.allow_tf32 => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let scale_type = data_type(if double { DType::F64 } else { DType::F32 })?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle.
        let status = unsafe { (library.cublasLtMatmulDescCreate)(&mut raw, compute as u32, scale_type) };
        library.check("cublasLtMatmulDescCreate", status)?;
        let description = Owned { raw, destroy: library.cublasLtMatmulDescDestroy };
        let set = |attribute: cublasLtMatmulDescAttributes_t, value: &[u8]| {
            // SAFETY: the description lives; the value has the length that is said.
            let status = unsafe {
                (library.cublasLtMatmulDescSetAttribute)(
                    description.raw,
                    attribute as u32,
                    value.as_ptr().cast(),
                    size_of_val(value),
                )
            };
            library.check("cublasLtMatmulDescSetAttribute", status)
        };
        use cublasLtMatmulDescAttributes_t as Attribute;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &product.left.operation().to_ne_bytes())?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &product.right.operation().to_ne_bytes())?;
        set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue(matmul).to_ne_bytes())?;
        if let Some(bias) = matmul.bias {
            let (address, dtype) = find(bias)?;
            if dtype != result_dtype {
                return Err(CudaError::contradiction(format!(
                    "a bias of {dtype} is added to a product of {result_dtype}"
                )));
            }
            set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &address.to_ne_bytes())?;
        }
        let (left, left_dtype) = find(product.left.operand)?;
        let (right, right_dtype) = find(product.right.operand)?;
        let shift = |address: Address, matrix: &ColumnMajor, dtype: DType| {
            let bytes = matrix.offset.checked_mul(dtype.bytes() as u64).and_then(|bytes| address.checked_add(bytes));
            bytes.ok_or_else(|| CudaError::contradiction("a matrix begins beyond all memory"))
        };
        let left = shift(left, &product.left, left_dtype)?;
        let right = shift(right, &product.right, right_dtype)?;
        let result = shift(at.result.0, &product.result, result_dtype)?;
        let added = match matmul.residual {
            Some(residual) => shift(find(residual)?.0, &product.result, result_dtype)?,
            None => result,
        };
        let layouts = [
            self.layout(&product.left, left_dtype, matmul.batch)?,
            self.layout(&product.right, right_dtype, matmul.batch)?,
            self.layout(&product.result, result_dtype, matmul.batch)?,
        ];
        let addresses = [left, right, added, result];
        let parts = (&description, &layouts, addresses);
        let algorithm = match <[u8; 64]>::try_from(at.algorithm) {
            Ok(bytes) => self.closed(parts, bytes, at.workspace.1)?,
            Err(_) if at.algorithm.is_empty() => self.choose(parts, matmul, at.workspace.1)?,
            Err(_) => return Err(CudaError::contradiction("the recorded algorithm of a product has another length")),
        };
        Ok(PreparedMatmul {
            library,
            handle: self.raw,
            description,
            layouts,
            addresses,
            scale: matmul.scale.0,
            adds: matmul.residual.is_some(),
            double,
            algorithm,
            workspace: at.workspace,
        })
    }

    fn layout(&self, matrix: &ColumnMajor, dtype: DType, batch: u64) -> Result<Owned, CudaError> {
        let library = self.library;
        let too_large = || CudaError::contradiction("a matrix is too large for cuBLASLt");
        let leading = i64::try_from(matrix.leading).map_err(|_| too_large())?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle.
        let status = unsafe {
            (library.cublasLtMatrixLayoutCreate)(&mut raw, data_type(dtype)?, matrix.rows, matrix.columns, leading)
        };
        library.check("cublasLtMatrixLayoutCreate", status)?;
        let layout = Owned { raw, destroy: library.cublasLtMatrixLayoutDestroy };
        let set = |attribute: cublasLtMatrixLayoutAttribute_t, value: &[u8]| {
            // SAFETY: the layout lives; the value has the length that is said.
            let status = unsafe {
                (library.cublasLtMatrixLayoutSetAttribute)(raw, attribute as u32, value.as_ptr().cast(), value.len())
            };
            library.check("cublasLtMatrixLayoutSetAttribute", status)
        };
        if batch > 1 {
            use cublasLtMatrixLayoutAttribute_t as Attribute;
            let count = i32::try_from(batch).map_err(|_| too_large())?;
            let stride = i64::try_from(matrix.batch_stride).map_err(|_| too_large())?;
            set(Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count.to_ne_bytes())?;
            set(Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride.to_ne_bytes())?;
        }
        Ok(layout)
    }

    /// Takes a recorded algorithm, if this library still has it.
    fn closed(
        &self,
        (description, layouts, _): (&Owned, &[Owned; 3], [Address; 4]),
        bytes: [u8; 64],
        workspace_bytes: u64,
    ) -> Result<[u64; 8], CudaError> {
        let mut algorithm = [0u64; 8];
        for (word, bytes) in algorithm.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        }
        let [left, right, result] = layouts;
        let mut checked = Heuristic::default();
        // SAFETY: all objects live; writes one result.
        let status = unsafe {
            (self.library.cublasLtMatmulAlgoCheck)(
                self.raw,
                description.raw,
                left.raw,
                right.raw,
                result.raw,
                result.raw,
                &algorithm,
                &mut checked,
            )
        };
        if status != 0 || checked.workspace_bytes as u64 > workspace_bytes {
            return Err(CudaError::Refused {
                library: LibraryName::CublasLt,
                what: "the algorithm that the plan records".to_owned(),
                next: "tune the plan again with this version of the library",
            });
        }
        Ok(algorithm)
    }

    /// The library's own choice.
    fn choose(
        &self,
        (description, layouts, addresses): (&Owned, &[Owned; 3], [Address; 4]),
        matmul: &Matmul,
        workspace_bytes: u64,
    ) -> Result<[u64; 8], CudaError> {
        let library = self.library;
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle.
        let status = unsafe { (library.cublasLtMatmulPreferenceCreate)(&mut raw) };
        library.check("cublasLtMatmulPreferenceCreate", status)?;
        let preference = Owned { raw, destroy: library.cublasLtMatmulPreferenceDestroy };
        let set = |attribute: cublasLtMatmulPreferenceAttributes_t, value: &[u8]| {
            // SAFETY: the object lives; the value has the length that is said.
            let status = unsafe {
                (library.cublasLtMatmulPreferenceSetAttribute)(
                    preference.raw,
                    attribute as u32,
                    value.as_ptr().cast(),
                    value.len(),
                )
            };
            library.check("cublasLtMatmulPreferenceSetAttribute", status)
        };
        use cublasLtMatmulPreferenceAttributes_t as Attribute;
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(workspace_bytes as usize).to_ne_bytes())?;
        // Partial sums stay in the type of the accumulation.
        let scheme = cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme.to_ne_bytes())?;
        let alignments = [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ];
        for (attribute, address) in alignments.into_iter().zip(addresses) {
            let alignment = 1u32 << address.trailing_zeros().min(8);
            set(attribute, &alignment.to_ne_bytes())?;
        }
        let [left, right, result] = layouts;
        let (mut found, mut count) = (Heuristic::default(), 0);
        // SAFETY: all objects live; writes at most one result, and how many.
        let status = unsafe {
            (library.cublasLtMatmulAlgoGetHeuristic)(
                self.raw,
                description.raw,
                left.raw,
                right.raw,
                result.raw,
                result.raw,
                preference.raw,
                1,
                &mut found,
                &mut count,
            )
        };
        // 15: nothing fits.
        if status == 15 || (status == 0 && (count == 0 || found.status != 0)) {
            let Matmul { m, n, k, batch, .. } = matmul;
            return Err(CudaError::Refused {
                library: LibraryName::CublasLt,
                what: format!("a product {m} × {k} × {n}, batch {batch}, in {workspace_bytes} bytes of workspace"),
                next: "another version of the library may have it; or report it with the plan",
            });
        }
        library.check("cublasLtMatmulAlgoGetHeuristic", status)?;
        Ok(found.algorithm)
    }
}

impl PreparedMatmul {
    /// Puts the product on the stream.
    ///
    /// # Safety
    /// The addresses it was prepared with are memory of the stream's GPU, as long as the call says, until the stream is
    /// done. The handle it was prepared by lives.
    pub unsafe fn enqueue(&self, stream: &Stream) -> Result<(), CudaError> {
        let beta = if self.adds { 1.0 } else { 0.0 };
        let (doubles, floats) = ([self.scale, beta], [self.scale as f32, beta as f32]);
        let [alpha, beta]: [*const c_void; 2] = if self.double {
            [ptr::from_ref(&doubles[0]).cast(), ptr::from_ref(&doubles[1]).cast()]
        } else {
            [ptr::from_ref(&floats[0]).cast(), ptr::from_ref(&floats[1]).cast()]
        };
        let [left, right, added, result] = self.addresses;
        let [left_layout, right_layout, result_layout] = &self.layouts;
        // SAFETY: the caller's promise; factors are read before the call returns.
        let status = unsafe {
            (self.library.cublasLtMatmul)(
                self.handle,
                self.description.raw,
                alpha,
                left as *const c_void,
                left_layout.raw,
                right as *const c_void,
                right_layout.raw,
                beta,
                added as *const c_void,
                result_layout.raw,
                result as *mut c_void,
                result_layout.raw,
                &self.algorithm,
                self.workspace.0 as *mut c_void,
                self.workspace.1 as usize,
                stream.raw,
            )
        };
        self.library.check("cublasLtMatmul", status)
    }
}

/// How cuBLASLt numbers an element type.
fn data_type(dtype: DType) -> Result<u32, CudaError> {
    let found = match dtype {
        DType::F16 => cudaDataType_t::CUDA_R_16F,
        DType::BF16 => cudaDataType_t::CUDA_R_16BF,
        DType::F32 => cudaDataType_t::CUDA_R_32F,
        DType::F64 => cudaDataType_t::CUDA_R_64F,
        other => return Err(CudaError::contradiction(format!("cuBLASLt is asked for a product of {other}"))),
    };
    Ok(found as u32)
}
