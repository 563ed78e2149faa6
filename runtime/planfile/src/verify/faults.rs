//! Fault words: numbered without gaps, and each of one step, so that a marked word names the step that marked it. That
//! a step has one word at most, as its last scalar, is checked with its other scalars.

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
    use crate::expr::RankScalar;
    use crate::plan::{Action, Argument, Plan};
    use crate::sample;
    use crate::text::text;
    use crate::verify::verify;

    /// The sample, with fault words of these steps.
    fn with(words: &[(usize, u32)]) -> Plan {
        let mut plan = sample::plan();
        for &(step, word) in words {
            match &mut plan.programs[0].steps[step].action {
                Action::Launch { scalars, .. } => scalars.push(Argument::Fault { word }),
                _ => panic!("step {step} is no launch"),
            }
        }
        plan
    }

    #[track_caller]
    fn check_refused(words: &[(usize, u32)], expected: &str) {
        let findings = verify(&with(words)).unwrap_err();
        assert!(findings.iter().any(|finding| finding.to_string() == expected), "{findings:?}");
    }

    #[test]
    fn words_of_different_steps_pass() {
        let plan = with(&[(0, 1), (3, 0)]);
        assert_eq!(verify(&plan), Ok(()));
        assert_eq!(plan.programs[0].faults().collect::<Vec<_>>(), [(0, 1), (3, 0)]);
        let text = text(&plan);
        assert!(text.lines().any(|line| line.starts_with("  #3 ") && line.contains(" with fault 0 ")), "{text}");
    }

    #[test]
    fn words_are_numbered_without_gaps() {
        check_refused(&[(0, 0), (1, 2)], "program 0, step #1: fault word 2 of 2");
        check_refused(&[(1, u32::MAX)], "program 0, step #1: fault word 4294967295 of 1");
    }

    #[test]
    fn two_steps_share_no_word() {
        check_refused(&[(0, 0), (3, 0)], "program 0, step #3: shares fault word 0 with step #0");
    }

    #[test]
    fn a_step_has_one_word() {
        check_refused(&[(0, 0), (0, 1)], "program 0, step #0: scalar 0: a fault word before other scalars");
    }

    #[test]
    fn a_word_is_the_last_scalar() {
        let with_scalar = |position: usize| {
            let mut plan = with(&[(0, 0)]);
            if let Action::Launch { scalars, .. } = &mut plan.programs[0].steps[0].action {
                scalars.insert(position, Argument::Scalar { value: RankScalar::Uniform(7) });
            }
            verify(&plan).map_err(|findings| findings[0].to_string())
        };
        assert_eq!(with_scalar(0), Ok(()));
        let refused = "program 0, step #0: scalar 0: a fault word before other scalars";
        assert_eq!(with_scalar(1), Err(refused.to_owned()));
    }

    #[test]
    fn no_tensor_is_in_a_word() {
        let mut plan = sample::plan();
        plan.programs[0].inputs[0].place.at = Argument::Fault { word: 0 };
        assert!(verify(&plan).is_err());
    }
}
