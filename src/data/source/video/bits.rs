//! Runs of bits, least significant bit first, as spike cameras write them.

/// Bytes of a row of `bits` bits.
pub fn row_bytes(bits: usize) -> usize {
    bits.div_ceil(8)
}

/// Copies `bits` bits from bit `from` of `source` to the start of `out`; what is left of the last byte becomes zero.
/// Bits that `source` does not have read as zero.
pub fn copy_bits(source: &[u8], from: usize, out: &mut [u8], bits: usize) {
    let (first, shift) = (from / 8, from % 8);
    let out = &mut out[..row_bytes(bits)];
    let source = source.get(first..).unwrap_or_default();
    if shift == 0 {
        let whole = out.len().min(source.len());
        out[..whole].copy_from_slice(&source[..whole]);
        out[whole..].fill(0);
    } else {
        let mut low = source.first().copied().unwrap_or(0);
        for (n, byte) in out.iter_mut().enumerate() {
            let high = source.get(n + 1).copied().unwrap_or(0);
            *byte = (low >> shift) | (high << (8 - shift));
            low = high;
        }
    }
    if !bits.is_multiple_of(8)
        && let Some(last) = out.last_mut()
    {
        *last &= (1 << (bits % 8)) - 1;
    }
}

/// Packs bytes of 0 and `one`, which is not 0, into the bits of `out`; returns the place of the first byte that is neither.
pub fn pack(bytes: &[u8], one: u8, out: &mut [u8]) -> Option<usize> {
    if one == 1 {
        return pack_ones(bytes, out);
    }
    for (eight, out) in bytes.chunks(8).zip(out.iter_mut()) {
        *out = eight.iter().enumerate().fold(0, |packed, (n, byte)| packed | u8::from(*byte == one) << n);
    }
    bytes.iter().position(|byte| *byte != 0 && *byte != one)
}

fn pack_ones(bytes: &[u8], out: &mut [u8]) -> Option<usize> {
    /// One bit per byte.
    const ONES: u64 = 0x0101_0101_0101_0101;
    /// Moves bit 8i to bit 56 + i.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let mut wrong = 0;
    let mut eights = bytes.chunks_exact(8);
    for (eight, out) in eights.by_ref().zip(out.iter_mut()) {
        let word = u64::from_le_bytes(std::array::from_fn(|n| eight[n]));
        wrong |= word & !ONES;
        *out = ((word & ONES).wrapping_mul(GATHER) >> 56) as u8;
    }
    if let (rest @ [_, ..], Some(last)) = (eights.remainder(), out.get_mut(bytes.len() / 8)) {
        *last = rest.iter().enumerate().fold(0, |packed, (n, byte)| packed | (byte & 1) << n);
        wrong |= rest.iter().fold(0, |wrong, byte| wrong | u64::from(byte & !1));
    }
    if wrong == 0 { None } else { bytes.iter().position(|byte| *byte > 1) }
}

/// The bit at `index`.
pub fn bit(bytes: &[u8], index: usize) -> bool {
    bytes.get(index / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_and_reading_bits_give_the_bytes_back(spikes in proptest::collection::vec(0u8..2, 0..200)) {
            let mut packed = vec![0xFF; row_bytes(spikes.len())];
            prop_assert_eq!(pack(&spikes, 1, &mut packed), None);
            let back: Vec<u8> = (0..spikes.len()).map(|n| u8::from(bit(&packed, n))).collect();
            prop_assert_eq!(&back, &spikes);
            prop_assert!((spikes.len()..packed.len() * 8).all(|n| !bit(&packed, n)));
            let masks: Vec<u8> = spikes.iter().map(|spike| spike * 255).collect();
            let mut of_masks = vec![0xFF; packed.len()];
            prop_assert_eq!(pack(&masks, 255, &mut of_masks), None);
            prop_assert_eq!(of_masks, packed);
        }

        #[test]
        fn any_run_of_bits_is_copied_exactly(source in proptest::collection::vec(any::<u8>(), 1..40), from in 0usize..200, bits in 1usize..120) {
            let mut out = vec![0xAA; row_bytes(bits)];
            copy_bits(&source, from, &mut out, bits);
            for n in 0..out.len() * 8 {
                prop_assert_eq!(bit(&out, n), n < bits && bit(&source, from + n), "bit {}", n);
            }
        }
    }

    #[test]
    fn a_byte_that_is_no_spike_is_found() {
        let mut bytes = vec![1; 21];
        assert_eq!(pack(&bytes, 1, &mut [0; 3]), None);
        bytes[20] = 2;
        assert_eq!(pack(&bytes, 1, &mut [0; 3]), Some(20));
        bytes[3] = 0x81;
        assert_eq!(pack(&bytes, 1, &mut [0; 3]), Some(3));
        assert_eq!(pack(&[0, 2, 2, 0, 1], 2, &mut [0; 1]), Some(4));
    }
}
