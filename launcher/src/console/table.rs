//! The closing table of a run: what it took, what it reached, memory against the plan.

use super::text::duration;
use spec::contract::Summary;
use spec::plan::{Plan, bytes_text as bytes};

/// Widest table, columns.
const WIDTH: usize = 80;
const LABEL: usize = 16;

/// A box of at most 80 columns, without a line break at its end.
pub fn closing_table(summary: &Summary, plan: &Plan) -> String {
    let mut rows = vec![
        ("status", format!("{}{}", summary.status, restarts(summary.restarts))),
        ("time", time(summary)),
        match summary.samples {
            None => {
                ("steps", format!("{}, {} whole {}", summary.steps, summary.epochs, plural(summary.epochs, "epoch")))
            }
            Some(samples) if summary.outputs > 0 => {
                ("samples", format!("{samples}, {} whole {}", summary.outputs, plural(summary.outputs, "output")))
            }
            Some(samples) => ("samples", samples.to_string()),
        },
    ];
    if summary.samples_per_s > 0.0 {
        rows.push(("speed", format!("{:.0} samples/s", summary.samples_per_s)));
    }
    if let Some(best) = &summary.best {
        rows.push(("best", format!("{} {} at step {}", best.metric, number(best.value), best.step)));
    }
    // All of them are of one part of the data, which labels the row.
    let part = summary.headline.first().and_then(|name| name.split_once('.')).map_or("", |(part, _)| part);
    let short = |name: &str| name.strip_prefix(part).map_or(name, |rest| rest.trim_start_matches('.')).to_owned();
    let one = |name: &String| summary.metrics.get(name).map(|v| format!("{}\u{a0}{}", short(name), number(*v)));
    let reached: Vec<String> = summary.headline.iter().filter_map(one).collect();
    if !reached.is_empty() {
        rows.push((part, reached.join(", ")));
    }
    rows.push(("memory, ranks", per_rank(summary, plan)));
    rows.push(("memory, node", against(summary.peak_node_bytes, plan.budget.total_bytes)));
    if summary.files_skipped > 0 {
        rows.push(("files left out", summary.files_skipped.to_string()));
    }
    boxed(rows.into_iter().flat_map(|(label, value)| wrap(label, &value)).collect())
}

