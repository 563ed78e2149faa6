//! What each rule of the policy does and where it refuses, and that half types change results by their rounding alone.

mod pairs;

use cpu::recipe::{NoFiles, read_all};
use ir::Module;
use ir::text::graph_text;
use ir::verify::verify;
use planfile::{DType, Scalar};

use super::*;
use crate::harness::{CPU, FILES, Machine, difference, outputs, parse};
use crate::settings::Options;

type Run = fn(Logical, &Settings<'_>) -> Result<Logical, PassError>;

fn apply(pass: Run, module: Module, dtype: Option<DType>) -> Module {
    let machine = Machine { options: Options { dtype, ..Options::default() }, ..Machine::new(CPU) };
    pass(Logical(module), &machine.settings()).unwrap().0
}

fn run_pass(module: Module, dtype: Option<DType>) -> Module {
    let module = apply(run, module, dtype);
    verify(&module).unwrap_or_else(|error| panic!("{error}\n{module}"));
    module
}

/// The graph without names and recipes of weights.
fn shown(module: &Module) -> String {
    let text = graph_text(module, &module.graphs[0]);
    let line = |line: &str| match line.split_once(" = weight ") {
        Some((value, _)) => format!("{value} = weight\n"),
        None => format!("{}\n", line.split("  #").next().unwrap_or(line)),
    };
    text.lines().map(line).collect()
}

/// Checks that converting the lines `before` gives the graph of the lines `after`.
#[track_caller]
fn check(dtype: DType, before: &str, after: &str) {
    let converted = run_pass(parse(before), Some(dtype));
    let before = parse(before);
    assert_eq!(converted.entries[0].inputs, before.entries[0].inputs);
    let types = |module: &Module| module.entries[0].outputs.iter().map(|port| port.ty.clone()).collect::<Vec<_>>();
    assert_eq!(types(&converted), types(&before));
    // Tidied, so that both are numbered alike.
    let expected = apply(simplify::run, parse(after), None);
    let [actual, expected] = [&converted, &expected].map(shown);
    assert!(actual == expected, "got\n{actual}\nexpected\n{expected}");
}

/// Largest difference to the module in `f32`, as a share of the largest output.
fn error(text: &str, dtype: DType) -> f64 {
    difference(&outputs(&parse(text)), &outputs(&run_pass(parse(text), Some(dtype))))
}

#[test]
fn without_a_type_nothing_changes() {
    let module = parse("%x: f32[4]\n%y = pointwise %x {exp($0)}\n%z = pointwise %y {exp($0)}\nreturn %z");
    assert_eq!(run_pass(module.clone(), None), module);
}

#[test]
fn recurrent_layers_read_the_half_type_and_their_functions_stay() {
    let operands = |dtype: &str| {
        format!(
            "%w: {dtype}[1, 64, 16] = weight file 0 at 0
             %p: {dtype}[1, 48] = weight file 0 at 16384
             %s, %h, %e = recurrence %a, %w, %b, %c, %p, %n {{lstm, peepholes, lengths, \
             forward [sigmoid(min($0, 3.0)), tanh($0), tanh($0)]}}
             %f = pointwise %s {{f32($0)}}
             %k = pointwise %e {{f32($0)}}
             return %f, %k"
        )
    };
    let inputs = "%x: f32[5, 2, 1, 64]\n%i: f32[1, 2, 16]\n%j: f32[1, 2, 16]\n%n: i64[2]\n";
    let same = "%a = pointwise %x {f32($0)}\n%b = pointwise %i {f32($0)}\n%c = pointwise %j {f32($0)}\n";
    let half = "%a = pointwise %x {f16($0)}\n%b = pointwise %i {f16($0)}\n%c = pointwise %j {f16($0)}\n";
    check(DType::F16, &[inputs, same, &operands("f32")].concat(), &[inputs, half, &operands("f16")].concat());
    assert!(error(&[inputs.replace("i64[2]", "i32[2]").as_str(), same, &operands("f32")].concat(), DType::F16) < 5e-3);
}

#[test]
fn products_read_the_half_type_and_expressions_compute_in_single() {
    check(
        DType::BF16,
        "%x: f32[8, 64]
         %w: f32[64, 64] = weight file 0 at 0
         %h = dot %x, %w {contract [1]x[0]}
         %b: f32[64] = weight file 0 at 16384
         %a = pointwise %h, %b {tanh($0 + $1)}
         %v: f32[64, 64] = weight file 0 at 32768
         %r = dot %a, %v {contract [1]x[0]}
         %s = pointwise %r, %h {$0 + $1}
         %u: f32[64, 64] = weight file 0 at 65536
         %y = dot %s, %u {contract [1]x[0]}
         return %y",
        "%x: f32[8, 64]
         %c = pointwise %x {bf16($0)}
         %w: bf16[64, 64] = weight file 0 at 0
         %h = dot %c, %w {contract [1]x[0]}
         %b: f32[64] = weight file 0 at 16384
         %a = pointwise %h, %b {bf16(tanh(f32($0) + $1))}
         %v: bf16[64, 64] = weight file 0 at 32768
         %r = dot %a, %v {contract [1]x[0]}
         %s = pointwise %r, %h {bf16(f32($0) + f32($1))}
         %u: bf16[64, 64] = weight file 0 at 65536
         %y: f32[8, 64] = dot %s, %u {contract [1]x[0]}
         return %y",
    );
}

#[test]
fn a_number_whose_bits_are_read_is_not_rounded() {
    check(
        DType::BF16,
        "%x: f32[8, 64]
         %w: f32[64, 64] = weight file 0 at 0
         %h = dot %x, %w {contract [1]x[0]}
         %t = transpose %h [1, 0]
         %y = pointwise %t {bits($0)}
         return %y",
        "%x: f32[8, 64]
         %c = pointwise %x {bf16($0)}
         %w: bf16[64, 64] = weight file 0 at 0
         %h: f32[8, 64] = dot %c, %w {contract [1]x[0]}
         %t = transpose %h [1, 0]
         %y = pointwise %t {bits($0)}
         return %y",
    );
}

#[test]
fn a_spelled_out_norm_stays_in_single_up_to_the_product() {
    check(
        DType::F16,
        "%i: i64[8]
         %t: f32[1000, 64] = weight file 0 at 0
         %x = gather %t, %i {axis 0}
         %q = pointwise %x {pow($0, 2.0)}
         %m = reduce %q {mean [1], keep}
         %n = pointwise %x, %m {$0 / sqrt($1 + 1e-12)}
         %g: f32[64] = weight file 0 at 16384
         %s = pointwise %n, %g {$0 * $1}
         %r: f32[2, 4, 64] = reshape %s
         %w: f32[64, 8] = weight file 0 at 32768
         %h = dot %r, %w {contract [2]x[0]}
         %y = softmax %h {axis 2}
         return %y",
        "%i: i64[8]
         %t: f16[1000, 64] = weight file 0 at 0
         %x = gather %t, %i {axis 0}
         %q = pointwise %x {pow(f32($0), 2.0)}
         %m = reduce %q {mean [1], keep}
         %n = pointwise %x, %m {f32($0) / sqrt($1 + 1e-12)}
         %g: f32[64] = weight file 0 at 16384
         %s = pointwise %n, %g {f16($0 * $1)}
         %r: f16[2, 4, 64] = reshape %s
         %w: f16[64, 8] = weight file 0 at 32768
         %h: f32[2, 4, 8] = dot %r, %w {contract [2]x[0]}
         %y = softmax %h {axis 2}
         return %y",
    );
}

#[test]
fn composites_keep_their_operands_type() {
    check(
        DType::BF16,
        "%x: f32[8, 64]
         %w: f32[64, 64] = weight file 0 at 0
         %h = dot %x, %w {contract [1]x[0]}
         %g: f32[64] = weight file 0 at 16384
         %n = norm %h, %g {rms, axis 1, epsilon 1e-6, scale}
         %p = softmax %n {axis 1}
         %y = dot %p, %w {contract [1]x[0]}
         return %y",
        "%x: f32[8, 64]
         %c = pointwise %x {bf16($0)}
         %w: bf16[64, 64] = weight file 0 at 0
         %h = dot %c, %w {contract [1]x[0]}
         %g: bf16[64] = weight file 0 at 16384
         %n = norm %h, %g {rms, axis 1, epsilon 1e-6, scale}
         %p = softmax %n {axis 1}
         %y: f32[8, 64] = dot %p, %w {contract [1]x[0]}
         return %y",
    );
}

#[test]
fn choices_are_made_in_single() {
    check(
        DType::BF16,
        "%x: f32[8, 64]
         %w: f32[64, 8] = weight file 0 at 0
         %h = dot %x, %w {contract [1]x[0]}
         %v, %i = top_k %h {axis 1, k 2}
         return %v, %i",
        "%x: f32[8, 64]
         %c = pointwise %x {bf16($0)}
         %w: bf16[64, 8] = weight file 0 at 0
         %h: f32[8, 8] = dot %c, %w {contract [1]x[0]}
         %v, %i = top_k %h {axis 1, k 2}
         return %v, %i",
    );
}

#[test]
fn a_mask_that_does_not_fit_keeps_its_scores_in_single() {
    check(
        DType::F16,
        "%m: bool[8, 8]
         %q: f32[8, 64]
         %w: f32[64, 64] = weight file 0 at 0
         %k = dot %q, %w {contract [1]x[0]}
         %s = dot %k, %k {contract [1]x[1]}
         %a = pointwise %s, %m {select($1, $0, -1e9)}
         %p = softmax %a {axis 1}
         %y = dot %p, %k {contract [1]x[0]}
         return %y",
        "%m: bool[8, 8]
         %q: f32[8, 64]
         %c = pointwise %q {f16($0)}
         %w: f16[64, 64] = weight file 0 at 0
         %k = dot %c, %w {contract [1]x[0]}
         %s = dot %k, %k {contract [1]x[1]}
         %a = pointwise %m, %s {select($0, f32($1), -1e9)}
         %p = softmax %a {axis 1}
         %d = pointwise %p {f16($0)}
         %y: f32[8, 64] = dot %d, %k {contract [1]x[0]}
         return %y",
    );
}

#[test]
fn an_added_mask_of_attention_stays_finite() {
    let text = "%q: f32[1, 2, 4, 8]
         %m: bool[1, 1, 4, 4]
         %a = pointwise %m {select($0, 0.0, -3.4028235e38)}
         %y = attention %q, %q, %q, %a {scale 0.5, mask}
         return %y";
    for dtype in [DType::F16, DType::BF16] {
        // Noise has no true: every key is masked, and all count alike.
        assert!(error(text, dtype) < 1e-2, "{}", run_pass(parse(text), Some(dtype)));
    }
}

#[test]
fn integers_and_booleans_are_left_alone() {
    let text = "%x: i64[4]
         %b = pointwise %x {$0 > 2}
         %s = pointwise %x {$0 * 70000}
         %d: f64[4]
         %y = pointwise %d {$0 * f64(2.0)}
         return %b, %s, %y";
    check(DType::F16, text, text);
}

#[test]
fn large_constants_of_expressions_become_the_half_type() {
    check(
        DType::BF16,
        "%x: f32[64, 512]
         %w: f32[512, 512] = weight file 0 at 0
         %h = dot %x, %w {contract [1]x[0]}
         %p: f32[64, 512] = weight file 0 at 1048576
         %y = pointwise %h, %p {$0 + $1}
         %z = dot %y, %w {contract [1]x[0]}
         return %z",
        "%x: f32[64, 512]
         %c = pointwise %x {bf16($0)}
         %w: bf16[512, 512] = weight file 0 at 0
         %h = dot %c, %w {contract [1]x[0]}
         %p: bf16[64, 512] = weight file 0 at 1048576
         %y = pointwise %h, %p {bf16(f32($0) + f32($1))}
         %z: f32[64, 512] = dot %y, %w {contract [1]x[0]}
         return %z",
    );
}

#[test]
fn half_types_of_the_model_are_undone_by_single() {
    check(
        DType::F32,
        "%x: f16[8, 64]
         %w: f16[64, 64] = weight file 0 at 0
         %h = dot %x, %w {contract [1]x[0]}
         %y = pointwise %h {f16(exp(f32($0))) * f16(0.5)}
         return %y",
        "%x: f16[8, 64]
         %c = pointwise %x {f32($0)}
         %w: f32[64, 64] = weight file 0 at 0
         %h = dot %c, %w {contract [1]x[0]}
         %a = pointwise %h {exp($0) * 0.5}
         %y = pointwise %a {f16($0)}
         return %y",
    );
}

#[test]
fn a_weight_wanted_in_two_types_is_there_twice_under_two_names() {
    let module = run_pass(
        parse(
            "%x: f32[64, 64]
             %w: f32[64, 64] = weight file 0 at 0
             %h = dot %x, %w {contract [1]x[0]}
             %y = pointwise %h, %w {$0 * $1}
             return %y",
        ),
        Some(DType::F16),
    );
    let weights: Vec<(&str, DType)> =
        module.weights.iter().map(|weight| (weight.name.as_str(), weight.ty.dtype)).collect();
    assert_eq!(weights, [("w", DType::F16), ("w.f32", DType::F32)]);
}

#[test]
fn what_the_module_holds_itself_is_converted_at_once() {
    let module = run_pass(
        parse(
            "%x: f32[2, 2]
             %w: f32[2, 2] = weight [1.5, -70000, 3, 4]
             %y = dot %x, %w {contract [1]x[0]}
             return %y",
        ),
        Some(DType::F16),
    );
    let weight = read_all(&module.weights[0].recipe, &NoFiles).unwrap();
    assert!(module.weights[0].recipe.spec.nodes.is_empty());
    let element = |bytes: &[u8]| Scalar::from_bytes(DType::F16, bytes).unwrap().to_f64();
    let elements: Vec<f64> = weight.data.bytes().chunks_exact(2).map(element).collect();
    assert_eq!(elements, [1.5, -65504.0, 3.0, 4.0]);
}

#[test]
fn results_differ_by_rounding_alone() {
    let text = "%x: f32[8, 64]
         %w: f32[64, 64] = weight file 0 at 0
         %h = dot %x, %w {contract [1]x[0]}
         %b: f32[64] = weight file 0 at 16384
         %a = pointwise %h, %b {tanh($0 + $1)}
         %m = reduce %a {mean [1], keep}
         %c = pointwise %a, %m {$0 - $1}
         %q = pointwise %c {$0 * $0}
         %v = reduce %q {mean [1], keep}
         %n = pointwise %c, %v {$0 / sqrt($1 + 1e-5)}
         %u: f32[64, 64] = weight file 0 at 32768
         %y = dot %n, %u {contract [1]x[0]}
         return %y";
    let [f16, bf16] = [DType::F16, DType::BF16].map(|dtype| error(text, dtype));
    assert!(f16 > 0.0 && f16 < 2e-3, "{f16}");
    assert!(bf16 > f16 && bf16 < 1.5e-2, "{bf16}");
    assert_eq!(error(text, DType::F32), 0.0);
}
