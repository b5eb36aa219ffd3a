//! The LSTM rollout as one function with a backward pass of its own: fewer kernels, the same numbers.
//!
//! On a GPU a small rollout's time is the number of its kernels. Autograd multiplies each step's gradient with each step's
//! input and adds the products up, two kernels per weight and step; here they are kept side by side and multiplied once.
//! A step is a few kernels: inputs side by side, one product, and the cell as a whole for each layer, then the head.
//! It runs in f32 whatever autocast says: the products are too small for narrower ones to be faster.

use crate::torch::operators::{LstmCell, leaky_relu_into, lstm_cell, lstm_cell_backward};
use crate::torch::{Autocast, TorchError, with_backward};
use tch::{Kind, Tensor, no_grad};

/// Weights of a layer as PyTorch has them.
pub struct LayerWeights<'a> {
    pub weight_ih: &'a Tensor,
    pub weight_hh: &'a Tensor,
    pub bias_ih: &'a Tensor,
    pub bias_hh: &'a Tensor,
}

/// How poses follow from the head's outputs.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Poses are fed back.
    pub conditioned: bool,
    /// Outputs add up.
    pub velocity: bool,
    pub scale: f64,
    pub slope: f64,
}

/// Features `[S, B, F]` to poses `[B, S, P]`; `head_weight` `[P, H]`, `head_bias` `[P]`.
///
/// # Errors
/// libtorch refuses.
pub fn run(
    features: &Tensor,
    layers: &[LayerWeights],
    (head_weight, head_bias): (&Tensor, &Tensor),
    head: Head,
) -> Result<Tensor, TorchError> {
    let mut inputs = vec![features, head_weight, head_bias];
    for layer in layers {
        inputs.extend([layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh]);
    }
    let (poses, trace) = without_autocast(features, || no_grad(|| Trace::run(&inputs, head)))??;
    with_backward(&inputs, &poses, move |grad| match no_grad(|| trace.backward(grad)) {
        Ok(grads) => grads.into_iter().map(Some).collect(),
        // As tch's own operations do; the pass turns it into its error.
        Err(error) => panic!("{error}"),
    })
}

fn without_autocast<T>(features: &Tensor, act: impl FnOnce() -> T) -> Result<T, TorchError> {
    let _wide = Autocast::enter(features.device(), false, Kind::BFloat16)?;
    Ok(act())
}

/// A layer while it runs, and what its backward pass needs of each step.
struct Layer {
    /// `[4H, inputs + H]`: what the layer below or the pose, and its own output, are multiplied with.
    weight: Tensor,
    /// `[S, B, inputs + H]`: what it was multiplied with, step by step.
    seen: Tensor,
    /// Rows of the gates that need no earlier step: one `[B, 4H]` for each step, or the same for all.
    given: Vec<Tensor>,
    cells: Vec<LstmCell>,
}

/// A rollout that was run.
struct Trace {
    head: Head,
    layers: Vec<Layer>,
    /// `[S·B, F]` and its weight `[4H, F]`.
    features: Tensor,
    feature_weight: Tensor,
    /// `[S, B, H]`: the head's inputs.
    hidden: Tensor,
    /// `[P, H]`, scaled.
    head_weight: Tensor,
    zeros: Tensor,
    /// Steps, batch, outputs of a layer, poses.
    sizes: [i64; 4],
}

impl Trace {
    /// `inputs` as in [`run`].
    fn run(inputs: &[&Tensor], head: Head) -> Result<(Tensor, Trace), TorchError> {
        let (features, weights) = (inputs[0].to_kind(Kind::Float), &inputs[3..]);
        let ([steps, batch, width], poses) = (sizes3(&features), inputs[1].size()[0]);
        let (hidden, options) = (inputs[1].size()[1], (Kind::Float, features.device()));
        let features = features.reshape([steps * batch, width]);
        let feature_weight = weights[0].narrow(1, 0, width);
        let mut layers = Vec::new();
        for (index, layer) in weights.chunks(4).enumerate() {
            let [ih, hh, bias] = [layer[0], layer[1], &(layer[2] + layer[3])];
            let skip = if index == 0 { width } else { 0 };
            let below = ih.narrow(1, skip, ih.size()[1] - skip);
            let weight = Tensor::cat(&[&below, hh], 1);
            let given = match index {
                0 => bias.addmm(&features, &feature_weight.transpose(0, 1)).view([steps, batch, 4 * hidden]).unbind(0),
                _ => vec![bias.unsqueeze(0).repeat([batch, 1])],
            };
            let seen = Tensor::empty([steps, batch, weight.size()[1]], options);
            layers.push(Layer { weight, seen, given, cells: Vec::new() });
        }
        let zeros = Tensor::zeros([batch, hidden.max(poses)], options);
        let mut trace = Trace {
            head,
            layers,
            features,
            feature_weight,
            hidden: Tensor::empty([steps, batch, hidden], options),
            head_weight: if head.scale == 1.0 { inputs[1].shallow_clone() } else { inputs[1] * head.scale },
            zeros,
            sizes: [steps, batch, hidden, poses],
        };
        let bias = if head.scale == 1.0 { inputs[2].shallow_clone() } else { inputs[2] * head.scale };
        let mut pose = trace.nothing(poses);
        let mut all = Vec::with_capacity(steps as usize);
        for step in 0..steps {
            pose = trace.step(step, &pose, &bias)?;
            all.push(pose.shallow_clone());
        }
        Ok((Tensor::stack(&all, 1), trace))
    }

