//! Settings: flags and environment variables, read once, with all mistakes reported together.
//!
//! clap only collects the words; [`Mistakes`] turns them into typed values, so that one wrong value does not hide
//! the next.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, CommandFactory, FromArgMatches};

use crate::hardware::{DeviceConfig, DeviceName, PRESSURE_PERCENTS};

/// Exit code of a process whose settings are wrong (`EX_USAGE` of sysexits).
pub const EXIT_USAGE: i32 = 64;

/// How the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// In the syntax of `tracing_subscriber::EnvFilter`.
    pub filter: String,
    /// Text or JSON.
    pub format: LogFormat,
}

/// The flags of every process.
#[derive(Debug, Clone, Args)]
pub struct CommonFlags {
    /// What to log: a level (error, warn, info, debug, trace), or levels by module as in `info,tower=warn`.
    #[arg(long, env = "AVATAR_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,
    /// How to log, to standard error: `text` or `json`.
    #[arg(long, env = "AVATAR_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub log_format: String,
    /// How long requests in flight may go on after SIGTERM, as in `500ms`, `30s` or `5m`.
    #[arg(long, env = "AVATAR_DRAIN_TIMEOUT", value_name = "TIME", default_value = "30s")]
    pub drain_timeout: String,
}

/// What [`CommonFlags`] say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommonConfig {
    /// The log.
    pub log: LogConfig,
    /// How long requests in flight may go on after SIGTERM.
    pub drain_timeout: Duration,
}

impl CommonFlags {
    /// Gives the values their types; what is wrong goes to `mistakes`.
    pub fn resolve(self, mistakes: &mut Mistakes) -> Option<CommonConfig> {
        let filter = mistakes.check("--log", &self.log, |text| {
            tracing_subscriber::EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|e| e.to_string())
        });
        let format = mistakes.check("--log-format", &self.log_format, |text| match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("accepted are text and json".to_owned()),
        });
        let drain_timeout = mistakes.check("--drain-timeout", &self.drain_timeout, parse_duration);
        Some(CommonConfig { log: LogConfig { filter: filter?, format: format? }, drain_timeout: drain_timeout? })
    }
}

/// The type of numbers in which a stage computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compute {
    /// Single precision.
    #[default]
    F32,
    /// The upper half of single precision.
    Bf16,
    /// Half precision.
    F16,
}

/// The flags of a device.
#[derive(Debug, Clone, Args)]
pub struct DeviceFlags {
    /// Device to compute on: `cpu`, or `cpu:4GiB` to hold no more than that on the heap, as on a card of that size;
    /// weights mapped from their files do not count. A request that needs more fails with RESOURCE_EXHAUSTED. A process
    /// that has all stages takes several, as in `cpu:2GiB,cpu:3GiB` or by repeating the flag, and places stages on them;
    /// the diffusion stage takes several and spreads its blocks over them.
    #[arg(long, env = "AVATAR_DEVICE", value_name = "DEVICE,..", value_delimiter = ',', default_value = "cpu")]
    pub device: Vec<String>,
    /// Percent of the device's memory above which idle stages are unloaded and new work has to wait (20 to 100; 100 is
    /// never); ten less ends that.
    #[arg(long, env = "AVATAR_PRESSURE_PERCENT", value_name = "PERCENT", default_value = "85")]
    pub pressure_percent: String,
}

impl DeviceFlags {
    /// Gives the values of a process with one device their types; what is wrong goes to `mistakes`.
    pub fn resolve(&self, mistakes: &mut Mistakes) -> Option<DeviceConfig> {
        let mut devices = self.resolve_all(mistakes)?;
        if devices.len() > 1 {
            mistakes.note(format!(
                "--device {:?}: this stage has one device; only diffusion is spread over several",
                self.device.join(",")
            ));
            return None;
        }
        devices.pop()
    }

    /// Gives the values of a stage that can be spread over several devices their types; what is wrong goes to `mistakes`.
    fn resolve_spread(&self, mistakes: &mut Mistakes) -> Option<(DeviceConfig, Vec<DeviceConfig>)> {
        let mut devices = self.resolve_all(mistakes)?;
        let first = if devices.is_empty() { None } else { Some(devices.remove(0)) }?;
        let on_card = |device: &DeviceConfig| device.name.card().is_some();
        if devices.iter().any(|device| on_card(device) != on_card(&first)) {
            mistakes.note(format!(
                "--device {:?}: blocks are spread over parts of the processor or over cards, not over both",
                self.device.join(",")
            ));
            return None;
        }
        Some((first, devices))
    }

