//! Lines of YOLO label files: `class cx cy w h`, or `class x1 y1 x2 y2 …` around an object.

/// A box: class, centre and size as shares of the image.
pub type Row = [f32; 5];

/// Largest coordinate that is taken for rounding.
const MOST: f32 = 1.01;
/// Smallest.
const LEAST: f32 = -0.01;
/// Most classes: their numbers travel as u16.
pub const MOST_CLASSES: usize = 1 << 16;

/// Boxes of a label file for `classes` classes (`None`: any number). Polygons become the boxes around them, equal boxes are one.
///
/// # Errors
/// The file is refused as a whole: the line, its value, and what was expected.
pub fn parse(bytes: &[u8], classes: Option<usize>) -> Result<Vec<Row>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let line = bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("line {line} is not UTF-8")
    })?;
    let lines = text.trim_start_matches('\u{feff}').lines().enumerate().map(|(n, line)| (n + 1, line.trim()));
    let lines: Vec<(usize, Vec<&str>)> = lines
        .filter(|(_, line)| !line.is_empty())
        .map(|(number, line)| (number, line.split_ascii_whitespace().collect()))
        .collect();
    // As the package decides it: one long line makes all of them polygons.
    let polygons = lines.iter().any(|(_, words)| words.len() > 6);
    let mut rows: Vec<Row> = Vec::with_capacity(lines.len());
    for (number, words) in &lines {
        let row = row(words, polygons, classes).map_err(|problem| format!("line {number}: {problem}"))?;
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    Ok(rows)
}

fn row(words: &[&str], polygons: bool, classes: Option<usize>) -> Result<Row, String> {
    let mut numbers = Vec::with_capacity(words.len());
    for word in words {
        match word.parse::<f32>() {
            Ok(number) if number.is_finite() => numbers.push(number),
            _ => return Err(format!("{word} is no number")),
        }
    }
    let [class, places @ ..] = numbers.as_slice() else { return Err("it is empty".into()) };
    if *class < 0.0 || class.fract() != 0.0 {
        return Err(format!("class {class}: expected a whole number of 0 or more"));
    }
    if let Some(classes) = classes.filter(|classes| *class >= *classes as f32) {
        return Err(format!("class {class}: there are {classes} classes, 0 to {}", classes - 1));
    }
    if *class >= MOST_CLASSES as f32 {
        return Err(format!("class {class}: at most {MOST_CLASSES} classes are possible"));
    }
    no_more(places)?;
    if !polygons {
        let [x, y, w, h] = *places else {
            return Err(format!("{} numbers: expected class, centre x, centre y, width, height", words.len()));
        };
        let row = [*class, x, y, w, h];
        return inside(&row).map(|()| row);
    }
    if places.len() < 6 || places.len() % 2 != 0 {
        return Err(format!(
            "{} numbers in a file of polygons: expected a class and three or more points",
            words.len()
        ));
    }
    if let Some(place) = places.iter().find(|place| **place < LEAST) {
        return Err(format!("{place} is below 0: coordinates are shares of the image's width and height"));
    }
    let ends = |axis: usize| {
        let along = places.iter().skip(axis).step_by(2).copied();
        (along.clone().fold(f32::INFINITY, f32::min), along.fold(f32::NEG_INFINITY, f32::max))
    };
    let ((left, right), (top, bottom)) = (ends(0), ends(1));
    Ok([*class, (left + right) / 2.0, (top + bottom) / 2.0, right - left, bottom - top])
}

fn no_more(places: &[f32]) -> Result<(), String> {
    match places.iter().find(|place| **place > MOST) {
        Some(place) => Err(format!("{place} is above 1: coordinates are shares of the image's width and height")),
        None => Ok(()),
    }
}

/// A box that lies on its image, but for rounding.
///
/// # Errors
/// The number that does not, and what was expected.
pub fn inside([_, x, y, w, h]: &Row) -> Result<(), String> {
    no_more(&[*x, *y, *w, *h])?;
    if let Some(place) = [x, y].into_iter().find(|place| **place < LEAST) {
        return Err(format!("{place} is below 0: coordinates are shares of the image's width and height"));
    }
    match [w, h].into_iter().find(|side| **side < 0.0) {
        Some(side) => Err(format!("a side of {side}: expected 0 or more")),
        None => Ok(()),
    }
}

/// Lines of a label file for `rows`.
pub fn text(rows: &[Row]) -> String {
    rows.iter().map(|[class, x, y, w, h]| format!("{class} {x} {y} {w} {h}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        parse(text.as_bytes(), Some(3)).unwrap_err()
    }

    #[test]
    fn boxes_and_polygons_are_read() {
        let rows = |text: &str| parse(text.as_bytes(), Some(3)).unwrap();
        assert_eq!(rows("1 .5 .5 .2 .1\n"), [[1.0, 0.5, 0.5, 0.2, 0.1]]);
        // Byte-order mark, CRLF, blank lines, a class with a point, duplicates.
        let odd = "\u{feff}1.0 0.5 0.5 0.2 0.1\r\n\r\n  \n1 .50 .5 .2 .1\n2 0 1.005 0 0.5\n";
        assert_eq!(rows(odd), [[1.0, 0.5, 0.5, 0.2, 0.1], [2.0, 0.0, 1.005, 0.0, 0.5]]);
        assert_eq!(rows("0 -0.005 0.5 0.1 0.1\n"), [[0.0, -0.005, 0.5, 0.1, 0.1]]);
        assert_eq!(rows("0 0.25 0.25 0.75 0.25 0.5 0.5\n"), [[0.0, 0.5, 0.375, 0.5, 0.25]]);
        assert!(rows("").is_empty() && rows(" \n\n").is_empty());
        assert_eq!(parse(b"7 .5 .5 .1 .1", None).unwrap()[0][0], 7.0);
        let written = [[2.0, 0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.25, 1.0, 1e-3]];
        assert_eq!(rows(&text(&written)), written);
    }

    #[test]
    fn files_are_refused_with_line_and_value() {
        for (text, says) in [
            ("0 .5 .5 .1 .1\n0 1.02 .5 .1 .1\n", "line 2: 1.02 is above 1"),
            ("0 .5 -.02 .1 .1\n", "line 1: -0.02 is below 0"),
            ("0 .5 .5 -.1 .1\n", "line 1: a side of -0.1"),
            ("-1 .5 .5 .1 .1\n", "line 1: class -1"),
            ("0.5 .5 .5 .1 .1\n", "line 1: class 0.5: expected a whole number"),
            ("3 .5 .5 .1 .1\n", "line 1: class 3: there are 3 classes, 0 to 2"),
            ("0 .5 .5 .1\n", "line 1: 4 numbers: expected class"),
            ("0 .5 .5 .1 .1 .9\n", "line 1: 6 numbers"),
            ("0 .5 .5 .1 nan\n", "line 1: nan is no number"),
            ("0 .5 .5 .1 x\n", "line 1: x is no number"),
            ("0 .1 .1 .2 .2 .3 .3\n0 .5 .5 .1 .1\n", "line 2: 5 numbers in a file of polygons"),
        ] {
            assert!(error(text).contains(says), "{text:?}: {}", error(text));
        }
        assert!(parse(b"0 .5 .5 .1 .1\n\xff\xfe", Some(3)).unwrap_err().contains("line 2 is not UTF-8"));
        for class in ["65536", "1e38"] {
            let error = parse(format!("{class} .5 .5 .1 .1").as_bytes(), None).unwrap_err();
            assert!(error.contains("at most 65536 classes are possible"), "{error}");
        }
    }
}
