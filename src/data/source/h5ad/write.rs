//! Writes `.h5ad` as anndata 0.8 to 0.13 do, cells by cells: for sample data, generated cells and tests.

use super::matrix::Form;
use crate::data::DataError;
use crate::data::source::file_error;
use ::hdf5::types::VarLenUnicode;
use ::hdf5::{Dataset, Extent, File, Group, H5Type, Location};
use std::path::{Path, PathBuf};

/// Values of a chunk of a sparse matrix. Source: about what h5py guesses for a hundred million values.
const CHUNK_VALUES: usize = 24_576;
/// Values that wait to be written.
const BUFFERED: usize = 1 << 20;

/// How a file is written.
#[derive(Clone, Debug)]
pub struct Storage {
    /// [`Form::Csr`] or [`Form::Dense`].
    pub form: Form,
    /// Deflate level.
    pub gzip: Option<u8>,
}

impl Default for Storage {
    fn default() -> Self {
        Self { form: Form::Csr, gzip: None }
    }
}

/// A categorical column of cells.
#[derive(Clone, Debug)]
pub struct Column {
    pub name: String,
    /// Per cell a place in `categories`, or -1.
    pub codes: Vec<i32>,
    pub categories: Vec<String>,
}

/// A file that is being written. It is whole after [`Writer::finish`] alone.
pub struct Writer {
    path: PathBuf,
    file: File,
    form: Form,
    genes: usize,
    data: Dataset,
    indices: Option<Dataset>,
    /// Values not yet written; of a sparse matrix with their genes.
    values: Vec<f32>,
    ids: Vec<i32>,
    written: usize,
    pointers: Vec<i64>,
    embedding: Option<Embedding>,
}

/// Numbers of each cell in `obsm`.
struct Embedding {
    data: Dataset,
    width: usize,
    /// Not yet written.
    values: Vec<f32>,
    written: usize,
}

impl Embedding {
    fn flush(&mut self) -> ::hdf5::Result<()> {
        let rows = self.values.len() / self.width.max(1);
        let (from, to) = (self.written, self.written + rows);
        self.data.resize((to, self.width))?;
        let block = ndarray::ArrayView2::from_shape((rows, self.width), &self.values);
        self.data.write_slice(block.map_err(|error| ::hdf5::Error::from(error.to_string()))?, (from..to, ..))?;
        self.values.clear();
        self.written = to;
        Ok(())
    }
}

impl Writer {
    /// A new file at `path`, replacing what is there.
    ///
    /// # Errors
    /// No room, no permission, or a matrix by genes.
    pub fn create(path: &Path, genes: &[String], storage: &Storage) -> Result<Self, DataError> {
        let fail = |error: ::hdf5::Error| file_error(path, format!("cannot be written: {error}"));
        if storage.form == Form::Csc {
            return Err(file_error(path, "cannot be written by genes, cell by cell"));
        }
        let make = || -> ::hdf5::Result<Self> {
            let file = File::with_options().with_fcpl(|plist| plist.obj_track_times(false)).create(path)?;
            encode(&file, "anndata", "0.1.0")?;
            for name in ["layers", "obsm", "varm", "obsp", "varp", "uns"] {
                let group = group(&file, name)?;
                encode(&group, "dict", "0.1.0")?;
            }
            let names: Vec<&str> = genes.iter().map(String::as_str).collect();
            frame(&group(&file, "var")?, &names, &[])?;
            let (data, indices) = match storage.form {
                Form::Dense => {
                    let rows = (CHUNK_VALUES / genes.len().max(1)).max(1);
                    let builder = file.new_dataset::<f32>().chunk((rows, genes.len().max(1)));
                    let shape = (Extent::resizable(0), Extent::fixed(genes.len()));
                    let data = match storage.gzip {
                        Some(level) => builder.deflate(level).shape(shape).obj_track_times(false).create("X")?,
                        None => builder.shape(shape).obj_track_times(false).create("X")?,
                    };
                    encode(&data, "array", "0.2.0")?;
                    (data, None)
                }
                _ => {
                    let group = group(&file, "X")?;
                    encode(&group, "csr_matrix", "0.1.0")?;
                    let data = growing::<f32>(&group, "data", storage.gzip)?;
                    (data, Some(growing::<i32>(&group, "indices", storage.gzip)?))
                }
            };
            Ok(Self {
                path: path.to_owned(),
                file,
                form: storage.form,
                genes: genes.len(),
                data,
                indices,
                values: Vec::new(),
                ids: Vec::new(),
                written: 0,
                pointers: vec![0],
                embedding: None,
            })
        };
        make().map_err(fail)
    }

