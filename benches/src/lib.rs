//! Criterion benches and the harness that compares lazy restore with the other ways to do it.
