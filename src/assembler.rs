//! Machine code of kernels, from NVRTC or from the folder of what it made before.
//!
//! A cubin is kept under a hash of its source, the architecture, and NVRTC's version and flags, in `PLANWRIGHT_CACHE`,
//! `XDG_CACHE_HOME/planwright` or `HOME/.cache/planwright`. The folder may be deleted at any time; where it cannot be
//! used, kernels are compiled again.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::{env, fs};

use cuda::nvrtc::{self, Nvrtc};
use passes::error::PassError;
use passes::lower::{Assembler, KernelSource};
use planfile::Cuda;
use planfile::regular;
use planfile::replace::Replacement;

/// Compiles with the NVRTC that is found when it is needed.
#[derive(Debug, Default)]
pub(crate) struct NvrtcAssembler;

impl Assembler for NvrtcAssembler {
    fn assemble(&self, sources: &[KernelSource], architecture: Cuda) -> Result<Vec<Vec<u8>>, PassError> {
        let architecture = &architecture.to_string();
        let failed = |why: String| PassError::Assemble { why };
        let nvrtc = Nvrtc::load().map_err(|error| failed(error.to_string()))?;
        let cache = folder().map(|folder| Cache { folder, version: nvrtc.version().to_owned() });
        let mut cubins: Vec<Option<Vec<u8>>> =
            sources.iter().map(|source| cache.as_ref()?.read(source, architecture)).collect();
        // The same source for two kernels is compiled once.
        let mut missing: BTreeMap<&str, &str> = BTreeMap::new();
        for (source, _) in sources.iter().zip(&cubins).filter(|(_, cubin)| cubin.is_none()) {
            missing.insert(&source.source, &source.symbol);
        }
        let missing: Vec<(&str, &str)> = missing.into_iter().map(|(source, symbol)| (symbol, source)).collect();
        let made = nvrtc.compile(&missing, architecture).map_err(|error| failed(error.to_string()))?;
        let made: BTreeMap<&str, Vec<u8>> = missing.iter().map(|(_, source)| *source).zip(made).collect();
        for (source, cubin) in sources.iter().zip(&mut cubins).filter(|(_, cubin)| cubin.is_none()) {
            *cubin = made.get(source.source.as_str()).cloned();
            if let (Some(cache), Some(cubin)) = (&cache, &cubin) {
                cache.write(source, architecture, cubin);
            }
        }
        let all: Option<Vec<Vec<u8>>> = cubins.into_iter().collect();
        all.ok_or_else(|| failed("NVRTC returned fewer kernels than it was given".to_owned()))
    }
}

/// Where cubins are kept, if there is a place.
fn folder() -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("PLANWRIGHT_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|folder| folder.join("planwright")))
        .or_else(|| variable("HOME").map(|folder| folder.join(".cache/planwright")))
}

/// What was compiled before.
struct Cache {
    folder: PathBuf,
    version: String,
}

/// The first bytes of every cubin: it is an ELF file.
const MAGIC: &[u8] = b"\x7fELF";

impl Cache {
    fn path(&self, source: &KernelSource, architecture: &str) -> PathBuf {
        let mut hasher = blake3::Hasher::new();
        for part in [&self.version, nvrtc::FLAGS, architecture, &source.symbol, &source.source] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        self.folder.join(format!("{}.cubin", hasher.finalize().to_hex()))
    }

    fn read(&self, source: &KernelSource, architecture: &str) -> Option<Vec<u8>> {
        let (mut file, _) = regular::open(&self.path(source, architecture)).ok()??;
        let mut cubin = Vec::new();
        file.read_to_end(&mut cubin).ok()?;
        cubin.starts_with(MAGIC).then_some(cubin)
    }

    /// Keeps a cubin; one that cannot be kept is compiled again next time.
    fn write(&self, source: &KernelSource, architecture: &str, cubin: &[u8]) {
        let path = self.path(source, architecture);
        let keep = || -> Option<()> {
            fs::create_dir_all(&self.folder).ok()?;
            // Other processes see the whole file or none.
            let mut file = Replacement::new(&path, ".cubin-").ok()?;
            file.file().write_all(cubin).ok()?;
            file.finish().ok()
        };
        keep().unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cubins_are_found_again_by_source_architecture_and_version() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache { folder: folder.path().join("cache"), version: "13.0".to_owned() };
        let source = KernelSource { symbol: "f".to_owned(), source: "void f() {}".to_owned() };
        assert_eq!(cache.read(&source, "sm_90a"), None);
        let cubin = [MAGIC, b"code"].concat();
        cache.write(&source, "sm_90a", &cubin);
        assert_eq!(cache.read(&source, "sm_90a"), Some(cubin));
        assert_eq!(cache.read(&source, "sm_80"), None);
        let newer = Cache { version: "13.1".to_owned(), ..cache };
        assert_eq!(newer.read(&source, "sm_90a"), None);
        // A file that is no machine code is not believed.
        newer.write(&source, "sm_90a", b"");
        assert_eq!(newer.read(&source, "sm_90a"), None);
    }
}
