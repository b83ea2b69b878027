//! Walking through HTTP/2 frames as they come out of records: bulk, where only heads are looked at, and frames of a few octets.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use culvert::forward::record::MAX_PLAINTEXT;
use culvert::hbone::framing::{Step, Walker};

/// Sixteen records' worth of DATA frames with so much payload each.
fn data(payload: usize) -> Vec<u8> {
    let length = u32::try_from(payload).unwrap().to_be_bytes();
    let head = [length[1], length[2], length[3], 0, 0, 0, 0, 0, 1];
    let frame = [&head[..], &vec![7; payload]].concat();
    frame.repeat((16 * MAX_PLAINTEXT).div_ceil(frame.len()))
}

fn walk(walker: &mut Walker, plaintext: &[u8]) -> usize {
    let (mut at, mut payload) = (0, 0);
    loop {
        match walker.step(plaintext, &mut at, plaintext.len()) {
            Step::Head(head) => drop(black_box(head)),
            Step::Payload { range, .. } => payload += range.len(),
            Step::Empty => return payload,
        }
    }
}

fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("walk");
    // Our own frames, which fill a record; those of a peer with frames of 16 KiB, which never end with one; requests; single octets.
    for payload in [MAX_PLAINTEXT - 9, MAX_PLAINTEXT, 100, 1] {
        let wire = data(payload);
        group.throughput(Throughput::Elements((wire.len() / (payload + 9)) as u64));
        group.bench_function(BenchmarkId::new("frames with payload of", payload), |bencher| {
            let mut walker = Walker::default();
            bencher.iter(|| wire.chunks(MAX_PLAINTEXT).map(|record| walk(&mut walker, record)).sum::<usize>());
        });
    }
    group.finish();
}

criterion_group!(benches, frames);
criterion_main!(benches);
