//! Log lines of `launch` and `rank`: one subscriber for `tracing` events, and what it lets through.
//!
//! `HEADROOM_LOG` holds a level (`off`, `error`, `warn`, `info`, `debug`, `trace`) or a filter such as
//! `warn,headroom::comm=debug`; `--log-level` wins over it. `warn` is the default. Events of the target [`USERS`] are for
//! everybody who looks at the run: they are shown at every level.
//!
//! Architecture invariant: lines go to a sink that the program chooses; nothing here writes by itself.

use spec::contract::USERS;
use std::fmt::{self, Write};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{EnvFilter, FilterExt, filter_fn};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Levels, the quietest first.
pub const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
const DEFAULT: &str = "warn";

/// A filter that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error("{from} is {text:?}: expected {}, or a filter such as warn,headroom::comm=debug", LEVELS.join(", "))]
pub struct FilterError {
    from: &'static str,
    text: String,
}

/// Chooses the filter: `level` if one was asked for, otherwise `variable`, the value of `HEADROOM_LOG`.
///
/// # Errors
/// Neither a level nor a filter.
pub fn filter(level: Option<&str>, variable: Option<&str>) -> Result<EnvFilter, FilterError> {
    let (from, text) = match (level, variable.map(str::trim).filter(|text| !text.is_empty())) {
        (Some(level), _) => ("--log-level", level),
        (None, Some(text)) => (spec::contract::env::LOG, text),
        (None, None) => ("the default", DEFAULT),
    };
    let refused = || FilterError { from, text: text.to_owned() };
    // A word that is no level would name a target, and be silent for all others.
    let is_level = |part: &str| LEVELS.contains(&part.to_ascii_lowercase().as_str());
    if text.split(',').any(|part| !part.contains('=') && !is_level(part.trim())) {
        return Err(refused());
    }
    // A filter of targets alone leaves the others at the default.
    let whole =
        if text.split(',').any(|part| is_level(part.trim())) { text.into() } else { format!("{DEFAULT},{text}") };
    EnvFilter::builder().parse(whole).map_err(|_| refused())
}

/// Sends what `filter` lets through to `log`, a line per event, and events of [`USERS`] to `users`. A second call in
/// one process changes nothing.
pub fn install(
    filter: EnvFilter,
    users: impl Fn(String) + Send + Sync + 'static,
    log: impl Fn(String) + Send + Sync + 'static,
) {
    let for_users = filter_fn(|metadata| metadata.target() == USERS);
    let users = Lines(users).with_filter(for_users.clone());
    let log = Lines(log).with_filter(filter.and(for_users.not()));
    let _ = tracing_subscriber::registry().with(users).with(log).try_init();
}

/// Makes a line of each event.
struct Lines<F>(F);

impl<S: Subscriber, F: Fn(String) + 'static> Layer<S> for Lines<F> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut text = Text::default();
        event.record(&mut text);
        let of = if metadata.target() == USERS { "" } else { metadata.target() };
        (self.0)(line(*metadata.level(), of, &text));
    }
}

/// `warning: text`; below a warning the place is of interest too: `debug headroom::comm: text`.
fn line(level: Level, target: &str, text: &Text) -> String {
    let Text { message, fields } = text;
    match level {
        Level::ERROR => format!("error: {message}{fields}"),
        Level::WARN => format!("warning: {message}{fields}"),
        _ if target.is_empty() => format!("{message}{fields}"),
        level => format!("{} {target}: {message}{fields}", level.as_str().to_ascii_lowercase()),
    }
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            // Fields that the `log` crate adds for itself.
            name if name.starts_with("log.") => Ok(()),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn a_level_wins_over_the_variable_and_a_wrong_word_is_refused() {
        let text = |level, variable| filter(level, variable).map(|filter| filter.to_string());
        assert_eq!(text(None, None).unwrap(), "warn");
        assert_eq!(text(None, Some(" ")).unwrap(), "warn");
        assert_eq!(text(Some("debug"), Some("error")).unwrap(), "debug");
        assert_eq!(text(None, Some("INFO")).unwrap(), "info");
        assert!(text(None, Some("headroom::comm=debug")).unwrap().contains("warn"));
        for wrong in ["wran", "headroom", "warn,comm", "headroom=loud"] {
            let error = text(None, Some(wrong)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("HEADROOM_LOG is {wrong:?}: expected off, error, warn")), "{error}");
        }
    }

    #[test]
    fn lines_for_users_pass_at_every_level_and_others_as_the_filter_says() {
        let sink = || {
            let lines = Arc::<Mutex<Vec<String>>>::default();
            let kept = Arc::clone(&lines);
            (lines, move |line| kept.lock().unwrap().push(line))
        };
        let ((users, to_users), (log, to_log)) = (sink(), sink());
        let for_users = filter_fn(|metadata| metadata.target() == USERS);
        let subscriber = tracing_subscriber::registry()
            .with(Lines(to_users).with_filter(for_users.clone()))
            .with(Lines(to_log).with_filter(filter(Some("info"), None).unwrap().and(for_users.not())));
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(target: USERS, "{}: read through libhdf5", "a.h5");
            tracing::debug!("not asked for");
            tracing::info!(rank = 3, "started");
            tracing::error!("lost");
        });
        assert_eq!(*users.lock().unwrap(), ["warning: a.h5: read through libhdf5"]);
        let log = log.lock().unwrap();
        assert_eq!(log.len(), 2, "{log:?}");
        assert!(log[0].starts_with("info ") && log[0].ends_with(": started rank=3"), "{log:?}");
        assert_eq!(log[1], "error: lost");
    }
}
