//! The intermediate representation: modules, graphs, types, placements, text form and verifier.
//!
//! Nodes hold the primitives of `planfile`; types follow from `planfile::infer`, so there is one definition of what
//! is legal. Values are in SSA form, nodes in topological order.

pub mod error;
pub mod ids;
pub mod mesh;
pub mod module;
pub mod rewrite;
pub mod text;
pub mod verify;

pub use error::IrError;
pub use ids::{GraphId, NodeId, StateId, ValueId, WeightId};
pub use mesh::{Mesh, MeshAxis, Piece, Placement, Segment, Split, SubAxes};
pub use module::{
    Entry, Graph, MAX_ORIGIN_NAMES, Module, Node, Origin, Output, Port, Shard, State, Value, ValueDef, Weight,
    joined_origin, origin,
};
pub use rewrite::{Derived, Edit, Old, Rewrite};
