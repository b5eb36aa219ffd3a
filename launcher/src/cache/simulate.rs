//! Traces through the directory.
