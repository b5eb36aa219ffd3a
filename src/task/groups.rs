//! Groups of parameters that one optimizer treats differently, as PyTorch's `param_groups`.

/// A trainable parameter, as a task sorts it into a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamInfo {
    /// PyTorch's name.
    pub name: String,
    pub shape: Vec<i64>,
}

/// One group. What is left out is the config's.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupSpec {
    /// Names the group in metrics.jsonl: its rate is `lr.<name>` there.
    pub name: String,
    /// Names of its parameters.
    pub members: Vec<String>,
    /// `train.weight_decay` of the group.
    pub weight_decay: Option<f64>,
    /// Factor on the schedule's rate.
    pub rate: f64,
    /// `train.momentum` of the group (`sgd`). With `train.warmup_momentum`, where the warm-up ends.
    pub momentum: Option<f64>,
    /// Rate at the beginning of the warm-up, before any factor; `train.warmup_rate` otherwise.
    pub warmup_rate: Option<f64>,
}

impl GroupSpec {
    /// A group that differs from the config in nothing yet.
    pub fn new(name: &str, members: impl IntoIterator<Item = String>) -> Self {
        Self {
            name: name.into(),
            members: members.into_iter().collect(),
            weight_decay: None,
            rate: 1.0,
            momentum: None,
            warmup_rate: None,
        }
    }
}
