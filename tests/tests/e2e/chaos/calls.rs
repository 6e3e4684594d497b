//! A caller that does not give up, and what it asks for.

use std::{fs, path::Path, time::Duration};

use proto::v1::{
    CreateGenerationRequest, DownloadVideoRequest, Generation, GenerationSpec, GenerationState, GetGenerationRequest,
    ListGenerationsRequest, WatchGenerationRequest, avatar_service_client::AvatarServiceClient,
    create_generation_request::Body,
};
use tonic::{Code, Status, transport::Channel};

use crate::{
    inputs::{portrait, tone},
    stack::video_stream,
};

/// How long anything may take on a slow machine.
pub const LONG: Duration = Duration::from_secs(240);
/// How often is looked.
const LOOK: Duration = Duration::from_millis(50);

/// What a generation is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Another number asks for another video of another recording.
    pub number: u64,
    /// Denoise steps.
    pub steps: u32,
}

impl Job {
    /// A short one.
    pub fn new(number: u64) -> Self {
        Self { number, steps: 4 }
    }

    fn messages(&self, key: &str) -> Vec<CreateGenerationRequest> {
        let spec = GenerationSpec {
            prompt: "A person speaks.".into(),
            seed: Some(self.number),
            steps: Some(self.steps),
            size: Some(64),
            ..GenerationSpec::default()
        };
        let recording = tone(0.2 + self.number as f32 * 2e-4, 16_000);
        let bodies = [Body::Spec(spec), Body::PictureChunk(portrait()), Body::AudioChunk(recording)];
        let mut messages: Vec<_> = bodies
            .into_iter()
            .map(|body| CreateGenerationRequest { body: Some(body), idempotency_key: String::new() })
            .collect();
        messages[0].idempotency_key = key.to_owned();
        messages
    }
}

/// How far a generation is: it grows with each step and each change of the state.
pub fn advance(generation: &Generation) -> u64 {
    let step = generation.progress.map_or(0, |progress| progress.step);
    generation.state() as u64 + u64::from(step)
}

/// Whether it runs or will run.
pub fn is_unfinished(generation: &Generation) -> bool {
    (generation.state() as i32) < GenerationState::Completed as i32
}

/// Looks until something is so.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let looking = async {
        while !holds().await {
            tokio::time::sleep(LOOK).await;
        }
    };
    assert!(tokio::time::timeout(LONG, looking).await.is_ok(), "waited in vain until {what}");
}

/// A client of one gateway.
#[derive(Debug, Clone)]
pub struct Caller(AvatarServiceClient<Channel>);

impl Caller {
    /// Connects.
    pub async fn connect(url: &str) -> Self {
        let channel = Channel::from_shared(url.to_owned()).unwrap().connect().await.unwrap();
        Self(AvatarServiceClient::new(channel).max_decoding_message_size(8 << 20))
    }

    /// Asks for a generation once; gives its id.
    pub async fn try_create(&mut self, job: &Job, key: &str) -> Result<String, Status> {
        let created = self.0.create_generation(tokio_stream::iter(job.messages(key))).await?;
        Ok(created.into_inner().generation.unwrap().generation_id)
    }

    /// Asks for a generation with a key, again while the records are away.
    pub async fn create(&self, job: &Job, key: &str) -> String {
        self.insist(async |caller| caller.try_create(job, key).await).await
    }

    /// A generation as it stands.
    pub async fn get(&self, id: &str) -> Generation {
        let request = GetGenerationRequest { generation_id: id.to_owned() };
        self.insist(async |caller| Ok(caller.0.get_generation(request.clone()).await?.into_inner().generation.unwrap()))
            .await
    }

    /// A generation once it has ended.
    pub async fn ended(&self, id: &str) -> Generation {
        until("a generation has ended", async || !is_unfinished(&self.get(id).await)).await;
        self.get(id).await
    }

    /// All generations.
    pub async fn list(&self) -> Vec<Generation> {
        let (mut all, mut page_token) = (Vec::new(), String::new());
        loop {
            let request =
                ListGenerationsRequest { page_token: page_token.clone(), ..ListGenerationsRequest::default() };
            let page =
                self.insist(async |caller| Ok(caller.0.list_generations(request.clone()).await?.into_inner())).await;
            all.extend(page.generations);
            if page.next_page_token.is_empty() {
                return all;
            }
            page_token = page.next_page_token;
        }
    }

    /// Stops a generation; gives it as it is then.
    pub async fn cancel(&self, id: &str) -> Generation {
        let request = proto::v1::CancelGenerationRequest { generation_id: id.to_owned() };
        self.insist(async |caller| {
            Ok(caller.0.cancel_generation(request.clone()).await?.into_inner().generation.unwrap())
        })
        .await
    }

    /// Holds that an ended generation was completed once, and that its events are numbered without gaps.
    pub async fn check_events(&self, id: &str) {
        let request = WatchGenerationRequest { generation_id: id.to_owned(), from_number: 0 };
        let mut client = self.0.clone();
        let mut answers = client.watch_generation(request).await.unwrap().into_inner();
        let (mut next, mut completed, mut last) = (1, 0, GenerationState::Unspecified);
        while let Some(answer) = answers.message().await.unwrap() {
            let Some(event) = answer.event else { continue };
            assert_eq!(event.number, next, "{id}");
            next += 1;
            last = event.state();
            completed += usize::from(last == GenerationState::Completed);
        }
        assert_eq!((completed, last), (1, GenerationState::Completed), "{id}");
    }

    /// The longest time between two steps of an ended generation.
    pub async fn longest_step(&self, id: &str) -> Duration {
        let request = WatchGenerationRequest { generation_id: id.to_owned(), from_number: 0 };
        let mut answers = self.0.clone().watch_generation(request).await.unwrap().into_inner();
        let (mut longest, mut last) = (0, None);
        while let Some(answer) = answers.message().await.unwrap() {
            let Some(event) = answer.event.filter(|event| event.state() == GenerationState::Denoising) else {
                continue;
            };
            longest = longest.max(event.unix_ms - last.replace(event.unix_ms).unwrap_or(event.unix_ms));
        }
        Duration::from_millis(longest)
    }

    /// The pictures of a completed generation's video.
    pub async fn video(&self, id: &str, folder: &Path) -> Vec<u8> {
        let request = DownloadVideoRequest { generation_id: id.to_owned(), offset: 0 };
        let mut client = self.0.clone();
        let mut answers = client.download_video(request).await.unwrap().into_inner();
        let mut bytes = Vec::new();
        while let Some(answer) = answers.message().await.unwrap() {
            bytes.extend(answer.data);
        }
        let path = folder.join("video.mp4");
        fs::write(&path, bytes).unwrap();
        video_stream(&path)
    }

    /// Asks again while the gateway cannot reach its records; nothing else may go wrong.
    async fn insist<T>(&self, mut call: impl AsyncFnMut(&mut Self) -> Result<T, Status>) -> T {
        let asking = async {
            loop {
                match call(&mut self.clone()).await {
                    Ok(answer) => return answer,
                    Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(LONG, asking).await.expect("the gateway does not answer")
    }
}
