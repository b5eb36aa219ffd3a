//! TMSA: attention and feed-forward with residuals, and groups of such blocks.

use super::attention::WindowAttention;
use super::layers::{Draws, Geglu, Norm, child, maybe_recompute};
use super::window::Geometries;
use tch::{Tensor, nn};

/// Arguments of a forward pass besides its tensors.
pub struct Context<'a> {
    pub geometries: &'a Geometries,
    /// Where drop-path draws from.
    pub draws: Draws,
    pub checkpoint_attn: bool,
    pub checkpoint_ffn: bool,
}

/// Numbers of a group of blocks.
#[derive(Clone, Copy, Debug)]
pub struct GroupShape<'a> {
    pub features: i64,
    pub window: [i64; 3],
    pub heads: i64,
    pub mutual: bool,
    /// Drop-path rate of each block; their number is the depth.
    pub drop_path: &'a [f64],
}

/// `x + attention(LN(x))`, then `x + GEGLU(LN(x))` with hidden 2C.
struct Tmsa {
    norm1: Norm,
    attn: WindowAttention,
    norm2: Norm,
    mlp: Geglu,
    drop_path: f64,
    shifted: bool,
}

impl Tmsa {
    fn new(p: &nn::Path, shape: &GroupShape, index: usize) -> Self {
        let c = shape.features;
        Self {
            norm1: Norm::new(&(p / "norm1"), c),
            attn: WindowAttention::new(&(p / "attn"), c, shape.window, shape.heads, shape.mutual),
            norm2: Norm::new(&(p / "norm2"), c),
            mlp: Geglu::new(&(p / "mlp"), c, 2 * c, c),
            drop_path: shape.drop_path[index],
            shifted: index % 2 == 1,
        }
    }

    fn forward(&self, x: &Tensor, window: [i64; 3], context: &Context) -> Tensor {
        let size = x.size();
        let windows = context.geometries.get([size[1], size[2], size[3]], window, self.shifted, x.device());
        let drop = || context.draws.drop_path(self.drop_path, size[0], x.device());
        let (norm, attn, factor) = (self.norm1.clone(), self.attn.clone(), drop());
        let x = maybe_recompute(context.checkpoint_attn, &[x], move |x| {
            let y = attn.forward(&norm.forward(&x[0]), &windows);
            residual(&x[0], y, factor.as_deref())
        });
        let (norm, mlp, factor) = (self.norm2.clone(), self.mlp.clone(), drop());
        maybe_recompute(context.checkpoint_ffn, &[&x], move |x| {
            residual(&x[0], mlp.forward(&norm.forward(&x[0])), factor.as_deref())
        })
    }
}

fn residual(x: &Tensor, branch: Tensor, factor: Option<&Tensor>) -> Tensor {
    match factor {
        Some(factor) => x + branch * factor,
        None => x + branch,
    }
}

/// TMSAG: blocks of which every second one shifts its windows.
pub struct Group {
    blocks: Vec<Tmsa>,
    window: [i64; 3],
}

impl Group {
    pub fn new(p: &nn::Path, shape: &GroupShape) -> Self {
        let p = p / "blocks";
        let blocks = (0..shape.drop_path.len()).map(|i| Tmsa::new(&child(&p, i), shape, i)).collect();
        Self { blocks, window: shape.window }
    }

    /// `[B, T, H, W, C]` to the same shape.
    pub fn forward(&self, x: &Tensor, context: &Context) -> Tensor {
        self.blocks.iter().fold(x.shallow_clone(), |x, block| block.forward(&x, self.window, context))
    }
}
