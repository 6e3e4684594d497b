//! gRPC servers: health, reflection, limits and an orderly end.

use std::{future::Future, io, net::SocketAddr, time::Duration};

use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{
        Server,
        server::{Connected, TcpIncoming},
    },
};
use tonic_health::{ServingStatus, server::health_reporter};

use crate::ServiceError;

/// Bytes of one stream that may be under way unread: four chunks of a tensor.
pub(crate) const STREAM_WINDOW: u32 = 4 << 20;
/// Bytes of one connection that may be under way unread.
pub(crate) const CONNECTION_WINDOW: u32 = 16 << 20;

/// One connection of a server: TCP, or a pipe within the process.
pub trait Connection: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static {}

impl<C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static> Connection for C {}

/// How a server ends.
#[derive(Debug, Clone)]
pub struct Lifetime {
    /// Cancelled when the server shall stop: no new calls; those in flight go on.
    pub shutdown: CancellationToken,
    /// How long calls in flight may go on after that.
    pub drain: Duration,
}

/// Binds a TCP address; port 0 takes a free one. Gives the address it got.
///
/// Errors: [`ServiceError::Unavailable`] with the address and the system's reason.
pub async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServiceError> {
    let failed = |e: io::Error| ServiceError::unavailable(format!("cannot listen on {address}: {e}"));
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Says on standard output, in one line that programs read, that the process answers: `ready grpc=ADDR http=ADDR`.
pub fn announce(addresses: &[(&str, SocketAddr)]) {
    let words: Vec<String> = addresses.iter().map(|(name, address)| format!("{name}={address}")).collect();
    let words = words.join(" ");
    tracing::info!("listening on {words}");
    println!("ready {words}");
}

/// Is cancelled at the first SIGTERM or SIGINT. To be called within a tokio runtime.
///
/// Errors: the system does not let signals be caught.
pub fn shutdown_signal() -> Result<CancellationToken, ServiceError> {
    use tokio::signal::unix::{SignalKind, signal};

    let failed = |e: io::Error| ServiceError::internal(format!("signals cannot be caught: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let token = CancellationToken::new();
    let stop = token.clone();
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!("{name}: no new requests, those in flight go on");
        stop.cancel();
    });
    Ok(token)
}

/// Connections over TCP for [`serve`]. Small answers are not held back until earlier ones are acknowledged, which a peer
/// may put off for 40 ms.
pub fn tcp(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// Serves `routes` with health and reflection (v1 and v1alpha) until the lifetime ends.
///
/// `services` are the full names that health answers for, besides the empty name. On shutdown health turns to
/// NOT_SERVING, new calls are refused, and calls in flight go on until `drain` has passed.
///
/// Errors: the server cannot be built, or its listener fails.
pub async fn serve<I, C>(routes: Routes, services: &[&str], incoming: I, lifetime: Lifetime) -> Result<(), ServiceError>
where
    I: Stream<Item = Result<C, io::Error>>,
    C: Connection,
{
    let failed = |e: &dyn std::error::Error| ServiceError::internal(format!("the server failed: {}", chain(e)));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (reporter, health) = health_reporter();
    let names: Vec<&str> = std::iter::once("").chain(services.iter().copied()).collect();
    for name in &names {
        reporter.set_service_status(*name, ServingStatus::Serving).await;
    }
    let routes = routes
        .add_service(health)
        .add_service(reflection().build_v1().map_err(|e| failed(&e))?)
        .add_service(reflection().build_v1alpha().map_err(|e| failed(&e))?);
    let stopping = lifetime.shutdown.clone();
    let signal = async move {
        stopping.cancelled().await;
        for name in &names {
            reporter.set_service_status(*name, ServingStatus::NotServing).await;
        }
    };
    let serving = Server::builder()
        .trace_fn(|request| tracing::info_span!("rpc", path = request.uri().path()))
        .max_concurrent_streams(256)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(30)))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, signal);
    tokio::select! {
        ended = serving => ended.map_err(|e| failed(&e)),
        () = overdue(lifetime) => {
            tracing::warn!("requests were still in flight at the end of the drain time");
            Ok(())
        }
    }
}

