//! The plan as people read it.

use super::constants::{GIB, KIB, MIB, TIB};
use super::{BudgetLine, Plan};
use crate::contract::Device;
use std::fmt::Write;

const NAME_WIDTH: usize = 18;
const SIZE_WIDTH: usize = 10;
/// Indent, three columns and the gaps between them.
const FORMULA_START: usize = 2 + NAME_WIDTH + 2 * (SIZE_WIDTH + 1) + 2;

/// Bytes with the unit people would choose: `512 B`, `70.3 KiB`, `220.0 MiB`, `18.83 GiB`.
pub fn bytes_text(bytes: u64) -> String {
    let in_unit = |unit: u64| bytes as f64 / unit as f64;
    match bytes {
        0..KIB => format!("{bytes} B"),
        KIB..MIB => format!("{:.1} KiB", in_unit(KIB)),
        MIB..GIB => format!("{:.1} MiB", in_unit(MIB)),
        GIB..TIB => format!("{:.2} GiB", in_unit(GIB)),
        _ => format!("{:.2} TiB", in_unit(TIB)),
    }
}

/// Thousands apart: `282,996`.
pub(super) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let comma = |i: usize| i > 0 && (digits.len() - i).is_multiple_of(3);
    digits.char_indices().flat_map(|(i, digit)| comma(i).then_some(',').into_iter().chain([digit])).collect()
}

impl Plan {
    /// [`Plan::table_at`] 80 columns.
    pub fn table(&self) -> String {
        self.table_at(80)
    }

    /// Headline, one row per budget line, sum. Formulas are wrapped so that no line is longer than `width` columns,
    /// as far as words allow.
    pub fn table_at(&self, width: usize) -> String {
        let mut text = self.headline(width);
        row(&mut text, width, ["", "per rank", "node"], "");
        for line in &self.budget.lines {
            budget_row(&mut text, width, line);
        }
        let total = self.budget.total_bytes;
        let left =
            format!("{} left of {}", bytes_text(total.saturating_sub(self.budget.need_bytes())), bytes_text(total));
        row(&mut text, width, ["sum", "", &bytes_text(self.budget.need_bytes())], &left);
        if let Some(gpu) = &self.budget.gpu {
            let _ = writeln!(text, "each GPU: {} free", bytes_text(gpu.total_bytes));
            gpu.lines.iter().for_each(|line| budget_row(&mut text, width, line));
            row(&mut text, width, ["sum", "", &bytes_text(gpu.need_bytes())], "");
        }
        text
    }

    /// The notes below each other, `note: ` before each, wrapped with a hanging indent; ends with a line break.
    pub fn notes_at(&self, width: usize) -> String {
        let mut text = String::new();
        for note in &self.notes {
            for (i, line) in wrap(note, width.saturating_sub(6)).iter().enumerate() {
                let _ = writeln!(text, "{}{line}", if i == 0 { "note: " } else { "      " });
            }
        }
        text
    }

    /// Topology, batch, loader and budget, one fact per line.
    fn headline(&self, width: usize) -> String {
        let (topology, batch, loader) = (&self.topology, &self.batch, &self.loader);
        let nodes = match topology.nnodes {
            0 | 1 => String::new(),
            nodes => format!(" on node {} of {nodes} ({} in all)", topology.node_rank, topology.world_size),
        };
        let facts = [
            (
                "ranks",
                format!(
                    "{} {}{nodes}, {} each",
                    topology.local_world_size,
                    if topology.device == Device::Cpu { "on CPU" } else { "on CUDA" },
                    count(topology.threads_per_rank, "compute thread")
                ),
            ),
            (
                "batch",
                // Nothing is trained.
                match batch.global_batch {
                    0 => format!("{} at a time on each", count(batch.val_batch, "sample")),
                    global_batch => format!(
                        "{global_batch} samples per step over all ranks, {} × {} on each",
                        count(batch.micro_steps, "micro-batch"),
                        batch.micro_batch
                    ),
                },
            ),
            ("loader", format!("{} and {} per rank", count(loader.threads, "thread"), count(loader.slots, "slot"))),
            ("budget", format!("{} ({})", bytes_text(self.budget.total_bytes), self.budget.formula)),
        ];
        let mut text = String::new();
        let data = self.data.iter().enumerate().map(|(i, fact)| (if i == 0 { "data" } else { "" }, fact.clone()));
        for (name, fact) in facts.into_iter().chain(data) {
            let mut lines = wrap(&fact, width.saturating_sub(9)).into_iter();
            let _ = writeln!(text, "{name:<8} {}", lines.next().unwrap_or_default());
            lines.for_each(|line| {
                let _ = writeln!(text, "{:<8} {line}", "");
            });
        }
        text
    }
}

pub(super) fn count(n: usize, word: &str) -> String {
    match (n, word.ends_with("ch")) {
        (1, _) => format!("1 {word}"),
        (_, true) => format!("{n} {word}es"),
        _ => format!("{n} {word}s"),
    }
}

fn budget_row(text: &mut String, width: usize, line: &BudgetLine) {
    let per_rank = line.per_rank_bytes.map(bytes_text).unwrap_or_default();
    row(text, width, [line.name.text(), &per_rank, &bytes_text(line.bytes)], &line.formula);
}

fn row(text: &mut String, width: usize, [name, per_rank, node]: [&str; 3], formula: &str) {
    // Below some 20 columns a wrapped formula is worse than a long line.
    let mut lines = wrap(formula, width.saturating_sub(FORMULA_START).max(20)).into_iter();
    let first = lines.next().unwrap_or_default();
    let start = format!("  {name:<NAME_WIDTH$} {per_rank:>SIZE_WIDTH$} {node:>SIZE_WIDTH$}  {first}");
    let _ = writeln!(text, "{}", start.trim_end());
    for line in lines {
        let _ = writeln!(text, "{:FORMULA_START$}{line}", "");
    }
}

/// Breaks at blanks so that no line has more than `width` characters, as far as words allow.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1_504_836].map(grouped), ["0", "999", "1,000", "1,504,836"]);
        let texts = [512, 1536, 220 << 20, 20 << 30].map(bytes_text);
        assert_eq!(texts, ["512 B", "1.5 KiB", "220.0 MiB", "20.00 GiB"]);
    }

    #[test]
    fn wraps_at_blanks_by_characters() {
        assert_eq!(wrap("4 × 64 × 72,000 B", 8), ["4 × 64 ×", "72,000 B"]);
        assert_eq!(wrap("", 8), Vec::<String>::new());
    }
}
