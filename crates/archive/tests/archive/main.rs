//! Trees packed and unpacked on real file systems.

mod fixture;
mod full;
mod hostile;
mod left_over;
mod places;
mod trees;
