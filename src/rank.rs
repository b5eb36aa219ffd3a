//! Wiring of one rank and its exit code.
