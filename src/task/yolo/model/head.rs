//! The head: at each of three levels a branch for boxes and one for classes.

use super::layers::{Conv, Last};
use tch::{Kind, Tensor, nn};

/// Bins of a side's distance.
pub const BINS: i64 = 16;
/// Pixels per cell of each level.
pub const STRIDES: [i64; 3] = [8, 16, 32];
/// First biases of the box branches. Source: TASKS 2.7.1.
const BOX_BIAS: f64 = 2.0;
/// Objects per image and side of the image that the first biases of the class branches assume.
const FIRST_OBJECTS: (f64, f64) = (5.0, 640.0);

/// Raw output of a forward pass over all anchors.
pub struct Raw {
    /// Logits of the sides' bins, `[B, 4 · BINS, A]`.
    pub boxes: Tensor,
    /// Logits of the classes, `[B, C, A]`.
    pub classes: Tensor,
    /// Cells of each level: rows, columns.
    pub cells: [(i64, i64); 3],
}

impl Raw {
    /// Rows of anchors.
    pub fn anchors(&self) -> Anchors {
        Anchors::new(self.cells, self.boxes.device())
    }

    /// The same in f32, whatever autocast made of it.
    pub fn widened(self) -> Self {
        Self { boxes: self.boxes.to_kind(Kind::Float), classes: self.classes.to_kind(Kind::Float), ..self }
    }
}

/// Centres of all cells, level by level, row by row.
pub struct Anchors {
    /// f32 `[A, 2]`: x, y in cells of the own level.
    pub centres: Tensor,
    /// f32 `[A, 1]`: pixels per cell.
    pub strides: Tensor,
}

impl Anchors {
    pub fn new(cells: [(i64, i64); 3], device: tch::Device) -> Self {
        let options = (Kind::Float, device);
        let (mut centres, mut strides) = (Vec::new(), Vec::new());
        for ((rows, columns), stride) in cells.into_iter().zip(STRIDES) {
            let (x, y) = (Tensor::arange(columns, options) + 0.5, Tensor::arange(rows, options) + 0.5);
            let x = x.unsqueeze(0).expand([rows, columns], false);
            let y = y.unsqueeze(1).expand([rows, columns], false);
            centres.push(Tensor::stack(&[x, y], -1).view([-1, 2]));
            strides.push(Tensor::full([rows * columns, 1], stride as f64, options));
        }
        Self { centres: Tensor::cat(&centres, 0), strides: Tensor::cat(&strides, 0) }
    }
}

/// Boxes `[..., A, 4]` (left, top, right, bottom in cells) from distances to the sides; `[A, 2]` centres.
pub fn boxes_from_sides(sides: &Tensor, centres: &Tensor) -> Tensor {
    let parts = sides.chunk(2, -1);
    Tensor::cat(&[centres - &parts[0], centres + &parts[1]], -1)
}

/// Distances `[..., 4]` to the sides as the mean of their bins; logits `[..., 4 · BINS]`.
pub fn expected_sides(logits: &Tensor) -> Tensor {
    let mut shape = logits.size();
    shape.pop();
    shape.extend([4, BINS]);
    let bins = Tensor::arange(BINS, (Kind::Float, logits.device()));
    logits.reshape(shape).softmax(-1, Kind::Float).matmul(&bins)
}

/// One branch: two 3×3 convolutions and a 1×1.
struct Branch {
    first: Conv,
    second: Conv,
    last: Last,
}

impl Branch {
    fn new(vs: &nn::Path, [inputs, hidden, outputs]: [i64; 3], bias: f64) -> Self {
        Self {
            first: Conv::new(&(vs / 0), inputs, hidden, 3, 1),
            second: Conv::new(&(vs / 1), hidden, hidden, 3, 1),
            last: Last::new(&(vs / 2), hidden, outputs, bias),
        }
    }

    fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        self.last.forward(&self.second.forward(&self.first.forward(x, train), train))
    }
}

/// All branches: `cv2.LEVEL` for boxes, `cv3.LEVEL` for classes, and the fixed kernel `dfl.conv.weight` that other
/// programs expect in a file of weights.
pub struct Head {
    boxes: Vec<Branch>,
    classes: Vec<Branch>,
}

impl Head {
    /// `channels` of the three levels.
    pub fn new(vs: &nn::Path, channels: [i64; 3], classes: i64) -> Self {
        let box_hidden = (channels[0] / 4).max(BINS).max(4 * BINS);
        let class_hidden = channels[0].max(classes.min(100));
        let (for_boxes, for_classes) = (vs / "cv2", vs / "cv3");
        let branch = |level: usize, boxes: bool| {
            let (path, hidden, outputs, bias) = if boxes {
                (&for_boxes / level, box_hidden, 4 * BINS, BOX_BIAS)
            } else {
                let (objects, side) = FIRST_OBJECTS;
                let cells = (side / STRIDES[level] as f64).powi(2);
                (&for_classes / level, class_hidden, classes, (objects / classes.max(1) as f64 / cells).ln())
            };
            Branch::new(&path, [channels[level], hidden, outputs], bias)
        };
        let kernel = Tensor::arange(BINS, (Kind::Float, vs.device())).view([1, BINS, 1, 1]);
        let _ = vs.sub("dfl").sub("conv").add("weight", kernel, false);
        Self {
            boxes: (0..3).map(|level| branch(level, true)).collect(),
            classes: (0..3).map(|level| branch(level, false)).collect(),
        }
    }

    pub fn forward(&self, levels: [Tensor; 3], train: bool) -> Raw {
        let mut cells = [(0, 0); 3];
        let (mut boxes, mut classes) = (Vec::new(), Vec::new());
        for (level, x) in levels.iter().enumerate() {
            let size = x.size();
            cells[level] = (size[2], size[3]);
            boxes.push(self.boxes[level].forward(x, train).flatten(2, -1));
            classes.push(self.classes[level].forward(x, train).flatten(2, -1));
        }
        Raw { boxes: Tensor::cat(&boxes, 2), classes: Tensor::cat(&classes, 2), cells }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn anchors_are_cell_centres_level_by_level() {
        let anchors = Anchors::new([(1, 2), (1, 1), (1, 1)], Device::Cpu);
        let centres: Vec<f32> = Vec::try_from(anchors.centres.flatten(0, -1)).unwrap();
        assert_eq!(centres, [0.5, 0.5, 1.5, 0.5, 0.5, 0.5, 0.5, 0.5]);
        let strides: Vec<f32> = Vec::try_from(anchors.strides.flatten(0, -1)).unwrap();
        assert_eq!(strides, [8.0, 8.0, 16.0, 32.0]);
    }

    #[test]
    fn sides_are_the_means_of_their_bins() {
        let mut logits = vec![0f32; 64];
        // Left certain at bin 3, bottom between 0 and 1.
        logits[3] = 100.0;
        logits[48] = 100.0;
        logits[49] = 100.0;
        let sides = expected_sides(&Tensor::from_slice(&logits).view([1, 1, 64]));
        let sides: Vec<f32> = Vec::try_from(sides.flatten(0, -1)).unwrap();
        for (side, expected) in sides.iter().zip([3.0, 7.5, 7.5, 0.5]) {
            assert!((side - expected).abs() < 1e-5, "{sides:?}");
        }
        let boxes = boxes_from_sides(&Tensor::from_slice(&sides).view([1, 4]), &Tensor::from_slice(&[4f32, 8.0]));
        let boxes: Vec<f32> = Vec::try_from(boxes.flatten(0, -1)).unwrap();
        assert_eq!(boxes, [1.0, 0.5, 11.5, 8.5]);
    }
}