    /// Gives the values their types, of one device or several; what is wrong goes to `mistakes`.
    pub fn resolve_all(&self, mistakes: &mut Mistakes) -> Option<Vec<DeviceConfig>> {
        let percent = mistakes.check("--pressure-percent", &self.pressure_percent, |text| {
            parse_number(text, usize::from(*PRESSURE_PERCENTS.start()), usize::from(*PRESSURE_PERCENTS.end()))
        });
        let several = self.device.len() > 1;
        let read = |(number, text): (usize, &String)| {
            mistakes.check("--device", text, |text| {
                let name: DeviceName = text.parse().map_err(|e: crate::hardware::DeviceError| e.to_string())?;
                if several && name == (DeviceName::Cpu { budget_bytes: None }) {
                    return Err("each of several devices needs its bytes, as in cpu:2GiB,cpu:3GiB".to_owned());
                }
                let device = DeviceConfig::new(name, percent.map_or(100, |percent| percent as u8));
                let number = several.then_some(number);
                device.map(|device| DeviceConfig { number, ..device }).map_err(|e| e.to_string())
            })
        };
        // All of them are read, so that every mistake is noted.
        let devices: Vec<_> = self.device.iter().enumerate().map(read).collect();
        let devices: Vec<DeviceConfig> = devices.into_iter().collect::<Option<_>>()?;
        let mut cards: Vec<u32> = devices.iter().filter_map(|device| device.name.card()).collect();
        cards.sort_unstable();
        if let Some(twice) = cards.windows(2).find(|pair| pair[0] == pair[1]) {
            mistakes.note(format!("--device {:?}: cuda:{} is named twice", self.device.join(","), twice[0]));
            return None;
        }
        Some(devices)
    }
}

/// The flags of every stage.
#[derive(Debug, Clone, Args)]
pub struct StageFlags {
    /// Address and port to serve gRPC on; port 0 takes a free one.
    #[arg(long, env = "AVATAR_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:0")]
    pub listen: String,
    /// Folder of the models: one subfolder a stage, of which only the stage's own is read, or the official download.
    #[arg(long, env = "AVATAR_MODELS", value_name = "DIR", default_value = "models")]
    pub models: PathBuf,
    #[allow(missing_docs)] // A doc comment would replace the description of the program in --help.
    #[command(flatten)]
    pub device: DeviceFlags,
    /// Type to compute in: `f32`, `bf16` or `f16`. Sums are f32 in any case; 16 bits need less memory and are less exact.
    #[arg(long, env = "AVATAR_COMPUTE", value_name = "TYPE", default_value = "f32")]
    pub compute: String,
    /// Requests that may wait for the device (1 to 1024); more are refused with RESOURCE_EXHAUSTED.
    #[arg(long, env = "AVATAR_QUEUE", value_name = "N", default_value = "16")]
    pub queue: String,
    /// Largest tensor that a request may bring, as in `1000000`, `64MiB` or `1GiB`.
    #[arg(long, env = "AVATAR_MAX_TENSOR_BYTES", value_name = "BYTES", default_value = "256MiB")]
    pub max_tensor_bytes: String,
    #[allow(missing_docs)] // A doc comment would replace the description of the program in --help.
    #[command(flatten)]
    pub common: CommonFlags,
}

/// What [`StageFlags`] say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageConfig {
    /// Where to serve gRPC.
    pub listen: SocketAddr,
    /// Folder of the models.
    pub models: PathBuf,
    /// Device to compute on.
    pub device: DeviceConfig,
    /// Type to compute in.
    pub compute: Compute,
    /// Requests that may wait for the device.
    pub queue: usize,
    /// Largest tensor that a request may bring.
    pub max_tensor_bytes: u64,
    /// What every process has.
    pub common: CommonConfig,
}

impl StageConfig {
    /// Settings for a stage inside another process or a test: any free port of this host, everything else as the
    /// flags' defaults.
    #[must_use]
    pub fn local(models: impl Into<PathBuf>) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            models: models.into(),
            device: DeviceConfig::cpu(),
            compute: Compute::F32,
            queue: 16,
            max_tensor_bytes: 256 << 20,
            common: CommonConfig {
                log: LogConfig { filter: "info".to_owned(), format: LogFormat::Text },
                drain_timeout: Duration::from_secs(30),
            },
        }
    }
}

impl StageFlags {
    /// Gives the values their types; what is wrong goes to `mistakes`.
    pub fn resolve(self, mistakes: &mut Mistakes) -> Option<StageConfig> {
        let device = self.device.resolve(mistakes);
        self.resolve_on(device, mistakes)
    }

