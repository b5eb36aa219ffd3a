//! Numbers of the command line.

pub(super) fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count >= 1).ok_or_else(|| "expected a whole number of 1 or more".into())
}
