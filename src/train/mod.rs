//! Step, ddp, optimizer, ema, schedule, checkpoint, loop.

pub mod checkpoint;
