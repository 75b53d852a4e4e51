//! The other targets for real: a Docker daemon of the test's own. (A guest of the appliance is in tests/machines.rs.)
