//! Buffers: tensors of a model that no gradient changes, such as running statistics. All of a kind lie in one flat tensor,
//! so that ranks exchange them in one piece, and a step that is repeated finds them as they were.

use super::TrainError;
use super::scaler::tch_error;
use crate::comm::Collective;
use spec::config::BufferMode;
use std::sync::Arc;
use tch::{Device, Kind, TchError, Tensor};

/// All buffers of a kind.
struct Part {
    flat: Tensor,
    /// Content after the last step that counts.
    kept: Tensor,
}

/// The buffers of a model on one rank.
pub struct Buffers {
    named: Vec<(String, Tensor)>,
    /// Names them among the tensors of [`Buffers::of_all_ranks`].
    label: String,
    parts: Vec<Part>,
    mode: BufferMode,
    collective: Arc<dyn Collective>,
}

impl Buffers {
    /// Takes `named` over: their values move into flat tensors. Rank 0's count on all ranks.
    ///
    /// # Errors
    /// A peer failed, or no memory.
    pub fn new(
        label: &str,
        named: Vec<(String, Tensor)>,
        mode: BufferMode,
        collective: Arc<dyn Collective>,
    ) -> Result<Self, TrainError> {
        let mut kinds: Vec<Kind> = Vec::new();
        named.iter().map(|(_, tensor)| tensor.kind()).for_each(|kind| {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        });
        let part = |kind: Kind| {
            let mut of_kind: Vec<Tensor> =
                named.iter().filter(|(_, t)| t.kind() == kind).map(|(_, t)| t.shallow_clone()).collect();
            let flat = flatten(&mut of_kind)?;
            Ok(Part { kept: flat.f_detach_copy()?, flat })
        };
        let parts = kinds.into_iter().map(part).collect::<Result<Vec<_>, TchError>>().map_err(tch_error)?;
        let mut new = Self { named, label: label.into(), parts, mode, collective };
        new.broadcast()?;
        Ok(new)
    }

    /// By name, as given.
    pub fn named(&self) -> &[(String, Tensor)] {
        &self.named
    }

    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// True if ranks keep different buffers.
    pub fn are_local(&self) -> bool {
        self.mode == BufferMode::Local && self.collective.world_size() > 1 && !self.is_empty()
    }

    /// Before an evaluation and a checkpoint: `ddp.buffers`. All ranks call it together.
    ///
    /// # Errors
    /// A peer failed.
    pub fn meet(&mut self) -> Result<(), TrainError> {
        match self.mode {
            _ if self.collective.world_size() == 1 => Ok(()),
            BufferMode::Local => Ok(()),
            BufferMode::Broadcast => self.broadcast(),
            BufferMode::Mean => {
                let _no_grad = tch::no_grad_guard();
                for part in &self.parts {
                    if is_float(part.flat.kind()) {
                        self.average(part)?;
                    } else {
                        self.collective.broadcast(&part.flat, 0)?;
                    }
                }
                self.keep()
            }
        }
    }

    fn average(&self, part: &Part) -> Result<(), TrainError> {
        let world = self.collective.world_size() as f64;
        let sum = part.flat.f_to_dtype(Kind::Double, false, true).map_err(tch_error)?;
        self.collective.all_reduce_sum(&sum)?;
        let mean = sum.f_div_scalar(world).map_err(tch_error)?;
        part.flat.shallow_clone().f_copy_(&mean).map(|_| ()).map_err(tch_error)
    }

    fn broadcast(&mut self) -> Result<(), TrainError> {
        if self.collective.world_size() > 1 {
            for part in &self.parts {
                self.collective.broadcast(&part.flat, 0)?;
            }
        }
        self.keep()
    }

    /// The last step counts.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn keep(&mut self) -> Result<(), TrainError> {
        let _no_grad = tch::no_grad_guard();
        self.parts.iter_mut().try_for_each(|part| part.kept.f_copy_(&part.flat).map(|_| ()).map_err(tch_error))
    }

    /// The last step does not count.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn forget(&mut self) -> Result<(), TrainError> {
        let _no_grad = tch::no_grad_guard();
        self.parts.iter_mut().try_for_each(|part| part.flat.f_copy_(&part.kept).map(|_| ()).map_err(tch_error))
    }

    /// [`Buffers::forget`] where `hold` (f32 `[1]`) is above 0, else [`Buffers::keep`], decided on the device.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn keep_unless(&mut self, hold: &Tensor) -> Result<(), TrainError> {
        let _no_grad = tch::no_grad_guard();
        for Part { flat, kept } in &mut self.parts {
            undo_where(hold, flat, kept)?;
            kept.f_copy_(flat).map_err(tch_error)?;
        }
        Ok(())
    }

    /// Every rank's buffers, for [`Buffers::restore`] on a rank each. All ranks call it together.
    ///
    /// # Errors
    /// A peer failed.
    pub fn of_all_ranks(&self) -> Result<Vec<(String, Tensor)>, TrainError> {
        let mut all = Vec::new();
        for Part { flat, .. } in &self.parts {
            let host = flat.f_to_device(Device::Cpu).map_err(tch_error)?;
            let mut bytes = vec![0; host.numel() * host.kind().elt_size_in_bytes()];
            host.f_copy_data_u8(&mut bytes, host.numel()).map_err(tch_error)?;
            for (rank, theirs) in self.collective.all_gather(&bytes)?.iter().enumerate() {
                let tensor = Tensor::f_from_data_size(theirs, &host.size(), host.kind()).map_err(tch_error)?;
                all.push((self.name(rank, host.kind()), tensor));
            }
        }
        Ok(all)
    }

    /// Takes this rank's part of what [`Buffers::of_all_ranks`] gave, where it has one: with another number of ranks, or in
    /// another mode, some have none.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn restore(&mut self, saved: &[(String, Tensor)]) -> Result<(), TrainError> {
        let _no_grad = tch::no_grad_guard();
        for Part { flat, .. } in &self.parts {
            let own = self.name(self.collective.rank(), flat.kind());
            let found = saved.iter().find(|(name, tensor)| *name == own && tensor.size() == flat.size());
            if let Some((_, tensor)) = found.filter(|_| self.mode == BufferMode::Local) {
                flat.shallow_clone().f_copy_(tensor).map_err(tch_error)?;
            }
        }
        self.keep()
    }

    fn name(&self, rank: usize, kind: Kind) -> String {
        format!("rank{rank}.{}.{kind:?}", self.label)
    }
}

