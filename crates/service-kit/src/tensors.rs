//! Streams of tensors: reading requests and replies, sending both.
//!
//! A request is one header and then tensors; a reply is tensors and then one summary.

use std::{
    fmt::Display,
    pin::Pin,
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt as _, stream};
use proto::{
    tensor::{HostTensor, TensorError, TensorReader},
    v1::TensorPart,
};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::{ServiceError, device::CancelToken};

/// How long a device waits for a reader that takes nothing, before it gives the request up.
const STALL: Duration = Duration::from_secs(60);

/// How much a stream may bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one tensor.
    pub tensor_bytes: u64,
    /// Bytes of all tensors together.
    pub stream_bytes: u64,
}

impl Limits {
    /// Every tensor may have `bytes`, and all together as much as `tensors` of them.
    #[must_use]
    pub fn new(bytes: u64, tensors: u64) -> Self {
        Self { tensor_bytes: bytes, stream_bytes: bytes.saturating_mul(tensors) }
    }
}

/// One message of a tensor stream, taken apart.
#[derive(Debug)]
pub enum Item<H> {
    /// A piece of a tensor.
    Part(TensorPart),
    /// The request's header, or the reply's summary.
    Other(H),
    /// A message whose `oneof` is not set, or not known here.
    Empty,
}

/// Reads one request: a header, then tensors.
pub struct RequestReader<S, M, H> {
    messages: S,
    tensors: TensorReader,
    split: fn(M) -> Item<H>,
}

impl<S, M, H> RequestReader<S, M, H>
where
    S: Stream<Item = Result<M, Status>> + Unpin,
{
    /// Reads `messages`, each taken apart by `split`.
    pub fn new(messages: S, limits: Limits, split: fn(M) -> Item<H>) -> Self {
        Self { messages, tensors: TensorReader::new(limits.tensor_bytes, limits.stream_bytes), split }
    }

    /// Reads the header; call it first, and once.
    ///
    /// Errors: the stream fails, or begins with something else.
    pub async fn header(&mut self) -> Result<H, ServiceError> {
        match self.messages.next().await.transpose()?.map(self.split) {
            Some(Item::Other(header)) => Ok(header),
            Some(Item::Part(_) | Item::Empty) | None => {
                Err(ServiceError::invalid("header", "the first message of the stream must be the header"))
            }
        }
    }

    /// Reads the next tensor; `None` at the end of the stream.
    ///
    /// Errors: the stream fails, or its parts are not whole, sound tensors within the limits.
    pub async fn next(&mut self) -> Result<Option<HostTensor>, ServiceError> {
        while let Some(message) = self.messages.next().await.transpose()? {
            match (self.split)(message) {
                Item::Part(part) => {
                    if let Some(tensor) = self.tensors.push(part)? {
                        return Ok(Some(tensor));
                    }
                }
                Item::Other(_) => return Err(ServiceError::invalid("header", "it came a second time")),
                Item::Empty => return Err(ServiceError::invalid("body", "a message is neither header nor tensor")),
            }
        }
        self.tensors.finish()?;
        Ok(None)
    }

    /// Reads exactly the tensors of these names, in any order; gives them in the order of `names`.
    ///
    /// Errors: as [`next`](Self::next), and a tensor that is unknown, missing or there twice.
    pub async fn all<const N: usize>(&mut self, names: [&str; N]) -> Result<[HostTensor; N], ServiceError> {
        let mut found: [Option<HostTensor>; N] = [const { None }; N];
        while let Some(tensor) = self.next().await? {
            match names.iter().position(|name| *name == tensor.name()) {
                None => {
                    let expected = names.join(", ");
                    return Err(ServiceError::invalid(
                        tensor.name(),
                        format!("the request takes no such tensor; it takes {expected}"),
                    ));
                }
                Some(i) if found[i].is_some() => {
                    return Err(ServiceError::invalid(tensor.name(), "the tensor came a second time"));
                }
                Some(i) => found[i] = Some(tensor),
            }
        }
        let missing = names.iter().zip(&found).find(|(_, tensor)| tensor.is_none()).map(|(name, _)| *name);
        match missing {
            Some(name) => Err(TensorError::Missing { name: name.to_owned() }.into()),
            None => {
                let whole: Vec<HostTensor> = found.into_iter().flatten().collect();
                whole.try_into().map_err(|_| ServiceError::internal("a tensor was lost"))
            }
        }
    }
}

