//! Numbers, flags and paths as people write them.

/// A YAML 1.2 boolean.
pub(super) fn flag(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" => Some(true),
        "false" | "False" | "FALSE" => Some(false),
        _ => None,
    }
}

/// A whole number: `64`, `10_000`, `0x40`, `0o100`; `1e4` and `10.0` are whole too.
pub(super) fn whole(text: &str) -> Option<u64> {
    let exact = |value: f64| (value.fract() == 0.0 && (0.0..2f64.powi(53)).contains(&value)).then_some(value as u64);
    let based =
        |prefix: &str, base| text.strip_prefix(prefix).and_then(|digits| u64::from_str_radix(digits, base).ok());
    let plain = ungrouped(text)?;
    plain
        .parse::<u64>()
        .ok()
        .or_else(|| based("0x", 16))
        .or_else(|| based("0o", 8))
        .or_else(|| number(text).and_then(exact))
}

/// A finite number: `5`, `1e-4`, `1E-4`, `.5`, `1_000.5`.
pub(super) fn number(text: &str) -> Option<f64> {
    // Rust would also read `inf` and `nan`, which YAML holds for text.
    let numeric = text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
    ungrouped(text)?.parse::<f64>().ok().filter(|value| numeric && value.is_finite())
}

/// `text` without underscores; `None` where one does not stand between two digits.
fn ungrouped(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let digit = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_digit);
    let between = |at: usize| digit(at.checked_sub(1)) && digit(Some(at + 1));
    let fits = bytes.iter().enumerate().all(|(at, byte)| *byte != b'_' || between(at));
    fits.then(|| text.replace('_', ""))
}

/// The problem with a path that a shell would have expanded and a config does not.
pub(super) fn unexpanded(path: &str) -> Option<String> {
    let in_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    let named =
        |rest: &str| !rest.starts_with(|c: char| c.is_ascii_digit()) && !rest.is_empty() && rest.chars().all(in_name);
    let variable = path.split('/').find(|part| part.contains("${") || part.strip_prefix('$').is_some_and(named));
    if let Some(part) = variable {
        let from = part.find('$').unwrap_or(0);
        let shown = match part[from..].find('}') {
            Some(end) if part[from..].starts_with("${") => &part[from..=from + end],
            _ => &part[from..],
        };
        return Some(format!(
            "{shown} in {path:?} is not expanded: a config knows no environment variables; write the path out, begin it \
             with ~ for the home folder, or give it by --set, where the shell expands it"
        ));
    }
    let user = path.strip_prefix('~')?.split('/').next().filter(|user| !user.is_empty())?;
    Some(format!("~{user} in {path:?} is not expanded: only ~ for your own home folder is; write the path out"))
}

/// `path` with `~` at its beginning replaced by `home`; `None` where it does not begin with `~`.
pub(super) fn at_home(path: &str, home: &std::path::Path) -> Option<std::path::PathBuf> {
    match path.strip_prefix('~')? {
        "" => Some(home.to_path_buf()),
        rest => rest.strip_prefix('/').map(|rest| home.join(rest.trim_start_matches('/'))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn numbers_as_people_write_them() {
        for (text, value) in [
            ("1e-4", 1e-4),
            ("1E-4", 1e-4),
            (".5", 0.5),
            ("+.5", 0.5),
            ("-1.", -1.0),
            ("1_000.5", 1000.5),
            ("007", 7.0),
        ] {
            assert_eq!(number(text), Some(value), "{text}");
        }
        for text in ["inf", ".inf", ".nan", "nan", "1e999", "1__0", "_1", "1_", "1_.5", "1e", "", "0x10", "1,5"] {
            assert_eq!(number(text), None, "{text}");
        }
        for (text, value) in [
            ("10_000", 10_000),
            ("1e4", 10_000),
            ("10.0", 10),
            ("0x40", 64),
            ("0o17", 15),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(whole(text), Some(value), "{text}");
        }
        for text in ["-1", "1.5", "0x", "0xg", "1e20", "0b1", "yes"] {
            assert_eq!(whole(text), None, "{text}");
        }
    }

    #[test]
    fn paths_that_a_shell_would_expand() {
        for (path, says) in [
            ("${HOME}/runs", "${HOME} in \"${HOME}/runs\" is not expanded"),
            ("/d/a${USER}b/c", "${USER} in"),
            ("$HOME/runs", "$HOME in"),
            ("/data/$USER", "$USER in"),
            ("/data/${X", "${X in"),
            ("~ann/data", "~ann in \"~ann/data\" is not expanded"),
        ] {
            let problem = unexpanded(path).unwrap_or_default();
            assert!(problem.starts_with(says), "{path}: {problem}");
        }
        for path in ["~", "~/a", "/a/~b", "/a/c$", "/a/5$", "/a/x$y", "/a/$y", "/a/$RECYCLE.BIN", "a~"] {
            assert_eq!(unexpanded(path), None, "{path}");
        }
        let home = Path::new("/home/ann");
        assert_eq!(at_home("~", home).as_deref(), Some(home));
        assert_eq!(at_home("~//a/b", home).as_deref(), Some(Path::new("/home/ann/a/b")));
        assert_eq!(at_home("/a/~", home), None);
    }
}
