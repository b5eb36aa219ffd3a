//! Random numbers that are a pure function of (seed, step, sample): the same on every number of ranks, in every split into
//! micro-batches, after every resume.
//!
//! A sample's 64 bits are SplitMix64 of its id and a key made of seed, step and stream; numbers for different purposes need
//! different streams. Bits are computed on the device of the batch, in integers, so that every device draws the same ones and
//! none waits for the host.

use tch::{Kind, Tensor};

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
const FIRST: u64 = 0xBF58_476D_1CE4_E5B9;
const SECOND: u64 = 0x94D0_49BB_1331_11EB;

/// Draws of one batch.
pub struct Draws {
    seed: u64,
    step: u64,
    /// `[B]`, i64.
    ids: Tensor,
}

impl Draws {
    /// For the samples `ids` (`[B]`, i64) at `step`.
    pub fn new(seed: u64, step: u64, ids: Tensor) -> Self {
        Self { seed, step, ids }
    }

    /// Uniform in 0..1 without 1: `[B]`, f64.
    pub fn uniform(&self, stream: u64) -> Tensor {
        let bits = mixed(self.base(stream));
        shifted(&bits, 11).to_kind(Kind::Double) * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in 0..1 without 1: `[B, width]`, f32.
    pub fn uniforms(&self, stream: u64, width: i64) -> Tensor {
        shifted(&self.words(stream, width), 40).to_kind(Kind::Float) * (1.0 / f64::from(1u32 << 24))
    }

    /// Standard normal: `[B, width]`, f32. Two of them come from 64 bits. Box and Muller, 1958.
    pub fn normals(&self, stream: u64, width: i64) -> Tensor {
        const UNIT: f64 = 1.0 / (1u64 << 32) as f64;
        let words = self.words(stream, (width + 1) / 2);
        // Never 0, so that the logarithm is finite.
        let first = (shifted(&words, 32).to_kind(Kind::Float) + 0.5) * UNIT;
        let second = words.bitwise_and(0xFFFF_FFFF).to_kind(Kind::Float) * (UNIT * std::f64::consts::TAU);
        let radius = (first.log() * -2.0).sqrt();
        let pairs = Tensor::stack(&[&radius * second.cos(), &radius * second.sin()], 2);
        pairs.flatten(1, 2).narrow(1, 0, width)
    }

    /// 64 bits per sample, to be mixed.
    fn base(&self, stream: u64) -> Tensor {
        let key = [stream, self.step, self.seed].into_iter().fold(GOLDEN, |key, part| mix(key ^ mix(part)));
        mixed(self.ids.bitwise_xor(key as i64))
    }

    /// `[B, width]` words of 64 bits.
    fn words(&self, stream: u64, width: i64) -> Tensor {
        let place = Tensor::arange_start(1, width + 1, (Kind::Int64, self.ids.device())) * GOLDEN as i64;
        mixed(self.base(stream).unsqueeze(1) + place.unsqueeze(0))
    }
}

/// SplitMix64's finalizer.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(FIRST);
    let x = (x ^ (x >> 27)).wrapping_mul(SECOND);
    x ^ (x >> 31)
}

/// [`mix`] of every element. Products wrap: libtorch multiplies i64 modulo 2⁶⁴ on CPU and CUDA.
fn mixed(x: Tensor) -> Tensor {
    let x = x.bitwise_xor_tensor(&shifted(&x, 30)) * FIRST as i64;
    let x = x.bitwise_xor_tensor(&shifted(&x, 27)) * SECOND as i64;
    x.bitwise_xor_tensor(&shifted(&x, 31))
}

/// Logical shift to the right.
fn shifted(x: &Tensor, bits: u32) -> Tensor {
    x.bitwise_right_shift_tensor_scalar(i64::from(bits)).bitwise_and((u64::MAX >> bits) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(step: u64, ids: &[i64]) -> Draws {
        Draws::new(42, step, Tensor::from_slice(ids))
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    /// Tensors of i64 wrap as u64 does: the same bits as the plain function.
    #[test]
    fn bits_on_a_device_are_those_of_splitmix64() {
        let xs = [0i64, 1, -1, i64::MAX, i64::MIN, 123_456_789, -987_654_321];
        let bits = Vec::<i64>::try_from(mixed(Tensor::from_slice(&xs))).unwrap();
        let expected: Vec<i64> = xs.iter().map(|&x| mix(x as u64) as i64).collect();
        assert_eq!(bits, expected);
        // Reference value of SplitMix64: the first output for seed 0.
        assert_eq!(mix(GOLDEN), 0xE220_A839_7B1D_CDAF);
    }

    /// Checklist 39 of the guides: equal draws for 1, 2 and 3 ranks, whatever the split.
    #[test]
    fn a_samples_draws_depend_on_neither_batch_nor_place() {
        let all = draws(7, &[3, 1_000_000_000_000, 5, 0, 17, 9]);
        let part = draws(7, &[5, 9]);
        let places = Tensor::from_slice(&[2i64, 5]);
        assert_eq!(all.uniform(1).index_select(0, &places), part.uniform(1));
        let normals = all.normals(2, 5).index_select(0, &places);
        assert!(numbers(&(normals - part.normals(2, 5))).iter().all(|d| d.abs() < 1e-6));
    }

    #[test]
    fn step_seed_and_stream_each_change_the_draws() {
        let base = numbers(&draws(1, &[4]).normals(2, 4));
        assert_ne!(base, numbers(&draws(2, &[4]).normals(2, 4)));
        assert_ne!(base, numbers(&draws(1, &[5]).normals(2, 4)));
        assert_ne!(base, numbers(&draws(1, &[4]).normals(3, 4)));
        assert_ne!(base, numbers(&Draws::new(43, 1, Tensor::from_slice(&[4i64])).normals(2, 4)));
        assert_eq!(base, numbers(&draws(1, &[4]).normals(2, 4)));
    }

    #[test]
    fn normals_have_the_moments_of_a_normal_distribution() {
        let ids: Vec<i64> = (0..4000).collect();
        let x = draws(0, &ids).normals(2, 51).to_kind(Kind::Double);
        let moment = |power: f64| x.pow_tensor_scalar(power).mean(Kind::Double).double_value(&[]);
        for (power, expected, bound) in [(1.0, 0.0, 0.01), (2.0, 1.0, 0.015), (3.0, 0.0, 0.03), (4.0, 3.0, 0.08)] {
            assert!((moment(power) - expected).abs() < bound, "moment {power}: {}", moment(power));
        }
        // Neighbours, in a sample and between samples, are uncorrelated.
        for (dim, len) in [(1, 50), (0, 3999)] {
            let product = (x.narrow(dim, 0, len) * x.narrow(dim, 1, len)).mean(Kind::Double).double_value(&[]);
            assert!(product.abs() < 0.01, "{product}");
        }
    }

    #[test]
    fn uniform_draws_fill_their_range_evenly() {
        let ids: Vec<i64> = (0..20_000).collect();
        for u in [draws(3, &ids).uniform(1), draws(3, &ids[..2000]).uniforms(4, 10).flatten(0, -1)] {
            let counts = (u * 10.0).floor().to_kind(Kind::Int64).bincount::<Tensor>(None, 10);
            let counts = Vec::<i64>::try_from(counts).unwrap();
            assert_eq!(counts.len(), 10);
            assert!(counts.iter().all(|count| (1800..2200).contains(count)), "{counts:?}");
        }
    }
}
