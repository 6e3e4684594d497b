//! A model hub on a free port, with a small repository, that can misbehave at will.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};

/// The path below which the repository's files are served.
pub const RESOLVE: &str = "/tencent/HunyuanVideo-Avatar/resolve/main/";
/// The path of the listing.
pub const TREE: &str = "/api/models/tencent/HunyuanVideo-Avatar/tree/main";

/// What a client asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Path and query.
    pub path: String,
    /// First byte of the range.
    pub from: Option<usize>,
    /// The value of `Authorization`.
    pub authorization: Option<String>,
}

/// What the hub answers.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// Bytes of the body after which the connection ends.
    pub sent: usize,
    /// Whether its length is told; if not, it ends with the connection.
    pub announced: bool,
    /// Whether it stays open and silent instead, until the client goes.
    pub hold: bool,
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { status, headers: Vec::new(), sent: body.len(), body, announced: true, hold: false }
    }

    pub fn redirect(target: String) -> Self {
        Self::new(302, "").with("Location", target)
    }

    pub fn with(mut self, name: &'static str, value: String) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The connection is lost after half of the body.
    pub fn cut(mut self) -> Self {
        self.sent = self.body.len() / 2;
        self
    }
}

/// A running hub.
pub struct Hub {
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    /// Serves until the process ends. The answer may depend on how often the same path was asked for before.
    pub fn start(answer: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::<Request>::new()));
        let (log, answer) = (requests.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (log, answer) = (log.clone(), answer.clone());
                std::thread::spawn(move || {
                    let Some(request) = read(&stream) else { return };
                    let earlier = {
                        let mut log = log.lock().unwrap();
                        log.push(request.clone());
                        log.iter().filter(|r| r.path == request.path).count() - 1
                    };
                    write(stream, &answer(&request, earlier));
                });
            }
        });
        Self { url, requests }
    }

    /// A hub that does what it should.
    pub fn of(repo: Repo) -> Self {
        Self::start(move |request, _| repo.answer(request))
    }

    /// Everything that was asked for until now.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// Requests for files, by the end of their paths, with the first byte of their ranges.
    pub fn files(&self) -> Vec<(String, Option<usize>)> {
        let path = |r: Request| Some((r.path.strip_prefix(RESOLVE)?.to_owned(), r.from));
        self.requests().into_iter().filter_map(path).collect()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let mut request = Request { path, from: None, authorization: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => request.from = value.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok(),
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    Some(request)
}

/// The client may be gone: errors do not matter here.
fn write(mut stream: TcpStream, answer: &Answer) {
    let mut head = format!("HTTP/1.1 {} Word\r\nConnection: close\r\n", answer.status);
    if answer.announced {
        head += &format!("Content-Length: {}\r\n", answer.body.len());
    }
    answer.headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    let _ = stream.write_all(format!("{head}\r\n").as_bytes());
    let _ = stream.write_all(&answer.body[..answer.sent]);
    if answer.hold {
        let _ = stream.read(&mut [0]);
    }
}

/// A repository of small files under the official names.
#[derive(Clone)]
pub struct Repo {
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Repo {
    /// Everything that the official repository holds, and more.
    pub fn whole() -> Self {
        let shards = (1..=4).map(|k| format!("ckpts/llava_llama_image/model-0000{k}-of-00004.safetensors"));
        let others = [
            "README.md",
            "ckpts/det_align/detface.pt",
            "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt",
            "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states_fp8.pt",
            "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states_fp8_map.pt",
            "ckpts/hunyuan-video-t2v-720p/vae/config.json",
            "ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt",
            "ckpts/llava_llama_image/config.json",
            "ckpts/llava_llama_image/model.safetensors.index.json",
            "ckpts/llava_llama_image/tokenizer.json",
            "ckpts/text_encoder_2/config.json",
            "ckpts/text_encoder_2/merges.txt",
            "ckpts/text_encoder_2/model.safetensors",
            "ckpts/text_encoder_2/pytorch_model.bin",
            "ckpts/text_encoder_2/vocab.json",
            "ckpts/whisper-tiny/config.json",
            "ckpts/whisper-tiny/pytorch_model.bin",
        ];
        let content = |path: &str| path.bytes().cycle().take(1000 * path.len()).collect();
        Self { files: others.map(str::to_owned).into_iter().chain(shards).map(|p| (p.clone(), content(&p))).collect() }
    }

    /// The file at a path.
    pub fn file(&self, path: &str) -> &[u8] {
        &self.files[path]
    }

    /// What the listing says of every file.
    pub fn entries(&self) -> Vec<Value> {
        let entry = |(path, bytes): (&String, &Vec<u8>)| {
            let mut entry = json!({ "type": "file", "path": path, "size": bytes.len(), "oid": git_blob(bytes) });
            if [".pt", ".bin", ".safetensors"].iter().any(|end| path.ends_with(end)) {
                let sha256 = hex(digest(&SHA256, bytes).as_ref());
                entry["lfs"] = json!({ "oid": sha256, "size": bytes.len(), "pointerSize": 134 });
                entry["oid"] = json!("0".repeat(40));
            }
            entry
        };
        let folder = json!({ "type": "directory", "path": "ckpts", "size": 0, "oid": "0".repeat(40) });
        std::iter::once(folder).chain(self.files.iter().map(entry)).collect()
    }

    /// Does what a hub should: the listing, and files with ranges.
    pub fn answer(&self, request: &Request) -> Answer {
        if request.path == format!("{TREE}?recursive=true") {
            return Answer::new(200, json!(self.entries()).to_string());
        }
        let Some(bytes) = request.path.strip_prefix(RESOLVE).and_then(|path| self.files.get(path)) else {
            return Answer::new(404, r#"{"error":"Entry not found"}"#);
        };
        match request.from {
            None => Answer::new(200, bytes.clone()),
            Some(from) => Answer::new(206, &bytes[from..])
                .with("Content-Range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len())),
        }
    }
}

fn git_blob(bytes: &[u8]) -> String {
    let framed = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &framed).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
