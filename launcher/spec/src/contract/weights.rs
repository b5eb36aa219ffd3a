//! Choice of a run's weights: `--weights` of `launch predict` and `launch evaluate`.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Which weights of a run are used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// Those of the checkpoint with the best value of the monitored metric; the newest where none is marked. Averaged ones
    /// where the run keeps an average, as validation used them.
    #[default]
    Best,
    /// Those of the newest checkpoint, averaged as above.
    Last,
    /// The average with this decay, of the best checkpoint.
    Ema(f64),
    /// A safetensors file with PyTorch's names.
    File(PathBuf),
}

impl Weights {
    /// A word for names of folders: `best`, `ema-0.9999`, the stem of a file.
    pub fn word(&self) -> String {
        let word = match self {
            Weights::Best => "best".into(),
            Weights::Last => "last".into(),
            Weights::Ema(decay) => format!("ema-{decay}"),
            Weights::File(path) => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        };
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
        word.chars().map(plain).collect()
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Weights::Best => f.write_str("best"),
            Weights::Last => f.write_str("last"),
            Weights::Ema(decay) => write!(f, "ema:{decay}"),
            Weights::File(path) => f.write_str(&super::shown(path)),
        }
    }
}

impl FromStr for Weights {
    type Err = String;

    /// `best`, `last`, `ema:DECAY`, or the path of a file; a file called `best` is `./best`.
    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("ema:")) {
            ("best", _) => Ok(Weights::Best),
            ("last", _) => Ok(Weights::Last),
            (_, Some(decay)) => {
                let inside = |decay: &f64| (0.0..1.0).contains(decay);
                let decay = decay.parse().ok().filter(inside);
                decay.map(Weights::Ema).ok_or_else(|| "expected a decay from 0 to below 1, such as ema:0.9999".into())
            }
            ("" | "ema", _) => Err("expected best, last, ema:DECAY or a file".into()),
            _ => Ok(Weights::File(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_read_as_they_are_written_and_name_folders() {
        for (text, weights, word) in [
            ("best", Weights::Best, "best"),
            ("last", Weights::Last, "last"),
            ("ema:0.9999", Weights::Ema(0.9999), "ema-0.9999"),
            ("a/b c.safetensors", Weights::File("a/b c.safetensors".into()), "b_c"),
            ("./best", Weights::File("./best".into()), "best"),
        ] {
            assert_eq!(text.parse::<Weights>().as_ref(), Ok(&weights));
            assert_eq!((weights.word(), weights.to_string()), (word.into(), text.into()));
            let json = serde_json::to_string(&weights).unwrap();
            assert_eq!(serde_json::from_str::<Weights>(&json).unwrap(), weights, "{json}");
        }
        for text in ["", "ema", "ema:", "ema:1", "ema:nan", "ema:-0.1"] {
            assert!(text.parse::<Weights>().is_err(), "{text}");
        }
    }
}
