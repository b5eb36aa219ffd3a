//! Sampler, loader threads, batch slots.
