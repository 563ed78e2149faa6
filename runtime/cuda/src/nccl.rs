//! NCCL: collectives and messages between GPUs.
#![expect(unsafe_code, reason = "calls NCCL")]

use std::env;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use cudarc::nccl::sys::{ncclDataType_t, ncclRedOp_t};
use planfile::attributes::combine_name;
use planfile::{Combine, DType};

use crate::driver::{Address, Raw, Stream};
use crate::error::CudaError;
use crate::library::{LibraryName, functions};

/// `ncclInProgress`.
const IN_PROGRESS: u32 = 7;
/// `NCCL_SPLIT_NOCOLOR`: the rank is in no group.
const NO_COLOUR: c_int = -1;

/// Names a set of ranks that are about to meet.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId([c_char; 128]);

functions! {
    Nccl of LibraryName::Nccl; ncclGetVersion,
    fn ncclGetVersion(*mut c_int) -> u32;
    fn ncclGetErrorString(u32) -> *const c_char;
    fn ncclGetLastError(Raw) -> *const c_char;
    fn ncclGetUniqueId(*mut UniqueId) -> u32;
    fn ncclCommInitRank(*mut Raw, c_int, UniqueId, c_int) -> u32;
    fn ncclCommSplit(Raw, c_int, c_int, *mut Raw, *mut c_void) -> u32;
    fn ncclCommDestroy(Raw) -> u32;
    fn ncclCommAbort(Raw) -> u32;
    fn ncclCommGetAsyncError(Raw, *mut u32) -> u32;
    fn ncclGroupStart() -> u32;
    fn ncclGroupEnd() -> u32;
    fn ncclAllReduce(*const c_void, *mut c_void, usize, u32, u32, Raw, Raw) -> u32;
    fn ncclAllGather(*const c_void, *mut c_void, usize, u32, Raw, Raw) -> u32;
    fn ncclReduceScatter(*const c_void, *mut c_void, usize, u32, u32, Raw, Raw) -> u32;
    fn ncclSend(*const c_void, usize, u32, c_int, Raw, Raw) -> u32;
    fn ncclRecv(*mut c_void, usize, u32, c_int, Raw, Raw) -> u32;
}

impl Nccl {
    /// The library, with multicast over NVLink off unless the user has decided about it.
    pub fn ready() -> Result<&'static Self, CudaError> {
        const MULTICAST: &str = "NCCL_NVLS_ENABLE";
        static DECIDED: std::sync::Once = std::sync::Once::new();
        DECIDED.call_once(|| {
            if env::var_os(MULTICAST).is_none() {
                // SAFETY: once in a process, before NCCL is opened and reads it; Rust's own readers are locked out.
                unsafe { env::set_var(MULTICAST, "0") };
            }
        });
        Self::get()
    }

    /// Such as `2.28.3`.
    pub fn version(&self) -> Result<String, CudaError> {
        let mut version = 0;
        // SAFETY: writes one integer.
        self.check("ncclGetVersion", ptr::null_mut(), unsafe { (self.ncclGetVersion)(&mut version) })?;
        Ok(format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
    }

    fn check(&self, call: &'static str, communicator: Raw, status: u32) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: both return strings that stay, null among them.
        let texts = unsafe { [(self.ncclGetErrorString)(status), (self.ncclGetLastError)(communicator)] };
        let texts = texts.into_iter().filter(|text| !text.is_null());
        // SAFETY: as above.
        let texts = texts.map(|text| unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned());
        let texts: Vec<String> = texts.filter(|text| !text.is_empty()).collect();
        Err(CudaError::Call { call, status: texts.join(": "), next: "NCCL_DEBUG=WARN makes NCCL say more" })
    }

    pub fn unique_id(&self) -> Result<UniqueId, CudaError> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes the 128 bytes.
        self.check("ncclGetUniqueId", ptr::null_mut(), unsafe { (self.ncclGetUniqueId)(&mut id) })?;
        Ok(id)
    }
}

/// How NCCL sees an element type, for results that depend on it.
fn number_type(dtype: DType) -> Option<ncclDataType_t> {
    match dtype {
        DType::Bool | DType::U8 => Some(ncclDataType_t::ncclUint8),
        DType::I8 => Some(ncclDataType_t::ncclInt8),
        DType::I32 => Some(ncclDataType_t::ncclInt32),
        DType::U32 => Some(ncclDataType_t::ncclUint32),
        DType::I64 => Some(ncclDataType_t::ncclInt64),
        DType::U64 => Some(ncclDataType_t::ncclUint64),
        DType::F16 => Some(ncclDataType_t::ncclFloat16),
        DType::BF16 => Some(ncclDataType_t::ncclBfloat16),
        DType::F32 => Some(ncclDataType_t::ncclFloat32),
        DType::F64 => Some(ncclDataType_t::ncclFloat64),
        DType::U16 | DType::I16 => None,
    }
}

