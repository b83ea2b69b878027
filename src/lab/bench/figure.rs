//! What can be measured, by the names that people type and programs read.

use serde::{Deserialize, Serialize};

use super::options::{Floor, Kind};

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Figure {
    /// Bytes one way.
    Bulk {
        /// Connections at once.
        streams: u8,
        /// To the server, or from it.
        up: bool,
    },
    /// Requests one after another on kept connections.
    Requests {
        /// Connections at once.
        connections: u8,
    },
    /// New connections with one request each, 16 at once.
    Connections,
    /// Requests beside one bulk stream.
    Beside {
        /// The stream keeps to 2 Gbit/s, so that nobody waits for a CPU: what is left is waiting inside the proxies.
        paced: bool,
    },
    /// Bytes to a destination that the mesh does not know: one proxy, no tunnel.
    PassthroughBulk {
        /// To the server, or from it.
        up: bool,
    },
    /// Requests to a destination that the mesh does not know.
    PassthroughRequests,
    /// Memory of idle streams, before and after each moved 1 MiB.
    MemoryStreams,
    /// Memory of idle streams after each moved 12 MiB.
    MemoryMoved,
    /// Memory of idle tunnels.
    MemoryTunnels,
}

/// One number of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Quantity {
    GbitPerSecond,
    CpuSecondsPerGb,
    UserSecondsPerGb,
    SystemSecondsPerGb,
    PerSecond,
    P50Microseconds,
    P99Microseconds,
    CpuSecondsPer1000,
    UserSecondsPer1000,
    SystemSecondsPer1000,
    P50AloneMicroseconds,
    P99AloneMicroseconds,
    P50TimesAlone,
    P99TimesAlone,
    IdleBytesClientSide,
    IdleBytesServerSide,
    MovedBytesClientSide,
    MovedBytesServerSide,
}

impl Quantity {
    /// Whether it is a part of another one: of use, but not to be looked at twice.
    pub(super) fn is_part(self) -> bool {
        matches!(self, Self::UserSecondsPerGb | Self::SystemSecondsPerGb | Self::UserSecondsPer1000 | Self::SystemSecondsPer1000)
    }

    /// The head of its column.
    pub(super) fn heading(self) -> &'static str {
        match self {
            Self::GbitPerSecond => "Gbit/s",
            Self::CpuSecondsPerGb => "CPU s/GB",
            Self::UserSecondsPerGb => "user s/GB",
            Self::SystemSecondsPerGb => "system s/GB",
            Self::PerSecond => "per s",
            Self::P50Microseconds => "p50 µs",
            Self::P99Microseconds => "p99 µs",
            Self::CpuSecondsPer1000 => "CPU s/1,000",
            Self::UserSecondsPer1000 => "user s/1,000",
            Self::SystemSecondsPer1000 => "system s/1,000",
            Self::P50AloneMicroseconds => "p50 alone µs",
            Self::P99AloneMicroseconds => "p99 alone µs",
            Self::P50TimesAlone => "p50 / alone",
            Self::P99TimesAlone => "p99 / alone",
            Self::IdleBytesClientSide => "bytes, client side",
            Self::IdleBytesServerSide => "bytes, server side",
            Self::MovedBytesClientSide => "moved, client side",
            Self::MovedBytesServerSide => "moved, server side",
        }
    }
}

impl Figure {
    /// All, in the order in which they are taken.
    pub const ALL: [Self; 17] = [
        Self::Bulk { streams: 1, up: true },
        Self::Bulk { streams: 1, up: false },
        Self::Bulk { streams: 4, up: true },
        Self::Bulk { streams: 4, up: false },
        Self::Bulk { streams: 16, up: true },
        Self::Bulk { streams: 16, up: false },
        Self::Requests { connections: 1 },
        Self::Requests { connections: 32 },
        Self::Connections,
        Self::Beside { paced: false },
        Self::Beside { paced: true },
        Self::PassthroughBulk { up: true },
        Self::PassthroughBulk { up: false },
        Self::PassthroughRequests,
        Self::MemoryStreams,
        Self::MemoryMoved,
        Self::MemoryTunnels,
    ];

    /// The name for `--only` and for programs.
    #[must_use]
    pub fn name(self) -> String {
        let way = |up: bool| if up { "up" } else { "down" };
        match self {
            Self::Bulk { streams, up } => format!("bulk-{streams}-{}", way(up)),
            Self::Requests { connections } => format!("requests-{connections}"),
            Self::Connections => "connections".to_owned(),
            Self::Beside { paced } => format!("requests-beside-{}bulk", if paced { "paced-" } else { "" }),
            Self::PassthroughBulk { up } => format!("passthrough-bulk-{}", way(up)),
            Self::PassthroughRequests => "passthrough-requests".to_owned(),
            Self::MemoryStreams => "memory-streams".to_owned(),
            Self::MemoryMoved => "memory-streams-12mib".to_owned(),
            Self::MemoryTunnels => "memory-tunnels".to_owned(),
        }
    }

