//! Looks at images and labels: every rank at its share, and only at what the index does not know.

use super::form::{CocoFile, Found, Item, Label, labelme_boxes};
use super::index::{self, Finding, Good};
use super::labels;
use crate::data::DataError;
use crate::data::source::{in_threads, picture};
use crate::task::Team;
use spec::contract::shown;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Images with a shorter side are left out.
const LEAST_SIDE: usize = 10;
/// Most threads that look at images.
const THREADS: usize = 16;

/// Findings about all items, split by split.
///
/// # Errors
/// A COCO file cannot be read, or ranks cannot share what they found.
pub fn scan(found: &Found, root: &Path, team: &Team, index_dir: &Path) -> Result<[Vec<Finding>; 3], DataError> {
    let settings = settings(found);
    let items: Vec<&Item> = found.splits.iter().flatten().collect();
    let keys: Vec<u64> = in_threads(threads(team), &items, |item| index::key(item, settings));
    let place = index::path(index_dir, root);
    let mut known = index::load(&place);
    let lacking: Vec<usize> = (0..keys.len()).filter(|at| !known.contains_key(&keys[*at])).collect();
    let votes = (team.gather)(&print(lacking.iter().map(|at| keys[*at])).to_le_bytes())?;
    if votes.iter().any(|vote| *vote != print([]).to_le_bytes()) {
        // Ranks that lack different findings, as those of several nodes may, share all.
        let alike = votes.windows(2).all(|pair| pair[0] == pair[1]);
        let wanted = if alike { lacking } else { (0..keys.len()).collect() };
        let share = share((&items, &wanted), &keys, &known, found, team)?;
        let lent: Vec<(u64, &Finding)> = share.iter().map(|(key, finding)| (*key, finding)).collect();
        for part in (team.gather)(&index::encode(&lent))? {
            let bad = || DataError::RanksDiffer("a rank sent findings about images that cannot be read".into());
            known.extend(index::decode(&part).ok_or_else(bad)?);
        }
        if team.rank == 0 {
            // What cannot be used is looked at again: another start may be able to read it.
            let all = keys.iter().filter_map(|key| Some((*key, known.get(key)?)));
            let all: Vec<(u64, &Finding)> = all.filter(|(_, finding)| matches!(finding, Finding::Good(_))).collect();
            // Without it the next start looks at the images again, that is all.
            let _ = index::save(&place, &all);
        }
    }
    let mut keys = keys.into_iter();
    let gone = || DataError::RanksDiffer("ranks see different images: give all nodes the same files".into());
    let mut splits: [Vec<Finding>; 3] = Default::default();
    for (split, items) in splits.iter_mut().zip(&found.splits) {
        for key in keys.by_ref().take(items.len()) {
            split.push(known.get(&key).cloned().ok_or_else(gone)?);
        }
    }
    Ok(splits)
}

/// Findings depend on the classes.
fn settings(found: &Found) -> u64 {
    let mut hash = fnv::FnvHasher::default();
    for name in found.names.iter().flatten() {
        std::hash::Hasher::write(&mut hash, name.as_bytes());
        std::hash::Hasher::write(&mut hash, &[0]);
    }
    std::hash::Hasher::finish(&hash)
}

fn threads(team: &Team) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    (cores / team.world_size.max(1)).clamp(1, THREADS)
}

/// A number that stands for these keys.
fn print(keys: impl IntoIterator<Item = u64>) -> u64 {
    let mut hash = fnv::FnvHasher::default();
    keys.into_iter().for_each(|key| std::hash::Hasher::write_u64(&mut hash, key));
    std::hash::Hasher::finish(&hash)
}

/// This rank's share of the wanted items, every so-manyth.
fn share(
    (items, wanted): (&[&Item], &[usize]),
    keys: &[u64],
    known: &HashMap<u64, Finding>,
    found: &Found,
    team: &Team,
) -> Result<Vec<(u64, Finding)>, DataError> {
    let own = wanted.iter().skip(team.rank).step_by(team.world_size.max(1));
    let own: Vec<(usize, &Item)> = own.map(|at| (*at, items[*at])).collect();
    let mut coco: HashMap<PathBuf, CocoFile> = HashMap::new();
    for (place, item) in &own {
        if let Label::Coco(file, _) = &item.label
            && !known.contains_key(&keys[*place])
            && !coco.contains_key(file.as_path())
        {
            coco.insert(file.to_path_buf(), CocoFile::read(file)?);
        }
    }
    let names = found.names.as_deref();
    Ok(in_threads(threads(team), &own, |(place, item)| {
        let key = keys[*place];
        (key, known.get(&key).cloned().unwrap_or_else(|| look(item, names, &coco)))
    }))
}

/// Looks at one image.
fn look(item: &Item, names: Option<&[String]>, coco: &HashMap<PathBuf, CocoFile>) -> Finding {
    match good(item, names, coco) {
        Ok(good) => Finding::Good(good),
        Err(why) => Finding::Bad(why),
    }
}

fn good(item: &Item, names: Option<&[String]>, coco: &HashMap<PathBuf, CocoFile>) -> Result<Good, String> {
    let header = picture::header(&item.image).map_err(|error| error.to_string())?;
    let facts = std::fs::metadata(&item.image).map_err(|error| format!("{}: {error}", shown(&item.image)))?;
    let size = header.size;
    if size.height < LEAST_SIDE || size.width < LEAST_SIDE {
        let problem = format!("an image of {size} pixels: expected sides of {LEAST_SIDE} or more");
        return Err(format!("{}: {problem}", shown(&item.image)));
    }
    let rows = match &item.label {
        Label::Text(path) => match std::fs::read(path) {
            Ok(bytes) => labels::parse(&bytes, names.map(<[String]>::len))
                .map_err(|problem| format!("{}: {problem}", shown(path)))?,
            // An image without a label file has no objects.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(format!("{}: {error}", shown(path))),
        },
        Label::Labelme(path) => labelme_boxes(path, (size.height, size.width), names.unwrap_or_default())
            .map_err(|error| error.to_string())?,
        Label::Coco(path, name) => {
            let objects = coco.get(path.as_path()).and_then(|file| file.objects.get(name));
            let boxes = objects.map_or(Ok(Vec::new()), |objects| objects.on((size.height, size.width)));
            boxes.map_err(|problem| format!("{}: {problem}", shown(&item.image)))?
        }
        Label::Unknown => Vec::new(),
    };
    Ok(Good { header, bytes: facts.len(), modified: (facts.mtime(), facts.mtime_nsec()), rows: deduplicated(rows) })
}

/// Each box once.
fn deduplicated(rows: Vec<labels::Row>) -> Vec<labels::Row> {
    let mut kept: Vec<labels::Row> = Vec::with_capacity(rows.len());
    rows.into_iter().for_each(|row| {
        if !kept.contains(&row) {
            kept.push(row);
        }
    });
    kept
}
