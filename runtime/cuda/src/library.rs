//! Finds and opens CUDA libraries. Nothing is linked: a library that is absent is an error where it is first needed.
#![expect(unsafe_code, reason = "opens shared libraries and names their functions")]

use std::collections::BTreeSet;
use std::env;
use std::error::Error;
use std::fmt;
use std::fs;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_LAZY, RTLD_LOCAL};

use crate::error::CudaError;

/// A library that plans, or their compiler, may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LibraryName {
    /// The driver's own.
    Driver,
    Nvrtc,
    CublasLt,
    Cudnn,
    Nccl,
}

impl LibraryName {
    /// All, the driver first.
    pub const ALL: [Self; 5] = [Self::Driver, Self::Nvrtc, Self::CublasLt, Self::Cudnn, Self::Nccl];

    /// An environment variable that names the file to open, instead of any search.
    pub const fn variable(self) -> &'static str {
        match self {
            Self::Driver => "PLANWRIGHT_CUDA_DRIVER",
            Self::Nvrtc => "PLANWRIGHT_NVRTC",
            Self::CublasLt => "PLANWRIGHT_CUBLASLT",
            Self::Cudnn => "PLANWRIGHT_CUDNN",
            Self::Nccl => "PLANWRIGHT_NCCL",
        }
    }

    /// How to get it.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Driver => "install the NVIDIA driver, or replay the plan on the CPU with `--devices cpu`",
            Self::Nvrtc => "`pip install 'nvidia-cuda-nvrtc==13.0.*'`, or install the CUDA toolkit and set CUDA_HOME",
            Self::CublasLt => "`pip install 'nvidia-cublas==13.*'`, or install the CUDA toolkit and set CUDA_HOME",
            Self::Cudnn => "`pip install nvidia-cudnn-cu13`, or `apt install libcudnn9-cuda-13`",
            Self::Nccl => "`pip install nvidia-nccl-cu13`, or `apt install libnccl2`",
        }
    }

    /// File names, the best first.
    const fn file_names(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &["libcuda.so.1", "libcuda.so"],
            Self::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
            Self::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
            Self::Cudnn => &["libcudnn.so.9", "libcudnn.so"],
            Self::Nccl => &["libnccl.so.2", "libnccl.so"],
        }
    }

    /// Folders of Python wheels that hold it, below `site-packages/nvidia`.
    const fn wheels(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &[],
            Self::Nvrtc => &["cu13/lib", "cuda_nvrtc/lib"],
            Self::CublasLt => &["cu13/lib", "cublas/lib"],
            Self::Cudnn => &["cudnn/lib", "cu13/lib"],
            Self::Nccl => &["nccl/lib", "cu13/lib"],
        }
    }

    /// What the names of files beside it begin with that it opens by bare name, in the order of their dependence.
    const fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Nvrtc => &["libnvrtc-builtins.so"],
            Self::Cudnn => &[
                "libcudnn_graph.so.9",
                "libcudnn_ops.so.9",
                "libcudnn_cnn.so.9",
                "libcudnn_engines_precompiled.so.9",
                "libcudnn_engines_runtime_compiled.so.9",
                "libcudnn_heuristic.so.9",
            ],
            Self::Driver | Self::CublasLt | Self::Nccl => &[],
        }
    }
}

impl fmt::Display for LibraryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Driver => "the CUDA driver",
            Self::Nvrtc => "NVRTC",
            Self::CublasLt => "cuBLASLt",
            Self::Cudnn => "cuDNN",
            Self::Nccl => "NCCL",
        })
    }
}

/// Where libraries may lie on a machine, besides where the loader looks by itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    /// From the library's environment variable; nothing else is tried then.
    given: Option<PathBuf>,
    /// Roots of CUDA toolkits.
    toolkits: Vec<PathBuf>,
    /// Folders with libraries.
    folders: Vec<PathBuf>,
    /// Folders in which Python installs packages.
    packages: Vec<PathBuf>,
}

