//! Children, process groups, signals, first failure.
