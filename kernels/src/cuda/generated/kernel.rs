//! The kernel while it is written: its text, its index variables, and the values that are at hand.

use std::collections::BTreeMap;
use std::fmt::Write;

use planfile::{DType, RankScalar, Spec, TensorType};

use super::affine::{Affine, Spread};
use super::literal::{element, value};

/// A value at one position, or at one for each lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Operand {
    pub(super) name: String,
    /// The same for all lanes: not an array.
    pub(super) uniform: bool,
}

impl Operand {
    pub(super) fn uniform(name: String) -> Self {
        Self { name, uniform: true }
    }

    /// In a loop over the lanes.
    pub(super) fn lane(&self) -> String {
        if self.uniform { self.name.clone() } else { format!("{}[j]", self.name) }
    }
}

/// A variable that positions are digits of.
#[derive(Clone, Debug)]
struct Base {
    name: String,
    /// It is below.
    extent: u64,
}

/// Number of the base that is the flat index of the result's element, of the first lane.
pub(super) const ELEMENT: usize = 0;

/// Text beyond which a specification is no kernel.
const TEXT_MAX: usize = 1 << 19;

pub(super) struct Kernel<'a> {
    pub(super) spec: &'a Spec,
    /// Types of all values.
    pub(super) types: Vec<TensorType>,
    /// Node and position among its results, of values that are no inputs.
    pub(super) producers: Vec<Option<(usize, usize)>>,
    pub(super) text: String,
    indent: usize,
    names: usize,
    bases: Vec<Base>,
    /// The base that lanes count up, while there are several.
    lane_base: usize,
    /// Elements that this code computes at once: consecutive positions of the result, the first a multiple.
    pub(super) lanes: u64,
    at_hand: Vec<BTreeMap<(u32, Vec<Affine>), Operand>>,
    /// What is passed besides tensors, whether or not it is used.
    pub(super) scalars: Vec<RankScalar>,
    /// How often the code that is being written runs, over all elements.
    pub(super) runs: u64,
    /// How often each value is computed.
    pub(super) evaluations: Vec<u64>,
    /// Whether indices need 64 bits.
    wide: bool,
}

impl<'a> Kernel<'a> {
    /// `count`: elements of the result.
    pub(super) fn new(spec: &'a Spec, types: Vec<TensorType>, count: u64, lanes: u64, wide: bool) -> Option<Self> {
        let mut producers: Vec<Option<(usize, usize)>> = vec![None; spec.inputs.len()];
        for (position, node) in spec.nodes.iter().enumerate() {
            let operands: Vec<&TensorType> =
                node.operands.iter().map(|&operand| types.get(operand as usize)).collect::<Option<_>>()?;
            let results = planfile::infer(&node.op, &operands).ok()?.len();
            producers.extend((0..results).map(|result| Some((position, result))));
        }
        Some(Self {
            spec,
            evaluations: vec![0; types.len()],
            types,
            producers,
            text: String::new(),
            indent: 1,
            names: 0,
            bases: vec![Base { name: "i".to_owned(), extent: count }],
            lane_base: ELEMENT,
            lanes,
            at_hand: vec![BTreeMap::new()],
            scalars: spec.rank_scalars(),
            runs: count,
            wide,
        })
    }

    pub(super) fn ty(&self, number: u32) -> &TensorType {
        &self.types[number as usize]
    }

    pub(super) fn sizes(&self, number: u32) -> Vec<u64> {
        self.ty(number).sizes()
    }

    pub(super) fn dtype(&self, number: u32) -> DType {
        self.ty(number).dtype
    }

    // ---- Text --------------------------------------------------------------------------------------------------

    pub(super) fn line(&mut self, line: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{:width$}{line}", "", width = 4 * self.indent);
    }

    pub(super) fn fresh(&mut self, letter: char) -> String {
        self.names += 1;
        format!("{letter}{}", self.names)
    }

    /// `head {`, what `body` writes, `}`. Values that the body computes are not at hand after it.
    pub(super) fn block<R>(&mut self, head: &str, body: impl FnOnce(&mut Self) -> Option<R>) -> Option<R> {
        if self.text.len() > TEXT_MAX {
            return None;
        }
        self.line(&format!("{head} {{"));
        self.indent += 1;
        self.at_hand.push(BTreeMap::new());
        let result = body(self);
        self.at_hand.pop();
        self.indent -= 1;
        self.line("}");
        result
    }

    /// As [`Self::block`] for code that runs `part` of `whole` times as often.
    pub(super) fn branch<R>(
        &mut self,
        head: &str,
        (part, whole): (u64, u64),
        body: impl FnOnce(&mut Self) -> Option<R>,
    ) -> Option<R> {
        let runs = self.runs;
        let share = u128::from(runs) * u128::from(part) / u128::from(whole.max(1));
        self.runs = u64::try_from(share).unwrap_or(u64::MAX);
        let result = self.block(head, body);
        self.runs = runs;
        result
    }

