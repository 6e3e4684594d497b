//! The five stages as the gateway sees them: typed calls, tensors in, tensors out.

use std::{collections::HashMap, time::Duration};

use futures::{Stream, StreamExt as _, stream};
use http::Uri;
use proto::{
    tensor::{HostTensor, TensorReader},
    v1::{
        self, DecodeLatentsHeader, DeviceUse, EncodeAudioHeader, EncodePromptHeader, EncodeReferenceHeader,
        GenerationDefaults, MemoryReport, OpenSessionHeader, PredictHeader, Stage, TensorPart,
        audio_encoder_service_client::AudioEncoderServiceClient, diffusion_service_client::DiffusionServiceClient,
        image_encoder_service_client::ImageEncoderServiceClient, stage_service_client::StageServiceClient,
        text_encoder_service_client::TextEncoderServiceClient, vae_decode_service_client::VaeDecodeServiceClient,
    },
};
use service_kit::ServiceError;
use tonic::{Response, Status, Streaming, transport::Channel};

use crate::fault::{Fault, Kind};

/// Most bytes of one tensor that a stage may answer with.
const TENSOR_BYTES: u64 = 4 << 30;
/// How long a stage may take to say what it is.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a stage may take to give its memory back. What runs on its device comes first; a stage that takes longer is
/// not the one whose memory helps now.
const UNLOAD_TIMEOUT: Duration = Duration::from_secs(120);

/// Which stages may be unloaded for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// Those that no generation has a session on.
    Nobodys,
    /// All; generations open their sessions again and compute again what these kept.
    Anybodys,
}

/// Connections to the five stages.
#[derive(Debug, Clone)]
pub struct Stages {
    /// Speech to features.
    pub audio_encoder: Channel,
    /// Prompt to text states.
    pub text_encoder: Channel,
    /// Picture to reference latents.
    pub image_encoder: Channel,
    /// Latents to velocities.
    pub diffusion: Channel,
    /// Latents to frames.
    pub vae_decode: Channel,
    /// More of these, tried in this order where it cannot be reached, has no room or runs out of memory.
    pub spare_decoders: Vec<Channel>,
}

/// What decides a stage's answers besides its inputs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// Its checkpoint: another one gives other answers. Empty where the stage cannot say it.
    pub checkpoint: String,
    /// Its version, its kind of device and its type of numbers: others give answers that differ in the last place.
    pub manner: String,
}

/// Where the five stages are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageUris {
    /// Speech to features.
    pub audio_encoder: Uri,
    /// Prompt to text states.
    pub text_encoder: Uri,
    /// Picture to reference latents.
    pub image_encoder: Uri,
    /// Latents to velocities.
    pub diffusion: Uri,
    /// Latents to frames.
    pub vae_decode: Uri,
    /// More of these, in the order in which they are tried.
    pub spare_decoders: Vec<Uri>,
}

impl Stages {
    /// Connections that are made at the first call and made again after a loss. Call it inside a tokio runtime.
    ///
    /// Errors: an address is not one.
    pub fn connect(uris: &StageUris) -> Result<Self, ServiceError> {
        let channel = |uri: &Uri| service_kit::client::connect(&uri.to_string());
        Ok(Self {
            audio_encoder: channel(&uris.audio_encoder)?,
            text_encoder: channel(&uris.text_encoder)?,
            image_encoder: channel(&uris.image_encoder)?,
            diffusion: channel(&uris.diffusion)?,
            vae_decode: channel(&uris.vae_decode)?,
            spare_decoders: uris.spare_decoders.iter().map(channel).collect::<Result<_, _>>()?,
        })
    }

    /// The defaults that the diffusion stage's checkpoint asks for.
    pub async fn defaults(&self) -> Result<GenerationDefaults, Fault> {
        let mut client = StageServiceClient::new(self.diffusion.clone());
        let call = tokio::time::timeout(DESCRIBE_TIMEOUT, client.describe(v1::DescribeRequest {}));
        match call.await {
            Ok(Ok(answer)) => Ok(answer.into_inner().defaults.unwrap_or_default()),
            Ok(Err(status)) => Err(fault(&status, Stage::Diffusion)),
            Err(_) => Err(silent(Stage::Diffusion)),
        }
    }

