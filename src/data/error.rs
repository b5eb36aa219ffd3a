//! Errors of data.

use cache::client::CacheError;
use spec::contract::shown;
use std::path::{Path, PathBuf};

/// An error of any kind that caused another one.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Failures of a data set and of what reads it. Texts name the file and the way out, and the cause as well, because ranks
/// send them to each other; `source` gives the cause as a value.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{path}: {problem}", path = shown(path))]
    File { path: PathBuf, problem: String },
    /// The file is there and unchanged, and its content violates its format. Every reader gets the same error.
    #[error("{path}: {problem}", path = shown(path))]
    Content { path: PathBuf, problem: String },
    /// The process or the machine lacks what reading needs (descriptors, memory). Says nothing about the file, and every other
    /// file would meet it: no file is left out for it.
    #[error("{path}: {problem}", path = shown(path))]
    Lack { path: PathBuf, problem: String },
    /// Reading one sample failed; `place` is [`Dataset::describe`](super::Dataset::describe)'s.
    #[error("sample {index} ({place}): {error}")]
    Sample {
        index: u64,
        place: String,
        #[source]
        error: Box<DataError>,
    },
    /// One frame of a sequence cannot be used.
    #[error("clip {sequence} frame {frame}: {error}")]
    Frame {
        sequence: String,
        frame: String,
        #[source]
        error: Box<DataError>,
    },
    /// A part of the data set that `data.skip_bad` would leave out.
    #[error("{error} (data.skip_bad: true leaves such {what} out)")]
    Bad {
        what: &'static str,
        #[source]
        error: Cause,
    },
    /// The data set holds nothing that can be read as the config says.
    #[error("{0}")]
    NothingUsable(String),
    /// Samples cannot be decoded, every one of them.
    #[error("{0} can be decoded")]
    AllUnreadable(String),
    /// A key of the config or an option of the command line does not fit the data.
    #[error("{problem}")]
    Setting { key: &'static str, problem: String },
    #[error("task {task} has no sample data")]
    NoSampleData { task: &'static str },
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("task {task} {what}")]
    NoPass { task: &'static str, what: &'static str },
    /// Ranks see different files.
    #[error("{0}")]
    RanksDiffer(String),
    /// Ranks could not hand each other what they know of the data set.
    #[error("{0}")]
    Gather(#[source] Cause),
    /// A rank handed over bytes that cannot be read.
    #[error("what ranks found out: {0}")]
    Gathered(#[source] serde_json::Error),
    /// An index beyond what there is: an error in the program.
    #[error("{what} {index} was asked for, {place} has {count}")]
    OutOfRange { what: &'static str, index: u64, place: &'static str, count: u64 },
    #[error("{asked} fields asked for, there are {count}")]
    Fields { asked: usize, count: usize },
    /// A reader of samples of different lengths gave what cannot be: an error in the program.
    #[error("field {field}: {bytes} bytes of a sample are no whole number of elements, or not as many as its ids have")]
    Length { field: &'static str, bytes: usize },
    #[error("a batch of {samples} samples was asked for, slots hold {room} (micro-batch)")]
    BatchTooLarge { samples: usize, room: usize },
    #[error(
        "all {slots} batch slots were still in use after {after_s} s: let go of batches earlier, or raise train.prefetch_factor"
    )]
    SlotsHeld { slots: usize, after_s: f64 },
    #[error("loader thread {id} did not start: {source}; lower train.num_workers")]
    Thread {
        id: u64,
        #[source]
        source: std::io::Error,
    },
    #[error("reading panicked: {0}")]
    Panicked(String),
    /// The loader has ended.
    #[error("{0}")]
    LoaderEnded(String),
    /// A result of a pass cannot be written.
    #[error(
        "{path}: cannot be written: {source}; free some space or choose another folder: what is whole stays, and the same \
         command continues with the rest",
        path = shown(path)
    )]
    Output { path: PathBuf, source: std::io::Error },
    #[error("PNG: {0}")]
    Encode(#[source] Cause),
    #[error("{0}")]
    Other(String),
    /// The user's own code failed, or gave what cannot be used; the text ends with its place.
    #[error("{0}")]
    User(String),
}

impl DataError {
    /// A problem of `key` in a text that names it.
    pub fn setting(key: &'static str, problem: impl Into<String>) -> Self {
        DataError::Setting { key, problem: problem.into() }
    }

    /// True if the user's own code is the cause.
    pub fn is_of_user(&self) -> bool {
        match self {
            DataError::User(_) => true,
            DataError::Sample { error, .. } | DataError::Frame { error, .. } => error.is_of_user(),
            _ => false,
        }
    }

    /// A failure to write `path`.
    pub fn output(path: &Path, source: std::io::Error) -> Self {
        DataError::Output { path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;
    use std::io;

    fn refused() -> io::Error {
        io::ErrorKind::PermissionDenied.into()
    }

    fn first_cause(error: &DataError) -> Option<io::ErrorKind> {
        let mut cause = error.source()?;
        while let Some(next) = cause.source() {
            cause = next;
        }
        cause.downcast_ref::<io::Error>().map(io::Error::kind)
    }

    #[test]
    fn a_cause_survives_as_a_value_and_stands_in_the_text_once() {
        let nested = DataError::Sample {
            index: 3,
            place: "s03.hdf5 rows 500..1000".into(),
            error: Box::new(DataError::Bad { what: "files", error: CacheError::Socket(refused()).into() }),
        };
        for error in
            [DataError::Cache(CacheError::Mapping(refused())), DataError::Thread { id: 1, source: refused() }, nested]
        {
            assert_eq!(first_cause(&error), Some(io::ErrorKind::PermissionDenied), "{error}");
            assert_eq!(error.to_string().matches("permission denied").count(), 1, "{error}");
        }
    }
}
