//! Sizes of the EMG model (TDS-LSTM) by formula: parameters, activations and the heap they need.
//!
//! With `F = channels × feature_width` of a stage and `C` the features before it:
//!
//! ```text
//! stage    C·F·k_in  (Conv1d without bias)  +  2F  (LayerNorm)  +  num_blocks × block
//! block    c·c·k + c  (Conv2d c→c, kernel (1,k))  +  2F  +  2(F·F + F)  (Linear-ReLU-Linear)  +  2F
//! LSTM     4H·(in + H) + 8H  per layer (two bias vectors), in = F_last + 20 (pose fed back), then H
//! MLP      in·h + h  per hidden layer
//! output   H·20 + 20
//! ```
//! It gives 282,996 for `default`, 1,504,836 for `high_performance` and 29,512 for `quick_demo`.

use super::constants::*;
use super::table::bytes_text;
use super::task::{SampleSizes, TaskSizes, product, sum};
use crate::config::{Config, DecoderType, LossType, ModelConfig, TdsStage};
use crate::contract::{CacheMode, DatasetFacts};

/// Everything the planner asks of this task; absent: a product overflows.
pub(super) fn sizes(config: &Config, dataset: &DatasetFacts) -> Option<TaskSizes> {
    let window = config.data.window_size as u64;
    let field = |columns: usize| product(&[window, columns as u64, F32_BYTES]);
    // EMG `[T, 16]`, joint angles `[T, 20]`.
    let fields = vec![field(config.data.emg_channels)?, field(config.data.joint_angles_channels)?];
    let loss_terms = if config.train.loss_type == LossType::MseMae { 2 } else { 1 };
    let activation_scalars = activation_scalars(&config.model, window)?;
    let heap_scalars = heap_scalars(&config.model, window, loss_terms)?;
    let sample_bytes = sum(&fields)?;
    let sample = SampleSizes { fields, activation_scalars, heap_scalars, device_scalars: heap_scalars };
    let parameters = parameters(&config.model)?;
    let (numerator, denominator) = WEIGHT_COPIES;
    Some(TaskSizes {
        parameters,
        step_scalars: parameters.checked_mul(numerator)? / denominator,
        heap_factors: [HEAP_FACTOR; 2],
        device_factor: DEVICE_FACTOR,
        train: sample.clone(),
        val: sample,
        library_bytes: LIBRARY_BYTES,
        // Chunks; where the cache is short of room windows, or parts of them in two chunks.
        entry_bytes: [ENTRY_BYTES / 2, (sample_bytes / 2).min(ENTRY_BYTES / 2)],
        scratch_bytes: DECODE_SCRATCH_BYTES,
        useful_bytes: dataset.bytes.saturating_mul(DECODED_OVER_DISK),
        useful: format!("{} data set × {DECODED_OVER_DISK}", bytes_text(dataset.bytes)),
        useful_is_exact: false,
        // One chunk of a session serves many windows, so the one that looks ahead.
        auto_policy: CacheMode::NextUse,
        facts: Vec::new(),
    })
}

/// Scalars of the model; absent: the product overflows.
pub fn parameters(model: &ModelConfig) -> Option<u64> {
    let mut total = 0u64;
    let mut features = model.input_size as u64;
    for stage in &model.tds_stages {
        total = total.checked_add(stage_parameters(stage, features)?)?;
        features = width(stage)?;
    }
    let pose = if model.decoder_state_condition { model.output_size as u64 } else { 0 };
    let (decoder, hidden) = decoder_parameters(model, features.checked_add(pose)?)?;
    total.checked_add(decoder)?.checked_add(linear(hidden, model.output_size as u64)?)
}

fn stage_parameters(stage: &TdsStage, input: u64) -> Option<u64> {
    let (features, channels) = (width(stage)?, stage.channels as u64);
    let norm = features.checked_mul(2)?;
    let conv_in = product(&[input, features, stage.in_conv_kernel as u64])?;
    let conv = product(&[channels, channels, stage.kernel_width as u64])?.checked_add(channels)?;
    let dense = linear(features, features)?.checked_mul(2)?;
    let block = sum(&[conv, norm, dense, norm])?;
    sum(&[conv_in, norm, block.checked_mul(stage.num_blocks as u64)?])
}

