//! Keys of optimizer, schedule and averages that mean something only together.

use super::*;

#[test]
fn decays_are_written_as_nothing_a_number_or_a_list() {
    let of = |text: &str| load(&format!("train: {{ema_decay: {text}}}\n")).train.ema_decay.0;
    assert_eq!([of("null"), of("0.999"), of("[0.9, 1e-1]"), of("[]")], [vec![], vec![0.999], vec![0.9, 0.1], vec![]]);
    assert_eq!(resolved("", "cpu", &["train.ema_decay=[0.99,0.9]"]).unwrap().train.ema_decay.0, [0.99, 0.9]);
    for text in ["null", "0.999", "[0.9, 0.99]"] {
        let config = load(&format!("train: {{ema_decay: {text}}}\n"));
        let again = parse_config(&config.to_yaml().unwrap(), "again.yaml").unwrap().resolve("cpu", &[]).unwrap();
        assert_eq!(again, config);
    }
    // As earlier versions wrote it.
    assert!(load("train: {ema_decay: 0.5}\n").to_yaml().unwrap().contains("ema_decay: 0.5\n"));
}

#[test]
fn keys_that_contradict_each_other_are_refused_and_idle_ones_are_named() {
    for (text, says) in [
        ("{optimizer: sgd, nesterov: true, momentum: 0}", "train.nesterov is true and train.momentum 0"),
        ("{optimizer: sgd, warmup_momentum: 0.8, momentum: 0}", "train.warmup_momentum is set and train.momentum 0"),
    ] {
        let found = error(&format!("train: {text}\n"), &[]);
        assert!(found.contains(says), "{found}");
    }
    for (text, says) in [
        ("{nesterov: true}", "train.nesterov is set, and train.optimizer is neither sgd nor musgd"),
        ("{warmup_momentum: 0.8}", "train.warmup_momentum is set, and train.optimizer is neither sgd nor musgd"),
        ("{warmup_rate: 0.1}", "train.warmup_rate is 0.1, which only train.warmup_mode: within reads"),
        ("{warmup_accumulation: true}", "train.gradient_accumulation_steps 1: it has no effect"),
        ("{ema_ramp: 2000}", "train.ema_ramp is set and train.ema_decay null"),
    ] {
        let raw = parse_config(&format!("train: {text}\n"), "my.yaml").unwrap();
        let (_, notes) = raw.resolve_with_notes("cpu", &[]).unwrap();
        assert!(notes.iter().any(|note| note.contains(says)), "{text}: {notes:?}");
    }
    let whole = "{optimizer: sgd, nesterov: true, warmup_momentum: 0.8, warmup_rate: 0.1, warmup_mode: within, \
                 warmup_accumulation: true, gradient_accumulation_steps: 4, ema_decay: 0.9999, ema_ramp: 2000, \
                 ema_buffers: average, scheduler: linear, lrf: 0.01, schedule_by: epoch, sync_bn: true}";
    let raw = parse_config(&format!("train: {whole}\n"), "my.yaml").unwrap();
    let (config, notes) = raw.resolve_with_notes("cpu", &[]).unwrap();
    assert!(notes.is_empty() && config.train.sync_batchnorm, "{notes:?}");
}
