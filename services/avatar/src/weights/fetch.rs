//! `avatar weights fetch`: downloads the official checkpoint, in its own folder tree.

mod catalogue;
mod digest;
mod download;
mod folder;
mod hub;
mod listing;
mod plan;
mod report;
mod retry;
mod token;

use std::{path::PathBuf, time::Instant};

use clap::{
    Args, ValueEnum as _,
    builder::{OsStringValueParser, TypedValueParser as _},
};

pub use self::{
    catalogue::{Precision, REPO, Stage},
    report::{Fetched, Report},
    token::Token,
};
use self::{
    folder::Folder,
    hub::{Hub, check_repo, check_revision, parse_endpoint},
    plan::{Wanted, plan},
    retry::Retries,
};
use crate::{
    failure::{FAILED, Failure, INTERRUPTED, WRONG_INPUT},
    signals::Signals,
};

/// The licence of the official weights.
pub const LICENCE: &str = "Tencent Hunyuan Community License";
/// Where it grants nothing.
pub const EXCLUDED: [&str; 3] = ["the European Union", "the United Kingdom", "South Korea"];
/// All stages, as the flag writes them.
const STAGES: &str = "audio-encoder,text-encoder,image-encoder,diffusion,vae-decode";

/// The flags of `avatar weights fetch`.
#[derive(Debug, Args)]
pub struct FetchFlags {
    /// Folder to fill; made if missing. Files go to `ckpts/` in it. What is there and right is kept.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Only the files that these stages need; names with commas between.
    #[arg(long, value_enum, value_name = "STAGES", value_delimiter = ',', default_value = STAGES)]
    pub stages: Vec<Stage>,
    /// Which of the transformer's two files to take.
    #[arg(long, value_enum, default_value = "bf16")]
    pub precision: Precision,
    /// Say that you have read the licence and may use the weights where you are. Without it, files are only listed.
    #[arg(long, alias = "accept-license")]
    pub accept_licence: bool,
    /// Server to download from; the proxy variables that curl knows are honoured.
    #[arg(long, env = "AVATAR_ENDPOINT", value_name = "URL", default_value = "https://huggingface.co")]
    pub endpoint: String,
    /// Repository on the server.
    #[arg(long, value_name = "OWNER/NAME", default_value = REPO)]
    pub repo: String,
    /// Branch, tag or commit.
    #[arg(long, value_name = "NAME", default_value = "main")]
    pub revision: String,
    /// File that holds an access token and nothing else. Without it, HF_TOKEN in the environment counts.
    ///
    /// The token goes to the endpoint alone, and only over TLS or within this machine.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    #[allow(missing_docs)] // Hidden: a token among the arguments is seen by every user of the machine.
    #[arg(
        long,
        env = "HF_TOKEN",
        hide = true,
        hide_env_values = true,
        value_parser = OsStringValueParser::new().map(Token::from)
    )]
    pub token: Option<Token>,
    /// How often in a row a failed request is sent again, 0 to 100.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub retries: u32,
    /// Print one JSON object a line on standard output: events, and last the result or the failure.
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors; with --json, nothing but the last line.
    #[arg(long)]
    pub quiet: bool,
}

/// Downloads what is missing, and shows its progress.
///
/// Errors: a flag is wrong, the licence was not accepted, the server refused or sent wrong bytes, the disk is full,
/// or a signal came. What has arrived stays for the next run, except for what is wrong.
pub async fn fetch(flags: &FetchFlags, report: &mut Report) -> Result<Fetched, Failure> {
    let mut signals = Signals::catch()?;
    tokio::select! {
        result = run(flags, report) => result,
        () = signals.next() => Err(Failure {
            exit: INTERRUPTED,
            advice: Some("run the same command again: it goes on where it stopped"),
            ..failed("CANCELLED", "interrupted; what has arrived is kept")
        }),
    }
}

