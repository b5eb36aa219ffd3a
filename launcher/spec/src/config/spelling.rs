//! Keys as people spell them.

/// Sections under the names that other trainers give them.
pub(super) const SECTION_ALIASES: &[(&str, &str)] =
    &[("training", "train"), ("training_config", "train"), ("logging", "log")];

/// A key as written, in canonical case and section: `TRAINING.BATCH_SIZE` becomes `train.batch_size`. A word counts as
/// upper-case as a whole or not at all.
pub(super) fn canonical(written: &str) -> String {
    let mut words: Vec<String> = written.split('.').map(lower).collect();
    if let Some((_, section)) = SECTION_ALIASES.iter().find(|(alias, _)| words[0] == *alias) {
        words[0] = section.to_string();
    }
    words.join(".")
}

fn lower(word: &str) -> String {
    let upper = !word.contains(|c: char| c.is_ascii_lowercase());
    if upper { word.to_ascii_lowercase() } else { word.to_string() }
}