/// Reads one reply: tensors, then a summary.
///
/// A reply that is malformed is the service's fault, not the caller's: corrupt or cut short it is
/// [`ServiceError::Unavailable`] (a retry may mend it), else [`ServiceError::Internal`].
pub struct ReplyReader<S, M, H> {
    messages: S,
    tensors: TensorReader,
    split: fn(M) -> Item<H>,
    summary: Option<H>,
}

impl<S, M, H> ReplyReader<S, M, H>
where
    S: Stream<Item = Result<M, Status>> + Unpin,
{
    /// Reads `messages`, each taken apart by `split`.
    pub fn new(messages: S, limits: Limits, split: fn(M) -> Item<H>) -> Self {
        let tensors = TensorReader::new(limits.tensor_bytes, limits.stream_bytes);
        Self { messages, tensors, split, summary: None }
    }

    /// Reads the next tensor; `None` after the last, when the summary has come.
    pub async fn next(&mut self) -> Result<Option<HostTensor>, ServiceError> {
        while let Some(message) = self.messages.next().await.transpose()? {
            match (self.split)(message) {
                Item::Part(_) if self.summary.is_some() => return Err(malformed("a tensor after the summary")),
                Item::Part(part) => {
                    if let Some(tensor) = self.tensors.push(part).map_err(reply_fault)? {
                        return Ok(Some(tensor));
                    }
                }
                Item::Other(summary) => {
                    if self.summary.replace(summary).is_some() {
                        return Err(malformed("a second summary"));
                    }
                }
                Item::Empty => return Err(malformed("a message that is neither tensor nor summary")),
            }
        }
        self.tensors.finish().map_err(reply_fault)?;
        match &self.summary {
            Some(_) => Ok(None),
            None => Err(ServiceError::unavailable("the reply ended before its summary")),
        }
    }

    /// The summary, once [`next`](Self::next) has given `None`.
    pub fn summary(self) -> Result<H, ServiceError> {
        self.summary.ok_or_else(|| malformed("no summary"))
    }

    /// Reads all tensors and the summary.
    pub async fn all(mut self) -> Result<(Vec<HostTensor>, H), ServiceError> {
        let mut tensors = Vec::new();
        while let Some(tensor) = self.next().await? {
            tensors.push(tensor);
        }
        Ok((tensors, self.summary()?))
    }
}

fn malformed(what: impl Display) -> ServiceError {
    ServiceError::internal(format!("malformed reply: {what}"))
}

fn reply_fault(error: TensorError) -> ServiceError {
    match error {
        TensorError::Corrupt { .. } | TensorError::Incomplete { .. } => {
            ServiceError::unavailable(format!("reply: {error}"))
        }
        TensorError::Header { .. }
        | TensorError::TooLarge { .. }
        | TensorError::Chunk { .. }
        | TensorError::Mismatch { .. }
        | TensorError::Missing { .. } => malformed(error),
    }
}

/// The messages of a request: the header, then the tensors in chunks, made as they are sent.
pub fn request<M: Send + 'static>(
    header: M,
    tensors: Vec<HostTensor>,
    wrap: fn(TensorPart) -> M,
) -> impl Stream<Item = M> + Send + 'static {
    let parts = tensors.into_iter().flat_map(move |tensor| tensor.parts().map(wrap));
    stream::iter(std::iter::once(header).chain(parts))
}

/// What a service streams back.
pub type ReplyStream<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send + 'static>>;

/// The messages of a reply that is complete: the tensors in chunks, then the summary.
pub fn reply<M: Send + 'static>(tensors: Vec<HostTensor>, wrap: fn(TensorPart) -> M, summary: M) -> ReplyStream<M> {
    let parts = tensors.into_iter().flat_map(move |tensor| tensor.parts().map(wrap));
    Box::pin(stream::iter(parts.chain(std::iter::once(summary)).map(Ok)))
}

