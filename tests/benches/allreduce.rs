//! All-reduce over CPU ranks: processes that share a memfd, driven by lines on stdin so that a script can interleave
//! them with another library's.
//!
//! ```text
//! allreduce [ranks [MiB]]      then lines `reduce`, `staged` or `copy`; each answers with seconds, slowest rank
//! ```
//! `copy`: every rank copies a buffer of that size once, all at the same time: the yardstick.

use headroom::comm::{Collective, ShmCollective, shm::create_memfd};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

const IDENTITY: &str = "HEADROOM_BENCH_RANK";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    if let Ok(identity) = std::env::var(IDENTITY) {
        let numbers: std::result::Result<Vec<usize>, _> = identity.split(' ').map(str::parse).collect();
        return rank(&numbers?);
    }
    // cargo bench adds flags.
    let mut numbers = std::env::args().skip(1).filter_map(|arg| arg.parse::<usize>().ok());
    let (ranks, mib) = (numbers.next().unwrap_or(3), numbers.next().unwrap_or(25));
    parent(ranks, mib)
}

/// Starts the ranks, passes each line on to all, and prints the slowest answer.
fn parent(ranks: usize, mib: usize) -> Result<()> {
    let fd = create_memfd(false)?;
    let spawn = |rank| {
        Command::new(std::env::current_exe()?)
            .env(IDENTITY, format!("{rank} {ranks} {} {mib}", fd.as_raw_fd()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
    };
    let mut children = (0..ranks).map(spawn).collect::<std::io::Result<Vec<Child>>>()?;
    let mut answers: Vec<_> = children.iter_mut().filter_map(|c| c.stdout.take()).map(BufReader::new).collect();
    let mut ask = |line: &str| -> Result<f64> {
        for child in &mut children {
            writeln!(child.stdin.as_mut().ok_or("no pipe")?, "{line}")?;
        }
        let mut slowest = 0.0_f64;
        for answer in &mut answers {
            let mut text = String::new();
            answer.read_line(&mut text)?;
            slowest = slowest.max(text.trim().parse().map_err(|e| format!("a rank answered {text:?}: {e}"))?);
        }
        Ok(slowest)
    };
    let mut asked = false;
    for line in std::io::stdin().lock().lines() {
        asked = true;
        println!("{}", ask(&line?)?);
    }
    if !asked {
        for what in ["copy", "reduce", "staged"] {
            let times: Result<Vec<f64>> = (0..9).map(|_| ask(what)).collect();
            let mut times = times?;
            times.sort_by(f64::total_cmp);
            println!("{what:8} {:7.2} ms", times[4] * 1e3);
        }
    }
    drop(answers);
    for mut child in children {
        drop(child.stdin.take());
        child.wait()?;
    }
    Ok(())
}

fn rank(numbers: &[usize]) -> Result<()> {
    let [rank, world, fd, mib] = numbers else {
        return Err(format!("{IDENTITY} needs four numbers").into());
    };
    // SAFETY: the parent left this descriptor open for us, and nobody else here uses it.
    #[allow(unsafe_code)]
    let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(*fd)?) };
    let comm = ShmCollective::new(fd, *rank, *world, Duration::from_secs(60))?;
    tch::set_num_threads(1);
    let len = mib << 18;
    let flat = comm.flat_buffer(len)?;
    let staged = Tensor::f_zeros([len as i64], (Kind::Float, Device::Cpu))?;
    let (from, mut to) = (staged.f_ones_like()?, staged.f_ones_like()?);
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        // Warm in every case: the last write to the buffers is old, as after a backward pass.
        let _ = flat.shallow_clone().f_fill_((*rank + 1) as f64)?;
        let _ = staged.shallow_clone().f_fill_((*rank + 1) as f64)?;
        comm.barrier()?;
        let start = Instant::now();
        match line.as_str() {
            "reduce" => comm.all_reduce_sum(&flat)?,
            "staged" => comm.all_reduce_sum(&staged)?,
            "copy" => to.f_copy_(&from)?,
            other => return Err(format!("{other:?}: expected reduce, staged or copy").into()),
        }
        let seconds = start.elapsed().as_secs_f64();
        let right = (world * (world + 1) / 2) as f64;
        for (name, tensor) in [("reduce", &flat), ("staged", &staged)] {
            let last = tensor.f_double_value(&[len as i64 - 1])?;
            if line == name && last != right {
                return Err(format!("{name} gave {last}, not {right}").into());
            }
        }
        println!("{seconds}");
    }
    Ok(())
}
