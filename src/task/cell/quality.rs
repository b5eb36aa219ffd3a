//! How much generated cells are like real ones: pure functions of expression matrices `[N, G]` (normalised, log1p).
//!
//! | measure | meaning | best |
//! |---|---|---|
//! | Spearman | rank correlation of the genes' means | 1; unit noise through the decoder has .98: it cannot fail alone |
//! | MMD | squared maximum mean discrepancy on the first 50 principal components of both, biased estimate, sum of five Gaussians | 0 |
//! | joint MMD | the same with kernels as wide as both sets together ask for, as published scripts take it | 0 |
//! | share per type | cells by the nearest centroid of the real types | that of the real cells |

use tch::{Kind, Tensor};

/// Principal components that MMD is computed on.
const COMPONENTS: i64 = 50;
/// Gaussians of the kernel, each twice as wide as the one before.
const KERNELS: i32 = 5;

/// Rank correlation; ties have their mean rank. `None`: one of them is constant, or lengths differ.
pub fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    (a.len() == b.len()).then(|| pearson(&ranks(a), &ranks(b)))?
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    while start < order.len() {
        let same = order[start..].iter().take_while(|&&i| values[i] == values[order[start]]).count();
        let mean = start as f64 + (same - 1) as f64 / 2.0;
        order[start..start + same].iter().for_each(|&i| ranks[i] = mean);
        start += same;
    }
    ranks
}

fn pearson(a: &[f64], b: &[f64]) -> Option<f64> {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let pairs = || a.iter().zip(b).map(|(a, b)| (a - mean_a, b - mean_b));
    let (ab, aa, bb) = pairs().fold((0.0, 0.0, 0.0), |(ab, aa, bb), (a, b)| (ab + a * b, aa + a * a, bb + b * b));
    (aa > 0.0 && bb > 0.0).then(|| ab / (aa * bb).sqrt())
}

/// Means of the genes, `[G]`.
pub fn gene_means(cells: &Tensor) -> Vec<f64> {
    let means = cells.mean_dim([0i64].as_slice(), false, Kind::Double);
    Vec::try_from(means).unwrap_or_default()
}

/// Coordinates of the rows of `cells` on their first `count` principal components, f64 `[N, ≤ count]`.
pub fn principal_components(cells: &Tensor, count: i64) -> Tensor {
    let cells = cells.to_kind(Kind::Double);
    let centred = &cells - cells.mean_dim([0i64].as_slice(), true, Kind::Double);
    let (rows, genes) = (centred.size()[0], centred.size()[1]);
    let count = count.min(rows).min(genes);
    // The smaller of the two products has the same spectrum. Eigenvalues rise: the last ones are the first components.
    if genes <= rows {
        let (_, vectors) = centred.transpose(0, 1).matmul(&centred).linalg_eigh("L");
        centred.matmul(&vectors.narrow(1, genes - count, count).flip([1]))
    } else {
        let (values, vectors) = centred.matmul(&centred.transpose(0, 1)).linalg_eigh("L");
        let scale = values.narrow(0, rows - count, count).flip([0]).clamp_min(0.0).sqrt();
        vectors.narrow(1, rows - count, count).flip([1]) * scale
    }
}

/// Biased squared MMD of two sets of cells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mmd {
    /// Widths of the kernels follow from the real cells alone: values of several runs on the same cells can be compared.
    pub by_real: f64,
    /// Widths follow from both sets, as in published scripts. Generated cells that are far off widen the kernels until these take
    /// them for near ones.
    pub joint: f64,
}

/// [`Mmd`] on the first 50 principal components of both sets together; as many cells of each as the smaller set has. `None`: a set
/// has fewer than two cells.
pub fn mmd(real: &Tensor, generated: &Tensor) -> Option<Mmd> {
    let cells = real.size()[0].min(generated.size()[0]);
    if cells < 2 {
        return None;
    }
    let both = Tensor::cat(&[evenly(real, cells), evenly(generated, cells)], 0);
    Some(mmd_of(&principal_components(&both, COMPONENTS)))
}

/// `count` rows at even distances: files may be sorted by type.
pub fn evenly(cells: &Tensor, count: i64) -> Tensor {
    let rows = cells.size()[0];
    let places: Vec<i64> = (0..count).map(|n| n * rows / count.max(1)).collect();
    cells.index_select(0, &Tensor::from_slice(&places))
}