enum Outgoing<M> {
    Tensor(HostTensor),
    Last(Result<M, ServiceError>),
}

/// The device's end of a reply that is sent while it is made.
pub struct Outbox<M>(mpsc::Sender<Outgoing<M>>);

impl<M> Outbox<M> {
    /// Sends a tensor from the device's thread.
    ///
    /// With the outbox full it waits for the reader, so size the outbox by what a slow reader may hold back. Errors:
    /// the caller has gone, or has read nothing for a minute.
    pub fn send(&self, tensor: HostTensor, cancel: &CancelToken) -> Result<(), ServiceError> {
        let begin = Instant::now();
        let mut message = Outgoing::Tensor(tensor);
        loop {
            cancel.check()?;
            match self.0.try_send(message) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Closed(_)) => return Err(ServiceError::cancelled("the caller went away")),
                Err(TrySendError::Full(_)) if begin.elapsed() > STALL => {
                    let seconds = STALL.as_secs();
                    return Err(ServiceError::cancelled(format!("the caller has read nothing for {seconds} s")));
                }
                Err(TrySendError::Full(back)) => {
                    message = back;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }
}

/// A reply that is sent while the device makes it: `work` sends tensors into the outbox and gives the summary.
///
/// The outbox holds `capacity` tensors (at least 1). `start` hands the work to the device; when it refuses, so does
/// this. A work that fails ends the stream with its error; when the caller goes away the work is cancelled.
pub fn streamed_reply<M, W>(
    capacity: usize,
    wrap: fn(TensorPart) -> M,
    start: impl FnOnce(Outbox<M>) -> Result<W, ServiceError>,
) -> Result<ReplyStream<M>, ServiceError>
where
    M: Send + 'static,
    W: Future<Output = Result<M, ServiceError>> + Send + 'static,
{
    let (outbox, messages) = mpsc::channel(capacity.max(1));
    let work = start(Outbox(outbox))?;
    // The stream owns the work's future: both live as long as the call.
    let end = stream::once(work).map(Outgoing::Last);
    let messages = ReceiverStream::new(messages).chain(end).flat_map(move |message| {
        let (parts, last) = match message {
            Outgoing::Tensor(tensor) => (Some(tensor.parts().map(wrap)), None),
            Outgoing::Last(last) => (None, Some(last.map_err(Status::from))),
        };
        stream::iter(parts.into_iter().flatten().map(Ok).chain(last))
    });
    Ok(Box::pin(messages))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceWorker;

    /// Header, part, or nothing.
    type Message = Option<Result<&'static str, TensorPart>>;

    fn split(message: Message) -> Item<&'static str> {
        match message {
            Some(Ok(other)) => Item::Other(other),
            Some(Err(part)) => Item::Part(part),
            None => Item::Empty,
        }
    }

    fn wrap(part: TensorPart) -> Message {
        Some(Err(part))
    }

    fn tensor(name: &str, n: usize) -> HostTensor {
        HostTensor::from_u8(name, &[n], vec![7; n]).unwrap()
    }