/// Scalars of the decoder without its output layer, and the width that it hands to that layer.
fn decoder_parameters(model: &ModelConfig, input: u64) -> Option<(u64, u64)> {
    let mut total = 0u64;
    let mut input = input;
    match model.decoder_type {
        DecoderType::Lstm => {
            let hidden = model.decoder_hidden_size as u64;
            // Beyond the first, layers are alike: no loop over a config's number.
            let layer = |input: u64| sum(&[product(&[4, hidden, input.checked_add(hidden)?])?, product(&[8, hidden])?]);
            let further = (model.decoder_num_layers as u64).saturating_sub(1);
            total = layer(input)?.checked_add(layer(hidden)?.checked_mul(further)?)?;
            input = hidden;
        }
        DecoderType::Mlp => {
            for hidden in model.decoder_mlp_hidden.iter().map(|h| *h as u64) {
                total = total.checked_add(linear(input, hidden)?)?;
                input = hidden;
            }
        }
    }
    Some((total, input))
}

/// Elements at a stage's entry, of one of its layers' outputs, and the number of its blocks.
struct StageShape {
    input: u64,
    output: u64,
    blocks: u64,
}

/// Of all stages, for one window of `window` rows.
fn stage_shapes(model: &ModelConfig, window: u64) -> Option<Vec<StageShape>> {
    let (mut rows, mut features) = (window, model.input_size as u64);
    let shape = |stage: &TdsStage| {
        let input = rows.checked_mul(features)?;
        features = width(stage)?;
        // Padded by k/2 on both sides: an even kernel gains a row before the stride.
        let even = u64::from(stage.in_conv_kernel.is_multiple_of(2));
        rows = rows.checked_add(even)?.saturating_sub(1) / (stage.in_conv_stride as u64).max(1) + 1;
        Some(StageShape { input, output: rows.checked_mul(features)?, blocks: stage.num_blocks as u64 })
    };
    model.tds_stages.iter().map(shape).collect()
}

/// Scalars that the tensors of a step hold at once at their peak, for one window of `window` rows: while the backward pass is in
/// the first layers. Tenths per element, fitted to what libtorch's allocator counts over six shapes of encoders and three of
/// decoders, and 5 % more: 27 of a stage's entry, 19 of its output, 88 of each block's, 57 of the prediction; and what the
/// decoder keeps.
pub fn activation_scalars(model: &ModelConfig, window: u64) -> Option<u64> {
    let mut tenths = product(&[57, window, model.output_size as u64])?;
    for shape in stage_shapes(model, window)? {
        let parts =
            [product(&[27, shape.input])?, product(&[19, shape.output])?, product(&[88, shape.output, shape.blocks])?];
        tenths = tenths.checked_add(sum(&parts)?)?;
    }
    (tenths / 10).checked_add(rollout_steps(model, window).checked_mul(decoder_scalars(model)?)?)
}

/// Scalars of one window that a step's heap has to place, those that die on the way too: what autograd keeps for backward, and
/// around the loss what backward adds (prediction, differences, squares or magnitudes, masks, their gradients, sums of
/// metrics: 4 per output value and 6 for each of the `loss_terms`, measured). Per element of a layer's output: 6 tensors in
/// a stage's entry (two layouts, conv, norm, ReLU, dropout), 10 in a block (conv, ReLU, residual, norm, two linears with
/// ReLU, residual, norm, one layout), and what the decoder makes.
fn heap_scalars(model: &ModelConfig, window: u64, loss_terms: u64) -> Option<u64> {
    let mut total = product(&[2, window, model.input_size as u64])?;
    let shapes = stage_shapes(model, window)?;
    for shape in &shapes {
        let parts = [product(&[6, shape.output])?, product(&[10, shape.output, shape.blocks])?];
        total = total.checked_add(sum(&parts)?)?;
    }
    let features = model.tds_stages.last().map_or(Some(model.input_size as u64), width)?;
    let per_step = sum(&[decoder_scalars(model)?, features, product(&[4, model.output_size as u64])?])?;
    sum(&[
        total,
        rollout_steps(model, window).checked_mul(per_step)?,
        product(&[loss_terms.checked_mul(6)?.checked_add(4)?, window, model.output_size as u64])?,
    ])
}

