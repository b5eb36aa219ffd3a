//! Groups of parameters: weights, which decay; factors and shifts of normalisation; biases. Under `musgd` those of the class branches
//! are apart, and learn faster.

use crate::task::{GroupSpec, ParamInfo};
use spec::config::{Config, OptimizerKind};
use spec::task::yolo::YoloConfig;

/// Factor on the rate of the class branches under `musgd`. Source: the package, release 8.4.
const CLASS_RATE: f64 = 3.0;
/// Beginning of the names of the class branches.
pub const CLASS_BRANCHES: &str = "model.22.cv3.";

/// The three groups in the package's order, `lr/pg0` to `lr/pg2` of results.csv; under `musgd` six.
///
/// `train.weight_decay` is meant for steps of `yolo.nbs` images: it grows and shrinks with `global_batch`.
pub fn groups(config: &Config, parameters: &[ParamInfo], global_batch: u64) -> Vec<GroupSpec> {
    let yolo: YoloConfig = config.section();
    let mut members: [Vec<String>; 3] = Default::default();
    let mut of_classes: [Vec<String>; 3] = Default::default();
    let apart = |name: &str| config.train.optimizer == OptimizerKind::Musgd && name.starts_with(CLASS_BRANCHES);
    for parameter in parameters {
        let name = parameter.name.as_str();
        let group = if name.ends_with(".bias") {
            2
        } else if name.contains(".bn.") {
            1
        } else {
            0
        };
        let all = if apart(name) { &mut of_classes } else { &mut members };
        all[group].push(parameter.name.clone());
    }
    let nominal = if yolo.nbs == 0 { global_batch.max(1) } else { yolo.nbs as u64 };
    let decay = config.train.weight_decay * global_batch as f64 / nominal as f64;
    let three = |names: [&str; 3], members: [Vec<String>; 3], rate: f64| {
        let decays = [decay, 0.0, 0.0];
        let begins = [None, None, Some(yolo.warmup_bias_lr)];
        let spec = |at: usize, members: Vec<String>| GroupSpec {
            weight_decay: Some(decays[at]),
            warmup_rate: begins[at],
            rate,
            ..GroupSpec::new(names[at], members)
        };
        members.into_iter().enumerate().map(|(at, members)| spec(at, members)).collect::<Vec<_>>()
    };
    let mut groups = three(["weight", "bn", "bias"], members, 1.0);
    if of_classes.iter().any(|members| !members.is_empty()) {
        groups.extend(three(["class_weight", "class_bn", "class_bias"], of_classes, CLASS_RATE));
    }
    groups
}

/// Steps up to which `train.optimizer: auto` is AdamW. Source: TASKS 2.7.13.
const MANY_STEPS: usize = 10_000;

/// Chooses the optimizer under `train.optimizer: auto`; gives a line about it.
///
/// Few steps: AdamW with the rate `0.002 · 5 / (4 + classes)`. Many: MuSGD with 0.01; its momentum is 0.9 where there is no
/// warm-up, which would lead to `train.momentum`. Biases warm up from 0.
pub fn settle(config: &mut Config, images: usize, classes: usize, global_batch: u64) -> Vec<String> {
    let yolo: YoloConfig = config.section();
    if config.train.optimizer != OptimizerKind::Auto {
        return Vec::new();
    }
    let batch = global_batch as usize / config.train.gradient_accumulation_steps.max(1);
    let steps = images.div_ceil(batch.max(yolo.nbs).max(1)).saturating_mul(config.train.num_epochs);
    config.with_section(|yolo: &mut YoloConfig| yolo.warmup_bias_lr = 0.0);
    let train = &mut config.train;
    if steps > MANY_STEPS {
        // Ranks that divide the optimizer's state have no whole gradients: what earlier releases took.
        train.optimizer = if config.ddp.shard_optimizer { OptimizerKind::Sgd } else { OptimizerKind::Musgd };
        train.learning_rate = 0.01;
        if train.optimizer == OptimizerKind::Sgd || train.warmup_epochs == 0.0 {
            train.momentum = 0.9;
        }
    } else {
        let rate = 0.002 * 5.0 / (4 + classes) as f64;
        (train.optimizer, train.learning_rate) = (OptimizerKind::Adamw, (rate * 1e6).round_ties_even() / 1e6);
        train.betas = [0.9, 0.999];
    }
    vec![format!(
        "train.optimizer auto: {} with learning rate {} for {steps} steps of {} images; train.learning_rate and \
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
        assert!(settle(&mut config, 80, 3, 8).is_empty());
        assert_eq!(config.train.optimizer, OptimizerKind::Sgd);
        config.train.optimizer = OptimizerKind::Auto;
        config.train.num_epochs = 60;
        config.with_section(|yolo: &mut YoloConfig| yolo.nbs = 8);
        let (mut few, mut many) = (config.clone(), config);
        let line = settle(&mut few, 80, 3, 8).concat();
        assert_eq!((few.train.optimizer, few.train.learning_rate), (OptimizerKind::Adamw, 0.001_429));
        assert_eq!(few.section::<YoloConfig>().warmup_bias_lr, 0.0);
        assert!(line.contains("adamw with learning rate 0.001429 for 600 steps of 8 images"), "{line}");
        let mut sharded = many.clone();
        sharded.ddp.shard_optimizer = true;
        settle(&mut many, 118_287, 80, 64);
        settle(&mut sharded, 118_287, 80, 64);
        assert_eq!((sharded.train.optimizer, sharded.train.momentum), (OptimizerKind::Sgd, 0.9));
        assert_eq!(
            (many.train.optimizer, many.train.learning_rate, many.train.momentum),
            (OptimizerKind::Musgd, 0.01, 0.937)
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
        assert_eq!((groups[2].warmup_rate, groups[2].rate), (Some(0.1), 1.0));
        config.train.optimizer = OptimizerKind::Musgd;
        let groups = super::groups(&config, &all, 16);
        let sizes: Vec<_> = groups.iter().map(|group| (group.members.len(), group.rate)).collect();
        // Of the class branches, three convolutions of each of three levels, the last one with a bias.
        assert_eq!(sizes, [(54, 1.0), (51, 1.0), (54, 1.0), (9, 3.0), (6, 3.0), (9, 3.0)]);
    }
}
