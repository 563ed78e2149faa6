//! NVRTC: CUDA C++ to machine code, at compile time only. Needs neither a GPU nor headers.
#![expect(unsafe_code, reason = "calls NVRTC")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{ptr, thread};

use crate::error::CudaError;
use crate::library::{LibraryName, functions};

functions! {
    Functions of LibraryName::Nvrtc; nvrtcVersion,
    fn nvrtcVersion(*mut c_int, *mut c_int) -> u32;
    fn nvrtcGetErrorString(u32) -> *const c_char;
    fn nvrtcCreateProgram(*mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> u32;
    fn nvrtcDestroyProgram(*mut *mut c_void) -> u32;
    fn nvrtcCompileProgram(*mut c_void, c_int, *const *const c_char) -> u32;
    fn nvrtcGetCUBINSize(*mut c_void, *mut usize) -> u32;
    fn nvrtcGetCUBIN(*mut c_void, *mut c_char) -> u32;
    fn nvrtcGetProgramLogSize(*mut c_void, *mut usize) -> u32;
    fn nvrtcGetProgramLog(*mut c_void, *mut c_char) -> u32;
}

/// What became of one source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// Machine code for one architecture.
    pub cubin: Vec<u8>,
    /// Warnings, and with [`Options::report`] registers and spills of each function.
    pub log: String,
}

/// What every source is compiled with: C++17, and functions without a qualifier are for the device.
pub const FLAGS: &str = "--std=c++17 -default-device";

/// How sources are compiled.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Such as `sm_90a`.
    pub architecture: &'a str,
    /// Whether the log tells registers, spills and shared memory.
    pub report: bool,
}

/// NVRTC, opened. Cheap to load again.
#[derive(Clone)]
pub struct Nvrtc {
    functions: &'static Functions,
    version: String,
}

impl Nvrtc {
    /// Opens the library on first use.
    ///
    /// # Errors
    /// [`CudaError::Absent`], which says how to get it.
    pub fn load() -> Result<Self, CudaError> {
        let functions = Functions::get()?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers.
        functions.check("nvrtcVersion", unsafe { (functions.nvrtcVersion)(&mut major, &mut minor) })?;
        Ok(Self { functions, version: format!("{major}.{minor}") })
    }

    /// Such as `13.0`. What a cache of cubins depends on, besides source and architecture.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The file it was opened from.
    pub fn path(&self) -> &str {
        self.functions.path()
    }

    /// Compiles named sources, each a whole translation unit without includes, on all cores. Cubins in the same order.
    ///
    /// # Errors
    /// [`CudaError::Compile`] for the first source in order that does not compile.
    pub fn compile(&self, sources: &[(&str, &str)], architecture: &str) -> Result<Vec<Vec<u8>>, CudaError> {
        let compiled = self.compile_with(sources, Options { architecture, report: false })?;
        Ok(compiled.into_iter().map(|compiled| compiled.cubin).collect())
    }

    /// As [`Self::compile`], with the log of each source.
    ///
    /// # Errors
    /// As [`Self::compile`].
    pub fn compile_with(&self, sources: &[(&str, &str)], options: Options<'_>) -> Result<Vec<Compiled>, CudaError> {
        let functions = self.functions;
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some((name, source)) = sources.get(index) else { return done };
                done.push((index, functions.compile(name, source, options)));
            }
        };
        let mut outcomes: Vec<(usize, Result<Compiled, CudaError>)> = thread::scope(|scope| {
            // Threads that the system has no room for are done without.
            let begin = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
            let others: Vec<_> = (1..cores.min(sources.len())).filter_map(begin).collect();
            let own = work();
            // A thread that panicked leaves its sources out, which is noticed below.
            own.into_iter().chain(others.into_iter().flat_map(|thread| thread.join().unwrap_or_default())).collect()
        });
        outcomes.sort_by_key(|(index, _)| *index);
        let compiled = outcomes.into_iter().map(|(_, outcome)| outcome).collect::<Result<Vec<_>, _>>()?;
        if compiled.len() != sources.len() {
            return Err(CudaError::contradiction("a thread that compiles kernels has stopped"));
        }
        Ok(compiled)
    }
}

impl fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nvrtc({} from {})", self.version, self.path())
    }
}

/// A program of NVRTC's, destroyed when dropped.
struct Program {
    functions: &'static Functions,
    raw: *mut c_void,
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created in `Functions::compile`.
        let _ = unsafe { (self.functions.nvrtcDestroyProgram)(&mut self.raw) };
    }
}

impl Functions {
    fn check(&self, call: &'static str, status: u32) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: returns a string that stays, for any number.
        let text = unsafe { CStr::from_ptr((self.nvrtcGetErrorString)(status)) };
        let status = text.to_string_lossy().into_owned();
        Err(CudaError::Call { call, status, next: "another version of NVRTC may know this architecture; or report it" })
    }