impl Places {
    /// As this process's environment says.
    pub(crate) fn of_this_machine(library: LibraryName) -> Self {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let mut toolkits: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).collect();
        toolkits.push(PathBuf::from("/usr/local/cuda"));
        // The newest first.
        toolkits.extend(children(Path::new("/usr/local"), "cuda-").into_iter().rev());
        let mut pythons: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).collect();
        let search_path = env::var_os("PATH").unwrap_or_default();
        for program in env::split_paths(&search_path).map(|folder| folder.join("python3")) {
            if program.is_file() {
                pythons.extend(program.parent().and_then(Path::parent).map(Path::to_owned));
                let resolved = fs::canonicalize(&program).ok();
                pythons.extend(resolved.as_deref().and_then(Path::parent).and_then(Path::parent).map(Path::to_owned));
            }
        }
        pythons.extend(["/usr/local", "/usr"].map(PathBuf::from));
        pythons.extend(variable("HOME").map(|home| home.join(".local")));
        Self {
            given: variable(library.variable()),
            toolkits,
            folders: ["/usr/lib/x86_64-linux-gnu", "/usr/lib64"].map(PathBuf::from).to_vec(),
            packages: pythons.iter().flat_map(|root| packages_of(root)).collect(),
        }
    }

    /// Folders to search for `library`, the best first, none twice; only those that exist.
    fn search(&self, library: LibraryName) -> Vec<PathBuf> {
        let toolkits =
            self.toolkits.iter().flat_map(|root| ["lib64", "targets/x86_64-linux/lib"].map(|folder| root.join(folder)));
        let wheels = self
            .packages
            .iter()
            .flat_map(|packages| library.wheels().iter().map(|wheel| packages.join("nvidia").join(wheel)));
        let mut seen = BTreeSet::new();
        let all = toolkits.chain(self.folders.iter().cloned()).chain(wheels);
        all.filter(|folder| folder.is_dir() && seen.insert(folder.clone())).collect()
    }
}

/// Entries of a folder whose names begin with `prefix`, in order.
fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect();
    found.sort_unstable();
    found
}

/// Folders in which a Python that is installed below `root` has its packages.
fn packages_of(root: &Path) -> Vec<PathBuf> {
    let versions = children(&root.join("lib"), "python3");
    versions.iter().flat_map(|version| ["site-packages", "dist-packages"].map(|name| version.join(name))).collect()
}

/// An open library. Never closed: CUDA libraries leave threads and exit handlers behind.
pub(crate) struct Opened {
    library: LibraryName,
    handle: ManuallyDrop<Handle>,
    /// The file, or its name if the loader found it and has not said where.
    pub(crate) path: String,
}

impl Opened {
    /// Opens the first candidate that the loader accepts.
    ///
    /// # Errors
    /// [`CudaError::Absent`] with everything that was tried, [`CudaError::GivenAbsent`].
    pub(crate) fn open(library: LibraryName, places: &Places) -> Result<Self, CudaError> {
        Self::open_named(library, library.file_names(), places)
    }