    /// Appends a cell: genes in rising order, and their values.
    ///
    /// # Errors
    /// A gene out of range, or no room.
    pub fn cell(&mut self, ids: &[u32], values: &[f32]) -> Result<(), DataError> {
        if ids.len() != values.len() || ids.iter().any(|id| *id as usize >= self.genes) {
            return Err(file_error(&self.path, "a cell with genes that it does not have"));
        }
        match self.form {
            Form::Dense => {
                let at = self.values.len();
                self.values.resize(at + self.genes, 0.0);
                for (id, value) in ids.iter().zip(values) {
                    self.values[at + *id as usize] = *value;
                }
            }
            _ => {
                self.ids.extend(ids.iter().map(|id| *id as i32));
                self.values.extend_from_slice(values);
            }
        }
        let last = self.pointers.last().copied().unwrap_or(0);
        self.pointers.push(last + ids.len() as i64);
        if self.values.len() >= BUFFERED { self.flush() } else { Ok(()) }
    }

    /// Appends cells whose values are all given, row by row.
    ///
    /// # Errors
    /// Rows of another length than there are genes, or no room.
    pub fn rows(&mut self, rows: &[f32]) -> Result<(), DataError> {
        if self.genes == 0 || !rows.len().is_multiple_of(self.genes) {
            return Err(file_error(&self.path, format!("{} values as rows of {} genes", rows.len(), self.genes)));
        }
        let (mut ids, mut values) = (Vec::new(), Vec::new());
        for row in rows.chunks_exact(self.genes) {
            ids.clear();
            values.clear();
            for (id, value) in (0u32..).zip(row).filter(|(_, value)| **value != 0.0) {
                ids.push(id);
                values.push(*value);
            }
            self.cell(&ids, &values)?;
        }
        Ok(())
    }

    /// Gives cells `width` numbers each in `obsm`, under `name`: [`Writer::embed`] then follows each cell.
    ///
    /// # Errors
    /// No room.
    pub fn embedding(&mut self, name: &str, width: usize) -> Result<(), DataError> {
        let make = || -> ::hdf5::Result<Dataset> {
            let rows = (CHUNK_VALUES / width.max(1)).max(1);
            let builder = self.file.group("obsm")?.new_dataset::<f32>().chunk((rows, width.max(1)));
            let shape = (Extent::resizable(0), Extent::fixed(width));
            let data = builder.shape(shape).obj_track_times(false).create(name)?;
            encode(&data, "array", "0.2.0")?;
            Ok(data)
        };
        let data = make().map_err(|error| file_error(&self.path, format!("cannot be written: {error}")))?;
        self.embedding = Some(Embedding { data, width, values: Vec::new(), written: 0 });
        Ok(())
    }

    /// Numbers of the next cell, or cells.
    ///
    /// # Errors
    /// No room, or none were announced.
    pub fn embed(&mut self, values: &[f32]) -> Result<(), DataError> {
        let Some(embedding) = self.embedding.as_mut().filter(|of| values.len().is_multiple_of(of.width.max(1))) else {
            return Err(file_error(&self.path, format!("{} numbers of cells that have others", values.len())));
        };
        embedding.values.extend_from_slice(values);
        if embedding.values.len() < BUFFERED {
            return Ok(());
        }
        embedding.flush().map_err(|error| file_error(&self.path, format!("cannot be written: {error}")))
    }

    /// Cells so far.
    pub fn cells(&self) -> usize {
        self.pointers.len() - 1
    }

    fn flush(&mut self) -> Result<(), DataError> {
        let write = |this: &mut Self| -> ::hdf5::Result<()> {
            if this.form == Form::Dense {
                let rows = this.values.len() / this.genes.max(1);
                let (from, to) = (this.written, this.written + rows);
                this.data.resize((to, this.genes))?;
                let block = ndarray::ArrayView2::from_shape((rows, this.genes), &this.values);
                let block = block.map_err(|error| ::hdf5::Error::from(error.to_string()))?;
                this.data.write_slice(block, (from..to, ..))?;
                this.written = to;
            } else if let Some(indices) = &this.indices {
                let (from, to) = (this.written, this.written + this.values.len());
                this.data.resize(to)?;
                this.data.write_slice(&this.values, (from..to,))?;
                indices.resize(to)?;
                indices.write_slice(&this.ids, (from..to,))?;
                this.written = to;
            }
            this.values.clear();
            this.ids.clear();
            Ok(())
        };
        write(self).map_err(|error| file_error(&self.path, format!("cannot be written: {error}")))
    }

