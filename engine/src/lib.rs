//! Restores memory lazily from snaprestore snapshots.