    /// A loop of `count` rounds with a new base that counts them.
    pub(super) fn each(&mut self, count: u64, body: impl FnOnce(&mut Self, usize) -> Option<()>) -> Option<()> {
        let name = self.fresh('r');
        let base = self.add_base(name.clone(), count);
        let head = format!("for (Index {name} = 0; {name} < {}; ++{name})", self.number(count));
        self.branch(&head, (count, 1), |kernel| body(kernel, base))
    }

    /// Code for each lane, in a loop where there are several.
    pub(super) fn each_lane(&mut self, body: impl FnOnce(&mut Self) -> Option<()>) -> Option<()> {
        if self.lanes == 1 {
            return body(self);
        }
        self.line("#pragma unroll");
        self.block(&format!("for (u32 j = 0; j < {}; ++j)", self.lanes), body)
    }

    /// Declares a variable, an array where lanes differ.
    pub(super) fn declare(&mut self, letter: char, ty: &str, uniform: bool) -> Operand {
        let (name, uniform) = (self.fresh(letter), uniform || self.lanes == 1);
        if uniform {
            self.line(&format!("{ty} {name};"));
        } else {
            self.line(&format!("{ty} {name}[{}];", self.lanes));
        }
        Operand { name, uniform }
    }

    pub(super) fn assign(&mut self, to: &Operand, from: &Operand) -> Option<()> {
        if to.uniform {
            self.line(&format!("{} = {};", to.name, from.name));
            return Some(());
        }
        self.each_lane(|kernel| {
            kernel.line(&format!("{} = {};", to.lane(), from.lane()));
            Some(())
        })
    }

    // ---- Positions ---------------------------------------------------------------------------------------------

    pub(super) fn add_base(&mut self, name: String, extent: u64) -> usize {
        self.bases.push(Base { name, extent });
        self.bases.len() - 1
    }

    /// A position that a variable holds.
    pub(super) fn variable(&mut self, name: String, extent: u64) -> Affine {
        Affine::digit(self.add_base(name, extent), 1, extent)
    }

    pub(super) fn number(&self, number: u64) -> String {
        format!("{number}{}", if self.wide { "ull" } else { "u" })
    }

    /// The position as an expression, of the first lane; arithmetic modulo two to the bits of an index.
    pub(super) fn position(&self, affine: &Affine) -> String {
        let mut text = String::new();
        for term in &affine.terms {
            let base = &self.bases[term.base];
            let mut digit = base.name.clone();
            if term.divide > 1 {
                digit = format!("{digit} / {}", self.number(term.divide));
            }
            if term.divide.saturating_mul(term.size) < base.extent {
                digit = format!("{digit} % {}", self.number(term.size));
            }
            self.add(&mut text, term.times, &digit);
        }
        for &(factor, scalar) in &affine.scalars {
            self.add(&mut text, factor, &format!("static_cast<Index>(s{scalar})"));
        }
        if affine.constant != 0 || text.is_empty() {
            let sign = if affine.constant < 0 { "-" } else { "+" };
            let magnitude = self.number(affine.constant.unsigned_abs());
            text = match (text.is_empty(), sign) {
                (true, "+") => magnitude,
                (true, _) => format!("0 - {magnitude}"),
                _ => format!("{text} {sign} {magnitude}"),
            };
        }
        text
    }

    fn add(&self, text: &mut String, factor: i64, what: &str) {
        let what = match factor.unsigned_abs() {
            1 => what.to_owned(),
            factor if what.contains(' ') => format!("({what}) * {}", self.number(factor)),
            factor => format!("{what} * {}", self.number(factor)),
        };
        match (text.is_empty(), factor < 0) {
            (true, false) => text.push_str(&what),
            (true, true) => *text = format!("0 - {what}"),
            (false, false) => *text = format!("{text} + {what}"),
            (false, true) => *text = format!("{text} - {what}"),
        }
    }

    pub(super) fn spread(&self, affine: &Affine) -> Spread {
        if self.lanes == 1 { Spread::Uniform } else { affine.spread(self.lane_base, self.lanes) }
    }

    /// Whether all lanes lie on one side of a multiple of `bound`.
    pub(super) fn agree_below(&self, affine: &Affine, bound: u64) -> bool {
        match self.spread(affine) {
            Spread::Uniform => true,
            Spread::Step { by, aligned } => by == 1 && aligned == self.lanes && bound.is_multiple_of(self.lanes),
            Spread::Irregular => false,
        }
    }

    /// The position in a variable of its own, below `extent`. Uniform positions only.
    pub(super) fn hold(&mut self, affine: &Affine, extent: u64) -> Affine {
        let (name, text) = (self.fresh('p'), self.position(affine));
        self.line(&format!("const Index {name} = {text};"));
        self.variable(name, extent)
    }

