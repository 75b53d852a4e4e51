//! Release: what was tested is promoted through environments, and every decision is kept.

pub mod ledger;
pub mod sshsig;