    /// A line for people.
    pub(super) fn title(self) -> String {
        let way = |up: bool| if up { "client → server" } else { "server → client" };
        let many = |count: u8, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        match self {
            Self::Bulk { streams, up } => format!("bulk, {}, {}", many(streams, "stream"), way(up)),
            Self::Requests { connections } => format!("requests of 1 KiB and answers of 1 KiB, {}", many(connections, "connection")),
            Self::Connections => "new connections with one request of 1 KiB each, 16 at once".to_owned(),
            Self::Beside { paced: false } => "requests of 1 KiB, 1 connection, beside 1 bulk stream client → server as fast as it goes".to_owned(),
            Self::Beside { paced: true } => "requests of 1 KiB, 1 connection, beside 1 bulk stream client → server of 2 Gbit/s".to_owned(),
            Self::PassthroughBulk { up } => format!("passthrough (one hop, no tunnel): bulk, 1 stream, {}", way(up)),
            Self::PassthroughRequests => "passthrough (one hop, no tunnel): requests of 1 KiB, 1 connection".to_owned(),
            Self::MemoryStreams => "memory per idle stream, after one request, and after 1 MiB was moved each way".to_owned(),
            Self::MemoryMoved => "memory per idle stream, after one request, and after 12 MiB were moved each way".to_owned(),
            Self::MemoryTunnels => "memory per idle HBONE connection, without its stream".to_owned(),
        }
    }

    /// Those that a list of names means; a name also means all that go on with `-` behind it (`bulk`, `memory`).
    ///
    /// # Errors
    /// When a name means none; the sentence lists all.
    pub fn select(names: &[String]) -> Result<Vec<Self>, String> {
        let means = |name: &str, figure: &Self| figure.name() == name || figure.name().starts_with(&format!("{name}-"));
        if let Some(unknown) = names.iter().find(|name| !Self::ALL.iter().any(|figure| means(name, figure))) {
            let all: Vec<String> = Self::ALL.iter().map(|figure| figure.name()).collect();
            return Err(format!("there is no figure {unknown:?}; there are: {} (and what they begin with, such as bulk)", all.join(", ")));
        }
        Ok(Self::ALL.into_iter().filter(|figure| names.is_empty() || names.iter().any(|name| means(name, figure))).collect())
    }

    /// Whether proxies are looked at for what they keep, not for what they do.
    pub(super) fn is_memory(self) -> bool {
        matches!(self, Self::MemoryStreams | Self::MemoryMoved | Self::MemoryTunnels)
    }

    fn is_passthrough(self) -> bool {
        matches!(self, Self::PassthroughBulk { .. } | Self::PassthroughRequests)
    }

    /// Why a figure cannot be taken of a kind of contestant; `None` when it can.
    pub(super) fn does_not_apply(self, kind: &Kind) -> Option<&'static str> {
        match kind {
            Kind::Direct if self.is_memory() => Some("there is no proxy"),
            Kind::Floor(_) if self == Self::MemoryTunnels => Some("a floor keeps no tunnels"),
            Kind::Floor(Floor::C1) if !self.is_passthrough() => Some("only passthrough has one hop"),
            Kind::Floor(Floor::C2 | Floor::C3) if self.is_passthrough() => Some("passthrough has one hop only"),
            _ => None,
        }
    }
}

impl TryFrom<String> for Figure {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Self::ALL.into_iter().find(|figure| figure.name() == name).ok_or_else(|| format!("there is no figure {name:?}"))
    }
}

impl From<Figure> for String {
    fn from(figure: Figure) -> Self {
        figure.name()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn select(names: &[&str]) -> Result<Vec<String>, String> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        Figure::select(&names).map(|figures| figures.into_iter().map(Figure::name).collect())
    }

    #[test]
    fn every_figure_is_found_by_its_own_name_and_the_name_is_unique() {
        for figure in Figure::ALL {
            assert!(select(&[&figure.name()]).unwrap().contains(&figure.name()));
            assert_eq!(Figure::try_from(figure.name()).unwrap(), figure);
        }
    }

    #[test]
    fn a_beginning_means_all_that_have_it() {
        assert_eq!(select(&["bulk-4"]).unwrap(), ["bulk-4-up", "bulk-4-down"]);
        assert_eq!(select(&["bulk"]).unwrap().len(), 6);
        assert_eq!(select(&["requests-1", "connections"]).unwrap(), ["requests-1", "connections"]);
        assert_eq!(select(&[]).unwrap().len(), Figure::ALL.len());
    }

    #[test]
    fn an_unknown_name_is_answered_with_all_names() {
        let error = select(&["bulk", "bulky"]).unwrap_err();
        assert!(error.contains("bulky") && error.contains("memory-tunnels"), "{error}");
    }
}
