//! Channels to other services, over TCP or within the process.

use std::{io, time::Duration};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::ServiceError;

/// Bytes that each direction of an in-memory connection holds: two chunks of a tensor.
const PIPE_BYTES: usize = 2 << 20;

/// A channel to `address`, given as `host:port` or `http://host:port`.
///
/// The connection is made at the first call, and again after it broke. A peer that does not answer a ping within
/// 30 seconds counts as gone. Calls themselves have no time limit. To be called within a tokio runtime.
///
/// Errors: [`ServiceError::InvalidArgument`] when the address is not one.
pub fn connect(address: &str) -> Result<Channel, ServiceError> {
    Ok(tuned(Endpoint::from(address_uri(address)?)).connect_lazy())
}

/// Checks an address without connecting. Errors: see [`connect`].
pub fn address_uri(address: &str) -> Result<Uri, ServiceError> {
    let wrong = |reason: &str| {
        ServiceError::invalid("address", format!("{address:?} {reason}; expected host:port or http://host:port"))
    };
    let text = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let uri: Uri = text.parse().map_err(|_| wrong("is no address"))?;
    if uri.scheme_str() != Some("http") {
        return Err(wrong("has a scheme that is not spoken here"));
    }
    if uri.host().is_none_or(str::is_empty) || uri.port_u16().is_none() {
        return Err(wrong("lacks the host or the port"));
    }
    if uri.path_and_query().is_some_and(|p| p.as_str() != "/") {
        return Err(wrong("has a path"));
    }
    Ok(uri)
}

fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(Duration::from_secs(5))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(30))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(crate::server::STREAM_WINDOW)
        .initial_connection_window_size(crate::server::CONNECTION_WINDOW)
}

/// Connections that come from [`in_memory`] channels; give it to [`crate::server::serve`].
pub type MemoryIncoming = ReceiverStream<Result<DuplexStream, io::Error>>;

/// A channel to a server in this process, and the connections that the server is to accept.
///
/// The channel speaks the same gRPC as over TCP. It connects at the first call and again after a connection ended;
/// without a server its calls end with `UNAVAILABLE`. To be called within a tokio runtime.
#[must_use]
pub fn in_memory() -> (Channel, MemoryIncoming) {
    let (connections, incoming) = mpsc::channel(8);
    let connector = tower::service_fn(move |_: Uri| {
        let connections = connections.clone();
        async move {
            let (near, far) = tokio::io::duplex(PIPE_BYTES);
            connections.send(Ok(far)).await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
            Ok::<_, io::Error>(TokioIo::new(near))
        }
    });
    // The name is never looked up.
    let endpoint = Endpoint::from_static("http://in-memory");
    let endpoint = endpoint
        .initial_stream_window_size(crate::server::STREAM_WINDOW)
        .initial_connection_window_size(crate::server::CONNECTION_WINDOW);
    (endpoint.connect_with_connector_lazy(connector), ReceiverStream::new(incoming))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        for good in ["localhost:1", "http://10.0.0.1:50051", "[::1]:5", "http://host:80/"] {
            assert!(address_uri(good).is_ok(), "{good}");
        }
        for bad in ["", "host", "https://host:1", "http://host", "host:99999", "http://host:1/x", "a b:1"] {
            let error = address_uri(bad).unwrap_err();
            assert_eq!(error.violations()[0].field, "address", "{bad}");
        }
    }
}
