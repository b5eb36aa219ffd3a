//! The message of the failure that decides.

use super::End;
use std::fmt;

/// The first failure of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub rank: u32,
    pub pid: u32,
    /// How its process ended.
    pub status: Option<End>,
    /// Optimizer step, as the rank said it.
    pub step: Option<u64>,
    /// In the rank's words.
    pub error: Option<String>,
    /// Facts about a killed rank, one per line.
    pub explanation: Vec<String>,
    /// The end of its output, oldest first.
    pub last_lines: Vec<String>,
}

impl Failure {
    /// `rank 2 failed at step 37: SIGSEGV (signal 11)`.
    pub fn headline(&self) -> String {
        let step = self.step.map(|step| format!(" at step {step}")).unwrap_or_default();
        let why = match (&self.error, self.status) {
            (Some(error), _) => error.clone(),
            (None, Some(end)) => end.to_string(),
            (None, None) => "unknown end".into(),
        };
        format!("rank {} failed{step}: {why}", self.rank)
    }

    /// Headline and explanation, a fact per line: what is kept of it.
    pub fn words(&self) -> String {
        let lines: Vec<String> = std::iter::once(self.headline()).chain(self.explanation.iter().cloned()).collect();
        lines.join("\n")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.headline())?;
        self.explanation.iter().try_for_each(|line| write!(f, "\n  {line}"))?;
        if !self.last_lines.is_empty() {
            write!(f, "\nlast lines of rank {}:", self.rank)?;
        }
        self.last_lines.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_rank_step_and_reason_then_the_last_lines() {
        let mut failure = Failure {
            rank: 2,
            pid: 7,
            status: Some(End::Signal(9)),
            step: Some(37),
            error: None,
            explanation: vec!["killed for memory".into()],
            last_lines: vec!["a".into(), "b".into()],
        };
        assert_eq!(
            failure.to_string(),
            "rank 2 failed at step 37: SIGKILL (signal 9)\n  killed for memory\nlast lines of rank 2:\n  a\n  b"
        );
        assert_eq!(failure.words(), "rank 2 failed at step 37: SIGKILL (signal 9)\nkilled for memory");
        failure.error = Some("disk full".into());
        failure.step = None;
        assert_eq!(failure.headline(), "rank 2 failed: disk full");
    }
}
