//! Groups of parameters: weights, which decay; factors and shifts of normalisation; biases.

use crate::task::{GroupSpec, ParamInfo};
use spec::config::{Config, OptimizerKind};
use spec::task::yolo::YoloConfig;

/// The three groups in the package's order, `lr/pg0` to `lr/pg2` of results.csv.
///
/// `train.weight_decay` is meant for steps of `yolo.nbs` images: it grows and shrinks with `global_batch`.
pub fn groups(config: &Config, parameters: &[ParamInfo], global_batch: u64) -> Vec<GroupSpec> {
    let yolo: YoloConfig = config.section();
    let mut members: [Vec<String>; 3] = Default::default();
    for parameter in parameters {
        let name = parameter.name.as_str();
        let group = if name.ends_with(".bias") {
            2
        } else if name.contains(".bn.") {
            1
        } else {
            0
        };
        members[group].push(parameter.name.clone());
    }
    let nominal = if yolo.nbs == 0 { global_batch.max(1) } else { yolo.nbs as u64 };
    let decay = config.train.weight_decay * global_batch as f64 / nominal as f64;
    let [weight, norm, bias] = members;
    vec![
        GroupSpec { weight_decay: Some(decay), ..GroupSpec::new("weight", weight) },
        GroupSpec { weight_decay: Some(0.0), ..GroupSpec::new("bn", norm) },
        GroupSpec { weight_decay: Some(0.0), warmup_rate: Some(yolo.warmup_bias_lr), ..GroupSpec::new("bias", bias) },
    ]
}

/// Steps up to which `train.optimizer: auto` is AdamW. Source: TASKS 2.7.13.
const MANY_STEPS: usize = 10_000;

/// Chooses the optimizer under `train.optimizer: auto`, and which checkpoints stay; gives a line about the optimizer.
///
/// Few steps: AdamW with the rate `0.002 · 5 / (4 + classes)`. Many: SGD with 0.01 and momentum 0.9, as releases did before
/// they took an optimizer that makes gradients orthogonal. Biases warm up from 0.
pub fn settle(config: &mut Config, images: usize, classes: usize, global_batch: u64) -> Vec<String> {
    let yolo: YoloConfig = config.section();
    if yolo.save_period >= 1.0 {
        config.log.keep_every = yolo.save_period as u64;
    }
    if config.train.optimizer != OptimizerKind::Auto {
        return Vec::new();
    }
    let batch = global_batch as usize / config.train.gradient_accumulation_steps.max(1);
    let steps = images.div_ceil(batch.max(yolo.nbs).max(1)).saturating_mul(config.train.num_epochs);
    config.with_section(|yolo: &mut YoloConfig| yolo.warmup_bias_lr = 0.0);
    let train = &mut config.train;
    if steps > MANY_STEPS {
        (train.optimizer, train.learning_rate, train.momentum) = (OptimizerKind::Sgd, 0.01, 0.9);
    } else {
        let rate = 0.002 * 5.0 / (4 + classes) as f64;
        (train.optimizer, train.learning_rate) = (OptimizerKind::Adamw, (rate * 1e6).round_ties_even() / 1e6);
        train.betas = [0.9, 0.999];
    }
    vec![format!(
        "train.optimizer auto: {} with learning rate {} for {steps} steps of {} images; train.learning_rate, train.momentum and \
         yolo.warmup_bias_lr of the config are not used",
        train.optimizer.word(),
        train.learning_rate,
        batch.max(yolo.nbs)
    )]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::yolo::model::Detector;
    use tch::{Device, nn};

    #[test]
    fn auto_chooses_by_the_number_of_steps() {
        let mut config = spec::task::config("yolo");
        config.with_section(|yolo: &mut YoloConfig| yolo.save_period = 5.0);
        assert!(settle(&mut config, 80, 3, 8).is_empty());
        assert_eq!((config.log.keep_every, config.train.optimizer), (5, OptimizerKind::Sgd));
        config.train.optimizer = OptimizerKind::Auto;
        config.train.num_epochs = 60;
        config.with_section(|yolo: &mut YoloConfig| yolo.nbs = 8);
        let (mut few, mut many) = (config.clone(), config);
        let line = settle(&mut few, 80, 3, 8).concat();
        assert_eq!((few.train.optimizer, few.train.learning_rate), (OptimizerKind::Adamw, 0.001_429));
        assert_eq!(few.section::<YoloConfig>().warmup_bias_lr, 0.0);
        assert!(line.contains("adamw with learning rate 0.001429 for 600 steps of 8 images"), "{line}");
        settle(&mut many, 118_287, 80, 64);
        assert_eq!(
            (many.train.optimizer, many.train.learning_rate, many.train.momentum),
            (OptimizerKind::Sgd, 0.01, 0.9)
        );
    }

    #[test]
    fn parameters_are_weights_norms_and_biases() {
        let vs = nn::VarStore::new(Device::Cpu);
        let mut config = spec::task::config("yolo");
        config.with_section(|yolo: &mut YoloConfig| yolo.nbs = 64);
        Detector::new(&vs.root(), &config.section::<YoloConfig>().size(), 3);
        let all: Vec<ParamInfo> = vs
            .variables()
            .into_iter()
            .filter(|(_, tensor)| tensor.requires_grad())
            .map(|(name, tensor)| ParamInfo { name, shape: tensor.size() })
            .collect();
        let groups = groups(&config, &all, 16);
        let sizes: Vec<_> = groups.iter().map(|group| (group.name.as_str(), group.members.len())).collect();
        // 63 convolutions, of which 6 have biases; as many normalisations as the others.
        assert_eq!(sizes, [("weight", 63), ("bn", 57), ("bias", 63)]);
        let decays: Vec<_> = groups.iter().map(|group| group.weight_decay.unwrap()).collect();
        assert_eq!(decays, [5e-4 * 16.0 / 64.0, 0.0, 0.0]);
        assert_eq!(groups[2].warmup_rate, Some(0.1));
    }
}