    /// `[B, width]` of zeros.
    fn nothing(&self, width: i64) -> Tensor {
        if width == self.zeros.size()[1] {
            self.zeros.shallow_clone()
        } else {
            self.zeros.narrow(1, 0, width).contiguous()
        }
    }

    /// Runs one step; the next pose `[B, P]`.
    fn step(&mut self, step: i64, pose: &Tensor, bias: &Tensor) -> Result<Tensor, TorchError> {
        let start = self.nothing(self.sizes[2]);
        let mut below = self.head.conditioned.then(|| pose.shallow_clone());
        for layer in &mut self.layers {
            let last = layer.cells.last();
            let (h, c) = last.map_or((&start, &start), |last| (&last.out, &last.cell));
            let place = layer.seen.get(step);
            let parts: Vec<&Tensor> = below.iter().chain(std::iter::once(h)).collect();
            let _ = Tensor::cat_out(&place, &parts, 1);
            let given = layer.given.get(step as usize).unwrap_or(&layer.given[0]);
            let made = lstm_cell(given, &place.matmul(&layer.weight.transpose(0, 1)), c)?;
            below = Some(made.out.shallow_clone());
            layer.cells.push(made);
        }
        let place = self.hidden.get(step);
        leaky_relu_into(&place, &below.unwrap_or(start), self.head.slope)?;
        let output = place.linear(&self.head_weight, Some(bias));
        Ok(if self.head.velocity { output + pose } else { output })
    }

    /// Gradients of the inputs of [`run`], from that of the poses.
    fn backward(&self, grad: &Tensor) -> Result<Vec<Tensor>, TorchError> {
        let [steps, batch, hidden, poses] = self.sizes;
        let grad = grad.to_kind(Kind::Float).unbind(1);
        let count = self.layers.len();
        // Per layer: gradients of the gates, last step first; then what its own earlier step gets.
        let mut gates: Vec<Vec<Tensor>> = (0..count).map(|_| Vec::new()).collect();
        let mut outs: Vec<Option<Tensor>> = (0..count).map(|_| None).collect();
        let mut cells: Vec<Option<Tensor>> = (0..count).map(|_| None).collect();
        let mut of_poses: Vec<Tensor> = Vec::new();
        let mut later: Option<Tensor> = None;
        let start = self.nothing(hidden);
        for step in (0..steps).rev() {
            let own = &grad[step as usize];
            let of_pose = match &later {
                Some(later) => own + later,
                None => own.contiguous(),
            };
            let of_head = of_pose.matmul(&self.head_weight);
            let mut of_out = self.hidden.get(step).leaky_relu_backward(&of_head, self.head.slope, true);
            for (at, layer) in self.layers.iter().enumerate().rev() {
                if let Some(own) = outs[at].take() {
                    of_out += own;
                }
                let before = if step > 0 { &layer.cells[step as usize - 1].cell } else { &start };
                let made = &layer.cells[step as usize];
                let (of_gates, of_cell) = lstm_cell_backward(&of_out, cells[at].as_ref(), before, made)?;
                cells[at] = Some(of_cell);
                let inputs = layer.weight.size()[1] - hidden;
                let of_seen = of_gates.matmul(&layer.weight);
                outs[at] = Some(of_seen.narrow(1, inputs, hidden));
                of_out = of_seen.narrow(1, 0, inputs);
                gates[at].push(of_gates);
            }
            // Of the first layer's inputs: the pose of the step before.
            let fed = self.head.conditioned.then_some(of_out);
            later = match (self.head.velocity, fed) {
                (true, Some(fed)) => Some(&of_pose + fed),
                (true, None) => Some(of_pose.shallow_clone()),
                (false, fed) => fed,
            };
            of_poses.push(of_pose);
        }
        let rows = |list: &mut Vec<Tensor>| {
            list.reverse();
            Tensor::cat(list, 0)
        };
        let of_poses = rows(&mut of_poses);
        let scaled = |grad: Tensor| if self.head.scale == 1.0 { grad } else { grad * self.head.scale };
        let of_head = scaled(of_poses.transpose(0, 1).matmul(&self.hidden.view([steps * batch, hidden])));
        let of_bias = scaled(of_poses.sum_dim_intlist([0_i64].as_slice(), false, Kind::Float));
        debug_assert_eq!(of_head.size(), [poses, hidden]);
        let mut grads = vec![Tensor::default(), of_head, of_bias];
        for (at, layer) in self.layers.iter().enumerate() {
            let of_gates = rows(&mut gates[at]);
            let width = layer.weight.size()[1];
            let of_weight = of_gates.transpose(0, 1).matmul(&layer.seen.view([steps * batch, width]));
            let below = of_weight.narrow(1, 0, width - hidden);
            let of_bias = of_gates.sum_dim_intlist([0_i64].as_slice(), false, Kind::Float);
            if at == 0 {
                let of_features = of_gates.matmul(&self.feature_weight);
                grads[0] = of_features.view([steps, batch, self.features.size()[1]]);
                let of_feature_weight = of_gates.transpose(0, 1).matmul(&self.features);
                grads.push(Tensor::cat(&[of_feature_weight, below], 1));
            } else {
                grads.push(below);
            }
            grads.extend([of_weight.narrow(1, width - hidden, hidden), of_bias.shallow_clone(), of_bias]);
        }
        Ok(grads)
    }
}

fn sizes3(tensor: &Tensor) -> [i64; 3] {
    let (a, b, c) = tensor.size3().unwrap_or_default();
    [a, b, c]
}
