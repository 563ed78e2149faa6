//! Round trips of random modules, garbage, and the look of the text.

use proptest::prelude::*;

use super::sample::{self, Choices};
use super::{parse, parse_lines};
use crate::error::IrError;
use crate::module::Module;
use crate::verify::verify;

fn numbers() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(any::<u32>(), 0..1500)
}

proptest! {
    #[test]
    fn modules_come_back(numbers in numbers()) {
        let module = sample::module(&mut Choices::new(&numbers));
        prop_assert_eq!(verify(&module), Ok(()));
        let text = module.to_string();
        let read = parse(&text).map_err(|why| TestCaseError::fail(format!("{why}\n{text}")))?;
        prop_assert!(read == module, "{}\n\n{}", text, read);
    }

    #[test]
    fn operations_come_back(numbers in proptest::collection::vec(any::<u32>(), 0..120)) {
        for kind in sample::kinds() {
            let graph = sample::single(&mut Choices::new(&numbers), kind);
            let module = Module { graphs: vec![graph], ..Module::default() };
            let text = module.to_string();
            let read = parse(&text).map_err(|why| TestCaseError::fail(format!("{why}\n{text}")))?;
            prop_assert!(read == module, "{}\n\n{:?}\n\n{:?}", text, read, module);
        }
    }

    /// Names of Rust's types and variants begin with a capital letter; no attribute does.
    #[test]
    fn printed_plans_have_no_debug_text(numbers in proptest::collection::vec(any::<u32>(), 0..120)) {
        for kind in sample::kinds() {
            let graph = sample::single(&mut Choices::new(&numbers), kind);
            for node in &graph.nodes {
                let text = planfile::text::operation(&node.op);
                prop_assert!(!text.contains(|c: char| c.is_ascii_uppercase()), "{}", text);
            }
        }
    }

    #[test]
    fn garbage_is_an_error_or_a_module(text in "\\PC*") {
        let _ = parse(&text);
        let _ = parse_lines(&text);
    }

    #[test]
    fn broken_text_is_an_error_or_a_module(
        numbers in numbers(),
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<proptest::sample::Index>(), 0..3), 1..4),
    ) {
        let text = sample::module(&mut Choices::new(&numbers)).to_string();
        let mut words: Vec<&str> = text.split_inclusive([' ', ',', '[', ']', '(', ')', '\n']).collect();
        for (from, to, edit) in edits {
            let (from, to) = (from.index(words.len()), to.index(words.len()));
            match edit {
                0 => words.swap(from, to),
                1 => words[to] = words[from],
                _ => words[to] = "4294967296",
            }
        }
        if let Ok(module) = parse(&words.concat()) {
            let _ = verify(&module);
            prop_assert!(!module.summary_text().is_empty());
        }
    }
}

/// The properties above are worth what the modules they draw contain.
#[test]
fn samples_contain_everything() {
    let mut state = 1u32;
    let mut texts = String::new();
    for _ in 0..400 {
        let numbers = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.rotate_left(13)
        });
        texts.push_str(&sample::module(&mut Choices::new(&numbers.take(1500).collect::<Vec<_>>())).to_string());
    }
    let parts = [
        " partial(max: ",
        " segments [",
        "data.0",
        "+tensor",
        "\"odd name\"",
        ", rank(",
        "[rank(",
        "(t",
        " := ",
        "select(",
        "0x",
        "= recipe {",
        "= random ",
        "= file ",
        "hex \"",
        "frozen (",
        "ranks 0..",
        "ranks [0]",
        "<=",
        "state s0",
        "return 1: ",
        " + \"",
        "input 1",
        "send %",
        "= recv {",
        "%0\"",
        "\\u{7f}",
    ];
    let operations = (0..sample::kinds().end)
        .map(|kind| format!(" {} ", sample::single(&mut Choices::new(&[]), kind).nodes[0].op.name()));
    let parts = parts.into_iter().map(str::to_owned);
    let absent: Vec<String> = parts.chain(operations).filter(|part| !texts.contains(part)).collect();
    assert_eq!(absent, Vec::<String>::new());
}

const MLP: &str = r#"module "tiny_mlp"
mesh data=2 tensor=2x2
file 0 "model.onnx" 637430 bytes
weight w0 "fc1.weight": f32[64, 256] = file 0 at 4096
weight w1 "scale": f32[] = [0.25]
weight w2 "fc2.weight": f32[256, 64] = recipe {
  %0: f32[64, 256] = file 0 at 69632
  %1: f32[256, 64] = transpose %0 [1, 0]
  return %1
}
entry "main" (x: f32[8, 64]) -> (y: f32[8, 64]) = @main
graph @main ranks 0..8 (%0: f32[4, 64] of [8, 64] split(0: data)) {
  %1: f32[64, 64] of [64, 256] split(1: tensor) = weight w0 "fc1.weight"
  %2: f32[4, 64] of [8, 256] split(0: data, 1: tensor) = dot %0, %1 {contract [1]x[0]}    # /fc1/MatMul
  %3: f32[] of [] = weight w1 "scale"
  %4: f32[4, 64] of [8, 256] split(0: data, 1: tensor segments [128/2, 128]) = pointwise %2, %3 {(t0 := $0 * $1) * sigmoid(t0)}  # /act/Mul + "the product"
  %5: f32[64, 64] of [256, 64] split(0: tensor) = weight w2 "fc2.weight"
  %6: f32[4, 64] of [8, 64] split(0: data) partial(sum: tensor) = dot %4, %5 {contract [1]x[0]}  # /fc2/MatMul
  %7: f32[4, 64] of [8, 64] split(0: data) = all_reduce %6 {sum, groups [[0, 1, 2, 3], [4, 5, 6, 7]]}  # /fc2/MatMul
  return %7
}
"#;

