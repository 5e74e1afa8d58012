//! The snaprestore file format.
