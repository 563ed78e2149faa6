//! Fault words: numbered without gaps, and each of one step, so that a marked word names the step that marked it. That
//! steps whose kernels check indices have one each, as their last scalar, is checked with their other scalars.

use super::{At, Report};
use crate::plan::Program;

/// Checks the fault words of a program.
pub(super) fn check(program: &Program, index: usize, report: &mut Report) {
    let count = program.faults().count();
    let mut owners: Vec<Option<usize>> = vec![None; count];
    for (step, word) in program.faults() {
        let at = At { program: index, step: Some(step) };
        match owners.get_mut(word as usize) {
            None => report.add(at, format!("fault word {word} of {count}")),
            Some(Some(other)) => report.add(at, format!("shares fault word {word} with step #{other}")),
            Some(none) => *none = Some(step),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::plan::{Action, Argument, Plan};
    use crate::sample;
    use crate::text::text;
    use crate::verify::verify;

    /// The sample for GPUs, whose steps 1 and 4 check indices, with these as their last scalars.
    fn with(words: [&[Argument]; 2]) -> Plan {
        let mut plan = sample::gpu();
        for (step, words) in [1, 4].into_iter().zip(words) {
            match &mut plan.programs[0].steps[step].action {
                Action::Launch { scalars, .. } => *scalars = words.to_vec(),
                _ => panic!("step {step} is no launch"),
            }
        }
        plan
    }

    fn word(word: u32) -> Argument {
        Argument::Fault { word }
    }

    #[track_caller]
    fn check_refused(words: [&[Argument]; 2], expected: &str) {
        let findings = verify(&with(words)).unwrap_err();
        assert!(findings.iter().any(|finding| finding.to_string() == expected), "{findings:?}");
    }

    #[test]
    fn words_of_different_steps_pass() {
        let plan = with([&[word(1)], &[word(0)]]);
        assert_eq!(verify(&plan), Ok(()));
        assert_eq!(plan.programs[0].faults().collect::<Vec<_>>(), [(1, 1), (4, 0)]);
        let text = text(&plan);
        assert!(text.lines().any(|line| line.starts_with("  #4 ") && line.contains(" with fault 0 ")), "{text}");
    }

    #[test]
    fn words_are_numbered_without_gaps() {
        check_refused([&[word(0)], &[word(2)]], "program 0, step #4: fault word 2 of 2");
        check_refused([&[word(1)], &[word(u32::MAX)]], "program 0, step #4: fault word 4294967295 of 2");
    }

    #[test]
    fn two_steps_share_no_word() {
        check_refused([&[word(0)], &[word(0)]], "program 0, step #4: shares fault word 0 with step #1");
    }

    #[test]
    fn a_step_that_checks_has_one_word() {
        check_refused([&[word(0)], &[]], "program 0, step #4: 0 scalars, its kernel takes 1");
        check_refused([&[word(0), word(1)], &[word(2)]], "program 0, step #1: 2 scalars, its kernel takes 1");
        let other = "program 0, step #4: scalar 0 is no fault word, and its kernel checks indices";
        check_refused([&[word(0)], &[Argument::Scalar { value: 7.into() }]], other);
    }

    #[test]
    fn no_tensor_is_in_a_word() {
        let mut plan = sample::plan();
        plan.programs[0].inputs[0].place.at = Argument::Fault { word: 0 };
        assert!(verify(&plan).is_err());
    }
}
