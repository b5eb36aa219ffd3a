//! `launch help`: keys, sections, exit codes and verbs.

use super::{Error, print};
use crate::cli::{CliError, Command, HelpArgs};
use spec::contract::exit;
use std::ffi::OsString;
use std::fmt::Write;

pub(super) fn help(args: &HelpArgs) -> Result<u8, Error> {
    let schema = spec::task::schema();
    let text = match args.topic.as_deref() {
        _ if args.markdown => schema.markdown(),
        _ if args.schema => serde_json::to_string_pretty(&spec::config::json_schema(&schema)).unwrap_or_default(),
        None => schema.overview(),
        Some("exit-codes") => exit_codes(),
        Some(topic) => match verb(topic) {
            Some(text) => text,
            None => schema.help(topic).map_err(CliError::Usage)?,
        },
    };
    print::out(text)?;
    Ok(exit::OK)
}

/// The help of a verb.
fn verb(topic: &str) -> Option<String> {
    let line = ["launch", topic, "--help"].map(OsString::from);
    match Command::parse(line) {
        Err(CliError::Shown(text)) if !topic.starts_with('-') => Some(text),
        _ => None,
    }
}

fn exit_codes() -> String {
    let mut text = String::from("Exit codes of launch and rank:\n");
    for (code, meaning) in exit::TABLE {
        let _ = writeln!(text, "  {code:>3}  {}", meaning.trim());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_and_exit_codes_have_help() {
        assert!(verb("plan").unwrap().contains("--gpus"));
        assert_eq!((verb("train.batch_size"), verb("--version")), (None, None));
        let text = exit_codes();
        assert!(
            text.contains("\n   75  Stopped on request") && text.contains("\n    3  The run does not fit"),
            "{text}"
        );
    }
}
