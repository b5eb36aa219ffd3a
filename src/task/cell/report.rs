//! Quality of a run's generated cells beside real ones: `metrics.json` and the picture of the stage `sample`.

use super::picture;
use super::quality::{Types, gene_means, mmd, spearman};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

/// Cells `[N, G]` (normalised, log1p) with their classes (−1: none).
pub struct Cells {
    pub expression: Tensor,
    pub classes: Vec<i64>,
}

impl Cells {
    /// Those with, or without, a class.
    fn guided(&self, guided: bool) -> Tensor {
        let rows = (0..).zip(&self.classes).filter(|(_, class)| (**class >= 0) == guided);
        let rows: Vec<i64> = rows.map(|(row, _)| row).collect();
        self.expression.index_select(0, &Tensor::from_slice(&rows))
    }
}

/// Compares generated cells with real ones.
///
/// | value | meaning |
/// |---|---|
/// | `gene_mean_spearman`, `mmd`, `mmd_joint` | of unguided cells, or of all where all are guided: see [`super::quality`] |
/// | `type_share`, `type_share_real` | by type: share of unguided cells nearest to its centroid, and of the real cells |
/// | `guided_share` | share of guided cells that are nearest to the centroid of their class; `guided_share_of` by class |
/// | `variance_within_types` | of the real cells, mean over entries: what the autoencoder's error should be below |
pub fn compare(real: &Cells, generated: &Cells, names: &[String]) -> Map<String, Value> {
    let mut values = Map::new();
    let free = generated.guided(false);
    let judged = if free.size()[0] > 0 { free } else { generated.expression.shallow_clone() };
    values.insert("cells".into(), json!(generated.classes.len()));
    values.insert("real_cells_compared".into(), json!(real.classes.len()));
    values.insert("gene_mean_spearman".into(), json!(spearman(&gene_means(&real.expression), &gene_means(&judged))));
    let mmd = mmd(&real.expression, &judged);
    values.insert("mmd".into(), json!(mmd.map(|mmd| mmd.by_real).filter(|mmd| mmd.is_finite())));
    values.insert("mmd_joint".into(), json!(mmd.map(|mmd| mmd.joint).filter(|mmd| mmd.is_finite())));
    let Some(types) = Types::new(&real.expression, &real.classes) else { return values };
    values.insert("variance_within_types".into(), json!(types.variance_within));
    let name = |class: i64| names.get(class as usize).cloned().unwrap_or_else(|| class.to_string());
    let shares = types.shares(&types.nearest(&judged));
    let of = |pick: fn(&(i64, f64, f64)) -> f64| -> Map<String, Value> {
        shares.iter().map(|share| (name(share.0), json!(pick(share)))).collect()
    };
    values.insert("type_share".into(), of(|share| share.2).into());
    values.insert("type_share_real".into(), of(|share| share.1).into());
    guided(generated, &types, &name, &mut values);
    values
}

fn guided(generated: &Cells, types: &Types, name: &dyn Fn(i64) -> String, values: &mut Map<String, Value>) {
    let asked: Vec<i64> = generated.classes.iter().copied().filter(|&class| class >= 0).collect();
    if asked.is_empty() {
        return;
    }
    let nearest = types.nearest(&generated.guided(true));
    let right = |class: Option<i64>| {
        let of = || asked.iter().zip(&nearest).filter(|(asked, _)| class.is_none_or(|class| **asked == class));
        of().filter(|(asked, nearest)| asked == nearest).count() as f64 / of().count().max(1) as f64
    };
    values.insert("guided_share".into(), json!(right(None)));
    let mut classes = asked.clone();
    classes.sort_unstable();
    classes.dedup();
    let by_class: Map<String, Value> = classes.iter().map(|&class| (name(class), json!(right(Some(class))))).collect();
    values.insert("guided_share_of".into(), by_class.into());
}

/// The picture of [`picture::draw`]: real cells by their classes, generated ones by the class that guided them, or the
/// nearest centroid.
///
/// # Errors
/// It cannot be drawn.
pub fn draw(real: &Cells, generated: &Cells, names: &[String]) -> Result<Vec<u8>, String> {
    let types = Types::new(&real.expression, &real.classes);
    let nearest = types.map_or_else(|| vec![-1; generated.classes.len()], |types| types.nearest(&generated.expression));
    let shown: Vec<i64> =
        generated.classes.iter().zip(nearest).map(|(&class, near)| if class >= 0 { class } else { near }).collect();
    let expression = [&real.expression, &generated.expression].map(|cells| cells.to_kind(Kind::Float));
    picture::draw([&expression[0], &expression[1]], [&real.classes, &shown], names)
}

/// Lines for the user.
pub fn lines(values: &Map<String, Value>) -> Vec<String> {
    let number = |name: &str| values.get(name).and_then(Value::as_f64);
    let shown = |name: &str, text: &str| number(name).map(|value| format!("{text} {value:.3}"));
    let parts: Vec<String> = [
        shown("gene_mean_spearman", "Spearman of gene means"),
        shown("mmd", "MMD"),
        shown("guided_share", "share of guided cells nearest to their class"),
    ]
    .into_iter()
    .flatten()
    .collect();
    let cells = values.get("cells").cloned().unwrap_or_default();
    vec![format!("{cells} cells in generated.h5ad: {}", parts.join(", "))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn cells(classes: &[i64], shift: f64) -> Cells {
        tch::manual_seed(5);
        let centre = |class: i64| Tensor::full([1, 8], class as f64 * 4.0 + shift, (Kind::Float, Device::Cpu));
        let rows: Vec<Tensor> = classes
            .iter()
            .map(|&class| centre(class.max(0)) + Tensor::randn([1, 8], (Kind::Float, Device::Cpu)) * 0.3)
            .collect();
        Cells { expression: Tensor::cat(&rows, 0), classes: classes.to_vec() }
    }

    #[test]
    fn generated_cells_are_judged_with_and_without_guidance() {
        let names = ["a".to_owned(), "b".to_owned()];
        let real = cells(&[0, 0, 0, 1], 0.0);
        let mut generated = cells(&[0, 0, 1, 1, 0, 1], 0.0);
        // The last two were asked for; one of them the wrong way round.
        generated.classes = vec![-1, -1, -1, -1, 0, 0];
        let values = compare(&real, &generated, &names);
        assert_eq!(values["type_share"], json!({"a": 0.5, "b": 0.5}));
        assert_eq!(values["type_share_real"], json!({"a": 0.75, "b": 0.25}));
        assert_eq!(values["guided_share"], json!(0.5));
        assert_eq!(values["guided_share_of"], json!({"a": 0.5}));
        assert!(lines(&values)[0].contains("nearest to their class 0.500"), "{:?}", lines(&values));
        assert!(draw(&real, &generated, &names).unwrap().starts_with(b"\x89PNG"));
    }

    #[test]
    fn without_types_there_are_no_shares() {
        let real = Cells { classes: vec![-1; 4], ..cells(&[0, 0, 1, 1], 0.0) };
        let values = compare(&real, &cells(&[0, 1, 1], 0.0), &[]);
        assert!(values.contains_key("mmd") && !values.contains_key("type_share"));
    }
}
