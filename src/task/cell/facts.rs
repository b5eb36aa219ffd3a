//! Facts on the data that models need, whatever the stage.

use super::densify::Scale;
use spec::task::cell::CellConfig;

/// Facts on the data that the models of a stage need.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFacts {
    pub genes: usize,
    pub classes: Vec<String>,
    /// Only sizes are of interest: sampling takes few steps.
    pub planning: bool,
}

/// The normalisation that the config asks for.
pub fn scale(cell: &CellConfig) -> Scale {
    Scale { target_sum: cell.target_sum, log1p: cell.log1p }
}
