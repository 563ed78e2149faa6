//! The CUDA driver: GPUs, their memory, streams and graphs. Every status becomes an error.
#![expect(unsafe_code, reason = "calls the CUDA driver")]

mod memory;
mod module;
mod stream;

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUdevice_attribute;

use crate::error::CudaError;
use crate::library::{LibraryName, functions};

pub use memory::{DeviceMemory, Pinned, read};
pub use module::{Function, Module};
pub use stream::{Event, Graph, Stream};

/// A handle of the driver's.
pub type Raw = *mut c_void;
/// An address in a GPU's memory.
pub type Address = u64;

functions! {
    Driver of LibraryName::Driver; cuInit,
    fn cuInit(c_uint) -> u32;
    fn cuDriverGetVersion(*mut c_int) -> u32;
    fn cuGetErrorName(u32, *mut *const c_char) -> u32;
    fn cuGetErrorString(u32, *mut *const c_char) -> u32;
    fn cuDeviceGetCount(*mut c_int) -> u32;
    fn cuDeviceGet(*mut c_int, c_int) -> u32;
    fn cuDeviceGetName(*mut c_char, c_int, c_int) -> u32;
    fn cuDeviceGetAttribute(*mut c_int, c_uint, c_int) -> u32;
    fn cuDeviceTotalMem_v2(*mut usize, c_int) -> u32;
    fn cuDeviceGetPCIBusId(*mut c_char, c_int, c_int) -> u32;
    fn cuDeviceCanAccessPeer(*mut c_int, c_int, c_int) -> u32;
    fn cuDevicePrimaryCtxRetain(*mut Raw, c_int) -> u32;
    fn cuCtxPushCurrent_v2(Raw) -> u32;
    fn cuCtxPopCurrent_v2(*mut Raw) -> u32;
    fn cuMemGetInfo_v2(*mut usize, *mut usize) -> u32;
    fn cuMemAlloc_v2(*mut Address, usize) -> u32;
    fn cuMemFree_v2(Address) -> u32;
    fn cuMemHostAlloc(*mut Raw, usize, c_uint) -> u32;
    fn cuMemFreeHost(Raw) -> u32;
    fn cuMemHostGetDevicePointer_v2(*mut Address, Raw, c_uint) -> u32;
    fn cuMemsetD8Async(Address, u8, usize, Raw) -> u32;
    fn cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, Raw) -> u32;
    fn cuMemcpyDtoHAsync_v2(Raw, Address, usize, Raw) -> u32;
    fn cuMemcpyDtoDAsync_v2(Address, Address, usize, Raw) -> u32;
    fn cuStreamCreate(*mut Raw, c_uint) -> u32;
    fn cuStreamDestroy_v2(Raw) -> u32;
    fn cuStreamSynchronize(Raw) -> u32;
    fn cuStreamQuery(Raw) -> u32;
    fn cuStreamWaitEvent(Raw, Raw, c_uint) -> u32;
    fn cuStreamBeginCapture_v2(Raw, c_uint) -> u32;
    fn cuStreamEndCapture(Raw, *mut Raw) -> u32;
    fn cuEventCreate(*mut Raw, c_uint) -> u32;
    fn cuEventRecord(Raw, Raw) -> u32;
    fn cuEventElapsedTime(*mut f32, Raw, Raw) -> u32;
    fn cuEventDestroy_v2(Raw) -> u32;
    fn cuGraphInstantiateWithFlags(*mut Raw, Raw, u64) -> u32;
    fn cuGraphLaunch(Raw, Raw) -> u32;
    fn cuGraphExecDestroy(Raw) -> u32;
    fn cuGraphDestroy(Raw) -> u32;
    fn cuModuleLoadData(*mut Raw, *const c_void) -> u32;
    fn cuModuleUnload(Raw) -> u32;
    fn cuModuleGetFunction(*mut Raw, Raw, *const c_char) -> u32;
    fn cuFuncSetAttribute(Raw, c_uint, c_int) -> u32;
    fn cuLaunchKernel(Raw, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Raw, *mut Raw, *mut Raw) -> u32;
    optional fn cuFuncGetParamInfo(Raw, usize, *mut usize, *mut usize) -> u32;
}