    fn reader(
        messages: Vec<Message>,
    ) -> RequestReader<impl Stream<Item = Result<Message, Status>> + Unpin, Message, &'static str> {
        RequestReader::new(stream::iter(messages.into_iter().map(Ok)), Limits::new(100, 2), split)
    }

    fn parts(tensors: &[(&str, usize)]) -> Vec<Message> {
        let tensors = tensors.iter().flat_map(|(name, n)| tensor(name, *n).parts().map(wrap));
        std::iter::once(Some(Ok("head"))).chain(tensors).collect()
    }

    async fn refused(messages: Vec<Message>) -> (String, String) {
        let mut reader = reader(messages);
        let result = match reader.header().await {
            Ok(_) => reader.all(["a", "b"]).await.map(|_| ()),
            Err(error) => Err(error),
        };
        let error = result.unwrap_err();
        let violation = &error.violations()[0];
        (violation.field.clone(), violation.description.clone())
    }

    #[tokio::test]
    async fn a_request_is_read_in_any_order_of_its_tensors() {
        let mut reader = reader(parts(&[("b", 3), ("a", 100)]));
        assert_eq!(reader.header().await, Ok("head"));
        let [a, b] = reader.all(["a", "b"]).await.unwrap();
        assert_eq!((a.shape(), b.shape()), (&[100][..], &[3][..]));
    }

    #[tokio::test]
    async fn wrong_requests_name_the_field() {
        assert_eq!(refused(vec![]).await.0, "header");
        assert_eq!(refused(parts(&[("a", 1)])[1..].to_vec()).await.0, "header");
        assert_eq!(refused(parts(&[("a", 1)])).await.0, "b");
        assert_eq!(refused(parts(&[("a", 1), ("c", 1)])).await.0, "c");
        let (field, why) = refused(parts(&[("a", 1), ("a", 1)])).await;
        assert!(field == "a" && why.contains("second"), "{field}: {why}");
        let (field, why) = refused(parts(&[("a", 101)])).await;
        assert!(field == "a" && why.contains("101") && why.contains("100"), "{field}: {why}");
        let mut cut = parts(&[("a", 1), ("b", 1)]);
        cut.pop();
        assert_eq!(refused(cut).await.0, "b");
        let mut twice = parts(&[("a", 1)]);
        twice.push(Some(Ok("head")));
        assert_eq!(refused(twice).await.0, "header");
        let mut empty = parts(&[("a", 1)]);
        empty.push(None);
        assert_eq!(refused(empty).await.0, "body");
    }

    #[tokio::test]
    async fn a_reply_comes_back_as_it_was_sent() {
        let sent = vec![tensor("x", 90), tensor("y", 5)];
        let messages = reply(sent.clone(), wrap, Some(Ok("done")));
        let read = ReplyReader::new(messages, Limits::new(100, 2), split).all().await.unwrap();
        assert_eq!(read, (sent, "done"));
    }

    #[tokio::test]
    async fn a_reply_without_its_end_is_unavailable() {
        let messages = stream::iter(tensor("x", 5).parts().map(wrap).map(Ok));
        let error = ReplyReader::new(messages, Limits::new(100, 2), split).all().await.unwrap_err();
        assert_eq!(error.code_name(), "UNAVAILABLE");
    }

    #[tokio::test]
    async fn a_streamed_reply_arrives_in_order_and_ends_with_the_works_error() {
        let worker = DeviceWorker::spawn(&crate::hardware::DeviceConfig::cpu(), 2).unwrap();
        for fails in [false, true] {
            let messages = streamed_reply(1, wrap, |outbox| {
                worker.try_submit(move |cancel| {
                    for i in 1..=5 {
                        outbox.send(tensor("x", i), cancel)?;
                    }
                    if fails { Err(ServiceError::not_found("nothing")) } else { Ok(Some(Ok("done"))) }
                })
            })
            .unwrap();
            let mut reader = ReplyReader::new(messages, Limits::new(100, 9), split);
            for i in 1..=5 {
                assert_eq!(reader.next().await.unwrap().unwrap().shape(), &[i]);
            }
            match reader.next().await {
                Ok(None) => assert_eq!((fails, reader.summary().unwrap()), (false, "done")),
                other => assert!(fails && other == Err(ServiceError::not_found("nothing")), "{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_reader_that_leaves_frees_the_device() {
        let worker = DeviceWorker::spawn(&crate::hardware::DeviceConfig::cpu(), 2).unwrap();
        let mut messages = streamed_reply(1, wrap, |outbox| {
            worker.try_submit(move |cancel| {
                loop {
                    outbox.send(tensor("x", 1), cancel)?;
                }
            })
        })
        .unwrap();
        messages.next().await.unwrap().unwrap();
        drop(messages);
        let next = worker.try_submit(|_| Ok(1)).unwrap();
        assert_eq!(tokio::time::timeout(Duration::from_secs(20), next).await.unwrap(), Ok(1));
    }
}
