//! Launchers that meet, late ones, strangers, and nodes that end.

use super::*;
use std::time::Instant;

fn place(node_rank: usize, nnodes: usize, port: u16, limit_s: f64) -> NodePlace {
    let (job, master_addr) = ("night".to_owned(), "127.0.0.1".to_owned());
    let limit = Duration::from_secs_f64(limit_s);
    NodePlace { party: Party::Launchers, job, nnodes, node_rank, master_addr, master_port: port, limit, secret: None }
}

fn port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

fn soon() -> Deadline {
    Deadline::new(Duration::from_secs(30))
}

/// A connection to node 0, once it listens.
fn knock(port: u16) -> TcpStream {
    loop {
        if let Ok(stream) = connect("127.0.0.1", port, &soon()) {
            return stream;
        }
    }
}

fn hello(version: u32, job: &str, node_rank: usize) -> Word {
    Word::Hello { version, job: job.into(), nnodes: 2, node_rank, nonce: String::new() }
}

fn error(place: NodePlace) -> String {
    Nodes::meet(place).err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn every_node_gets_what_all_say_and_the_port_is_free_then() {
    let port = port();
    let texts = std::thread::scope(|scope| {
        let node = |node: usize| {
            scope.spawn(move || {
                let mut nodes = Nodes::meet(place(node, 3, port, 60.0)).unwrap();
                let first = nodes.all_gather(&format!("{node} ranks")).unwrap();
                let second = nodes.all_gather(if node == 1 { "ü" } else { "" }).unwrap();
                drop(nodes);
                if node == 0 {
                    drop(TcpListener::bind(("0.0.0.0", port)).unwrap());
                }
                (first, second)
            })
        };
        // Node 2 waits for node 0, and node 0, whom a stranger talks to, for node 1.
        let (two, zero) = (node(2), node(0));
        let mut stranger = knock(port);
        io::Write::write_all(&mut stranger, b"hr-id-01 GET / HTTP/1.1\r\n\r\n").unwrap();
        [two, node(1), zero].map(|node| node.join().unwrap())
    });
    let words = |words: [&str; 3]| words.map(String::from).to_vec();
    assert!(texts.iter().all(|t| *t == (words(["0 ranks", "1 ranks", "2 ranks"]), words(["", "ü", ""]))));
}

#[test]
fn nodes_that_do_not_come_are_named_to_those_that_did() {
    let port = port();
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || error(place(0, 4, port, 0.6)));
        let two = scope.spawn(move || error(place(2, 4, port, 30.0)));
        for text in [zero.join().unwrap(), two.join().unwrap()] {
            assert!(text.contains("nodes 1, 3 did not come within 0.6 s"), "{text}");
        }
    });
    let alone = error(place(1, 2, port, 0.2));
    assert!(alone.contains("node 0 did not come within 0.2 s"), "{alone}");
}

#[test]
fn contradictions_are_told_to_both_sides() {
    for (other, nnodes, says) in
        [(1, 3, "--nnodes 3, node 0 with --nnodes 2"), (0, 2, "two launchers say --node-rank 0")]
    {
        let port = port();
        std::thread::scope(|scope| {
            let zero = scope.spawn(move || error(place(0, 2, port, 30.0)));
            let hello =
                Word::Hello { version: VERSION, job: "night".into(), nnodes, node_rank: other, nonce: String::new() };
            let mut stream = knock(port);
            write_frame(&mut stream, &hello).unwrap();
            let told = hear(&stream, &soon(), WORD_BYTES).unwrap();
            let text = zero.join().unwrap();
            assert!(text.contains(says), "{text}");
            assert!(matches!(told, Word::Refused { problem } if text.contains(&problem)));
        });
    }
}

