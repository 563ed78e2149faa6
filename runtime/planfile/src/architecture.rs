//! The processors that plans are for: `cpu`, or a CUDA architecture such as `sm_90a`, with what is fixed for each.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a plan's kernels run on. Files hold its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Architecture {
    /// Hosts: kernels are their specifications.
    Cpu,
    /// GPUs: kernels are machine code and calls into libraries.
    Cuda(Cuda),
}

/// A CUDA architecture that is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cuda {
    /// Such as 90 for `sm_90a`.
    pub number: u32,
    pub features: Features,
}

/// Instructions beyond those that all later devices have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Features {
    /// None, no suffix: code runs on later devices of the same major version.
    Portable,
    /// Suffix `f`: of a family of devices.
    Family,
    /// Suffix `a`: of this very architecture.
    Specific,
}

/// Numbers that are known, and the KiB of shared memory that a block can have there. CUDA C++ Programming Guide 13.0,
/// "Technical Specifications per Compute Capability".
const KNOWN: [(u32, u32); 11] = [
    (75, 64),
    (80, 163),
    (86, 99),
    (87, 163),
    (89, 99),
    (90, 227),
    (100, 227),
    (103, 227),
    (110, 227),
    (120, 99),
    (121, 99),
];

impl Cuda {
    /// Most shared memory of a block, static and dynamic together.
    pub fn shared_bytes_max(self) -> u32 {
        let known = KNOWN.iter().find(|known| known.0 == self.number);
        known.map_or(0, |known| known.1 << 10)
    }

    /// Whether blocks can form clusters.
    pub const fn has_clusters(self) -> bool {
        self.number >= 90
    }

    /// Whether code for this architecture runs on a GPU of that compute capability.
    pub const fn runs_on(self, (major, minor): (u32, u32)) -> bool {
        let (own_major, own_minor) = (self.number / 10, self.number % 10);
        match self.features {
            Features::Specific => major == own_major && minor == own_minor,
            Features::Portable | Features::Family => major == own_major && minor >= own_minor,
        }
    }
}

impl Architecture {
    /// Whether hosts execute the plan: its kernels are their specifications.
    pub const fn is_host(self) -> bool {
        matches!(self, Self::Cpu)
    }

    /// The CUDA architecture, unless it is a host.
    pub const fn cuda(self) -> Option<Cuda> {
        match self {
            Self::Cpu => None,
            Self::Cuda(cuda) => Some(cuda),
        }
    }
}

impl FromStr for Architecture {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "cpu" {
            return Ok(Self::Cpu);
        }
        let cuda = text.strip_prefix("sm_").and_then(|version| {
            let (digits, features) = match version.as_bytes().last()? {
                b'a' => (&version[..version.len() - 1], Features::Specific),
                b'f' => (&version[..version.len() - 1], Features::Family),
                _ => (version, Features::Portable),
            };
            let (number, _) = *KNOWN.iter().find(|known| known.0.to_string() == digits)?;
            Some(Self::Cuda(Cuda { number, features }))
        });
        cuda.ok_or_else(|| format!("the architecture `{text}` is not known: `cpu`, or such as `sm_80`, `sm_90a`"))
    }
}

impl FromStr for Cuda {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cuda = text.parse::<Architecture>()?.cuda();
        cuda.ok_or_else(|| format!("the architecture `{text}` is no GPU's: such as `sm_80`, `sm_90a`"))
    }
}

impl TryFrom<String> for Architecture {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Architecture> for String {
    fn from(architecture: Architecture) -> Self {
        architecture.to_string()
    }
}

impl fmt::Display for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = match self.features {
            Features::Portable => "",
            Features::Family => "f",
            Features::Specific => "a",
        };
        write!(f, "sm_{}{suffix}", self.number)
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(cuda) => cuda.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuda(text: &str) -> Cuda {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_read_and_printed_alike() {
        for name in ["cpu", "sm_75", "sm_80", "sm_90", "sm_90a", "sm_100f", "sm_103a", "sm_121"] {
            assert_eq!(name.parse::<Architecture>().unwrap().to_string(), name);
        }
        for name in
            ["", "sm_", "sm_a", "sm_42", "sm_090", "sm_+90", "sm_90b", "sm_90aa", "SM_90", "sm_é", "gpu", "cpu "]
        {
            let why = name.parse::<Architecture>().unwrap_err();
            assert!(why.contains(&format!("`{name}` is not known")), "{why}");
        }
        assert_eq!("cpu".parse::<Cuda>().unwrap_err(), "the architecture `cpu` is no GPU's: such as `sm_80`, `sm_90a`");
    }

    #[test]
    fn what_architectures_have() {
        assert_eq!((cuda("sm_90a").shared_bytes_max(), cuda("sm_90a").has_clusters()), (227 << 10, true));
        assert_eq!((cuda("sm_86").shared_bytes_max(), cuda("sm_86").has_clusters()), (99 << 10, false));
    }

    #[test]
    fn code_runs_on_its_own_and_on_later_minor_versions() {
        assert!(cuda("sm_90a").runs_on((9, 0)) && !cuda("sm_90a").runs_on((9, 1)));
        assert!(cuda("sm_80").runs_on((8, 9)) && !cuda("sm_80").runs_on((9, 0)));
        assert!(!cuda("sm_86").runs_on((8, 0)));
        assert!(cuda("sm_100f").runs_on((10, 3)));
    }
}
