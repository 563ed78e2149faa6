//! Specifications to try kernels on: each family of primitives with many shapes, types and attributes.
//!
//! For tests here and on devices; deterministic, small enough for the CPU to execute in moments.

mod blocks;
mod elementwise;
mod epilogues;
mod inputs;
mod recurrence;

use planfile::{DType, Op, Spec, TensorType};

pub use inputs::inputs;

/// A name that is unique, and what it names.
pub type Sample = (String, Spec);

/// All samples, in the order of their families.
pub fn samples() -> Vec<Sample> {
    let mut list = List { samples: Vec::new() };
    blocks::reduce(&mut list);
    blocks::softmax(&mut list);
    blocks::norm(&mut list);
    blocks::attention(&mut list);
    blocks::attention_of_few(&mut list);
    blocks::transpose(&mut list);
    blocks::scatter(&mut list);
    blocks::scan(&mut list);
    blocks::top_k(&mut list);
    recurrence::recurrence(&mut list);
    elementwise::pointwise(&mut list);
    elementwise::movement(&mut list);
    elementwise::gather(&mut list);
    elementwise::windows(&mut list);
    elementwise::products(&mut list);
    epilogues::products(&mut list);
    epilogues::chains(&mut list);
    epilogues::convolutions(&mut list);
    list.samples
}

struct List {
    samples: Vec<Sample>,
}

impl List {
    /// One primitive on operands of these types. The name is made of the primitive's, the types and a number.
    #[expect(clippy::expect_used, reason = "samples are constants: a wrong one is found by the first test that runs")]
    fn one(&mut self, op: Op, inputs: Vec<TensorType>) {
        let spec = Spec::of(op, inputs).expect("a sample is well-formed");
        self.spec(spec);
    }

    /// A specification that was put together.
    #[expect(clippy::expect_used, reason = "as above")]
    fn made(&mut self, spec: Option<Spec>) {
        self.spec(spec.expect("a sample is well-formed"));
    }

    fn spec(&mut self, spec: Spec) {
        let names: Vec<&str> = spec.nodes.iter().map(|node| node.op.name()).collect();
        let types: Vec<String> = spec.inputs.iter().map(ToString::to_string).collect();
        let name = format!("{:03} {} {}", self.samples.len(), names.join("+"), types.join(", "));
        self.samples.push((name, spec));
    }
}

fn ty(dtype: DType, sizes: &[u64]) -> TensorType {
    TensorType::new(dtype, sizes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn samples_are_many_and_well_formed() {
        let samples = samples();
        assert!(samples.len() >= 150, "{} samples", samples.len());
        let names: BTreeSet<&String> = samples.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), samples.len());
        for (name, spec) in &samples {
            assert!(spec.result_types().is_ok(), "{name}");
        }
    }

    #[test]
    fn the_cpu_executes_every_sample_on_its_inputs() {
        for (name, spec) in samples() {
            let mut values = inputs(&spec, 1);
            for node in &spec.nodes {
                let operands: Vec<&planfile::Tensor> = node.operands.iter().map(|&i| &values[i as usize]).collect();
                let results = cpu::evaluate(&node.op, &operands);
                values.extend(results.unwrap_or_else(|error| panic!("{name}: {error}")));
            }
        }
    }
}