#[test]
fn another_job_and_a_taken_port_are_errors_and_a_node_that_ends_is_named() {
    let port = port();
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || Nodes::meet(place(0, 2, port, 60.0)).map(|mut nodes| nodes.all_gather("0")));
        let stranger = NodePlace { job: "day".into(), ..place(1, 2, port, 60.0) };
        let text = error(stranger);
        assert!(text.contains("belongs to the run \"night\"") && text.contains("\"day\""), "{text}");
        // Continues to wait for its own node, which connects and dies.
        drop(Nodes::meet(place(1, 2, port, 60.0)).unwrap());
        let text = zero.join().unwrap().unwrap().unwrap_err().to_string();
        assert!(text.contains("the launcher of node 1 ended"), "{text}");
    });
    let taken = TcpListener::bind(("0.0.0.0", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    assert!(error(place(0, 2, port, 1.0)).contains("in use on node 0: give another --master-port"));
    std::thread::scope(|scope| {
        let guest = scope.spawn(move || error(place(1, 2, port, 30.0)));
        drop(taken.accept().unwrap());
        let text = guest.join().unwrap();
        assert!(text.contains("took the connection and closed it"), "{text}");
        let guest = scope.spawn(move || error(place(1, 2, port, 30.0)));
        let (mut other, _) = taken.accept().unwrap();
        other.write_all(b"\x16\0\0\x00220 mail.example.org\r\n").unwrap();
        let text = guest.join().unwrap();
        assert!(text.contains("nobody of this job listens there"), "{text}");
    });
}

#[test]
fn a_node_that_is_started_again_while_others_are_missing_takes_its_seat() {
    let port = port();
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || Nodes::meet(place(0, 3, port, 60.0)).map(|mut nodes| nodes.all_gather("0")));
        for kill in [true, false] {
            let mut stream = knock(port);
            write_frame(
                &mut stream,
                &Word::Hello { version: VERSION, job: "night".into(), nnodes: 3, node_rank: 1, nonce: String::new() },
            )
            .unwrap();
            if kill {
                // Gone by a reset: it leaves words unread.
                rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
            }
        }
        let again = |node: usize| {
            scope.spawn(move || Nodes::meet(place(node, 3, port, 60.0)).map(|mut nodes| nodes.all_gather("x")))
        };
        let (one, two) = (again(1), again(2));
        for node in [zero, one, two] {
            assert_eq!(node.join().unwrap().unwrap().unwrap(), ["0", "x", "x"]);
        }
    });
}

#[test]
fn strangers_that_say_nothing_little_or_much_do_not_hold_node_0_beyond_its_limit() {
    let port = port();
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || {
            let began = Instant::now();
            (error(place(0, 2, port, 3.0)), began.elapsed())
        });
        let mut dripping = knock(port);
        scope.spawn(move || {
            // A frame of 1024 bytes, in minutes.
            let bytes = [0, 4, 0, 0].into_iter().chain(std::iter::repeat(b' '));
            for byte in bytes.take(1028) {
                if dripping.write_all(&[byte]).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let mut long = knock(port);
        write_frame(&mut long, &hello(VERSION, &"night".repeat(1000), 1)).unwrap();
        let _silent = [0; 10].map(|_| knock(port));
        let (text, took) = zero.join().unwrap();
        assert!(text.contains("node 1 did not come within 3 s"), "{text}");
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert!(hear(&long, &soon(), WORD_BYTES).is_err(), "too long for a greeting: it is not answered");
    });
}

#[test]
fn another_job_of_another_version_does_not_end_this_one() {
    let port = port();
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || error(place(0, 2, port, 60.0)));
        for (job, says) in [("day", "belongs to the run"), ("night", "all nodes need the same program")] {
            let mut stream = knock(port);
            write_frame(&mut stream, &hello(VERSION + 1, job, 1)).unwrap();
            let told = hear(&stream, &soon(), WORD_BYTES).unwrap();
            assert!(matches!(&told, Word::Refused { problem } if problem.contains(says)), "{told:?}");
        }
        let text = zero.join().unwrap();
        assert!(text.contains("all nodes need the same program"), "{text}");
    });
}

#[test]
fn more_than_a_frame_holds_is_an_error_on_all_nodes() {
    let port = port();
    std::thread::scope(|scope| {
        let say = move |node: usize, bytes: usize| {
            let mut nodes = Nodes::meet(place(node, 2, port, 60.0)).unwrap();
            nodes.all_gather(&"x".repeat(bytes)).unwrap_err().to_string()
        };
        let one = scope.spawn(move || say(1, MAX_FRAME_BYTES / 2));
        let zero = say(0, MAX_FRAME_BYTES / 2);
        for text in [zero, one.join().unwrap()] {
            assert!(text.contains("what 2 nodes have to say is too much"), "{text}");
        }
    });
}