    fn compile(&'static self, name: &str, source: &str, options: Options<'_>) -> Result<Compiled, CudaError> {
        let text = |text: &str| {
            CString::new(text).map_err(|_| CudaError::contradiction(format!("the source `{name}` has a zero in it")))
        };
        let (c_name, source) = (text(&format!("{name}.cu"))?, text(source)?);
        let mut raw = ptr::null_mut();
        // SAFETY: both strings are terminated; there are no headers.
        let status = unsafe {
            (self.nvrtcCreateProgram)(&mut raw, source.as_ptr(), c_name.as_ptr(), 0, ptr::null(), ptr::null())
        };
        self.check("nvrtcCreateProgram", status)?;
        let program = Program { functions: self, raw };
        let mut flags = vec![format!("--gpu-architecture={}", options.architecture)];
        flags.extend(FLAGS.split(' ').map(str::to_owned));
        if options.report {
            flags.push("--ptxas-options=-v".to_owned());
        }
        let flags = flags.iter().map(|flag| text(flag)).collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<*const c_char> = flags.iter().map(|flag| flag.as_ptr()).collect();
        // SAFETY: the program lives; as many terminated strings as said.
        let status = unsafe { (self.nvrtcCompileProgram)(program.raw, pointers.len() as c_int, pointers.as_ptr()) };
        let log = self.log(&program)?;
        // `NVRTC_ERROR_COMPILATION`: the source is at fault, and the log has its lines.
        if status == 6 {
            let architecture = options.architecture.to_owned();
            return Err(CudaError::Compile { name: name.to_owned(), architecture, log });
        }
        self.check("nvrtcCompileProgram", status)?;
        let mut bytes = 0;
        // SAFETY: writes one integer.
        let status = unsafe { (self.nvrtcGetCUBINSize)(program.raw, &mut bytes) };
        self.check("nvrtcGetCUBINSize", status)?;
        let mut cubin = vec![0u8; bytes];
        // SAFETY: as many bytes as were asked for.
        let status = unsafe { (self.nvrtcGetCUBIN)(program.raw, cubin.as_mut_ptr().cast()) };
        self.check("nvrtcGetCUBIN", status)?;
        Ok(Compiled { cubin, log })
    }

    fn log(&self, program: &Program) -> Result<String, CudaError> {
        let mut bytes = 0;
        // SAFETY: writes one integer.
        let status = unsafe { (self.nvrtcGetProgramLogSize)(program.raw, &mut bytes) };
        self.check("nvrtcGetProgramLogSize", status)?;
        let mut log = vec![0u8; bytes];
        // SAFETY: as many bytes as were asked for.
        let status = unsafe { (self.nvrtcGetProgramLog)(program.raw, log.as_mut_ptr().cast()) };
        self.check("nvrtcGetProgramLog", status)?;
        Ok(String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOUBLE: &str =
        "extern \"C\" __global__ void twice(float *x, long long n) {\n  if (threadIdx.x < n) x[threadIdx.x] *= 2;\n}\n";

    #[test]
    #[ignore = "needs NVRTC"]
    fn sources_become_cubins_in_their_order() {
        let other = DOUBLE.replace("twice", "thrice");
        let sources: Vec<(&str, &str)> =
            (0..8).map(|n| if n % 2 == 0 { ("a", DOUBLE) } else { ("b", &*other) }).collect();
        let nvrtc = Nvrtc::load().unwrap();
        let cubins = nvrtc.compile(&sources, "sm_90a").unwrap();
        assert_eq!(cubins.len(), 8);
        let names = |cubin: &[u8], name: &str| cubin.windows(name.len()).any(|window| window == name.as_bytes());
        for (index, cubin) in cubins.iter().enumerate() {
            assert!(cubin.starts_with(b"\x7fELF"));
            assert_eq!((names(cubin, "twice"), names(cubin, "thrice")), (index % 2 == 0, index % 2 == 1));
            assert_eq!(cubin, &cubins[index % 2], "the same source gives the same bytes");
        }
        let report = nvrtc.compile_with(&[("a", DOUBLE)], Options { architecture: "sm_80", report: true }).unwrap();
        assert!(report[0].log.contains("registers") && report[0].log.contains("spill"), "{}", report[0].log);
        assert!(nvrtc.version().starts_with("13."));
        assert!(nvrtc.path().contains("libnvrtc"));
    }

    #[test]
    #[ignore = "needs NVRTC"]
    fn faults_are_told_with_their_lines() {
        let nvrtc = Nvrtc::load().unwrap();
        let message = nvrtc.compile(&[("good", DOUBLE), ("bad", "\n\nint f() { return y; }")], "sm_90a").unwrap_err();
        let message = message.to_string();
        assert!(message.contains("`bad` does not compile for sm_90a") && message.contains("bad.cu(3)"), "{message}");
        let unknown = nvrtc.compile(&[("good", DOUBLE)], "sm_999").unwrap_err().to_string();
        assert!(unknown.contains("nvrtcCompileProgram failed"), "{unknown}");
    }
}
