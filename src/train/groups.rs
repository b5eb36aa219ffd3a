//! Groups of parameters, from the task's names to the optimizer's rules.

use super::TrainError;
use super::optimizer::Rule;
use super::schedule::Course;
use crate::task::GroupSpec;
use spec::config::{OptimizerKind, TrainConfig};
use std::collections::BTreeMap;

/// Name of the group of parameters that no group of the task has.
const REST: &str = "rest";

/// Every parameter in one group.
#[derive(Clone, Debug, PartialEq)]
pub struct Groups {
    /// Names, as metrics.jsonl has them; empty where there is one group for all.
    pub names: Vec<String>,
    pub rules: Vec<Rule>,
    /// Values of the schedule for each group.
    pub courses: Vec<Course>,
    /// Group of each parameter; empty where there is one for all.
    pub of: Vec<usize>,
}

impl Groups {
    /// Sorts `parameters` by the groups of a task.
    ///
    /// # Errors
    /// A group names a parameter that there is not, two groups have the same name or parameter, or a number makes no sense.
    pub fn new(train: &TrainConfig, specs: Vec<GroupSpec>, parameters: &[String]) -> Result<Self, TrainError> {
        let everything = GroupSpec::new("", Vec::new());
        if specs.is_empty() {
            let (rule, course) = (rule(train, &everything), course(train, &everything));
            return Ok(Self { names: Vec::new(), rules: vec![rule], courses: vec![course], of: Vec::new() });
        }
        let mut of = membership(&specs, parameters)?;
        let mut specs = specs;
        if of.iter().any(Option::is_none) {
            of.iter_mut().for_each(|group| *group = group.or(Some(specs.len())));
            specs.push(GroupSpec { name: REST.into(), ..everything });
        }
        specs.iter().try_for_each(check)?;
        Ok(Self {
            names: specs.iter().map(|spec| spec.name.clone()).collect(),
            rules: specs.iter().map(|spec| rule(train, spec)).collect(),
            courses: specs.iter().map(|spec| course(train, spec)).collect(),
            of: of.into_iter().flatten().collect(),
        })
    }
}

fn wrong(problem: String) -> TrainError {
    TrainError::Groups(problem)
}

/// Group of each parameter.
fn membership(specs: &[GroupSpec], parameters: &[String]) -> Result<Vec<Option<usize>>, TrainError> {
    let places: BTreeMap<&str, usize> = parameters.iter().enumerate().map(|(at, name)| (name.as_str(), at)).collect();
    let mut of: Vec<Option<usize>> = vec![None; parameters.len()];
    for (group, spec) in specs.iter().enumerate() {
        let name = &spec.name;
        if name.is_empty() || name == REST || specs[..group].iter().any(|other| other.name == *name) {
            return Err(wrong(format!("{name:?} names a group twice, or is empty or {REST:?}")));
        }
        for member in &spec.members {
            let at = *places.get(member.as_str()).ok_or_else(|| {
                wrong(format!("group {name} has {member}, which is no trainable parameter of the model"))
            })?;
            if let Some(other) = of[at].replace(group) {
                return Err(wrong(format!("{member} is in the groups {} and {name}", specs[other].name)));
            }
        }
    }
    Ok(of)
}

fn check(spec: &GroupSpec) -> Result<(), TrainError> {
    let GroupSpec { name, weight_decay, rate, momentum, warmup_rate, .. } = spec;
    let at_least_0 = |what: &str, value: Option<f64>| match value {
        Some(value) if !(value.is_finite() && value >= 0.0) => {
            Err(wrong(format!("group {name} has {what} {value}; it must be 0 or more")))
        }
        _ => Ok(()),
    };
    at_least_0("weight_decay", *weight_decay)?;
    at_least_0("rate", Some(*rate))?;
    at_least_0("warmup_rate", *warmup_rate)?;
    match momentum {
        Some(value) if !(0.0..1.0).contains(value) => {
            Err(wrong(format!("group {name} has momentum {value}; it must be at least 0 and below 1")))
        }
        _ => Ok(()),
    }
}

/// `train.momentum: 0` switches the momentum of every group off: no memory is planned for it.
fn momentum(train: &TrainConfig, spec: &GroupSpec) -> f64 {
    if train.momentum == 0.0 { 0.0 } else { spec.momentum.unwrap_or(train.momentum) }
}

