//! The user's optimizer as the loop sees it.

use super::host::{Host, UserError};
use crate::task::OwnOptimizer;
use crate::torch::TorchError;
use tch::{Device, Kind, Tensor};

/// Name of the tensor of bytes that holds the structure of the state in a checkpoint.
const STRUCTURE: &str = "python.optimizer";

/// `python.optimizer`, made.
pub struct PythonOptimizer {
    host: &'static dyn Host,
}

impl PythonOptimizer {
    /// # Errors
    /// The user's function failed, or its optimizer cannot be used.
    pub fn new(host: &'static dyn Host, rate: f64, weight_decay: f64) -> Result<Self, TorchError> {
        host.make_optimizer(rate, weight_decay)?;
        Ok(Self { host })
    }
}

impl OwnOptimizer for PythonOptimizer {
    fn step(&mut self, rate: f64) -> Result<(), TorchError> {
        self.host.step(rate).map_err(|UserError { text, memory }| match memory {
            // Other ranks have changed their weights by now.
            true => TorchError::User {
                message: format!(
                    "memory ran out in python.optimizer, where a step cannot be repeated: lower memory use elsewhere, or take \
                     an optimizer with less state ({text})"
                ),
            },
            false => TorchError::User { message: text },
        })
    }

    fn export(&self) -> Result<Vec<(String, Tensor)>, TorchError> {
        let (structure, mut tensors) = self.host.optimizer_state()?;
        tensors.push((STRUCTURE.to_owned(), Tensor::from_slice(structure.as_bytes())));
        Ok(tensors)
    }

    fn import(&mut self, tensors: &[(String, Tensor)]) -> Result<(), String> {
        let text = tensors.iter().find(|(name, _)| name == STRUCTURE).and_then(|(_, bytes)| text_of(bytes));
        let text = text.ok_or("is that of one of Headroom's optimizers, and this run has python.optimizer")?;
        let own = tensors.iter().filter(|(name, _)| name != STRUCTURE);
        let own: Vec<_> = own.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        self.host.load_optimizer(&text, &own).map_err(|error| error.text)
    }

    fn bytes(&self) -> Result<u64, TorchError> {
        let (_, tensors) = self.host.optimizer_state()?;
        Ok(tensors.iter().map(|(_, tensor)| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum())
    }
}

fn text_of(bytes: &Tensor) -> Option<String> {
    if bytes.kind() != Kind::Uint8 || bytes.device() != Device::Cpu {
        return None;
    }
    String::from_utf8(Vec::<u8>::try_from(bytes).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_travels_as_bytes() {
        assert_eq!(text_of(&Tensor::from_slice("{\"a\": 1}".as_bytes())).as_deref(), Some("{\"a\": 1}"));
        assert_eq!(text_of(&Tensor::from_slice(&[1.0])), None);
        assert_eq!(text_of(&Tensor::from_slice(&[0xff_u8])), None);
    }
}
