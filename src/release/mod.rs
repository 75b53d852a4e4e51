//! Releases on their way: what is promoted through environments, who may decide it, and how it is kept.
//!
//! ```text
//! make        what was built → release index, bills of materials, provenance, signatures
//! desk        ledger → plan (pure) → append; again when somebody else was faster
//! audit       every commit replayed with the functions that decide
//! mirror      registry tags that follow what is current
//! ```
//! Pure: [`policy`] (what was applied), [`state`] (one environment, and the one function that changes it), [`decision`],
//! [`gate`] (questions as data), [`claims`] (what pipelines may not both have), [`promotion`] (what would happen) and [`message`].
//! [`ledger`] knows Git and nothing of states; [`evidence`] looks at the store and the world for the gates, [`change`] compares two
//! releases in it.

pub mod audit;
pub mod change;
pub mod claims;
pub mod decision;
pub mod desk;
pub mod evidence;
pub mod gate;
pub mod junit;
pub mod ledger;
pub mod make;
pub mod message;
pub mod mirror;
pub mod policy;
pub mod promotion;
pub mod sshsig;
pub mod state;

#[cfg(test)]
mod sample;
