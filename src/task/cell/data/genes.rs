//! Genes of several files, joined by name.

use super::name;
use crate::data::DataError;
use spec::contract::shown;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// A gene of a file that the data set does not have.
pub const NONE: u32 = u32::MAX;

/// Genes of the data set, and what the genes of each file are among them.
pub struct Joined {
    pub names: Vec<String>,
    /// Per file; `None`: its genes are those of the data set, in the same order.
    pub maps: Vec<Option<Arc<[u32]>>>,
    /// A line for the user, where genes are left out or missing.
    pub note: Option<String>,
}

/// Joins the genes of `files` (path, names): those of `reference` where there is one, else those that all files have, in the
/// order of the first.
///
/// # Errors
/// Names that stand for several genes of a file that has to be joined, or no gene in common.
pub fn join(files: &[(&Path, &[String])], reference: Option<(&Path, Vec<String>)>) -> Result<Joined, DataError> {
    let Some((first_path, first)) = files.first() else {
        return Ok(Joined { names: Vec::new(), maps: Vec::new(), note: None });
    };
    let alike = files.iter().all(|(_, names)| names == first);
    if reference.is_none() && alike {
        return Ok(Joined { names: first.to_vec(), maps: vec![None; files.len()], note: None });
    }
    for (path, names) in files {
        let rest = "so genes cannot be joined by name: make them unique (adata.var_names_make_unique())";
        if let Some(twice) = repeated(names) {
            return Err(DataError::Content {
                path: path.to_path_buf(),
                problem: format!("names two genes {twice}, {rest}"),
            });
        }
    }
    let (names, note) = match reference {
        Some((path, names)) => {
            if let Some(twice) = repeated(&names) {
                let problem = format!("names the gene {twice} twice (cell.reference)");
                return Err(DataError::Content { path: path.to_owned(), problem });
            }
            let note = format!("genes: the {} of {} (cell.reference)", names.len(), shown(path));
            (names, note)
        }
        None => {
            let mut times: HashMap<&str, usize> = HashMap::new();
            files.iter().flat_map(|(_, names)| names.iter()).for_each(|gene| *times.entry(gene).or_default() += 1);
            let common: Vec<String> =
                first.iter().filter(|gene| times.get(gene.as_str()) == Some(&files.len())).cloned().collect();
            let note = format!(
                "genes: the {} that all {} files have, of {} in the first",
                common.len(),
                files.len(),
                first.len()
            );
            (common, note)
        }
    };
    if names.is_empty() {
        return Err(DataError::NothingUsable(format!(
            "the {} files have no gene name in common, the first is {}: name genes alike, or set data.dataset_path to files of one \
             kind of names",
            files.len(),
            shown(first_path)
        )));
    }
    let places: HashMap<&str, u32> = names.iter().map(String::as_str).zip(0u32..).collect();
    let mut maps: Vec<Option<Arc<[u32]>>> = Vec::with_capacity(files.len());
    for (path, own) in files {
        let map: Arc<[u32]> = own.iter().map(|gene| places.get(gene.as_str()).copied().unwrap_or(NONE)).collect();
        if map.iter().all(|gene| *gene == NONE) {
            let problem = format!("has none of the {} genes in use, its first is {}", names.len(), own[0]);
            return Err(DataError::Content { path: path.to_path_buf(), problem });
        }
        let same = map.len() == names.len() && (0u32..).zip(map.iter()).all(|(place, gene)| place == *gene);
        maps.push((!same).then_some(map));
    }
    let poorest = maps.iter().zip(files).filter_map(|(map, (path, _))| {
        let there = map.as_ref()?.iter().filter(|gene| **gene != NONE).count();
        Some((there, name(path)))
    });
    let missing = poorest.min().filter(|(there, _)| *there < names.len());
    let missing =
        missing.map(|(there, name)| format!("; {name} has {there} of them, the others are 0")).unwrap_or_default();
    Ok(Joined { names, maps, note: Some(note + &missing) })
}

fn repeated(names: &[String]) -> Option<&str> {
    let mut seen = std::collections::HashSet::with_capacity(names.len());
    names.iter().map(String::as_str).find(|name| !seen.insert(*name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split(' ').map(String::from).collect()
    }

    fn joined(files: &[&str], reference: Option<&str>) -> Result<Joined, DataError> {
        let files: Vec<Vec<String>> = files.iter().map(|text| names(text)).collect();
        let files: Vec<(&Path, &[String])> =
            files.iter().map(|names| (Path::new("a/f.h5ad"), names.as_slice())).collect();
        join(&files, reference.map(|text| (Path::new("r.txt"), names(text))))
    }

    #[test]
    fn genes_are_joined_by_name() {
        let alike = joined(&["a b c", "a b c"], None).unwrap();
        assert_eq!((alike.names, alike.maps, alike.note), (names("a b c"), vec![None, None], None));
        // Names that are there twice are no trouble where nothing is joined.
        assert_eq!(joined(&["a a b"], None).unwrap().names, names("a a b"));
        let inner = joined(&["a b c d", "d x b"], None).unwrap();
        assert_eq!(inner.names, names("b d"));
        assert_eq!(inner.maps[0].as_deref(), Some(&[NONE, 0, NONE, 1][..]));
        assert_eq!(inner.maps[1].as_deref(), Some(&[1, NONE, 0][..]));
        assert!(inner.note.unwrap().contains("the 2 that all 2 files have"));
        let by = joined(&["a b c"], Some("c q a")).unwrap();
        assert_eq!((by.names, by.maps[0].as_deref()), (names("c q a"), Some(&[2, NONE, 0][..])));
        assert!(by.note.unwrap().contains("f.h5ad has 2 of them, the others are 0"));
    }

    #[test]
    fn genes_that_cannot_be_joined_are_refused_by_name() {
        let says = |files: &[&str], reference| joined(files, reference).err().unwrap().to_string();
        assert!(says(&["a b", "a a"], None).contains("names two genes a"));
        assert!(says(&["a", "a"], Some("b b")).contains("names the gene b twice"));
        assert!(says(&["a b", "c"], None).contains("no gene name in common"));
        assert!(says(&["a b"], Some("c d")).contains("has none of the 2 genes in use, its first is a"));
    }
}