impl Driver {
    /// The driver, initialised.
    ///
    /// # Errors
    /// [`CudaError::Absent`], or what the driver says about the machine.
    pub fn ready() -> Result<&'static Self, CudaError> {
        let driver = Self::get()?;
        // SAFETY: may be called any number of times, from any thread.
        driver.check("cuInit", unsafe { (driver.cuInit)(0) })?;
        Ok(driver)
    }

    /// Turns a status into an error.
    pub fn check(&self, call: &'static str, status: u32) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        let text = |function: unsafe extern "C" fn(u32, *mut *const c_char) -> u32| {
            let mut text = ptr::null();
            // SAFETY: the driver returns a string of its own, or leaves null for a status that it does not know.
            match unsafe { function(status, &mut text) } {
                // SAFETY: as above.
                0 if !text.is_null() => Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()),
                _ => None,
            }
        };
        let name = text(self.cuGetErrorName).unwrap_or_else(|| format!("status {status}"));
        let status = match text(self.cuGetErrorString) {
            Some(description) => format!("{name} ({description})"),
            None => name.clone(),
        };
        Err(CudaError::Call { call, status, next: advice(call, &name) })
    }

    /// The newest CUDA version that the driver serves.
    pub fn version(&self) -> Result<String, CudaError> {
        let mut version = 0;
        // SAFETY: writes one integer.
        self.check("cuDriverGetVersion", unsafe { (self.cuDriverGetVersion)(&mut version) })?;
        Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
    }

    /// Number of GPUs that this process may use.
    pub fn count(&self) -> Result<u32, CudaError> {
        let mut count = 0;
        // SAFETY: writes one integer.
        let status = unsafe { (self.cuDeviceGetCount)(&mut count) };
        self.check("cuDeviceGetCount", status)?;
        Ok(count.max(0) as u32)
    }

    fn device(&self, ordinal: u32) -> Result<c_int, CudaError> {
        let mut device = 0;
        let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: writes one integer.
        self.check("cuDeviceGet", unsafe { (self.cuDeviceGet)(&mut device, ordinal) })?;
        Ok(device)
    }

    fn attribute(&self, device: c_int, attribute: CUdevice_attribute) -> Result<u32, CudaError> {
        let mut value = 0;
        // SAFETY: writes one integer.
        let status = unsafe { (self.cuDeviceGetAttribute)(&mut value, attribute as c_uint, device) };
        self.check("cuDeviceGetAttribute", status)?;
        Ok(value.max(0) as u32)
    }

    /// What is known of a GPU without using it.
    pub fn describe(&self, ordinal: u32) -> Result<GpuInfo, CudaError> {
        let device = self.device(ordinal)?;
        let mut name = [0 as c_char; 128];
        // SAFETY: writes a terminated string of at most that length.
        let status = unsafe { (self.cuDeviceGetName)(name.as_mut_ptr(), name.len() as c_int, device) };
        self.check("cuDeviceGetName", status)?;
        let mut bus = [0 as c_char; 64];
        // SAFETY: as above.
        let status = unsafe { (self.cuDeviceGetPCIBusId)(bus.as_mut_ptr(), bus.len() as c_int, device) };
        self.check("cuDeviceGetPCIBusId", status)?;
        let mut memory_bytes = 0;
        // SAFETY: writes one integer.
        let status = unsafe { (self.cuDeviceTotalMem_v2)(&mut memory_bytes, device) };
        self.check("cuDeviceTotalMem", status)?;
        let attribute = |which| self.attribute(device, which);
        Ok(GpuInfo {
            ordinal,
            name: text_of(&name),
            pci_bus: text_of(&bus),
            capability: (
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            memory_bytes: memory_bytes as u64,
        })
    }

    /// Whether one GPU can address another's memory.
    pub fn reaches(&self, from: u32, to: u32) -> Result<bool, CudaError> {
        let (from, to) = (self.device(from)?, self.device(to)?);
        let mut can = 0;
        // SAFETY: writes one integer.
        let status = unsafe { (self.cuDeviceCanAccessPeer)(&mut can, from, to) };
        self.check("cuDeviceCanAccessPeer", status)?;
        Ok(can != 0)
    }
}

