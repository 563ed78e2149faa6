//! Newtype indexes into the module's tables.

use std::fmt;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident $prefix:literal),* $(,)?) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
            pub struct $name(pub u32);

            impl $name {
                pub const fn index(self) -> usize {
                    self.0 as usize
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    write!(f, "{}{}", $prefix, self.0)
                }
            }
        )*
    };
}

ids! {
    /// A graph of the module.
    GraphId "@",
    /// A value of one graph.
    ValueId "%",
    /// A node of one graph.
    NodeId "n",
    /// A weight of the module.
    WeightId "w",
    /// A persistent state of the module.
    StateId "s",
}
