//! Behaviour common to every collective.

use super::conformance::check;
use super::{ShmCollective, Solo, shm::create_memfd};
use std::time::Duration;
use tch::Device;

#[test]
fn a_world_of_one_keeps_the_contract() {
    check(&Solo::new(Device::Cpu), Device::Cpu).unwrap();
}

#[test]
fn shared_memory_keeps_the_contract() {
    let fd = create_memfd(true).unwrap();
    std::thread::scope(|scope| {
        for rank in 0..3 {
            let fd = fd.try_clone().unwrap();
            scope.spawn(move || {
                let comm = ShmCollective::new(fd, rank, 3, Duration::from_secs(60)).unwrap();
                check(&comm, Device::Cpu).unwrap();
            });
        }
    });
}
