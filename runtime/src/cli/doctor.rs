//! Says what of CUDA a machine has, and how to get what is missing.

use comfy_table::Table;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use serde::Serialize;

use super::exit::Exit;
use super::report::bytes_text;
use cuda::{LibraryName, gpus, libraries, peers};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DoctorReport {
    pub libraries: Vec<LibraryFinding>,
    pub gpus: Vec<GpuFinding>,
    /// By pair of GPUs, whether the first reaches the second's memory over a link of their own.
    pub peers: Vec<Vec<bool>>,
    /// Why GPUs could not be listed.
    pub trouble: Option<String>,
}

/// A library: where it is, or why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LibraryFinding {
    pub library: String,
    pub version: Option<String>,
    pub path: Option<String>,
    /// What was tried, and what next.
    pub missing: Option<String>,
    /// What cannot be done without it.
    pub needed_for: &'static str,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuFinding {
    pub number: u32,
    pub name: String,
    /// Such as `sm_90`.
    pub architecture: String,
    pub pci_bus: String,
    pub multiprocessors: u32,
    pub memory_bytes: u64,
}

const fn needed_for(library: LibraryName) -> &'static str {
    match library {
        LibraryName::Driver => "running plans on GPUs",
        LibraryName::Nvrtc => "compiling for CUDA targets",
        LibraryName::CublasLt => "plans with matrix products",
        LibraryName::Cudnn => "plans with convolutions",
        LibraryName::Nccl => "plans for several GPUs",
    }
}

/// Looks at this machine.
pub fn doctor() -> DoctorReport {
    let finding = |report: cuda::LibraryReport| {
        let (version, path, missing) = match report.found {
            Ok((version, path)) => (Some(version), Some(path), None),
            Err(error) => (None, None, Some(error.to_string())),
        };
        let needed_for = needed_for(report.library);
        LibraryFinding { library: report.library.to_string(), version, path, missing, needed_for }
    };
    let libraries = libraries().into_iter().map(finding).collect();
    match gpus().and_then(|gpus| Ok((gpus, peers()?))) {
        Ok((gpus, peers)) => {
            let gpu = |gpu: cuda::GpuInfo| GpuFinding {
                number: gpu.ordinal,
                architecture: format!("sm_{}{}", gpu.capability.0, gpu.capability.1),
                name: gpu.name,
                pci_bus: gpu.pci_bus,
                multiprocessors: gpu.multiprocessors,
                memory_bytes: gpu.memory_bytes,
            };
            DoctorReport { libraries, gpus: gpus.into_iter().map(gpu).collect(), peers, trouble: None }
        }
        Err(error) => DoctorReport { libraries, gpus: vec![], peers: vec![], trouble: Some(error.to_string()) },
    }
}

impl DoctorReport {
    /// Success where nothing is missing.
    pub fn exit(&self) -> Exit {
        let whole = self.trouble.is_none() && self.libraries.iter().all(|library| library.missing.is_none());
        if whole && !self.gpus.is_empty() { Exit::Success } else { Exit::Machine }
    }

    pub fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY);
        table.set_header(["library", "version", "file", "needed for"]);
        for LibraryFinding { library, version, path, needed_for, .. } in &self.libraries {
            let or_missing = |text: &Option<String>| text.clone().unwrap_or_else(|| "missing".to_owned());
            table.add_row([library.clone(), or_missing(version), or_missing(path), (*needed_for).to_owned()]);
        }
        let mut text = format!("{table}\n");
        if !self.gpus.is_empty() {
            let mut table = Table::new();
            table.load_style(UTF8_HORIZONTAL_ONLY);
            table.set_header(["GPU", "name", "architecture", "bus", "multiprocessors", "memory", "reaches"]);
            for gpu in &self.gpus {
                let row = self.peers.get(gpu.number as usize).map_or(&[][..], Vec::as_slice);
                let others =
                    row.iter().enumerate().filter(|(other, reaches)| **reaches && *other != gpu.number as usize);
                let reaches: Vec<String> = others.map(|(other, _)| other.to_string()).collect();
                table.add_row([
                    gpu.number.to_string(),
                    gpu.name.clone(),
                    gpu.architecture.clone(),
                    gpu.pci_bus.clone(),
                    gpu.multiprocessors.to_string(),
                    bytes_text(gpu.memory_bytes),
                    if reaches.is_empty() { "-".to_owned() } else { reaches.join(" ") },
                ]);
            }
            text.push_str(&format!("{table}\n"));
        }
        // Without a driver, that is why GPUs cannot be listed; it need not be said twice.
        let trouble = self
            .trouble
            .iter()
            .filter(|trouble| self.libraries.iter().all(|one| one.missing.as_ref() != Some(trouble)));
        for missing in self.libraries.iter().filter_map(|library| library.missing.as_ref()).chain(trouble) {
            text.push_str(&format!("- {missing}\n"));
        }
        if self.exit() == Exit::Success {
            text.push_str("nothing is missing\n");
        }
        text
    }
}