    /// As [`resolve`](Self::resolve), of a stage that can be spread over several devices; gives those besides the first.
    pub fn resolve_spread(self, mistakes: &mut Mistakes) -> Option<(StageConfig, Vec<DeviceConfig>)> {
        let (device, others) = self.device.resolve_spread(mistakes).unzip();
        Some((self.resolve_on(device, mistakes)?, others?))
    }

    fn resolve_on(self, device: Option<DeviceConfig>, mistakes: &mut Mistakes) -> Option<StageConfig> {
        let listen = mistakes.check("--listen", &self.listen, parse_listen);
        let compute = mistakes.check("--compute", &self.compute, parse_compute);
        let queue = mistakes.check("--queue", &self.queue, |text| parse_number(text, 1, 1024));
        let max_tensor_bytes = mistakes.check("--max-tensor-bytes", &self.max_tensor_bytes, parse_bytes);
        let common = self.common.resolve(mistakes);
        Some(StageConfig {
            listen: listen?,
            models: self.models,
            device: device?,
            compute: compute?,
            queue: queue?,
            max_tensor_bytes: max_tensor_bytes?,
            common: common?,
        })
    }
}

/// Everything that is wrong with the settings.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mistakes(Vec<String>);

impl Mistakes {
    /// Parses one value; a failure is noted with the flag and the value.
    pub fn check<T>(&mut self, flag: &str, value: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        parse(value).map_err(|reason| self.0.push(format!("{flag} {value:?}: {reason}"))).ok()
    }

    /// Notes a mistake that is no single value's, in a sentence.
    pub fn note(&mut self, sentence: impl Into<String>) {
        self.0.push(sentence.into());
    }

    /// All of them, as one text without the word that marks errors.
    #[must_use]
    pub fn sentences(&self) -> String {
        self.0.join("; ")
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| writeln!(f, "error: {line}"))
    }
}

/// Flags that become a configuration.
pub trait Settings: CommandFactory + FromArgMatches {
    /// The typed values.
    type Config;

    /// The command line, where a program's defaults differ from those of the shared flags.
    fn with_defaults() -> clap::Command {
        Self::command()
    }

    /// Gives the values their types; what is wrong goes to `mistakes`. `None` only with a mistake noted.
    fn resolve(self, mistakes: &mut Mistakes) -> Option<Self::Config>;
}

/// Reads the process's settings, or ends the process: code 0 after `--help` and `--version`, 64 with all mistakes on
/// standard error otherwise.
pub fn parse_or_exit<S: Settings>() -> S::Config {
    match parse_from::<S>(std::env::args_os()) {
        Ok(config) => config,
        Err(ConfigError::Usage(error)) => {
            // Help or an error that cannot be printed has no other way to say so than the exit code.
            let _ = error.print();
            std::process::exit(if error.use_stderr() { EXIT_USAGE } else { 0 });
        }
        Err(ConfigError::Mistakes(mistakes)) => {
            eprint!("{mistakes}");
            std::process::exit(EXIT_USAGE);
        }
    }
}

/// Why the settings cannot be used.
#[derive(Debug)]
pub enum ConfigError {
    /// Not the program's flags at all, or a call for help.
    Usage(clap::Error),
    /// Values that are wrong.
    Mistakes(Mistakes),
}

/// As [`parse_or_exit`], from given arguments (the first is the program's name) and without exiting.
pub fn parse_from<S: Settings>(
    arguments: impl IntoIterator<Item = std::ffi::OsString>,
) -> Result<S::Config, ConfigError> {
    let flags = S::with_defaults()
        .try_get_matches_from(arguments)
        .and_then(|matches| S::from_arg_matches(&matches))
        .map_err(ConfigError::Usage)?;
    let mut mistakes = Mistakes::default();
    match flags.resolve(&mut mistakes) {
        Some(config) if mistakes.is_empty() => Ok(config),
        _ => Err(ConfigError::Mistakes(mistakes)),
    }
}

/// Reads an address and port.
pub fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "not an address and port such as 127.0.0.1:50051 or [::1]:0".to_owned())
}

/// Reads the type to compute in.
pub fn parse_compute(text: &str) -> Result<Compute, String> {
    match text {
        "f32" => Ok(Compute::F32),
        "bf16" => Ok(Compute::Bf16),
        "f16" => Ok(Compute::F16),
        _ => Err("not a type to compute in; accepted are f32, bf16 and f16".to_owned()),
    }
}

/// Reads a whole number within limits.
pub fn parse_number(text: &str, least: usize, most: usize) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(format!("not a whole number from {least} to {most}")),
    }
}

/// Reads a number of bytes: plain, or with KiB, MiB or GiB behind it. At least 1.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor = match unit.trim_start() {
        "" | "B" => Some(1u64),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    };
    match (digits.parse::<u64>().ok(), factor) {
        (Some(number), Some(factor)) if number > 0 => {
            number.checked_mul(factor).ok_or_else(|| "more bytes than 64 bits count".to_owned())
        }
        _ => Err("not a number of bytes such as 1000000, 64MiB or 1GiB".to_owned()),
    }
}

