//! The one integration binary: modules under `tests/it` start real `launch` and `rank` processes.

#[path = "it/architecture.rs"]
mod architecture;
#[path = "it/hostile.rs"]
mod hostile;
