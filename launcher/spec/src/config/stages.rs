//! The section `stages` of a file or a profile, and overrides of it: keys that one stage of a task has otherwise.
//!
//! ```text
//! stages:
//!   diffusion: {train: {num_epochs: 400}}
//! ```

use super::error::{Place, Problem};
use super::layer::{Layer, Source};
use super::schema::Schema;
use super::spelling::canonical;
use super::tree::{Body, Entry, Mark, Node};
use std::collections::BTreeMap;

/// Name of the section, in files and before the keys of overrides.
pub(super) const SECTION: &str = "stages";
/// Keys that all stages of a run have alike.
const OF_THE_RUN: [&str; 3] = ["name", "task", "stage"];

/// A layer for each stage that is named.
#[derive(Clone, Debug, Default)]
pub(super) struct Stages(BTreeMap<String, (Mark, Layer)>);

impl Stages {
    /// Splits the section off `entries`.
    pub fn split(entries: Vec<Entry>) -> (Vec<Entry>, Vec<Entry>) {
        entries.into_iter().partition(|entry| canonical(&entry.key) == SECTION)
    }

    /// Reads sections that [`Stages::split`] found; `inside` precedes their keys in messages.
    pub fn read(schema: &Schema, sections: &[Entry], inside: &str, file: &str, problems: &mut Vec<Problem>) -> Self {
        let mut stages = Self::default();
        for section in sections {
            stages.take(schema, &section.value, inside, &Source::File(file), problems);
        }
        stages
    }

    fn take(&mut self, schema: &Schema, node: &Node, inside: &str, source: &Source, problems: &mut Vec<Problem>) {
        let Body::Map(entries) = &node.body else {
            if !node.is_null() {
                let text = format!("{inside}stages: expected a section with names of stages");
                problems.push(Problem::new(source.place(node.at), text));
            }
            return;
        };
        for entry in entries {
            let name = canonical(&entry.key);
            match &entry.value.body {
                Body::Map(keys) => {
                    let inside = format!("{inside}stages.{name}.");
                    let layer = Layer::read(schema, keys, &inside, source, problems);
                    problems.extend(of_the_run(&layer, &inside));
                    self.0.insert(name, (entry.at, layer));
                }
                _ if entry.value.is_null() => {}
                _ => {
                    let text = format!("{inside}stages.{name}: expected a section");
                    problems.push(Problem::new(source.place(entry.value.at), text));
                }
            }
        }
    }

    pub fn layer(&self, stage: &str) -> Option<&Layer> {
        self.0.get(stage).map(|(_, layer)| layer)
    }

    /// Stages with the places of their names.
    pub fn names(&self) -> impl Iterator<Item = (&str, Mark)> {
        self.0.iter().map(|(name, (at, _))| (name.as_str(), *at))
    }
}

/// Complaints about keys that a stage cannot have otherwise.
pub(super) fn of_the_run(layer: &Layer, inside: &str) -> Vec<Problem> {
    let own = OF_THE_RUN.iter().filter_map(|key| {
        let place = layer.place(key)?;
        Some(Problem::new(place.clone(), format!("{inside}{key}: all stages of a run have the same {key}")))
    });
    own.collect()
}

/// The stage that an override is for, and the override without it: `stages.diffusion.train.num_epochs=3`.
pub(super) fn of_set(set: &str) -> Option<(String, &str)> {
    let (key, _) = set.split_once('=')?;
    let key = key.trim_start();
    let section = key.split('.').next()?;
    let rest = (section.to_ascii_lowercase() == SECTION).then(|| key.get(section.len() + 1..)).flatten()?;
    let stage = rest.split('.').next().filter(|stage| stage.len() < rest.len())?;
    let at = set.len() - set.trim_start().len() + section.len() + 1 + stage.len() + 1;
    Some((canonical(stage), set.get(at..)?))
}