    /// Writes the cells' names (numbers where there are none) and columns, and closes the file.
    ///
    /// # Errors
    /// No room, or names and columns of another length than there are cells.
    pub fn finish(mut self, names: Option<&[String]>, columns: &[Column]) -> Result<(), DataError> {
        self.flush()?;
        let cells = self.cells();
        if let Some(embedding) = &mut self.embedding {
            embedding.flush().map_err(|error| file_error(&self.path, format!("cannot be written: {error}")))?;
            if embedding.written != cells {
                let problem = format!("obsm has {} cells, there are {cells}", embedding.written);
                return Err(file_error(&self.path, problem));
            }
        }
        let fits = names.is_none_or(|names| names.len() == cells) && columns.iter().all(|c| c.codes.len() == cells);
        if !fits {
            return Err(file_error(&self.path, format!("names or columns of another length than {cells} cells")));
        }
        let numbers: Vec<String> =
            if names.is_none() { (0..cells).map(|n| n.to_string()).collect() } else { Vec::new() };
        let names: Vec<&str> = names.unwrap_or(&numbers).iter().map(String::as_str).collect();
        let write = || -> ::hdf5::Result<()> {
            frame(&group(&self.file, "obs")?, &names, columns)?;
            if self.form != Form::Dense {
                let group = self.file.group("X")?;
                let shape = [cells as i64, self.genes as i64];
                group.new_attr::<i64>().shape(2).create("shape")?.write_raw(&shape)?;
                // As scipy has them: the smaller type where it suffices.
                let total = self.pointers.last().copied().unwrap_or(0);
                if i32::try_from(total).is_ok() {
                    let small: Vec<i32> = self.pointers.iter().map(|pointer| *pointer as i32).collect();
                    group.new_dataset_builder().with_data(&small).obj_track_times(false).create("indptr")?;
                } else {
                    group.new_dataset_builder().with_data(&self.pointers).obj_track_times(false).create("indptr")?;
                }
            }
            self.file.flush()
        };
        write().map_err(|error| file_error(&self.path, format!("cannot be written: {error}")))
    }
}

/// A group without times: equal content is equal bytes, whenever it is written.
fn group(parent: &Group, name: &str) -> ::hdf5::Result<Group> {
    parent.create_group_builder().with_create_plist(|plist| plist.obj_track_times(false)).create(name)
}

fn growing<T: H5Type>(group: &Group, name: &str, gzip: Option<u8>) -> ::hdf5::Result<Dataset> {
    let builder = group.new_dataset::<T>().chunk(CHUNK_VALUES);
    let shape = Extent::resizable(0);
    match gzip {
        Some(level) => builder.deflate(level).shape(shape).obj_track_times(false).create(name),
        None => builder.shape(shape).obj_track_times(false).create(name),
    }
}

/// A table with its index and columns of categories.
fn frame(group: &Group, names: &[&str], columns: &[Column]) -> ::hdf5::Result<()> {
    encode(group, "dataframe", "0.2.0")?;
    text(group, "_index", "_index")?;
    let order: Vec<VarLenUnicode> = columns.iter().map(|column| unicode(&column.name)).collect::<Result<_, _>>()?;
    group.new_attr::<VarLenUnicode>().shape(order.len()).create("column-order")?.write_raw(&order)?;
    strings(group, "_index", names)?;
    for column in columns {
        let inner = self::group(group, &column.name)?;
        encode(&inner, "categorical", "0.2.0")?;
        inner.new_attr::<bool>().create("ordered")?.write_scalar(&false)?;
        let categories: Vec<&str> = column.categories.iter().map(String::as_str).collect();
        strings(&inner, "categories", &categories)?;
        let codes = match i8::try_from(column.categories.len()) {
            Ok(_) => {
                let small: Vec<i8> = column.codes.iter().map(|code| *code as i8).collect();
                inner.new_dataset_builder().with_data(&small).obj_track_times(false).create("codes")?
            }
            Err(_) => inner.new_dataset_builder().with_data(&column.codes).obj_track_times(false).create("codes")?,
        };
        encode(&codes, "array", "0.2.0")?;
    }
    Ok(())
}

fn strings(group: &Group, name: &str, texts: &[&str]) -> ::hdf5::Result<()> {
    /// Texts that wait to be written.
    const BLOCK: usize = 1 << 16;
    let dataset = group.new_dataset::<VarLenUnicode>().shape(texts.len()).obj_track_times(false).create(name)?;
    for (n, block) in texts.chunks(BLOCK).enumerate() {
        let block: Vec<VarLenUnicode> = block.iter().map(|text| unicode(text)).collect::<Result<_, _>>()?;
        let from = n * BLOCK;
        dataset.write_slice(&block, (from..from + block.len(),))?;
    }
    encode(&dataset, "string-array", "0.2.0")
}

fn encode(place: &Location, encoding: &str, version: &str) -> ::hdf5::Result<()> {
    text(place, "encoding-type", encoding)?;
    text(place, "encoding-version", version)
}

fn text(place: &Location, name: &str, value: &str) -> ::hdf5::Result<()> {
    place.new_attr::<VarLenUnicode>().create(name)?.write_scalar(&unicode(value)?)
}

fn unicode(text: &str) -> ::hdf5::Result<VarLenUnicode> {
    text.parse().map_err(|_| ::hdf5::Error::from("text with a zero byte"))
}
