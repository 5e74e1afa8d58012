//! End-to-end tests of the `snaprestore` command and its libraries.
