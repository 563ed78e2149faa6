//! Machine code on a GPU, and launches of its functions.

use std::ffi::{CString, c_int, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::CUfunction_attribute;
use planfile::Buffer;

use super::{Gpu, Raw, Stream};
use crate::cuda::error::CudaError;

/// A loaded cubin.
pub(in crate::cuda) struct Module {
    gpu: Arc<Gpu>,
    raw: Raw,
}

// SAFETY: the driver locks modules, and this one is only read after it was loaded.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin. It is trusted as any program is: the plan's signature vouches for it.
    pub(in crate::cuda) fn load(gpu: &Arc<Gpu>, cubin: &[u8]) -> Result<Self, CudaError> {
        // Anything else than an ELF file would be read as text, up to a zero that may not be there.
        if !cubin.starts_with(b"\x7fELF") {
            return Err(CudaError::contradiction("machine code of the plan is no cubin"));
        }
        let image = Buffer::from_bytes(cubin);
        let _entered = gpu.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: an ELF image says its own length; aligned for it. The driver copies what it needs.
        let status = unsafe { (gpu.driver.cuModuleLoadData)(&mut raw, image.bytes().as_ptr().cast()) };
        gpu.driver.check("cuModuleLoadData", status)?;
        Ok(Self { gpu: Arc::clone(gpu), raw })
    }

    /// The named kernel, allowed to have `shared_bytes` of dynamic shared memory. Usable as long as the module.
    pub(in crate::cuda) fn function(&self, symbol: &str, shared_bytes: u32) -> Result<Function, CudaError> {
        let name = CString::new(symbol).map_err(|_| CudaError::contradiction("a kernel's name has a zero in it"))?;
        let _entered = self.gpu.enter()?;
        let driver = self.gpu.driver;
        let mut raw = ptr::null_mut();
        // SAFETY: the module lives, the name is terminated.
        let status = unsafe { (driver.cuModuleGetFunction)(&mut raw, self.raw, name.as_ptr()) };
        driver.check("cuModuleGetFunction", status)?;
        if shared_bytes > 0 {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as u32;
            let bytes = c_int::try_from(shared_bytes).unwrap_or(c_int::MAX);
            // SAFETY: the function was just given out.
            let status = unsafe { (driver.cuFuncSetAttribute)(raw, attribute, bytes) };
            driver.check("cuFuncSetAttribute", status)?;
        }
        Ok(Function { raw })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: loaded in `load`.
            let _ = unsafe { (self.gpu.driver.cuModuleUnload)(self.raw) };
        }
    }
}

/// A kernel of a [`Module`].
#[derive(Clone, Copy)]
pub(in crate::cuda) struct Function {
    raw: Raw,
}

impl Function {
    /// Puts a launch on the stream. All parameters are of eight bytes: addresses, then integers.
    ///
    /// # Safety
    /// The module is still loaded; the kernel has these parameters, and what it does with them is within memory that
    /// stays until the stream is done.
    pub(in crate::cuda) unsafe fn launch(
        self,
        stream: &Stream,
        (grid, block, shared_bytes): ([u32; 3], [u32; 3], u32),
        parameters: &[u64],
    ) -> Result<(), CudaError> {
        let driver = stream.gpu.driver;
        let mut pointers: Vec<*mut c_void> =
            parameters.iter().map(|parameter| ptr::from_ref(parameter).cast_mut().cast()).collect();
        let [(gx, gy, gz), (bx, by, bz)] = [grid, block].map(|[x, y, z]| (x, y, z));
        // SAFETY: the caller's promise; the driver copies parameters before it returns.
        let status = unsafe {
            (driver.cuLaunchKernel)(
                self.raw,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                shared_bytes,
                stream.raw,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        driver.check("cuLaunchKernel", status)
    }
}
