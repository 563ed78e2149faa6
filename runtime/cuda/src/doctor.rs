//! What of CUDA a machine has.

use crate::cublaslt::CublasLt;
use crate::cudnn::Cudnn;
use crate::driver::{Driver, GpuInfo};
use crate::error::CudaError;
use crate::library::LibraryName;
use crate::nccl::Nccl;
use crate::nvrtc::Nvrtc;

/// A library as it was found, or why it was not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibraryReport {
    pub library: LibraryName,
    /// Version, and the file it was opened from.
    pub found: Result<(String, String), CudaError>,
}

/// Opens every library.
pub fn libraries() -> Vec<LibraryReport> {
    LibraryName::ALL.map(|library| LibraryReport { library, found: find(library) }).to_vec()
}

fn find(library: LibraryName) -> Result<(String, String), CudaError> {
    Ok(match library {
        LibraryName::Driver => {
            let driver = Driver::get()?;
            (driver.version()?, driver.path().to_owned())
        }
        LibraryName::Nvrtc => {
            let nvrtc = Nvrtc::load()?;
            (nvrtc.version().to_owned(), nvrtc.path().to_owned())
        }
        LibraryName::CublasLt => {
            let library = CublasLt::get()?;
            (library.version(), library.path().to_owned())
        }
        LibraryName::Cudnn => {
            let library = Cudnn::ready()?;
            (library.version(), library.path().to_owned())
        }
        LibraryName::Nccl => {
            let library = Nccl::ready()?;
            (library.version()?, library.path().to_owned())
        }
    })
}

/// The GPUs that this process may use.
///
/// # Errors
/// No driver, or what it says.
pub fn gpus() -> Result<Vec<GpuInfo>, CudaError> {
    let driver = Driver::ready()?;
    (0..driver.count()?).map(|ordinal| driver.describe(ordinal)).collect()
}

/// By pair of GPUs, whether the first addresses the second's memory over a link of their own.
///
/// # Errors
/// As [`gpus`].
pub fn peers() -> Result<Vec<Vec<bool>>, CudaError> {
    let driver = Driver::ready()?;
    let count = driver.count()?;
    let row = |from| (0..count).map(|to| Ok(from == to || driver.reaches(from, to)?)).collect();
    (0..count).map(row).collect()
}
