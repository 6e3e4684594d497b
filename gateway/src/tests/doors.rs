//! Downloads, lists and events over REST.

use std::time::Instant;

use proto::v1::{WatchGenerationRequest, avatar_service_client::AvatarServiceClient};
use service_kit::server::{self, Lifetime};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use super::*;

#[tokio::test]
async fn a_download_goes_on_where_it_stopped_and_only_if_the_file_is_the_same() {
    let script = Arc::new(Script::default());
    let (desk, id) = start(&script, 1).await;
    desk.ended(id).await;
    let path = format!("/v1/videos/{id}/content");
    let (status, headers, whole) = rest(&desk, &path, &[]).await;
    let tag = headers["etag"].to_str().unwrap().to_owned();
    assert_eq!((status, &headers["accept-ranges"]), (200, &http::HeaderValue::from_static("bytes")));
    let (status, headers, rest_of_it) = rest(&desk, &path, &[("range", "bytes=100-"), ("if-range", &tag)]).await;
    assert_eq!((status, &rest_of_it[..]), (206, &whole[100..]));
    let wanted = format!("bytes 100-{}/{}", whole.len() - 1, whole.len());
    assert_eq!(headers["content-range"].to_str().unwrap(), wanted);
    let (status, _, again) = rest(&desk, &path, &[("range", "bytes=100-"), ("if-range", "\"another\"")]).await;
    assert_eq!((status, again.len()), (200, whole.len()));
    assert_eq!(rest(&desk, &path, &[("if-none-match", &tag)]).await.0, 304);
    assert_eq!(rest(&desk, &path, &[("range", &format!("bytes={}-", whole.len()))]).await.0, 416);
}

#[tokio::test]
async fn pages_of_a_list_have_each_generation_once_whatever_is_created_meanwhile() {
    let script = Arc::new(Script::default());
    let desk = Desk::new(&script).await;
    let mut ids = Vec::new();
    for steps in [1, 1, 1, 1, 1] {
        let spec = GenerationSpec { steps: Some(steps), ..Default::default() };
        let id = desk.accept(upload(spec, 2)).await.unwrap();
        desk.ended(id).await;
        ids.push(id.to_string());
    }
    let (mut seen, mut path) = (Vec::new(), "/v1/videos?limit=2&status=completed".to_owned());
    loop {
        let page = json(&desk, &path).await;
        seen.extend(page["data"].as_array().unwrap().iter().map(|video| video["id"].as_str().unwrap().to_owned()));
        if page["has_more"] == false {
            break;
        }
        path = format!("/v1/videos?limit=2&status=completed&after={}", page["last_id"].as_str().unwrap());
        desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 2)).await.unwrap();
    }
    seen.reverse();
    assert_eq!(seen, ids);
    let oldest = json(&desk, "/v1/videos?limit=1&order=asc").await;
    assert_eq!(oldest["data"][0]["id"], ids[0].as_str());
    assert_eq!(json(&desk, "/v1/videos?status=failed,cancelled").await["data"].as_array().unwrap().len(), 0);
    assert_eq!(json(&desk, "/v1/videos?created_before=1").await["data"].as_array().unwrap().len(), 0);
    let spec = GenerationSpec { steps: Some(1), ..Default::default() };
    let order = Order { caller: "studio".into(), ..Order::default() }.labelled("scene-7").unwrap();
    let labelled = desk.accept(Upload { order, ..upload(spec, 2) }).await.unwrap().to_string();
    for query in ["caller=studio", "label=scene-7", "caller=studio&label=scene-7&limit=1"] {
        let page = json(&desk, &format!("/v1/videos?{query}")).await;
        assert_eq!((page["data"].as_array().unwrap().len(), &page["has_more"]), (1, &false.into()), "{query}");
        let shown = [&page["data"][0]["id"], &page["data"][0]["caller"], &page["data"][0]["label"]];
        assert_eq!(shown, [labelled.as_str(), "studio", "scene-7"], "{query}");
    }
    assert_eq!(json(&desk, "/v1/videos?caller=studio&label=scene-8").await["data"].as_array().unwrap().len(), 0);
    for wrong in ["limit=0", "limit=101", "after=x", "order=up", "status=lost", "page=2"] {
        assert_eq!(rest(&desk, &format!("/v1/videos?{wrong}"), &[]).await.0, 400, "{wrong}");
    }
}

