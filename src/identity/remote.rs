//! A CA over the network: the client of `IstioCertificateService` (ref §7.1, §7.4).

use std::fmt;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use super::error::IdentityError;
use super::issuer::{Issued, Issuer, IssuerFuture, SigningRequest};
use crate::grpc::{Connection, Dialer, Error, Roots, status_text};
use crate::telemetry::limited;
use crate::wire::ca::{CREATE_CERTIFICATE, CertificateRequest, CertificateResponse};

/// A longer answer is not read. A chain of five with a hundred roots is a fifth of it.
const LONGEST_ANSWER: usize = 1 << 20;

/// A connection without a call for this long is not used again: nothing watches it meanwhile, so it may be dead, and a caller would find out
/// too late. Renewals are hours apart; a new connection costs one handshake.
const IDLE: Duration = Duration::from_secs(60);

/// Asks a CA for certificates, on one connection for all requests.
///
/// Roots and token are read for every request. A connection is used only while the roots that verified it are the current ones: whoever takes a
/// root away is obeyed at once. (The reference keeps the old connection when a new one fails; here the request fails and is repeated, while the
/// old certificates serve on.) Roots that cannot be read leave the connection as it is.
pub struct RemoteIssuer {
    dialer: Dialer,
    impersonate: bool,
    line: Mutex<Line>,
}

/// The one connection, or why there is none.
#[derive(Default)]
struct Line {
    open: Option<Open>,
    /// When and why dialling last failed: everybody who waited for that attempt shares its outcome.
    failed: Option<(Instant, Error)>,
}

struct Open {
    connection: Connection,
    roots: Roots,
    used: Instant,
}

impl RemoteIssuer {
    /// A client that will ask the server of `dialer`. With `impersonate` each request names the workload that it is for, as a node proxy must;
    /// without, the CA certifies whoever the token belongs to. Nothing is sent yet.
    #[must_use]
    pub fn new(dialer: Dialer, impersonate: bool) -> Self {
        Self { dialer, impersonate, line: Mutex::default() }
    }

    /// A connection that can be used now.
    async fn connection(&self) -> Result<Connection, Error> {
        let asked = Instant::now();
        let mut line = self.line.lock().await;
        if let Some((at, error)) = &line.failed
            && *at >= asked
        {
            return Err(error.clone());
        }
        match self.connect(&mut line).await {
            Ok(connection) => {
                line.failed = None;
                Ok(connection)
            }
            Err(error) => {
                line.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn connect(&self, line: &mut Line) -> Result<Connection, Error> {
        line.open.take_if(|open| open.connection.is_closed() || open.used.elapsed() > IDLE);
        let roots = match (self.dialer.roots().await, &line.open) {
            (Ok(roots), _) => roots,
            (Err(error), Some(open)) => {
                limited!(warn, "roots of the CA that cannot be read", %error, "the CA's roots were not reloaded: the ones read before serve on");
                open.roots.clone()
            }
            (Err(error), None) => return Err(error),
        };
        if line.open.take_if(|open| open.roots != roots).is_some() {
            tracing::info!(ca = %self.dialer.address(), "the CA's roots changed: connecting anew");
        }
        let now = Instant::now();
        if let Some(open) = &mut line.open {
            open.used = now;
            return Ok(open.connection.clone());
        }
        let connection = self.dialer.dial(&roots).await?;
        line.open = Some(Open { connection: connection.clone(), roots, used: now });
        Ok(connection)
    }

    async fn ask(&self, connection: &Connection, request: &SigningRequest) -> Result<Issued, Failure> {
        let identity = self.impersonate.then(|| request.identity.to_string());
        let ttl = i64::try_from(request.ttl.as_secs()).unwrap_or(i64::MAX);
        let mut call = Request::new(CertificateRequest::new(request.csr_pem.clone(), ttl, identity.as_deref()));
        *call.metadata_mut() = self.dialer.metadata().await.map_err(Failure::Own)?;
        let answer = connection.call::<_, CertificateResponse>(CREATE_CERTIFICATE, call, LONGEST_ANSWER).await;
        Ok(Issued { certificates: answer.map_err(|status| Failure::Status(Box::new(status)))?.into_inner().cert_chain })
    }
}

/// Why a request had no answer.
enum Failure {
    Own(Error),
    Status(Box<Status>),
}

impl Issuer for RemoteIssuer {
    fn issue<'a>(&'a self, request: &'a SigningRequest) -> IssuerFuture<'a> {
        Box::pin(async move {
            let connection = self.connection().await?;
            let answer = match self.ask(&connection, request).await {
                // The server closes connections from time to time; that it did just now is no failure of the request.
                Err(Failure::Status(_)) if connection.is_closed() => self.ask(&self.connection().await?, request).await,
                answer => answer,
            };
            answer.map_err(|failure| match failure {
                Failure::Own(error) => error.into(),
                Failure::Status(status) => {
                    IdentityError::Refused { code: status.code(), text: status_text(&status), hint: hint(status.code(), self.impersonate) }
                }
            })
        })
    }
}

/// What to look at. The reference's CA says nothing to whoever it refuses, on purpose; its own log does.
fn hint(code: Code, impersonate: bool) -> &'static str {
    match (code, impersonate) {
        (Code::Unauthenticated | Code::PermissionDenied, true) => {
            "; is our token current and meant for the CA (audience istio-ca), may this proxy's account ask for others, and does a pod with this service account run on this node? The CA's log says which"
        }
        (Code::Unauthenticated | Code::PermissionDenied, false) => {
            "; is our token current and meant for the CA (audience istio-ca)? The CA's log says why"
        }
        (Code::Unimplemented, _) => "; is CA_ADDRESS the address of a CA?",
        _ => "",
    }
}

impl fmt::Debug for RemoteIssuer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RemoteIssuer").field("ca", &self.dialer.address()).field("impersonate", &self.impersonate).finish_non_exhaustive()
    }
}
