//! EMG of the forearm → joint angles of the hand.

pub mod data;
pub mod sample;
