//! What the tests share: a fake Firecracker at its socket, bare-metal guests, fixtures.

pub mod dice;
pub mod fake;
pub mod fixture;
pub mod guest;
pub mod huge_pages;
pub mod invariant;
pub mod machine;
pub mod nft;
pub mod processes;
pub mod raw;
pub mod require;
pub mod serial;
pub mod steps;
pub mod story;
pub mod sys;
pub mod uffd;
