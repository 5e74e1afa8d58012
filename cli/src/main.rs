//! The `snaprestore` command.

fn main() {}