    fn open_named(library: LibraryName, names: &[&str], places: &Places) -> Result<Self, CudaError> {
        let mut refused = Vec::new();
        if let Some(given) = &places.given {
            let path = given.display().to_string();
            // The loader would wait for a pipe.
            if fs::metadata(given).is_ok_and(|metadata| !metadata.is_file()) {
                return Err(CudaError::GivenAbsent { library, path, reason: "it is not a regular file".to_owned() });
            }
            return match open_with_parts(given, library) {
                Ok(handle) => Ok(Self::new(library, handle, path)),
                Err(reason) => Err(CudaError::GivenAbsent { library, path, reason }),
            };
        }
        for name in names {
            if let Ok(handle) = open(Path::new(name), RTLD_LOCAL) {
                return Ok(Self::new(library, handle, (*name).to_owned()));
            }
        }
        let folders = places.search(library);
        for path in folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name))) {
            if !path.is_file() {
                continue;
            }
            match open_with_parts(&path, library) {
                Ok(handle) => return Ok(Self::new(library, handle, path.display().to_string())),
                Err(reason) => refused.push(reason),
            }
        }
        let folders = folders.iter().map(|folder| folder.display().to_string()).collect();
        Err(CudaError::Absent { library, names: names.iter().map(|&name| name.to_owned()).collect(), folders, refused })
    }

    fn new(library: LibraryName, handle: Handle, path: String) -> Self {
        Self { library, handle: ManuallyDrop::new(handle), path }
    }

    /// The named function.
    ///
    /// # Errors
    /// [`CudaError::Symbol`].
    ///
    /// # Safety
    /// `F` is the type of a C function pointer, with the function's signature.
    pub(crate) unsafe fn function<F: Copy>(&self, symbol: &'static str) -> Result<F, CudaError> {
        // SAFETY: the caller states the type; the library stays open for the rest of the process.
        let found = unsafe { self.handle.get::<F>(symbol.as_bytes()) };
        let absent = |_| CudaError::Symbol { library: self.library, path: self.path.clone(), symbol };
        Ok(*found.map_err(absent)?)
    }

    /// Replaces the name by the file that was mapped, given the address of a function in it.
    pub(crate) fn locate(&mut self, address: usize) {
        // Linux tells what is mapped where; elsewhere the name has to do.
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        if let Some(path) = mapped_file(&maps, address) {
            self.path = path.to_owned();
        }
    }
}

fn open(path: &Path, scope: std::ffi::c_int) -> Result<Handle, String> {
    // SAFETY: initialisers of NVIDIA's libraries have no requirements of their own.
    let opened = unsafe { Handle::open(Some(path), RTLD_LAZY | scope) };
    // The loader's own words are the cause.
    opened.map_err(|error| error.source().map_or_else(|| error.to_string(), |cause| cause.to_string()))
}

/// Opens a library by its path, after what it would look for where the loader does.
fn open_with_parts(path: &Path, library: LibraryName) -> Result<Handle, String> {
    let folder = path.parent().unwrap_or(Path::new(""));
    for part in library.parts().iter().flat_map(|part| children(folder, part)) {
        // What it needs beyond its own folder was opened before; a failure shows when it is used.
        let _ = open(&part, RTLD_GLOBAL).map(ManuallyDrop::new);
    }
    open(path, RTLD_LOCAL)
}

/// Opens a library for others that look for it by its bare name. Absence is for them to report.
pub(crate) fn open_for_others(names: &[&str], library: LibraryName) {
    let folders = Places::of_this_machine(library).search(library);
    let paths = folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
    for path in names.iter().map(PathBuf::from).chain(paths.filter(|path| path.is_file())) {
        if open(&path, RTLD_GLOBAL).map(ManuallyDrop::new).is_ok() {
            return;
        }
    }
}

