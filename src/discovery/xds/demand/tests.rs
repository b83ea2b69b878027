#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

const LIMIT: Duration = Duration::from_secs(5);

fn pod(name: &str) -> LocalName {
    LocalName { name: name.into(), namespace: "shop".into(), service_account: "default".into() }
}

fn ask(demand: &Demand, name: &str) -> tokio::task::JoinHandle<Result<(), Unanswered>> {
    ask_of("client", demand, name)
}

fn ask_of(of: &str, demand: &Demand, name: &str) -> tokio::task::JoinHandle<Result<(), Unanswered>> {
    let (demand, of, name) = (demand.clone(), pod(of), Text::from(name));
    tokio::spawn(async move { demand.ask(&of, name).await })
}

/// Until every task waits for something.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

fn names(list: &[&str]) -> HashSet<Text> {
    list.iter().copied().map(Text::from).collect()
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().copied().map(str::to_owned).collect()
}

#[tokio::test(start_paused = true)]
async fn whoever_asks_waits_for_the_answer_found_or_not() {
    let demand = Demand::new(LIMIT);
    assert_eq!(demand.begin(), Vec::<Text>::new());
    let (one, two, three) = (ask(&demand, "/10.0.0.1"), ask(&demand, "/10.0.0.1"), ask(&demand, "/10.0.0.2"));
    tokio::task::yield_now().await;
    let news = demand.news().await;
    assert_eq!(news, News { unsubscribe: names(&[]), subscribe: names(&["/10.0.0.1", "/10.0.0.2"]) }, "each name once");
    demand.answered(&strings(&["uid", "/10.0.0.1"]), &[]);
    assert_eq!((one.await.unwrap(), two.await.unwrap()), (Ok(()), Ok(())));
    assert!(!three.is_finished());
    demand.answered(&[], &strings(&["/10.0.0.2"]));
    assert_eq!(three.await.unwrap(), Ok(()));
    assert_eq!(demand.ask(&pod("client"), "/10.0.0.2".into()).await, Ok(()), "known for a while");
    assert!(timeout(Duration::from_secs(1), demand.news()).await.is_err(), "and not asked again");
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_longer_than_the_limit_and_the_name_is_given_up() {
    let demand = Demand::new(LIMIT);
    demand.begin();
    let begun = Instant::now();
    let error = demand.ask(&pod("client"), "/10.0.0.1".into()).await.unwrap_err();
    assert_eq!(begun.elapsed(), LIMIT);
    assert_eq!(error.to_string(), "the control plane did not say within 5s what /10.0.0.1 is");
    assert!(demand.is_empty());
    assert!(timeout(Duration::from_secs(1), demand.news()).await.is_err(), "asked and given up between two looks: never told");
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_given_up_after_it_was_asked_is_unsubscribed() {
    let demand = Demand::new(LIMIT);
    demand.begin();
    let asked = ask(&demand, "a/b");
    assert_eq!(demand.news().await.subscribe, names(&["a/b"]));
    asked.await.unwrap().unwrap_err();
    assert_eq!(demand.news().await, News { unsubscribe: names(&["a/b"]), subscribe: names(&[]) });
}

#[tokio::test(start_paused = true)]
async fn a_stale_answer_is_asked_for_anew_by_giving_the_name_up_first() {
    let demand = Demand::new(LIMIT);
    demand.begin();
    let asked = ask(&demand, "a/b");
    demand.news().await;
    demand.answered(&[], &strings(&["a/b"]));
    asked.await.unwrap().unwrap();
    tokio::time::advance(FRESH).await;
    let again = ask(&demand, "a/b");
    assert_eq!(demand.news().await, News { unsubscribe: names(&["a/b"]), subscribe: names(&["a/b"]) });
    demand.answered(&strings(&["a/b"]), &[]);
    again.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn names_that_somebody_waits_for_go_with_the_next_stream() {
    let demand = Demand::new(LIMIT);
    let waiting = ask(&demand, "a/b");
    tokio::task::yield_now().await;
    assert_eq!(demand.begin(), [Text::from("a/b")], "asked while there was no stream");
    assert!(timeout(Duration::from_secs(1), demand.news()).await.is_err(), "and not told twice");
    demand.end();
    assert_eq!(demand.begin(), [Text::from("a/b")], "and again");
    demand.answered(&strings(&["a/b"]), &[]);
    waiting.await.unwrap().unwrap();
    demand.end();
    assert_eq!(demand.begin(), Vec::<Text>::new());
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_calls_every_address_fills_no_memory() {
    let demand = Demand::new(LIMIT);
    demand.begin();
    let pods = MAX_WAITING / MAX_WAITING_OF_POD;
    let waiting: Vec<_> = (0..MAX_WAITING).map(|index| ask_of(&format!("p{}", index % pods), &demand, &format!("/{index}"))).collect();
    settle().await;
    assert_eq!(demand.ask(&pod("late"), "/more".into()).await, Err(Unanswered::TooMany { name: "/more".into() }));
    // Connections that end give their places back.
    waiting.into_iter().for_each(|task| task.abort());
    settle().await;
    let asked = ask(&demand, "/more");
    settle().await;
    assert!(!asked.is_finished());
    assert_eq!(demand.names().waiting, 1);
    assert_eq!(demand.names().pods.len(), 1);
    for index in 0..MAX_MISSING + 500 {
        let asked = ask(&demand, &format!("/m{index}"));
        tokio::task::yield_now().await;
        demand.answered(&[], &[format!("/m{index}")]);
        asked.await.unwrap().unwrap();
    }
    assert_eq!(demand.names().entries.len(), MAX_MISSING + 1);
    assert_eq!(demand.names().missing.len(), MAX_MISSING);
}

#[tokio::test(start_paused = true)]
async fn one_pod_has_a_quarter_of_the_places_and_is_told_that_they_are_taken_by_itself() {
    let demand = Demand::new(LIMIT);
    demand.begin();
    let greedy: Vec<_> = (0..MAX_WAITING_OF_POD).map(|index| ask_of("greedy", &demand, &format!("/{index}"))).collect();
    let again = ask_of("greedy", &demand, "/0");
    settle().await;
    let begun = Instant::now();
    let refused = demand.ask(&pod("greedy"), "/more".into()).await.unwrap_err();
    assert_eq!((refused.clone(), begun.elapsed()), (Unanswered::Share { pod: Box::new(pod("greedy")), name: "/more".into() }, Duration::ZERO));
    let text = "256 names that shop/greedy (service account default) asks for wait for the control plane, as many as one pod may, so /more was not asked for";
    assert_eq!(refused.to_string(), text);
    // What a neighbour asks for costs it nothing, be it the same or not; what both wait for stays the neighbour's when one of them leaves.
    let neighbour = [ask_of("modest", &demand, "/0"), ask_of("modest", &demand, "/more")];
    settle().await;
    assert!(!again.is_finished() && !neighbour.iter().any(tokio::task::JoinHandle::is_finished));
    demand.answered(&[], &strings(&["/1"]));
    settle().await;
    let next = ask_of("greedy", &demand, "/more");
    settle().await;
    assert!(!next.is_finished(), "an answer makes room");
    greedy.into_iter().chain([again, next]).for_each(|task| task.abort());
    settle().await;
    assert_eq!(demand.names().pods.keys().cloned().collect::<Vec<_>>(), [pod("modest")]);
    demand.answered(&strings(&["/0", "/more"]), &[]);
    for connection in neighbour {
        connection.await.unwrap().unwrap();
    }
    assert!(demand.names().pods.is_empty());
}
