//! Machine code on a GPU, and launches of its functions.

use std::ffi::{CString, c_int, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{CUfunction_attribute, cudaError_enum};
use planfile::Buffer;

use super::{Gpu, Raw, Stream};
use crate::error::CudaError;

/// Bytes of every parameter of a kernel: an address or an integer.
const PARAMETER_BYTES: usize = 8;

/// A loaded cubin.
pub struct Module {
    gpu: Arc<Gpu>,
    raw: Raw,
}

// SAFETY: the driver locks modules, and this one is only read after it was loaded.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin. It is trusted as any program is: the plan's signature vouches for it.
    pub fn load(gpu: &Arc<Gpu>, cubin: &[u8]) -> Result<Self, CudaError> {
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

    /// The named kernel, allowed to have `shared_bytes` of dynamic shared memory. Usable as long as the module. Where
    /// the driver knows (from CUDA 12.4 on), the kernel has as many parameters as are given, of eight bytes each.
    ///
    /// # Errors
    /// [`CudaError::Contradiction`] where it has others, or what the driver says.
    pub fn function(&self, symbol: &str, shared_bytes: u32, parameters: usize) -> Result<Function, CudaError> {
        let name = CString::new(symbol).map_err(|_| CudaError::contradiction("a kernel's name has a zero in it"))?;
        let _entered = self.gpu.enter()?;
        let driver = self.gpu.driver;
        let mut raw = ptr::null_mut();
        // SAFETY: the module lives, the name is terminated.
        let status = unsafe { (driver.cuModuleGetFunction)(&mut raw, self.raw, name.as_ptr()) };
        driver.check("cuModuleGetFunction", status)?;
        if let Some(info) = driver.cuFuncGetParamInfo {
            check_parameters(symbol, parameters, |number| {
                let (mut offset, mut bytes) = (0, 0);
                // SAFETY: the function was just given out; writes two integers.
                let status = unsafe { info(raw, number, &mut offset, &mut bytes) };
                if status == cudaError_enum::CUDA_ERROR_INVALID_VALUE as u32 {
                    return Ok(None);
                }
                driver.check("cuFuncGetParamInfo", status)?;
                Ok(Some(bytes))
            })?;
        }
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

/// Compares a kernel's parameters with those that launches will give it. `size_of` tells the bytes of one by its
/// number, `None` behind the last.
fn check_parameters(
    symbol: &str,
    given: usize,
    mut size_of: impl FnMut(usize) -> Result<Option<usize>, CudaError>,
) -> Result<(), CudaError> {
    for number in 0..given {
        match size_of(number)? {
            Some(PARAMETER_BYTES) => {}
            Some(bytes) => {
                let what = format!("parameter {number} of kernel `{symbol}` has {bytes} bytes, not {PARAMETER_BYTES}");
                return Err(CudaError::contradiction(what));
            }
            None => {
                let what = format!("kernel `{symbol}` has {number} parameters, and the step gives it {given}");
                return Err(CudaError::contradiction(what));
            }
        }
    }
    match size_of(given)? {
        None => Ok(()),
        Some(_) => {
            let what = format!("kernel `{symbol}` has more parameters than the {given} that the step gives it");
            Err(CudaError::contradiction(what))
        }
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
pub struct Function {
    raw: Raw,
}

impl Function {
    /// Puts a launch on the stream. All parameters are of eight bytes: addresses, then integers.
    ///
    /// # Safety
    /// The module is still loaded; the kernel has exactly these parameters, of eight bytes each ([`Module::function`]
    /// has compared them, unless the driver is older than CUDA 12.4: then the plan vouches for them), and what it does
    /// with them is within memory that stays until the stream is done.
    pub unsafe fn launch(
        self,
        stream: &Stream,
        (grid, block, shared_bytes): ([u32; 3], [u32; 3], u32),
        parameters: &[u64],
    ) -> Result<(), CudaError> {
        let driver = stream.gpu.driver;
        let mut pointers: Vec<*mut c_void> =
            parameters.iter().map(|parameter| ptr::from_ref(parameter).cast_mut().cast()).collect();
        let [(gx, gy, gz), (bx, by, bz)] = [grid, block].map(|[x, y, z]| (x, y, z));
        // SAFETY: the caller's promise: the driver reads a pointer, and eight bytes behind it, for each parameter that
        // the kernel has, and copies them before it returns.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(sizes: &[usize], given: usize) -> Result<(), String> {
        check_parameters("k", given, |number| Ok(sizes.get(number).copied())).map_err(|error| error.to_string())
    }

    #[test]
    fn a_kernel_has_the_parameters_that_it_is_given() {
        assert_eq!(checked(&[8, 8, 8], 3), Ok(()));
        assert_eq!(checked(&[], 0), Ok(()));
    }

    #[test]
    fn other_parameters_are_a_contradiction() {
        let refused = |sizes: &[usize], given| checked(sizes, given).unwrap_err();
        let what = |text: String| text.split_once(';').unwrap().0.to_owned();
        assert_eq!(what(refused(&[8, 8], 3)), "kernel `k` has 2 parameters, and the step gives it 3");
        assert_eq!(what(refused(&[8; 4], 3)), "kernel `k` has more parameters than the 3 that the step gives it");
        assert_eq!(what(refused(&[8, 4, 8], 3)), "parameter 1 of kernel `k` has 4 bytes, not 8");
    }

    #[test]
    fn failures_of_the_driver_are_its_own() {
        let failure = CudaError::Call { call: "cuFuncGetParamInfo", status: "709".to_owned(), next: "" };
        assert_eq!(check_parameters("k", 1, |_| Err(failure.clone())), Err(failure));
    }
}
