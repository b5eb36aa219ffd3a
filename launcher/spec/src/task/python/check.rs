//! Checks of values together.

use super::PythonConfig;
use crate::config::{Config, Values, Verdict};

pub(super) fn check(python: &PythonConfig, config: &Config, v: &mut Verdict) {
    // Empty by default; the interpreter asks for one before it starts.
    v.need(python.build.is_empty() || is_place(&python.build), || {
        format!(
            "python.build is {:?}; it must name a function as module:function, such as mypkg.train:build",
            python.build
        )
    });
    match &python.optimizer {
        Some(place) => optimizer(place, config, v),
        None => v.need(python.optimizer_args == Values::default(), || {
            "python.optimizer_args are set and python.optimizer is not: name the function that takes them".into()
        }),
    }
}

/// An optimizer of the user's own keeps its state where the trainer cannot divide it, and has its own momentum.
fn optimizer(place: &str, config: &Config, v: &mut Verdict) {
    v.need(is_place(place), || {
        format!(
            "python.optimizer is {place:?}; it must name a function or a class as module:factory, such as \
             mypkg.train:optimizer or torch.optim:NAdam"
        )
    });
    v.need(!config.ddp.shard_optimizer, || {
        "ddp.shard_optimizer divides the state of Headroom's optimizers alone: python.optimizer keeps its state whole on \
         every rank; leave one of the two out"
            .into()
    });
    v.need(config.train.warmup_momentum.is_none(), || {
        "train.warmup_momentum moves the momentum of Headroom's SGD alone: with python.optimizer the momentum is that \
         optimizer's; leave the key out"
            .into()
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
    use crate::task::parse_config;

    #[test]
    fn an_optimizer_of_the_users_own_is_refused_where_it_cannot_be() {
        let problem = |text: &str| {
            let text = format!("task: python\n{text}");
            let read = parse_config(&text, "a.yaml").and_then(|raw| raw.resolve("cpu", &[]));
            read.err().map(|error| error.to_string()).unwrap_or_default()
        };
        for good in ["mypkg.train:optimizer", "torch.optim:NAdam"] {
            assert_eq!(problem(&format!("python: {{optimizer: {good}, optimizer_args: {{eps: 1.0e-7}}}}")), "");
        }
        for (text, word) in [
            ("python: {optimizer: NAdam}", "python.optimizer is \"NAdam\""),
            ("python: {optimizer: 'a:b'}\nddp: {shard_optimizer: true}", "ddp.shard_optimizer divides"),
            (
                "python: {optimizer: 'a:b'}\ntrain: {optimizer: sgd, warmup_momentum: 0.8}",
                "train.warmup_momentum moves",
            ),
            ("python: {optimizer_args: {eps: 1}}", "python.optimizer is not"),
        ] {
            assert!(problem(text).contains(word), "{text}: {}", problem(text));
        }
    }

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
