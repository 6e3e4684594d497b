//! Streams that lie, break or stop: the answer is an error, and the process lives on.

use std::time::{Duration, Instant};

use proto::{
    tensor::HostTensor,
    v1::{
        DataType, DecodeLatentsHeader, DecodeLatentsRequest, EncodeAudioHeader, EncodeAudioRequest, GenerationSpec,
        TensorHeader, TensorPart, audio_encoder_service_client::AudioEncoderServiceClient,
        avatar_service_client::AvatarServiceClient, decode_latents_request, encode_audio_request, generate_response,
        tensor_part::Part, vae_decode_service_client::VaeDecodeServiceClient,
    },
};
use tonic::{Code, transport::Channel};

use crate::{
    inputs::{portrait, tone},
    processes::{client, requests, spec},
    stack::{Stack, stage, tiny_models},
};

async fn channel(address: &str) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

fn header() -> EncodeAudioRequest {
    let header = EncodeAudioHeader { generation_id: "test".into() };
    EncodeAudioRequest { body: Some(encode_audio_request::Body::Header(header)) }
}

fn part(part: TensorPart) -> EncodeAudioRequest {
    EncodeAudioRequest { body: Some(encode_audio_request::Body::Part(part)) }
}

fn samples(n: usize) -> Vec<EncodeAudioRequest> {
    let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.1).sin() * 0.3).collect();
    let tensor = HostTensor::from_f32("samples", &[n], &values).unwrap();
    std::iter::once(header()).chain(tensor.parts().map(part)).collect()
}

async fn encode(
    client: &mut AudioEncoderServiceClient<Channel>,
    messages: Vec<EncodeAudioRequest>,
) -> Result<usize, tonic::Status> {
    let mut answers = client.encode_audio(tokio_stream::iter(messages)).await?.into_inner();
    let mut count = 0;
    while answers.message().await?.is_some() {
        count += 1;
    }
    Ok(count)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_refuses_tensor_streams_that_lie_and_lives_on() {
    let process = stage("audio-encoder", &tiny_models());
    let mut client = AudioEncoderServiceClient::new(channel(&process.address("grpc")).await);
    let announced = |shape: Vec<u64>, total_bytes: u64| {
        let header = TensorHeader { name: "samples".into(), dtype: DataType::F32.into(), shape, total_bytes };
        part(TensorPart { part: Some(Part::Header(header)) })
    };
    let mut corrupt = samples(16_000);
    if let Some(encode_audio_request::Body::Part(TensorPart { part: Some(Part::Chunk(chunk)) })) = &mut corrupt[2].body
    {
        chunk.data[100] ^= 0x10;
    }
    let mut wrong_name = samples(16_000);
    if let Some(encode_audio_request::Body::Part(TensorPart { part: Some(Part::Header(header)) })) =
        &mut wrong_name[1].body
    {
        header.name = "noise".into();
    }
    let cut = samples(600_000)[..3].to_vec();
    for (what, messages) in [
        ("nothing", vec![]),
        ("no header", samples(16_000)[1..].to_vec()),
        ("no tensor", vec![header()]),
        ("two headers", vec![header(), header()]),
        ("a length that is not the shape's", vec![header(), announced(vec![100], 4_000)]),
        ("a tensor of 2^50 bytes", vec![header(), announced(vec![1 << 48], 1 << 50)]),
        ("a corrupt chunk", corrupt),
        ("an unknown tensor", wrong_name),
        ("a stream that stops in the middle", cut),
        ("an empty part", vec![header(), part(TensorPart { part: None })]),
    ] {
        let status = encode(&mut client, messages).await.expect_err(what);
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
        assert!(status.message().len() > 10, "{what}: {status:?}");
    }
    assert!(encode(&mut client, samples(16_000)).await.unwrap() >= 2, "the stage works on after all of these");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_decoder_refuses_latents_that_are_not_finite() {
    let process = stage("vae-decode", &tiny_models());
    let mut client = VaeDecodeServiceClient::new(channel(&process.address("grpc")).await);
    let mut values = vec![0.1f32; 16 * 2 * 4 * 4];
    values[77] = f32::NAN;
    let latents = HostTensor::from_f32("latents", &[16, 2, 4, 4], &values).unwrap();
    let header = DecodeLatentsHeader { generation_id: "test".into(), frame_limit: 0, tile_divisor: 0 };
    let body = |body| DecodeLatentsRequest { body: Some(body) };
    let messages: Vec<_> = std::iter::once(body(decode_latents_request::Body::Header(header)))
        .chain(latents.parts().map(|p| body(decode_latents_request::Body::Part(p))))
        .collect();
    let status = match client.decode_latents(tokio_stream::iter(messages)).await {
        Err(status) => status,
        Ok(mut answers) => answers.get_mut().message().await.expect_err("NaN latents were decoded"),
    };
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
}

/// The next generation waits for the first one's place: it finishes soon only if the first has really stopped.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_stops_the_work_within_a_step() {
    let stack = Stack::one(&tiny_models());
    let long = GenerationSpec { steps: Some(200), size: Some(64), ..spec() };
    let (first, remaining) = generate_until_denoising(&mut client(&stack.grpc()).await, long).await;
    drop(first);
    let began = Instant::now();
    let stream = tokio_stream::iter(requests(spec(), &portrait(), &tone(0.2, 16_000)));
    let finish = async {
        let mut answers = client(&stack.grpc()).await.generate(stream).await.unwrap().into_inner();
        while answers.message().await.unwrap().is_some() {}
    };
    tokio::time::timeout(Duration::from_secs(60), finish).await.expect("the first generation still holds the workers");
    // Had the first gone on, the second would have waited for all of its rest.
    let taken = began.elapsed().as_secs_f64();
    assert!(taken < remaining / 2.0, "the next generation took {taken} s, the first had {remaining} s to go");
}

async fn generate_until_denoising(
    client: &mut AvatarServiceClient<Channel>,
    spec: GenerationSpec,
) -> (tonic::Streaming<proto::v1::GenerateResponse>, f64) {
    let stream = tokio_stream::iter(requests(spec, &portrait(), &tone(2.0, 16_000)));
    let mut answers = client.generate(stream).await.unwrap().into_inner();
    while let Some(answer) = answers.message().await.unwrap() {
        if let Some(generate_response::Body::Event(event)) = answer.body
            && let Some(progress) = event.progress.filter(|p| p.step >= 1)
        {
            return (answers, progress.remaining_seconds.expect("the pace is known after a step"));
        }
    }
    panic!("the generation ended before its first step");
}