/// An element type and a combination as NCCL numbers them.
fn reduction(dtype: DType, combine: Combine) -> Result<(u32, u32), CudaError> {
    let refused = || CudaError::Refused {
        library: LibraryName::Nccl,
        what: format!("combining {dtype} by {}", combine_name(combine)),
        next: "convert to another element type, or shard the model otherwise with --mesh",
    };
    let operation = match combine {
        // Sums and products of booleans are no bytes 0 and 1.
        Combine::Sum | Combine::Prod if dtype == DType::Bool => return Err(refused()),
        Combine::Sum => ncclRedOp_t::ncclSum,
        Combine::Prod => ncclRedOp_t::ncclProd,
        Combine::Max => ncclRedOp_t::ncclMax,
        Combine::Min => ncclRedOp_t::ncclMin,
    };
    Ok((number_type(dtype).ok_or_else(refused)? as u32, operation as u32))
}

/// Moved bytes have no type.
const BYTES: u32 = ncclDataType_t::ncclUint8 as u32;

/// What a group of ranks does together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// `elements` of operand and result.
    AllReduce {
        combine: Combine,
        dtype: DType,
        elements: u64,
    },
    /// `bytes` of the operand.
    AllGather {
        bytes: u64,
    },
    /// `elements` of the result.
    ReduceScatter {
        combine: Combine,
        dtype: DType,
        elements: u64,
    },
    /// `bytes` from and to each rank.
    AllToAll {
        bytes: u64,
    },
    Send {
        bytes: u64,
        peer: u32,
    },
    Receive {
        bytes: u64,
        peer: u32,
    },
}

/// A rank's membership in a group. May be aborted by another thread when this one hangs in it.
pub struct Communicator {
    nccl: &'static Nccl,
    /// Null when it has ended.
    raw: AtomicPtr<c_void>,
    pub ranks: u32,
}

impl Communicator {
    /// Joins all ranks: each calls this with the same id, at the same time. The calling thread has entered its GPU.
    pub fn join(id: UniqueId, ranks: u32, rank: u32) -> Result<Self, CudaError> {
        let nccl = Nccl::ready()?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle; the id is one of `unique_id`'s.
        let status = unsafe { (nccl.ncclCommInitRank)(&mut raw, ranks as c_int, id, rank as c_int) };
        nccl.check("ncclCommInitRank", ptr::null_mut(), status)?;
        Ok(Self { nccl, raw: AtomicPtr::new(raw), ranks })
    }

    /// Splits into groups: all ranks call this at the same time, each with the number of its group, its position in it
    /// and the group's size, or `None` in no group.
    pub fn split(&self, group: Option<(u32, u32, u32)>) -> Result<Option<Self>, CudaError> {
        let (colour, key, ranks) =
            group.map_or((NO_COLOUR, 0, 0), |(group, position, ranks)| (group as c_int, position as c_int, ranks));
        let parent = self.raw()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the parent lives; null is the parent's configuration.
        let status = unsafe { (self.nccl.ncclCommSplit)(parent, colour, key, &mut raw, ptr::null_mut()) };
        self.nccl.check("ncclCommSplit", parent, status)?;
        Ok((!raw.is_null()).then(|| Self { nccl: self.nccl, raw: AtomicPtr::new(raw), ranks }))
    }

    fn raw(&self) -> Result<Raw, CudaError> {
        let raw = self.raw.load(Ordering::Acquire);
        if raw.is_null() { Err(CudaError::Abandoned) } else { Ok(raw) }
    }

    /// Ends it at once, whatever its ranks are doing: they get errors instead of waiting.
    pub fn abort(&self) {
        let raw = self.raw.swap(ptr::null_mut(), Ordering::AcqRel);
        if !raw.is_null() {
            // SAFETY: whoever takes the handle out ends it, once.
            let _ = unsafe { (self.nccl.ncclCommAbort)(raw) };
        }
    }

