//! Releases on their way: what an environment has, who may change it, and what must be so before.
//!
//! Pure: [`policy`] (what was applied), [`state`] (one environment, and the one function that changes it), [`decision`],
//! [`gate`] (questions as data) and [`promotion`] (what would happen).

pub mod decision;
pub mod gate;
pub mod policy;
pub mod promotion;
pub mod state;

#[cfg(test)]
mod sample;
