//! Groups of parameters: weights, which decay; factors and shifts of normalisation; biases.

use crate::task::{GroupSpec, ParamInfo};
use spec::config::Config;
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
        GroupSpec {
            weight_decay: Some(0.0),
            warmup_rate: Some(yolo.warmup_bias_lr),
            ..GroupSpec::new("bias", bias)
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::yolo::model::Detector;
    use tch::{Device, nn};

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