/// A complaint about a stage that the task does not have.
pub(super) fn unknown(place: Place, stage: &str, task: &str, known: &[&str]) -> Problem {
    let text = match known {
        [] => format!("stages.{stage}: task {task} has no stages"),
        known => format!("unknown stage {stage}; the stages of task {task} are: {}", known.join(", ")),
    };
    Problem::new(place, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ConfigError, Keys, RawConfig, Section, StageKind, StageSpec, TaskSpec, Verdict};
    use crate::task::emg::EmgConfig;

    #[test]
    fn overrides_of_a_stage_are_told_from_those_of_the_run() {
        assert_eq!(of_set("stages.latents.data.stride=2"), Some(("latents".into(), "data.stride=2")));
        assert_eq!(of_set(" STAGES.Latents.a.b = x.y=1"), Some(("Latents".into(), "a.b = x.y=1")));
        for set in ["train.num_epochs=3", "stages=1", "stages.latents=1", "stages", "a=stages.b.c"] {
            assert_eq!(of_set(set), None, "{set}");
        }
    }

    /// A task of two stages, the second with a patience of its own.
    struct Two;

    impl TaskSpec for Two {
        fn section(&self) -> &'static Section {
            EmgConfig::SECTION
        }
        fn stages(&self, _: &Config) -> Vec<StageSpec> {
            ["one", "other"].map(|name| StageSpec { name, kind: StageKind::Train }).into()
        }
        fn defaults(&self, config: &mut Config) {
            config.train.patience = if config.stage.as_deref() == Some("other") { 3 } else { 2 };
        }
        fn losses(&self) -> &'static [&'static str] {
            &["mse"]
        }
        fn check(&self, _: &Config, _: &mut Verdict) {}
    }

    const TWO: &[&dyn TaskSpec] = &[&Two];

    fn parsed(text: &str) -> Result<RawConfig, ConfigError> {
        RawConfig::parse(text, "a.yaml", TWO)
    }

    #[test]
    fn keys_of_a_stage_come_after_the_files_and_before_overrides() {
        let text = "
task: emg
train: {num_epochs: 10, batch_size: 1}
stages:
  other: {train: {num_epochs: 20, batch_size: 2, learning_rate: 0.5}}
profiles:
  cpu:
    train: {batch_size: 3}
    stages: {other: {train: {batch_size: 4, momentum: 0.5}}}
";
        let raw = parsed(text).unwrap();
        let of = |profile: &str, sets: &[&str], stage: Option<&str>| {
            let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
            let config = raw.resolve_stage(profile, &sets, stage).unwrap().0;
            assert_eq!(config.stage.as_deref(), stage);
            (config.train.num_epochs, config.train.batch_size, config.train.patience)
        };
        assert_eq!(of("cpu", &[], None), (10, 3, 2));
        assert_eq!(of("cpu", &[], Some("one")), (10, 3, 2));
        assert_eq!(of("cpu", &[], Some("other")), (20, 4, 3));
        assert_eq!(of("cuda", &[], Some("other")), (20, 2, 3));
        let sets = ["train.batch_size=5", "stages.other.train.num_epochs=6", "stages.one.train.num_epochs=7"];
        assert_eq!(of("cpu", &sets, Some("other")), (6, 5, 3));
        assert_eq!(of("cpu", &sets, Some("one")), (7, 5, 2));
        assert_eq!(of("cpu", &sets, None), (10, 5, 2));
        // The resolved config of a stage loads again as it is.
        let config = raw.resolve_stage("cpu", &[], Some("other")).unwrap().0;
        let again = parsed(&config.to_yaml().unwrap()).map(|raw| raw.resolve("cpu", &[]));
        assert_eq!(again.unwrap().unwrap(), config);
    }

    #[test]
    fn faults_in_a_stage_are_named_with_their_places() {
        let wrong = |text: &str, sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
            let resolved = parsed(text).and_then(|raw| raw.resolve("cpu", &sets));
            resolved.unwrap_err().to_string()
        };
        for (text, sets, says) in [
            (
                "stages: {three: {train: {num_epochs: 1}}}",
                &[][..],
                "a.yaml:1:10: unknown stage three; the stages of task emg are: one, other",
            ),
            (
                "stages: {one: {train: {num_epoch: 1}}}",
                &[],
                "unknown key stages.one.train.num_epoch; did you mean stages.one.train.num_epochs?",
            ),
            ("stages: {one: {task: emg}}", &[], "stages.one.task: all stages of a run have the same task"),
            ("stages: [one]", &[], "stages: expected a section with names of stages"),
            ("stages: {one: 3}", &[], "stages.one: expected a section"),
            ("profiles: {cpu: {stages: {three: {seed: 1}}}}", &[], "unknown stage three"),
            ("stage: three", &[], "unknown stage three"),
            ("seed: 1", &["stages.three.seed=2"], "--set stages.three.seed=2: unknown stage three"),
            ("seed: 1", &["stages.one.seeed=2"], "did you mean stages.one.seed?"),
        ] {
            let found = wrong(text, sets);
            assert!(found.contains(says), "{text} {sets:?}: {found}");
        }
        let none = crate::task::parse_config("task: emg\nstages: {one: {seed: 1}}\n", "b.yaml").unwrap();
        let text = none.resolve("cpu", &[]).unwrap_err().to_string();
        assert!(text.contains("b.yaml:2") && text.contains("task emg has no stages"), "{text}");
    }
}
