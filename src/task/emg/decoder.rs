//! The decoder: one pose per rollout step, fed back into the next step.

use super::rollout::{self, Head, LayerWeights};
use super::{init, tds::Linear};
use spec::task::emg::{DecoderType, EmgModel};
use tch::{Tensor, nn};

const LEAKY_SLOPE: f64 = 0.1;

/// `features` and the previous pose to the next pose, step by step.
pub struct Decoder {
    core: Core,
    head: Linear,
    /// Poses are fed back.
    conditioned: bool,
    velocity: bool,
    scale: f64,
}

enum Core {
    Lstm(Vec<LstmLayer>),
    /// Linear and LeakyReLU per layer, without norms.
    Mlp(Vec<Linear>),
}

/// Weights of one layer, gates in PyTorch's order: input, forget, cell, output.
struct LstmLayer {
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
}

impl LstmLayer {
    fn new(vs: &nn::Path, index: usize, inputs: i64, hidden: i64) -> Self {
        let var = |name: &str, shape: &[i64]| init::uniform(vs, &format!("{name}_l{index}"), shape, hidden);
        Self {
            weight_ih: var("weight_ih", &[4 * hidden, inputs]),
            weight_hh: var("weight_hh", &[4 * hidden, hidden]),
            bias_ih: var("bias_ih", &[4 * hidden]),
            bias_hh: var("bias_hh", &[4 * hidden]),
        }
    }

    fn weights(&self) -> LayerWeights<'_> {
        let Self { weight_ih, weight_hh, bias_ih, bias_hh } = self;
        LayerWeights { weight_ih, weight_hh, bias_ih, bias_hh }
    }
}

impl Decoder {
    pub fn new(vs: &nn::Path, features: i64, config: &EmgModel) -> Self {
        let poses = config.output_size as i64;
        let inputs = features + if config.decoder_state_condition { poses } else { 0 };
        let (core, hidden) = match config.decoder_type {
            DecoderType::Lstm => Self::lstm(&(vs / "lstm"), inputs, config),
            DecoderType::Mlp => Self::mlp(&(vs / "layers"), inputs, config),
        };
        Self {
            core,
            head: Linear::new(&(vs / "head"), hidden, poses),
            conditioned: config.decoder_state_condition,
            velocity: config.predict_velocity,
            scale: config.output_scale,
        }
    }

    fn lstm(vs: &nn::Path, inputs: i64, config: &EmgModel) -> (Core, i64) {
        let hidden = config.decoder_hidden_size as i64;
        let layer = |index| LstmLayer::new(vs, index, if index == 0 { inputs } else { hidden }, hidden);
        (Core::Lstm((0..config.decoder_num_layers.max(1)).map(layer).collect()), hidden)
    }

    fn mlp(vs: &nn::Path, inputs: i64, config: &EmgModel) -> (Core, i64) {
        let mut width = inputs;
        let layer = |(index, &outputs): (usize, &usize)| {
            let linear = Linear::new(&(vs / index), width, outputs as i64);
            width = outputs as i64;
            linear
        };
        let layers = config.decoder_mlp_hidden.iter().enumerate().map(layer).collect();
        (Core::Mlp(layers), width)
    }

    /// Features `[S, B, F]` to poses `[B, S, P]`, from an initial pose of zeros.
    pub fn forward(&self, features: &Tensor) -> Tensor {
        match &self.core {
            Core::Lstm(layers) if features.device().is_cuda() => self.in_few_kernels(layers, features),
            _ => self.step_by_step(features),
        }
    }

    /// [`Decoder::forward`] of LSTM layers where kernels cost more than what they compute.
    fn in_few_kernels(&self, layers: &[LstmLayer], features: &Tensor) -> Tensor {
        let weights: Vec<LayerWeights> = layers.iter().map(LstmLayer::weights).collect();
        let head =
            Head { conditioned: self.conditioned, velocity: self.velocity, scale: self.scale, slope: LEAKY_SLOPE };
        match rollout::run(features, &weights, (&self.head.weight, &self.head.bias), head) {
            Ok(poses) => poses,
            // As tch's own operations do; the step turns it into its error.
            Err(error) => panic!("{error}"),
        }
    }

