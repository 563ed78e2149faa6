//! What the tests of the steps share, and tests of the pass as a whole.

use cpu::recipe::NoFiles;
use ir::text::parse_lines;

use super::{run, simplify};
use crate::harness::{CPU, Case};

/// Checks that `before` becomes `after`, see [`Case::check`].
#[track_caller]
pub(super) fn check(before: &str, after: &str) {
    Case::new(run, CPU).check(before, after);
}

#[track_caller]
pub(super) fn check_unchanged(text: &str) {
    check(text, text);
}

#[test]
fn merges_equal_nodes_and_their_origins() {
    check(
        "%x: f32[4]
         %a = pointwise %x {exp($0)}      # a
         %b = pointwise %x {exp($0)}      # b
         %y = pointwise %a, %b {$0 - $1}  # y
         return %y",
        "%x: f32[4]
         %a = pointwise %x {exp($0)}      # a + b
         %y = pointwise %a {$0 - $0}      # y
         return %y",
    );
}

#[test]
fn merges_equal_weights() {
    check(
        "%x: f32[2]
         %v: f32[2] = weight [1, 2]
         %w: f32[2] = weight [1, 2]
         %y = pointwise %x, %v, %w {$0 * $1 + $2}
         return %y",
        "%x: f32[2]
         %v: f32[2] = weight [1, 2]
         %y = pointwise %x, %v {$0 * $1 + $1}
         return %y",
    );
}

#[test]
fn keeps_nodes_that_differ_in_an_attribute() {
    check_unchanged(
        "%x: f32[4, 4]
         %a = softmax %x {axis 0}
         %b = softmax %x {axis 1}
         %y = pointwise %a, %b {$0 - $1}
         return %y",
    );
}

#[test]
fn drops_what_nobody_reads() {
    check(
        "%x: f32[4]
         %u: f32[4]
         %w: f32[4] = weight [1, 2, 3, 4]
         %a = pointwise %u, %w {$0 + $1}
         %y = pointwise %x {tanh($0)}
         return %y",
        "%x: f32[4]
         %u: f32[4]
         %y = pointwise %x {tanh($0)}
         return %y",
    );
}

#[test]
fn inputs_and_weights_may_leave_as_they_are() {
    check(
        "%x: f32[4]
         %w: f32[2, 2] = weight [1, 2, 3, 4]
         %a: f32[2, 2] = reshape %x
         %y: f32[4] = reshape %a
         %v: f32[4] = reshape %w
         return %y, %v",
        "%x: f32[4]
         %v: f32[4] = weight [1, 2, 3, 4]
         return %x, %v",
    );
}

#[test]
fn folds_the_arithmetic_of_shapes() {
    // As exporters spell `x.view(x.shape[0], -1)`.
    check(
        "%x: f32[2, 3, 4]
         %shape: i64[3] = weight [2, 3, 4]
         %zero: i64[] = weight [0]
         %batch = gather %shape, %zero {axis 0}
         %first: i64[1] = reshape %batch
         %rest: i64[1] = weight [-1]
         %both = concat %first, %rest {axis 0}
         %bound = pointwise %both {max($0, 0)}
         %used = pointwise %bound {f32($0)}
         %flat: f32[2, 12] = reshape %x
         %some: f32[2, 1] = reshape %used
         %y = pointwise %flat, %some {$0 + $1}
         return %y",
        "%x: f32[2, 3, 4]
         %flat: f32[2, 12] = reshape %x
         %some: f32[2, 1] = weight [2, 0]
         %y = pointwise %flat, %some {$0 + $1}
         return %y",
    );
}

#[test]
fn refuses_a_sharded_module() {
    let module = parse_lines(
        "mesh tensor=2
         %x: f32[2] of [4] split(0: tensor)
         %y = pointwise %x {exp($0)}
         return %y",
    );
    let error = simplify(module.unwrap(), &NoFiles).unwrap_err();
    assert!(error.to_string().contains("sharded already"), "{error}");
}