async fn run(flags: &FetchFlags, report: &mut Report) -> Result<Fetched, Failure> {
    let began = Instant::now();
    check_out(flags)?;
    let hub = open_hub(flags, report)?;
    report.licence(&hub.page());
    let listing = hub.list(Retries::new(flags.retries), |message| report.note(&message)).await?;
    let files = plan(&listing, &flags.stages, flags.precision)
        .map_err(|reason| failed("NOT_FOUND", format!("{} at {}: {reason}", flags.repo, flags.revision)))?;
    report.plan(&files);
    if !flags.accept_licence {
        return Err(not_accepted());
    }
    let folder = Folder::open(&flags.out)?;
    let missing = missing(&folder, &files, report).await?;
    folder.check_space(&missing)?;
    let mut bytes_received = 0;
    for file in &missing {
        bytes_received += download::download(&hub, &folder, file, Retries::new(flags.retries), report).await?;
    }
    Ok(Fetched {
        path: flags.out.clone(),
        files: files.len(),
        bytes: report::total(&files),
        files_present: files.len() - missing.len(),
        bytes_received,
        seconds: (began.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
        next: next(flags),
    })
}

/// A folder that cannot be one is refused before the first request.
fn check_out(flags: &FetchFlags) -> Result<(), Failure> {
    if flags.out.exists() && !flags.out.is_dir() {
        return Err(Failure::input("out", format!("{}: this is a file; name a folder", flags.out.display())));
    }
    Ok(())
}

fn open_hub(flags: &FetchFlags, report: &mut Report) -> Result<Hub, Failure> {
    let endpoint = parse_endpoint(&flags.endpoint)?;
    check_repo(&flags.repo)?;
    check_revision(&flags.revision)?;
    let token = match &flags.token_file {
        Some(path) => Some(Token::read(path)?),
        None => flags.token.clone().filter(|token| !token.is_empty()),
    };
    let local = matches!(endpoint.host_str(), Some("127.0.0.1" | "[::1]" | "localhost"));
    let authorization = match token {
        Some(_) if endpoint.scheme() == "http" && !local => {
            report.note("the token is not sent, for the endpoint is not https");
            None
        }
        Some(token) => Some(token.header()?),
        None => None,
    };
    Hub::new(endpoint, &flags.repo, &flags.revision, authorization)
}

/// The files that are not there with the right length and hash.
async fn missing<'a>(folder: &Folder, files: &'a [Wanted], report: &mut Report) -> Result<Vec<&'a Wanted>, Failure> {
    let mut missing = Vec::new();
    for file in files {
        let path = folder.target(file);
        let refused = |e: std::io::Error| Failure::local(path.display(), e);
        folder.drop_other_parts(file).map_err(refused)?;
        let there = match tokio::fs::metadata(&path).await {
            Ok(info) if info.is_dir() => return Err(refused(std::io::ErrorKind::IsADirectory.into())),
            Ok(info) => Some(info.len()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(refused(e)),
        };
        if there == Some(file.bytes) {
            report.checking(&file.path, file.bytes);
            if download::hash(&path, &file.digest, file.bytes, report).await.map_err(refused)? == file.digest {
                report.present(&file.path, file.bytes);
                continue;
            }
        }
        if there.is_some() {
            report.note(&format!("{}: differs from the server's; it is replaced once that has arrived", file.path));
        }
        missing.push(file);
    }
    Ok(missing)
}

fn not_accepted() -> Failure {
    let excluded = EXCLUDED.join(", ");
    let message = format!("nothing was downloaded: the {LICENCE} has to be accepted first; not granted in: {excluded}");
    let advice = "read the licence; if you accept it, run the same command with --accept-licence";
    Failure {
        field: Some("accept_licence".to_owned()),
        exit: WRONG_INPUT,
        advice: Some(advice),
        ..failed("FAILED_PRECONDITION", message)
    }
}

fn next(flags: &FetchFlags) -> String {
    let generate = format!("avatar generate --models {} --image FILE --audio FILE --prompt TEXT", flags.out.display());
    let whole = Stage::value_variants().iter().all(|stage| flags.stages.contains(stage));
    if whole { generate } else { format!("fetch the other stages too, then {generate}") }
}

fn failed(code: &'static str, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into(), field: None, exit: FAILED, advice: None }
}
