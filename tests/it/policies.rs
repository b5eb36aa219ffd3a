//! Reads of each policy of the page cache, against theory and against the optimum.

use crate::simulate::{Grain, Trace, Walk};
use cache::PolicyKind;

const SHARES: [usize; 5] = [5, 17, 35, 50, 75];
const WALK: Walk = Walk { world_size: 3, batch: 4, ahead: 2 };

#[test]
fn optimum_of_a_trace_worked_out_by_hand() {
    // Two epochs over three entries with room for one: 0 1 2 | 2 0 1. Only 2 is read again at once.
    let trace = Trace::of(vec![0, 1, 2, 2, 0, 1], 3, 1);
    assert_eq!(trace.optimum(1), 2.0 / 3.0);
    assert_eq!((trace.optimum(0), trace.optimum(3)), (1.0, 0.0));
}

#[test]
fn pin_hits_the_share_cached() {
    let trace = Trace::shuffled(12_000, 1, 3, 1);
    for share in SHARES {
        let got = trace.walk(PolicyKind::Pin, 120 * share, Grain::Chunk, WALK).hit_rate;
        println!("pin {share} % cached: {:.2} %", 100.0 * got);
        assert!((got - share as f64 / 100.0).abs() < 0.01, "{share} %: {got}");
    }
}

#[test]
fn lru_hits_what_theory_says() {
    let trace = Trace::shuffled(12_000, 1, 4, 2);
    for share in SHARES {
        let f = share as f64 / 100.0;
        let theory = f + (1.0 - f) * (1.0 - f).ln();
        let got = trace.walk(PolicyKind::Lru, 120 * share, Grain::Chunk, WALK).hit_rate;
        println!("lru {share} % cached: {:.2} %, theory {:.2} %", 100.0 * got, 100.0 * theory);
        assert!((got - theory).abs() < 0.02, "{share} %: {got}, {theory}");
    }
}

/// Between two reads of an entry lies one turn of an epoch, at which no more than the share cached can be there: no
/// policy passes it, and looking ahead reaches it.
#[test]
fn next_use_hits_the_share_cached_where_an_epoch_reads_each_entry_once() {
    let trace = Trace::shuffled(12_000, 1, 3, 5);
    for share in SHARES {
        let got = trace.walk(PolicyKind::NextUse, 120 * share, Grain::Chunk, WALK).hit_rate;
        println!("next_use {share} % cached: {:.2} %", 100.0 * got);
        assert!((got - share as f64 / 100.0).abs() < 0.01, "{share} %: {got}");
    }
}

#[test]
fn next_use_stays_within_a_tenth_of_the_optimum() {
    for (samples_per_chunk, share) in [(16, 25), (16, 50), (40, 10), (40, 35), (4, 17), (4, 75)] {
        let trace = Trace::shuffled(4000, samples_per_chunk, 4, 3);
        let capacity = 40 * share;
        let got = trace.walk(PolicyKind::NextUse, capacity, Grain::Chunk, WALK).per_chunk_and_epoch;
        let least = trace.optimum(capacity);
        println!("{samples_per_chunk} per chunk, {share} % cached: next_use {got:.3}, optimum {least:.3}");
        assert!(got <= 1.1 * least, "{samples_per_chunk} per chunk, {share} %: {got}, {least}");
    }
}

#[test]
fn sample_granularity_reads_a_chunk_little_more_than_twice() {
    let trace = Trace::shuffled(4000, 16, 4, 4);
    let reads = |policy, grain| trace.walk(policy, 1000, grain, WALK).per_chunk_and_epoch;
    let lru = reads(PolicyKind::Lru, Grain::Chunk);
    let chunks = reads(PolicyKind::NextUse, Grain::Chunk);
    let samples = reads(PolicyKind::NextUse, Grain::Sample);
    println!(
        "16 per chunk, a quarter cached, reads per chunk and epoch: lru {lru:.2}, next_use {chunks:.2}, by sample {samples:.2}"
    );
    assert!((lru - 12.0).abs() < 0.5, "{lru}");
    assert!(samples <= 2.3, "{samples}");
    assert!(chunks < lru);
}