/// Columns beside each other, two spaces between; `right`: columns of numbers.
pub fn aligned(rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let chars = |text: &str| text.chars().count();
    let cell = |row: &Vec<String>, column: usize| row.get(column).map_or(0, |text| chars(text));
    let widths: Vec<usize> =
        (0..columns).map(|column| rows.iter().map(|row| cell(row, column)).max().unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().enumerate().map(|(column, text)| {
            let space = " ".repeat(widths[column] - chars(text));
            if right.contains(&column) { space + text } else { text.clone() + &space }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A stage of a run, for the table at its end. `None`: it was not run.
pub type StageEnd<'a> = (&'a str, Option<&'a Summary>);

/// One table for all stages of a run: status, time, what was reached, memory of the node against the budget.
pub fn stages_table(stages: &[StageEnd], budget_bytes: u64) -> String {
    let mut rows = Vec::new();
    for (name, summary) in stages {
        let Some(summary) = summary else {
            rows.extend(wrap(name, "not run"));
            continue;
        };
        let done = match summary.samples {
            Some(samples) => format!("{samples} samples"),
            None => format!("{} steps", summary.steps),
        };
        let mut facts =
            vec![format!("{}{}", summary.status, restarts(summary.restarts)), duration(summary.wall_s), done];
        match &summary.best {
            Some(best) => facts.push(format!("best {}\u{a0}{}", best.metric, number(best.value))),
            None => {
                facts.extend(summary.headline.iter().filter_map(|name| {
                    summary.metrics.get(name).map(|value| format!("{name}\u{a0}{}", number(*value)))
                }))
            }
        }
        if summary.peak_node_bytes > 0 {
            facts.push(format!("peak\u{a0}{}", bytes(summary.peak_node_bytes).replace(' ', "\u{a0}")));
        }
        rows.extend(wrap(name, &facts.join(", ")));
    }
    let most = stages.iter().filter_map(|(_, summary)| Some(summary.as_ref()?.peak_node_bytes)).max().unwrap_or(0);
    let wall: f64 = stages.iter().filter_map(|(_, summary)| Some(summary.as_ref()?.wall_s)).sum();
    rows.extend(wrap("all stages", &duration(wall)));
    rows.extend(wrap("memory, node", &against(most, budget_bytes)));
    boxed(rows)
}

fn boxed(rows: Vec<String>) -> String {
    let inner = rows.iter().map(|row| row.chars().count()).max().unwrap_or(0);
    let line = "─".repeat(inner + 2);
    let body: String = rows.iter().map(|row| format!("│ {row:<inner$} │\n")).collect();
    format!("┌{line}┐\n{body}└{line}┘")
}

/// A run that failed has not said how long it trained.
fn time(summary: &Summary) -> String {
    let wall = duration(summary.wall_s);
    if summary.train_s > 0.0 { format!("{wall}, of which training {}", duration(summary.train_s)) } else { wall }
}

fn plural(count: u64, word: &str) -> String {
    if count == 1 { word.into() } else { format!("{word}s") }
}

/// Four digits, as people compare them.
fn number(value: f64) -> String {
    match value.abs() {
        size if (1e-3..1e4).contains(&size) => format!("{value:.*}", (3.0 - size.log10().floor()) as usize),
        _ if value == 0.0 => "0".into(),
        _ => format!("{value:.3e}"),
    }
}

fn restarts(count: u32) -> String {
    match count {
        0 => String::new(),
        1 => " after 1 restart".into(),
        more => format!(" after {more} restarts"),
    }
}

/// Peaks of all ranks' own memory, then what the plan has for one of them.
fn per_rank(summary: &Summary, plan: &Plan) -> String {
    // Number and unit stay together when the line is broken.
    let amount = |peak: &u64| bytes(*peak).replace(' ', "\u{a0}");
    let peaks: Vec<String> = summary.peak_own_bytes_per_rank.iter().map(amount).collect();
    let peaks = if peaks.is_empty() { "not sampled".into() } else { format!("peak {}", peaks.join(" · ")) };
    let planned = plan.rank_bytes();
    if planned == 0 { peaks } else { format!("{peaks} (planned {})", amount(&planned)) }
}

fn against(peak: u64, budget: u64) -> String {
    if budget == 0 {
        return format!("peak {}", bytes(peak));
    }
    format!("peak {} of the {} budget ({:.1} %)", bytes(peak), bytes(budget), 100.0 * peak as f64 / budget as f64)
}

/// Rows of a label and a value, broken at spaces so that the box stays within [`WIDTH`].
fn wrap(label: &str, value: &str) -> Vec<String> {
    let room = WIDTH - 4 - LABEL;
    let mut lines = vec![String::new()];
    for word in value.split(' ') {
        // A word longer than a line is cut, not lost.
        for piece in word.chars().collect::<Vec<_>>().chunks(room) {
            let piece: String = piece.iter().collect();
            let last = lines.last().map_or(0, |line| line.chars().count());
            if last > 0 && last + 1 + piece.chars().count() > room {
                lines.push(piece);
            } else if let Some(line) = lines.last_mut() {
                line.extend([if last > 0 { " " } else { "" }, &piece]);
            }
        }
    }
    let labels = std::iter::once(label).chain(std::iter::repeat(""));
    let row = |(label, line): (&str, String)| {
        // A long name of a stage leaves no room behind it.
        let gap = if label.chars().count() >= LABEL { " " } else { "" };
        format!("{label:<LABEL$}{gap}{}", line.replace('\u{a0}', " "))
    };
    labels.zip(lines).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a", "bb"], vec!["ccc", "1"]].map(|row| row.into_iter().map(String::from).collect());
        assert_eq!(aligned(&rows, &[1]), "a    bb\nccc   1");
        assert_eq!(aligned(&[], &[]), "");
    }
    use spec::contract::{Best, LineId, RunStatus};
    use spec::plan::{BudgetLine, BudgetPlan, Topology};

    fn plan() -> Plan {
        let own = BudgetLine { per_rank_bytes: Some(700 << 20), ..BudgetLine::default() };
        let all = |name, bytes| BudgetLine { name, bytes, ..BudgetLine::default() };
        let lines = vec![
            own,
            all(LineId::Libraries, 270 << 20),
            all(LineId::CheckpointStaging, 10 << 20),
            all(LineId::Reserve, 1 << 30),
        ];
        let budget = BudgetPlan { total_bytes: 8 << 30, lines, page_cache_bytes: 64 << 20, ..BudgetPlan::default() };
        let topology = Topology { local_world_size: 3, ..Topology::default() };
        Plan { budget, topology, ..Plan::default() }
    }

    fn summary(ranks: usize) -> Summary {
        Summary {
            status: RunStatus::Finished,
            steps: 1200,
            epochs: 10,
            wall_s: 90.4,
            train_s: 81.0,
            samples_per_s: 701.26,
            metrics: [("test.loss", 0.012_341), ("test.mae_deg", 4.4)].map(|(n, v)| (n.to_owned(), v)).into(),
            headline: vec!["test.loss".into(), "test.mae_deg".into()],
            best: Some(Best { metric: "val.mae_deg".into(), value: 4.25, step: 1100 }),
            // Beside the plan stands what is the ranks' own.
            peak_pss_bytes_per_rank: vec![900 << 20; ranks],
            peak_own_bytes_per_rank: vec![512 << 20; ranks],
            peak_node_bytes: 1_717_986_918,
            ..Summary::default()
        }
    }

    #[test]
    fn tells_time_speed_best_and_memory_against_the_plan() {
        let table = closing_table(&summary(3), &plan());
        for part in [
            "1:30, of which training 1:21",
            "701 samples/s",
            "1200, 10 whole epochs",
            "val.mae_deg 4.250 at step 1100",
            "test            loss 0.01234, mae_deg 4.400",
            "peak 512.0 MiB · 512.0 MiB · 512.0 MiB (planned 800.0 MiB)",
            "peak 1.60 GiB of the 8.00 GiB budget (20.0 %)",
        ] {
            assert!(table.contains(part), "{part} is missing in\n{table}");
        }
    }

    #[test]
    fn a_failed_run_does_not_claim_to_have_trained_for_no_time() {
        let failed = Summary { status: RunStatus::Failed, epochs: 1, train_s: 0.0, ..summary(1) };
        let table = closing_table(&failed, &plan());
        assert!(table.contains("1:30") && !table.contains("training") && table.contains("1 whole epoch "), "{table}");
    }

    #[test]
    fn stages_have_one_table_with_those_that_did_not_run() {
        let pass =
            Summary { samples: Some(1000), outputs: 3, peak_node_bytes: 1 << 20, wall_s: 2.0, ..Summary::default() };
        let (train, pass) = (summary(2), Summary { status: RunStatus::Stopped, ..pass });
        let table = stages_table(&[("autoencoder", Some(&train)), ("latents", Some(&pass)), ("sample", None)], 8 << 30);
        for part in [
            "autoencoder     finished, 1:30, 1200 steps, best val.mae_deg 4.250,",
            "latents         stopped, 2.0 s, 1000 samples, peak 1.0 MiB",
            "sample          not run",
            "all stages      1:32",
            "peak 1.60 GiB of the 8.00 GiB budget (20.0 %)",
        ] {
            assert!(table.contains(part), "{part} is missing in\n{table}");
        }
        let widths: Vec<usize> = table.lines().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0] && *width <= WIDTH), "{table}");
        let one = closing_table(&pass, &plan());
        assert!(one.contains("samples         1000, 3 whole outputs") && !one.contains("epoch"), "{one}");
    }

    #[test]
    fn fits_80_columns_and_is_a_box_with_any_number_of_ranks() {
        for ranks in [0, 1, 8, 64] {
            let table = closing_table(&summary(ranks), &plan());
            let widths: Vec<usize> = table.lines().map(|line| line.chars().count()).collect();
            assert!(widths.iter().all(|width| *width == widths[0] && *width <= WIDTH), "{ranks} ranks\n{table}");
            assert_eq!(table.matches("512.0 MiB").count(), ranks);
        }
    }
}