#[test]
fn the_look_of_a_sharded_module() {
    let module = parse(MLP).unwrap();
    assert_eq!(verify(&module), Ok(()));
    assert_eq!(parse(&module.to_string()).unwrap(), module);
    insta::assert_snapshot!(module);
}

#[test]
fn a_summary_leaves_bytes_out() {
    let text = "module \"m\"\nweight w0 \"a\": u8[17] = hex \"0102030405060708090a0b0c0d0e0f1011\"\n";
    let module = parse(text).unwrap();
    assert_eq!(module.to_string(), text);
    let summary = module.summary_text();
    assert!(summary.contains("= hex <17 bytes, hash ") && !summary.contains("0102"), "{summary}");
    assert!(parse(&summary).is_err());
}

#[test]
fn lines_infer_what_they_leave_out() {
    let module = parse_lines(
        "%a: f32[2, 3]\n%b: f32[2, 4]\n%w: f32[4] = weight [1, 2, 0.5, -inf]\n\
         %t = transpose %a [1, 0]  # /T\n%y = dot %t, %b\n%z = pointwise %y, %w {$0 + $1}\n\
         %v, %i = top_k %z {k 2, axis 1}\nreturn %v, %t, %v",
    )
    .unwrap();
    assert_eq!(verify(&module), Ok(()));
    insta::assert_snapshot!(module, @r#"
    module "lines"
    weight w0 "w": f32[4] = [1.0, 2.0, 0.5, -inf]
    entry "main" (a: f32[2, 3], b: f32[2, 4]) -> (v: f32[3, 2], t: f32[3, 2], "v.2": f32[3, 2]) = @main
    graph @main(%0: f32[2, 3], %1: f32[2, 4]) {
      %3: f32[3, 2] = transpose %0 [1, 0]                                                     # /T
      %4: f32[3, 4] = dot %3, %1 {contract [1]x[0]}
      %2: f32[4] = weight w0 "w"
      %5: f32[3, 4] = pointwise %4, %2 {$0 + $1}
      %6: f32[3, 2], %7: i64[3, 2] = top_k %5 {k 2, axis 1}
      return %6, %3, %6
    }
    "#);
    assert_eq!(parse(&module.to_string()).unwrap(), module);
}

#[test]
fn errors_say_where_and_what() {
    let cases = [
        ("%a: f32[2]\n%b = softmax %a {axis 1}", 2, 6, "softmax: axis 1 of f32[2]"),
        ("%a: f32[2]\n%b: f32[3] = softmax %a {axis 0}", 2, 14, "results in f32[2], not in f32[3]"),
        ("%a: f32[2]\n%b = softmax %c {axis 0}", 2, 14, "`%c` is not defined yet"),
        ("%a: f32[2]\n%b = softmax %a {axes 0}", 2, 6, "`axis` is missing"),
        ("%a: f32[2]\n%b = softmax %a {axis 0, axes 0}", 2, 6, "`axes` is no attribute here"),
        ("%a: f32[2]\n%b = reshape %a", 2, 6, "the result's type is needed"),
        ("%a: f32[2]\n%a: f32[2]", 2, 1, "`%a` is defined twice"),
        ("%a: f32[2]\n%b = frobnicate %a", 2, 6, "there is no such operation"),
        ("%7: f32[2]", 1, 1, "`%7` is beyond the 1 values"),
        ("%a: f99[2]", 1, 5, "`f99` is no element type"),
        ("%a: f32[2] = weight w0", 1, 21, "`w0` is not among 0"),
        ("%a: f32[2] of [4] split(0: data)", 1, 28, "the mesh has no axis `data`"),
        ("%a: f32[2]\n%b = softmax %a {axis 0} # a b", 2, 6, "an origin is names"),
        ("%a: f32[2]\nreturn %a\n%b: f32[2]", 3, 1, "expected a statement"),
        ("%a: f32[2]\n%b = softmax %a {axis 99999999999999999999999999999999999999999}", 2, 6, "does not fit"),
    ];
    for (text, expected_line, expected_column, expected) in cases {
        match parse_lines(text) {
            Err(IrError::Parse { line, column, why }) => {
                assert!(why.contains(expected), "{text}: {why}");
                assert_eq!((line, column), (expected_line, expected_column), "{text}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    assert!(parse("entry \"e\" () -> () = @nowhere").is_err());
    assert!(parse("graph @g ranks 0..4000000000 () { return }").is_err());
    assert!(parse(&format!("mesh a={}2", "2x".repeat(40))).is_err());
}

#[test]
fn deep_nesting_is_refused() {
    assert!(parse_lines(&format!("%a: f32[2]\n%b = softmax %a {{axis {}", "[".repeat(100_000))).is_err());
}