    /// What decides a stage's answers besides its inputs. Empty where the stage cannot say it.
    pub async fn identity(&self, stage: Stage) -> Result<Identity, Fault> {
        let answer = self.describe(stage).await?;
        if answer.checkpoint_digest.is_empty() {
            return Ok(Identity::default());
        }
        let manner = format!("{} {} {}", answer.version, kind_of_devices(&answer), answer.compute);
        Ok(Identity { checkpoint: answer.checkpoint_digest, manner })
    }

    /// What a stage says of itself.
    pub(crate) async fn describe(&self, stage: Stage) -> Result<v1::DescribeResponse, Fault> {
        describe(self.channel(stage), stage).await
    }

    fn channel(&self, stage: Stage) -> &Channel {
        match stage {
            Stage::AudioEncoder => &self.audio_encoder,
            Stage::TextEncoder => &self.text_encoder,
            Stage::ImageEncoder => &self.image_encoder,
            Stage::VaeDecode => &self.vae_decode,
            Stage::Diffusion | Stage::Unspecified => &self.diffusion,
        }
    }

    /// The same stages with each decoder as the first one, in the order in which they are tried.
    pub(crate) fn by_decoder(&self) -> Vec<Self> {
        let all: Vec<Channel> = std::iter::once(&self.vae_decode).chain(&self.spare_decoders).cloned().collect();
        let with_first = |first: usize| {
            let mut others = all.clone();
            let vae_decode = others.remove(first);
            Self { vae_decode, spare_decoders: others, ..self.clone() }
        };
        (0..all.len()).map(with_first).collect()
    }

