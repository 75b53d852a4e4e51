//! Bringing an environment to what the ledger says: start green, wait until it is healthy, switch, drain, keep blue warm.
//!
//! [`plan`] decides, over values; [`generation`] says what is started; [`health`] when to ask an instance how it is and what
//! its answers mean; [`state`] keeps what was decided; [`view`] is what is told. Nothing of these waits or talks to anybody:
//! `serve` does what the plan says, with [`target`], [`dial`] and `switch`.

pub mod dial;
pub mod generation;
pub mod health;
pub mod plan;
pub mod shim;
pub mod state;
pub mod switch;
pub mod target;
pub mod view;
