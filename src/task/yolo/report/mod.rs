//! Files about detections: tables and curves of an evaluation, and what follows the training.

mod canvas;
mod chart;
mod journal;
mod labels;
mod pictures;
mod samples;

pub use canvas::Canvas;
pub use journal::{YoloJournal, general};
pub use labels::labels;
pub use pictures::{BoxGallery, Marked, boxed};
pub use samples::samples;

use super::measure::Evaluated;
use super::measure::curves::{ClassCurves, Curves, POINTS, confidence};
use canvas::{INK, colour};
use chart::{Curve, Panel};

/// Classes with a colour of their own in a figure of curves.
const COLOURED: usize = 20;
const SIZE: (i32, i32) = (720, 540);

/// The table of classes, and figures, by name. A figure that cannot be drawn is left out.
pub fn files(last: &Evaluated, names: &[String]) -> Vec<(String, Vec<u8>)> {
    let mut files = vec![("classes.csv".to_owned(), table(last, names).into_bytes())];
    let mut add =
        |name: &str, drawn: Result<Vec<u8>, String>| files.extend(drawn.ok().map(|png| (name.to_owned(), png)));
    let curves = &last.curves;
    let by_recall = |class: &ClassCurves, at: usize| class.by_recall[at];
    add("PR_curve.png", curve(curves, names, ("precision over recall, IoU .50", "recall"), &by_recall));
    let f1 = |class: &ClassCurves, at: usize| class.f1(at);
    add("F1_curve.png", curve(curves, names, ("F1 over confidence", "confidence"), &f1));
    let precision = |class: &ClassCurves, at: usize| class.precision[at];
    add("P_curve.png", curve(curves, names, ("precision over confidence", "confidence"), &precision));
    let recall = |class: &ClassCurves, at: usize| class.recall[at];
    add("R_curve.png", curve(curves, names, ("recall over confidence", "confidence"), &recall));
    if !last.confusion.is_empty() {
        add("confusion_matrix.png", chart::matrix(&last.confusion, names));
    }
    files
}

/// `class,objects,precision,recall,map50,map50_95`: all classes together, then each that has objects.
fn table(last: &Evaluated, names: &[String]) -> String {
    let Evaluated { curves, images, .. } = last;
    let objects: u64 = curves.classes.iter().map(|class| class.objects).sum();
    let mut text = String::from("class,objects,precision,recall,map50,map50_95\n");
    let mut row = |name: &str, objects: u64, values: [f64; 4]| {
        let quoted =
            if name.contains([',', '"', '\n']) { format!("\"{}\"", name.replace('"', "\"\"")) } else { name.into() };
        let values = values.map(|value| format!("{value:.5}")).join(",");
        text.push_str(&format!("{quoted},{objects},{values}\n"));
    };
    let all = [curves.precision(), curves.recall(), curves.map50(), curves.map50_95()];
    row(&format!("all of {images} images"), objects, all);
    for class in &curves.classes {
        let name = names.get(class.class).map_or_else(|| class.class.to_string(), Clone::clone);
        let at = curves.best;
        row(&name, class.objects, [class.precision[at], class.recall[at], class.average[0], class.mean()]);
    }
    text
}

/// A curve for each class, and their mean.
fn curve(
    curves: &Curves,
    names: &[String],
    (title, across): (&str, &str),
    value: &dyn Fn(&ClassCurves, usize) -> f64,
) -> Result<Vec<u8>, String> {
    let few = curves.classes.len() <= COLOURED;
    let points = |of: &dyn Fn(usize) -> f64| (0..POINTS).map(|at| (confidence(at), of(at))).collect::<Vec<_>>();
    let one = |class: &ClassCurves| Curve {
        name: names.get(class.class).cloned().unwrap_or_default(),
        points: points(&|at| value(class, at)),
        colour: if few { colour(class.class) } else { canvas::PALE },
        width: 1,
    };
    let mut all: Vec<Curve> = curves.classes.iter().map(one).collect();
    let mean = points(&|at| curves.mean(|class| value(class, at)));
    all.push(Curve { name: format!("all classes, mAP50 {:.3}", curves.map50()), points: mean, colour: INK, width: 3 });
    let panel = Panel { title: title.into(), across: across.into(), curves: all, unit: true };
    chart::sheet(&[panel], 1, SIZE, true)
}
