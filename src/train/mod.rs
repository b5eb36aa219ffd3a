//! Step, ddp, optimizer, ema, schedule, checkpoint, loop.
