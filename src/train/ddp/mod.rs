//! Data-parallel gradients: persistent flat buckets, reduced while backward still runs.
//!
//! All trainable parameters are views of one flat tensor, all gradients views of another that lives where the
//! collective reduces without a copy. Buckets are neighbouring ranges of it, in the order in which gradients become
//! ready; a full bucket is reduced at once, always in the same order on all ranks.

mod bucket;
mod reducer;

pub use bucket::{Layout, Slot};

use crate::comm::{Collective, CommError};
use crate::torch::{self, TorchError};
use bucket::{ALIGN, Plan};
use reducer::Reducer;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use tch::{Kind, TchError, Tensor};

/// Sums that travel behind the gradients of each step: stop votes, loss sums, sample counts.
pub const VOTES: usize = 16;
/// The vote by which a rank has all ranks forget the step: it is to be repeated, so no layout follows from it.
pub const DISCARD: usize = VOTES - 2;

/// Errors of parallel gradients.
#[derive(Debug, thiserror::Error)]
pub enum DdpError {
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Torch(#[from] TorchError),
    #[error("libtorch: {0}")]
    Tch(#[from] TchError),
    #[error("parameter {name}: {problem}")]
    Parameter { name: String, problem: String },
    #[error("rank {rank} differs from rank 0 in {what}: all ranks must build the same model from the same seed")]
    Differs { rank: usize, what: String },
    #[error("{0}")]
    Usage(String),
}

/// How gradients are put into buckets.
#[derive(Clone, Debug, PartialEq)]
pub struct DdpOptions {
    /// Largest bucket after the first, MiB (`ddp.bucket_mb`).
    pub bucket_mb: f64,
    /// Reduce on a separate thread during backward; otherwise inside the hook. Off is no slower while CPU ranks take
    /// all cores: a reduction costs about one copy of the bucket, and a rank that waits frees its core.
    pub overlap: bool,
    /// Group of each variable, for the optimizer; empty: all are in one. Within a bucket, members of a group are neighbours.
    pub groups: Vec<usize>,
    /// Numbers that ranks share with each step beside the votes: see [`Ddp::share`].
    pub shared: usize,
    /// Each rank updates its slice of the parameters alone (`ddp.shard_optimizer`): see [`Ddp::own_range`].
    pub sharded: bool,
}

impl Default for DdpOptions {
    fn default() -> Self {
        DdpOptions { bucket_mb: 25.0, overlap: false, groups: Vec::new(), shared: 0, sharded: false }
    }
}

/// Gradients of one model over all ranks.
///
/// A step: [`Ddp::zero_grad`]; for each micro-batch [`Ddp::set_sync`] (true for the last one only), forward, backward;
/// [`Ddp::votes_mut`]; [`Ddp::finish`]. The loss of a micro-batch must be scaled by its share of the global batch: the
/// reduction is a plain sum.
pub struct Ddp {
    collective: Arc<dyn Collective>,
    names: Vec<String>,
    variables: Vec<Tensor>,
    layout: Layout,
    /// How often the layout changed.
    version: u64,
    /// [`Ddp::params`], with a gap at the end that makes the ranks' slices of one length.
    sliced_params: Tensor,
    /// Elements of a rank's slice; `None`: every rank updates all.
    slice: Option<usize>,
    flat_params: Tensor,
    /// Gradients, then [`VOTES`] more, then the numbers that ranks share.
    flat_grads: Tensor,
    groups: Vec<usize>,
    shared: usize,
    bucket_bytes: usize,
    reducer: Reducer,
    rebuilt: bool,
    votes: [f32; VOTES],
}

impl Ddp {
    /// Takes over the trainable variables `(name, f32 tensor)`, in the same order on every rank: their values move into
    /// one flat tensor, their gradients into another. Rank 0's values win.
    ///
    /// # Errors
    /// A variable that is not f32 or on another device, ranks with different names, shapes or values, no memory.
    pub fn new(
        variables: Vec<(String, Tensor)>,
        collective: Arc<dyn Collective>,
        options: DdpOptions,
    ) -> Result<Ddp, DdpError> {
        check_variables(&variables)?;
        compare_ranks(&variables, &*collective)?;
        let (names, variables): (Vec<_>, Vec<_>) = variables.into_iter().unzip();
        let shapes: Vec<Vec<i64>> = variables.iter().map(Tensor::size).collect();
        // The last layer's gradient comes first.
        let order: Vec<usize> = (0..shapes.len()).rev().collect();
        let bucket_bytes = (options.bucket_mb * f64::from(1 << 20)) as usize;
        let Plan { layout, buckets } = Plan::new(&shapes, &order, bucket_bytes, &options.groups);
        let tail = VOTES + options.shared;
        let flat_grads = collective.flat_buffer(layout.len() + tail)?;
        let world = collective.world_size();
        let slice = options.sharded.then(|| slice_of(layout.len(), world));
        let padded = slice.map_or(layout.len(), |slice| slice * world);
        let sliced_params = Tensor::f_zeros([padded as i64], (Kind::Float, flat_grads.device()))?;
        let flat_params = sliced_params.f_narrow(0, 0, layout.len() as i64)?;
        let reducer = Reducer::new(collective.clone(), (&flat_grads, tail), buckets, options.overlap)?;
        let mut ddp = Ddp {
            collective,
            names,
            variables,
            layout,
            version: 0,
            sliced_params,
            slice,
            flat_params,
            flat_grads,
            groups: options.groups,
            shared: options.shared,
            bucket_bytes,
            reducer,
            rebuilt: false,
            votes: [0.0; VOTES],
        };
        ddp.bind()?;
        ddp.collective.broadcast(&ddp.flat_params, 0)?;
        ddp.collective.catch_up("rank 0's parameters")?;
        ddp.hook()?;
        Ok(ddp)
    }

    /// Copies the variables' values to their places and makes values and gradients views of the flat tensors.
    fn bind(&mut self) -> Result<(), DdpError> {
        let _no_grad = tch::no_grad_guard();
        for (index, variable) in self.variables.iter_mut().enumerate() {
            let mut param = self.layout.view(&self.flat_params, index)?;
            param.f_copy_(&variable.f_detach()?)?;
            variable.f_set_data(&param)?;
            torch::set_grad(variable, &self.layout.view(&self.flat_grads, index)?)?;
        }
        Ok(())
    }

    fn hook(&self) -> Result<(), DdpError> {
        for (index, variable) in self.variables.iter().enumerate() {
            let signal = self.reducer.signal();
            torch::on_grad_ready(variable, Box::new(move || signal.ready(index)))?;
        }
        Ok(())
    }

    /// Announces whether the next backward pass is the last of its step, so that full buckets are reduced at once.
    /// False at first.
    pub fn set_sync(&mut self, sync: bool) {
        self.reducer.set_sync(sync);
    }

    /// Fills all gradients with zero and forgets what was ready.
    ///
    /// # Errors
    /// A reduction still under way failed.
    pub fn zero_grad(&mut self) -> Result<(), DdpError> {
        self.reducer.reset()?;
        let _no_grad = tch::no_grad_guard();
        let _ = self.flat_grads.f_zero_()?;
        self.votes = [0.0; VOTES];
        Ok(())
    }

    /// Numbers that [`Ddp::finish`] sums over the ranks with the gradients.
    pub fn votes_mut(&mut self) -> &mut [f32; VOTES] {
        &mut self.votes
    }

    /// The sums over all ranks, after [`Ddp::finish`].
    pub fn votes(&self) -> &[f32; VOTES] {
        &self.votes
    }

    /// Waits until gradients and votes are summed over all ranks. Parameters that got no gradient count as zero.
    ///
    /// After the first step the buckets are rebuilt in the order that rank 0 observed; [`Ddp::layout_version`] changes.
    ///
    /// # Errors
    /// A peer failed or came late, or a gradient arrived after its bucket was reduced.
    pub fn finish(&mut self) -> Result<(), DdpError> {
        let mut tail = self.flat_grads.f_narrow(0, self.layout.len() as i64, VOTES as i64)?;
        tail.f_copy_(&Tensor::f_from_slice(&self.votes)?)?;
        self.reduce_rest()?;
        self.votes.copy_from_slice(&Vec::<f32>::try_from(&tail)?);
        self.rebuild_once(self.votes[DISCARD])
    }

    /// [`Ddp::finish`] for votes that are on the device already, in [`Ddp::device_votes`]: the host waits for nothing but
    /// the one rebuild after the first step.
    ///
    /// # Errors
    /// As there.
    pub fn finish_on_device(&mut self) -> Result<(), DdpError> {
        self.reduce_rest()?;
        if self.rebuilt {
            return Ok(());
        }
        self.collective.catch_up("the first step's gradients")?;
        let discard = self.device_votes()?.f_double_value(&[DISCARD as i64])?;
        self.rebuild_once(discard as f32)
    }

    /// The [`VOTES`] numbers behind the gradients, where they are reduced; [`Ddp::zero_grad`] zeroes them.
    ///
    /// # Errors
    /// libtorch refuses the view, which it does not.
    pub fn device_votes(&self) -> Result<Tensor, DdpError> {
        Ok(self.flat_grads.f_narrow(0, self.layout.len() as i64, VOTES as i64)?)
    }

    /// A place for this rank's part of the numbers that all ranks share: `width` numbers for each of its samples, which are
    /// samples `first`, `first + every`, … of the global batch. Between [`Ddp::zero_grad`] and [`Ddp::finish`].
    ///
    /// # Errors
    /// The samples lie outside.
    pub fn share(&self, (first, every): (usize, usize), numbers: &Tensor) -> Result<(), DdpError> {
        let (count, width) = numbers.size2()?;
        let end = first as i64 + (count - 1) * every as i64 + 1;
        if count == 0 {
            return Ok(());
        }
        let rows = self.shared_rows(width, end)?;
        let mut place = rows.f_slice(0, first as i64, end, every as i64)?;
        place.f_copy_(&numbers.f_detach()?)?;
        Ok(())
    }

    /// Values that all ranks shared, f32 `[samples, width]` in the order of the global batch, after [`Ddp::finish`]; a view.
    ///
    /// # Errors
    /// There are not so many.
    pub fn shared(&self, samples: usize, width: usize) -> Result<Tensor, DdpError> {
        self.shared_rows(width as i64, samples as i64)
    }

    fn shared_rows(&self, width: i64, samples: i64) -> Result<Tensor, DdpError> {
        if samples * width > self.shared as i64 {
            let problem =
                format!("{samples} samples share {width} numbers each, and there is room for {}", self.shared);
            return Err(DdpError::Usage(problem));
        }
        let start = (self.layout.len() + VOTES) as i64;
        Ok(self.flat_grads.f_narrow(0, start, samples * width)?.f_view([samples, width])?)
    }

    fn reduce_rest(&mut self) -> Result<(), DdpError> {
        let Some(late) = self.reducer.finish()? else { return Ok(()) };
        let problem = "a gradient arrived after its bucket was reduced: only the last micro-batch of a step may sync";
        Err(DdpError::Parameter { name: self.names[late].clone(), problem: problem.to_owned() })
    }

    fn rebuild_once(&mut self, discard: f32) -> Result<(), DdpError> {
        if self.rebuilt || discard != 0.0 {
            return Ok(());
        }
        self.rebuilt = true;
        self.rebuild()
    }

    /// Puts parameters into the order in which rank 0 saw their gradients. Values and gradients stay what they are.
    fn rebuild(&mut self) -> Result<(), DdpError> {
        let seen = self.reducer.ready_order();
        let bytes: Vec<u8> = seen.iter().flat_map(|&index| (index as u64).to_le_bytes()).collect();
        let all = self.collective.all_gather(&bytes)?;
        let order = bucket::complete_order(&all[0], self.variables.len())
            .ok_or_else(|| DdpError::Usage("rank 0 sent no valid order of parameters".to_owned()))?;
        let shapes: Vec<Vec<i64>> = self.variables.iter().map(Tensor::size).collect();
        let Plan { layout, buckets } = Plan::new(&shapes, &order, self.bucket_bytes, &self.groups);
        if layout == self.layout {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let old = std::mem::replace(&mut self.layout, layout);
        for flat in [&self.flat_params, &self.flat_grads] {
            self.layout.refill(&mut flat.shallow_clone(), &old)?;
        }
        for (index, variable) in self.variables.iter_mut().enumerate() {
            variable.f_set_data(&self.layout.view(&self.flat_params, index)?)?;
            torch::set_grad(variable, &self.layout.view(&self.flat_grads, index)?)?;
        }
        self.reducer.replace_buckets(buckets)?;
        self.version += 1;
        Ok(())
    }

    /// Compares the parameters of all ranks bit for bit; returns the first rank that differs from rank 0. Every rank
    /// calls it. The parameters are copied to the host.
    ///
    /// # Errors
    /// A peer failed.
    pub fn differing_rank(&self) -> Result<Option<usize>, DdpError> {
        self.collective.catch_up("the last step")?;
        let values = Vec::<f32>::try_from(&self.flat_params)?;
        let own = hash(|h| values.iter().for_each(|v| v.to_bits().hash(h)));
        let all = self.collective.all_gather(&own.to_le_bytes())?;
        Ok(all.iter().position(|other| *other != all[0]))
    }

    /// First element and length of the part of [`Ddp::params`] that this rank's optimizer updates: all of it, or this rank's
    /// slice, after whose update comes [`Ddp::share_params`].
    pub fn own_range(&self) -> (usize, usize) {
        let Some(slice) = self.slice else { return (0, self.layout.len()) };
        let start = (self.collective.rank() * slice).min(self.layout.len());
        (start, slice.min(self.layout.len() - start))
    }

    /// Number of this rank.
    pub fn rank(&self) -> usize {
        self.collective.rank()
    }

    /// True where ranks update slices.
    pub fn is_sharded(&self) -> bool {
        self.slice.is_some()
    }

    /// Gives every rank the slices that the others have updated; a no-op where each updates all.
    ///
    /// # Errors
    /// A peer failed.
    pub fn share_params(&self) -> Result<(), DdpError> {
        match self.slice {
            Some(slice) => Ok(self.collective.gather_slices(&self.sliced_params, slice)?),
            None => Ok(()),
        }
    }

    /// A tensor in the places of [`Ddp::params`] whose parts lie on their ranks, brought together: `own` is this rank's. All
    /// ranks call it together where ranks update slices.
    ///
    /// # Errors
    /// A peer failed.
    pub fn gathered(&self, own: &Tensor) -> Result<Tensor, DdpError> {
        let Some(slice) = self.slice else { return Ok(own.shallow_clone()) };
        let _no_grad = tch::no_grad_guard();
        let whole = self.sliced_params.f_zeros_like()?;
        let (start, len) = self.own_range();
        whole.f_narrow(0, start as i64, len as i64)?.f_copy_(own)?;
        self.collective.gather_slices(&whole, slice)?;
        Ok(whole.f_narrow(0, 0, self.layout.len() as i64)?)
    }

    /// All parameters, f32 `[layout().len()]`; gaps between them are zero.
    pub fn params(&self) -> &Tensor {
        &self.flat_params
    }

    /// All gradients in the places of [`Ddp::params`].
    ///
    /// # Errors
    /// libtorch refuses the view, which it does not.
    pub fn grads(&self) -> Result<Tensor, DdpError> {
        Ok(self.flat_grads.f_narrow(0, 0, self.layout.len() as i64)?)
    }

    /// Names of the parameters, as given.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The parameters, as given: views of [`Ddp::params`], whose `.grad` are views of [`Ddp::grads`].
    pub fn variables(&self) -> &[Tensor] {
        &self.variables
    }

    /// Group of each parameter, as given; empty: all are in one.
    pub fn groups(&self) -> &[usize] {
        &self.groups
    }

    /// Where each parameter lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Grows with each change of [`Ddp::layout`].
    pub fn layout_version(&self) -> u64 {
        self.version
    }
}

impl Drop for Ddp {
    fn drop(&mut self) {
        for variable in &self.variables {
            // A hook that stayed would only count for nobody.
            let _ = torch::clear_grad_ready(variable);
        }
    }
}

/// Elements of a rank's slice: parameters start on multiples of [`ALIGN`], and so do slices.
fn slice_of(len: usize, world: usize) -> usize {
    len.div_ceil(world.max(1)).next_multiple_of(ALIGN)
}

fn check_variables(variables: &[(String, Tensor)]) -> Result<(), DdpError> {
    if variables.is_empty() {
        return Err(DdpError::Usage("the model has no trainable parameter".to_owned()));
    }
    for (name, variable) in variables {
        let problem = if variable.kind() != Kind::Float {
            format!("is {:?}, expected Float", variable.kind())
        } else if variable.device() != variables[0].1.device() {
            format!("is on {:?}, the first one on {:?}", variable.device(), variables[0].1.device())
        } else if !variable.requires_grad() {
            "takes no gradient: leave it out".to_owned()
        } else {
            continue;
        };
        return Err(DdpError::Parameter { name: name.clone(), problem });
    }
    Ok(())
}

/// Compares names, shapes and values with rank 0's.
fn compare_ranks(variables: &[(String, Tensor)], collective: &dyn Collective) -> Result<(), DdpError> {
    if collective.world_size() == 1 {
        return Ok(());
    }
    let mut own = Vec::with_capacity(variables.len() * 16);
    for (name, variable) in variables {
        let values = Vec::<f32>::try_from(variable.f_detach()?.f_reshape([-1])?)?;
        let shape = hash(|h| (name, variable.size()).hash(h));
        let values = hash(|h| values.iter().for_each(|v| v.to_bits().hash(h)));
        own.extend([shape, values].iter().flat_map(|part| part.to_le_bytes()));
    }
    let all = collective.all_gather(&own)?;
    // Every rank looks at all of them, so that all fail alike.
    for (rank, other) in all.iter().enumerate() {
        if other.len() != all[0].len() {
            let what = format!("its number of parameters ({} against {})", other.len() / 16, all[0].len() / 16);
            return Err(DdpError::Differs { rank, what });
        }
        if let Some(at) = (0..other.len()).step_by(8).find(|&at| other[at..at + 8] != all[0][at..at + 8]) {
            let name = variables.get(at / 16).map_or("?", |(name, _)| name);
            let part = if at % 16 == 0 { "name or shape" } else { "initial values" };
            return Err(DdpError::Differs { rank, what: format!("{part} of parameter {} ({name})", at / 16) });
        }
    }
    Ok(())
}

fn hash(feed: impl FnOnce(&mut DefaultHasher)) -> u64 {
    let mut hasher = DefaultHasher::new();
    feed(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
