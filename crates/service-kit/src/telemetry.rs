//! Logs: one subscriber for the process, to standard error.

use tracing_subscriber::{EnvFilter, fmt};

use crate::config::{LogConfig, LogFormat};

/// Starts logging. A second call in the same process changes nothing.
///
/// Standard output stays free for what other programs read.
pub fn init(config: &LogConfig) {
    // The filter was checked when the settings were read; should it not parse here, information is the middle way.
    let filter = EnvFilter::try_new(&config.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match config.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    if let Err(reason) = started {
        tracing::debug!("logging runs already: {reason}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starting_twice_is_harmless() {
        let config = LogConfig { filter: "warn".into(), format: LogFormat::Json };
        init(&config);
        init(&config);
    }
}
