//! Linear interpolation in time as a matrix, with both ends kept (`align_corners=True` in PyTorch).

use tch::{Device, Tensor};

/// Decoder steps of a window of `window` samples: `window / rate × freq`, halves to even as Python's `round`.
/// 500 samples at 2 kHz and 50 steps per second: 12.5, so 12. At least one.
pub fn rollout_steps(window: i64, rate: f64, freq: f64) -> i64 {
    ((window as f64 / rate * freq).round_ties_even() as i64).max(1)
}

/// Interpolation from `inputs` to `outputs` points: for every output the lower input, the next one, and the weight of
/// the next. Positions are taken in f32, as PyTorch takes them.
fn positions(inputs: i64, outputs: i64) -> Vec<(i64, i64, f32)> {
    let scale = if outputs > 1 { (inputs - 1) as f32 / (outputs - 1) as f32 } else { 0.0 };
    let position = |output: i64| {
        let place = scale * output as f32;
        let lower = (place as i64).min(inputs - 1);
        (lower, (lower + 1).min(inputs - 1), place - lower as f32)
    };
    (0..outputs).map(position).collect()
}

/// Dense `[outputs, inputs]` f32: a product with it interpolates.
pub fn matrix(inputs: i64, outputs: i64, device: Device) -> Tensor {
    let mut dense = vec![0f32; (inputs * outputs) as usize];
    for (row, (lower, upper, weight)) in positions(inputs, outputs).into_iter().enumerate() {
        let row = row * inputs as usize;
        dense[row + lower as usize] += 1.0 - weight;
        dense[row + upper as usize] += weight;
    }
    Tensor::from_slice(&dense).view([outputs, inputs]).to_device(device)
}

/// Inputs that the interpolation reads, ascending `[N]` i64, and the matrix `[outputs, N]` f32 over them alone when
/// they are fewer than all inputs; else no list, and the matrix over all inputs.
pub fn sparse(inputs: i64, outputs: i64, device: Device) -> (Option<Tensor>, Tensor) {
    let mut read: Vec<i64> = positions(inputs, outputs).iter().flat_map(|&(lower, upper, _)| [lower, upper]).collect();
    read.sort_unstable();
    read.dedup();
    let all = matrix(inputs, outputs, device);
    if read.len() as i64 >= inputs {
        return (None, all);
    }
    let read = Tensor::from_slice(&read).to_device(device);
    let columns = all.index_select(1, &read);
    (Some(read), columns)
}
