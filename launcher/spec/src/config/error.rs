//! Errors of a config, with their places.

use super::tree::Mark;
use std::fmt;
use std::path::PathBuf;

/// Why no [`super::Config`] came about. All of these are mistakes in what the user wrote.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("no config named {name}: looked for {tried}; the configs there are: {known}")]
    NotFound { name: String, tried: String, known: String },
    #[error("cannot read config {path}", path = path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{}", list(.0))]
    Problems(Vec<Problem>),
    #[error("cannot write the resolved config as YAML")]
    Write(#[source] serde_yaml::Error),
}

/// One mistake and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub place: Place,
    pub text: String,
}

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Mark {
        file: String,
        at: Mark,
    },
    /// An override, as typed after `--set`.
    Set(String),
    /// The resolved config as a whole: the value may come from any layer.
    Resolved {
        file: String,
    },
}

impl Problem {
    pub(super) fn new(place: Place, text: impl Into<String>) -> Self {
        Self { place, text: text.into() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Mark { file, at } => write!(f, "{file}:{}:{}", at.line, at.column),
            Place::Set(text) => write!(f, "--set {text}"),
            Place::Resolved { file } => f.write_str(file),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// One problem stands on its own; several follow a count, one per line.
fn list(problems: &[Problem]) -> String {
    match problems {
        [one] => one.to_string(),
        many => {
            let lines: Vec<String> = many.iter().map(|problem| format!("\n  {problem}")).collect();
            format!("{} problems in the config:{}", many.len(), lines.concat())
        }
    }
}