    /// Unloads the stages that share a device with `stage`, are loaded and may go; gives their names.
    ///
    /// One that does not answer keeps what it has: nothing is lost by trying.
    pub async fn unload_beside(&self, stage: Stage, whose: Whose) -> Vec<&'static str> {
        let all = [Stage::AudioEncoder, Stage::TextEncoder, Stage::ImageEncoder, Stage::Diffusion, Stage::VaeDecode];
        let own = self.describe(stage).await.ok();
        let devices: Vec<String> = own.iter().flat_map(device_ids).map(str::to_owned).collect();
        let mut unloaded = Vec::new();
        let others = all.into_iter().filter(|other| *other != stage).map(|other| (other, self.channel(other)));
        let spare = self.spare_decoders.iter().map(|decoder| (Stage::VaeDecode, decoder));
        for (other, channel) in others.chain(spare) {
            let shares = |said: &v1::DescribeResponse| device_ids(said).any(|id| devices.iter().any(|own| own == id));
            let beside = describe(channel, other).await.is_ok_and(|said| said.loaded && shares(&said));
            if !beside {
                continue;
            }
            let name = crate::fault::stage_name(other);
            match unload(channel, other, (whose, UNLOAD_TIMEOUT)).await {
                Ok(true) => unloaded.push(name),
                Ok(false) => tracing::info!(stage = name, "it was not unloaded, as a generation has a session there"),
                Err(fault) => tracing::warn!(stage = name, %fault, "it was not unloaded"),
            }
        }
        unloaded
    }

    /// Speech (N samples, 16 kHz) to `features`.
    pub async fn encode_audio(
        &self,
        header: EncodeAudioHeader,
        samples: HostTensor,
    ) -> Result<(Encoded, v1::EncodeAudioSummary), Fault> {
        use v1::{encode_audio_request::Body, encode_audio_response::Body as Answer};
        let stage = Stage::AudioEncoder;
        let messages = tensor_stream(Body::Header(header), vec![samples], Body::Part)
            .map(|body| v1::EncodeAudioRequest { body: Some(body) });
        let call = AudioEncoderServiceClient::new(self.audio_encoder.clone()).encode_audio(messages).await;
        let (tensors, summary) = collect(call, stage, |answer: v1::EncodeAudioResponse| match answer.body? {
            Answer::Part(part) => Some(Piece::Part(part)),
            Answer::Summary(summary) => Some(Piece::Summary(summary)),
        })
        .await?;
        Ok((Encoded::new(tensors, summary.memory.clone(), summary.device_use.clone()), summary))
    }

    /// Prompt and picture to the text states of both prompts.
    pub async fn encode_prompt(
        &self,
        header: EncodePromptHeader,
        picture: HostTensor,
    ) -> Result<(Encoded, v1::EncodePromptSummary), Fault> {
        use v1::{encode_prompt_request::Body, encode_prompt_response::Body as Answer};
        let stage = Stage::TextEncoder;
        let messages = tensor_stream(Body::Header(header), vec![picture], Body::Part)
            .map(|body| v1::EncodePromptRequest { body: Some(body) });
        let call = TextEncoderServiceClient::new(self.text_encoder.clone()).encode_prompt(messages).await;
        let (tensors, summary) = collect(call, stage, |answer: v1::EncodePromptResponse| match answer.body? {
            Answer::Part(part) => Some(Piece::Part(part)),
            Answer::Summary(summary) => Some(Piece::Summary(summary)),
        })
        .await?;
        Ok((Encoded::new(tensors, summary.memory.clone(), summary.device_use.clone()), summary))
    }

    /// Picture to reference latents and face mask.
    pub async fn encode_reference(
        &self,
        header: EncodeReferenceHeader,
        picture: HostTensor,
    ) -> Result<(Encoded, v1::EncodeReferenceSummary), Fault> {
        use v1::{encode_reference_request::Body, encode_reference_response::Body as Answer};
        let stage = Stage::ImageEncoder;
        let messages = tensor_stream(Body::Header(header), vec![picture], Body::Part)
            .map(|body| v1::EncodeReferenceRequest { body: Some(body) });
        let call = ImageEncoderServiceClient::new(self.image_encoder.clone()).encode_reference(messages).await;
        let (tensors, summary) = collect(call, stage, |answer: v1::EncodeReferenceResponse| match answer.body? {
            Answer::Part(part) => Some(Piece::Part(part)),
            Answer::Summary(summary) => Some(Piece::Summary(summary)),
        })
        .await?;
        Ok((Encoded::new(tensors, summary.memory.clone(), summary.device_use.clone()), summary))
    }

    /// Gives the transformer what stays the same for a generation.
    pub async fn open_session(
        &self,
        header: OpenSessionHeader,
        tensors: Vec<HostTensor>,
    ) -> Result<(MemoryReport, Option<DeviceUse>), Fault> {
        use v1::open_session_request::Body;
        let messages = tensor_stream(Body::Header(header), tensors, Body::Part)
            .map(|body| v1::OpenSessionRequest { body: Some(body) });
        let call = DiffusionServiceClient::new(self.diffusion.clone()).open_session(messages).await;
        let answer = call.map_err(|status| fault(&status, Stage::Diffusion))?;
        let v1::OpenSessionResponse { memory, device_use } = answer.into_inner();
        Ok((memory.unwrap_or_default(), device_use))
    }

    /// Runs the transformer: `latents.{i}` of every item in, `velocity.{i}` out.
    pub async fn predict(&self, header: PredictHeader, latents: Vec<HostTensor>) -> Result<Encoded, Fault> {
        use v1::{predict_request::Body, predict_response::Body as Answer};
        let messages = tensor_stream(Body::Header(header), latents, Body::Part)
            .map(|body| v1::PredictRequest { body: Some(body) });
        let call = DiffusionServiceClient::new(self.diffusion.clone()).predict(messages).await;
        let (tensors, summary) = collect(call, Stage::Diffusion, |answer: v1::PredictResponse| match answer.body? {
            Answer::Part(part) => Some(Piece::Part(part)),
            Answer::Summary(summary) => Some(Piece::Summary(summary)),
        })
        .await?;
        Ok(Encoded::new(tensors, summary.memory, summary.device_use))
    }

    /// Frees a session.
    pub async fn close_session(&self, session_id: String) -> Result<(), Fault> {
        let mut client = DiffusionServiceClient::new(self.diffusion.clone());
        let call = client.close_session(v1::CloseSessionRequest { session_id }).await;
        call.map(|_| ()).map_err(|status| fault(&status, Stage::Diffusion))
    }

    /// Latents (C, T, h, w) to frames, which are read from the stream with [`Frames::next`].
    pub async fn decode_latents(&self, header: DecodeLatentsHeader, latents: HostTensor) -> Result<Frames, Fault> {
        use v1::decode_latents_request::Body;
        let messages = tensor_stream(Body::Header(header), vec![latents], Body::Part)
            .map(|body| v1::DecodeLatentsRequest { body: Some(body) });
        let call = VaeDecodeServiceClient::new(self.vae_decode.clone()).decode_latents(messages).await;
        let stream = call.map_err(|status| fault(&status, Stage::VaeDecode))?.into_inner();
        Ok(Frames { stream, reader: TensorReader::new(TENSOR_BYTES, u64::MAX), memory: None, device_use: None })
    }
}

