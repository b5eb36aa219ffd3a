//! Colours on a terminal: `--color`, and the variables that users set for all programs.
//!
//! Sources: <https://no-color.org>, <https://bixense.com/clicolors>.

use std::ffi::OsString;
use std::sync::atomic::{AtomicU8, Ordering};

/// `--color`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Colour {
    #[default]
    Auto,
    Always,
    Never,
}

static CHOSEN: AtomicU8 = AtomicU8::new(Colour::Auto as u8);

impl Colour {
    /// Makes it the choice of this program.
    pub fn choose(self) {
        CHOSEN.store(self as u8, Ordering::Relaxed);
    }

    fn wanted(self, is_terminal: bool, lookup: impl Fn(&str) -> Option<OsString>) -> bool {
        let set = |name: &str| lookup(name).filter(|value| !value.is_empty());
        match self {
            Colour::Always => true,
            Colour::Never => false,
            Colour::Auto if set("NO_COLOR").is_some() => false,
            Colour::Auto if set("CLICOLOR_FORCE").is_some_and(|value| value != "0") => true,
            Colour::Auto if lookup("CLICOLOR").is_some_and(|value| value == "0") => false,
            Colour::Auto => is_terminal && lookup("TERM").is_none_or(|term| term != "dumb"),
        }
    }
}

/// True if output that goes to a terminal, or elsewhere, is to have colours.
pub fn wanted(is_terminal: bool) -> bool {
    let chosen = match CHOSEN.load(Ordering::Relaxed) {
        1 => Colour::Always,
        2 => Colour::Never,
        _ => Colour::Auto,
    };
    chosen.wanted(is_terminal, |name| std::env::var_os(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_wins_over_variables_and_no_color_over_force() {
        let with = |choice: Colour, terminal: bool, pairs: &'static [(&str, &str)]| {
            choice.wanted(terminal, |name| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.into()))
        };
        assert!(with(Colour::Auto, true, &[]) && !with(Colour::Auto, false, &[]));
        assert!(!with(Colour::Auto, true, &[("NO_COLOR", "1")]) && with(Colour::Auto, true, &[("NO_COLOR", "")]));
        assert!(with(Colour::Auto, false, &[("CLICOLOR_FORCE", "1")]));
        assert!(!with(Colour::Auto, false, &[("CLICOLOR_FORCE", "0")]));
        assert!(!with(Colour::Auto, false, &[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]));
        assert!(!with(Colour::Auto, true, &[("CLICOLOR", "0")]) && !with(Colour::Auto, true, &[("TERM", "dumb")]));
        assert!(
            with(Colour::Always, false, &[("NO_COLOR", "1")]) && !with(Colour::Never, true, &[("CLICOLOR_FORCE", "1")])
        );
        Colour::Always.choose();
        assert!(wanted(false));
        Colour::Auto.choose();
    }
}
