//! Figures of the process and of its runtime, read when somebody scrapes.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use tokio::runtime::RuntimeMetrics;

/// `process_open_fds` and `process_max_fds`, left out where /proc cannot be read.
#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            // The directory handle that counts them is one of them.
            gauge(&mut encoder, "process_open_fds", "Number of open file descriptors", entries.count().saturating_sub(1))?;
        }
        if let Some(limit) = std::fs::read_to_string("/proc/self/limits").ok().as_deref().and_then(soft_limit) {
            gauge(&mut encoder, "process_max_fds", "Maximum number of file descriptors", limit)?;
        }
        Ok(())
    }
}

/// The soft limit in the line `Max open files  <soft>  <hard>  files`.
fn soft_limit(limits: &str) -> Option<usize> {
    limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?.parse().ok()
}

/// The `tokio_*` families of one runtime.
#[derive(Debug)]
pub(super) struct RuntimeCollector {
    metrics: RuntimeMetrics,
}

impl RuntimeCollector {
    pub(super) fn new(runtime: &tokio::runtime::Handle) -> Self {
        Self { metrics: runtime.metrics() }
    }
}

impl Collector for RuntimeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let metrics = &self.metrics;
        let workers = metrics.num_workers();
        gauge(&mut encoder, "tokio_num_workers", "Number of worker threads (unstable)", workers)?;
        gauge(&mut encoder, "tokio_global_queue_depth", "Tasks in the queue that all workers share (unstable)", metrics.global_queue_depth())?;
        gauge(&mut encoder, "tokio_num_alive_tasks", "Tasks that have not ended (unstable)", metrics.num_alive_tasks())?;
        let name = "tokio_worker_total_busy_duration_seconds";
        let mut family = encoder.encode_descriptor(name, "Time that a worker was busy (unstable)", None, MetricType::Counter)?;
        for worker in 0..workers {
            let busy = metrics.worker_total_busy_duration(worker).as_secs_f64();
            family.encode_family(&[("worker", worker)])?.encode_counter::<NoLabelSet, _, u64>(&busy, None)?;
        }
        let name = "tokio_worker_park_count";
        let mut family = encoder.encode_descriptor(name, "Times that a worker waited (unstable)", None, MetricType::Counter)?;
        for worker in 0..workers {
            family.encode_family(&[("worker", worker)])?.encode_counter::<NoLabelSet, _, u64>(&metrics.worker_park_count(worker), None)?;
        }
        let name = "tokio_worker_park_unpark_count";
        let mut family = encoder.encode_descriptor(name, "Times that a worker waited and was woken (unstable)", None, MetricType::Counter)?;
        for worker in 0..workers {
            family.encode_family(&[("worker", worker)])?.encode_counter::<NoLabelSet, _, u64>(&metrics.worker_park_unpark_count(worker), None)?;
        }
        Ok(())
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: usize) -> std::fmt::Result {
    let value = u64::try_from(value).unwrap_or(u64::MAX);
    encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_the_first_number() {
        assert_eq!(soft_limit("Limit  Soft\nMax open files            1024                 4096                 files     \n"), Some(1024));
        assert_eq!(soft_limit("Max open files            unlimited            unlimited            files"), None);
        assert_eq!(soft_limit(""), None);
    }
}