/// The file that an address is mapped from, by the text of `/proc/self/maps`.
fn mapped_file(maps: &str, address: usize) -> Option<&str> {
    maps.lines().find_map(|line| {
        let (first, rest) = line.split_once('-')?;
        let (end, rest) = rest.split_once(' ')?;
        let (first, end) = (usize::from_str_radix(first, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        let path = &rest[rest.find('/')?..];
        (first..end).contains(&address).then_some(path)
    })
}

/// Declares a table of a library's functions, opened once for the process by `get`.
///
/// Statuses come back as plain numbers and never as Rust enumerations: a newer library may know more of them. Functions
/// that older versions lack come last, as `optional fn`.
macro_rules! functions {
    (
        $table:ident of $library:expr; $first:ident,
        $(fn $symbol:ident($($argument:ty),* $(,)?) $(-> $result:ty)?;)*
        $(optional fn $newer:ident($($newer_argument:ty),* $(,)?) -> $newer_result:ty;)*
    ) => {
        #[expect(non_snake_case, reason = "functions are named as in the library")]
        pub struct $table {
            opened: crate::library::Opened,
            $($symbol: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            $($newer: Option<unsafe extern "C" fn($($newer_argument),*) -> $newer_result>,)*
        }

        impl $table {
            fn open() -> Result<Self, crate::CudaError> {
                let places = crate::library::Places::of_this_machine($library);
                let opened = crate::library::Opened::open($library, &places)?;
                // SAFETY: each type is the one of the library's header, with enumerations as the integers they are.
                let mut table = unsafe {
                    Self {
                        $($symbol: opened.function(stringify!($symbol))?,)*
                        $($newer: opened.function(stringify!($newer)).ok(),)*
                        opened,
                    }
                };
                table.opened.locate(table.$first as usize);
                Ok(table)
            }

            /// The library, opened on first use.
            ///
            /// # Errors
            /// The same each time: it is absent, or has not all the functions.
            pub fn get() -> Result<&'static Self, crate::CudaError> {
                static TABLE: std::sync::OnceLock<Result<$table, crate::CudaError>> = std::sync::OnceLock::new();
                TABLE.get_or_init(Self::open).as_ref().map_err(Clone::clone)
            }

            /// The file it was opened from.
            pub fn path(&self) -> &str {
                &self.opened.path
            }
        }
    };
}
pub(crate) use functions;

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(root: &Path, file: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "no library").unwrap();
    }

    fn names(error: CudaError) -> (Vec<String>, Vec<String>) {
        match error {
            CudaError::Absent { folders, refused, .. } => (folders, refused),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn toolkits_come_before_system_folders_and_wheels() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for file in [
            "cuda/targets/x86_64-linux/lib/libcudnn.so.9",
            "system/libcudnn.so.9",
            "python/lib/python3.12/site-packages/nvidia/cudnn/lib/libcudnn.so.9",
            "python/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2",
        ] {
            touch(root, file);
        }
        let places = Places {
            given: None,
            toolkits: vec![root.join("cuda"), root.join("none")],
            folders: vec![root.join("system"), root.join("system")],
            packages: packages_of(&root.join("python")),
        };
        let expected =
            ["cuda/targets/x86_64-linux/lib", "system", "python/lib/python3.12/site-packages/nvidia/cudnn/lib"];
        assert_eq!(places.search(LibraryName::Cudnn), expected.map(|folder| root.join(folder)));
        assert!(places.search(LibraryName::Nccl).last().unwrap().ends_with("nvidia/nccl/lib"));
    }

    #[test]
    fn files_that_are_no_libraries_are_named_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        touch(folder.path(), "libnone.so.9");
        let places = Places { folders: vec![folder.path().to_owned()], ..Places::default() };
        let opened = Opened::open_named(LibraryName::Cudnn, &["libnone.so.9", "libnone.so"], &places);
        let error = opened.map(drop).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("cuDNN was not found: looked for libnone.so.9, libnone.so"), "{message}");
        assert!(message.contains("pip install nvidia-cudnn-cu13"), "{message}");
        let (folders, refused) = names(error);
        assert_eq!(folders, [folder.path().display().to_string()]);
        assert!(refused[0].contains("libnone.so.9"), "{refused:?}");
    }

    #[test]
    fn a_given_file_is_the_only_one_tried() {
        let folder = tempfile::tempdir().unwrap();
        let given = folder.path().join("libnccl.so.2");
        let places = Places { given: Some(given), ..Places::of_this_machine(LibraryName::Nccl) };
        let message = Opened::open(LibraryName::Nccl, &places).map(drop).unwrap_err().to_string();
        assert!(message.contains("PLANWRIGHT_NCCL names ") && message.contains("no other file was tried"), "{message}");
        assert!(!message.contains("looks") && message.contains("pip install nvidia-nccl-cu13"), "{message}");
    }

    #[test]
    fn the_mapped_file_of_an_address_is_found() {
        let maps =
            "7f00-7f10 r-xp 0 08:01 12    /lib/libc.so.6\n7f20-7f30 r--p 0 0 0 \n8000-9000 r-xp 0 0 1 /a b/libx.so\n";
        assert_eq!(mapped_file(maps, 0x7f05), Some("/lib/libc.so.6"));
        assert_eq!(mapped_file(maps, 0x8fff), Some("/a b/libx.so"));
        assert_eq!(mapped_file(maps, 0x7f25), None);
        assert_eq!(mapped_file(maps, 0x9000), None);
    }
}
