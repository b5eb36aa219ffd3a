//! Files of cells as anndata and others leave them.
