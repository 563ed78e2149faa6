//! What the fuzz targets share: forged plan files, mutations that keep the outer form whole, and a folder to work in.

pub mod forge;
pub mod messages;
pub mod mutation;
pub mod structure;
pub mod workplace;