/// What a stage says of itself.
async fn describe(channel: &Channel, stage: Stage) -> Result<v1::DescribeResponse, Fault> {
    let mut client = StageServiceClient::new(channel.clone());
    let answer = tokio::time::timeout(DESCRIBE_TIMEOUT, client.describe(v1::DescribeRequest {})).await;
    Ok(answer.map_err(|_| silent(stage))?.map_err(|status| fault(&status, stage))?.into_inner())
}

/// Makes a stage give its memory back, in `patience` at most.
/// Unloads a stage, and says whether it went.
async fn unload(channel: &Channel, stage: Stage, (whose, patience): (Whose, Duration)) -> Result<bool, Fault> {
    let mut client = StageServiceClient::new(channel.clone());
    let request = v1::UnloadRequest { idle_only: whose == Whose::Nobodys };
    match tokio::time::timeout(patience, client.unload(request)).await {
        Ok(Ok(answer)) => Ok(!answer.into_inner().busy),
        Ok(Err(status)) => Err(fault(&status, stage)),
        Err(_) => {
            let name = crate::fault::stage_name(stage);
            let message = format!("{name}: not unloaded within {} s", patience.as_secs());
            Err(Fault::new(Kind::Unavailable, message).at(stage))
        }
    }
}

/// The devices that a stage is on: its own, and where it is spread, the others.
fn device_ids(said: &v1::DescribeResponse) -> impl Iterator<Item = &str> {
    let parts = said.memory.iter().flat_map(|memory| &memory.parts).map(|part| part.device_id.as_str());
    std::iter::once(said.device_id.as_str()).chain(parts).filter(|id| !id.is_empty())
}

/// What a stage's arithmetic depends on of its devices: each kind once, in the order of the stage's parts.
fn kind_of_devices(said: &v1::DescribeResponse) -> String {
    let parts = said.memory.iter().flat_map(|memory| &memory.parts).map(|part| part.device.as_str());
    let mut kinds: Vec<&str> = std::iter::once(said.device.as_str()).chain(parts).map(kind_of_device).collect();
    kinds.dedup();
    kinds.join("+")
}

/// The part of a device's name that its arithmetic depends on: how much memory of a CPU may be used changes no value.
fn kind_of_device(name: &str) -> &str {
    name.split_once([':', '.']).filter(|(kind, _)| *kind == "cpu").map_or(name, |(kind, _)| kind)
}

