//! Sample cells in the true format: counts of a few types, learnable by design, with genes and cells that filters leave out.
//!
//! A type's profile is log-normal, with one gene in ten expressed eight times as much. A cell's library is log-normal around
//! 3,000; its counts are Poisson around library × profile. They are drawn as that many single molecules, which is the same and
//! costs a draw per molecule instead of one per gene.

use crate::data::DataError;
use crate::data::loader::mix;
use crate::data::source::h5ad::Form;
use crate::data::source::h5ad::write::{Column, Storage, Writer};
use crate::data::source::in_threads;
use crate::task::SampleRequest;
use crate::task::sample::{Random, new_folder};
use std::path::Path;

/// Types of cells, and their shares.
pub(super) const TYPES: [(&str, f64); 5] =
    [("B cell", 0.28), ("T cell", 0.24), ("hepatocyte", 0.2), ("macrophage", 0.16), ("neuron", 0.12)];
/// Molecules of a cell, in the middle.
const LIBRARY: f64 = 3000.0;
/// Spread of the logarithm of libraries, and of profiles.
const LIBRARY_SPREAD: f64 = 0.3;
const PROFILE_SPREAD: f64 = 1.0;
/// Share of genes that mark a type, and how much more of them it expresses.
const MARKERS: f64 = 0.1;
const MARKED: f64 = 8.0;
/// Genes that no cell expresses, and cells with next to nothing.
pub(super) const EMPTY_GENES: usize = 20;
pub(super) const POOR_CELLS: usize = 5;
/// Cells that threads make at a time.
const BLOCK: usize = 512;

/// Request for sample cells.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleSpec {
    pub cells: usize,
    pub genes: usize,
    pub layout: Layout,
    pub seed: u64,
}

/// How sample cells are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Csr,
    /// CSR with compressed chunks.
    Gzip,
    Dense,
}

impl Default for SampleSpec {
    fn default() -> Self {
        Self { cells: 1500, genes: 500, layout: Layout::Csr, seed: 42 }
    }
}

/// Writes what `request` asks for.
///
/// # Errors
/// An unknown layout, too few cells or genes, or no room.
pub fn write(request: &SampleRequest) -> Result<(), DataError> {
    let layout = match request.layout.as_deref().unwrap_or("csr") {
        "csr" => Layout::Csr,
        "gzip" => Layout::Gzip,
        "dense" => Layout::Dense,
        other => {
            return Err(DataError::setting(
                "--layout",
                format!("--layout {other} is unknown: choose csr, gzip or dense"),
            ));
        }
    };
    let usual = SampleSpec::default();
    let (cells, genes) = (request.cells.unwrap_or(usual.cells), request.genes.unwrap_or(usual.genes));
    write_sample_data(&request.out, &SampleSpec { cells, genes, layout, seed: request.seed })
}

/// Writes `cells.h5ad` into the new folder `out`, which is never half there. Memory does not grow with the cells, a few bytes
/// each aside.
///
/// # Errors
/// Too few cells or genes; `out` exists and is not an empty folder, or there is no room or permission.
pub fn write_sample_data(out: &Path, spec: &SampleSpec) -> Result<(), DataError> {
    if spec.genes < 4 * EMPTY_GENES || spec.cells < 10 * POOR_CELLS {
        let problem = format!(
            "{} cells and {} genes: sample data has at least {} cells and {} genes (--cells, --genes)",
            spec.cells,
            spec.genes,
            10 * POOR_CELLS,
            4 * EMPTY_GENES
        );
        return Err(DataError::setting("--cells", problem));
    }
    new_folder(out, |folder| write_file(&folder.join("cells.h5ad"), spec))
}

fn write_file(path: &Path, spec: &SampleSpec) -> Result<(), DataError> {
    let names: Vec<String> = (0..spec.genes).map(|gene| format!("Gene{gene:05}")).collect();
    let storage = Storage {
        form: if spec.layout == Layout::Dense { Form::Dense } else { Form::Csr },
        gzip: (spec.layout == Layout::Gzip).then_some(4),
    };
    let mut writer = Writer::create(path, &names, &storage)?;
    let tissue = Tissue::new(spec);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    let blocks: Vec<usize> = (0..spec.cells).step_by(BLOCK).collect();
    let mut codes = Vec::with_capacity(spec.cells);
    for some in blocks.chunks(threads) {
        let made = in_threads(threads, some, |first| tissue.cells(*first, (*first + BLOCK).min(spec.cells)));
        for cell in made.into_iter().flatten() {
            writer.cell(&cell.ids, &cell.counts)?;
            codes.push(cell.of);
        }
    }
    let categories = TYPES.iter().map(|(name, _)| name.to_string()).collect();
    writer.finish(None, &[Column { name: "celltype".into(), codes, categories }])
}

struct Cell {
    ids: Vec<u32>,
    counts: Vec<f32>,
    of: i32,
}

/// The types' profiles, ready to draw molecules from.
struct Tissue {
    seed: u64,
    genes: usize,
    cells: usize,
    types: Vec<Alias>,
}

