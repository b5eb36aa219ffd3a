//! First stage: a config as written. It is checked key by key where it stands; nothing is combined yet.

use super::layer::{Layer, Source};
use super::schema::{self, Schema};
use super::spelling::canonical;
use super::stages::{self, Stages};
use super::task::TaskSpec;
use super::tree::{self, Body, Mark, Node};
use super::{Config, ConfigError, DeviceChoice, PROFILES, Place, Problem, check, literal};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Folders that decide which file a name means, and what `~` is: given by the caller, who may ask the environment.
#[derive(Clone, Copy, Debug)]
pub struct Folders<'a> {
    /// The working folder.
    pub cwd: &'a Path,
    /// The folder that Headroom itself lives in, with `configs/`.
    pub headroom: Option<&'a Path>,
    /// The user's home folder.
    pub home: Option<&'a Path>,
}

/// A config file, parsed and free of unknown keys and wrong types, before profile and overrides.
#[derive(Clone)]
pub struct RawConfig {
    schema: Arc<Schema>,
    file: String,
    /// The meaning of `~` in paths.
    home: Option<PathBuf>,
    base: Layer,
    stages: Stages,
    profiles: BTreeMap<String, (Layer, Stages)>,
}

impl RawConfig {
    /// Finds and parses a config: as given, then in `configs/` below the working folder and below Headroom's own, each
    /// with and without `.yaml`.
    ///
    /// # Errors
    /// [`ConfigError::NotFound`] lists the names there are; otherwise as [`RawConfig::parse`].
    pub fn find(name: &str, folders: &Folders, tasks: &'static [&'static dyn TaskSpec]) -> Result<Self, ConfigError> {
        let cwd = folders.cwd;
        let headroom = folders.headroom.filter(|headroom| *headroom != cwd);
        let places: Vec<PathBuf> =
            [Some(cwd), headroom].into_iter().flatten().map(|root| root.join("configs")).collect();
        let given = folders.home.and_then(|home| literal::at_home(name, home)).unwrap_or_else(|| cwd.join(name));
        let stems = std::iter::once(given).chain(places.iter().map(|folder| folder.join(name)));
        let candidates = stems.flat_map(|stem| {
            let mut with = stem.clone().into_os_string();
            with.push(".yaml");
            [stem, PathBuf::from(with)]
        });
        let Some(path) = candidates.into_iter().find(|path| path.is_file()) else {
            return Err(not_found(name, &places));
        };
        let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        let shown = path.strip_prefix(cwd).unwrap_or(&path);
        let raw = Self::parse(&text, &shown.display().to_string(), tasks)?;
        Ok(raw.with_home(folders.home))
    }

    /// Parses YAML. `file` names the text in messages; its stem is the config's name where the text gives none.
    ///
    /// # Errors
    /// Broken YAML, duplicate keys; all unknown keys and wrong types at once, each with its place.
    pub fn parse(text: &str, file: &str, tasks: &'static [&'static dyn TaskSpec]) -> Result<Self, ConfigError> {
        let place = |at| Place::Mark { file: file.to_string(), at };
        let fault = |(at, text)| ConfigError::Problems(vec![Problem::new(place(at), text)]);
        let (schema, base, profiles) = (Arc::new(Schema::of(tasks)), Layer::default(), BTreeMap::new());
        let stages = Stages::default();
        let mut raw = Self { schema, file: file.to_string(), home: None, base, stages, profiles };
        let mut problems = Vec::new();
        let root = tree::parse(text).map_err(fault)?;
        match root.map(|node| (node.at, node.is_null(), node.body)) {
            None | Some((_, true, _)) => {}
            Some((_, _, Body::Map(entries))) => {
                let (profiles, base): (Vec<_>, Vec<_>) =
                    entries.into_iter().partition(|entry| canonical(&entry.key) == "profiles");
                let (stages, base) = Stages::split(base);
                raw.base = Layer::read(&raw.schema, &base, "", &Source::File(file), &mut problems);
                raw.stages = Stages::read(&raw.schema, &stages, "", file, &mut problems);
                profiles.iter().for_each(|entry| raw.take_profiles(&entry.value, &mut problems));
            }
            Some((at, _, _)) => {
                problems.push(Problem::new(place(at), "expected keys such as data: and train:, found no mapping"))
            }
        }
        if problems.is_empty() { Ok(raw) } else { Err(ConfigError::Problems(problems)) }
    }

    /// Sets the folder that `~` stands for in paths.
    pub fn with_home(self, home: Option<&Path>) -> Self {
        Self { home: home.map(Path::to_path_buf), ..self }
    }

    fn take_profiles(&mut self, node: &Node, problems: &mut Vec<Problem>) {
        let file = self.file.clone();
        let mut bad = |at, text: String| problems.push(Problem::new(Place::Mark { file: file.clone(), at }, text));
        let known = PROFILES.join(", ");
        let Body::Map(entries) = &node.body else {
            if !node.is_null() {
                bad(node.at, format!("profiles: expected a section with {known}"));
            }
            return;
        };
        for entry in entries {
            let name = canonical(&entry.key);
            match &entry.value.body {
                _ if !PROFILES.contains(&name.as_str()) => {
                    bad(entry.at, format!("unknown profile {}; the profiles there are: {known}", entry.key))
                }
                Body::Map(inner) => {
                    let mut found = Vec::new();
                    let inside = format!("profiles.{name}.");
                    let (stages, inner) = Stages::split(inner.clone());
                    let layer = Layer::read(&self.schema, &inner, &inside, &Source::File(&file), &mut found);
                    let stages = Stages::read(&self.schema, &stages, &inside, &file, &mut found);
                    found.into_iter().for_each(|problem| match problem.place {
                        Place::Mark { at, .. } => bad(at, problem.text),
                        _ => bad(entry.at, problem.text),
                    });
                    self.profiles.insert(name, (layer, stages));
                }
                _ if entry.value.is_null() => {}
                _ => bad(entry.value.at, format!("profiles.{name}: expected a section")),
            }
        }
    }

    /// The device asked for by file and overrides, before a profile is chosen.
    ///
    /// # Errors
    /// As [`RawConfig::resolve`] for `sets`.
    pub fn device(&self, sets: &[String]) -> Result<DeviceChoice, ConfigError> {
        let (overrides, _) = self.read_sets(sets)?;
        let chosen = overrides.iter().rev().chain([&self.base]).find_map(|layer| layer.get("train.device"));
        Ok(chosen.and_then(|value| serde_json::from_value(value.clone()).ok()).unwrap_or(DeviceChoice::Auto))
    }

    /// Second stage: defaults, then the file, then its profile for the device, then overrides `key=value` in order.
    ///
    /// # Errors
    /// Unknown profile; unknown keys and wrong types among the overrides; values that make no sense together.
    pub fn resolve(&self, profile: &str, sets: &[String]) -> Result<Config, ConfigError> {
        self.resolve_with_notes(profile, sets).map(|(config, _)| config)
    }

    /// As [`RawConfig::resolve`], with what is worth a line to the user: keys without effect, doubtful values.
    pub fn resolve_with_notes(&self, profile: &str, sets: &[String]) -> Result<(Config, Vec<String>), ConfigError> {
        self.resolve_stage(profile, sets, None)
    }

    /// As [`RawConfig::resolve_with_notes`], for one stage of the task: the stage's own keys come after the file's, the profile's,
    /// and the overrides for all.
    pub fn resolve_stage(
        &self,
        profile: &str,
        sets: &[String],
        stage: Option<&str>,
    ) -> Result<(Config, Vec<String>), ConfigError> {
        let here = || Place::Resolved { file: self.file.clone() };
        let fail = |text: String| ConfigError::Problems(vec![Problem::new(here(), text)]);
        if !PROFILES.contains(&profile) {
            return Err(fail(format!("unknown profile {profile}; the profiles there are: {}", PROFILES.join(", "))));
        }
        let (mut overrides, of_stages) = self.read_sets(sets)?;
        let own = |stages: &Stages| stage.and_then(|stage| stages.layer(stage)).cloned().unwrap_or_default();
        let (base, (profiled, of_profile)) =
            (own(&self.stages), self.profiles.get(profile).cloned().unwrap_or_default());
        let of_profile = own(&of_profile);
        overrides
            .extend(of_stages.iter().filter(|(name, _)| Some(name.as_str()) == stage).map(|(_, layer)| layer.clone()));
        let layers: Vec<&Layer> = [&self.base, &base, &profiled, &of_profile].into_iter().chain(&overrides).collect();
        let name = self.task_of(&layers);
        let task = self.schema.task(&name);
        let written = layers.iter().rev().find_map(|layer| layer.get("stage").and_then(Value::as_str));
        let stage = stage.or(written);
        let config =
            task.map_or_else(|| Config { task: name, ..Config::default() }, |task| Config::of_stage(task, stage));
        let config = Config { name: self.stem(), ..config };
        let mut notes = Vec::new();
        let mut value = serde_json::to_value(&config).map_err(|e| fail(e.to_string()))?;
        for layer in &layers {
            layer.write_over(&mut value);
            notes.extend(layer.notes().iter().map(ToString::to_string));
        }
        let blame = |text: String| Problem::new(self.place_of(&text, &layers, &overrides), text);
        let homeless = self.expand_home(&mut value);
        if let Some(stage) = stage {
            value["stage"] = stage.into();
        }
        let mut config: Config = serde_json::from_value(value.clone()).map_err(|e| fail(e.to_string()))?;
        config.check_sections(self.schema.tasks()).map_err(fail)?;
        if let Some(task) = task {
            task.settle(&mut config);
        }
        let verdict = check::check(&config, &value, &self.schema, task);
        let mut errors: Vec<Problem> = homeless.into_iter().chain(verdict.errors).map(blame).collect();
        errors.extend(self.unknown_stages(&config, task, &of_stages));
        if !errors.is_empty() {
            return Err(ConfigError::Problems(errors));
        }
        notes.extend(verdict.warnings.into_iter().map(|text| blame(text).to_string()));
        let pins = layers.iter().any(|layer| layer.get("train.pin_memory").is_some());
        // Only where someone wrote it: it is the default.
        if pins && config.train.pin_memory && profile == "cpu" {
            let why = "train.pin_memory has no effect on CPU ranks: pinned memory is for copies to a GPU";
            notes.push(format!("{}: {why}", self.file));
        }
        Ok((config, notes))
    }

    /// Complaints about stages that the task does not have, wherever they are named.
    fn unknown_stages(&self, config: &Config, task: Option<&dyn TaskSpec>, sets: &[(String, Layer)]) -> Vec<Problem> {
        let Some(task) = task else { return Vec::new() };
        let known: Vec<&str> = task.stages(config).iter().map(|stage| stage.name).collect();
        let marks = self.stages.names().chain(self.profiles.values().flat_map(|(_, stages)| stages.names()));
        let mark = |at| Place::Mark { file: self.file.clone(), at };
        let of_sets = sets.iter().map(|(name, layer)| {
            let key = layer.keys().next().and_then(|key| layer.place(key));
            (name.as_str(), key.cloned().unwrap_or_else(|| Place::Resolved { file: self.file.clone() }))
        });
        let named = marks.map(|(name, at)| (name, mark(at))).chain(of_sets);
        let written = config.stage.as_deref().map(|stage| (stage, Place::Resolved { file: self.file.clone() }));
        let unknown = named.chain(written).filter(|(name, _)| !known.contains(name));
        unknown.map(|(name, place)| stages::unknown(place, name, task.name(), &known)).collect()
    }

    /// Replaces `~` at the beginning of paths; returns a line for each that cannot be.
    fn expand_home(&self, config: &mut Value) -> Vec<String> {
        let mut problems = Vec::new();
        for key in self.schema.keys().filter(|key| key.kind.is_path()) {
            let Some(slot) = config.pointer_mut(&schema::pointer(key.path)) else { continue };
            let Some(text) = slot.as_str().filter(|text| text.starts_with('~')) else { continue };
            match self.home.as_deref().map(|home| literal::at_home(text, home)) {
                Some(Some(path)) => *slot = path.to_string_lossy().into(),
                Some(None) => {}
                None => problems.push(format!(
                    "{} is {text}; there is no home folder to put in place of ~: set HOME, or write the path out",
                    key.path
                )),
            }
        }
        problems
    }

    /// The place at which the values were written that `text` speaks of: overrides, else a line of the file, else the
    /// file.
    fn place_of(&self, text: &str, layers: &[&Layer], overrides: &[Layer]) -> Place {
        let in_key = |c: char| c.is_ascii_alphanumeric() || "_.".contains(c);
        let words: Vec<&str> = text.split(|c| !in_key(c)).map(|word| word.trim_end_matches('.')).collect();
        let mut sets: Vec<&str> = Vec::new();
        for (layer, key) in overrides.iter().flat_map(|layer| layer.keys().map(move |key| (layer, key))) {
            match layer.place(key) {
                Some(Place::Set(set)) if words.contains(&key) => sets.push(set),
                _ => {}
            }
        }
        if !sets.is_empty() {
            return Place::Set(sets.join(" --set "));
        }
        let written = words.iter().find_map(|word| layers.iter().rev().find_map(|layer| layer.place(word)));
        written.cloned().unwrap_or_else(|| Place::Resolved { file: self.file.clone() })
    }

    /// The task as written last; else the task whose keys are written, as in the deblurring guide's files, which name
    /// none; else the first.
    fn task_of(&self, layers: &[&Layer]) -> String {
        let written = layers.iter().rev().find_map(|layer| layer.get("task").and_then(Value::as_str));
        let tasks = self.schema.tasks();
        let meant = |task: &&&dyn TaskSpec| {
            let own = |key: &str| key.split('.').next() == Some(task.name()) && task.is_meant_by(key);
            layers.iter().any(|layer| layer.keys().any(own))
        };
        let name = || tasks.iter().skip(1).find(meant).or(tasks.first()).map_or("", |task| task.name());
        written.unwrap_or_else(name).to_string()
    }

    /// Overrides for all stages, and those for one.
    fn read_sets(&self, sets: &[String]) -> Result<Overrides, ConfigError> {
        let (mut problems, mut layers, mut of_stages) = (Vec::new(), Vec::new(), Vec::new());
        for set in sets {
            match stages::of_set(set) {
                Some((stage, rest)) => {
                    let inside = format!("{}.{stage}.", stages::SECTION);
                    let layer = read_set(&self.schema, (set, rest), &inside, &mut problems);
                    problems.extend(stages::of_the_run(&layer, &inside));
                    of_stages.push((stage, layer));
                }
                None => layers.push(read_set(&self.schema, (set, set), "", &mut problems)),
            }
        }
        if problems.is_empty() { Ok((layers, of_stages)) } else { Err(ConfigError::Problems(problems)) }
    }

    fn stem(&self) -> String {
        let stem = Path::new(&self.file).file_stem().map(|stem| stem.to_string_lossy().into_owned());
        stem.unwrap_or_else(|| "config".into())
    }
}

