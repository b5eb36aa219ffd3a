//! Windowed attention: self attention over space and time, and mutual attention between two frames.

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
            None => attend(&qkv[0], &qkv[1], &qkv[2], Some(&bias.unsqueeze(0))),
            Some((kinds, apart)) => {
                let by_kind = (bias.unsqueeze(0) + apart.unsqueeze(1)).index_select(0, kinds);
                masked(&qkv[0], &qkv[1], &qkv[2], &by_kind)
            }
        };
        windows.join(&out)
    }

    /// Queries of each frame on the other's keys and values, with a sine encoding of the place.
    fn mutual_attention(&self, qkv: &Linear, x: &Tensor, windows: &Windows) -> Tensor {
        let ([frames, h, w], size) = (windows.size, x.size());
        let place = sine_encoding(h, w, size[4]).to_device(x.device()).to_kind(x.kind());
        let place = place.repeat([size[2] / h, size[3] / w, 1]);
        let qkv = windows.split(&qkv.forward(&(x + place)), 3, self.heads);
        let (all, n, width) = (qkv[0].size()[0], h * w, qkv[0].size()[3]);
        let by_frame = |t: &Tensor| t.reshape([all, self.heads, frames, n, width]);
        let per_head = |t: Tensor| t.reshape([all, self.heads * frames, n, width]);
        let q = per_head(by_frame(&qkv[0]).flip([2]));
        let (k, v) = (per_head(by_frame(&qkv[1])), per_head(by_frame(&qkv[2])));
        let out = match &windows.masks {
            None => attend(&q, &k, &v, None),
            Some((kinds, apart)) => {
                // Frames of a wrapped window are apart as a whole, which changes no softmax: places alone count.
                let places = apart.narrow(1, 0, n).narrow(2, 0, n).index_select(0, kinds).unsqueeze(1);
                let mask = places.expand([-1, self.heads * frames, -1, -1], false);
                masked(&q, &k, &v, &mask)
            }
        };
        windows.join(&out.reshape([all, self.heads, frames * n, width]))
    }
}

/// Attention with a mask per window `[windows, heads, N, N]`, alike for all samples of `[B · windows, heads, N, c]`.
fn masked(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Tensor {
    let (size, windows) = (q.size(), mask.size()[0]);
    let all_heads = [size[0] / windows, windows * size[1], size[2], size[3]];
    let [q, k, v] = [q, k, v].map(|t| t.reshape(all_heads));
    let mask = mask.reshape([1, windows * size[1], size[2], size[2]]);
    attend(&q, &k, &v, Some(&mask)).reshape(&*size)
}

/// `softmax(q·kᵀ/√c + bias)·v` of `[.., heads, N, c]`.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let scale = 1.0 / (q.size()[3] as f64).sqrt();
    if q.device() != Device::Cpu {
        let bias = bias.map(|b| b.to_kind(q.kind()));
        return Tensor::scaled_dot_product_attention(q, k, v, bias, 0.0, false, scale, false);
    }
    let scores = (q * scale).matmul(&k.transpose(2, 3));
    let scores = match bias {
        Some(bias) => scores + bias,
        None => scores,
    };
    scores.softmax(-1, None::<Kind>).to_kind(v.kind()).matmul(v)
}
