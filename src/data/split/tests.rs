//! Renamed, replaced, lost and added files of a resumed run.

use super::*;

const TRAIN: [bool; 3] = [true, false, false];
const VAL: [bool; 3] = [false, true, false];
const TEST: [bool; 3] = [false, false, true];

fn unit(name: &str, print: u64, splits: [bool; 3]) -> Unit {
    Unit { name: name.into(), prints: vec![Print(print)], splits, rows: None }
}

/// Four files: two to train on, one to validate, one to test.
fn saved() -> Vec<Unit> {
    vec![unit("a", 1, TRAIN), unit("b", 2, VAL), unit("c", 3, TRAIN), unit("d", 4, TEST)]
}

fn kept(units: Vec<Unit>, choice: Option<SplitChoice>) -> KeptSplit {
    KeptSplit { list: SplitList { units }, choice, checkpoint: "run/checkpoints/step-9".into() }
}

/// Names of each split.
fn names(now: &[Unit], choice: Option<SplitChoice>) -> Result<[Vec<String>; 3], String> {
    let resolved = resolve(now, Some(&kept(saved(), choice))).map_err(|e| e.to_string())?;
    let name = |place: &usize| now[resolved.order[*place]].name.clone();
    Ok(resolved.splits.map(|split| split.iter().map(name).collect()))
}

fn of(train: &[&str], val: &[&str], test: &[&str]) -> Result<[Vec<String>; 3], String> {
    Ok([train, val, test].map(|names| names.iter().map(|name| name.to_string()).collect()))
}

#[test]
fn a_new_run_uses_its_own_split_and_an_unchanged_one_the_same() {
    let now = saved();
    let fresh = resolve(&now, None).unwrap();
    assert_eq!((&fresh.order, &fresh.splits), (&vec![0, 1, 2, 3], &[vec![0, 2], vec![1], vec![3]]));
    assert_eq!(resolve(&now, Some(&kept(saved(), None))).unwrap(), fresh, "no line, the same order");
}

#[test]
fn renamed_files_keep_split_and_order() {
    // b is z now: sorted by name it is the last, and by a split of sorted names another is held out.
    let now = vec![unit("a", 1, TRAIN), unit("c", 3, VAL), unit("d", 4, TRAIN), unit("z", 2, TEST)];
    assert_eq!(names(&now, None), of(&["a", "c"], &["z"], &["d"]));
    let resolved = resolve(&now, Some(&kept(saved(), None))).unwrap();
    assert_eq!(resolved.order, [0, 3, 1, 2], "as the checkpoint had them");
    assert_eq!(resolved.lines[0], "resumed split: 1 file is renamed: b is z now");
    assert!(
        resolved.lines[1].starts_with("resumed split: 3 of 4 files would be in another split"),
        "{:?}",
        resolved.lines
    );
    assert_eq!(resolved.list.units[1], unit("z", 2, VAL), "the next checkpoint knows the new name");
    // Two files that changed names.
    let now = vec![unit("a", 2, TRAIN), unit("b", 1, VAL), unit("c", 3, TRAIN), unit("d", 4, TEST)];
    assert_eq!(names(&now, None), of(&["b", "c"], &["a"], &["d"]), "content decides");
}

#[test]
fn lost_files_leave_the_others_where_they_were_and_find_their_place_again() {
    let now = vec![unit("a", 1, VAL), unit("b", 2, TRAIN), unit("d", 4, TEST)];
    assert_eq!(names(&now, None), of(&["a"], &["b"], &["d"]));
    let resolved = resolve(&now, Some(&kept(saved(), None))).unwrap();
    assert_eq!(resolved.lines[0], "resumed split: 1 file is missing: c (train); the others keep their split");
    let back = resolve(&saved(), Some(&kept(resolved.list.units, None))).unwrap();
    assert_eq!(back.splits, [vec![0, 2], vec![1], vec![3]]);
    let error = names(&[unit("a", 1, TRAIN), unit("c", 3, VAL), unit("d", 4, TEST)], None).unwrap_err();
    assert!(error.contains("none of the files of val is there") && error.contains("--resume-split new"), "{error}");
}