#[test]
fn an_address_that_never_answers_is_given_up_in_time() {
    let began = Instant::now();
    // An address reserved for documentation.
    let text = error(NodePlace { master_addr: "192.0.2.1".into(), ..place(1, 2, 9, 0.5) });
    assert!(text.contains("node 0 did not come within 0.5 s"), "{text}");
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn nodes_meet_at_an_address_of_ipv6_too() {
    let at = |node, port| NodePlace { master_addr: "::1".into(), ..place(node, 2, port, 60.0) };
    assert_eq!(at(0, 29500).address(), "[::1]:29500");
    let Ok(free) = TcpListener::bind(("::1", 0)) else {
        eprintln!("skipped: this machine has no IPv6");
        return;
    };
    let port = free.local_addr().unwrap().port();
    drop(free);
    std::thread::scope(|scope| {
        let one = scope.spawn(move || Nodes::meet(at(1, port)).unwrap().all_gather("1").unwrap());
        assert_eq!(Nodes::meet(at(0, port)).unwrap().all_gather("0").unwrap(), ["0", "1"]);
        assert_eq!(one.join().unwrap(), ["0", "1"]);
    });
}

fn with_secret(place: NodePlace, secret: &str) -> NodePlace {
    NodePlace { secret: Some(JoinSecret::new(secret.as_bytes().to_vec()).unwrap()), ..place }
}

#[test]
fn nodes_with_the_same_secret_meet_and_one_without_it_is_told_and_ends_nothing() {
    let port = port();
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || {
            Nodes::meet(with_secret(place(0, 2, port, 60.0), "a long secret 1")).map(|mut nodes| nodes.all_gather("0"))
        });
        let other = error(with_secret(place(1, 2, port, 60.0), "a long secret 2"));
        assert!(other.contains("secrets of the two nodes are not the same"), "{other}");
        let without = error(place(1, 2, port, 60.0));
        assert!(without.contains("node 0 asks for a join secret"), "{without}");
        // A stranger that contradicts the job does not end it either.
        let contradicting = with_secret(NodePlace { nnodes: 3, ..place(1, 2, port, 60.0) }, "a long secret 3");
        assert!(!error(contradicting).is_empty());
        let one = scope.spawn(move || {
            Nodes::meet(with_secret(place(1, 2, port, 60.0), "a long secret 1")).map(|mut nodes| nodes.all_gather("1"))
        });
        for node in [zero, one] {
            assert_eq!(node.join().unwrap().unwrap().unwrap(), ["0", "1"]);
        }
    });
}

#[test]
fn a_node_with_a_secret_does_not_trust_a_host_without_it() {
    let port = port();
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || Nodes::meet(place(0, 2, port, 3.0)).is_ok());
        let text = error(with_secret(place(1, 2, port, 60.0), "a long secret 1"));
        assert!(text.contains("node 0 was started without a join secret"), "{text}");
        assert!(zero.join().unwrap(), "without a secret whoever comes is a node");
    });
}

#[test]
fn a_proof_heard_before_is_no_proof() {
    let port = port();
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || error(with_secret(place(0, 2, port, 3.0), "a long secret 1")));
        let mut proofs = Vec::new();
        for _ in 0..2 {
            let mut stream = knock(port);
            write_frame(&mut stream, &hello(VERSION, "night", 1)).unwrap();
            let heard = hear(&stream, &soon(), WORD_BYTES).unwrap();
            let Word::Challenge { nonce, proof } = heard else { panic!("{heard:?}") };
            // Node 0's own proof, sent back, does not prove the guest.
            write_frame(&mut stream, &Word::Proof { proof: proof.clone() }).unwrap();
            let told = hear(&stream, &soon(), WORD_BYTES).unwrap();
            assert!(matches!(told, Word::Refused { .. }), "{told:?}");
            proofs.push((nonce, proof));
        }
        assert_ne!(proofs[0], proofs[1], "each meeting has numbers that no other has");
        assert!(zero.join().unwrap().contains("node 1 did not come"));
    });
}
