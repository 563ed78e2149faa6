//! Inputs for runs that bring none.

use std::collections::{BTreeMap, HashMap};

use half::{bf16, f16};
use planfile::plan::PlanEntry;
use planfile::{DType, Tensor, TensorType};

use crate::error::RuntimeError;
use crate::memory::allocate;

/// The same inputs for the same seed: floating point uniform in [-1, 1), integers and booleans 0 or 1 (good as masks,
/// and as indices into all that has two elements: a table of one row refuses 1); inputs that were frozen at compile
/// time have those values.
///
/// # Errors
/// [`RuntimeError::Memory`] where an input does not fit.
pub fn random_inputs(entry: &PlanEntry, seed: u64) -> Result<BTreeMap<String, Tensor>, RuntimeError> {
    let mut inputs = BTreeMap::new();
    let frozen = entry.frozen.iter().map(|frozen| (frozen.input.as_str(), &frozen.value));
    let frozen: HashMap<&str, &Tensor> = frozen.collect();
    for (position, port) in entry.inputs.iter().enumerate() {
        let tensor = match frozen.get(port.name.as_str()) {
            Some(&frozen) => frozen.clone(),
            None => random(&port.name, &port.ty, SplitMix(seed ^ ((position as u64) << 32)))?,
        };
        inputs.insert(port.name.clone(), tensor);
    }
    Ok(inputs)
}

/// Steele, Lea and Flood, 2014: passes the usual tests, and any seed will do.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in [-1, 1), in steps that `f32` holds exactly.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

fn random(name: &str, ty: &TensorType, mut numbers: SplitMix) -> Result<Tensor, RuntimeError> {
    let mut data = allocate(ty.bytes().unwrap_or(u64::MAX), || format!("input `{name}`"))?;
    for element in data.bytes_mut().chunks_exact_mut(ty.dtype.bytes()) {
        match ty.dtype {
            // Rounding must not reach 1.
            DType::F16 => element.copy_from_slice(&f16::from_f32(numbers.float() * 0.999).to_le_bytes()),
            DType::BF16 => element.copy_from_slice(&bf16::from_f32(numbers.float() * 0.996).to_le_bytes()),
            DType::F32 => element.copy_from_slice(&numbers.float().to_le_bytes()),
            DType::F64 => element.copy_from_slice(&f64::from(numbers.float()).to_le_bytes()),
            DType::Bool
            | DType::U8
            | DType::U16
            | DType::U32
            | DType::U64
            | DType::I8
            | DType::I16
            | DType::I32
            | DType::I64 => element[0] = (numbers.next() >> 63) as u8,
        }
    }
    Ok(Tensor { ty: ty.clone(), data })
}

#[cfg(test)]
mod tests {
    use planfile::plan::{FrozenInput, PlanPort};

    use super::*;

    fn entry(dtypes: &[DType]) -> PlanEntry {
        let port = |&dtype: &DType| PlanPort { name: format!("{dtype}"), ty: TensorType::new(dtype, &[1000]) };
        PlanEntry {
            name: "main".into(),
            inputs: dtypes.iter().map(port).collect(),
            outputs: vec![],
            frozen: vec![FrozenInput {
                input: "u16".into(),
                value: Tensor::from_elements(&[1], &[7u16]).unwrap(),
                node: "/Reshape".into(),
                nodes: 1,
            }],
            programs: vec![],
            predicted_ns: 0,
        }
    }

    #[test]
    fn values_are_in_range_and_vary() {
        let inputs = random_inputs(&entry(&DType::ALL), 1).unwrap();
        let floats = inputs["f32"].elements::<f32>().unwrap();
        assert!(floats.iter().all(|value| (-1.0..1.0).contains(value)));
        assert!(floats.iter().any(|&value| value > 0.9) && floats.iter().any(|&value| value < -0.9));
        let halves = inputs["bf16"].elements::<bf16>().unwrap();
        assert!(halves.iter().all(|value| (-1.0..1.0).contains(&value.to_f32())));
        let ids = inputs["i64"].to_i64s().unwrap();
        assert!(ids.iter().all(|id| (0..2).contains(id)) && ids.contains(&0) && ids.contains(&1));
        assert_eq!(inputs["u16"].to_i64s().unwrap(), [7]);
    }

    #[test]
    fn the_seed_decides() {
        let entry = entry(&[DType::F32, DType::I8]);
        assert_eq!(random_inputs(&entry, 3).unwrap(), random_inputs(&entry, 3).unwrap());
        assert_ne!(random_inputs(&entry, 3).unwrap(), random_inputs(&entry, 4).unwrap());
    }
}