/// Reads a time: a whole number with ms, s or m behind it.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor = match unit {
        "ms" => Some(1u64),
        "s" => Some(1000),
        "m" => Some(60_000),
        _ => None,
    };
    match (digits.parse::<u64>().ok(), factor) {
        // A day is more than any wait here makes sense of, and far from what overflows.
        (Some(number), Some(factor)) if number <= 86_400_000 / factor => Ok(Duration::from_millis(number * factor)),
        _ => Err("not a time of at most a day such as 500ms, 30s or 5m".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        stage: StageFlags,
    }

    impl Settings for Flags {
        type Config = StageConfig;

        fn with_defaults() -> clap::Command {
            Self::command().mut_arg("listen", |a| a.default_value("127.0.0.1:50051"))
        }

        fn resolve(self, mistakes: &mut Mistakes) -> Option<StageConfig> {
            self.stage.resolve(mistakes)
        }
    }

    fn parse(arguments: &[&str]) -> Result<StageConfig, ConfigError> {
        parse_from::<Flags>(std::iter::once("x").chain(arguments.iter().copied()).map(Into::into))
    }

    #[test]
    fn defaults_are_the_programs_own() {
        let config = parse(&[]).unwrap();
        assert_eq!(config.listen.port(), 50051);
        assert_eq!(StageConfig { listen: config.listen, ..StageConfig::local("models") }, config);
    }

    #[test]
    fn several_devices_have_their_bytes_each_and_a_stage_of_its_own_has_one() {
        let flags = |devices: &[&str]| DeviceFlags {
            device: devices.iter().map(|&name| name.to_owned()).collect(),
            pressure_percent: "85".to_owned(),
        };
        let mut mistakes = Mistakes::default();
        let devices = flags(&["cpu:2GiB", "cpu:3GiB"]).resolve_all(&mut mistakes).unwrap();
        let told: Vec<_> = devices.iter().map(|device| (device.label(), device.budget_bytes >> 30)).collect();
        assert_eq!(told, [("cpu.0".to_owned(), 2), ("cpu.1".to_owned(), 3)]);
        assert!(mistakes.is_empty());
        assert_eq!(flags(&["cpu:2GiB", "cpu:3GiB"]).resolve(&mut mistakes), None);
        assert_eq!(flags(&["cpu", "cpu:1x"]).resolve_all(&mut mistakes), None);
        let text = mistakes.sentences();
        for part in ["this stage has one device", "needs its bytes", "\"cpu:1x\""] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(matches!(parse(&["--device", "cpu:1GiB,cpu:1GiB"]), Err(ConfigError::Mistakes(_))));
    }

    #[test]
    fn all_mistakes_are_reported_together() {
        let arguments = [
            ["--listen", "here"],
            ["--device", "cuda:0"],
            ["--pressure-percent", "101"],
            ["--compute", "int4"],
            ["--queue", "0"],
            ["--max-tensor-bytes", "lots"],
            ["--log", "a=b=c"],
        ]
        .concat();
        let Err(ConfigError::Mistakes(mistakes)) = parse(&arguments) else { panic!() };
        let text = mistakes.to_string();
        assert_eq!(text.lines().count(), 7, "{text}");
        for word in [
            "--listen \"here\"",
            "this build has no CUDA",
            "20 to 100",
            "f32, bf16 and f16",
            "1 to 1024",
            "\"lots\"",
            "--log \"a=b=c\"",
        ] {
            assert!(text.contains(word), "{word} in {text}");
        }
    }

    #[test]
    fn unknown_flags_are_a_usage_error_and_help_is_not() {
        let Err(ConfigError::Usage(error)) = parse(&["--nonsense"]) else { panic!() };
        assert!(error.use_stderr());
        let Err(ConfigError::Usage(error)) = parse(&["--help"]) else { panic!() };
        assert!(!error.use_stderr());
        assert!(error.to_string().contains("AVATAR_MAX_TENSOR_BYTES"));
    }

    #[test]
    fn bytes_and_times_have_units() {
        assert_eq!(parse_bytes("7"), Ok(7));
        assert_eq!(parse_bytes("64MiB"), Ok(64 << 20));
        assert!(parse_bytes("99999999999GiB").is_err());
        assert!(parse_bytes("0").is_err());
        assert!(parse_bytes("-1").is_err());
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert!(parse_duration("30").is_err());
        assert!(parse_duration("9999999999999m").is_err());
    }
}
