//! First stage: a config as written. It is checked key by key where it stands; nothing is combined yet.

use super::layer::{Layer, Source};
use super::tree::{self, Body, Node};
use super::{Config, ConfigError, DeviceChoice, PROFILES, Place, Problem, check};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A config file, parsed and free of unknown keys and wrong types, before profile and overrides.
#[derive(Clone, Debug)]
pub struct RawConfig {
    file: String,
    base: Layer,
    profiles: BTreeMap<String, Layer>,
}

impl RawConfig {
    /// Finds and parses a config: as given, then in `configs/` below `cwd`, each with and without `.yaml`.
    ///
    /// # Errors
    /// [`ConfigError::NotFound`] lists the names there are; otherwise as [`RawConfig::parse`].
    pub fn find(name: &str, cwd: &Path) -> Result<Self, ConfigError> {
        Self::find_in(name, cwd, None)
    }

    /// As [`RawConfig::find`], then in `configs/` below `home`, the folder Headroom itself lives in.
    pub fn find_in(name: &str, cwd: &Path, home: Option<&Path>) -> Result<Self, ConfigError> {
        let home = home.filter(|home| *home != cwd);
        let folders: Vec<PathBuf> = [Some(cwd), home].into_iter().flatten().map(|root| root.join("configs")).collect();
        let stems = std::iter::once(cwd.join(name)).chain(folders.iter().map(|folder| folder.join(name)));
        let candidates = stems.flat_map(|stem| {
            let mut with = stem.clone().into_os_string();
            with.push(".yaml");
            [stem, PathBuf::from(with)]
        });
        let Some(path) = candidates.into_iter().find(|path| path.is_file()) else {
            return Err(not_found(name, &folders));
        };
        let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        let shown = path.strip_prefix(cwd).unwrap_or(&path);
        Self::parse(&text, &shown.display().to_string())
    }

    /// Parses YAML. `file` names the text in messages; its stem is the config's name where the text gives none.
    ///
    /// # Errors
    /// Broken YAML, duplicate keys; all unknown keys and wrong types at once, each with its line.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        let at = |line| Place::Line { file: file.to_string(), line };
        let fault = |(line, text)| ConfigError::Problems(vec![Problem::new(at(line), text)]);
        let mut raw = Self { file: file.to_string(), base: Layer::default(), profiles: BTreeMap::new() };
        let mut problems = Vec::new();
        let root = tree::parse(text).map_err(fault)?;
        match root.map(|node| (node.line, node.is_null(), node.body)) {
            None | Some((_, true, _)) => {}
            Some((_, _, Body::Map(entries))) => {
                let (profiles, base): (Vec<_>, Vec<_>) =
                    entries.into_iter().partition(|entry| super::schema::canonical(&entry.key) == "profiles");
                raw.base = Layer::read(&base, "", &Source::File(file), &mut problems);
                profiles.iter().for_each(|entry| raw.take_profiles(&entry.value, &mut problems));
            }
            Some((line, _, _)) => {
                problems.push(Problem::new(at(line), "expected keys such as data: and train:, found no mapping"))
            }
        }
        if problems.is_empty() { Ok(raw) } else { Err(ConfigError::Problems(problems)) }
    }

    fn take_profiles(&mut self, node: &Node, problems: &mut Vec<Problem>) {
        let file = self.file.clone();
        let mut bad = |line, text: String| problems.push(Problem::new(Place::Line { file: file.clone(), line }, text));
        let known = PROFILES.join(", ");
        let Body::Map(entries) = &node.body else {
            if !node.is_null() {
                bad(node.line, format!("profiles: expected a section with {known}"));
            }
            return;
        };
        for entry in entries {
            let name = super::schema::canonical(&entry.key);
            match &entry.value.body {
                _ if !PROFILES.contains(&name.as_str()) => {
                    bad(entry.line, format!("unknown profile {}; the profiles there are: {known}", entry.key))
                }
                Body::Map(inner) => {
                    let mut found = Vec::new();
                    let layer = Layer::read(inner, &format!("profiles.{name}."), &Source::File(&file), &mut found);
                    found.into_iter().for_each(|problem| match problem.place {
                        Place::Line { line, .. } => bad(line, problem.text),
                        _ => bad(entry.line, problem.text),
                    });
                    self.profiles.insert(name, layer);
                }
                _ if entry.value.is_null() => {}
                _ => bad(entry.value.line, format!("profiles.{name}: expected a section")),
            }
        }
    }

    /// The device asked for by file and overrides, before a profile is chosen.
    ///
    /// # Errors
    /// As [`RawConfig::resolve`] for `sets`.
    pub fn device(&self, sets: &[String]) -> Result<DeviceChoice, ConfigError> {
        let overrides = read_sets(sets)?;
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
        let here = || Place::Resolved { file: self.file.clone() };
        let fail = |text: String| ConfigError::Problems(vec![Problem::new(here(), text)]);
        if !PROFILES.contains(&profile) {
            return Err(fail(format!("unknown profile {profile}; the profiles there are: {}", PROFILES.join(", "))));
        }
        let overrides = read_sets(sets)?;
        let layers = [&self.base].into_iter().chain(self.profiles.get(profile)).chain(&overrides);
        let mut pins = false;
        let mut config = Config { name: self.stem(), ..Config::of_task(&task_of(layers.clone())) };
        let mut notes = Vec::new();
        let mut value = serde_json::to_value(&config).map_err(|e| fail(e.to_string()))?;
        for layer in layers {
            layer.write_over(&mut value);
            notes.extend(layer.notes().iter().map(ToString::to_string));
            pins |= layer.get("train.pin_memory").is_some();
        }
        config = serde_json::from_value(value).map_err(|e| fail(e.to_string()))?;
        let verdict = check::check(&config);
        if !verdict.errors.is_empty() {
            let blame = |text: String| Problem::new(self.place_of(&text, &overrides), text);
            let problems = verdict.errors.into_iter().map(blame).collect();
            return Err(ConfigError::Problems(problems));
        }
        let blame = |text: String| Problem::new(self.place_of(&text, &overrides), text).to_string();
        notes.extend(verdict.warnings.into_iter().map(blame));
        // Only where someone wrote it: it is the default.
        if pins && config.train.pin_memory && profile == "cpu" {
            let why = "train.pin_memory has no effect on CPU ranks: pinned memory is for copies to a GPU";
            notes.push(format!("{}: {why}", self.file));
        }
        Ok((config, notes))
    }

    /// Where the values were written that `text` speaks of: the overrides among them, else the file.
    fn place_of(&self, text: &str, overrides: &[Layer]) -> Place {
        let in_key = |c: char| c.is_ascii_alphanumeric() || "_.".contains(c);
        let words: Vec<&str> = text.split(|c| !in_key(c)).map(|word| word.trim_end_matches('.')).collect();
        let mut sets: Vec<&str> = Vec::new();
        for (key, place) in overrides.iter().flat_map(Layer::places) {
            match place {
                Place::Set(set) if words.contains(&key) => sets.push(set),
                _ => {}
            }
        }
        match sets[..] {
            [] => Place::Resolved { file: self.file.clone() },
            _ => Place::Set(sets.join(" --set ")),
        }
    }

    fn stem(&self) -> String {
        let stem = Path::new(&self.file).file_stem().map(|stem| stem.to_string_lossy().into_owned());
        stem.unwrap_or_else(|| "config".into())
    }
}