    fn step_by_step(&self, features: &Tensor) -> Tensor {
        let [steps, batch] = [features.size()[0], features.size()[1]];
        let mut cell = self.unroll(features);
        // In the parameters' type: under autocast velocities add up in f32.
        let kind = self.head.weight.kind();
        let mut pose = Tensor::zeros([batch, self.head.weight.size()[0]], (kind, features.device()));
        let mut poses = Vec::with_capacity(steps as usize);
        for step in 0..steps {
            let hidden = cell.step(step, self.conditioned.then_some(&pose));
            let output = self.head.forward(&hidden);
            let output = if self.scale == 1.0 { output } else { output * self.scale };
            pose = if self.velocity { pose + output } else { output };
            poses.push(pose.shallow_clone());
        }
        Tensor::stack(&poses, 1)
    }

    /// Everything that needs no earlier step: the product with the features for all steps at once.
    fn unroll(&self, features: &Tensor) -> Rollout<'_> {
        let width = features.size()[2];
        match &self.core {
            Core::Lstm(layers) => Rollout::lstm(layers, features, width),
            Core::Mlp(layers) => Rollout::mlp(layers, features, width),
        }
    }
}

/// A rollout under way.
enum Rollout<'a> {
    Lstm { given: Vec<Tensor>, layers: Vec<RolloutLayer>, hidden: i64 },
    Mlp { given: Vec<Tensor>, pose_weight: Option<Tensor>, layers: &'a [Linear] },
}

/// A layer with its input and recurrent weights side by side, transposed; `bias` is the sum of both biases.
struct RolloutLayer {
    weight: Tensor,
    bias: Tensor,
    h: Option<Tensor>,
    c: Option<Tensor>,
}

impl<'a> Rollout<'a> {
    fn lstm(layers: &'a [LstmLayer], features: &Tensor, width: i64) -> Self {
        let hidden = layers[0].weight_hh.size()[1];
        let first = layers[0].weight_ih.narrow(1, 0, width);
        let given = features.linear(&first, Some(&(&layers[0].bias_ih + &layers[0].bias_hh)));
        let prepare = |(index, layer): (usize, &LstmLayer)| {
            let skip = if index == 0 { width } else { 0 };
            let inputs = layer.weight_ih.narrow(1, skip, layer.weight_ih.size()[1] - skip);
            RolloutLayer {
                weight: Tensor::cat(&[inputs, layer.weight_hh.shallow_clone()], 1).transpose(0, 1),
                bias: &layer.bias_ih + &layer.bias_hh,
                h: None,
                c: None,
            }
        };
        let layers = layers.iter().enumerate().map(prepare).collect();
        Rollout::Lstm { given: given.unbind(0), layers, hidden }
    }

    fn mlp(layers: &'a [Linear], features: &Tensor, width: i64) -> Self {
        let Some(first) = layers.first() else {
            return Rollout::Mlp { given: features.unbind(0), pose_weight: None, layers };
        };
        let given = features.linear(&first.weight.narrow(1, 0, width), Some(&first.bias));
        let poses = first.weight.size()[1] - width;
        let pose_weight = (poses > 0).then(|| first.weight.narrow(1, width, poses).transpose(0, 1));
        Rollout::Mlp { given: given.unbind(0), pose_weight, layers: &layers[1..] }
    }

    /// The head's input after step `step`, given the previous pose.
    fn step(&mut self, step: i64, pose: Option<&Tensor>) -> Tensor {
        match self {
            Rollout::Lstm { given, layers, hidden } => {
                let mut below = pose.map(Tensor::shallow_clone);
                for (index, layer) in layers.iter_mut().enumerate() {
                    let given = if index == 0 { &given[step as usize] } else { &layer.bias.shallow_clone() };
                    below = Some(layer.step(given, below, *hidden));
                }
                leaky_relu(&below.unwrap_or_default())
            }
            Rollout::Mlp { given, pose_weight, layers } => {
                let given = &given[step as usize];
                let first = match (pose, pose_weight) {
                    (Some(pose), Some(weight)) => given.addmm(pose, weight),
                    (Some(pose), None) => Tensor::cat(&[given, pose], 1),
                    (None, _) => given.shallow_clone(),
                };
                layers.iter().fold(leaky_relu(&first), |x, layer| leaky_relu(&layer.forward(&x)))
            }
        }
    }
}

