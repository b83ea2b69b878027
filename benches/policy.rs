//! What a connection pays for 10,000 policies of 10 rules each (design §5: ≤ 1 µs when its facts were seen before, well under
//! 100 µs when not), what an edit of them costs, and what of that the first connection afterwards has to wait for: nothing.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use culvert::discovery::{Edit, Mesh, Publisher};
use culvert::model::{HealthStatus, Profile, SpiffeId, Text, Workload};
use culvert::policy::{Action, Authorization, Clause, CompiledPolicy, Facts, Match, PolicySet, Rule, Scope, ServiceAccountMatch, StringMatch};

const POLICIES: u32 = 10_000;
const RULES: u32 = 10;

fn exact(text: String) -> Vec<StringMatch> {
    vec![StringMatch::Exact(text.into())]
}

/// One rule of the kinds that people write, turn by turn.
fn rule(policy: u32, rule: u32) -> Rule {
    let id = policy * RULES + rule;
    let ports = vec![80, 443, 8080];
    let net = format!("10.{}.{}.0/24", id / 256 % 256, id % 256).parse().unwrap();
    let from = match rule % 6 {
        0 | 1 => Match { principals: exact(format!("cluster.local/ns/ns-{policy}/sa/client-{id}")), ..Match::default() },
        2 => Match {
            service_accounts: vec![ServiceAccountMatch { namespace: format!("ns-{policy}").into(), service_account: format!("sa-{id}").into() }],
            ..Match::default()
        },
        3 => Match { principals: vec![StringMatch::Prefix(format!("cluster.local/ns/team-{id}-").into())], ..Match::default() },
        4 => Match { source_ips: vec![net], ..Match::default() },
        _ => Match { namespaces: exact(format!("ns-{id}")), not_principals: vec![StringMatch::Suffix("/sa/batch".into())], ..Match::default() },
    };
    let to = Match { destination_ports: ports, ..Match::default() };
    Rule { clauses: vec![Clause { matches: vec![from] }, Clause { matches: vec![to] }] }
}

fn policies(scope: Scope) -> PolicySet {
    let mut set = PolicySet::new();
    for policy in 0..POLICIES {
        let action = if policy % 4 == 0 { Action::Deny } else { Action::Allow };
        set.insert(Authorization::new(format!("p{policy}"), "root", scope, action, (0..RULES).map(|at| rule(policy, at)).collect()));
    }
    set
}

/// The worst there is: nothing to file a rule under, so that every rule is evaluated.
fn negations_only() -> PolicySet {
    let mut set = PolicySet::new();
    for policy in 0..POLICIES {
        let not = |at: u32| Match { not_destination_ports: vec![8080], not_namespaces: exact(format!("ns-{policy}-{at}")), ..Match::default() };
        let rules = (0..RULES).map(|at| Rule { clauses: vec![Clause { matches: vec![not(at)] }] }).collect();
        set.insert(Authorization::new(format!("p{policy}"), "root", Scope::Global, Action::Deny, rules));
    }
    set
}

/// A peer that the last ALLOW policy lets in.
fn permitted() -> Facts {
    let id = (POLICIES - 1) * RULES;
    Facts {
        identity: Some(SpiffeId::new("cluster.local", &format!("ns-{}", POLICIES - 1), &format!("client-{id}")).unwrap()),
        source_ip: IpAddr::V4(Ipv4Addr::new(192, 168, 0, 1)),
        destination_ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
        destination_port: 8080,
    }
}

/// A new source address each time, so that nothing is remembered.
fn next(facts: &mut Facts, counter: &mut u32) {
    *counter = counter.wrapping_add(1);
    facts.source_ip = IpAddr::V4(Ipv4Addr::from(0xc000_0000 | (*counter & 0x0fff_ffff)));
}

fn miss(criterion: &mut Criterion, name: &str, compiled: &CompiledPolicy, facts: &Facts) {
    let (mut facts, mut counter) = (facts.clone(), 0);
    criterion.bench_function(name, |bench| {
        bench.iter(|| {
            next(&mut facts, &mut counter);
            black_box(compiled.permit(black_box(&facts)).is_ok())
        });
    });
}

