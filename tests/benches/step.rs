//! Forward + backward of the EMG model, one line of JSON per run, in the form of `reference/emg_torch.py`:
//! `step --config default --batch 32 --window 500 --steps 10 --threads 1`.

use headroom::task::{Batch, Metrics, Model, emg};
use spec::task::emg::{EmgLoss, EmgModel, TdsStage};
use std::time::Instant;
use tch::{Device, Kind, Tensor, nn};

fn stage(in_conv_kernel: usize, in_conv_stride: usize, num_blocks: usize, size: [usize; 3]) -> TdsStage {
    let [channels, feature_width, kernel_width] = size;
    TdsStage { in_conv_kernel, in_conv_stride, num_blocks, channels, feature_width, kernel_width }
}

fn config(name: &str) -> EmgModel {
    let (tds_stages, decoder_hidden_size, decoder_num_layers) = match name {
        "high_performance" => {
            (vec![stage(7, 2, 2, [8, 8, 21]), stage(5, 2, 2, [8, 8, 11]), stage(3, 2, 2, [8, 8, 7])], 256, 3)
        }
        "quick_demo" => (vec![stage(5, 4, 1, [4, 4, 11])], 64, 1),
        _ => return EmgModel::default(),
    };
    EmgModel { tds_stages, decoder_hidden_size, decoder_num_layers, ..EmgModel::default() }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str, default: &str| -> String {
        let at = args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
        at.cloned().unwrap_or_else(|| default.to_owned())
    };
    let number = |name: &str, default: &str| value(name, default).parse::<i64>().expect("a number");
    let (name, size, window) = (value("--config", "default"), number("--batch", "32"), number("--window", "500"));
    let steps = number("--steps", "10") as usize;
    tch::set_num_threads(number("--threads", "1") as i32);
    tch::manual_seed(0);
    let vs = nn::VarStore::new(Device::Cpu);
    let net = emg::EmgNet::new(
        &config(&name),
        emg::loss::Loss { kind: EmgLoss::MseMae, mae_weight: 0.5 },
        window as usize,
        &vs.root(),
    );
    let emg = Tensor::randn([size, window, 16], (Kind::Float, Device::Cpu));
    let target = Tensor::randn([size, window, 20], (Kind::Float, Device::Cpu)) * 0.3;
    let batch = Batch::new(vec![emg, target], (0..size as u64).collect());
    let mut metrics = emg::EmgMetrics::new(20, 2000.0, None);
    let (mut forward, mut backward, mut measure) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..steps + 3 {
        for mut parameter in vs.trainable_variables() {
            parameter.zero_grad();
        }
        let start = Instant::now();
        let output = net.forward(&batch, true);
        forward.push(start.elapsed().as_secs_f64());
        output.loss.backward();
        backward.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        metrics.update(&batch, &output);
        measure.push(start.elapsed().as_secs_f64());
    }
    let [forward, total, measure] = [forward, backward, measure].map(|times| median(times[3..].to_vec()) * 1e3);
    let parameters: usize = vs.trainable_variables().iter().map(Tensor::numel).sum();
    println!(
        r#"{{"config": "{name}", "batch": {size}, "parameters": {parameters}, "forward_ms": {forward:.3}, "ms": {total:.3}, "metrics_ms": {measure:.3}, "samples_per_s": {:.1}}}"#,
        size as f64 / total * 1e3
    );
}
