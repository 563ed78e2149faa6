//! Streams, events between them, and graphs captured from them.

use std::sync::Arc;
use std::{hint, ptr, thread};

use cudarc::driver::sys::{CUevent_flags, CUstream_flags, CUstreamCaptureMode};

use super::{Address, Gpu, Raw};
use crate::error::CudaError;

/// `CUDA_ERROR_NOT_READY`: no error, the work is still going on.
const NOT_READY: u32 = 600;
/// Queries before a waiting thread begins to yield its core.
const QUERIES_BEFORE_YIELD: u32 = 10_000;

/// Work of a GPU in order. Belongs to the thread that made it, which has entered its GPU.
pub struct Stream {
    pub(super) gpu: Arc<Gpu>,
    pub raw: Raw,
}

impl Stream {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let _entered = gpu.enter()?;
        let mut raw = ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle; destroyed on drop.
        let status = unsafe { (gpu.driver.cuStreamCreate)(&mut raw, flags) };
        gpu.driver.check("cuStreamCreate", status)?;
        Ok(Self { gpu: Arc::clone(gpu), raw })
    }

    /// Waits until all work is done. The error may be that of earlier work.
    pub fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives.
        let status = unsafe { (self.gpu.driver.cuStreamSynchronize)(self.raw) };
        self.gpu.driver.check("cuStreamSynchronize", status)
    }

    /// As [`Self::wait`], unless `stopped` says in between that there is no point in waiting.
    pub fn wait_unless(&self, mut stopped: impl FnMut() -> Result<(), CudaError>) -> Result<(), CudaError> {
        let mut queries = 0u32;
        loop {
            // SAFETY: the stream lives.
            let status = unsafe { (self.gpu.driver.cuStreamQuery)(self.raw) };
            if status != NOT_READY {
                return self.gpu.driver.check("cuStreamQuery", status);
            }
            queries = queries.saturating_add(1);
            if queries < QUERIES_BEFORE_YIELD {
                hint::spin_loop();
            } else {
                thread::yield_now();
            }
            if queries.is_multiple_of(64) {
                stopped()?;
            }
        }
    }

    /// Lets later work of this stream wait for the event.
    pub fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: both live, and belong to this GPU.
        let status = unsafe { (self.gpu.driver.cuStreamWaitEvent)(self.raw, event.raw, 0) };
        self.gpu.driver.check("cuStreamWaitEvent", status)
    }

    /// Copies within the GPU.
    ///
    /// # Safety
    /// Both ranges are memory of the stream's GPU that stays until the stream is done.
    pub unsafe fn copy(&self, from: Address, to: Address, bytes: u64) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let status = unsafe { (self.gpu.driver.cuMemcpyDtoDAsync_v2)(to, from, bytes as usize, self.raw) };
        self.gpu.driver.check("cuMemcpyDtoDAsync", status)
    }

    /// Captures what `enqueue` puts on this stream, and on others that it lets wait for it, instead of running it.
    ///
    /// Of this thread alone, so that other threads may go on to allocate; what they may not do waits ([`Gpu::alone`]).
    pub fn capture<E: From<CudaError>>(&self, enqueue: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        let driver = self.gpu.driver;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as u32;
        let _alone = self.gpu.alone();
        // SAFETY: the stream lives and is not captured: captures end in this function.
        driver.check("cuStreamBeginCapture", unsafe { (driver.cuStreamBeginCapture_v2)(self.raw, mode) })?;
        let enqueued = enqueue();
        let mut graph = ptr::null_mut();
        // SAFETY: ends the capture begun above, whatever became of it.
        let ended = driver.check("cuStreamEndCapture", unsafe { (driver.cuStreamEndCapture)(self.raw, &mut graph) });
        let mut executable = ptr::null_mut();
        let outcome = enqueued.and_then(|()| {
            ended?;
            // SAFETY: the graph was just captured. The executable keeps what it needs of it.
            let status = unsafe { (driver.cuGraphInstantiateWithFlags)(&mut executable, graph, 0) };
            Ok(driver.check("cuGraphInstantiate", status)?)
        });
        if !graph.is_null() {
            // SAFETY: captured above and used by nobody else.
            let _ = unsafe { (driver.cuGraphDestroy)(graph) };
        }
        outcome?;
        Ok(Graph { gpu: Arc::clone(&self.gpu), raw: executable })
    }

    /// Puts a graph on the stream.
    ///
    /// # Safety
    /// What the graph's steps use is still there, and stays until the stream is done.
    pub unsafe fn launch(&self, graph: &Graph) -> Result<(), CudaError> {
        // SAFETY: the caller's promise; both handles live.
        let status = unsafe { (self.gpu.driver.cuGraphLaunch)(graph.raw, self.raw) };
        self.gpu.driver.check("cuGraphLaunch", status)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: created in `new`; work still on it runs to its end.
            let _ = unsafe { (self.gpu.driver.cuStreamDestroy_v2)(self.raw) };
        }
    }
}

/// A captured graph, ready to be launched any number of times.
pub struct Graph {
    gpu: Arc<Gpu>,
    raw: Raw,
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: instantiated in `capture`.
            let _ = unsafe { (self.gpu.driver.cuGraphExecDestroy)(self.raw) };
        }
    }
}

/// A moment in a stream.
pub struct Event {
    gpu: Arc<Gpu>,
    raw: Raw,
}

impl Event {
    /// One that tells when it happened.
    pub fn timed(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        Self::with(gpu, CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// One for other streams to wait for.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        Self::with(gpu, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn with(gpu: &Arc<Gpu>, flags: CUevent_flags) -> Result<Self, CudaError> {
        let _entered = gpu.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle; destroyed on drop.
        let status = unsafe { (gpu.driver.cuEventCreate)(&mut raw, flags as u32) };
        gpu.driver.check("cuEventCreate", status)?;
        Ok(Self { gpu: Arc::clone(gpu), raw })
    }

    /// Puts it behind what is on the stream now.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both live, and belong to this GPU.
        let status = unsafe { (self.gpu.driver.cuEventRecord)(self.raw, stream.raw) };
        self.gpu.driver.check("cuEventRecord", status)
    }

    /// Microseconds from `earlier` to this one; both have happened.
    pub fn us_since(&self, earlier: &Self) -> Result<f64, CudaError> {
        let mut milliseconds = 0f32;
        // SAFETY: writes one number.
        let status = unsafe { (self.gpu.driver.cuEventElapsedTime)(&mut milliseconds, earlier.raw, self.raw) };
        self.gpu.driver.check("cuEventElapsedTime", status)?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: created in `with`.
            let _ = unsafe { (self.gpu.driver.cuEventDestroy_v2)(self.raw) };
        }
    }
}
