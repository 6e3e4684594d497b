//! The commands that talk to a server, over gRPC.

pub mod flags;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use gateway::fault::code_name;
use proto::v1::{
    CancelGenerationRequest, CreateGenerationRequest, DeleteGenerationRequest, DownloadVideoRequest, Generation,
    GenerationEvent, GenerationSpec, GenerationState, GetGenerationRequest, GetPreviewRequest, ListGenerationsRequest,
    Outcome, WatchGenerationRequest, avatar_service_client::AvatarServiceClient, create_generation_request::Body,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tonic::{Code, Request, Status, metadata::MetadataValue, transport::Channel};

use self::flags::{DownloadFlags, ListFlags, OneFlags, OrderFlags, ServerFlags, SubmitFlags, WatchFlags};
use crate::{
    failure::{FAILED, Failure},
    generate::{CHUNK, read_files},
    output::{Output, Part},
    progress::{Progress, print_line, print_text, state_name},
    signals::Signals,
};

/// How long a server may be gone while a generation is followed or a video fetched.
const AWAY: Duration = Duration::from_secs(120);
/// How long to wait before it is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// Generations of one page.
const PAGE: usize = 100;

pub(crate) type Client = AvatarServiceClient<Channel>;
/// The messages of a request that is handed in.
pub(crate) type Creation = tokio_stream::Iter<std::vec::IntoIter<CreateGenerationRequest>>;

fn connect(server: &ServerFlags) -> Result<Client, Failure> {
    connect_to(&server.server)
}

/// A client of the server at an address.
///
/// Errors: it is no address.
pub(crate) fn connect_to(server: &str) -> Result<Client, Failure> {
    let channel = service_kit::client::connect(server);
    channel.map(AvatarServiceClient::new).map_err(|error| Failure::input("server", error.to_string()))
}

/// What the server answered instead of doing it.
pub(crate) fn refused(status: &Status) -> Failure {
    let failure = Failure { advice: None, ..Failure::of_status(status) };
    match status.code() {
        Code::InvalidArgument => failure,
        code => Failure { code: code_name(code), message: status.message().to_owned(), ..failure },
    }
}

/// Hands a request in and prints the generation's id.
pub async fn submit(flags: &SubmitFlags) -> Result<(), Failure> {
    let (picture, audio) = read_files(&flags.request)?;
    let order = (flags.idempotency_key.as_str(), &flags.order);
    let request = creation(flags.request.spec(), (&picture, &audio), order)?;
    let answer = connect(&flags.server)?.create_generation(request).await.map_err(|status| refused(&status))?;
    let generation = answer.into_inner().generation.unwrap_or_default();
    if flags.server.json {
        print_line(&shown(&generation));
    } else {
        print_text(&generation.generation_id);
    }
    Ok(())
}

/// The call that hands a request in, under a key of the caller's choice.
///
/// Errors: the caller's name, the label or the address to call back has other than visible ASCII characters.
pub(crate) fn creation(
    spec: GenerationSpec,
    (picture, audio): (&[u8], &[u8]),
    (key, order): (&str, &OrderFlags),
) -> Result<Request<Creation>, Failure> {
    let mut bodies = vec![Body::Spec(spec)];
    bodies.extend(picture.chunks(CHUNK).map(|data| Body::PictureChunk(data.to_vec())));
    bodies.extend(audio.chunks(CHUNK).map(|data| Body::AudioChunk(data.to_vec())));
    let mut key = Some(key.to_owned());
    let messages: Vec<_> = bodies
        .into_iter()
        .map(|body| CreateGenerationRequest { body: Some(body), idempotency_key: key.take().unwrap_or_default() })
        .collect();
    let mut request = Request::new(tokio_stream::iter(messages));
    for (name, field, text) in [("avatar-caller", "caller", &order.caller), ("avatar-label", "label", &order.label)] {
        let text = MetadataValue::try_from(text);
        let text = text.map_err(|_| Failure::input(field, "it has other than visible ASCII characters"))?;
        request.metadata_mut().insert(name, text);
    }
    request.metadata_mut().insert("avatar-priority", MetadataValue::from(order.priority));
    if let Some(seconds) = order.deadline {
        request.metadata_mut().insert("avatar-deadline", MetadataValue::from(seconds));
    }
    if !order.webhook.is_empty() {
        let webhook = MetadataValue::try_from(&order.webhook);
        let webhook = webhook.map_err(|_| Failure::input("webhook", "it has other than visible ASCII characters"))?;
        request.metadata_mut().insert("avatar-webhook", webhook);
    }
    Ok(request)
}

/// Prints a generation as it stands.
pub async fn status(flags: &OneFlags) -> Result<(), Failure> {
    let request = GetGenerationRequest { generation_id: flags.id.clone() };
    let answer = connect(&flags.server)?.get_generation(request).await.map_err(|status| refused(&status))?;
    print(&flags.server, &answer.into_inner().generation.unwrap_or_default());
    Ok(())
}

/// Stops a generation and prints it as it is then.
pub async fn cancel(flags: &OneFlags) -> Result<(), Failure> {
    let request = CancelGenerationRequest { generation_id: flags.id.clone() };
    let answer = connect(&flags.server)?.cancel_generation(request).await.map_err(|status| refused(&status))?;
    print(&flags.server, &answer.into_inner().generation.unwrap_or_default());
    Ok(())
}

/// Removes a generation.
pub async fn delete(flags: &OneFlags) -> Result<(), Failure> {
    let request = DeleteGenerationRequest { generation_id: flags.id.clone() };
    connect(&flags.server)?.delete_generation(request).await.map_err(|status| refused(&status))?;
    if flags.server.json {
        print_line(&json!({ "generation_id": flags.id, "deleted": true }));
    }
    Ok(())
}

/// Prints a server's generations, a line each.
pub async fn list(flags: &ListFlags) -> Result<(), Failure> {
    let mut client = connect(&flags.server)?;
    let (mut left, mut page_token) = (flags.limit, String::new());
    while left > 0 {
        let request = ListGenerationsRequest {
            page_size: left.min(PAGE) as u32,
            page_token,
            states: flags.state.iter().map(|&state| GenerationState::from(state).into()).collect(),
            oldest_first: flags.oldest_first,
            caller: flags.caller.clone(),
            label: flags.label.clone(),
            created_from_unix_ms: flags.created_from.saturating_mul(1000),
            created_before_unix_ms: flags.created_before.saturating_mul(1000),
        };
        let page = client.list_generations(request).await.map_err(|status| refused(&status))?.into_inner();
        page.generations.iter().for_each(|generation| print(&flags.server, generation));
        left -= page.generations.len().min(left);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Follows a generation to its end and shows how it ended; gives the exit code. A server that restarts meanwhile is
/// waited for, and a signal leaves the generation running.
///
/// Errors: signals cannot be caught, or the folder for previews cannot be made.
pub async fn watch(flags: &WatchFlags) -> Result<u8, Failure> {
    let mut signals = Signals::catch()?;
    if let Some(folder) = &flags.previews {
        let wrong = |error| Failure::input("previews", format!("{}: {error}", folder.display()));
        std::fs::create_dir_all(folder).map_err(wrong)?;
    }
    let mut progress = Progress::new(flags.server.json, false);
    let mut next = flags.from.max(1);
    let followed = tokio::select! {
        followed = watched(flags, &mut next, &mut progress) => followed,
        () = signals.next() => {
            let back = format!("avatar watch {} --server {} --from {next}", flags.id, flags.server.server);
            let message = format!("the generation goes on; to return: {back}");
            Err(Failure { message, ..Failure::interrupted() })
        }
    };
    match followed {
        Ok(event) => {
            progress.clear();
            if flags.server.json {
                print_line(&json!({ "event": "completed", "generation_id": event.generation_id }));
            } else {
                print_text("completed");
            }
            Ok(0)
        }
        Err(failure) => {
            progress.failed(&failure);
            Ok(failure.exit)
        }
    }
}

async fn watched(flags: &WatchFlags, next: &mut u64, progress: &mut Progress) -> Result<GenerationEvent, Failure> {
    let client = connect(&flags.server)?;
    let (tell, mut told) = mpsc::unbounded_channel();
    let following = follow(client.clone(), &flags.id, next, move |event| {
        progress.event(event);
        if let Some(preview) = &event.preview {
            // Nobody listens any more once a preview could not be written, and then this has ended too.
            let _ = tell.send(preview.step);
        }
    });
    let saving = async {
        while let Some(step) = told.recv().await {
            if let Some(folder) = &flags.previews {
                save_preview(client.clone(), &flags.id, step, folder).await?;
            }
        }
        Ok(())
    };
    let (last, ()) = tokio::try_join!(following, saving)?;
    Ok(last)
}

/// Writes the preview after a step into a folder; one that is gone with its generation is left out.
///
/// Errors: the server refuses or stays away, or the disk refuses.
async fn save_preview(mut client: Client, id: &str, step: u32, folder: &Path) -> Result<(), Failure> {
    let mut away = None;
    let data = loop {
        let request = GetPreviewRequest { generation_id: id.to_owned(), step };
        match client.get_preview(request).await {
            Ok(answer) => break answer.into_inner().data,
            Err(status) if status.code() == Code::NotFound => return Ok(()),
            Err(status) => wait(&status, &mut away).await?,
        }
    };
    let path = folder.join(format!("step-{step:03}.jpg"));
    let failed = |error| Failure::local("cannot write a preview", format!("{}: {error}", path.display()));
    tokio::fs::write(&path, data).await.map_err(failed)
}

/// Shows a generation's events from number `next` up to the last one, which it gives. A server that is away for a
/// while is waited for.
///
/// Errors: the generation failed or was cancelled, or the server refuses or stays away.
pub(crate) async fn follow(
    mut client: Client,
    id: &str,
    next: &mut u64,
    mut show: impl FnMut(&GenerationEvent),
) -> Result<GenerationEvent, Failure> {
    let mut away = None;
    loop {
        let request = WatchGenerationRequest { generation_id: id.to_owned(), from_number: *next };
        let broken = match client.watch_generation(request).await {
            Err(status) => status,
            Ok(answers) => {
                let mut answers = answers.into_inner();
                loop {
                    match answers.message().await {
                        Err(status) => break status,
                        Ok(None) => break Status::unavailable("the server ended the events"),
                        Ok(Some(answer)) => {
                            away = None;
                            let Some(event) = answer.event else { continue };
                            *next = event.number + 1;
                            if let Some(ended) = end_of(&event) {
                                return ended.map(|()| event);
                            }
                            show(&event);
                        }
                    }
                }
            }
        };
        wait(&broken, &mut away).await?;
    }
}

/// How a generation ended, if this event is its end.
fn end_of(event: &GenerationEvent) -> Option<Result<(), Failure>> {
    let ended = |code, message: String, field: Option<String>| {
        Some(Err(Failure { code, message, field, exit: FAILED, advice: None }))
    };
    match event.state() {
        GenerationState::Completed => Some(Ok(())),
        GenerationState::Cancelled => ended("CANCELLED", "the generation was cancelled".to_owned(), None),
        GenerationState::Failed => {
            let failure = event.failure.clone().unwrap_or_default();
            let fault = gateway::fault::Fault::from_failure(&failure);
            ended(fault.name(), failure.message, fault.field().map(str::to_owned))
        }
        _ => None,
    }
}

/// Waits a moment for a server that cannot be reached.
///
/// Errors: it refused for another reason, or it has been away for too long.
pub(crate) async fn wait(status: &Status, away: &mut Option<Instant>) -> Result<(), Failure> {
    let lost = status.code() == Code::Unavailable || std::error::Error::source(status).is_some();
    if !lost || away.get_or_insert_with(Instant::now).elapsed() > AWAY {
        return Err(refused(status));
    }
    tokio::time::sleep(AGAIN).await;
    Ok(())
}

/// Fetches a generation's video; after a break it goes on where it stopped.
pub async fn download(flags: &DownloadFlags) -> Result<(), Failure> {
    let mut client = connect(&flags.server)?;
    let output = Output::check(&flags.out, &[])?;
    let request = GetGenerationRequest { generation_id: flags.id.clone() };
    let answer = client.get_generation(request).await.map_err(|status| refused(&status))?.into_inner();
    let outcome = answer.generation.and_then(|generation| generation.outcome).unwrap_or_default();
    fetch(&mut client, &flags.id, output.begin()?, &outcome).await?;
    if flags.server.json {
        print_line(&json!({ "generation_id": flags.id, "path": flags.out, "bytes": outcome.video_bytes }));
    } else {
        print_text(&flags.out.display().to_string());
    }
    Ok(())
}

/// Fetches the video that `outcome` tells of into a file; after a break it goes on where it stopped.
///
/// Errors: the server refuses or stays away, or the disk refuses.
pub(crate) async fn fetch(client: &mut Client, id: &str, mut part: Part, outcome: &Outcome) -> Result<(), Failure> {
    let (mut offset, mut away) = (0, None);
    loop {
        let request = DownloadVideoRequest { generation_id: id.to_owned(), offset };
        let broken = match client.download_video(request).await {
            Err(status) => Some(status),
            Ok(answers) => {
                let mut answers = answers.into_inner();
                loop {
                    match answers.message().await {
                        Err(status) => break Some(status),
                        Ok(None) => break None,
                        Ok(Some(answer)) => {
                            away = None;
                            part.write(&answer.data)?;
                            offset += answer.data.len() as u64;
                        }
                    }
                }
            }
        };
        match broken {
            None => return part.finish(outcome.video_bytes, outcome.video_crc32c),
            Some(status) => wait(&status, &mut away).await?,
        }
    }
}

fn print(server: &ServerFlags, generation: &Generation) {
    if server.json {
        return print_line(&shown(generation));
    }
    let progress = generation.progress.unwrap_or_default();
    let note = match (&generation.failure, generation.state()) {
        (Some(failure), _) => format!("{}: {}", failure.code, failure.message),
        (None, GenerationState::Queued) => format!("place {}", generation.queue_position),
        _ => format!("step {} of {}", progress.step, progress.steps),
    };
    let state = state_name(generation.state());
    print_text(&format!("{}  {state:<10} {:>3.0} %  {note}", generation.generation_id, progress.percent));
}

/// A generation as JSON.
fn shown(generation: &Generation) -> Value {
    let progress = generation.progress.unwrap_or_default();
    let failure =
        generation.failure.as_ref().map(|f| json!({ "code": f.code, "message": f.message, "field": f.field }));
    let devices: Vec<Value> = generation
        .devices
        .iter()
        .map(|used| json!({ "device": used.device, "device_id": used.device_id, "seconds": used.seconds }))
        .collect();
    json!({
        "generation_id": generation.generation_id,
        "state": state_name(generation.state()),
        "caller": generation.caller,
        "label": generation.label,
        "created_unix_ms": generation.created_unix_ms,
        "ended_unix_ms": (generation.ended_unix_ms > 0).then_some(generation.ended_unix_ms),
        "percent": progress.percent,
        "step": progress.step,
        "steps": progress.steps,
        "remaining_seconds": progress.remaining_seconds,
        "queue_position": (generation.queue_position > 0).then_some(generation.queue_position),
        "estimated_start_unix_ms": generation.estimated_start_unix_ms,
        "frames": generation.frames,
        "width": generation.width,
        "height": generation.height,
        "failure": failure,
        "devices": devices,
    })
}
