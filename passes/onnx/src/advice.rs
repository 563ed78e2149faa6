//! What to do about operators that are not supported: which standard ones replace them and since when, and how exports
//! come without them.

use std::collections::BTreeSet;

/// Every exporter writes this opset; what came later is named with its own.
const COMMON_OPSET: i64 = 13;

/// Domain of ONNX Runtime's own operators.
const ORT: &str = "com.microsoft";

/// Standard operators that stand for another one.
struct Replacement {
    domain: &'static str,
    op: &'static str,
    /// Each with the opset that has it.
    with: &'static [(&'static str, i64)],
    /// What else to know; empty where there is nothing.
    remark: &'static str,
}

const fn row(
    domain: &'static str,
    op: &'static str,
    with: &'static [(&'static str, i64)],
    remark: &'static str,
) -> Replacement {
    Replacement { domain, op, with, remark }
}

const QDQ: &str = "quantise in the QDQ format: the operator between DequantizeLinear and QuantizeLinear";
const EIGHT_BITS: &str = "weights of 4 bits are not supported: export with f16, bf16 or 8-bit weights";
const LOOP_OUTSIDE: &str = "export the decoder alone, and search outside of the plan";
const ONE_TOKEN: &str = "its caches become inputs and outputs, or inputs of Attention";

