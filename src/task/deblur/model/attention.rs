//! Windowed attention: self attention over space and time, and mutual attention between two frames.

use super::super::constants::constant;
use super::layers::{Linear, Shared};
use super::window::{Windows, sine_encoding};
use tch::{Device, Kind, Tensor, nn};

/// Attention within windows, with a learnt bias for each relative position. In mutual layers, whose windows hold two
/// frames, each frame's queries also read the other frame's keys and values.
#[derive(Clone, Debug)]
pub struct WindowAttention {
    heads: i64,
    /// `[(2d-1)(2h-1)(2w-1), heads]`
    table: Shared,
    qkv_self: Linear,
    mutual: Option<Linear>,
    proj: Linear,
}

impl WindowAttention {
    pub fn new(p: &nn::Path, features: i64, window: [i64; 3], heads: i64, mutual: bool) -> Self {
        let rows = window.iter().map(|w| 2 * w - 1).product();
        let init = nn::Init::Randn { mean: 0.0, stdev: 0.02 };
        Self {
            heads,
            table: Shared::new(p.var("relative_position_bias_table", &[rows, heads], init)),
            qkv_self: Linear::new(&(p / "qkv_self"), features, 3 * features),
            mutual: mutual.then(|| Linear::new(&(p / "qkv_mut"), features, 3 * features)),
            proj: Linear::new(&(p / "proj"), if mutual { 2 * features } else { features }, features),
        }
    }

    /// `[B, D, H, W, C]` to the same shape.
    pub fn forward(&self, x: &Tensor, windows: &Windows) -> Tensor {
        let aligned = windows.align(x);
        let own = self.self_attention(&aligned, windows);
        let out = match &self.mutual {
            // A clip of one frame has no other frame to read: the only one stands in for it.
            Some(qkv) => Tensor::cat(&[self.mutual_attention(qkv, &aligned, windows), own], 4),
            None => own,
        };
        self.proj.forward(&windows.restore(&out))
    }

    fn self_attention(&self, x: &Tensor, windows: &Windows) -> Tensor {
        let n = windows.tokens();
        let qkv = windows.split(&self.qkv_self.forward(x), 3, self.heads);
        let bias = self.table.index_select(0, &windows.pairs).reshape([n, n, self.heads]).permute([2, 0, 1]);
        let out = match &windows.masks {
            None => attend(&qkv[0], &qkv[1], &qkv[2], Some(&bias)),
            Some((kinds, apart)) => masked(&qkv, Some(&bias), &apart.index_select(0, kinds)),
        };
        windows.join(&out)
    }

    /// Queries of each frame on the other's keys and values, with a sine encoding of the place.
    fn mutual_attention(&self, qkv: &Linear, x: &Tensor, windows: &Windows) -> Tensor {
        let ([frames, h, w], size) = (windows.size, x.size());
        let encoding = || sine_encoding(h, w, size[4]);
        let place = constant("sine", [h, w, size[4], 0], x.device(), encoding).to_kind(x.kind());
        let place = place.repeat([size[2] / h, size[3] / w, 1]);
        let qkv = windows.split(&qkv.forward(&(x + place)), 3, self.heads);
        let (all, n, width) = (qkv[0].size()[0], h * w, qkv[0].size()[3]);
        let by_frame = |t: &Tensor| t.reshape([all, self.heads, frames, n, width]);
        let per_head = |t: Tensor| t.reshape([all, self.heads * frames, n, width]);
        let qkv = [by_frame(&qkv[0]).flip([2]), by_frame(&qkv[1]), by_frame(&qkv[2])].map(per_head);
        let out = match &windows.masks {
            None => attend(&qkv[0], &qkv[1], &qkv[2], None),
            // Frames of a wrapped window are apart as a whole, which changes no softmax: places alone count.
            Some((kinds, apart)) => masked(&qkv, None, &apart.narrow(1, 0, n).narrow(2, 0, n).index_select(0, kinds)),
        };
        windows.join(&out.reshape([all, self.heads, frames * n, width]))
    }
}

/// Attention of `[B · windows, heads, N, c]` with a mask per window `[windows, N, N]`, alike for samples and heads.
fn masked(qkv: &[Tensor], bias: Option<&Tensor>, mask: &Tensor) -> Tensor {
    let (size, windows) = (qkv[0].size(), mask.size()[0]);
    let (heads, n) = (size[1], size[2]);
    let mask = mask.unsqueeze(1);
    if qkv[0].device() == Device::Cpu {
        let by_window = [size[0] / windows, windows, heads, n, n];
        return weigh(&qkv[0], &qkv[1], &qkv[2], |scores| {
            if let Some(bias) = bias {
                let _ = scores.g_add_(bias);
            }
            let _ = scores.view(by_window).g_add_(&mask);
        });
    }
    // One mask per sample: all its windows are heads of it.
    let all_heads = [size[0] / windows, windows * heads, n, size[3]];
    let by_head = match bias {
        Some(bias) => mask + bias,
        None => mask.expand([-1, heads, -1, -1], false),
    };
    let bias = by_head.reshape([windows * heads, n, n]);
    let [q, k, v] = [0, 1, 2].map(|i| qkv[i].reshape(all_heads));
    attend(&q, &k, &v, Some(&bias)).reshape(&*size)
}

/// `softmax(q·kᵀ/√c + bias)·v` of `[B, heads, N, c]`, `bias` `[heads, N, N]`.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> Tensor {
    if q.device() != Device::Cpu {
        let bias = bias.map(|b| b.unsqueeze(0).to_kind(q.kind()));
        return Tensor::scaled_dot_product_attention(q, k, v, bias, 0.0, false, None, false);
    }
    weigh(q, k, v, |scores| {
        if let Some(bias) = bias {
            let _ = scores.g_add_(bias);
        }
    })
}

/// Attention spelt out, which for windows of a few dozen tokens is the quicker way on a CPU. `add` changes the scores in
/// place: no backward formula needs them.
fn weigh(q: &Tensor, k: &Tensor, v: &Tensor, add: impl FnOnce(&mut Tensor)) -> Tensor {
    let scale = 1.0 / (q.size()[3] as f64).sqrt();
    let mut scores = (q * scale).matmul(&k.transpose(2, 3));
    add(&mut scores);
    scores.softmax(-1, None::<Kind>).to_kind(v.kind()).matmul(v)
}
