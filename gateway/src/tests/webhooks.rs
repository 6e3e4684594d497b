//! Callbacks at the end.

use super::*;

/// Answers the requests that come with these statuses, one after the other; gives each as it came.
async fn receiver(statuses: &'static [&'static str]) -> (std::net::SocketAddr, Arc<Mutex<Vec<String>>>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, seen) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
    let requests = Arc::clone(&seen);
    tokio::spawn(async move {
        for status in statuses {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            loop {
                let mut buffer = [0; 4096];
                let n = stream.read(&mut buffer).await.unwrap();
                request.extend_from_slice(&buffer[..n]);
                let text = String::from_utf8_lossy(&request);
                let body = text.split_once("\r\n\r\n").map(|(_, body)| body.len());
                let length = header(&text, "content-length").and_then(|length| length.parse().ok());
                if n == 0 || body.is_some_and(|body| length.is_some_and(|length: usize| body >= length)) {
                    break;
                }
            }
            requests.lock().unwrap().push(String::from_utf8(request).unwrap());
            let head = format!("HTTP/1.1 {status}\r\nlocation: /elsewhere\r\n");
            let answer = format!("{head}content-length: 0\r\nconnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (address, seen)
}

/// The value of a header of a request as it came.
fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    let lines = request.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.split_once(": "));
    lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
}

#[tokio::test]
async fn the_end_is_told_until_it_is_taken_also_by_the_next_process_and_signed() {
    use base64::Engine as _;
    let (script, folder) = (Arc::new(Script::default()), tempfile::tempdir().unwrap());
    let (address, seen) = receiver(&["302 Found", "503 Service Unavailable", "200 OK"]).await;
    let key = b"a key of twenty-five byte";
    let secret = format!("whsec_{}", base64::prelude::BASE64_STANDARD.encode(key));
    let secret = Some(webhook::Secret::parse(&secret).unwrap());
    let webhooks = WebhookOptions { secret, allow: vec![address.to_string()] };
    let options = Options { data_dir: folder.path().to_owned(), webhooks, ..Options::default() };
    let gateway = Gateway::new(&options, fakes::start(&script)).await.unwrap();
    let desk = Desk { gateway, folder };
    let order = Order { webhook: format!("http://{address}/hook?x=1"), ..Order::default() };
    let spec = GenerationSpec { steps: Some(1), ..Default::default() };
    let id = desk.accept(Upload { order, ..upload(spec, 5) }).await.unwrap();
    until(|| seen.lock().unwrap().len() == 1).await;
    let Desk { gateway, folder } = desk;
    // It waits to be tried again; the record may go meanwhile.
    gateway.store().remove(&id.to_string()).await.unwrap();
    gateway.drain(Duration::ZERO).await;
    drop(gateway);
    let gateway = loop {
        match Gateway::new(&options, fakes::start(&script)).await {
            Ok(gateway) => break gateway,
            Err(error) => assert!(error.to_string().contains("another process"), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    until(|| seen.lock().unwrap().len() == 3).await;
    let requests = seen.lock().unwrap().clone();
    for request in &requests {
        assert!(request.starts_with("POST /hook?x=1 HTTP/1.1"), "no redirect is followed: {request}");
        assert_eq!(header(request, "webhook-id").unwrap(), format!("evt_{id}"));
        let body = request.split_once("\r\n\r\n").unwrap().1;
        let message: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!((&message["type"], &message["data"]["id"]), (&"video.completed".into(), &id.to_string().into()));
        let signed = format!("evt_{id}.{}.{body}", header(request, "webhook-timestamp").unwrap());
        let tag = ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key), signed.as_bytes());
        let tag = base64::prelude::BASE64_STANDARD.encode(tag);
        assert_eq!(header(request, "webhook-signature").unwrap(), format!("v1,{tag}"));
    }
    let store = gateway.store().clone();
    let forgotten = async {
        while store.webhooks().await != 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), forgotten).await.unwrap();
    drop(folder);
}

#[tokio::test]
async fn an_address_that_is_not_called_is_refused_before_anything_is_read() {
    let script = Arc::new(Script::default());
    let secret = Some(webhook::Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap());
    let webhooks = WebhookOptions { secret, ..WebhookOptions::default() };
    let desk = Desk::with(&script, Options { webhooks, ..Options::default() }).await;
    for address in ["http://example.com/", "https://169.254.169.254/latest", "https://[::ffff:10.0.0.1]/"] {
        let order = Order { webhook: address.into(), ..Order::default() };
        let fault = desk.gateway.admit(&order).await.unwrap_err();
        assert_eq!((fault.kind, fault.field()), (Kind::Invalid, Some("webhook")), "{address}");
    }
}