/// What a stage answered.
#[derive(Debug)]
pub struct Encoded {
    tensors: HashMap<String, HostTensor>,
    /// The stage's memory after the call.
    pub memory: MemoryReport,
    /// What the call took of the stage's device; nothing of an answer that was kept.
    pub device_use: Option<DeviceUse>,
}

impl Encoded {
    fn new(tensors: HashMap<String, HostTensor>, memory: Option<MemoryReport>, device_use: Option<DeviceUse>) -> Self {
        Self { tensors, memory: memory.unwrap_or_default(), device_use }
    }

    /// An answer that was kept.
    #[must_use]
    pub fn kept(tensors: HashMap<String, HostTensor>, memory: MemoryReport) -> Self {
        Self { tensors, memory, device_use: None }
    }

    /// The tensors in the order of their names.
    #[must_use]
    pub fn sorted(&self) -> Vec<HostTensor> {
        let mut tensors: Vec<HostTensor> = self.tensors.values().cloned().collect();
        tensors.sort_by(|a, b| a.name().cmp(b.name()));
        tensors
    }

    /// Takes a tensor out; a stage that did not send it breaks the contract.
    pub fn take(&mut self, name: &str, stage: Stage) -> Result<HostTensor, Fault> {
        self.tensors.remove(name).ok_or_else(|| broken(stage, &format!("the answer has no tensor {name:?}")))
    }
}

/// Frames as the decoder makes them.
#[derive(Debug)]
pub struct Frames {
    stream: Streaming<v1::DecodeLatentsResponse>,
    reader: TensorReader,
    memory: Option<MemoryReport>,
    device_use: Option<DeviceUse>,
}

impl Frames {
    /// The next finished frames, U8 (n, H, W, 3); `None` after the last.
    pub async fn next(&mut self) -> Result<Option<HostTensor>, Fault> {
        use v1::decode_latents_response::Body;
        let stage = Stage::VaeDecode;
        loop {
            let message = self.stream.message().await.map_err(|status| fault(&status, stage))?;
            match message.map(|message| message.body) {
                None if self.memory.is_some() => return Ok(None),
                None => return Err(broken(stage, &"the answer ended without its summary")),
                Some(Some(Body::Part(part))) => {
                    let tensor = self.reader.push(part).map_err(|error| broken(stage, &error))?;
                    if tensor.is_some() {
                        return Ok(tensor);
                    }
                }
                Some(Some(Body::Summary(summary))) => {
                    self.reader.finish().map_err(|error| broken(stage, &error))?;
                    self.memory = Some(summary.memory.unwrap_or_default());
                    self.device_use = summary.device_use;
                }
                Some(None) => return Err(broken(stage, &"a message of the answer is empty")),
            }
        }
    }

    /// What the call took of the stage's device, once all frames are there.
    #[must_use]
    pub fn device_use(&self) -> Option<DeviceUse> {
        self.device_use.clone()
    }

    /// The stage's memory, once all frames are there.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        self.memory.clone().unwrap_or_default()
    }
}

enum Piece<S> {
    Part(TensorPart),
    Summary(S),
}

fn fault(status: &Status, stage: Stage) -> Fault {
    Fault::from_stage(&ServiceError::from_status(status), stage)
}

/// A stage that does not say what it is.
fn silent(stage: Stage) -> Fault {
    let message = format!("{}: no answer to Describe within 5 s", crate::fault::stage_name(stage));
    Fault::new(Kind::Unavailable, message).at(stage)
}

/// A stage whose answer breaks the contract.
fn broken(stage: Stage, what: &dyn std::fmt::Display) -> Fault {
    Fault::new(Kind::Internal, format!("{}: {what}", crate::fault::stage_name(stage))).at(stage)
}

/// The header, then the tensors' parts.
fn tensor_stream<B: Send + 'static>(
    header: B,
    tensors: Vec<HostTensor>,
    part: fn(TensorPart) -> B,
) -> impl Stream<Item = B> + Send + 'static {
    stream::iter(std::iter::once(header).chain(tensors.into_iter().flat_map(HostTensor::parts).map(part)))
}