impl Tissue {
    fn new(spec: &SampleSpec) -> Self {
        let mut random = Random(spec.seed ^ 0x43_454C_4C53);
        let mut order: Vec<usize> = (0..spec.genes).collect();
        for n in (1..order.len()).rev() {
            order.swap(n, (random.uniform() * (n + 1) as f64) as usize);
        }
        let empty = &order[..EMPTY_GENES];
        let base: Vec<f64> = (0..spec.genes).map(|_| (PROFILE_SPREAD * random.normal()).exp()).collect();
        let types = TYPES.iter().map(|_| {
            let mut weights: Vec<f64> =
                base.iter().map(|weight| weight * if random.uniform() < MARKERS { MARKED } else { 1.0 }).collect();
            empty.iter().for_each(|gene| weights[*gene] = 0.0);
            Alias::new(&weights)
        });
        Self { seed: spec.seed, genes: spec.genes, cells: spec.cells, types: types.collect() }
    }

    /// Cells `first..end`, the same however they are divided.
    fn cells(&self, first: usize, end: usize) -> Vec<Cell> {
        let mut counts = vec![0u32; self.genes];
        (first..end).map(|cell| self.cell(cell, &mut counts)).collect()
    }

    fn cell(&self, cell: usize, counts: &mut [u32]) -> Cell {
        let mut random = Random(mix(self.seed ^ mix(cell as u64 + 1)));
        let at = random.uniform();
        let shares = TYPES.iter().scan(0.0, |sum, (_, share)| {
            *sum += share;
            Some(*sum)
        });
        let of = shares.take_while(|end| *end <= at).count().min(TYPES.len() - 1);
        // Poor cells stand evenly between the others.
        let step = self.cells / POOR_CELLS;
        let is_poor = cell % step == step / 2 && cell / step < POOR_CELLS;
        let library = LIBRARY * (LIBRARY_SPREAD * random.normal()).exp();
        let molecules = if is_poor { 4 } else { poisson(library, &mut random) };
        for _ in 0..molecules {
            counts[self.types[of].draw(random.draw())] += 1;
        }
        let (mut ids, mut values) = (Vec::with_capacity(molecules.min(self.genes)), Vec::new());
        for (gene, count) in (0u32..).zip(counts.iter_mut()).filter(|(_, count)| **count > 0) {
            ids.push(gene);
            values.push(std::mem::take(count) as f32);
        }
        Cell { ids, counts: values, of: of as i32 }
    }
}

/// A draw around `mean`, which is large: normal, to the nearest whole number.
fn poisson(mean: f64, random: &mut Random) -> usize {
    (mean + mean.sqrt() * random.normal()).round().max(1.0) as usize
}

/// Draws by weight in constant time (Walker 1977, Vose 1991).
struct Alias {
    /// Of each place the share that stays there, of 2³², and where the rest goes.
    places: Vec<(u32, u32)>,
}

impl Alias {
    fn new(weights: &[f64]) -> Self {
        let (n, sum) = (weights.len(), weights.iter().sum::<f64>());
        let mut share: Vec<f64> = weights.iter().map(|weight| weight * n as f64 / sum).collect();
        let mut places: Vec<(u32, u32)> = (0..n as u32).map(|place| (u32::MAX, place)).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..n).partition(|place| share[*place] < 1.0);
        while let (Some(low), Some(high)) = (small.pop(), large.last().copied()) {
            places[low] = ((share[low] * 2f64.powi(32)) as u32, high as u32);
            share[high] -= 1.0 - share[low];
            if share[high] < 1.0 {
                large.pop();
                small.push(high);
            }
        }
        // Of the last ones, left by rounding, those without weight stay without.
        small.iter().filter(|place| weights[**place] == 0.0).for_each(|place| places[*place] = (0, 0));
        Self { places }
    }

    fn draw(&self, bits: u64) -> usize {
        let place = ((bits >> 32) * self.places.len() as u64) >> 32;
        let (stays, other) = self.places[place as usize];
        if (bits as u32) < stays { place as usize } else { other as usize }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_table_draws_by_weight() {
        let weights = [3.0, 0.0, 1.0, 0.0, 6.0, 0.5];
        let table = Alias::new(&weights);
        let mut random = Random(5);
        let mut counts = [0; 6];
        (0..200_000).for_each(|_| counts[table.draw(random.draw())] += 1);
        for (count, weight) in counts.iter().zip(weights) {
            assert!((f64::from(*count) / 200_000.0 - weight / 10.5).abs() < 0.005, "{counts:?}");
        }
        assert_eq!((counts[1], counts[3]), (0, 0));
    }

    #[test]
    fn cells_do_not_depend_on_how_they_are_divided() {
        let tissue = Tissue::new(&SampleSpec::default());
        let whole = tissue.cells(0, 40);
        let parts: Vec<Cell> = tissue.cells(0, 7).into_iter().chain(tissue.cells(7, 40)).collect();
        for (a, b) in whole.iter().zip(&parts) {
            assert_eq!((&a.ids, &a.counts, a.of), (&b.ids, &b.counts, b.of));
        }
        let molecules: f32 = whole.iter().flat_map(|cell| &cell.counts).sum();
        assert!((2000.0..4500.0).contains(&(molecules / 40.0)), "{molecules}");
    }
}
