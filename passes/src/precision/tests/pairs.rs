//! Operations in a model of each floating-point type, converted to each type that there is.

use super::*;

/// Graphs in which `TYPE` stands for the model's type, `LOWEST` for a number near its lowest, and `FILE` for the file that
/// holds weights of it.
const GRAPHS: [(&str, &str); 12] = [
    (
        "products",
        "%x: TYPE[8, 64]
         %w: TYPE[64, 64] = weight file FILE at 0
         %h = dot %x, %w {contract [1]x[0]}
         %y = dot %h, %x {contract [1]x[1]}
         return %y",
    ),
    (
        "expressions with constants and a table",
        "%x: TYPE[128, 512]
         %b: TYPE[512] = weight file FILE at 0
         %t: TYPE[128, 512] = weight file FILE at 4096
         %a = pointwise %x, %b {tanh($0 + $1) * TYPE(0.5)}
         %y = pointwise %a, %t {$0 - $1}
         return %y",
    ),
    (
        "attention with the lowest number as its mask",
        "%q: TYPE[1, 2, 4, 8]
         %m: bool[1, 1, 4, 4]
         %a = pointwise %m {select($0, TYPE(0.0), TYPE(LOWEST))}
         %y = attention %q, %q, %q, %a {scale 0.5, mask}
         return %y",
    ),
    (
        "convolutions",
        "%x: TYPE[1, 4, 6, 6]
         %w: TYPE[8, 4, 3, 3] = weight file FILE at 0
         %y = conv %x, %w {window [3, 3], pads [(1, 1), (1, 1)]}
         return %y",
    ),
    (
        "statistics and choices",
        "%x: TYPE[8, 64]
         %m = reduce %x {mean [1], keep}
         %s = scan %x {sum, axis 1}
         %v, %i = top_k %x {axis 1, k 2}
         return %m, %s, %v",
    ),
    (
        "normalisations",
        "%x: TYPE[8, 64]
         %g: TYPE[64] = weight file FILE at 0
         %n = norm %x, %g, %g {layer, axis 1, epsilon 1e-5, scale, bias}
         %y = softmax %n {axis 1}
         return %y",
    ),
    (
        "look-ups",
        "%b: bool[8]
         %i = pointwise %b {i64($0)}
         %t: TYPE[1000, 64] = weight file FILE at 0
         %y = gather %t, %i {axis 0}
         return %y",
    ),
    (
        "movement",
        "%x: TYPE[2, 8]
         %w: TYPE[2, 8] = weight file FILE at 0
         %v: TYPE[] = weight file FILE at 4096
         %a = concat %x, %w {axis 0}
         %p = pad %a, %v {low [0, 1], high [0, 2]}
         %y = transpose %p [1, 0]
         return %y",
    ),
    (
        "pictures",
        "%x: TYPE[1, 2, 4, 4]
         %p = pool %x {average, window [2, 2], strides [2, 2], pads [(0, 0), (0, 0)]}
         %y: TYPE[1, 2, 4, 4] = resize %p {linear, half_pixel, scales [1.0, 1.0, 2.0, 2.0]}
         return %y",
    ),
    (
        "scattering",
        "%x: TYPE[4, 8]
         %u: TYPE[1, 8]
         %b: bool[1, 1]
         %i = pointwise %b {i64($0)}
         %y = scatter_nd %x, %i, %u {sum}
         return %y",
    ),
    (
        "rotation",
        "%x: TYPE[1, 2, 4, 8]
         %c: TYPE[1, 4, 4] = weight file FILE at 0
         %s: TYPE[1, 4, 4] = weight file FILE at 4096
         %y = rotary %x, %c, %s {rotary 8}
         return %y",
    ),
    (
        "recurrent layers",
        "%x: TYPE[5, 2, 1, 64]
         %h: TYPE[1, 2, 16]
         %c: TYPE[1, 2, 16]
         %w: TYPE[1, 64, 16] = weight file FILE at 0
         %s, %l, %e = recurrence %x, %w, %h, %c {lstm, forward [sigmoid($0), tanh($0), tanh($0)]}
         return %s, %l, %e",
    ),
];

/// What rounding may make of the largest output.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 3e-2,
        DType::F16 => 5e-3,
        _ => 1e-6,
    }
}

/// Converts a graph, and says what is wrong with what comes of it.
fn fault(name: &str, text: &str, own: DType, dtype: DType) -> Option<String> {
    let before = parse(text);
    // Before anything is folded.
    let module = match convert(parse(text), dtype) {
        Ok(module) => module,
        Err(error) => return Some(format!("{name}, {own} to {dtype}: {error}")),
    };
    if let Err(error) = verify(&module) {
        return Some(format!("{name}, {own} to {dtype}: {error}\n{module}"));
    }
    let module = run_pass(parse(text), Some(dtype));
    assert_eq!(module.entries[0].inputs, before.entries[0].inputs);
    if own == DType::F64 {
        return (outputs(&module) != outputs(&before)).then(|| format!("{name} is touched"));
    }
    let (error, allowed) = (error(text, dtype), tolerance(own).max(tolerance(dtype)));
    (error.is_nan() || error > allowed).then(|| format!("{name}, {own} to {dtype}: {error:.1e}\n{module}"))
}

#[test]
fn a_model_of_any_type_becomes_any_other() {
    let mut faults = Vec::new();
    for (name, graph) in GRAPHS {
        for (file, own) in FILES.into_iter().enumerate() {
            let lowest = if own == DType::F16 { "-65504.0" } else { "-3.0e38" };
            let text = graph.replace("TYPE", &own.to_string()).replace("LOWEST", lowest);
            let text = text.replace("FILE", &file.to_string());
            verify(&parse(&text)).unwrap_or_else(|error| panic!("{name} in {own}: {error}"));
            faults.extend(DTYPES.into_iter().filter_map(|dtype| fault(name, &text, own, dtype)));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
