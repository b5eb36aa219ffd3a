//! Pages of files that this process maps, as many as it will map wherever the files are cached.
//!
//! The kernel maps a page that is asked for with its neighbours, as far as its file cache holds them. So the resident pages of a
//! process depend on what others read before; the blocks in which any page is resident do not.

use procfs::process::{MMapPath, MemoryMap, PageInfo, PageMap, Process};
use std::path::Path;

/// Bytes that one fault maps at the most: the largest folio of the file cache. Source: ranks of the shipped configs map 174 to
/// 205 MiB with all of the files cached in large folios, 75 to 89 MiB with small ones, and 182 to 218 MiB by this count.
const BLOCK_BYTES: u64 = 2 << 20;

/// Bytes of all blocks in which this process has touched a page of a file; 0 where `/proc` does not say.
pub fn library_bytes(own: &Path) -> u64 {
    let counted = || {
        let process = Process::new_with_root(own.to_owned())?;
        let mut pages = process.pagemap()?;
        let maps = process.maps()?;
        let of_files = maps.iter().filter(|map| matches!(map.pathname, MMapPath::Path(_)));
        of_files.map(|map| touched(map, &mut pages)).sum::<Result<u64, procfs::ProcError>>()
    };
    counted().unwrap_or(0)
}

fn touched(map: &MemoryMap, pages: &mut PageMap) -> Result<u64, procfs::ProcError> {
    let page_bytes = procfs::page_size();
    let (start, end) = map.address;
    let infos = pages.get_range_info((start / page_bytes) as usize..(end / page_bytes) as usize)?;
    let mut bytes = 0;
    let mut at = start;
    let mut infos = infos.into_iter();
    while at < end {
        let block_end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(end);
        let count = ((block_end - at) / page_bytes) as usize;
        // All of the block is taken, resident or not.
        let resident = infos.by_ref().take(count).filter(is_of_file).count();
        if resident > 0 {
            bytes += block_end - at;
        }
        at = block_end;
    }
    Ok(bytes)
}

fn is_of_file(info: &PageInfo) -> bool {
    use procfs::process::MemoryPageFlags as Flags;
    matches!(info, PageInfo::MemoryPage(flags) if flags.contains(Flags::PRESENT | Flags::FILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_libtorch_count_in_whole_blocks() {
        let _tensor = tch::Tensor::ones([4], (tch::Kind::Float, tch::Device::Cpu)) + 1.0;
        let bytes = library_bytes(Path::new("/proc/self"));
        let status = Process::myself().unwrap().status().unwrap();
        let resident = status.rssfile.unwrap() << 10;
        println!("{bytes} bytes in blocks, {resident} resident");
        assert!(bytes * 10 > resident * 9 && bytes < 1 << 30, "{bytes} {resident}");
        assert_eq!(library_bytes(Path::new("/no/such")), 0);
    }
}