    /// What went wrong on its own, such as a link that failed.
    pub fn state(&self) -> Result<(), CudaError> {
        let raw = self.raw()?;
        let mut state = 0;
        // SAFETY: writes one integer.
        let status = unsafe { (self.nccl.ncclCommGetAsyncError)(raw, &mut state) };
        self.nccl.check("ncclCommGetAsyncError", raw, status)?;
        if state == IN_PROGRESS { Ok(()) } else { self.nccl.check("a collective", raw, state) }
    }

    /// Puts an exchange on the stream.
    ///
    /// # Safety
    /// `from` and `to` have as many bytes as the exchange says, on the stream's GPU, until the stream is done.
    pub unsafe fn exchange(
        &self,
        what: Exchange,
        from: Address,
        to: Address,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let (nccl, raw, stream) = (self.nccl, self.raw()?, stream.raw);
        // Addresses of a GPU are pointers to NCCL.
        let (source, target) = (from as *const c_void, to as *mut c_void);
        match what {
            Exchange::AllReduce { combine, dtype, elements } => {
                let (dtype, combine) = reduction(dtype, combine)?;
                // SAFETY: the caller's promise, as for all calls below; the communicator is alive.
                let status =
                    unsafe { (nccl.ncclAllReduce)(source, target, elements as usize, dtype, combine, raw, stream) };
                nccl.check("ncclAllReduce", raw, status)
            }
            Exchange::AllGather { bytes } => {
                // SAFETY: as above.
                let status = unsafe { (nccl.ncclAllGather)(source, target, bytes as usize, BYTES, raw, stream) };
                nccl.check("ncclAllGather", raw, status)
            }
            Exchange::ReduceScatter { combine, dtype, elements } => {
                let (dtype, combine) = reduction(dtype, combine)?;
                // SAFETY: as above.
                let status =
                    unsafe { (nccl.ncclReduceScatter)(source, target, elements as usize, dtype, combine, raw, stream) };
                nccl.check("ncclReduceScatter", raw, status)
            }
            Exchange::AllToAll { bytes } => {
                // SAFETY: only opens a group of calls of this thread.
                nccl.check("ncclGroupStart", raw, unsafe { (nccl.ncclGroupStart)() })?;
                let mut outcome = Ok(());
                for peer in 0..self.ranks {
                    let offset = u64::from(peer) * bytes;
                    let (source, target) = ((from + offset) as *const c_void, (to + offset) as *mut c_void);
                    let peer = peer as c_int;
                    // SAFETY: as above: operand and result have a chunk for each rank.
                    let sent = unsafe { (nccl.ncclSend)(source, bytes as usize, BYTES, peer, raw, stream) };
                    // SAFETY: as above.
                    let received = unsafe { (nccl.ncclRecv)(target, bytes as usize, BYTES, peer, raw, stream) };
                    outcome = outcome.and(nccl.check("ncclSend", raw, sent)).and(nccl.check("ncclRecv", raw, received));
                }
                // SAFETY: closes the group opened above, errors or not.
                outcome.and(nccl.check("ncclGroupEnd", raw, unsafe { (nccl.ncclGroupEnd)() }))
            }
            Exchange::Send { bytes, peer } => {
                // SAFETY: as above.
                let status = unsafe { (nccl.ncclSend)(source, bytes as usize, BYTES, peer as c_int, raw, stream) };
                nccl.check("ncclSend", raw, status)
            }
            Exchange::Receive { bytes, peer } => {
                // SAFETY: as above.
                let status = unsafe { (nccl.ncclRecv)(target, bytes as usize, BYTES, peer as c_int, raw, stream) };
                nccl.check("ncclRecv", raw, status)
            }
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let raw = self.raw.swap(ptr::null_mut(), Ordering::AcqRel);
        if !raw.is_null() {
            // SAFETY: as in `abort`; the rank's work is over, as its thread ends after its last wait.
            let _ = unsafe { (self.nccl.ncclCommDestroy)(raw) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nccl_can_add_is_reduced() {
        assert_eq!(reduction(DType::BF16, Combine::Sum).unwrap(), (9, 0));
        assert_eq!(reduction(DType::I64, Combine::Min).unwrap(), (4, 3));
        assert_eq!(reduction(DType::Bool, Combine::Max).unwrap(), (1, 2));
        for (dtype, combine) in [(DType::I16, Combine::Sum), (DType::U16, Combine::Max), (DType::Bool, Combine::Sum)] {
            let message = reduction(dtype, combine).unwrap_err().to_string();
            assert!(message.contains(dtype.name()) && message.contains("--mesh"), "{message}");
        }
    }
}
