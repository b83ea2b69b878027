//! Certificates of local workloads are fetched before the first connection needs them, and forgotten with the last pod (reference,
//! dataplane §7.3).

use std::collections::HashSet;

use crate::discovery::Mesh;
use crate::identity::Credentials;
use crate::model::{SpiffeId, TunnelProtocol};

/// Without the name of the node every workload counts as one of this node. That is right for a machine of its own, and not for a mesh: beyond so
/// many workloads nothing is fetched ahead then, and nothing forgotten.
const UNNAMED: usize = 1024;

/// Follows the mesh for ever, also one that can no longer change. Only workloads of this node that take HBONE count.
pub async fn prefetch_certificates(mesh: Mesh, credentials: Credentials) {
    let mut worlds = mesh.subscribe_local();
    let mut known = HashSet::new();
    loop {
        let world = worlds.borrow_and_update().clone();
        if world.snapshot.local_node().is_some() || world.snapshot.workload_count() <= UNNAMED {
            let wanted = local_identities(&world);
            for identity in wanted.difference(&known) {
                credentials.prefetch(identity.clone());
            }
            for identity in known.difference(&wanted) {
                credentials.forget(identity);
            }
            known = wanted;
        }
        drop(world);
        if worlds.changed().await.is_err() {
            // A mesh that is given as text has no publisher: what it says stays.
            return std::future::pending().await;
        }
    }
}

fn local_identities(world: &crate::discovery::World) -> HashSet<SpiffeId> {
    world
        .snapshot
        .local_workloads()
        .filter(|workload| workload.profile.protocol == TunnelProtocol::Hbone || workload.profile.native_tunnel)
        .filter_map(|workload| workload.identity().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::discovery::{Edit, Publisher};
    use crate::identity::{Config, Issuer, IssuerFuture, SigningRequest};
    use crate::lifecycle::Clock;
    use crate::model::{HealthStatus, Profile, Workload};

    /// Never answers.
    struct Silent;

    impl Issuer for Silent {
        fn issue<'a>(&'a self, _: &'a SigningRequest) -> IssuerFuture<'a> {
            Box::pin(std::future::pending())
        }
    }

    fn workload(uid: &str, account: &str, node: &str, edit: impl FnOnce(&mut Profile)) -> Edit {
        let mut profile =
            Profile { namespace: "shop".into(), service_account: account.into(), protocol: TunnelProtocol::Hbone, ..Profile::default() };
        edit(&mut profile);
        Edit::Workload(Workload {
            uid: uid.into(),
            name: uid.into(),
            addresses: Default::default(),
            node: node.into(),
            hostname: "".into(),
            status: HealthStatus::Healthy,
            capacity: 1,
            profile: Arc::new(profile),
        })
    }

    /// A mesh, what follows it, and the accounts whose certificates are asked for.
    struct Ground {
        publisher: Publisher,
        credentials: Credentials,
        following: tokio::task::JoinHandle<()>,
    }

    impl Ground {
        fn new(node: Option<&str>) -> Self {
            let (publisher, mesh) = Publisher::new(node.map(Into::into));
            let (credentials, _renewal) = Credentials::new(Config::default(), Arc::new(Silent), Clock::system());
            let following = tokio::spawn(prefetch_certificates(mesh, credentials.clone()));
            Self { publisher, credentials, following }
        }

        async fn asked(&mut self, edits: impl IntoIterator<Item = Edit>) -> Vec<String> {
            self.publisher.publish(edits);
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.credentials.dump().iter().map(|state| state.identity.rsplit('/').next().unwrap().to_owned()).collect()
        }
    }

    impl Drop for Ground {
        fn drop(&mut self) {
            self.following.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn identities_of_this_node_that_take_hbone_are_fetched_with_their_first_workload_and_forgotten_with_the_last() {
        let mut ground = Ground::new(Some("here"));
        let plain = |profile: &mut Profile| profile.protocol = TunnelProtocol::None;
        let native = |profile: &mut Profile| (profile.protocol, profile.native_tunnel) = (TunnelProtocol::None, true);
        let first = [
            workload("a1", "a", "here", |_| {}),
            workload("a2", "a", "here", |_| {}),
            workload("plain", "plain", "here", plain),
            workload("native", "native", "here", native),
            workload("there", "there", "elsewhere", |_| {}),
        ];
        assert_eq!(ground.asked(first).await, ["a", "native"]);
        assert_eq!(ground.asked([Edit::Remove("a1".into())]).await, ["a", "native"]);
        assert_eq!(ground.asked([Edit::Remove("a2".into()), Edit::Remove("native".into())]).await, Vec::<String>::new());
        // The number of all workloads is no reason where the node has a name.
        let many = (0..2 * UNNAMED).map(|number| workload(&format!("w{number}"), "there", "elsewhere", |_| {}));
        assert_eq!(ground.asked(many.chain([workload("late", "late", "here", |_| {})])).await, ["late"]);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_nodes_name_nothing_is_fetched_ahead_or_forgotten_beyond_1024_workloads() {
        let mut ground = Ground::new(None);
        let many = (1..1024).map(|number| workload(&format!("w{number}"), "many", "anywhere", |_| {}));
        assert_eq!(ground.asked(many.chain([workload("first", "first", "anywhere", |_| {})])).await, ["first", "many"]);
        assert_eq!(ground.asked([workload("more", "more", "anywhere", |_| {})]).await, ["first", "many"], "one too many");
        assert_eq!(ground.asked([Edit::Remove("first".into()), workload("other", "other", "anywhere", |_| {})]).await, ["first", "many"]);
        assert_eq!(ground.asked([Edit::Remove("w1".into())]).await, ["many", "more", "other"], "few enough again");
    }
}