#[tokio::test]
async fn server_sent_events_come_once_each_and_go_on_after_the_last_one_seen() {
    let script = Arc::new(Script::default());
    let (desk, id) = start(&script, 2).await;
    let path = format!("/v1/videos/{id}/events");
    let events = |body: Vec<u8>| {
        let text = String::from_utf8(body).unwrap();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()).collect::<Vec<_>>()
    };
    let all = events(rest(&desk, &path, &[]).await.2);
    let numbers: Vec<u64> = all.iter().map(|event| event["number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=all.len() as u64).collect::<Vec<_>>());
    assert_eq!(all.last().unwrap()["state"], "completed");
    let heard = all.iter().find(|event| event["stage"] == "audio-encoder" && !event["memory"].is_null()).unwrap();
    assert_eq!(heard["memory"]["peak_bytes"], 7);
    let last = (all.len() - 2).to_string();
    assert_eq!(events(rest(&desk, &path, &[("last-event-id", &last)]).await.2), all[all.len() - 2..]);
    assert_eq!(events(rest(&desk, &format!("{path}?from={last}"), &[]).await.2), all[all.len() - 3..]);
    assert_eq!(rest(&desk, &path, &[("last-event-id", "x")]).await.0, 400);
    assert_eq!(rest(&desk, "/v1/videos/x/events", &[]).await.0, 404);
}

/// A generation that nothing happens to for a while.
#[tokio::test]
async fn who_watches_hears_something_every_15_seconds_at_both_doors() {
    let script = Arc::new(Script { hold: Mutex::new(Some(0)), ..Script::default() });
    let (desk, id) = start(&script, 1).await;
    until(|| script.opened.load(Ordering::SeqCst) > 0).await;
    let (channel, incoming) = service_kit::client::in_memory();
    let lifetime = Lifetime { shutdown: CancellationToken::new(), drain: Duration::ZERO };
    tokio::spawn(server::serve(desk.gateway.grpc_routes(), &[], incoming, lifetime));
    let over_grpc = async {
        let request = WatchGenerationRequest { generation_id: id.to_string(), from_number: 0 };
        let mut answers = AvatarServiceClient::new(channel).watch_generation(request).await.unwrap().into_inner();
        let mut last = Instant::now();
        while answers.message().await.unwrap().unwrap().event.is_some() {
            last = Instant::now();
        }
        last.elapsed()
    };
    let over_rest = async {
        let request = http::Request::get(format!("/v1/videos/{id}/events")).body(axum::body::Body::empty()).unwrap();
        let mut body = desk.gateway.http_router().oneshot(request).await.unwrap().into_body().into_data_stream();
        let mut last = Instant::now();
        while !body.next().await.unwrap().unwrap().starts_with(b":") {
            last = Instant::now();
        }
        last.elapsed()
    };
    let (grpc, rest) = tokio::join!(over_grpc, over_rest);
    for silence in [grpc, rest] {
        // A machine that does much else may be late.
        assert!(silence > Duration::from_secs(14) && silence < Duration::from_secs(30), "{grpc:?} {rest:?}");
    }
    *script.hold.lock().unwrap() = None;
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
}

/// Their connections take a few bytes and then no more, so that they are stopped in the middle of whatever is done for
/// them; there are more than connections to the records.
#[tokio::test(flavor = "multi_thread")]
async fn watchers_that_read_nothing_slow_nobody_and_miss_nothing() {
    let script = Arc::new(Script { hold: Mutex::new(Some(0)), ..Script::default() });
    let (desk, id) = start(&script, 50).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let lifetime = Lifetime { shutdown: CancellationToken::new(), drain: Duration::ZERO };
    tokio::spawn(server::serve(desk.gateway.grpc_routes(), &[], server::tcp(listener), lifetime));
    let channel = Endpoint::from_shared(url).unwrap().initial_stream_window_size(64).connect().await.unwrap();
    let request = WatchGenerationRequest { generation_id: id.to_string(), from_number: 0 };
    let mut watchers = Vec::new();
    for _ in 0..40 {
        let mut client = AvatarServiceClient::new(channel.clone());
        watchers.push(client.watch_generation(request.clone()).await.unwrap().into_inner());
    }
    *script.hold.lock().unwrap() = None;
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    let last = desk.events(id).await.len() as u64;
    for mut answers in watchers {
        let mut numbers = Vec::new();
        while let Some(answer) = answers.message().await.unwrap() {
            numbers.extend(answer.event.map(|event| event.number));
        }
        assert_eq!(numbers, (1..=last).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_key_of_another_request_is_a_409_and_a_full_queue_a_429_with_a_delay() {
    let script = Arc::new(Script { hold: Mutex::new(Some(0)), ..Script::default() });
    let desk = Desk::with(&script, Options { queue: 0, concurrent: 1, ..Options::default() }).await;
    let Upload { picture, audio, .. } = upload(GenerationSpec::default(), 2);
    let post = async |key: &str, prompt: &str| {
        let mut body = Vec::new();
        for (name, value) in
            [("prompt", prompt.as_bytes()), ("size", b"64"), ("input_reference", &picture), ("audio", &audio)]
        {
            let file = if value.len() > 100 { "; filename=\"f\"" } else { "" };
            let head = format!("--line\r\ncontent-disposition: form-data; name=\"{name}\"{file}\r\n\r\n");
            body.extend([head.as_bytes(), value, b"\r\n"].concat());
        }
        body.extend(b"--line--\r\n");
        let request = http::Request::post("/v1/videos").header("content-type", "multipart/form-data; boundary=line");
        let request = request.header("idempotency-key", key).body(axum::body::Body::from(body)).unwrap();
        let (head, body) = desk.gateway.http_router().oneshot(request).await.unwrap().into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        (head.status.as_u16(), head.headers, serde_json::from_slice::<serde_json::Value>(&body).unwrap())
    };
    let (status, _, first) = post("order-7", "speaks").await;
    assert_eq!(status, 200, "{first}");
    let (status, _, again) = post("order-7", "speaks").await;
    assert_eq!((status, &again["id"]), (200, &first["id"]), "{again}");
    let (status, _, other) = post("order-7", "sings").await;
    assert_eq!((status, &other["error"]["code"]), (409, &"already_exists".into()), "{other}");
    let (status, headers, full) = post("order-8", "speaks").await;
    assert_eq!((status, &full["error"]["type"]), (429, &"rate_limit_error".into()), "{full}");
    let seconds: u64 = headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=600).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn a_nearly_full_disk_refuses_with_the_reason_and_what_runs_goes_on() {
    let script = Arc::new(Script::default());
    let (desk, id) = start(&script, 1).await;
    desk.ended(id).await;
    let Desk { gateway, folder } = desk;
    gateway.drain(Duration::ZERO).await;
    drop(gateway);
    let options = Options { data_dir: folder.path().to_owned(), min_free_bytes: u64::MAX, ..Options::default() };
    let gateway = Gateway::new(&options, fakes::start(&script)).await.unwrap();
    let fault = gateway.admit(&Order::default()).await.unwrap_err();
    assert_eq!(fault.code(), tonic::Code::ResourceExhausted);
    assert!(fault.message.contains("disk of the data folder is full") && fault.retryable(), "{fault}");
    gateway.store().video(&id.to_string()).await.unwrap();
}