fn rule(train: &TrainConfig, spec: &GroupSpec) -> Rule {
    let TrainConfig { betas, eps, nesterov, .. } = *train;
    let weight_decay = spec.weight_decay.unwrap_or(train.weight_decay);
    match train.optimizer {
        OptimizerKind::Adamw | OptimizerKind::Auto => Rule::AdamW { betas, eps, weight_decay },
        OptimizerKind::Adam => Rule::Adam { betas, eps, weight_decay },
        OptimizerKind::Sgd => {
            let momentum = momentum(train, spec);
            Rule::Sgd { momentum, nesterov: nesterov && momentum > 0.0, weight_decay }
        }
        OptimizerKind::Musgd => Rule::MuSgd { momentum: momentum(train, spec), nesterov, weight_decay },
    }
}

fn course(train: &TrainConfig, spec: &GroupSpec) -> Course {
    let momentum = momentum(train, spec);
    let moves = train.optimizer.has_momentum() && momentum > 0.0;
    Course {
        factor: spec.rate,
        start: spec.warmup_rate.unwrap_or(train.warmup_rate),
        momentum: train.warmup_momentum.filter(|_| moves).map(|from| (from, momentum)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        ["a.weight", "a.bias", "norm.weight", "norm.bias"].map(String::from).to_vec()
    }

    fn spec(name: &str, members: &[&str]) -> GroupSpec {
        GroupSpec::new(name, members.iter().map(ToString::to_string))
    }

    #[test]
    fn parameters_are_sorted_and_what_is_left_follows_the_config() {
        let train = TrainConfig {
            optimizer: OptimizerKind::Sgd,
            nesterov: true,
            weight_decay: 5e-4,
            warmup_momentum: Some(0.8),
            ..TrainConfig::default()
        };
        let bias = GroupSpec {
            weight_decay: Some(0.0),
            rate: 2.0,
            momentum: Some(0.5),
            warmup_rate: Some(0.1),
            ..spec("bias", &["a.bias", "norm.bias"])
        };
        let groups = Groups::new(&train, vec![bias], &names()).unwrap();
        assert_eq!((groups.names, groups.of), (vec!["bias".to_owned(), "rest".into()], vec![1, 0, 1, 0]));
        let sgd = |momentum, weight_decay| Rule::Sgd { momentum, nesterov: true, weight_decay };
        assert_eq!(groups.rules, [sgd(0.5, 0.0), sgd(0.9, 5e-4)]);
        let course = |factor, start, momentum| Course { factor, start, momentum };
        assert_eq!(groups.courses, [course(2.0, 0.1, Some((0.8, 0.5))), course(1.0, 0.0, Some((0.8, 0.9)))]);
        let one = Groups::new(&train, vec![], &names()).unwrap();
        assert_eq!((one.rules.len(), one.of.len(), one.names.len()), (1, 0, 0));
        let still = TrainConfig { momentum: 0.0, nesterov: false, warmup_momentum: None, ..train };
        let groups = Groups::new(&still, vec![GroupSpec { momentum: Some(0.5), ..spec("b", &["a.bias"]) }], &names());
        assert!(groups.unwrap().rules.iter().all(|rule| matches!(rule, Rule::Sgd { momentum: 0.0, .. })));
    }

    #[test]
    fn groups_without_sense_are_refused_by_name() {
        let train = TrainConfig::default();
        let a = || spec("a", &["a.bias"]);
        for (specs, says) in [
            (vec![spec("a", &["a.bais"])], "group a has a.bais, which is no trainable parameter"),
            (vec![a(), spec("b", &["a.weight", "a.bias"])], "a.bias is in the groups a and b"),
            (vec![a(), spec("a", &["a.weight"])], "\"a\" names a group twice"),
            (vec![spec("rest", &["a.weight"])], "\"rest\""),
            (vec![GroupSpec { rate: -1.0, ..a() }], "group a has rate -1"),
            (vec![GroupSpec { weight_decay: Some(f64::NAN), ..a() }], "group a has weight_decay NaN"),
            (vec![GroupSpec { momentum: Some(1.0), ..a() }], "group a has momentum 1"),
        ] {
            let error = Groups::new(&train, specs, &names()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
