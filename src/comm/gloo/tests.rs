use super::*;
use crate::comm::conformance::check;
use crate::comm::shm::create_memfd;
use crate::comm::{RankEnv, rendezvous};
use host::nodes::{JoinSecret, NodePlace, Party};
use std::io::Write;
use std::net::{TcpListener, TcpStream};

const LONG: Duration = Duration::from_secs(60);

fn port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

fn place(port: u16, nodes: usize, node: usize, limit: Duration) -> NodePlace {
    let env = RankEnv { nodes, group_rank: node, master_port: port, ..RankEnv::alone() };
    let secret = JoinSecret::new(b"a long secret".to_vec()).unwrap();
    rendezvous::place(&env, Party::FirstRanks, "night", Some(secret), limit)
}

/// Runs `body` as every rank of a world of threads, whose nodes have the given ranks, and returns their results by rank.
fn world<T: Send>(
    nodes: &[&[usize]],
    timeout: Duration,
    body: impl Fn(GlooCollective) -> T + std::marker::Sync,
) -> Vec<T> {
    let (port, world) = (port(), nodes.iter().map(|ranks| ranks.len()).sum());
    let mut found: Vec<(usize, T)> = std::thread::scope(|scope| {
        let mut ranks = Vec::new();
        for (node, here) in nodes.iter().enumerate() {
            let fd = create_memfd(true).unwrap();
            for (local, &rank) in here.iter().enumerate() {
                let (fd, body) = (fd.try_clone().unwrap(), &body);
                ranks.push(scope.spawn(move || {
                    let inner = ShmCollective::new(fd, local, here.len(), timeout).unwrap();
                    let first = First { place: place(port, nodes.len(), node, timeout), interface: None };
                    let first = (local == 0).then_some(first);
                    (rank, body(GlooCollective::new(inner, rank, world, first, timeout).unwrap()))
                }));
            }
        }
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    found.sort_by_key(|(rank, _)| *rank);
    found.into_iter().map(|(_, result)| result).collect()
}

#[test]
fn nodes_of_any_size_keep_the_contract() {
    // One rank alone on its node; and ranks that are dealt out in turn.
    for nodes in [&[&[0, 1][..], &[2]][..], &[&[0, 2], &[1, 3]], &[&[0], &[1], &[2]]] {
        let names = world(nodes, LONG, |comm| {
            check(&comm, Device::Cpu).unwrap();
            assert_eq!((comm.nodes(), comm.world_size()), (nodes.len(), nodes.concat().len()));
            comm.backend()
        });
        assert!(names.iter().all(|name| *name == "gloo"));
    }
}

#[test]
fn sums_have_the_same_bits_on_every_rank_in_flat_buffers_and_elsewhere() {
    let len = 300_001;
    let values = |rank: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * 31 + rank * 17) % 1000) as f32 * [1e-3, 1e4, 0.37][rank % 3]).collect()
    };
    let results = world(&[&[0, 1], &[2, 3]], LONG, |comm| {
        let flat = comm.flat_buffer(len).unwrap();
        flat.shallow_clone().copy_(&Tensor::from_slice(&values(comm.rank())));
        comm.all_reduce_sum(&flat.narrow(0, 0, 1000)).unwrap();
        comm.all_reduce_sum(&flat.narrow(0, 1000, len as i64 - 1000)).unwrap();
        let other = Tensor::from_slice(&values(comm.rank()));
        comm.all_reduce_sum(&other).unwrap();
        (Vec::<f32>::try_from(&flat).unwrap(), Vec::<f32>::try_from(&other).unwrap())
    });
    let parts: Vec<Vec<f32>> = (0..4).map(values).collect();
    let right: Vec<f64> = (0..len).map(|i| parts.iter().map(|part| f64::from(part[i])).sum()).collect();
    for (flat, other) in &results {
        assert!(*flat == results[0].0 && *other == results[0].1, "bits differ between ranks");
        let close =
            |sum: &[f32]| sum.iter().zip(&right).all(|(a, b)| (f64::from(*a) - b).abs() <= 1e-5 * b.abs() + 1e-4);
        assert!(close(flat) && close(other));
    }
}

#[test]
fn a_rank_that_does_not_arrive_is_named_on_both_nodes() {
    let errors = world(&[&[0, 1], &[2]], Duration::from_secs(2), |comm| {
        if comm.rank() == 2 {
            // Longer than the others wait.
            std::thread::sleep(Duration::from_secs(4));
        }
        comm.barrier().unwrap_err().to_string()
    });
    assert!(errors[0].contains("waited 2.") && errors[0].contains("for rank 2 (node 1)"), "{errors:?}");
    assert!(errors[1].starts_with("rank 0 failed"), "{errors:?}");
    assert!(errors[2].starts_with("rank 0 failed: barrier waited"), "{errors:?}");
}

#[test]
fn a_failure_is_told_to_the_ranks_of_all_nodes_and_so_is_a_node_that_leaves() {
    let errors = world(&[&[0], &[1, 2], &[3]], LONG, |comm| {
        comm.barrier().unwrap();
        if comm.rank() == 3 {
            // The others have left the barrier by then, and wait at the next.
            std::thread::sleep(Duration::from_millis(500));
            comm.abort(CommError::GivenUp { error: "disk full".into() });
        }
        comm.barrier().unwrap_err().to_string()
    });
    assert!(errors[..2].iter().all(|error| error == "rank 3 failed: disk full"), "{errors:?}");
    assert!(errors[2].starts_with("rank 3 failed"), "{errors:?}");
    let errors = world(&[&[0], &[1], &[2]], LONG, |comm| {
        comm.barrier().unwrap();
        if comm.rank() == 1 {
            return String::new();
        }
        comm.barrier().unwrap_err().to_string()
    });
    for rank in [0, 2] {
        assert!(
            errors[rank].contains("rank 1 failed: node 1 ended while others waited for it in barrier"),
            "{errors:?}"
        );
    }
}

#[test]
fn strangers_at_the_meeting_point_do_no_harm() {
    let at = port();
    let knock = |bytes: &[u8]| {
        let stream = std::iter::from_fn(|| Some(TcpStream::connect(("127.0.0.1", at)))).find_map(Result::ok);
        let mut stream = stream.unwrap();
        let _ = stream.write_all(bytes);
        stream
    };
    std::thread::scope(|scope| {
        let node = |node: usize| {
            scope.spawn(move || {
                let inner = ShmCollective::new(create_memfd(true).unwrap(), 0, 1, LONG).unwrap();
                let first = First { place: place(at, 2, node, LONG), interface: None };
                check(&GlooCollective::new(inner, node, 2, Some(first), LONG).unwrap(), Device::Cpu).unwrap();
            })
        };
        let zero = node(0);
        // Half a length, a length without its frame, and another protocol.
        let _open = [&[7, 0][..], &[255, 0, 0, 0], b"GET / HTTP/1.1\r\n\r\n"].map(knock);
        for node in [zero, node(1)] {
            node.join().unwrap();
        }
    });
}
