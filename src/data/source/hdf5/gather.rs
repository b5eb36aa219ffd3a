//! From rows on disk to a batch's f32: strided gather, byte order, narrowing, rectification and normalisation in one pass.
//!
//! The kind of element and of transform is chosen once per call; the inner loop is compiled for each.

use super::{Member, Order, Scalar};

/// Transformation of a number between file and batch: `(rectify(x) - mean) * inverse_std`, per channel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transform {
    /// Full-wave rectification, before normalisation.
    pub rectify: bool,
    pub normalise: Option<Affine>,
}

/// Per-channel normalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct Affine {
    pub mean: Vec<f32>,
    pub inverse_std: Vec<f32>,
}

impl Transform {
    /// Values as they are.
    pub const IDENTITY: Transform = Transform { rectify: false, normalise: None };
}

/// Gathers `member` out of `src`, rows of `stride` bytes, into `out`, f32 `[rows, member.len]` in native byte order; the
/// number of rows is that of `out`. `member.offset` is relative to each row of `src`.
///
/// A normalising transform must hold `member.len` channels; channels beyond are left out.
pub fn gather(src: &[u8], stride: usize, member: &Member, transform: &Transform, out: &mut [u8]) {
    match (member.scalar, member.order) {
        (Scalar::F32, Order::Little) => transformed::<4>(src, stride, member, transform, out, f32::from_le_bytes),
        (Scalar::F32, Order::Big) => transformed::<4>(src, stride, member, transform, out, f32::from_be_bytes),
        (Scalar::F64, Order::Little) => {
            transformed::<8>(src, stride, member, transform, out, |bytes| f64::from_le_bytes(bytes) as f32)
        }
        (Scalar::F64, Order::Big) => {
            transformed::<8>(src, stride, member, transform, out, |bytes| f64::from_be_bytes(bytes) as f32)
        }
    }
}

fn transformed<const B: usize>(
    src: &[u8],
    stride: usize,
    member: &Member,
    transform: &Transform,
    out: &mut [u8],
    read: impl Fn([u8; B]) -> f32,
) {
    match (transform.rectify, &transform.normalise) {
        (false, None) => sized(src, stride, member, out, |bytes, _| read(bytes)),
        (true, None) => sized(src, stride, member, out, |bytes, _| read(bytes).abs()),
        (false, Some(affine)) => normalised(src, stride, member, affine, out, read),
        (true, Some(affine)) => normalised(src, stride, member, affine, out, |bytes| read(bytes).abs()),
    }
}

fn normalised<const B: usize>(
    src: &[u8],
    stride: usize,
    member: &Member,
    affine: &Affine,
    out: &mut [u8],
    read: impl Fn([u8; B]) -> f32,
) {
    let (mean, inverse_std) = (&affine.mean[..], &affine.inverse_std[..]);
    if mean.len() == 16 && inverse_std.len() == 16 && member.len == 16 {
        // Arrays of known length stay in registers.
        let (mut m, mut s) = ([0f32; 16], [0f32; 16]);
        m.copy_from_slice(mean);
        s.copy_from_slice(inverse_std);
        return sized(src, stride, member, out, |bytes, c| (read(bytes) - m[c & 15]) * s[c & 15]);
    }
    sized(src, stride, member, out, |bytes, c| match (mean.get(c), inverse_std.get(c)) {
        (Some(m), Some(s)) => (read(bytes) - m) * s,
        _ => 0.0,
    });
}

/// Unrolls the lengths that occur; any other length takes the loop with a run-time bound.
fn sized<const B: usize>(
    src: &[u8],
    stride: usize,
    member: &Member,
    out: &mut [u8],
    f: impl Fn([u8; B], usize) -> f32,
) {
    match member.len {
        16 => rows::<B, 16>(src, stride, member, out, f),
        20 => rows::<B, 20>(src, stride, member, out, f),
        _ => rows::<B, 0>(src, stride, member, out, f),
    }
}

#[inline(always)]
fn rows<const B: usize, const LEN: usize>(
    src: &[u8],
    stride: usize,
    member: &Member,
    out: &mut [u8],
    f: impl Fn([u8; B], usize) -> f32,
) {
    let len = if LEN == 0 { member.len } else { LEN };
    for (row, out) in src.chunks(stride).zip(out.chunks_exact_mut(4 * len)) {
        let cells = row[member.offset..member.offset + B * len].as_chunks::<B>().0;
        let out = out.as_chunks_mut::<4>().0;
        for channel in 0..len {
            out[channel] = f(cells[channel], channel).to_ne_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(scalar: Scalar, order: Order, len: usize, transform: &Transform) {
        let (rows, stride, offset) = (7, 5 + 8 * len, 3);
        let value = |row: usize, channel: usize| (row as f64 - 3.0) * 1.25 + channel as f64 * 0.5;
        let mut src = vec![0xAA; rows * stride];
        for row in 0..rows {
            for channel in 0..len {
                let at = row * stride + offset + channel * scalar.bytes();
                let v = value(row, channel);
                let bytes = match (scalar, order) {
                    (Scalar::F32, Order::Little) => (v as f32).to_le_bytes().to_vec(),
                    (Scalar::F32, Order::Big) => (v as f32).to_be_bytes().to_vec(),
                    (Scalar::F64, Order::Little) => v.to_le_bytes().to_vec(),
                    (Scalar::F64, Order::Big) => v.to_be_bytes().to_vec(),
                };
                src[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        let member = Member { name: String::new(), offset, scalar, order, len };
        let mut out = vec![0; rows * len * 4];
        gather(&src, stride, &member, transform, &mut out);
        for (i, cell) in out.as_chunks::<4>().0.iter().enumerate() {
            let mut want = value(i / len, i % len) as f32;
            if transform.rectify {
                want = want.abs();
            }
            if let Some(affine) = &transform.normalise {
                want = (want - affine.mean[i % len]) * affine.inverse_std[i % len];
            }
            assert_eq!(f32::from_ne_bytes(*cell), want, "{scalar:?} {order:?} len {len} cell {i}");
        }
    }

    #[test]
    fn every_kind_of_element_and_transform() {
        for len in [1, 3, 16, 20] {
            let affine = Affine {
                mean: (0..len).map(|c| c as f32 * 0.3).collect(),
                inverse_std: (0..len).map(|c| 1.0 / (1.0 + c as f32)).collect(),
            };
            for scalar in [Scalar::F32, Scalar::F64] {
                for order in [Order::Little, Order::Big] {
                    for rectify in [false, true] {
                        for normalise in [None, Some(affine.clone())] {
                            check(scalar, order, len, &Transform { rectify, normalise });
                        }
                    }
                }
            }
        }
    }
}
