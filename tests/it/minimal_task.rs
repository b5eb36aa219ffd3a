//! A whole task: points on the line y = 3x - 1, and a model that finds it.

use headroom::data::{DataError, Dataset, Dtype, FieldSpec, ReadRequest, Scratch};
use headroom::task::{Batch, Datasets, Metrics, Model, Output, Task, Team};
use spec::config::Config;
use std::{path::Path, sync::Arc};
use tch::{Kind, nn};

/// Points `first..first + len`, made when they are read.
struct Points(usize, usize, [FieldSpec; 2]);

impl Dataset for Points {
    fn len(&self) -> usize {
        self.1
    }
    fn fields(&self) -> &[FieldSpec] {
        &self.2
    }
    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], _: &mut Scratch) -> Result<(), DataError> {
        let x = ((self.0 + request.index) as f32 * 0.37).sin();
        out[0].copy_from_slice(&x.to_ne_bytes());
        out[1].copy_from_slice(&(3.0 * x - 1.0).to_ne_bytes());
        Ok(())
    }
    fn describe(&self, index: usize) -> String {
        format!("point {}", self.0 + index)
    }
}

struct Straight(nn::Linear);

impl Model for Straight {
    fn forward(&self, batch: &Batch, _train: bool) -> Output {
        let prediction = batch.fields[0].apply(&self.0);
        Output::new((&prediction - &batch.fields[1]).square().mean(Kind::Float), prediction)
    }
}

/// Sum of losses, and how many: ranks add such sums up.
#[derive(Default)]
struct MeanLoss([f64; 2]);

impl Metrics for MeanLoss {
    fn update(&mut self, batch: &Batch, output: &Output) {
        self.0[0] += output.loss.double_value(&[]) * batch.len() as f64;
        self.0[1] += batch.len() as f64;
    }
    fn sums(&self) -> Vec<f64> {
        self.0.to_vec()
    }
    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        vec![("loss".into(), sums[0] / sums[1])]
    }
    fn reset(&mut self) {
        *self = Self::default();
    }
}

pub struct Line;

impl Task for Line {
    fn name(&self) -> &'static str {
        "line"
    }
    fn open(&self, _: &Config, _: &Team, _: &Path) -> Result<Datasets, DataError> {
        let field = |name| FieldSpec::new(name, &[1], Dtype::F32);
        let part = |first, len| Arc::new(Points(first, len, [field("x"), field("y")])) as Arc<dyn Dataset>;
        Ok(Datasets::new(part(0, 800), part(800, 100), part(900, 100)))
    }
    fn model(&self, _: &Config, _: &Datasets, vs: &nn::Path) -> Result<Box<dyn Model>, DataError> {
        Ok(Box::new(Straight(nn::linear(vs, 1, 1, nn::LinearConfig::default()))))
    }
    fn metrics(&self, _: &Config, _: &Datasets) -> Result<Box<dyn Metrics>, DataError> {
        Ok(Box::new(MeanLoss::default()))
    }
}
