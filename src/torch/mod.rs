//! The C++ shim: what tch lacks.
