//! Parity with the installed package from equal weights. `tests/benches/reference/yolo.py` made the values.

mod curves;
mod golden;
mod parity;
mod training;