/// By domain and operator. `SimplifiedLayerNormalization` is ONNX Runtime's too, but in ONNX's own domain.
#[rustfmt::skip]
const REPLACEMENTS: &[Replacement] = &[
    row("",  "SimplifiedLayerNormalization",      &[("RMSNormalization", 23)], ""),
    row(ORT, "SimplifiedLayerNormalization",      &[("RMSNormalization", 23)], ""),
    row(ORT, "SkipSimplifiedLayerNormalization",  &[("Add", 7), ("RMSNormalization", 23)], ""),
    row(ORT, "LayerNormalization",                &[("LayerNormalization", 17)], ""),
    row(ORT, "SkipLayerNormalization",            &[("Add", 7), ("LayerNormalization", 17)], ""),
    row(ORT, "EmbedLayerNormalization",           &[("Gather", 1), ("Add", 7), ("LayerNormalization", 17)], ""),
    row(ORT, "GroupNorm",                         &[("GroupNormalization", 21)], "with Transpose where channels are last"),
    row(ORT, "SkipGroupNorm",                     &[("Add", 7), ("GroupNormalization", 21)], ""),

    row(ORT, "Attention",                         &[("MatMul", 1), ("Attention", 23)], ""),
    row(ORT, "MultiHeadAttention",                &[("Attention", 23)], ""),
    row(ORT, "GroupQueryAttention",               &[("Attention", 23)], "with RotaryEmbedding (opset 23) where it rotates"),
    row(ORT, "DecoderAttention",                  &[("MatMul", 1), ("Attention", 23)], ONE_TOKEN),
    row(ORT, "DecoderMaskedSelfAttention",        &[("MatMul", 1), ("Attention", 23)], ONE_TOKEN),
    row(ORT, "DecoderMaskedMultiHeadAttention",   &[("Attention", 23)], ONE_TOKEN),
    row(ORT, "PackedAttention",                   &[("MatMul", 1), ("Attention", 23)], "with padded sequences and a mask"),
    row(ORT, "PackedMultiHeadAttention",          &[("Attention", 23)], "with padded sequences and a mask"),
    row(ORT, "SparseAttention",                   &[("Attention", 23)], "with a mask"),
    row(ORT, "PagedAttention",                    &[("Attention", 23)], ONE_TOKEN),
    row(ORT, "QAttention",                        &[("MatMul", 1), ("Attention", 23)], "quantise the MatMul in the QDQ format"),
    row(ORT, "RotaryEmbedding",                   &[("RotaryEmbedding", 23)], ""),
    row(ORT, "GemmaRotaryEmbedding",              &[("RotaryEmbedding", 23)], ""),
    row(ORT, "RelativePositionBias",              &[("Gather", 1), ("Transpose", 1)], ""),
    row(ORT, "GatedRelativePositionBias",         &[("MatMul", 1), ("Sigmoid", 6), ("Mul", 7)], ""),

    row(ORT, "Gelu",                              &[("Gelu", 20)], ""),
    row(ORT, "FastGelu",                          &[("Gelu", 20)], "with approximate=\"tanh\", after Add where it has a bias"),
    row(ORT, "BiasGelu",                          &[("Add", 7), ("Gelu", 20)], ""),
    row(ORT, "QuickGelu",                         &[("Swish", 24)], "or Sigmoid and Mul"),
    row(ORT, "BiasSplitGelu",                     &[("Add", 7), ("Split", 2), ("Gelu", 20), ("Mul", 7)], ""),
    row(ORT, "BiasAdd",                           &[("Add", 7)], ""),
    row(ORT, "BiasSoftmax",                       &[("Add", 7), ("Softmax", 13)], ""),
    row(ORT, "BiasDropout",                       &[("Add", 7)], "drop-out does nothing at inference"),
    row(ORT, "BitmaskDropout",                    &[("Identity", 1)], "drop-out does nothing at inference"),
    row(ORT, "BitmaskBiasDropout",                &[("Add", 7)], "drop-out does nothing at inference"),

    row(ORT, "FusedMatMul",                       &[("Transpose", 1), ("MatMul", 1), ("Mul", 7)], ""),
    row(ORT, "TransposeMatMul",                   &[("Transpose", 1), ("MatMul", 1)], ""),
    row(ORT, "FusedMatMulActivation",             &[("MatMul", 1)], "and the activation"),
    row(ORT, "FusedGemm",                         &[("Gemm", 7)], "and the activation"),
    row(ORT, "GemmFastGelu",                      &[("MatMul", 1), ("Gelu", 20)], ""),
    row(ORT, "FusedConv",                         &[("Conv", 1)], "and the activation"),
    row(ORT, "NhwcConv",                          &[("Conv", 1)], ""),
    row(ORT, "NhwcFusedConv",                     &[("Conv", 1)], "and the activation"),
    row(ORT, "NhwcMaxPool",                       &[("MaxPool", 1)], ""),
    row(ORT, "SparseToDenseMatMul",               &[("MatMul", 1)], "with dense weights"),

    row(ORT, "MatMulNBits",                       &[("MatMul", 1)], EIGHT_BITS),
    row(ORT, "MatMulBnb4",                        &[("MatMul", 1)], EIGHT_BITS),
    row(ORT, "MatMulFpQ4",                        &[("MatMul", 1)], EIGHT_BITS),
    row(ORT, "GatherBlockQuantized",              &[("Gather", 1)], EIGHT_BITS),
    row(ORT, "GemmFloat8",                        &[("Gemm", 7)], "in f16 or bf16: 8-bit floating point is not supported"),
    row(ORT, "MoE",                               &[("TopK", 1), ("Gather", 1), ("MatMul", 1)], "as PyTorch's exporter writes experts"),
    row(ORT, "QMoE",                              &[("TopK", 1), ("Gather", 1), ("MatMul", 1)], EIGHT_BITS),
    row(ORT, "DynamicQuantizeMatMul",             &[("DynamicQuantizeLinear", 11), ("MatMulInteger", 10), ("Mul", 7)], ""),
    row(ORT, "MatMulIntegerToFloat",              &[("MatMulInteger", 10), ("Cast", 6), ("Mul", 7)], ""),
    row(ORT, "DynamicQuantizeLSTM",               &[("LSTM", 7)], "in floating point"),
    row(ORT, "QuantizeLinear",                    &[("QuantizeLinear", 10)], "16-bit types since opset 21"),
    row(ORT, "DequantizeLinear",                  &[("DequantizeLinear", 10)], "16-bit types since opset 21"),
    row(ORT, "QGemm",                             &[("DequantizeLinear", 10), ("Gemm", 7), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearAdd",                        &[("DequantizeLinear", 10), ("Add", 7), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearMul",                        &[("DequantizeLinear", 10), ("Mul", 7), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearConv",                       &[("QLinearConv", 10)], QDQ),
    row(ORT, "QLinearSigmoid",                    &[("DequantizeLinear", 10), ("Sigmoid", 6), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearSoftmax",                    &[("DequantizeLinear", 10), ("Softmax", 13), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearLeakyRelu",                  &[("DequantizeLinear", 10), ("LeakyRelu", 6), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearAveragePool",                &[("DequantizeLinear", 10), ("AveragePool", 7), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearGlobalAveragePool",          &[("DequantizeLinear", 10), ("GlobalAveragePool", 1), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearConcat",                     &[("DequantizeLinear", 10), ("Concat", 4), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearReduceMean",                 &[("DequantizeLinear", 10), ("ReduceMean", 1), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QLinearWhere",                      &[("DequantizeLinear", 10), ("Where", 9), ("QuantizeLinear", 10)], QDQ),
    row(ORT, "QEmbedLayerNormalization",          &[("Gather", 1), ("Add", 7), ("LayerNormalization", 17)], ""),

    row(ORT, "Trilu",                             &[("Trilu", 14)], ""),
    row(ORT, "GridSample",                        &[("GridSample", 16)], ""),
    row(ORT, "GatherND",                          &[("GatherND", 11)], ""),
    row(ORT, "ExpandDims",                        &[("Unsqueeze", 1)], ""),
    row(ORT, "Pad",                               &[("Pad", 11)], ""),
    row(ORT, "Range",                             &[("Range", 11)], ""),
    row(ORT, "TorchEmbedding",                    &[("Gather", 1)], ""),
    row(ORT, "CropAndResize",                     &[("RoiAlign", 16)], ""),
    row(ORT, "Rfft",                              &[("DFT", 17)], ""),
    row(ORT, "Irfft",                             &[("DFT", 17)], ""),
    row(ORT, "ComplexMul",                        &[("Mul", 7), ("Sub", 7), ("Add", 7)], "on real and imaginary parts"),
    row(ORT, "ComplexMulConj",                    &[("Mul", 7), ("Sub", 7), ("Add", 7)], "on real and imaginary parts"),
    row(ORT, "CDist",                             &[("Sub", 7), ("ReduceL2", 1)], ""),
    row(ORT, "BeamSearch",                        &[], LOOP_OUTSIDE),
    row(ORT, "WhisperBeamSearch",                 &[], LOOP_OUTSIDE),
    row(ORT, "GreedySearch",                      &[], LOOP_OUTSIDE),
    row(ORT, "Sampling",                          &[], LOOP_OUTSIDE),
    row(ORT, "EPContext",                         &[], "it holds code for one accelerator: compile the model that it was made from"),
    row(ORT, "Tokenizer",                         &[], STRINGS),
    row(ORT, "Unique",                            &[], DATA_DECIDES),

    row("",  "Loop",                              &[], LOOPS),
    row("",  "Scan",                              &[], LOOPS),
    row("",  "NonMaxSuppression",                 &[], DATA_DECIDES),
    row("",  "Unique",                            &[], DATA_DECIDES),
    row("",  "Compress",                          &[("Where", 9)], DATA_DECIDES),
    row("",  "ImageDecoder",                      &[], "decode images before the plan"),
    row("",  "StringConcat",                      &[], STRINGS),
    row("",  "StringNormalizer",                  &[], STRINGS),
    row("",  "StringSplit",                       &[], STRINGS),
    row("",  "RegexFullMatch",                    &[], STRINGS),
    row("",  "TfIdfVectorizer",                   &[], STRINGS),
    row("",  "RandomNormal",                      &[], NOISE),
    row("",  "RandomNormalLike",                  &[], NOISE),
    row("",  "RandomUniform",                     &[], NOISE),
    row("",  "RandomUniformLike",                 &[], NOISE),
    row("",  "Bernoulli",                         &[], NOISE),
    row("",  "Multinomial",                       &[], NOISE),
    row("",  "SequenceMap",                       &[], SEQUENCES),
    row("",  "SequenceConstruct",                 &[], SEQUENCES),
    row("",  "SequenceEmpty",                     &[], SEQUENCES),
    row("",  "SequenceAt",                        &[], SEQUENCES),
    row("",  "SequenceInsert",                    &[], SEQUENCES),
    row("",  "SequenceErase",                     &[], SEQUENCES),
    row("",  "SequenceLength",                    &[], SEQUENCES),
    row("",  "SplitToSequence",                   &[("Split", 2)], SEQUENCES),
    row("",  "ConcatFromSequence",                &[("Concat", 4)], SEQUENCES),
    row("",  "Optional",                          &[], SEQUENCES),
    row("",  "OptionalGetElement",                &[], SEQUENCES),
    row("",  "OptionalHasElement",                &[], SEQUENCES),
    row("",  "SoftmaxCrossEntropyLoss",           &[("LogSoftmax", 1), ("GatherElements", 11)], TRAINING),
    row("",  "NegativeLogLikelihoodLoss",         &[("GatherElements", 11)], TRAINING),
];

const LOOPS: &str =
    "loops are not unrolled: export with a fixed number of steps, or export the body and loop around the plan";
const DATA_DECIDES: &str = "the size of its result depends on data: end the model before it, and do it after the plan";
const STRINGS: &str = "strings are not supported: work on text before the plan, and give it numbers";
const NOISE: &str = "plans draw no random numbers: make the noise an input of the model";
const SEQUENCES: &str = "only tensors are supported: export with tensors in place of sequences and optional values";
const TRAINING: &str = "losses are for training: export the model for inference";

/// Advice on a whole domain, once for all of its operators.
const DOMAINS: &[(&str, &str)] = &[
    (
        ORT,
        "operators of com.microsoft are ONNX Runtime's own, written by its optimisers, quantisers and model builder: export \
         without them (`optimum-cli export onnx` without `--optimize`), or give the model as it was before",
    ),
    (
        "com.microsoft.nchwc",
        "operators of com.microsoft.nchwc are in a model that ONNX Runtime saved optimised for one machine: give the \
         model as it was before",
    ),
    (
        "ai.onnx.ml",
        "operators of ai.onnx.ml are classical machine learning: convert them to tensor operators (such as with \
         Hummingbird), or run them outside of the plan",
    ),
    ("ai.onnx.training", "operators of ai.onnx.training are for training: export the model for inference"),
    (
        "ai.onnx.preview.training",
        "operators of ai.onnx.preview.training are for training: export the model for inference",
    ),
    (
        "org.pytorch.aten",
        "operators of org.pytorch.aten are what PyTorch's exporter had no ONNX for: export with a newer PyTorch \
         (`torch.onnx.export(..., dynamo=True)`)",
    ),
];

/// What to do about one operator; `None` where nothing is known but what [`for_domains`] says.
pub(crate) fn for_operator(domain: &str, op: &str) -> Option<String> {
    let found = REPLACEMENTS.iter().find(|row| row.domain == domain && row.op == op)?;
    let with: Vec<String> = found
        .with
        .iter()
        .map(|(name, since)| if *since > COMMON_OPSET { format!("{name} (opset {since})") } else { (*name).to_owned() })
        .collect();
    Some(match (with.is_empty(), found.remark) {
        (true, remark) => remark.to_owned(),
        (false, "") => format!("ONNX has {} for it", listed(&with)),
        (false, remark) => format!("ONNX has {} for it; {remark}", listed(&with)),
    })
}

/// What to do about values of an element type that is not supported, by ONNX's name of it.
pub(crate) fn for_type(name: &str) -> &'static str {
    match name {
        "string" => STRINGS,
        "complex64" | "complex128" => "give real and imaginary parts as tensors of their own",
        name if name.starts_with("float") => "export in f16 or bf16, or with 8-bit integers",
        _ => "export with 8-bit integers, or in f16 or bf16",
    }
}

/// What to do about operators of these domains, once each.
pub(crate) fn for_domains<'a>(domains: impl Iterator<Item = &'a str>) -> Vec<String> {
    let domains: BTreeSet<&str> = domains.filter(|domain| !domain.is_empty()).collect();
    let advice = |domain: &str| {
        let known = DOMAINS.iter().find(|(known, _)| *known == domain);
        known.map_or_else(
            || {
                format!(
                    "domain {domain} is not known here: export without its operators, or with a model-local function for \
                     each, which is inlined"
                )
            },
            |(_, advice)| (*advice).to_owned(),
        )
    };
    domains.into_iter().map(advice).collect()
}

/// `a`, `a and b`, `a, b and c`.
fn listed(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operators::find;

    #[test]
    fn what_replaces_is_supported_and_what_is_replaced_is_not() {
        for Replacement { domain, op, with, remark } in REPLACEMENTS {
            assert!(find(domain, op, crate::load::OPSETS.last().unwrap_or_default()).is_err(), "{domain} {op}");
            assert!(!with.is_empty() || !remark.is_empty(), "{op}: no advice");
            for (name, since) in *with {
                assert!(find("", name, *since).is_ok(), "{op} → {name} at opset {since}");
            }
        }
    }

    #[test]
    fn no_operator_is_listed_twice() {
        let mut rows: Vec<(&str, &str)> = REPLACEMENTS.iter().map(|row| (row.domain, row.op)).collect();
        let count = rows.len();
        rows.sort_unstable();
        rows.dedup();
        assert_eq!(rows.len(), count);
    }

    #[test]
    fn advice_names_the_operator_and_since_when() {
        let advice = |op| for_operator(ORT, op).unwrap();
        assert_eq!(advice("RotaryEmbedding"), "ONNX has RotaryEmbedding (opset 23) for it");
        assert_eq!(advice("SkipSimplifiedLayerNormalization"), "ONNX has Add and RMSNormalization (opset 23) for it");
        assert!(advice("FastGelu").contains("Gelu (opset 20)") && advice("MatMulNBits").contains("4 bits"));
        assert!(for_operator("", "Loop").unwrap().contains("loop around the plan"));
        assert_eq!(for_operator("my", "Op"), None);
    }

    #[test]
    fn types_are_advised_on() {
        for (name, advice) in [("int4", "8-bit"), ("float8e4m3fn", "bf16"), ("string", "text"), ("complex64", "real")] {
            assert!(for_type(name).contains(advice), "{name}");
        }
    }

    #[test]
    fn domains_are_advised_on_once() {
        let advice = for_domains([ORT, "", "my", ORT].into_iter());
        assert_eq!(advice.len(), 2, "{advice:?}");
        assert!(advice[0].contains("--optimize") && advice[1].contains("domain my"), "{advice:?}");
    }
}
