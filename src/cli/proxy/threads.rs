//! How many threads move traffic (reference, dataplane §10.1).

use anyhow::{Context, bail};

/// Flags and environment about threads.
#[derive(Debug, clap::Args)]
pub(super) struct ThreadArgs {
    /// Worker threads: a number, a percentage of the CPUs such as `25%`, or 0 for all CPUs. Default: the larger of limit and request when
    /// ZTUNNEL_RESOURCE_CPU_LIMIT is set, else the largest of 2, 25 % of the CPUs and the request.
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS")]
    worker_threads: Option<String>,
    /// CPUs that there are. Default: those that the process may run on.
    #[arg(long, env = "ZTUNNEL_CPU_LIMIT")]
    cpu_limit: Option<String>,
    /// The CPU limit of the proxy's container, such as `2` or `500m`, which counts as 1.
    #[arg(long, env = "ZTUNNEL_RESOURCE_CPU_LIMIT")]
    resource_cpu_limit: Option<String>,
    /// The CPU request of the proxy's container, in the same form.
    #[arg(long, env = "ZTUNNEL_RESOURCE_CPU_REQUEST")]
    resource_cpu_request: Option<String>,
}

impl ThreadArgs {
    /// How many there shall be, at least 1.
    ///
    /// # Errors
    /// When a variable is neither empty nor what it should be; the error names it.
    pub(super) fn count(&self) -> anyhow::Result<usize> {
        self.count_of(std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
    }

    fn count_of(&self, cpus: usize) -> anyhow::Result<usize> {
        let quantity = |text: &Option<String>, name: &'static str| whole_cpus(text.as_deref()).context(name);
        let cpus = quantity(&self.cpu_limit, "ZTUNNEL_CPU_LIMIT")?.unwrap_or(cpus);
        let share = |percent: usize| cpus.saturating_mul(percent).div_ceil(100).max(1);
        if let Some(text) = self.worker_threads.as_deref().filter(|text| !text.is_empty()) {
            return asked(text, cpus, share).context("ZTUNNEL_WORKER_THREADS");
        }
        let limit = quantity(&self.resource_cpu_limit, "ZTUNNEL_RESOURCE_CPU_LIMIT")?;
        let request = quantity(&self.resource_cpu_request, "ZTUNNEL_RESOURCE_CPU_REQUEST")?.unwrap_or(0);
        Ok(limit.unwrap_or_else(|| share(25).max(2)).max(request))
    }
}

/// A number, `P%` of the CPUs rounded up, 0 for all.
fn asked(text: &str, cpus: usize, share: impl Fn(usize) -> usize) -> anyhow::Result<usize> {
    let asked = match text.strip_suffix('%') {
        Some(percent) => share(percent.parse::<usize>().ok().filter(|percent| (1..=100).contains(percent)).context("expected 1% to 100%")?),
        None => text.parse::<usize>().context("expected a number of threads or a percentage such as 25%")?,
    };
    Ok(if asked == 0 { cpus } else { asked })
}

/// A quantity of Kubernetes, rounded up; nothing and 0 are none.
fn whole_cpus(text: Option<&str>) -> anyhow::Result<Option<usize>> {
    let Some(text) = text.map(str::trim).filter(|text| !text.is_empty()) else { return Ok(None) };
    let cpus = match text.strip_suffix('m') {
        Some(thousandths) => thousandths.parse::<usize>().ok().map(|thousandths| thousandths.div_ceil(1000)),
        None => {
            let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
            let more = fraction.parse::<u32>().ok().map(|fraction| usize::from(fraction > 0));
            whole.parse::<usize>().ok().zip(more).and_then(|(whole, more)| whole.checked_add(more))
        }
    };
    match cpus {
        Some(0) => Ok(None),
        Some(cpus) => Ok(Some(cpus)),
        None => bail!("{text:?} is no quantity of CPUs: expected a number such as 2, 1.5 or 500m"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn count(cpus: usize, asked: &str, [cpu_limit, limit, request]: [&str; 3]) -> anyhow::Result<usize> {
        let said = |text: &str| Some(text.to_owned());
        ThreadArgs { worker_threads: said(asked), cpu_limit: said(cpu_limit), resource_cpu_limit: said(limit), resource_cpu_request: said(request) }
            .count_of(cpus)
    }

    #[test]
    fn worker_threads_take_a_number_a_share_or_all() {
        for (cpus, asked, cpu_limit, threads) in
            [(8, "3", "", 3), (8, "0", "", 8), (6, "25%", "", 2), (64, "0", "4", 4), (64, "50%", "3", 2), (8, "0", "2500m", 3)]
        {
            assert_eq!(count(cpus, asked, [cpu_limit, "1", "9"]).unwrap(), threads, "{asked} of {cpus} or {cpu_limit:?}");
        }
        for asked in ["101%", "0%", "many", "-1"] {
            assert!(format!("{:#}", count(6, asked, [""; 3]).unwrap_err()).starts_with("ZTUNNEL_WORKER_THREADS"), "{asked}");
        }
    }

    #[test]
    fn by_default_threads_follow_the_resources_of_the_container() {
        for (cpus, resources, threads) in [
            (4, ["", "", ""], 2),
            (64, ["", "", ""], 16),
            (64, ["8", "", ""], 2),
            (64, ["", "", "20"], 20),
            (64, ["", "", "200m"], 16),
            (64, ["", "1500m", ""], 2),
            (64, ["", "500m", ""], 1),
            (64, ["", "2.5", ""], 3),
            (64, ["", "2", "3000m"], 3),
            (64, ["", "0", "0"], 16),
        ] {
            assert_eq!(count(cpus, "", resources).unwrap(), threads, "{resources:?} of {cpus}");
        }
        for (resources, name) in
            [(["x", "", ""], "ZTUNNEL_CPU_LIMIT"), (["", "1k", ""], "ZTUNNEL_RESOURCE_CPU_LIMIT"), (["", "", "-1"], "ZTUNNEL_RESOURCE_CPU_REQUEST")]
        {
            assert!(format!("{:#}", count(4, "", resources).unwrap_err()).starts_with(name));
        }
    }
}
