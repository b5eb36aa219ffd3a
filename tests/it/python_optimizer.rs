//! `python.optimizer`: an optimizer of the user's own trains as in a plain loop, and is saved and resumed to the bit.

use crate::python_task::{equal_pytorch, fixtures, runs, stopped_and_resumed};
use crate::support::{distance, run};
use std::fs;

const SGD: [&str; 3] = ["train.max_steps=10", "train.optimizer=sgd", "train.momentum=0.9"];

#[test]
fn an_optimizer_of_the_users_own_steps_as_in_a_plain_loop() {
    for (name, model) in [("groups", "dropout"), ("lion", "batchnorm")] {
        let optimizer = format!("python.optimizer=optimizers:{name}");
        let sets =
            [optimizer.as_str(), "train.scheduler=cosine", "train.warmup_steps=5", "train.min_learning_rate=1.0e-5"];
        let runs = runs("models:build", &format!("{{model: {model}}}"), &sets);
        let run = runs.finish("a", &["--ranks", "1"]);
        let plan = fs::read_to_string(run.path.join("plan.json")).unwrap();
        assert!(plan.contains("of the task's own optimizer"), "{plan}");
        let names: Vec<String> = run.tensors(50, "optimizer.safetensors").into_keys().collect();
        let moment = if name == "lion" { "average.head.weight" } else { "exp_avg.head.weight" };
        assert!(names.iter().any(|name| name == moment), "{names:?}");
        equal_pytorch(&[(format!("{model}:{name}"), run)], runs.path());
    }
}

/// A class is enough. Micro-batches, ranks and averages are as with an optimizer of the trainer.
#[test]
fn a_class_of_torch_optim_trains_as_headrooms_does() {
    let of = |ranks: &str, sets: &[&str]| {
        let all: Vec<&str> = SGD.iter().chain(sets).copied().collect();
        let runs = runs("models:build", "{model: function}", &all);
        let run = runs.finish("a", &["--ranks", ranks]);
        (run.tensors(10, "model.safetensors"), run.tensors(10, "ema.safetensors"))
    };
    let averaged = "train.ema_decay=0.9";
    let own = ["python.optimizer=torch.optim:SGD", "python.optimizer_args={momentum: 0.9}", averaged];
    let headroom = of("1", &["train.batch_size=12", averaged]);
    let cut = ["train.batch_size=2", "train.gradient_accumulation_steps=2", "train.microbatch=1"];
    let split: Vec<&str> = own.iter().chain(&cut).copied().collect();
    for found in [of("1", &[&own[..], &["train.batch_size=12"]].concat()), of("3", &split)] {
        for (found, expected) in [(&found.0, &headroom.0), (&found.1, &headroom.1)] {
            let far = distance(found, expected);
            assert!(far.norm < 1e-5, "{} of {}", far.norm, far.worst);
        }
    }
}

#[test]
fn a_stopped_run_with_it_resumes_to_the_same_bits() {
    let sets = [
        "python.optimizer=optimizers:lion",
        "data.shuffle=true",
        "train.max_steps=60",
        "train.scheduler=cosine",
        "train.ema_decay=0.9",
        "train.gradient_accumulation_steps=2",
    ];
    let runs = runs("models:build", "{model: batchnorm}", &sets);
    stopped_and_resumed(&runs);

    let other = ["--ranks", "2", "--resume", "auto", "--set", "train.max_steps=70", "--set"];
    for (optimizer, says) in [
        ("python.optimizer=optimizers:groups", "is that of optimizers.Lion"),
        ("python.optimizer=null", "keep train.optimizer"),
    ] {
        let ended = runs.train("broken", &[&other[..], &[optimizer]].concat());
        assert!(ended.code == Some(5) && ended.err.contains(says), "{optimizer}: {ended}");
    }
}

#[test]
fn optimizers_that_cannot_be_are_refused_with_the_reason() {
    let source = fs::read_to_string(fixtures().join("optimizers.py")).unwrap();
    let line = source.lines().position(|line| line.ends_with("# in the optimizer")).unwrap() + 1;
    let place = format!("optimizers.py:{line}: raise LookupError");
    let refusals = [
        ("optimizers:lbfgs", "runs passes by itself"),
        ("optimizers:clearing", "the gradient of"),
        ("optimizers:keeper", "holds a thing of type object at keeper"),
        ("optimizers:broken", place.as_str()),
        ("optimizers:missing", "has no attribute 'missing'"),
    ];
    for (optimizer, says) in refusals {
        let set = format!("python.optimizer={optimizer}");
        let runs = runs("models:build", "{model: dropout}", &[&set, "train.max_steps=3"]);
        let mut command = runs.command(&["--ranks", "1", "--name", "a"]);
        let ended = run(&mut command, runs.path());
        assert!(ended.code == Some(10) && ended.err.contains(says), "{optimizer}: {ended}");
    }
}
