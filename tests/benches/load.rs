//! What a gateway answers to many callers at once, on stages that only pretend: creations, watchers and lists for some time.
//! Prints tables for docs/benchmarks/reliability.md: `make load`. Ends with 1 where anything else was answered than OK and
//! RESOURCE_EXHAUSTED, a generation did not complete, or the gateway's memory grew.

// The stages of the gateway's own tests.
#[allow(dead_code)]
#[path = "../../gateway/src/fakes.rs"]
mod fakes;
#[allow(dead_code)]
#[path = "../tests/e2e/inputs.rs"]
mod inputs;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use clap::Parser;
use gateway::{Gateway, Listeners, Options, Stages, fault};
use proto::v1::{
    CreateGenerationRequest, GenerationSpec, GenerationState, ListGenerationsRequest, WatchGenerationRequest,
    avatar_service_client::AvatarServiceClient, create_generation_request::Body,
};
use service_kit::server;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};
use tonic::{Code, Status, transport::Channel};

/// What a caller waits for after a refusal.
const REFUSED_WAIT: Duration = Duration::from_millis(100);
/// How often the gateway's memory is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How often the pretended stages forget what they saw, so that the memory is the gateway's.
const FORGET: Duration = Duration::from_millis(100);
/// How much more the gateway may hold at the end than at the start, in bytes and as a part of it: SQLite's cache of pages
/// and what the allocator keeps have a limit of their own, which a short time does not reach.
const GROWTH_BYTES: u64 = 16 << 20;
const GROWTH_SHARE: u64 = 10;
/// The parts of the time whose medians of memory are compared: a tenth each, the first one after caches have filled.
const PARTS: [(&str, usize); 3] = [("start", 1), ("middle", 5), ("end", 9)];