    /// In a loop over the lanes: positions of the lane instead of the first one's.
    pub(super) fn of_lane(&mut self, index: &[Affine]) -> Vec<Affine> {
        if self.lanes == 1 {
            return index.to_vec();
        }
        let (from, name) = (self.lane_base, self.fresh('i'));
        let Base { name: first, extent } = self.bases[from].clone();
        self.line(&format!("const Index {name} = {first} + j;"));
        let to = self.add_base(name, extent);
        index.iter().map(|affine| affine.rebased(from, to)).collect()
    }

    // ---- Values ------------------------------------------------------------------------------------------------

    /// The value at the index, in the type it is computed in.
    pub(super) fn value(&mut self, number: u32, index: Vec<Affine>) -> Option<Operand> {
        let key = (number, index);
        if let Some(found) = self.at_hand.iter().rev().find_map(|scope| scope.get(&key)) {
            return Some(found.clone());
        }
        if self.text.len() > TEXT_MAX {
            return None;
        }
        let computed = &mut self.evaluations[number as usize];
        *computed = computed.saturating_add(self.runs);
        let operand = match self.producers[number as usize] {
            None => self.load(number, &key.1)?,
            Some((node, result)) => self.node(node, result, &key.1)?,
        };
        self.remember(number, key.1, &operand);
        Some(operand)
    }

    pub(super) fn remember(&mut self, number: u32, index: Vec<Affine>, operand: &Operand) {
        if let Some(scope) = self.at_hand.last_mut() {
            scope.insert((number, index), operand.clone());
        }
    }

    /// Computes a value lane by lane.
    pub(super) fn by_lane(&mut self, number: u32, index: &[Affine]) -> Option<Operand> {
        let result = self.declare('v', value(self.dtype(number)), false);
        // What is computed once for each lane is counted once for each already.
        let counted = self.evaluations[number as usize];
        self.each_lane(|kernel| {
            let own = kernel.of_lane(index);
            let lanes = std::mem::replace(&mut kernel.lanes, 1);
            let operand = kernel.value(number, own);
            kernel.lanes = lanes;
            kernel.line(&format!("{}[j] = {};", result.name, operand?.name));
            Some(())
        })?;
        self.evaluations[number as usize] = counted;
        Some(result)
    }

    /// Reads an input: by the widest instruction that alignment permits.
    fn load(&mut self, number: u32, index: &[Affine]) -> Option<Operand> {
        let (dtype, sizes) = (self.dtype(number), self.sizes(number));
        let (ty, held) = (element(dtype), value(dtype));
        let flat = Affine::flat(index, &sizes);
        let text = self.position(&flat);
        match self.spread(&flat) {
            Spread::Uniform => {
                let name = self.fresh('v');
                self.line(&format!("const {held} {name} = widen(x{number}[{text}]);"));
                Some(Operand::uniform(name))
            }
            Spread::Step { by: 1, aligned } if aligned > 1 => {
                let (pack, result) = (self.fresh('k'), self.declare('v', held, false));
                let whole = format!("Pack<{ty}, {aligned}>");
                if aligned == self.lanes {
                    self.line(&format!(
                        "const {whole} {pack} = *reinterpret_cast<const {whole}*>(x{number} + ({text}));"
                    ));
                    self.each_lane(|kernel| {
                        kernel.line(&format!("{}[j] = widen({pack}.at[j]);", result.name));
                        Some(())
                    })?;
                } else {
                    let packs = self.lanes / aligned;
                    self.line(&format!(
                        "const {whole}* {pack} = reinterpret_cast<const {whole}*>(x{number} + ({text}));"
                    ));
                    self.line("#pragma unroll");
                    self.block(&format!("for (u32 k = 0; k < {packs}; ++k)"), |kernel| {
                        kernel.line(&format!("const {whole} part = {pack}[k];"));
                        kernel.line("#pragma unroll");
                        kernel.block(&format!("for (u32 j = 0; j < {aligned}; ++j)"), |kernel| {
                            kernel.line(&format!("{}[k * {aligned} + j] = widen(part.at[j]);", result.name));
                            Some(())
                        })
                    })?;
                }
                Some(result)
            }
            Spread::Step { by, .. } => {
                let (first, result) = (self.fresh('p'), self.declare('v', held, false));
                self.line(&format!("const Index {first} = {text};"));
                let step = self.position(&Affine::constant(by));
                self.each_lane(|kernel| {
                    kernel.line(&format!("{}[j] = widen(x{number}[{first} + j * ({step})]);", result.name));
                    Some(())
                })?;
                Some(result)
            }
            Spread::Irregular => {
                let result = self.declare('v', held, false);
                self.each_lane(|kernel| {
                    let own = kernel.of_lane(std::slice::from_ref(&flat));
                    let text = own.first().map(|own| kernel.position(own))?;
                    kernel.line(&format!("{}[j] = widen(x{number}[{text}]);", result.name));
                    Some(())
                })?;
                Some(result)
            }
        }
    }
}