fn decide(criterion: &mut Criterion) {
    let set = policies(Scope::Global);
    let compiled = set.compile("default", &[]);
    let facts = permitted();
    assert!(compiled.permit(&facts).is_ok());
    let stranger = Facts { identity: Some(SpiffeId::new("cluster.local", "nowhere", "nobody").unwrap()), ..facts.clone() };
    assert!(compiled.permit(&stranger).is_err());
    criterion.bench_function("10000x10/hit", |bench| bench.iter(|| black_box(compiled.permit(black_box(&facts)).is_ok())));
    miss(criterion, "10000x10/miss, permitted", &compiled, &facts);
    miss(criterion, "10000x10/miss, denied", &compiled, &stranger);
    miss(criterion, "10000x10/miss, plaintext", &compiled, &Facts { identity: None, ..facts.clone() });
    criterion.bench_function("10000x10/compile again", |bench| bench.iter(|| black_box(set.compile(black_box("default"), &[]))));

    let one = PolicySet::new().compile("default", &[]);
    criterion.bench_function("no policies", |bench| bench.iter(|| black_box(one.permit(black_box(&facts)).is_ok())));

    let negated = negations_only().compile("default", &[]);
    let mut other = facts.clone();
    let mut counter = 0;
    criterion.bench_function("10000x10 negations only/miss", |bench| {
        bench.iter(|| {
            counter += 1;
            other.identity = Some(SpiffeId::new("cluster.local", &format!("n{counter}"), "x").unwrap());
            black_box(negated.permit(black_box(&other)).is_ok())
        });
    });
}

fn edit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("edit one of 10000x10");
    group.sample_size(10);
    let change = |mut set: PolicySet, scope| {
        set.insert(Authorization::new("p5", "root", scope, Action::Deny, vec![rule(0, 0)]));
        set
    };
    for (name, scope) in [("global", Scope::Global), ("selector", Scope::WorkloadSelector)] {
        let set = policies(scope);
        let names = [Text::from("root/p5"), Text::from("root/p6")];
        let _held = set.compile("default", &names);
        group.bench_function(name, |bench| {
            bench.iter_batched(|| set.clone(), |set| change(set, scope).compile("default", &names), BatchSize::PerIteration)
        });
    }
    group.finish();
}

fn pod(number: u32) -> Workload {
    let profile = Profile { namespace: format!("team-{}", number % 50).into(), ..Profile::default() };
    Workload {
        uid: format!("Kubernetes//Pod/team/{number}").into(),
        name: number.to_string().as_str().into(),
        addresses: IpAddr::V4(Ipv4Addr::from_bits((10 << 24) + number)).into(),
        node: "here".into(),
        hostname: Text::default(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: Arc::new(profile),
    }
}

/// The whole way of a new connection from the mesh to its verdict, in each of the 50 namespaces of 250 pods, right after a change of a policy.
fn first_connections(mesh: &Mesh, facts: &Facts) -> usize {
    let permits = |number: &u32| {
        let world = mesh.current();
        let workload = world.snapshot.workload(&format!("Kubernetes//Pod/team/{number}")).unwrap();
        world.policies.compile(&workload.profile.namespace, &workload.profile.authorization_policies).permit(facts).is_ok()
    };
    (0..50).filter(permits).count()
}

fn change(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("change one of 10000x10 global");
    group.sample_size(10);
    let (mut publisher, mesh) = Publisher::new(Some("here".into()));
    let mut edits: Vec<Edit> = policies(Scope::Global).iter().map(|policy| Edit::Policy(Authorization::clone(policy))).collect();
    edits.extend((0..250).map(|number| Edit::Workload(pod(number))));
    publisher.publish(edits);
    let mut turn = 0;
    let mut next = move || {
        turn += 1;
        Edit::Policy(Authorization::new("p5", "root", Scope::Global, Action::Deny, vec![rule(turn, 0)]))
    };
    group.bench_function("publish", |bench| bench.iter_batched(&mut next, |edit| publisher.publish([edit]), BatchSize::PerIteration));
    let facts = permitted();
    group.bench_function("first connections of 50 namespaces", |bench| {
        bench.iter_batched(|| publisher.publish([next()]), |_| assert_eq!(first_connections(&mesh, &facts), 50), BatchSize::PerIteration)
    });
    group.finish();
}

criterion_group!(benches, decide, edit, change);
criterion_main!(benches);