async fn overdue(lifetime: Lifetime) {
    lifetime.shutdown.cancelled().await;
    tokio::time::sleep(lifetime.drain).await;
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |e| e.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Runs a process's main task on a new runtime; an error goes to the log and becomes exit code 1.
///
/// Work that does not end with the task, as a device in the middle of a computation, is left behind.
pub fn run_process<F>(main: impl FnOnce() -> F) -> std::process::ExitCode
where
    F: Future<Output = Result<(), ServiceError>>,
{
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| ServiceError::internal(format!("the runtime did not start: {e}")))
        .and_then(|runtime| {
            let outcome = runtime.block_on(async { main().await });
            runtime.shutdown_timeout(Duration::from_secs(1));
            outcome
        });
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::{Code, transport::Channel};
    use tonic_health::pb::{HealthCheckRequest, health_check_response, health_client::HealthClient};
    use tonic_reflection::pb::{v1, v1alpha};

    use super::*;
    use crate::client;

    const NAME: &str = "avatar.v1.StageService";

    async fn health(channel: Channel, service: &str) -> Result<i32, Code> {
        let request = HealthCheckRequest { service: service.to_owned() };
        HealthClient::new(channel).check(request).await.map(|r| r.into_inner().status).map_err(|s| s.code())
    }

    fn lifetime() -> Lifetime {
        Lifetime { shutdown: CancellationToken::new(), drain: Duration::from_secs(5) }
    }

    #[tokio::test]
    async fn health_and_reflection_answer_over_tcp_and_in_memory() {
        let (listener, address) = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let life = lifetime();
        let tcp_server = tokio::spawn(serve(Routes::default(), &[NAME], tcp(listener), life.clone()));
        let (memory, incoming) = client::in_memory();
        let memory_server = tokio::spawn(serve(Routes::default(), &[NAME], incoming, life.clone()));
        for channel in [client::connect(&address.to_string()).unwrap(), memory] {
            for name in ["", NAME] {
                let serving = health_check_response::ServingStatus::Serving as i32;
                assert_eq!(health(channel.clone(), name).await, Ok(serving));
            }
            assert_eq!(health(channel.clone(), "nobody").await, Err(Code::NotFound));

            let list = v1::ServerReflectionRequest {
                host: String::new(),
                message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
            };
            let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
            let mut answers = client.server_reflection_info(tokio_stream::iter([list])).await.unwrap().into_inner();
            let answer = format!("{:?}", answers.message().await.unwrap());
            assert!(answer.contains(NAME) && answer.contains("grpc.health.v1.Health"), "{answer}");

            let list = v1alpha::ServerReflectionRequest {
                host: String::new(),
                message_request: Some(v1alpha::server_reflection_request::MessageRequest::ListServices(String::new())),
            };
            let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel.clone());
            let mut answers = client.server_reflection_info(tokio_stream::iter([list])).await.unwrap().into_inner();
            assert!(format!("{:?}", answers.message().await.unwrap()).contains(NAME));
        }
        life.shutdown.cancel();
        for server in [tcp_server, memory_server] {
            tokio::time::timeout(Duration::from_secs(20), server).await.unwrap().unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn small_answers_over_tcp_are_not_held_back() {
        use futures::StreamExt as _;
        let (listener, address) = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let mut incoming = tcp(listener);
        let _caller = tokio::net::TcpStream::connect(address).await.unwrap();
        assert!(incoming.next().await.unwrap().unwrap().nodelay().unwrap());
    }

    #[tokio::test]
    async fn an_in_memory_channel_reconnects_and_says_when_nobody_is_there() {
        let (channel, incoming) = client::in_memory();
        drop(incoming);
        assert_eq!(health(channel, "").await, Err(Code::Unavailable));
    }

    #[tokio::test]
    async fn a_taken_port_is_an_error_with_the_address() {
        let (_listener, address) = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let error = bind(address).await.unwrap_err();
        assert!(error.to_string().contains(&address.to_string()), "{error}");
    }
}
