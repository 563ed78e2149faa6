//! Which GPUs run the machine code of an architecture.

/// Whether machine code for `architecture`, such as `sm_90a`, runs on a GPU of this compute capability.
///
/// Code runs on its own major version from its minor version on; with the suffix `a`, on exactly its own version.
/// `None` if that is no CUDA architecture.
pub(super) fn runs_on(architecture: &str, (major, minor): (u32, u32)) -> Option<bool> {
    let version = architecture.strip_prefix("sm_")?;
    let digits = version.trim_end_matches(['a', 'f']);
    let number: u32 = digits.parse().ok()?;
    let (own_major, own_minor) = (number / 10, number % 10);
    let exact = version.ends_with('a');
    Some(major == own_major && if exact { minor == own_minor } else { minor >= own_minor })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_on_its_own_generation() {
        assert_eq!(runs_on("sm_90a", (9, 0)), Some(true));
        assert_eq!(runs_on("sm_90a", (9, 1)), Some(false));
        assert_eq!(runs_on("sm_80", (8, 9)), Some(true));
        assert_eq!(runs_on("sm_86", (8, 0)), Some(false));
        assert_eq!(runs_on("sm_80", (9, 0)), Some(false));
        assert_eq!(runs_on("sm_100f", (10, 3)), Some(true));
        assert_eq!((runs_on("cpu", (9, 0)), runs_on("sm_x", (9, 0))), (None, None));
    }
}
