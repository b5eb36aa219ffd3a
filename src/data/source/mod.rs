//! Formats on disk. The only room that imports `hdf5`.
