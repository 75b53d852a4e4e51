//! Runs commands on layered trees in namespaces.

pub mod probe;
