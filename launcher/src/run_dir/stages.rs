//! The list of a run's stages, in its folder.

use super::{RunDirError, json, replace};
use serde::{Deserialize, Serialize};
use spec::config::StageKind;
use std::path::{Path, PathBuf};

/// Names the stages of a run, in its folder: [`StagesOf`].
pub const STAGES: &str = "stages.json";

/// `stages.json` of a run whose task has stages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StagesOf {
    pub config: ConfigName,
    pub task: String,
    /// In their order.
    pub stages: Vec<StageOf>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigName {
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageOf {
    pub name: String,
    pub kind: StageKind,
}

impl StagesOf {
    /// Of the run in `folder`; `None`: it has no stages.
    pub fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(STAGES)).ok()?).ok()
    }

    /// # Errors
    /// No room, no permission.
    pub fn write(&self, folder: &Path) -> Result<(), RunDirError> {
        replace(&folder.join(STAGES), &json(self, folder)?)
    }

    /// Folders of stages that have begun, in their order.
    pub fn begun(&self, folder: &Path) -> Vec<PathBuf> {
        let folders = self.stages.iter().map(|stage| folder.join(&stage.name));
        folders.filter(|folder| folder.join("job.json").is_file()).collect()
    }
}
