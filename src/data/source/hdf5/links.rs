//! Links on the way to the rows. Addresses count from the start of the opened file, so the rows must lie in it; and what an
//! external link names may be anything, a pipe that never answers too.

use ::hdf5::{Dataset, File, Group, IndexType, IterationOrder, LinkType};

/// Follows `path` from `start` by hard links. What lies behind a soft link is looked at by [`refuse_other_file`].
///
/// # Errors
/// A link on the way leads to another file. A missing one is no error: whoever opens the path says that better.
pub fn refuse_external(start: &Group, path: &str) -> Result<(), String> {
    let mut names = path.split('/').filter(|name| !name.is_empty() && *name != ".").peekable();
    let mut group = start.clone();
    while let Some(name) = names.next() {
        let of_name = |found: &str, info: ::hdf5::LinkInfo| Ok((found == name).then_some(info.link_type));
        match group.find_link(IndexType::Name, IterationOrder::Native, of_name) {
            Ok(Some(LinkType::External)) => {
                return Err(format!("{name} is a link to another file: put the rows themselves into this one"));
            }
            Ok(Some(LinkType::Hard)) if names.peek().is_some() => match group.group(name) {
                Ok(next) => group = next,
                Err(_) => return Ok(()),
            },
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// # Errors
/// Soft links led to another file.
pub fn refuse_other_file(file: &File, dataset: &Dataset) -> Result<(), String> {
    let (here, there) = (file.filename(), dataset.filename());
    if here == there {
        return Ok(());
    }
    Err(format!("its rows lie in another file, {there}: put them into this one"))
}