impl RolloutLayer {
    fn step(&mut self, given: &Tensor, below: Option<Tensor>, hidden: i64) -> Tensor {
        let input: Vec<Tensor> = below.into_iter().chain(self.h.as_ref().map(Tensor::shallow_clone)).collect();
        let gates = match input.len() {
            0 => given.shallow_clone(),
            _ => {
                let input = Tensor::cat(&input, 1);
                // Before the first step h is zero: its rows of the weight add nothing.
                let rows = self.rows(input.size()[1]);
                given.addmm(&input, &rows)
            }
        };
        let gates = gates.split(hidden, 1);
        let [i, f, g, o] = [gates[0].sigmoid(), gates[1].sigmoid(), gates[2].tanh(), gates[3].sigmoid()];
        let c = match &self.c {
            Some(c) => (i * g).addcmul(&f, c),
            None => i * g,
        };
        let h = o * c.tanh();
        self.c = Some(c);
        self.h = Some(h.shallow_clone());
        h
    }

    /// The weight's rows that meet an input of this width: all, the lower layer's alone, or the recurrent ones alone.
    fn rows(&self, width: i64) -> Tensor {
        let all = self.weight.size()[0];
        match &self.h {
            None if width < all => self.weight.narrow(0, 0, width),
            _ => self.weight.shallow_clone(),
        }
    }
}

fn leaky_relu(x: &Tensor) -> Tensor {
    x.maximum(&(x * LEAKY_SLOPE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// Poses, and the gradients of the features and of every variable by name.
    fn results(vs: &nn::VarStore, features: &Tensor, run: impl Fn(&Tensor) -> Tensor) -> Vec<(String, Tensor)> {
        let mut leaf = features.detach().copy().set_requires_grad(true);
        for variable in vs.trainable_variables() {
            variable.shallow_clone().zero_grad();
        }
        leaf.zero_grad();
        let poses = run(&leaf);
        let weights = (Tensor::arange(poses.numel() as i64, (Kind::Float, Device::Cpu)) * 0.37).sin();
        (&poses * weights.view(poses.size().as_slice())).sum(Kind::Float).backward();
        let mut all = vec![("poses".to_owned(), poses.detach()), ("features".to_owned(), leaf.grad())];
        let mut named: Vec<_> = vs.variables().into_iter().map(|(name, v)| (name, v.grad().copy())).collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        all.extend(named);
        all
    }

    #[test]
    fn the_rollout_in_few_kernels_has_the_poses_and_gradients_of_the_one_step_by_step() {
        for (layers, conditioned, velocity, scale) in
            [(2, true, true, 0.5), (1, true, false, 1.0), (3, false, true, 1.0), (1, false, false, 2.0)]
        {
            tch::manual_seed(3);
            let config = EmgModel {
                decoder_num_layers: layers,
                decoder_hidden_size: 6,
                output_size: 4,
                decoder_state_condition: conditioned,
                predict_velocity: velocity,
                output_scale: scale,
                ..EmgModel::default()
            };
            let vs = nn::VarStore::new(Device::Cpu);
            let decoder = Decoder::new(&vs.root(), 5, &config);
            let features = Tensor::randn([7, 3, 5], (Kind::Float, Device::Cpu));
            let right = results(&vs, &features, |x| decoder.step_by_step(x));
            let Core::Lstm(cells) = &decoder.core else { panic!("not an LSTM") };
            let found = results(&vs, &features, |x| decoder.in_few_kernels(cells, x));
            for ((name, found), (_, right)) in found.iter().zip(&right) {
                let far = (found - right).norm().double_value(&[]) / right.norm().double_value(&[]).max(1e-6);
                assert!(far < 1e-5, "{name}: {far:e} with {layers} layers");
            }
        }
    }
}