#[derive(Parser)]
struct Arguments {
    /// How long, in seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(5..))]
    seconds: u64,
    /// Callers that create a generation and watch it to its end, again and again; the gateway takes 18 at a time.
    #[arg(long, default_value_t = 24)]
    callers: u32,
    /// Callers that list, again and again.
    #[arg(long, default_value_t = 4)]
    listers: u32,
    /// Be the gateway, with this data folder.
    #[arg(long, hide = true)]
    serve: Option<PathBuf>,
    /// What `cargo bench` says to every program that it starts.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What the callers saw.
#[derive(Default)]
struct Seen {
    /// Milliseconds of each call that was answered, by its name.
    took: BTreeMap<&'static str, Vec<f64>>,
    /// Calls that were refused with RESOURCE_EXHAUSTED, by their name.
    refused: BTreeMap<&'static str, usize>,
    /// Generations that were completed.
    completed: usize,
    /// Whatever else there was, and how often.
    wrong: BTreeMap<String, usize>,
}

impl Seen {
    fn is_wrong(&mut self, what: String) {
        *self.wrong.entry(what).or_default() += 1;
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match &arguments.serve {
        Some(folder) => serve(folder).await,
        None => return measure(&arguments).await,
    }
    ExitCode::SUCCESS
}

/// Serves until it is killed.
async fn serve(folder: &Path) {
    let script = Arc::new(fakes::Script::default());
    let options = Options { data_dir: folder.to_owned(), ..Options::default() };
    let gateway = Gateway::new(&options, fakes::start(&script)).await.unwrap();
    tokio::spawn(async move {
        loop {
            script.passes.lock().unwrap().clear();
            script.decoded.lock().unwrap().clear();
            script.decodes.lock().unwrap().clear();
            tokio::time::sleep(FORGET).await;
        }
    });
    let free = "127.0.0.1:0".parse().unwrap();
    let (grpc, address) = server::bind(free).await.unwrap();
    let (http, _) = server::bind(free).await.unwrap();
    server::announce(&[("grpc", address)]);
    gateway::serve(gateway, Listeners { grpc, http }, Duration::ZERO, std::future::pending()).await.unwrap();
}

/// Starts the gateway as a process of its own; gives it and its address.
async fn start(folder: &Path) -> (Child, String) {
    let mut gateway = Command::new(std::env::current_exe().unwrap())
        .arg("--serve")
        .arg(folder)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(gateway.stdout.take().unwrap()).lines();
    let ready = lines.next_line().await.unwrap().expect("the gateway ended before it was ready");
    let address = ready.split_whitespace().find_map(|word| word.strip_prefix("grpc=")).unwrap();
    (gateway, format!("http://{address}"))
}

async fn measure(arguments: &Arguments) -> ExitCode {
    let folder = tempfile::tempdir().unwrap();
    let (gateway, url) = start(folder.path()).await;
    let seen = Arc::new(Mutex::new(Seen::default()));
    let until = Instant::now() + Duration::from_secs(arguments.seconds);
    let mut tasks = Vec::new();
    for number in 0..arguments.callers {
        tasks.push(tokio::spawn(create_and_watch(client(&url).await, Arc::clone(&seen), u64::from(number), until)));
    }
    for _ in 0..arguments.listers {
        tasks.push(tokio::spawn(list(client(&url).await, Arc::clone(&seen), until)));
    }
    let mut resident = Vec::new();
    while Instant::now() < until {
        resident.push(resident_bytes(gateway.id().expect("the gateway has ended")));
        tokio::time::sleep(LOOK).await;
    }
    for task in tasks {
        task.await.unwrap();
    }
    let seen = seen.lock().unwrap();
    report(arguments, &seen, &resident)
}

/// A client with a connection of its own.
async fn client(url: &str) -> AvatarServiceClient<Channel> {
    let channel = Channel::from_shared(url.to_owned()).unwrap().connect().await.unwrap();
    AvatarServiceClient::new(channel).max_decoding_message_size(8 << 20)
}

/// Creates generations, and watches each that is accepted to its end.
async fn create_and_watch(
    mut client: AvatarServiceClient<Channel>,
    seen: Arc<Mutex<Seen>>,
    number: u64,
    until: Instant,
) {
    let (picture, audio) = (inputs::portrait(), inputs::tone(0.2, 16_000));
    let mut seed = number << 32;
    while Instant::now() < until {
        seed += 1;
        let spec = GenerationSpec { seed: Some(seed), steps: Some(4), size: Some(64), ..GenerationSpec::default() };
        let bodies = [Body::Spec(spec), Body::PictureChunk(picture.clone()), Body::AudioChunk(audio.clone())];
        let messages = bodies.map(|body| CreateGenerationRequest { body: Some(body), idempotency_key: String::new() });
        let began = Instant::now();
        let created = client.create_generation(tokio_stream::iter(messages)).await;
        let Some(created) = answered(&seen, "create", began, created) else {
            tokio::time::sleep(REFUSED_WAIT).await;
            continue;
        };
        let generation_id = created.into_inner().generation.unwrap_or_default().generation_id;
        let ended = watch(&mut client, &seen, generation_id).await;
        let mut seen = seen.lock().unwrap();
        match ended {
            Ok(GenerationState::Completed) => seen.completed += 1,
            Ok(state) => seen.is_wrong(format!("a generation ended as {}", state.as_str_name())),
            Err(status) => seen.is_wrong(format!("watch: {:?}: {}", status.code(), status.message())),
        }
    }
}

/// Watches a generation to its end, and gives the last state.
async fn watch(
    client: &mut AvatarServiceClient<Channel>,
    seen: &Mutex<Seen>,
    generation_id: String,
) -> Result<GenerationState, Status> {
    let began = Instant::now();
    let request = WatchGenerationRequest { generation_id, from_number: 0 };
    let mut events = client.watch_generation(request).await?.into_inner();
    let mut state = GenerationState::Unspecified;
    let mut first = true;
    while let Some(answer) = events.message().await? {
        if std::mem::take(&mut first) {
            answered(seen, "watch, to the first event", began, Ok(()));
        }
        state = answer.event.map_or(state, |event| event.state());
    }
    answered(seen, "watch, to the end", began, Ok(()));
    Ok(state)
}

async fn list(mut client: AvatarServiceClient<Channel>, seen: Arc<Mutex<Seen>>, until: Instant) {
    while Instant::now() < until {
        let began = Instant::now();
        let listed = client.list_generations(ListGenerationsRequest::default()).await;
        if answered(&seen, "list, a page of 20", began, listed).is_none() {
            tokio::time::sleep(REFUSED_WAIT).await;
        }
    }
}

/// Notes how long a call took, or how it was refused.
fn answered<T>(seen: &Mutex<Seen>, name: &'static str, began: Instant, answer: Result<T, Status>) -> Option<T> {
    let mut seen = seen.lock().unwrap();
    match answer {
        Ok(answer) => {
            seen.took.entry(name).or_default().push(began.elapsed().as_secs_f64() * 1e3);
            return Some(answer);
        }
        Err(status) if status.code() == Code::ResourceExhausted => *seen.refused.entry(name).or_default() += 1,
        Err(status) => seen.is_wrong(format!("{name}: {:?}: {}", status.code(), status.message())),
    }
    None
}

/// Bytes of a process that are in memory.
fn resident_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("the gateway has ended");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Prints what was seen, and judges it.
fn report(arguments: &Arguments, seen: &Seen, resident: &[u64]) -> ExitCode {
    println!("| call | answered | a second | p50, ms | p99, ms | RESOURCE_EXHAUSTED |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    for (name, took) in &seen.took {
        let mut took = took.clone();
        took.sort_by(f64::total_cmp);
        let percentile = |percent: usize| took[(took.len() * percent / 100).min(took.len() - 1)];
        let (count, rate) = (took.len(), took.len() as f64 / arguments.seconds as f64);
        let refused = seen.refused.get(name).copied().unwrap_or_default();
        println!("| {name} | {count} | {rate:.1} | {:.1} | {:.1} | {refused} |", percentile(50), percentile(99));
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let median = |part: usize| {
        let (from, to) = (resident.len() * part / 10, resident.len() * (part + 1) / 10);
        let mut values = resident.get(from..to.max(from + 1)).unwrap_or(resident).to_vec();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let held = PARTS.map(|(_, part)| median(part));
    let peak = resident.iter().max().copied().unwrap_or_default();
    let most = held[0] + held[0] / GROWTH_SHARE + GROWTH_BYTES;
    println!("\n| | |\n| --- | ---: |");
    println!("| seconds | {} |", arguments.seconds);
    println!("| callers that create and watch | {} |", arguments.callers);
    println!("| callers that list | {} |", arguments.listers);
    println!("| generations completed | {} |", seen.completed);
    println!("| other answers than OK and RESOURCE_EXHAUSTED | {} |", seen.wrong.values().sum::<usize>());
    for ((name, _), bytes) in PARTS.into_iter().zip(held) {
        println!("| resident memory at the {name}, MiB | {:.1} |", mib(bytes));
    }
    println!("| most resident memory, MiB | {:.1} |", mib(peak));
    println!("| allowed at the end, MiB | {:.1} |", mib(most));
    for (what, times) in &seen.wrong {
        eprintln!("{times} times: {what}");
    }
    let grew = held[2] > most;
    if grew {
        eprintln!("the gateway's memory grew from {:.1} to {:.1} MiB", mib(held[0]), mib(held[2]));
    }
    let idle = seen.completed == 0;
    if idle {
        eprintln!("no generation was completed");
    }
    if seen.wrong.is_empty() && !grew && !idle { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
