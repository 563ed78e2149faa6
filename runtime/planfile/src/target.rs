//! The machine a plan is compiled for, measured or modelled: the one source of cost.

use serde::{Deserialize, Serialize};

use crate::architecture::Architecture;
use crate::dtype::DType;

/// A machine, as `fixtures/targets/*.json` describe it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    pub name: String,
    pub origin: TargetOrigin,
    /// Where the numbers come from: machine, date, software.
    pub source: String,
    pub device: Device,
    /// Number of devices, all alike.
    pub devices: u32,
    /// Kinds of links between devices.
    pub links: Vec<LinkClass>,
    /// `topology[i][j]`: index into `links` of the link between devices `i` and `j`; the diagonal is not read.
    pub topology: Vec<Vec<u32>>,
    /// Measured collectives; between sizes, interpolated.
    #[serde(default)]
    pub collectives: Vec<CollectiveTiming>,
    /// Measured kernels; where none matches, the roofline of `device` decides.
    #[serde(default)]
    pub kernels: Vec<KernelTiming>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetOrigin {
    Measured,
    Modelled,
}

/// One device's roofline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    pub architecture: Architecture,
    pub memory_bytes: u64,
    /// Reads and writes together.
    pub memory_bytes_per_second: f64,
    /// Matrix products, by element type; types that are not listed run at `vector_operations_per_second`.
    pub matrix_operations_per_second: Vec<(DType, f64)>,
    pub vector_operations_per_second: f64,
    /// Cost of one more kernel in a captured graph.
    pub launch_ns: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkClass {
    pub name: String,
    /// In one direction.
    pub bytes_per_second: f64,
    pub latency_ns: f64,
}

/// A measured collective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollectiveTiming {
    /// `all_reduce`, `all_gather`, …
    pub collective: String,
    /// `nccl`, `one_shot`, …
    pub algorithm: String,
    /// Ranks in the group.
    pub ranks: u32,
    /// Of the whole operand on each rank.
    pub bytes: u64,
    pub ns: f64,
}

/// A measured kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelTiming {
    pub kernel: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub ns: f64,
}

impl Target {
    /// Reads a description and checks that its numbers make sense.
    ///
    /// # Errors
    /// A sentence with the line and column, or the field, at fault.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let target: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        target.check()?;
        Ok(target)
    }

    fn check(&self) -> Result<(), String> {
        let names = [&self.name].into_iter().chain(self.links.iter().map(|link| &link.name));
        if names.into_iter().any(|name| name.contains(char::is_control)) {
            return Err("names must not have control characters".to_owned());
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let device = &self.device;
        let rates = device.matrix_operations_per_second.iter().map(|rate| rate.1);
        let rates = rates.chain([device.memory_bytes_per_second, device.vector_operations_per_second]);
        if !rates.into_iter().all(positive) {
            return Err("device: rates must be positive".to_owned());
        }
        if self.devices == 0 || device.memory_bytes == 0 {
            return Err("devices and memory_bytes must be positive".to_owned());
        }
        if !self.links.iter().all(|link| positive(link.bytes_per_second) && link.latency_ns >= 0.0) {
            return Err("links: bandwidth must be positive and latency not negative".to_owned());
        }
        let square = self.topology.len() == self.devices as usize
            && self.topology.iter().all(|row| row.len() == self.devices as usize);
        let links = self.topology.iter().flatten().all(|&link| (link as usize) < self.links.len());
        if !square || !(links || self.devices == 1) {
            return Err(format!("topology must be {0} × {0} indexes into links", self.devices));
        }
        if self.collectives.iter().any(|timing| !positive(timing.ns) || timing.ranks == 0) {
            return Err("collectives: times and ranks must be positive".to_owned());
        }
        Ok(())
    }

    /// The same machine with another number of devices, all joined by its slowest link.
    #[must_use]
    pub fn with_devices(&self, devices: u32) -> Self {
        let slowest =
            |a: &usize, b: &usize| self.links[*a].bytes_per_second.total_cmp(&self.links[*b].bytes_per_second);
        let link = (0..self.links.len()).min_by(slowest).unwrap_or(0) as u32;
        Self { devices, topology: vec![vec![link; devices as usize]; devices as usize], ..self.clone() }
    }
}
