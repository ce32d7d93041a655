//! Snapshots as their users see them: made, broken, chained and removed.

mod cache;
mod chain;
mod collect;
mod damage;
mod disk;
mod fixture;
mod packed;
mod publish;
mod remove;
mod small_disk;
mod strangers;
mod travel;
mod working_set;
