//! Log lines of a rank: on standard error, where the launcher puts the rank's prefix before them. Lines for users go the
//! way of all others, once the rank speaks with its launcher.

use super::RankError;
use crate::report::Reporter;
use host::logging;
use spec::contract::env;
use std::io::Write;
use std::sync::OnceLock;

static REPORTER: OnceLock<Reporter> = OnceLock::new();

/// Shows log lines from here on.
///
/// # Errors
/// `HEADROOM_LOG` is neither a level nor a filter.
pub fn install() -> Result<(), RankError> {
    let wanted = std::env::var_os(env::LOG).map(|value| value.to_string_lossy().into_owned());
    let filter = logging::filter(None, wanted.as_deref()).map_err(|e| RankError::Usage(e.to_string()))?;
    let to_users = |line: String| match REPORTER.get() {
        Some(reporter) => reporter.line(line),
        None => to_stderr(line),
    };
    logging::install(filter, to_users, to_stderr);
    Ok(())
}

/// Lines for users go through `reporter` from here on.
pub fn speak_through(reporter: &Reporter) {
    let _ = REPORTER.set(reporter.clone());
}

fn to_stderr(line: String) {
    // Nobody may read it, which ends nothing.
    let _ = writeln!(std::io::stderr(), "{line}");
}