#[test]
fn new_files_are_in_no_split() {
    let now: Vec<Unit> = saved().into_iter().chain([unit("e", 5, TRAIN), unit("copy of b", 2, TRAIN)]).collect();
    assert_eq!(names(&now, None), of(&["a", "c"], &["b"], &["d"]));
    let lines = resolve(&now, Some(&kept(saved(), None))).unwrap().lines;
    assert!(lines[0].contains("2 files are new and in no split: e, copy of b"), "{lines:?}");
}

#[test]
fn replaced_files_keep_their_split_unless_a_held_out_one_may_be_among_them() {
    // A repaired training file: nothing that was held out is missing.
    let now = vec![unit("a", 9, TRAIN), unit("b", 2, VAL), unit("c", 3, TRAIN), unit("d", 4, TEST)];
    assert_eq!(names(&now, None), of(&["a", "c"], &["b"], &["d"]));
    // The held-out b is gone, and a holds something unknown: it may be b, stored anew.
    let mut lost = now.clone();
    lost[1] = unit("d2", 8, VAL);
    let error = names(&lost, None).unwrap_err();
    for part in
        ["step-9", "a (train) has other content and b (val) is gone", "--resume-split keep", "--resume-split new"]
    {
        assert!(error.contains(part), "{part} in {error}");
    }
    // All were written anew.
    let all: Vec<Unit> =
        saved().into_iter().map(|of| Unit { prints: vec![Print(of.prints[0].0 + 50)], ..of }).collect();
    assert!(names(&all, None).unwrap_err().contains("has other content too"));
    assert_eq!(names(&all, Some(SplitChoice::Keep)), of(&["a", "c"], &["b"], &["d"]));
}

#[test]
fn a_new_split_is_made_when_asked_for_and_says_what_it_trains_on() {
    let now = vec![unit("a", 1, VAL), unit("c", 3, TRAIN), unit("d", 4, TEST), unit("z", 2, TRAIN)];
    let resolved = resolve(&now, Some(&kept(saved(), Some(SplitChoice::New)))).unwrap();
    assert_eq!(resolved.splits, [vec![1, 3], vec![0], vec![2]]);
    let line = "warning: --resume-split new: 1 file that the checkpoint held out will be trained on: z (was val)";
    assert_eq!(resolved.lines, [line]);
    assert_eq!(resolved.list.units, now);
}

#[test]
fn one_file_in_all_splits_is_recognised_and_may_be_replaced() {
    let all = [true; 3];
    let list = kept(vec![unit("a", 1, all)], None);
    let resolved = resolve(&[unit("a", 2, all)], Some(&list)).unwrap();
    assert_eq!(resolved.splits, [vec![0], vec![0], vec![0]]);
}

#[test]
fn sequences_are_recognised_by_half_of_their_frames() {
    let sequence = |name: &str, prints: std::ops::Range<u64>, splits| Unit {
        name: name.into(),
        prints: prints.map(Print).collect(),
        splits,
        rows: None,
    };
    let list = vec![sequence("train/s0", 0..10, TRAIN), sequence("val/s1", 20..30, VAL)];
    // The held-out sequence was moved to the training folder and lost some frames.
    let now = vec![sequence("train/s0", 0..10, TRAIN), sequence("train/s9", 24..30, TRAIN)];
    let resolved = resolve(&now, Some(&kept(list, None))).unwrap();
    assert_eq!(resolved.splits, [vec![0], vec![1], vec![]]);
    assert!(resolved.lines[0].contains("val/s1 is train/s9 now"), "{:?}", resolved.lines);
}

#[test]
fn equal_content_in_two_splits_is_a_warning_that_names_both() {
    assert_eq!(equal_content(&saved()), None);
    let mut units = saved();
    units[2].prints = vec![Print(1)];
    assert_eq!(equal_content(&units), None, "twice in training harms no metric");
    units[1].prints = vec![Print(1)];
    let line = equal_content(&units).unwrap();
    assert!(line.starts_with("warning: a (train) and b (val) look the same, by size and bytes"), "{line}");
}

#[test]
fn lists_are_json_with_fingerprints_in_hexadecimal() {
    let list = SplitList { units: saved() };
    let text = serde_json::to_string(&list).unwrap();
    assert!(text.contains(r#"{"name":"a","prints":["0000000000000001"],"splits":[true,false,false]}"#), "{text}");
    assert_eq!(serde_json::from_str::<SplitList>(&text).unwrap(), list);
    assert!(serde_json::from_str::<SplitList>(&text.replace("0000000000000001", "xyz")).is_err());
}
