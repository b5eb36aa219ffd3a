//! Checks of values together.

use super::PythonConfig;
use crate::config::Verdict;

pub(super) fn check(python: &PythonConfig, v: &mut Verdict) {
    // Empty by default; the interpreter asks for one before it starts.
    v.need(python.build.is_empty() || is_place(&python.build), || {
        format!(
            "python.build is {:?}; it must name a function as module:function, such as mypkg.train:build",
            python.build
        )
    });
}

/// `module:function`, both with dots between names.
fn is_place(text: &str) -> bool {
    let name = |part: &str| {
        let first = part.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
        first && part.chars().all(|c| c.is_alphanumeric() || c == '_')
    };
    let dotted = |text: &str| text.split('.').all(name);
    text.split_once(':').is_some_and(|(module, function)| dotted(module) && dotted(function))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_named_with_its_module() {
        for good in ["train:build", "my_pkg.train:Job.build", "_a:b2"] {
            assert!(is_place(good), "{good}");
        }
        for bad in ["", "train", "train:", ":build", "train.py:build()", "my-pkg:build", "a..b:c", "1a:b"] {
            assert!(!is_place(bad), "{bad}");
        }
    }
}
