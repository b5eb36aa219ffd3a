//! Order of frames by the numbers in their names, and the gaps between them.

use std::cmp::Ordering;

/// Natural order: runs of digits are compared as numbers, the rest as text, so that `frame_10` follows `frame_2`.
pub(super) fn natural(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (pieces(a).into_iter(), pieces(b).into_iter());
    loop {
        let order = match (left.next(), right.next()) {
            (None, None) => return a.cmp(b),
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some(x), Some(y)) => compare(x, y),
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

fn compare(a: &str, b: &str) -> Ordering {
    let digits = |piece: &str| piece.starts_with(|c: char| c.is_ascii_digit());
    if !(digits(a) && digits(b)) {
        return a.cmp(b);
    }
    let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

/// Runs of digits and of other characters, in turn.
fn pieces(name: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = name;
    while let Some(first) = rest.chars().next() {
        let digits = first.is_ascii_digit();
        let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
        let (piece, behind) = rest.split_at(end);
        pieces.push(piece);
        rest = behind;
    }
    pieces
}

/// Number of a frame within a take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Number {
    /// Other numbers of the name that differ between frames: frames of two takes never follow each other.
    take: Vec<u128>,
    pub frame: u128,
}

/// Numbers of frames whose names differ in numbers alone, in the order of `names`: the last number that differs counts the
/// frames. Seconds and their fraction of fixed width (`1305031102.175304`) are one number. `None`: the names are not
/// numbered alike.
pub(super) fn numbers(names: &[&str]) -> Option<Vec<Number>> {
    let cut: Vec<Vec<&str>> = names.iter().map(|name| pieces(name)).collect();
    let first = cut.first()?;
    let is_digits = |at: usize| first[at].starts_with(|c: char| c.is_ascii_digit());
    let (columns, texts): (Vec<usize>, Vec<usize>) = (0..first.len()).partition(|at| is_digits(*at));
    let like_first = |pieces: &Vec<&str>| {
        pieces.len() == first.len()
            && texts.iter().all(|at| pieces[*at] == first[*at])
            && columns.iter().all(|at| pieces[*at].starts_with(|c: char| c.is_ascii_digit()))
    };
    if !cut.iter().all(like_first) {
        return None;
    }
    let values: Vec<Vec<u128>> = cut
        .iter()
        .map(|pieces| columns.iter().map(|at| pieces[*at].parse().ok()).collect::<Option<_>>())
        .collect::<Option<_>>()?;
    let differs = |column: &usize| values.iter().any(|of| of[*column] != values[0][*column]);
    let counting = (0..columns.len()).rev().find(differs).or_else(|| columns.len().checked_sub(1))?;
    let scale = fraction_scale(&cut, &columns, counting);
    let takes: Vec<usize> =
        (0..counting).filter(differs).filter(|column| scale.is_none() || *column + 1 != counting).collect();
    values
        .iter()
        .map(|of| {
            let frame = match scale {
                Some(scale) => of[counting - 1].checked_mul(scale)?.checked_add(of[counting])?,
                None => of[counting],
            };
            Some(Number { take: takes.iter().map(|column| of[*column]).collect(), frame })
        })
        .collect()
}

/// Value of a second where the counting number is its fraction: behind a point, and everywhere as wide.
fn fraction_scale(cut: &[Vec<&str>], columns: &[usize], counting: usize) -> Option<u128> {
    let (at, before) = (columns[counting], columns[counting.checked_sub(1)?]);
    let behind_point = before + 2 == at && cut[0][before + 1] == ".";
    let width = cut[0][at].len();
    let fixed = cut.iter().all(|pieces| pieces[at].len() == width);
    (behind_point && fixed).then(|| 10u128.checked_pow(u32::try_from(width).ok()?)).flatten()
}

/// For each of the frames in their order: one before it is missing, or it begins another take. A distance of one and a half
/// times the smallest is a gap, so that times that are not quite regular have none.
pub(super) fn gaps(numbers: &[Number]) -> Vec<bool> {
    let distance = |pair: &[Number]| {
        (pair[0].take == pair[1].take).then(|| pair[1].frame.saturating_sub(pair[0].frame)).filter(|far| *far > 0)
    };
    let step = numbers.windows(2).filter_map(distance).min().unwrap_or(1);
    let far = |pair: &[Number]| distance(pair).is_none_or(|far| far.saturating_mul(2) >= step.saturating_mul(3));
    std::iter::once(false).chain(numbers.windows(2).map(far)).take(numbers.len()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(mut names: Vec<&str>) -> Vec<&str> {
        names.sort_by(|a, b| natural(a, b));
        names
    }

    #[test]
    fn numbers_are_compared_as_numbers() {
        assert_eq!(sorted(vec!["frame_10", "frame_2", "frame_1"]), ["frame_1", "frame_2", "frame_10"]);
        assert_eq!(sorted(vec!["10", "9", "007", "100"]), ["007", "9", "10", "100"]);
        assert_eq!(sorted(vec!["t2_1", "t10_0", "t2_11"]), ["t2_1", "t2_11", "t10_0"]);
        let long = ["99999999999999999999999999999999999999998", "99999999999999999999999999999999999999999"];
        assert_eq!(sorted(vec![long[1], long[0], "5"]), ["5", long[0], long[1]], "beyond any integer type");
        assert_eq!(sorted(vec!["a", "", "1"]), ["", "1", "a"]);
        assert_eq!(natural("01", "1"), Ordering::Less, "a total order");
        assert_eq!(natural("é2", "é10"), Ordering::Less);
    }

    fn found(names: &[&str]) -> Option<Vec<bool>> {
        numbers(names).map(|numbers| gaps(&numbers))
    }

    #[test]
    fn gaps_are_where_a_number_is_missing() {
        assert_eq!(found(&["frame_8", "frame_9", "frame_10", "frame_12"]), Some(vec![false, false, false, true]));
        assert_eq!(found(&["000000", "000002", "000004"]), Some(vec![false; 3]), "every second frame");
        assert_eq!(found(&["0", "2", "3"]), Some(vec![false, true, false]));
        assert_eq!(found(&["GOPR0372_07_00_000047", "GOPR0372_07_00_000048"]), Some(vec![false; 2]));
        assert_eq!(found(&["a"]), None, "no number at all");
        assert_eq!(found(&["7"]), Some(vec![false]));
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn takes_and_times_are_told_from_frames() {
        let takes = ["take1_8", "take1_9", "take2_0", "take2_1"];
        assert_eq!(found(&takes), Some(vec![false, false, true, false]));
        // Times of a camera at 30 Hz, in microseconds: no distance is quite the same.
        assert_eq!(found(&["1000000", "1033333", "1066667", "1100000"]), Some(vec![false; 4]));
        let seconds = ["1305031102.933333", "1305031102.966667", "1305031103.000000", "1305031103.100000"];
        assert_eq!(found(&seconds), Some(vec![false, false, false, true]));
        assert_eq!(found(&["left_000001_x3", "right_000001_x3"]), None);
        assert_eq!(found(&["frame_1", "frame_final"]), None);
    }
}