/// MMD of the first half of the rows, which are real, and the second.
fn mmd_of(both: &Tensor) -> Mmd {
    let half = both.size()[0] / 2;
    let norms = both.square().sum_dim_intlist([1i64].as_slice(), true, Kind::Double);
    let distances = (&norms + norms.transpose(0, 1) - both.matmul(&both.transpose(0, 1)) * 2.0).clamp_min(0.0);
    let with_width_of = |rows: i64| {
        let of = distances.narrow(0, 0, rows).narrow(1, 0, rows);
        let mean = of.sum(Kind::Double).double_value(&[]) / (rows * (rows - 1)) as f64;
        let kernel = |n: i32| (&distances / -(mean / 4.0 * 2f64.powi(n))).exp();
        let sum = (1..KERNELS).fold(kernel(0), |sum, n| sum + kernel(n));
        let part = |row: i64, column: i64| {
            sum.narrow(0, row * half, half).narrow(1, column * half, half).mean(Kind::Double).double_value(&[])
        };
        part(0, 0) + part(1, 1) - part(0, 1) - part(1, 0)
    };
    Mmd { by_real: with_width_of(half), joint: with_width_of(2 * half) }
}

/// Real cells by type.
pub struct Types {
    /// Mean expression of each type that has cells, f32 `[K, G]`.
    centroids: Tensor,
    /// Classes of the rows of `centroids`.
    classes: Vec<i64>,
    /// Share of each of them.
    shares: Vec<f64>,
    /// Variance of the real cells within their types, mean over entries.
    pub variance_within: f64,
}

impl Types {
    /// Measures real cells `[N, G]` with their classes `[N]` (−1: none). `None`: no cell has a class.
    pub fn new(cells: &Tensor, labels: &[i64]) -> Option<Self> {
        let mut classes: Vec<i64> = labels.iter().copied().filter(|&label| label >= 0).collect();
        classes.sort_unstable();
        classes.dedup();
        let mut centroids = Vec::new();
        let (mut shares, mut squares, mut count) = (Vec::new(), 0.0, 0.0);
        for &class in &classes {
            let rows: Vec<i64> = (0..labels.len() as i64).filter(|&row| labels[row as usize] == class).collect();
            let of_class = cells.index_select(0, &Tensor::from_slice(&rows));
            let centroid = of_class.mean_dim([0i64].as_slice(), true, Kind::Float);
            squares += (of_class - &centroid).square().sum(Kind::Double).double_value(&[]);
            count += rows.len() as f64;
            centroids.push(centroid);
            shares.push(rows.len() as f64);
        }
        shares.iter_mut().for_each(|share| *share /= count);
        let variance_within = squares / (count * cells.size().get(1).copied().unwrap_or(1) as f64);
        (!classes.is_empty()).then(|| Self { centroids: Tensor::cat(&centroids, 0), classes, shares, variance_within })
    }

    /// Class of the nearest centroid of each cell.
    pub fn nearest(&self, cells: &Tensor) -> Vec<i64> {
        let places = Tensor::cdist(&cells.to_kind(Kind::Float), &self.centroids, 2.0, None).argmin(1, false);
        let places = Vec::<i64>::try_from(places).unwrap_or_default();
        places.iter().map(|&place| self.classes[place as usize]).collect()
    }

