//! Step, ddp, optimizer, ema, schedule, checkpoint, loop.

pub mod ddp;
pub mod optimizer;