/// Text up to the terminating zero.
fn text_of(characters: &[c_char]) -> String {
    let bytes = characters.iter().map(|&character| character as u8).take_while(|&byte| byte != 0);
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

/// What to do about a status.
fn advice(call: &str, name: &str) -> &'static str {
    match name {
        "CUDA_ERROR_OUT_OF_MEMORY" if call == "cuMemHostAlloc" => {
            "free memory of this machine, or raise its limit of locked memory (`ulimit -l`): inputs, outputs and \
             weights pass through page-locked memory"
        }
        "CUDA_ERROR_OUT_OF_MEMORY" => "free memory of the GPU (`nvidia-smi` shows who holds it), or use more GPUs",
        "CUDA_ERROR_NO_DEVICE" => "there is no GPU that this process may use; see CUDA_VISIBLE_DEVICES",
        "CUDA_ERROR_INVALID_DEVICE" => "there is no such GPU; `plan doctor` lists them",
        "CUDA_ERROR_NO_BINARY_FOR_GPU" => "compile the plan for the architecture of this GPU",
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" | "CUDA_ERROR_INSUFFICIENT_DRIVER" => "update the NVIDIA driver",
        "CUDA_ERROR_ILLEGAL_ADDRESS" | "CUDA_ERROR_MISALIGNED_ADDRESS" | "CUDA_ERROR_ILLEGAL_INSTRUCTION" => {
            "a kernel is at fault: report it with the plan; `plan check` finds the step"
        }
        _ => "the driver's manual says more about this status",
    }
}

/// What is known of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// As CUDA counts them, `CUDA_VISIBLE_DEVICES` applied.
    pub ordinal: u32,
    pub name: String,
    /// Domain, bus, device and function.
    pub pci_bus: String,
    /// Major and minor.
    pub capability: (u32, u32),
    pub multiprocessors: u32,
    pub memory_bytes: u64,
}

/// A GPU in use: its primary context, which all sessions of the process share.
///
/// The context is never given back: libraries keep code and state in it that they would find gone in the next one.
pub struct Gpu {
    driver: &'static Driver,
    context: Raw,
    pub info: GpuInfo,
    /// See [`Self::alone`].
    alone: Mutex<()>,
}

// SAFETY: the driver allows a context to be current on any thread, and locks it.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// The GPU, the same to all who ask for it.
    pub fn open(ordinal: u32) -> Result<Arc<Self>, CudaError> {
        static OPEN: Mutex<BTreeMap<u32, Arc<Gpu>>> = Mutex::new(BTreeMap::new());
        // An entry is there when it is whole.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = open.get(&ordinal) {
            return Ok(Arc::clone(known));
        }
        let driver = Driver::ready()?;
        let (info, device) = (driver.describe(ordinal)?, driver.device(ordinal)?);
        let mut context = ptr::null_mut();
        // SAFETY: the device was given out by the driver.
        let status = unsafe { (driver.cuDevicePrimaryCtxRetain)(&mut context, device) };
        driver.check("cuDevicePrimaryCtxRetain", status)?;
        let gpu = Arc::new(Self { driver, context, info, alone: Mutex::default() });
        open.insert(ordinal, Arc::clone(&gpu));
        Ok(gpu)
    }

    /// Waits until no other thread of the process captures a graph on this GPU, or makes or ends the handle of a library.
    ///
    /// `cublasLtDestroy` and `cudnnDestroy` synchronise the context, which CUDA forbids while any of its streams is
    /// captured: captures of other threads are invalidated, and the driver (580) may crash. Nothing that waits for another
    /// rank may happen while this is held.
    pub fn alone(&self) -> MutexGuard<'_, ()> {
        // Nothing is behind the lock that a panic could leave half done.
        self.alone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes this the calling thread's GPU until the guard is dropped.
    pub fn enter(&self) -> Result<Entered<'_>, CudaError> {
        // SAFETY: the context is held as long as `self`.
        let status = unsafe { (self.driver.cuCtxPushCurrent_v2)(self.context) };
        self.driver.check("cuCtxPushCurrent", status)?;
        Ok(Entered { driver: self.driver, _gpu: std::marker::PhantomData })
    }

    /// Free bytes, and all.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers.
        let status = unsafe { (self.driver.cuMemGetInfo_v2)(&mut free, &mut total) };
        self.driver.check("cuMemGetInfo", status)?;
        Ok((free as u64, total as u64))
    }
}

/// The calling thread works on a GPU while this lives. Stays on its thread.
pub struct Entered<'a> {
    driver: &'static Driver,
    _gpu: std::marker::PhantomData<(&'a Gpu, *const ())>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut context = ptr::null_mut();
        // SAFETY: pops what `enter` pushed.
        let _ = unsafe { (self.driver.cuCtxPopCurrent_v2)(&mut context) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_tells_memory_of_the_machine_from_that_of_a_gpu() {
        let of = |call| advice(call, "CUDA_ERROR_OUT_OF_MEMORY");
        assert!(of("cuMemAlloc").contains("nvidia-smi") && of("cuMemHostAlloc").contains("ulimit -l"));
    }
}
