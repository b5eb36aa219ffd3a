use super::*;
use crate::comm::{ShmCollective, Solo, shm::create_memfd};
use std::time::Duration;
use tch::Device;

fn world<T: Send>(n: usize, body: impl Fn(Arc<dyn Collective>) -> T + Sync) -> Vec<T> {
    let fd = create_memfd(true).unwrap();
    std::thread::scope(|scope| {
        let (fd, body) = (&fd, &body);
        let start = |rank| {
            let fd = fd.try_clone().unwrap();
            let join = move || ShmCollective::new(fd, rank, n, Duration::from_secs(60)).unwrap();
            scope.spawn(move || body(Arc::new(join())))
        };
        let ranks: Vec<_> = (0..n).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

const SHAPES: [&[i64]; 5] = [&[6, 5], &[6], &[600, 6], &[600], &[1, 600]];

/// Five parameters and one that no loss uses, with values that depend on `seed`.
fn variables(seed: i64) -> Vec<(String, Tensor)> {
    let fill = |index: usize, shape: &[i64]| {
        let n: i64 = shape.iter().product();
        let values = Tensor::arange(n, (Kind::Float, Device::Cpu)) * 0.37 + (index as i64 + seed) as f64;
        (values.sin() * 0.1).reshape(shape).set_requires_grad(true)
    };
    let mut all: Vec<_> = (SHAPES.iter().enumerate()).map(|(i, s)| (format!("p{i}"), fill(i, s))).collect();
    all.insert(2, ("unused".to_owned(), fill(9, &[33])));
    all
}

/// Sample `index` of 12, its loss divided by 12.
fn loss(v: &[Tensor], index: usize) -> Tensor {
    let x = (Tensor::arange(5, (Kind::Float, Device::Cpu)) + index as f64).cos().reshape([1, 5]);
    let hidden = x.linear(&v[0], Some(&v[1])).tanh();
    let hidden = hidden.linear(&v[3], Some(&v[4])).relu();
    hidden.linear::<Tensor>(&v[5], None).square().sum(Kind::Float) / 12.0
}

fn step(ddp: &mut Ddp, samples: &[usize]) {
    ddp.zero_grad().unwrap();
    for (n, &sample) in samples.iter().enumerate() {
        ddp.set_sync(n + 1 == samples.len());
        loss(ddp.variables(), sample).backward();
    }
    ddp.votes_mut()[0] = samples.len() as f32;
    ddp.votes_mut()[VOTES - 1] = samples[0] as f32;
    ddp.finish().unwrap();
}

fn grads(ddp: &Ddp) -> Vec<Vec<f32>> {
    ddp.variables().iter().map(|v| Vec::<f32>::try_from(v.grad().reshape([-1])).unwrap()).collect()
}

/// Small buckets, so that this small model has several.
fn options(overlap: bool) -> DdpOptions {
    DdpOptions { bucket_mb: 0.002, overlap, ..DdpOptions::default() }
}

#[test]
fn three_ranks_sum_to_the_gradient_of_one() {
    let all: Vec<usize> = (0..12).collect();
    let mut one = Ddp::new(variables(0), Arc::new(Solo::new(Device::Cpu)), options(true)).unwrap();
    step(&mut one, &all);
    let right = grads(&one);
    assert!(right[2].iter().all(|&g| g == 0.0) && right[0].iter().any(|&g| g.abs() > 1e-4));
    for overlap in [false, true] {
        let results = world(3, |comm| {
            let rank = comm.rank();
            let mut ddp = Ddp::new(variables(0), comm, options(overlap)).unwrap();
            let mine = [rank, rank + 3, rank + 6, rank + 9];
            step(&mut ddp, &mine);
            let first = grads(&ddp);
            step(&mut ddp, &mine);
            assert_eq!((ddp.votes()[0], ddp.votes()[VOTES - 1]), (12.0, 3.0));
            assert!(ddp.votes()[1..VOTES - 1].iter().all(|&v| v == 0.0));
            (first, grads(&ddp))
        });
        for (first, second) in &results {
            assert!(*first == results[0].0 && *second == results[0].0, "bitwise, before and after the rebuild");
        }
        for (got, right) in results[0].0.iter().zip(&right) {
            got.iter().zip(right).for_each(|(g, r)| assert!((g - r).abs() <= 1e-6 * (1.0 + r.abs()), "{g} {r}"));
        }
    }
}

#[test]
fn rebuild_follows_the_ready_order_and_keeps_values() {
    let mut ddp = Ddp::new(variables(0), Arc::new(Solo::new(Device::Cpu)), options(true)).unwrap();
    let before: Vec<_> = variables(0).into_iter().map(|(_, v)| v).collect();
    let offset = |ddp: &Ddp, index: usize| ddp.layout().slots()[index].offset;
    assert!(offset(&ddp, 2) < offset(&ddp, 0));
    step(&mut ddp, &[0]);
    assert_eq!(ddp.layout_version(), 1);
    assert!((0..6).all(|index| offset(&ddp, index) <= offset(&ddp, 2)), "the unused one is last");
    for (now, before) in ddp.variables().iter().zip(&before) {
        assert_eq!(now.detach(), before.detach());
    }
    // Values are still views: filling the flat tensor fills the variables.
    let _ = ddp.params().shallow_clone().fill_(2.0);
    assert_eq!(ddp.variables()[3].mean(Kind::Float).double_value(&[]), 2.0);
}

#[test]
fn ranks_of_different_models_are_told_which_parameter() {
    let errors = world(3, |comm| {
        let seed = i64::from(comm.rank() == 2);
        Ddp::new(variables(seed), comm, DdpOptions::default()).err().unwrap().to_string()
    });
    assert!(errors.iter().all(|e| e.contains("rank 2 differs from rank 0 in initial values of parameter 0 (p0)")));
    let errors = world(2, |comm| {
        let mut all = variables(0);
        all[4].0 = format!("of rank {}", comm.rank());
        Ddp::new(all, comm, DdpOptions::default()).err().unwrap().to_string()
    });
    assert!(errors[0].contains("name or shape of parameter 4 (of rank 0)"), "{}", errors[0]);
}

#[test]
fn a_gradient_after_its_reduction_is_an_error() {
    let errors = world(2, |comm| {
        let mut ddp = Ddp::new(variables(0), comm, options(true)).unwrap();
        ddp.zero_grad().unwrap();
        ddp.set_sync(true);
        loss(ddp.variables(), 0).backward();
        loss(ddp.variables(), 1).backward();
        ddp.finish().unwrap_err().to_string()
    });
    assert!(errors.iter().all(|e| e.contains("only the last micro-batch")), "{errors:?}");
}

#[test]
fn variables_of_a_wrong_kind_are_named() {
    let double = Tensor::zeros([2], (Kind::Double, Device::Cpu)).set_requires_grad(true);
    let solo = || Arc::new(Solo::new(Device::Cpu));
    let error = Ddp::new(vec![("w".into(), double)], solo(), DdpOptions::default()).err().unwrap();
    assert_eq!(error.to_string(), "parameter w: is Double, expected Float");
    assert!(Ddp::new(Vec::new(), solo(), DdpOptions::default()).is_err());
}

/// Gradients of a model whose parts are recomputed: a nested backward adds them up, bucket by bucket.
#[test]
fn recomputed_parts_reduce_to_the_gradients_of_the_plain_path() {
    let forward = |v: &[Tensor], index: usize, again: bool| {
        let x = (Tensor::arange(5, (Kind::Float, Device::Cpu)) + index as f64).cos().reshape([1, 5]);
        let part = |weights: [&Tensor; 2], x: &Tensor| {
            let [w, b] = weights.map(Tensor::shallow_clone);
            let run = move |x: &[Tensor]| x[0].linear(&w, Some(&b)).tanh();
            if again { torch::recompute(&[x], run).unwrap() } else { run(&[x.shallow_clone()]) }
        };
        let hidden = part([&v[3], &v[4]], &part([&v[0], &v[1]], &x));
        hidden.linear::<Tensor>(&v[5], None).square().sum(Kind::Float) / 12.0
    };
    let step = |ddp: &mut Ddp, samples: &[usize], again: bool| {
        ddp.zero_grad().unwrap();
        for (n, &sample) in samples.iter().enumerate() {
            ddp.set_sync(n + 1 == samples.len());
            forward(ddp.variables(), sample, again).backward();
        }
        ddp.finish().unwrap();
        grads(ddp)
    };
    let mut one = Ddp::new(variables(0), Arc::new(Solo::new(Device::Cpu)), options(false)).unwrap();
    let right = step(&mut one, &(0..12).collect::<Vec<_>>(), false);
    for overlap in [false, true] {
        let results = world(3, |comm| {
            let rank = comm.rank();
            let mut ddp = Ddp::new(variables(0), comm, options(overlap)).unwrap();
            let mine = [rank, rank + 3, rank + 6, rank + 9];
            // Before and after the buckets are rebuilt in the order observed; a parameter signalled twice would be late.
            [step(&mut ddp, &mine, true), step(&mut ddp, &mine, true)]
        });
        for got in results.iter().flatten() {
            assert_eq!(*got, results[0][0]);
            for (got, right) in got.iter().flatten().zip(right.iter().flatten()) {
                assert!((got - right).abs() <= 1e-6 * (1.0 + right.abs()), "{got} {right}");
            }
        }
    }
}

/// Seven samples of two numbers each over three ranks, in two passes: all ranks see them in the order of the global batch.
#[test]
fn shared_numbers_come_in_the_order_of_the_global_batch() {
    let results = world(3, |comm| {
        let rank = comm.rank();
        let mut ddp = Ddp::new(variables(0), comm, DdpOptions { shared: 16, ..options(false) }).unwrap();
        let mut seen = Vec::new();
        for step_number in 0..2 {
            ddp.zero_grad().unwrap();
            let mine: Vec<usize> = (rank..7).step_by(3).collect();
            for (done, part) in [(0, &mine[..1]), (1, &mine[1..])] {
                ddp.set_sync(done == 1);
                loss(ddp.variables(), part[0]).backward();
                let numbers: Vec<f32> = part.iter().flat_map(|&s| [s as f32 + 0.1, -(s as f32) / 3.0]).collect();
                let numbers = Tensor::from_slice(&numbers).view([part.len() as i64, 2]);
                ddp.share((rank + done * 3, 3), &numbers).unwrap();
            }
            ddp.votes_mut()[1] = step_number as f32;
            ddp.finish().unwrap();
            assert_eq!(ddp.votes()[1], 3.0 * step_number as f32);
            seen.push(Vec::<Vec<f32>>::try_from(ddp.shared(7, 2).unwrap()).unwrap());
        }
        assert!(
            ddp.shared(9, 2).is_err() && ddp.share((9, 3), &Tensor::zeros([1, 2], (Kind::Float, Device::Cpu))).is_err()
        );
        seen
    });
    // Bit for bit: nothing but zeros is added to them.
    let expected: Vec<Vec<f32>> = (0..7).map(|s| vec![s as f32 + 0.1, -(s as f32) / 3.0]).collect();
    assert!(results.iter().flatten().all(|seen| *seen == expected), "before and after the buckets are rebuilt");
}