impl Config {
    /// The resolved config as YAML, which loads again to an equal one.
    ///
    /// # Errors
    /// A path that is no UTF-8.
    pub fn to_yaml(&self) -> Result<String, ConfigError> {
        serde_yaml::to_string(self).map_err(ConfigError::Write)
    }
}

/// The task as written last. The deblurring guide's files name none: their keys tell.
fn task_of<'a>(layers: impl DoubleEndedIterator<Item = &'a Layer> + Clone) -> String {
    let written = layers.clone().rev().find_map(|layer| layer.get("task").and_then(|task| task.as_str()));
    let clips = || layers.into_iter().any(Layer::speaks_of_clips);
    written.map_or_else(|| if clips() { "deblur".into() } else { Config::default().task }, ToString::to_string)
}

fn read_sets(sets: &[String]) -> Result<Vec<Layer>, ConfigError> {
    let mut problems = Vec::new();
    let layers = sets.iter().map(|set| read_set(set, &mut problems)).collect();
    if problems.is_empty() { Ok(layers) } else { Err(ConfigError::Problems(problems)) }
}

/// One `key=value`; the value is YAML, so lists work: `data.split_ratio=[0.8,0.1,0.1]`.
fn read_set(set: &str, problems: &mut Vec<Problem>) -> Layer {
    let source = Source::Set(set);
    let Some((key, text)) = set.split_once('=').filter(|(key, _)| !key.trim().is_empty()) else {
        problems.push(Problem::new(source.place(1), "expected key=value, such as train.batch_size=32"));
        return Layer::default();
    };
    let value = match tree::parse(text) {
        Ok(Some(value)) => value,
        Ok(None) => Node { line: 1, body: Body::Scalar { text: String::new(), plain: true } },
        Err((_, text)) => {
            problems.push(Problem::new(source.place(1), text));
            return Layer::default();
        }
    };
    let entry = tree::Entry { key: key.trim().to_string(), line: 1, value };
    Layer::read(&[entry], "", &source, problems)
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
