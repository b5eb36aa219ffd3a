//! Kept detections of a validation, as ranks exchange them: 8 bytes for each, 8 for an image.
//!
//! An exact precision-recall curve needs every detection's confidence. At most `max_det` of an image are kept, so the
//! records of an image have at most `8 + 8 · max_det` bytes: 2.4 KB by default, 12 MB for the 5,000 images of COCO's
//! validation. Predictions themselves (8,400 boxes of 80 classes for an image) are never kept.

use crate::task::yolo::detect::Detection;

/// Bytes of an image's head and of a detection.
const WORD: usize = 8;

/// A detection that was matched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judged {
    pub confidence: f32,
    pub class: u16,
    /// A bit per threshold at which it is right.
    pub right: u16,
}

/// Judged detections of images, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records(Vec<u8>);

impl Records {
    /// Adds an image. `sample` orders images of all ranks.
    pub fn add(&mut self, sample: u64, found: &[Detection], right: &[u16]) {
        let count = found.len().min(right.len()) as u32;
        self.0.extend((sample as u32).to_le_bytes());
        self.0.extend(count.to_le_bytes());
        for (object, right) in found.iter().zip(right) {
            self.0.extend(object.confidence.to_le_bytes());
            self.0.extend(object.class.to_le_bytes());
            self.0.extend(right.to_le_bytes());
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// Detections of all ranks' records, by the number of their sample: the same order for every number of ranks. Bytes that
/// are none of [`Records`] end a rank's part.
pub fn together(ranks: &[Vec<u8>]) -> Vec<Judged> {
    let mut images: Vec<(u32, &[u8])> = Vec::new();
    for mut bytes in ranks.iter().map(Vec::as_slice) {
        while let Some((head, rest)) = bytes.split_first_chunk::<WORD>() {
            let [a, b, c, d, e, f, g, h] = *head;
            let (sample, count) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
            let Some((own, next)) = rest.split_at_checked(count as usize * WORD) else { break };
            images.push((sample, own));
            bytes = next;
        }
    }
    images.sort_by_key(|(sample, _)| *sample);
    let judged = |word: &[u8; WORD]| {
        let [a, b, c, d, e, f, g, h] = *word;
        Judged {
            confidence: f32::from_le_bytes([a, b, c, d]),
            class: u16::from_le_bytes([e, f]),
            right: u16::from_le_bytes([g, h]),
        }
    };
    images.iter().flat_map(|(_, own)| own.as_chunks::<WORD>().0.iter().map(judged)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detections_are_in_the_order_of_samples_however_ranks_had_them() {
        let object = |confidence: f32, class: u16| Detection { corners: [0.0; 4], confidence, class };
        let images = [(0, vec![object(0.9, 1), object(0.1, 0)]), (1, vec![]), (2, vec![object(0.5, 300)])];
        let records = |numbers: &[usize]| {
            let mut records = Records::default();
            for number in numbers {
                let (sample, found) = &images[*number];
                records.add(*sample, found, &vec![*sample as u16 + 1; found.len()]);
            }
            records.bytes().to_vec()
        };
        let one = together(&[records(&[0, 1, 2])]);
        assert_eq!(one.len(), 3);
        assert_eq!(one[2], Judged { confidence: 0.5, class: 300, right: 3 });
        assert_eq!(together(&[records(&[2, 0]), records(&[1])]), one);
        assert_eq!(together(&[records(&[0])[..12].to_vec(), records(&[2])]).len(), 1);
    }
}