    /// For each class that real cells have: the class, its share of the real cells and of `cells`.
    pub fn shares(&self, nearest: &[i64]) -> Vec<(i64, f64, f64)> {
        let share = |class: i64| nearest.iter().filter(|&&n| n == class).count() as f64 / nearest.len().max(1) as f64;
        self.classes.iter().zip(&self.shares).map(|(&class, &real)| (class, real, share(class))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Values of `scipy.stats.spearmanr`.
    #[test]
    fn spearman_ranks_with_ties() {
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[10.0, 20.0, 15.0]), Some(0.5));
        let tied = spearman(&[1.0, 2.0, 2.0, 4.0], &[1.0, 3.0, 2.0, 4.0]).unwrap();
        assert!((tied - 0.948_683_298_050_513_8).abs() < 1e-12, "{tied}");
        assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), None);
        assert_eq!(spearman(&[1.0], &[1.0, 2.0]), None);
    }

    /// Both ways of computing components agree up to their signs, and rotations of the data do not matter to MMD.
    #[test]
    fn components_are_the_same_from_either_product() {
        tch::manual_seed(1);
        let cells = Tensor::randn([12, 30], CPU) * Tensor::arange(30, CPU);
        let wide = principal_components(&cells, 5);
        let tall = principal_components(&Tensor::cat(&[&cells, &cells, &cells], 0), 5).narrow(0, 0, 12);
        assert!((wide.abs() - tall.abs()).abs().max().double_value(&[]) < 1e-8);
        let spread = wide.var_dim([0i64].as_slice(), false, false);
        let spread = Vec::<f64>::try_from(spread).unwrap();
        assert!(spread.windows(2).all(|pair| pair[0] >= pair[1]), "{spread:?}");
    }

    #[test]
    fn mmd_is_small_for_one_distribution_and_large_for_two() {
        tch::manual_seed(2);
        let draw = |shift: f64| Tensor::randn([300, 20], CPU) + shift;
        for of in [|mmd: Mmd| mmd.by_real, |mmd: Mmd| mmd.joint] {
            let value = |a: f64, b: f64| of(mmd(&draw(a), &draw(b)).unwrap());
            let (same, other) = (value(0.0, 0.0), value(0.0, 2.0));
            assert!(same < 0.05 && other > 1.0, "{same} and {other}");
        }
        assert_eq!(mmd(&draw(0.0), &draw(0.0).narrow(0, 0, 1)), None);
    }

    /// All cells are five times as spread out as real ones, and one in ten is very far off. The same by numpy: 1.88 and .05.
    #[test]
    fn cells_that_are_far_off_do_not_hide_behind_wide_kernels() {
        tch::manual_seed(3);
        let draw = |rows: i64, spread: f64| Tensor::randn([rows, 20], CPU) * spread;
        let Mmd { by_real, joint } =
            mmd(&draw(300, 1.0), &Tensor::cat(&[draw(270, 5.0), draw(30, 1000.0)], 0)).unwrap();
        assert!(by_real > 1.7 && joint < 0.1, "{by_real} {joint}");
    }

    /// The formula, on two points of each: one kernel sum written out.
    #[test]
    fn mmd_is_the_formula() {
        let both = Tensor::from_slice(&[0.0f64, 1.0, 3.0, 4.0]).view([4, 1]);
        // Squared distances: 1 within both sets; 9, 16, 4, 9 across. Mean over the 12 ordered pairs, and over the 2 of real points.
        let joint = (2.0 * (1.0 + 1.0) + 2.0 * (9.0 + 16.0 + 4.0 + 9.0)) / 12.0;
        let expected = |mean: f64| {
            let kernel = |d: f64| (0..5).map(|n| (-d / (mean / 4.0 * 2f64.powi(n))).exp()).sum::<f64>();
            let within = (2.0 * kernel(0.0) + 2.0 * kernel(1.0)) / 4.0;
            let across = (kernel(9.0) + kernel(16.0) + kernel(4.0) + kernel(9.0)) / 4.0;
            2.0 * (within - across)
        };
        let found = mmd_of(&both);
        assert!((found.joint - expected(joint)).abs() < 1e-12, "{found:?}");
        assert!((found.by_real - expected(1.0)).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn types_have_centroids_shares_and_the_variance_within() {
        let cells = Tensor::from_slice(&[0f32, 0.0, 2.0, 0.0, 10.0, 10.0, 5.0, 5.0]).view([4, 2]);
        let types = Types::new(&cells, &[3, 3, 7, -1]).unwrap();
        // Of four entries of class 3, two are 1 off; those of class 7 are their own centroid.
        assert!((types.variance_within - 2.0 / 6.0).abs() < 1e-9, "{}", types.variance_within);
        assert_eq!(types.nearest(&cells), [3, 3, 7, 3]);
        let shares = types.shares(&types.nearest(&cells));
        assert_eq!(shares, [(3, 2.0 / 3.0, 0.75), (7, 1.0 / 3.0, 0.25)]);
        assert!(Types::new(&cells, &[-1; 4]).is_none());
    }
}
