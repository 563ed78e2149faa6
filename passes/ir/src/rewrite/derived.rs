//! Weights that are made from others while graphs are rewritten: each once, whichever graphs read it.

use std::collections::HashMap;
use std::hash::Hash;

use crate::ids::WeightId;
use crate::module::Weight;

/// The weights of a module, and those that were added: by what they were made from, and how.
#[derive(Debug)]
pub struct Derived<'a, How> {
    weights: &'a mut Vec<Weight>,
    known: HashMap<(WeightId, How), WeightId>,
}

impl<'a, How: Eq + Hash> Derived<'a, How> {
    pub fn new(weights: &'a mut Vec<Weight>) -> Self {
        Self { weights, known: HashMap::new() }
    }

    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.index()]
    }

    /// What `make` makes of a weight, added where it was not made like that before.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get<E>(
        &mut self,
        from: WeightId,
        how: How,
        make: impl FnOnce(&Weight) -> Result<Weight, E>,
    ) -> Result<WeightId, E> {
        let key = (from, how);
        if let Some(&known) = self.known.get(&key) {
            return Ok(known);
        }
        let made = make(self.weight(from))?;
        let id = WeightId(self.weights.len() as u32);
        self.weights.push(made);
        self.known.insert(key, id);
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::parse_lines;

    #[test]
    fn a_weight_is_made_once_in_each_way() {
        let text = "%v: f32[2] = weight [1, 2]\n%w: f32[2] = weight [3, 4]\n%y: f32[2] = pointwise %v, %w {$0 + $1}\nreturn %y";
        let mut weights = parse_lines(text).unwrap().weights;
        let mut derived = Derived::new(&mut weights);
        let mut made = Vec::new();
        let mut get = |from, how| {
            let make = |weight: &Weight| {
                made.push((from, how));
                Ok::<_, String>(weight.clone())
            };
            derived.get(WeightId(from), how, make).unwrap().0
        };
        assert_eq!([get(0, 'a'), get(1, 'a'), get(0, 'b'), get(0, 'a'), get(1, 'a')], [2, 3, 4, 2, 3]);
        assert_eq!(derived.get(WeightId(1), 'c', |_| Err("no")), Err("no"));
        assert_eq!((made, weights.len()), (vec![(0, 'a'), (1, 'a'), (0, 'b')], 5));
    }
}
