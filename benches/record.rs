//! The TLS record layer in place: sealing and opening full records and those of a small request.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use culvert::forward::record::{Content, Direction, MAX_PLAINTEXT, Opener, Sealer, Suite};

/// Records of one read or write of the core.
const BATCH: usize = 16;

fn direction(suite: Suite) -> Direction {
    Direction { suite, secret: vec![7; suite.secret_length()], sequence: 0 }
}

fn records(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("record");
    for (name, suite) in [("AES-128-GCM", Suite::Aes128Gcm), ("AES-256-GCM", Suite::Aes256Gcm)] {
        for plaintext in [1 << 10, MAX_PLAINTEXT] {
            let length = Sealer::sealed_length(plaintext);
            group.throughput(Throughput::Bytes(plaintext as u64));
            group.bench_function(BenchmarkId::new(format!("seal, {name}"), plaintext), |bencher| {
                let mut sealer = Sealer::new(direction(suite)).unwrap();
                let mut slots = vec![1; length * BATCH];
                let mut turn = 0;
                bencher.iter(|| {
                    turn = (turn + 1) % BATCH;
                    sealer.seal(&mut slots[turn * length..][..length], Content::ApplicationData).unwrap();
                });
                black_box(&slots);
            });
            group.bench_function(BenchmarkId::new(format!("open, {name}"), plaintext), |bencher| {
                // A record opens once. Each batch is sealed first, which is not counted.
                bencher.iter_custom(|iterations| {
                    let (mut sealer, mut opener) = (Sealer::new(direction(suite)).unwrap(), Opener::new(direction(suite)).unwrap());
                    let mut slots = vec![1; length * BATCH];
                    let mut spent = Duration::ZERO;
                    let mut left = usize::try_from(iterations).unwrap();
                    while left > 0 {
                        let count = left.min(BATCH);
                        let wire = &mut slots[..count * length];
                        wire.chunks_exact_mut(length).for_each(|slot| sealer.seal(slot, Content::ApplicationData).unwrap());
                        let since = Instant::now();
                        let mut at = 0;
                        while let Some(opened) = opener.open(wire, at).unwrap() {
                            at = black_box(opened).end;
                        }
                        spent += since.elapsed();
                        assert_eq!(at, wire.len());
                        left -= count;
                    }
                    spent
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, records);
criterion_main!(benches);