/// Sets `live` to `before` where `hold` (f32 `[1]`) is above 0, in place.
pub fn undo_where(hold: &Tensor, live: &mut Tensor, before: &Tensor) -> Result<(), TrainError> {
    let mut set = || {
        let value = before.f_where_self(&hold.f_gt(0.0)?, live)?;
        live.f_copy_(&value).map(|_| ())
    };
    set().map_err(tch_error)
}

/// Moves tensors of one kind into a new flat one, of which they are views from then on.
fn flatten(tensors: &mut [Tensor]) -> Result<Tensor, TchError> {
    let _no_grad = tch::no_grad_guard();
    let parts = tensors.iter().map(|tensor| tensor.f_detach()?.f_reshape([-1])).collect::<Result<Vec<_>, _>>()?;
    let flat = Tensor::f_cat(&parts, 0)?;
    let mut at = 0;
    for tensor in tensors {
        let (size, len) = (tensor.size(), tensor.numel() as i64);
        tensor.f_set_data(&flat.f_narrow(0, at, len)?.f_view(size.as_slice())?)?;
        at += len;
    }
    Ok(flat)
}

pub fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{ShmCollective, Solo, shm::create_memfd};
    use std::time::Duration;

    fn buffers(rank: f64) -> Vec<(String, Tensor)> {
        let full = |shape: &[i64], value, kind| Tensor::full(shape, value, (kind, Device::Cpu));
        vec![
            ("norm.running_mean".into(), full(&[3], 1.0 + rank, Kind::Float)),
            ("norm.num_batches_tracked".into(), full(&[], 10.0 + rank, Kind::Int64)),
            ("norm.running_var".into(), full(&[2, 2], 4.0 * rank, Kind::Float)),
        ]
    }

    fn values(named: &[(String, Tensor)]) -> Vec<Vec<f64>> {
        named.iter().map(|(_, t)| Vec::<f64>::try_from(t.to_kind(Kind::Double).reshape([-1])).unwrap()).collect()
    }

    /// Values on each of three ranks after each has set its own and met the others.
    fn met(mode: BufferMode) -> Vec<Vec<Vec<f64>>> {
        let fd = create_memfd(true).unwrap();
        std::thread::scope(|scope| {
            let start = |rank: usize| {
                let fd = fd.try_clone().unwrap();
                scope.spawn(move || {
                    let collective = ShmCollective::new(fd, rank, 3, Duration::from_secs(60)).unwrap();
                    let mut own = Buffers::new("buffers", buffers(rank as f64), mode, Arc::new(collective)).unwrap();
                    assert_eq!(values(own.named()), values(&buffers(0.0)), "rank 0's at the start, in every mode");
                    for ((_, to), (_, from)) in own.named().iter().zip(&buffers(rank as f64)) {
                        to.shallow_clone().copy_(from);
                    }
                    own.meet().unwrap();
                    let met = values(own.named());
                    let saved = own.of_all_ranks().unwrap();
                    let _ = own.named()[0].1.shallow_clone().fill_(7.0);
                    own.restore(&saved).unwrap();
                    let restored = if mode == BufferMode::Local { met[0][0] } else { 7.0 };
                    assert_eq!(values(own.named())[0], [restored; 3]);
                    let _ = own.named()[0].1.shallow_clone().fill_(met[0][0]);
                    own.keep().unwrap();
                    // What a failed step does is undone to this point.
                    let _ = own.named()[0].1.shallow_clone().fill_(99.0);
                    own.forget().unwrap();
                    assert_eq!(values(own.named()), met);
                    met
                })
            };
            let ranks: Vec<_> = (0..3).map(start).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn ranks_take_rank_0s_or_the_mean_or_keep_their_own() {
        let of = |rank: f64| values(&buffers(rank));
        assert_eq!(met(BufferMode::Broadcast), vec![of(0.0); 3]);
        assert_eq!(met(BufferMode::Local), [of(0.0), of(1.0), of(2.0)]);
        let mean = vec![vec![2.0; 3], vec![10.0], vec![4.0; 4]];
        assert_eq!(met(BufferMode::Mean), vec![mean; 3]);
    }

    #[test]
    fn a_step_that_does_not_count_leaves_no_trace() {
        let solo = Arc::new(Solo::new(Device::Cpu));
        let mut own = Buffers::new("buffers", buffers(0.0), BufferMode::Broadcast, solo).unwrap();
        let step = |own: &Buffers| own.named().iter().for_each(|(_, t)| drop(t.shallow_clone().g_add_scalar_(1)));
        let flag = |value: f32| Tensor::from_slice(&[value]);
        step(&own);
        own.keep_unless(&flag(0.0)).unwrap();
        let good = values(own.named());
        assert_eq!(good, [vec![2.0; 3], vec![11.0], vec![1.0; 4]]);
        step(&own);
        own.keep_unless(&flag(1.0)).unwrap();
        assert_eq!(values(own.named()), good);
        step(&own);
        own.keep_unless(&flag(1.0)).unwrap();
        assert_eq!(values(own.named()), good);
    }
}
