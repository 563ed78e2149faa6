//! Memory of a GPU, and memory of the host that it reaches directly.

use std::ops::Range;
use std::sync::Arc;
use std::{ptr, slice};

use cudarc::driver::sys::CU_MEMHOSTALLOC_PORTABLE;

use super::{Address, Gpu, Stream};
use crate::error::CudaError;

/// A range of a GPU's memory. Plain memory and not of a pool, which peers could not reach.
pub struct DeviceMemory {
    gpu: Arc<Gpu>,
    pub address: Address,
    pub bytes: u64,
    /// What the GPU has less since: the bytes in whole pages of the driver. Exact unless others, such as another
    /// process, took or freed memory at the same moment.
    pub taken_bytes: u64,
}

impl DeviceMemory {
    /// `bytes` of memory, at least one, with whatever was in it.
    pub fn allocate(gpu: &Arc<Gpu>, bytes: u64) -> Result<Self, CudaError> {
        let _entered = gpu.enter()?;
        let mut address = 0;
        let size = usize::try_from(bytes.max(1)).unwrap_or(usize::MAX);
        let (before, _) = gpu.memory()?;
        // SAFETY: writes one address; freed on drop.
        let status = unsafe { (gpu.driver.cuMemAlloc_v2)(&mut address, size) };
        gpu.driver.check("cuMemAlloc", status)?;
        let mut memory = Self { gpu: Arc::clone(gpu), address, bytes, taken_bytes: 0 };
        memory.taken_bytes = before.saturating_sub(gpu.memory()?.0);
        Ok(memory)
    }

    /// Fills all of it with zeros, in the order of the stream.
    pub fn clear(&self, stream: &Stream) -> Result<(), CudaError> {
        if self.bytes == 0 {
            return Ok(());
        }
        let driver = self.gpu.driver;
        // SAFETY: the range is this allocation, which frees only after the GPU is done with it.
        let status = unsafe { (driver.cuMemsetD8Async)(self.address, 0, self.bytes as usize, stream.raw) };
        driver.check("cuMemsetD8Async", status)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: allocated in `allocate`; the driver waits for work on it.
            let _ = unsafe { (self.gpu.driver.cuMemFree_v2)(self.address) };
        }
    }
}

/// Page-locked memory of the host: copies to and from any GPU run beside the host's own work.
pub struct Pinned {
    gpu: Arc<Gpu>,
    pointer: *mut u8,
    len: usize,
}

// SAFETY: owned memory, reached through `&self` and `&mut self` alone.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Zeros.
    pub fn zeroed(gpu: &Arc<Gpu>, len: usize) -> Result<Self, CudaError> {
        let _entered = gpu.enter()?;
        let mut pointer = ptr::null_mut();
        // SAFETY: writes one pointer; freed on drop.
        let status = unsafe { (gpu.driver.cuMemHostAlloc)(&mut pointer, len.max(1), CU_MEMHOSTALLOC_PORTABLE) };
        gpu.driver.check("cuMemHostAlloc", status)?;
        let pointer = pointer.cast::<u8>();
        // SAFETY: the allocation has at least that many bytes.
        unsafe { pointer.write_bytes(0, len) };
        Ok(Self { gpu: Arc::clone(gpu), pointer, len })
    }

    /// Where the GPU finds it, for kernels to write to. Who gives the address to a kernel promises that the kernel
    /// stays within the memory, and that nobody calls [`Self::bytes`] or [`Self::bytes_mut`], or drops the memory,
    /// between the launch and the return of a [`Stream::wait`] after it.
    pub fn address(&self) -> Result<Address, CudaError> {
        let _entered = self.gpu.enter()?;
        let mut address = 0;
        // SAFETY: writes one address; the memory was allocated in `zeroed`.
        let status = unsafe { (self.gpu.driver.cuMemHostGetDevicePointer_v2)(&mut address, self.pointer.cast(), 0) };
        self.gpu.driver.check("cuMemHostGetDevicePointer", status)?;
        Ok(address)
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: initialised in `zeroed`; writes by the GPU end before `Stream::wait` returns, as callers of
        // `download` and users of `address` promise.
        unsafe { slice::from_raw_parts(self.pointer, self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.pointer, self.len) }
    }

    /// The address of `range`.
    fn at(&self, range: &Range<usize>) -> Result<*mut u8, CudaError> {
        if range.start > range.end || range.end > self.len {
            return Err(CudaError::contradiction(format!("bytes {range:?} of {} are copied", self.len)));
        }
        Ok(self.pointer.wrapping_add(range.start))
    }

    /// Copies `range` to the GPU in the order of the stream.
    ///
    /// # Safety
    /// `to` has room for it on the stream's GPU, and neither memory is freed or changed before the stream is done.
    pub unsafe fn upload(&self, range: Range<usize>, to: Address, stream: &Stream) -> Result<(), CudaError> {
        let from = self.at(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        let driver = self.gpu.driver;
        // SAFETY: the caller's promise; `at` checked this side.
        let status = unsafe { (driver.cuMemcpyHtoDAsync_v2)(to, from.cast(), range.len(), stream.raw) };
        driver.check("cuMemcpyHtoDAsync", status)
    }

    /// Copies from the GPU into `range` in the order of the stream.
    ///
    /// # Safety
    /// As for [`Self::upload`]; nobody looks at the bytes before the stream is done.
    pub unsafe fn download(&mut self, range: Range<usize>, from: Address, stream: &Stream) -> Result<(), CudaError> {
        let to = self.at(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        let driver = self.gpu.driver;
        // SAFETY: the caller's promise; `at` checked this side.
        let status = unsafe { (driver.cuMemcpyDtoHAsync_v2)(to.cast(), from, range.len(), stream.raw) };
        driver.check("cuMemcpyDtoHAsync", status)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: allocated in `zeroed`.
            let _ = unsafe { (self.gpu.driver.cuMemFreeHost)(self.pointer.cast()) };
        }
    }
}

/// Copies from the GPU into ordinary memory, and waits for it.
///
/// # Safety
/// `from` has as many bytes, on the stream's GPU.
pub unsafe fn read(stream: &Stream, from: Address, to: &mut [u8]) -> Result<(), CudaError> {
    if to.is_empty() {
        return Ok(());
    }
    let driver = stream.gpu.driver;
    // SAFETY: the caller's promise; the slice is borrowed until the wait below.
    let status = unsafe { (driver.cuMemcpyDtoHAsync_v2)(to.as_mut_ptr().cast(), from, to.len(), stream.raw) };
    driver.check("cuMemcpyDtoHAsync", status)?;
    stream.wait()
}
