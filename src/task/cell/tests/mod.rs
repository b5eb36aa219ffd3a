//! The models against their PyTorch twins, a test for each defect of the original, and the guide's checklist.

mod checklist;
mod defects;
mod parity;

use super::diffusion::Diffusion;
use super::model::{Autoencoder, CellUnet, Classifier};
use spec::task::cell::{CellAutoencoder, CellClassifier, CellDiffusion, CellUnet as UnetKeys};
use std::collections::HashMap;
use tch::{Device, Kind, Tensor, nn, no_grad};

pub const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Keys of the small networks of the fixtures.
pub fn small_unet() -> UnetKeys {
    UnetKeys { hidden: vec![12, 8, 6, 4], ..UnetKeys::default() }
}

pub fn small_classifier() -> CellClassifier {
    CellClassifier { hidden: vec![10, 8, 6], dropout: 0.0, ..CellClassifier::default() }
}

pub fn small_autoencoder() -> CellAutoencoder {
    CellAutoencoder { hidden: vec![9, 8, 7], latent: 6, ..CellAutoencoder::default() }
}

pub fn unet(keys: &UnetKeys, latent: i64, outputs: i64) -> (nn::VarStore, CellUnet) {
    let vs = nn::VarStore::new(Device::Cpu);
    let network = CellUnet::new(keys, latent, outputs, &vs.root());
    (vs, network)
}

pub fn autoencoder(keys: &CellAutoencoder, genes: i64) -> (nn::VarStore, Autoencoder) {
    let vs = nn::VarStore::new(Device::Cpu);
    let network = Autoencoder::new(keys, genes, &vs.root());
    (vs, network)
}

pub fn classifier(keys: &CellClassifier, latent: i64, classes: i64) -> (nn::VarStore, Classifier) {
    let vs = nn::VarStore::new(Device::Cpu);
    let network = Classifier::new(keys, latent, classes, &vs.root());
    (vs, network)
}

pub fn diffusion(keys: &CellDiffusion) -> Diffusion {
    Diffusion::new(keys, Device::Cpu).unwrap()
}

pub fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    if a.numel() == 0 { 0.0 } else { (a - b).abs().max().double_value(&[]) }
}

/// Difference in units of the largest value, at least 1.
pub fn relative(a: &Tensor, b: &Tensor) -> f64 {
    difference(a, b) / b.abs().max().double_value(&[]).max(1.0)
}

pub fn count(vs: &nn::VarStore) -> usize {
    vs.trainable_variables().iter().map(Tensor::numel).sum()
}

/// Copies values into variables of the same names.
pub fn set(vs: &nn::VarStore, values: &HashMap<String, Tensor>) {
    for (name, mut variable) in vs.variables() {
        no_grad(|| variable.copy_(&values[&name]));
    }
}
