//! The index of all keys: general ones and those of the tasks, with every other name that they answer to.

use super::keys::{Key, Keys, Section};
use super::model::Config;
use super::spelling::SECTION_ALIASES;
use super::task::TaskSpec;
use std::collections::{BTreeSet, HashMap};

/// Device profiles that a config may hold.
pub const PROFILES: &[&str] = &["cpu", "cuda"];

/// The meaning of a name that is not a key itself.
#[derive(Clone, Copy, Debug)]
pub(super) enum Alias {
    /// Stands for this key.
    To(&'static Key),
    /// Accepted, has no effect; the text says why.
    Inert(&'static str),
}

/// All keys, by name.
pub struct Schema {
    tasks: &'static [&'static dyn TaskSpec],
    sections: Vec<&'static Section>,
    keys: HashMap<&'static str, &'static Key>,
    aliases: HashMap<String, Alias>,
    /// Names that hold keys rather than a value.
    outer: BTreeSet<String>,
}

impl Schema {
    /// The general keys with those of `tasks`.
    pub fn of(tasks: &'static [&'static dyn TaskSpec]) -> Self {
        let roots = std::iter::once(Config::SECTION).chain(tasks.iter().map(|task| task.section()));
        let sections: Vec<&'static Section> = roots.flat_map(Section::all).collect();
        let mut schema =
            Self { tasks, sections, keys: HashMap::new(), aliases: HashMap::new(), outer: BTreeSet::new() };
        for section in &schema.sections {
            for key in section.keys {
                schema.keys.insert(key.path, key);
                let earlier = section.earlier.map(|prefix| format!("{prefix}{}", key.leaf()));
                for name in key.aliases.iter().map(ToString::to_string).chain(earlier) {
                    schema.aliases.insert(name, Alias::To(key));
                }
            }
            for inert in section.inert {
                schema.aliases.insert(inert.path.into(), Alias::Inert(inert.why));
            }
        }
        let names = schema.keys.keys().copied().chain(schema.aliases.keys().map(String::as_str));
        let prefixes = names.flat_map(|name| name.match_indices('.').map(|(at, _)| name[..at].to_string()));
        schema.outer = prefixes.collect();
        schema
    }

    pub fn tasks(&self) -> &'static [&'static dyn TaskSpec] {
        self.tasks
    }

    /// Sections in the order of their declaration; the first is the top.
    pub fn sections(&self) -> &[&'static Section] {
        &self.sections
    }

    /// Keys in the order of their declaration.
    pub fn keys(&self) -> impl Iterator<Item = &'static Key> {
        self.sections.iter().flat_map(|section| section.keys)
    }

    /// The task called `name`.
    pub fn task(&self, name: &str) -> Option<&'static dyn TaskSpec> {
        self.tasks.iter().find(|task| task.name() == name).copied()
    }

    pub fn key(&self, path: &str) -> Option<&'static Key> {
        self.keys.get(path).copied()
    }

    pub(super) fn alias(&self, path: &str) -> Option<Alias> {
        self.aliases.get(path).copied()
    }

    /// Names that are not keys themselves, sorted.
    pub(super) fn aliases_sorted(&self) -> Vec<(&str, Alias)> {
        let mut aliases: Vec<(&str, Alias)> =
            self.aliases.iter().map(|(name, alias)| (name.as_str(), *alias)).collect();
        aliases.sort_unstable_by_key(|(name, _)| *name);
        aliases
    }

    /// Other names of `key`, sorted.
    pub fn other_names(&self, key: &Key) -> Vec<&str> {
        let leads = |alias: &Alias| matches!(alias, Alias::To(to) if to.path == key.path);
        self.aliases_sorted().into_iter().filter(|(_, alias)| leads(alias)).map(|(name, _)| name).collect()
    }

    /// Checks that `path` holds keys rather than a value.
    pub(super) fn is_section(&self, path: &str) -> bool {
        self.outer.contains(path)
    }

    /// The name that is nearest to an unknown one: a key's own name also where another name of it is nearest. A key of
    /// the same section comes before a key of another.
    pub fn nearest(&self, unknown: &str, in_profile: bool) -> &str {
        let unknown = unknown.to_ascii_lowercase();
        let (section, leaf) = unknown.rsplit_once('.').unwrap_or(("", &unknown));
        let keys = self.keys().map(|key| (key.path, key.path));
        let aliases = self.aliases_sorted().into_iter().map(|(name, alias)| match alias {
            Alias::To(key) => (name, key.path),
            Alias::Inert(_) => (name, name),
        });
        let sections = self.sections.iter().map(|section| section.name()).filter(|name| !name.is_empty());
        let top =
            sections.chain(SECTION_ALIASES.iter().map(|(alias, _)| *alias)).chain((!in_profile).then_some("profiles"));
        let far = |name: &str| {
            let (its_section, its_leaf) = name.rsplit_once('.').unwrap_or(("", name));
            2 * strsim::damerau_levenshtein(leaf, its_leaf) + 3 * usize::from(section != its_section)
        };
        let names = keys.chain(aliases).chain(top.map(|name| (name, name)));
        names.min_by_key(|(name, _)| far(name)).map_or("name", |(_, shown)| shown)
    }
}

/// JSON pointer of a key in a serialised [`Config`].
pub(super) fn pointer(path: &str) -> String {
    format!("/{}", path.replace('.', "/"))
}
