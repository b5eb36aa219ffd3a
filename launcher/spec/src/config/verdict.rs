//! Findings on a config.

/// Findings of the checks: errors and warnings.
#[derive(Debug, Default)]
pub struct Verdict {
    pub(super) errors: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl Verdict {
    /// An error unless `holds`.
    pub fn need(&mut self, holds: bool, text: impl FnOnce() -> String) {
        if !holds {
            self.errors.push(text());
        }
    }

    /// A warning unless `holds`.
    pub fn warn(&mut self, holds: bool, text: impl FnOnce() -> String) {
        if !holds {
            self.warnings.push(text());
        }
    }
}