/// Reads a whole answer: tensors by name, then the summary.
async fn collect<M, S>(
    call: Result<Response<Streaming<M>>, Status>,
    stage: Stage,
    open: impl Fn(M) -> Option<Piece<S>>,
) -> Result<(HashMap<String, HostTensor>, S), Fault> {
    let mut answers = call.map_err(|status| fault(&status, stage))?.into_inner();
    let mut reader = TensorReader::new(TENSOR_BYTES, 4 * TENSOR_BYTES);
    let (mut tensors, mut summary) = (HashMap::new(), None);
    while let Some(message) = answers.message().await.map_err(|status| fault(&status, stage))? {
        match open(message) {
            Some(Piece::Part(part)) => {
                if let Some(tensor) = reader.push(part).map_err(|error| broken(stage, &error))? {
                    tensors.insert(tensor.name().to_owned(), tensor);
                }
            }
            Some(Piece::Summary(last)) => summary = Some(last),
            None => return Err(broken(stage, &"a message of the answer is empty")),
        }
    }
    reader.finish().map_err(|error| broken(stage, &error))?;
    let summary = summary.ok_or_else(|| broken(stage, &"the answer ended without its summary"))?;
    Ok((tensors, summary))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::fakes::{self, Script};

    #[test]
    fn a_budget_is_no_other_device() {
        let names = ["cpu", "cpu:4294967296", "cpu.1", "cuda:1"];
        assert_eq!(names.map(kind_of_device), ["cpu", "cpu", "cpu", "cuda:1"]);
    }

    #[test]
    fn blocks_on_several_parts_of_a_processor_are_computed_as_on_one() {
        let part = |device: &str| v1::StagePart { device: device.into(), ..v1::StagePart::default() };
        let on = |device: &str, parts: &[&str]| {
            let parts = parts.iter().copied().map(part).collect();
            let memory = Some(MemoryReport { parts, ..MemoryReport::default() });
            kind_of_devices(&v1::DescribeResponse { device: device.into(), memory, ..Default::default() })
        };
        assert_eq!(on("cpu", &[]), on("cpu.0", &["cpu.0", "cpu.1"]));
        assert_eq!(on("cuda:0", &["cuda:0", "cuda:1"]), "cuda:0+cuda:1");
    }

    #[tokio::test]
    async fn what_shares_any_device_of_a_spread_stage_is_unloaded_for_it_and_it_for_them() {
        let on = |devices: &[&'static str]| {
            fakes::start(&Arc::new(Script { devices: devices.to_vec(), ..Script::default() }))
        };
        let stages = Stages {
            audio_encoder: on(&["a"]).audio_encoder,
            text_encoder: on(&["c"]).text_encoder,
            image_encoder: on(&["a"]).image_encoder,
            diffusion: on(&["a", "b"]).diffusion,
            vae_decode: on(&["b"]).vae_decode,
            spare_decoders: Vec::new(),
        };
        let beside = stages.unload_beside(Stage::Diffusion, Whose::Anybodys).await;
        assert_eq!(beside, ["audio-encoder", "image-encoder", "vae-decode"]);
        assert_eq!(stages.unload_beside(Stage::VaeDecode, Whose::Nobodys).await, ["diffusion"]);
        assert!(stages.unload_beside(Stage::TextEncoder, Whose::Anybodys).await.is_empty());
    }

    #[tokio::test]
    async fn a_stage_that_does_not_unload_is_not_waited_for_without_end() {
        let stages = fakes::start(&Arc::new(Script { unload_hangs: true, ..Script::default() }));
        let fault = unload(&stages.vae_decode, Stage::VaeDecode, (Whose::Anybodys, Duration::from_millis(50))).await;
        let fault = fault.unwrap_err();
        assert_eq!((fault.kind, fault.stage), (Kind::Unavailable, Stage::VaeDecode));
        assert!(fault.message.starts_with("vae-decode: not unloaded"), "{fault}");
    }
}
