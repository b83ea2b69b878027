//! The bench inside its namespaces: builds a stand for every contestant, takes figure after figure, and tells each as it is done.

use std::path::PathBuf;

use super::figure::Figure;
use super::memory;
use super::message::Message;
use super::options::{Contestant, Options};
use super::report::{Missing, Outcome, Taken};
use super::stand::{Site, Stand, Wanted};
use super::trial::{self, Sample};
use crate::lab::Error;
use crate::lab::directory::{Base, Directory};
use crate::lab::supervisor::{signalled, tell, watch_leash, within};
use crate::sys::limits::raise_nofile_towards;

/// The whole life of a bench inside, as `culvert lab supervise-bench`: measures what the file in the directory of `name` below `base`
/// says, and tells it as lines of JSON on standard output. It ends early on SIGTERM, and when standard input ends.
/// Must be called with a single thread. Returns the exit code of the process (this function returns in three processes).
pub fn supervise(base: &Base, name: &str, program: PathBuf) -> i32 {
    within(base, name, true, |directory| async move {
        let signalled = signalled()?;
        let let_go = watch_leash()?;
        tell(&Message::Entered);
        tokio::select! {
            outcome = measure(program, directory) => outcome,
            // The end of the process namespace ends everything else.
            () = signalled => Ok(()),
            _ = let_go => Ok(()),
        }
    })
}

async fn measure(program: PathBuf, directory: Directory) -> Result<(), Error> {
    let text = std::fs::read_to_string(directory.definition()).map_err(Error::failed("cannot read what to measure"))?;
    let options: Options = serde_json::from_str(&text).map_err(Error::failed("cannot read what to measure"))?;
    let wanted = memory::open_files(&options);
    let files = raise_nofile_towards(wanted).map_err(Error::failed("cannot raise the limit of open files"))?;
    let site = Site::prepare(&program, &directory)?;
    let mut bench = Bench { site, options, files, stands: Vec::new() };
    let outcome = bench.run().await;
    for stand in &mut bench.stands {
        stand.stop().await;
    }
    outcome?;
    tell(&Message::Done);
    Ok(())
}

#[derive(Debug)]
struct Bench {
    site: Site,
    options: Options,
    /// How many files each process may open.
    files: u64,
    /// One for each contestant, in their order.
    stands: Vec<Stand>,
}

impl Bench {
    async fn run(&mut self) -> Result<(), Error> {
        for contestant in &self.options.contestants {
            tell(&Message::Step(format!("starting {}", contestant.name)));
            let stand = Stand::build(&self.site, Wanted { contestant, options: &self.options, extra: &[] }).await?;
            self.stands.push(stand);
        }
        let congestion_control = self.stands.first().map(Stand::congestion_control).unwrap_or_default();
        tell(&Message::Began { congestion_control });
        for figure in &self.options.figures {
            let outcome = if figure.is_memory() { self.memory(*figure).await } else { self.interleaved(*figure).await };
            tell(&Message::Took(Box::new(outcome)));
        }
        Ok(())
    }

    /// A B B A …: each round in the opposite order of the one before, so that what changes slowly meets all alike. The first is dropped.
    async fn interleaved(&self, figure: Figure) -> Outcome {
        let contestants = &self.options.contestants;
        let mut taken: Vec<Taken> = contestants.iter().map(|contestant| Taken::begin(figure, contestant)).collect();
        for round in 0..=self.options.rounds {
            let mut order: Vec<usize> = (0..contestants.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for index in order {
                let (Some(taken), Some(stand)) = (taken.get_mut(index), self.stands.get(index)) else { continue };
                if taken.missing.is_some() {
                    continue;
                }
                tell(&Message::Step(format!("{}: {}, round {round} of {}", figure.name(), taken.contestant, self.options.rounds)));
                match trial::take(figure, stand, self.options.trial).await {
                    Ok(_) if round == 0 => {}
                    Ok(sample) => taken.add(sample),
                    Err(sentence) => taken.fail(sentence),
                }
            }
        }
        Outcome { figure, taken }
    }

    /// Fresh proxies for each; memory does not depend on what else the machine does, so once is enough.
    async fn memory(&self, figure: Figure) -> Outcome {
        let mut all = Vec::new();
        for contestant in &self.options.contestants {
            let mut taken = Taken::begin(figure, contestant);
            if taken.missing.is_none() {
                tell(&Message::Step(format!("{}: {}", figure.name(), contestant.name)));
                match self.memory_of(figure, contestant).await {
                    Ok(sample) => taken.add(sample),
                    Err(sentence) => taken.fail(sentence),
                }
            }
            all.push(taken);
        }
        Outcome { figure, taken: all }
    }

    async fn memory_of(&self, figure: Figure, contestant: &Contestant) -> Result<Sample, String> {
        let needed = memory::open_files_of(figure, contestant, &self.options);
        if self.files < needed {
            return Err(format!("a process needs {needed} open files and may have {} (`ulimit -Hn`): say a smaller --streams", self.files));
        }
        memory::take(figure, &self.site, contestant, &self.options).await
    }
}

impl Taken {
    fn begin(figure: Figure, contestant: &Contestant) -> Self {
        let missing = figure.does_not_apply(&contestant.kind).map(|why| Missing::DoesNotApply(why.to_owned()));
        Self { contestant: contestant.name.clone(), missing, ..Self::default() }
    }

    fn add(&mut self, sample: Sample) {
        for (quantity, value) in sample.values {
            self.values.entry(quantity).or_default().push(value);
        }
        self.stolen_percent = self.stolen_percent.max(sample.stolen_percent);
    }

    /// What was taken before is not shown either: a figure is whole or missing.
    fn fail(&mut self, sentence: String) {
        self.values.clear();
        self.missing = Some(Missing::Failed(sentence));
    }
}
