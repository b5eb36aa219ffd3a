//! The one integration binary: modules under `tests/it` start real `launch` and `rank` processes.

#[path = "it/architecture.rs"]
mod architecture;
#[path = "it/equal.rs"]
mod equal;
#[path = "it/resume.rs"]
mod resume;
#[path = "it/support.rs"]
mod support;