/// Of one decoder step: 8 per LSTM unit (4 gates, cell, its tanh, hidden, a copy), or 3 per unit of an MLP.
fn decoder_scalars(model: &ModelConfig) -> Option<u64> {
    match model.decoder_type {
        DecoderType::Lstm => product(&[8, model.decoder_hidden_size as u64, model.decoder_num_layers as u64]),
        DecoderType::Mlp => model.decoder_mlp_hidden.iter().try_fold(0u64, |n, h| n.checked_add(*h as u64 * 3)),
    }
}

/// Decoder steps of a window: its duration times the rollout frequency, half to even, at least 1.
fn rollout_steps(model: &ModelConfig, window: u64) -> u64 {
    let steps = (window as f64 / model.original_sampling_rate * model.rollout_freq).round_ties_even();
    // A cast saturates and turns NaN into 0; the config's own checks name such values.
    (steps as u64).clamp(1, window.max(1))
}

fn width(stage: &TdsStage) -> Option<u64> {
    product(&[stage.channels as u64, stage.feature_width as u64])
}

/// Linear layer with bias.
fn linear(input: u64, output: u64) -> Option<u64> {
    input.checked_mul(output)?.checked_add(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(shape: [usize; 6]) -> TdsStage {
        let [in_conv_kernel, in_conv_stride, num_blocks, channels, feature_width, kernel_width] = shape;
        TdsStage { in_conv_kernel, in_conv_stride, num_blocks, channels, feature_width, kernel_width }
    }

    fn sized(stages: &[[usize; 6]], hidden: usize, layers: usize) -> ModelConfig {
        ModelConfig {
            tds_stages: stages.iter().map(|shape| stage(*shape)).collect(),
            decoder_hidden_size: hidden,
            decoder_num_layers: layers,
            ..ModelConfig::default()
        }
    }

    #[test]
    fn parameters_of_the_guides_three_sizes() {
        assert_eq!(parameters(&ModelConfig::default()), Some(282_996));
        let high = sized(&[[7, 2, 2, 8, 8, 21], [5, 2, 2, 8, 8, 11], [3, 2, 2, 8, 8, 7]], 256, 3);
        assert_eq!(parameters(&high), Some(1_504_836));
        assert_eq!(parameters(&sized(&[[5, 4, 1, 4, 4, 11]], 64, 1)), Some(29_512));
    }

    #[test]
    fn mlp_decoder_by_hand() {
        let mlp = ModelConfig { decoder_type: DecoderType::Mlp, ..ModelConfig::default() };
        // Encoder 38,752; 84→256→128→20.
        let by_hand = 38_752 + (84 * 256 + 256) + (256 * 128 + 128) + (128 * 20 + 20);
        assert_eq!(parameters(&mlp), Some(by_hand));
        let free = ModelConfig { decoder_state_condition: false, ..mlp };
        assert_eq!(parameters(&free), Some(by_hand - 20 * 256));
    }

    #[test]
    fn absurd_sizes_overflow_to_none() {
        assert_eq!(parameters(&sized(&[[5, 4, 1, usize::MAX, 2, 11]], 64, 1)), None);
        assert_eq!(parameters(&sized(&[], usize::MAX / 2, 1)), None);
        assert_eq!(activation_scalars(&ModelConfig::default(), u64::MAX), None);
    }

    #[test]
    fn rollout_rounds_half_to_even() {
        assert_eq!(rollout_steps(&ModelConfig::default(), 500), 12);
        assert_eq!(rollout_steps(&ModelConfig::default(), 1000), 25);
        assert_eq!(rollout_steps(&ModelConfig::default(), 1), 1);
    }
}