/// Overrides for all stages, and those for one with its name.
type Overrides = (Vec<Layer>, Vec<(String, Layer)>);

/// One `key=value`; the value is YAML, so lists work: `data.split_ratio=[0.8,0.1,0.1]`.
///
/// `whole`: as it was typed; `set`: without what is `inside`.
fn read_set(schema: &Schema, (whole, set): (&str, &str), inside: &str, problems: &mut Vec<Problem>) -> Layer {
    let source = Source::Set(whole);
    let Some((key, text)) = set.split_once('=').filter(|(key, _)| !key.trim().is_empty()) else {
        problems.push(Problem::new(source.place(Mark::default()), "expected key=value, such as train.batch_size=32"));
        return Layer::default();
    };
    let value = match tree::parse(text) {
        Ok(Some(value)) => value,
        Ok(None) => Node { at: Mark::default(), body: Body::Scalar { text: String::new(), plain: true } },
        Err((_, text)) => {
            problems.push(Problem::new(source.place(Mark::default()), text));
            return Layer::default();
        }
    };
    let entry = tree::Entry { key: key.trim().to_string(), at: Mark::default(), value, merged: false };
    Layer::read(schema, &[entry], inside, &source, problems)
}

fn not_found(name: &str, folders: &[PathBuf]) -> ConfigError {
    let mut known: Vec<String> = folders
        .iter()
        .filter_map(|folder| folder.read_dir().ok())
        .flat_map(|entries| entries.flatten())
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .filter_map(|path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned()))
        .collect();
    known.sort();
    known.dedup();
    let known = if known.is_empty() { "none".to_string() } else { known.join(", ") };
    let tried = std::iter::once(name.to_string()).chain(folders.iter().map(|f| f.join(name).display().to_string()));
    let tried = tried.collect::<Vec<_>>().join(", ") + " (each also with .yaml)";
    ConfigError::NotFound { name: name.to_string(), tried, known }
}
