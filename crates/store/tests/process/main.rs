//! Snapshots and the processes that hold or make them.
//!
//! A binary of their own: a child holds its parent's locks between its fork and its exec, and in one process
//! with the other tests it would hold theirs.

mod crash;
#[path = "../store/fixture.rs"]
#[expect(dead_code, reason = "shared with the tests that need more of it")]
mod fixture;
mod killed;
mod lease;
mod working_set;
