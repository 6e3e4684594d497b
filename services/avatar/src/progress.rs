//! How a generation's progress is shown: bars, lines, JSON events, or not at all.

use std::{
    collections::HashMap,
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    time::{Duration, Instant},
};

use gateway::api::video::Face;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use planner::{Bytes, Plan, Request, size::PictureSize};
use proto::v1::{GenerationEvent, GenerationState, Outcome, Preview, Stage};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::failure::Failure;

/// Fewest frames that the reference denoises.
const REFERENCE_FRAMES: u32 = 129;

/// Shows progress on standard error, and the result on standard output.
pub struct Progress {
    form: Form,
    quiet: bool,
    /// Time at step 0, to tell the pace of the steps alone.
    denoising_since: Option<Instant>,
    shown_step: u32,
    /// Warnings that were shown when they came.
    warned: Vec<String>,
}

enum Form {
    Json,
    Bars { all: MultiProgress, of: HashMap<Stage, ProgressBar> },
    Lines,
}

/// What a finished generation made.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Completed {
    /// The video file.
    pub path: PathBuf,
    /// Frames of the video.
    pub frames: u32,
    /// Frames a second.
    pub fps: u32,
    /// Pixels to the right.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// Denoise steps done.
    pub steps: u32,
    /// The noise's seed.
    pub seed: u64,
    /// Frames of the speech that the model heard.
    pub heard_frames: u32,
    /// Frames that the model denoised, of which those of the video were kept.
    pub denoised_frames: u32,
    /// `reference` where the reference's rules were asked for.
    pub parity: Option<&'static str>,
    /// Tokens of the prompt, with the words that are put before it.
    pub prompt_tokens: u32,
    /// Of these, those that LLaVA read; fewer only where --truncate-prompt cut the prompt.
    pub prompt_tokens_kept: u32,
    /// CLIP's tokens of what was kept.
    pub clip_tokens: u32,
    /// Of these, those that CLIP read.
    pub clip_tokens_kept: u32,
    /// Faces that were found, the largest first, or the one that was given.
    pub faces: Vec<Face>,
    /// The face that was animated.
    pub face: Option<Face>,
    /// Seconds from the first stage's beginning to the video's end.
    pub elapsed_seconds: f64,
    /// Seconds by stage, from its first call to its last answer; stages that are asked at the same time wait for each other.
    pub seconds: Map<String, Value>,
    /// Most bytes held at once, by stage; the gateway holds no weights and is not listed.
    pub peak_bytes: Map<String, Value>,
    /// Most bytes held at once by each device that was used, where a plan tells the stages' devices.
    pub device_peak_bytes: Map<String, Value>,
    /// What was predicted for the same request, and how far off it was.
    pub predicted: Option<Predicted>,
    /// How the transformer's weights came from their files, where they come block by block.
    pub weights: Option<Brought>,
    /// What the caller should know, in sentences.
    pub warnings: Vec<String>,
    /// Most bytes that the device of each stage held.
    #[serde(skip)]
    pub peaks_of_devices: HashMap<&'static str, u64>,
    /// Guidance branches of a step.
    #[serde(skip)]
    pub branches: u64,
    /// Every step ran in full.
    #[serde(skip)]
    pub no_feature_cache: bool,
}

/// What the planner expected of a generation.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Predicted {
    /// The device of each stage.
    pub placement: Map<String, Value>,
    /// Most bytes held at once, by device.
    pub device_peak_bytes: Map<String, Value>,
    /// Why it was planned so, in sentences.
    pub reasons: Vec<String>,
    /// Seconds by stage.
    pub seconds: Map<String, Value>,
    /// Most bytes held at once, by stage.
    pub peak_bytes: Map<String, Value>,
    /// Measured seconds from beginning to end, as a part of the predicted ones of all stages.
    pub seconds_ratio: f64,
    /// The measured peak of the stage that was to hold most, as a part of the predicted one.
    pub peak_ratio: f64,
}

/// How blocks of weights came from their files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Brought {
    /// Blocks of the transformer.
    pub blocks: u32,
    /// Of these, the ones that stay in memory.
    pub resident_blocks: u32,
    /// Seconds that steps waited for weights.
    pub waited_seconds: f64,
    /// Seconds of reading for which they did not wait.
    pub hidden_seconds: f64,
}

impl Completed {
    /// Takes times, memory, counts and warnings from the gateway's own account.
    #[must_use]
    pub fn with_outcome(mut self, outcome: &Outcome) -> Self {
        for report in &outcome.stages {
            let name = stage_name(report.stage());
            self.seconds.insert(name.to_owned(), json!(rounded(report.seconds)));
            if report.stage() == Stage::Diffusion && report.weight_blocks > 0 {
                self.weights = Some(Brought {
                    blocks: report.weight_blocks,
                    resident_blocks: report.resident_weight_blocks,
                    waited_seconds: report.weights_waited_seconds,
                    hidden_seconds: report.weights_hidden_seconds,
                });
            }
            if report.stage() != Stage::Unspecified {
                self.peak_bytes.insert(name.to_owned(), json!(report.peak_bytes));
                self.peaks_of_devices.insert(name, report.device_peak_bytes);
            }
        }
        self.warnings.clone_from(&outcome.warnings);
        self.faces = outcome.faces.iter().map(Face::from).collect();
        self.face = outcome.face.as_ref().map(Face::from);
        self.prompt_tokens = outcome.prompt_tokens;
        self.prompt_tokens_kept = outcome.prompt_tokens_kept;
        self.clip_tokens = outcome.clip_tokens;
        self.clip_tokens_kept = outcome.clip_tokens_kept;
        self
    }
}

impl Completed {
    /// What was made, as the planner takes it.
    #[must_use]
    pub fn request(&self) -> Request {
        // The reference denoises no fewer.
        let frames = if self.parity.is_some() { self.frames.max(REFERENCE_FRAMES) } else { self.frames };
        Request {
            size: Some(PictureSize { width: self.width, height: self.height }),
            frames: Some(frames),
            steps: Some(self.steps),
            prompt_tokens: Some(self.prompt_tokens_kept),
            branches: Some(self.branches),
            no_feature_cache: self.no_feature_cache,
        }
    }

    /// Takes what a plan of the same request expected.
    pub fn expected(&mut self, plan: Option<&Plan>) {
        let Some(plan) = plan else { return };
        let mut predicted = Predicted { reasons: plan.reasons.clone(), ..Predicted::default() };
        for phase in &plan.phases {
            let before = predicted.device_peak_bytes.get(&phase.device).and_then(Value::as_u64).unwrap_or_default();
            predicted.device_peak_bytes.insert(phase.device.clone(), json!(phase.peak_bytes.max(before)));
        }
        let (mut expected, mut most) = (0.0, 0);
        for stage in &plan.stages {
            let name = stage.stage.name();
            let measured = |of: &Map<String, Value>| of.get(name).and_then(Value::as_f64).unwrap_or_default();
            expected += stage.seconds;
            if stage.peak_bytes > most {
                most = stage.peak_bytes;
                predicted.peak_ratio = rounded(measured(&self.peak_bytes) / stage.peak_bytes as f64);
            }
            let here = self.peaks_of_devices.get(name).copied().unwrap_or_default();
            let before = self.device_peak_bytes.get(&stage.device).and_then(Value::as_u64).unwrap_or_default();
            self.device_peak_bytes.insert(stage.device.clone(), json!(here.max(before)));
            predicted.placement.insert(name.to_owned(), json!(stage.device));
            predicted.seconds.insert(name.to_owned(), json!(rounded(stage.seconds)));
            predicted.peak_bytes.insert(name.to_owned(), json!(stage.peak_bytes));
        }
        predicted.seconds_ratio = rounded(self.elapsed_seconds / f64::max(expected, 1e-6));
        self.predicted = Some(predicted);
    }

    /// Times, peak and predictions in a sentence.
    fn cost(&self) -> String {
        let all = |of: &Map<String, Value>| of.values().filter_map(Value::as_f64).sum::<f64>();
        let most = |of: &Map<String, Value>| Bytes(of.values().filter_map(Value::as_u64).max().unwrap_or_default());
        let mut said = format!("made in {:.1} s", self.elapsed_seconds);
        if let Some(predicted) = &self.predicted {
            let (seconds, bytes) = (all(&predicted.seconds), most(&predicted.peak_bytes));
            said += &format!(" ({seconds:.1} s predicted), peak {} ({bytes} predicted)", most(&self.peak_bytes));
        }
        if let Some(Brought { blocks, resident_blocks, waited_seconds, hidden_seconds }) = self.weights {
            said += &format!(
                "; {resident_blocks} of {blocks} blocks stayed in memory, {waited_seconds:.1} s were spent waiting for \
                 weights and {hidden_seconds:.1} s of reading were hidden"
            );
        }
        said
    }
}

/// To thousandths.
pub(crate) fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

impl Progress {
    /// Bars where standard error is a terminal, lines elsewhere, JSON where asked for.
    #[must_use]
    pub fn new(json: bool, quiet: bool) -> Self {
        let form = if json {
            Form::Json
        } else if std::io::stderr().is_terminal() && !quiet {
            Form::Bars { all: MultiProgress::new(), of: HashMap::new() }
        } else {
            Form::Lines
        };
        Self { form, quiet, denoising_since: None, shown_step: 0, warned: Vec::new() }
    }

    /// Shows what the caller should know before the generation begins.
    pub fn warn(&mut self, sentence: &str) {
        if self.quiet {
            return;
        }
        match &self.form {
            Form::Json => print_line(&json!({ "event": "preparing", "message": sentence, "warning": true })),
            Form::Bars { .. } | Form::Lines => eprintln!("warning: {sentence}"),
        }
        self.warned.push(sentence.to_owned());
    }

    /// Shows one event of a generation that goes on.
    pub fn event(&mut self, event: &GenerationEvent) {
        if event.state() == GenerationState::Denoising && self.denoising_since.is_none() {
            self.denoising_since = Some(Instant::now());
        }
        if self.quiet {
            return;
        }
        let (step, steps) = event.progress.as_ref().map_or((0, 0), |p| (p.step, p.steps));
        let stepped = step > self.shown_step;
        self.shown_step = self.shown_step.max(step);
        let pace = self.pace(step, steps);
        let stage = stage_name(event.stage());
        // The name stands before the message already.
        let said = event.message.strip_prefix(stage).unwrap_or(&event.message).trim_start();
        match &mut self.form {
            Form::Json => print_line(&event_json(event)),
            Form::Lines if event.warning => {
                eprintln!("warning: {}", event.message);
                self.warned.push(event.message.clone());
            }
            Form::Bars { all, .. } if event.warning => {
                all.suspend(|| eprintln!("warning: {}", event.message));
                self.warned.push(event.message.clone());
            }
            Form::Lines => {
                if stepped {
                    let held = if said.is_empty() { String::new() } else { format!("; {said}") };
                    eprintln!("denoise: {pace}{held}");
                } else if !said.is_empty() {
                    eprintln!("{stage}: {said}");
                }
            }
            Form::Bars { all, of } => {
                if event.stage() != Stage::Unspecified && !said.is_empty() {
                    match of.get(&event.stage()) {
                        // The last thing that a stage says is how long it took.
                        Some(bar) if said.starts_with("took ") => bar.finish_with_message(said.to_owned()),
                        Some(bar) => bar.set_message(said.to_owned()),
                        None => {
                            let bar = all.add(stage_bar(event.stage(), steps));
                            bar.set_message(said.to_owned());
                            of.insert(event.stage(), bar);
                        }
                    }
                }
                if stepped {
                    let bar = of.entry(Stage::Diffusion).or_insert_with(|| all.add(stage_bar(Stage::Diffusion, steps)));
                    bar.set_length(u64::from(steps));
                    bar.set_position(u64::from(step));
                    bar.set_message(if said.is_empty() { pace } else { format!("{pace}; {said}") });
                }
            }
        }
    }

    fn pace(&self, step: u32, steps: u32) -> String {
        let per_step = self.denoising_since.map_or(0.0, |t| t.elapsed().as_secs_f64()) / f64::from(step.max(1));
        let left = per_step * f64::from(steps.saturating_sub(step));
        format!("step {step} of {steps}, {per_step:.2} s a step, {left:.0} s left")
    }

    /// Shows the result: the last thing on standard output.
    pub fn completed(self, result: &Completed) {
        self.clear();
        match self.form {
            Form::Json => {
                let mut value = json!(result);
                if let Some(fields) = value.as_object_mut() {
                    fields.insert("event".to_owned(), json!("completed"));
                }
                print_line(&value);
            }
            Form::Bars { .. } | Form::Lines if self.quiet => {}
            Form::Bars { .. } | Form::Lines => {
                for warning in result.warnings.iter().filter(|warning| !self.warned.contains(warning)) {
                    eprintln!("warning: {warning}");
                }
                let Completed { frames, fps, width, height, .. } = result;
                eprintln!("{frames} frames at {fps} a second, {width}x{height}, {}", result.cost());
                print_text(&result.path.display().to_string());
            }
        }
    }

    /// Shows the failure: for programs on standard output, for people on standard error.
    pub fn failed(self, failure: &Failure) {
        self.clear();
        match self.form {
            Form::Json => {
                let Failure { code, message, field, .. } = failure;
                print_line(&json!({ "event": "failed", "code": code, "message": message, "field": field }));
            }
            Form::Bars { .. } | Form::Lines => eprintln!("{}", failure.sentence()),
        }
    }

    /// Takes the bars away.
    pub(crate) fn clear(&self) {
        if let Form::Bars { of, .. } = &self.form {
            of.values().for_each(ProgressBar::abandon);
        }
    }
}

fn stage_bar(stage: Stage, steps: u32) -> ProgressBar {
    let template = if stage == Stage::Diffusion {
        "{prefix:<14} {bar:24} {msg}"
    } else {
        "{prefix:<14} {spinner} {elapsed:>4} {msg}"
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(u64::from(steps)).with_style(style).with_prefix(stage_name(stage));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// An event as one flat JSON object.
pub(crate) fn event_json(event: &GenerationEvent) -> Value {
    let mut line = Map::new();
    line.insert("event".to_owned(), json!(state_name(event.state())));
    line.insert("generation_id".to_owned(), json!(event.generation_id));
    if let Some(progress) = &event.progress {
        line.insert("step".to_owned(), json!(progress.step));
        line.insert("steps".to_owned(), json!(progress.steps));
        line.insert("percent".to_owned(), json!(progress.percent));
        line.insert("elapsed_seconds".to_owned(), json!(progress.elapsed_seconds));
        if let Some(remaining) = progress.remaining_seconds {
            line.insert("remaining_seconds".to_owned(), json!(remaining));
        }
    }
    if event.stage() != Stage::Unspecified {
        line.insert("stage".to_owned(), json!(stage_name(event.stage())));
    }
    if !event.message.is_empty() {
        line.insert("message".to_owned(), json!(event.message));
    }
    if !event.faces.is_empty() {
        line.insert("faces".to_owned(), json!(event.faces.iter().map(Face::from).collect::<Vec<_>>()));
        line.insert("face".to_owned(), json!(event.face.as_ref().map(Face::from)));
    }
    if let Some(preview) = &event.preview {
        let Preview { step, width, height, bytes, sha256 } = preview;
        let shown = json!({ "step": step, "width": width, "height": height, "bytes": bytes, "sha256": sha256 });
        line.insert("preview".to_owned(), shown);
    }
    if event.warning {
        line.insert("warning".to_owned(), json!(true));
    }
    Value::Object(line)
}

/// Prints a JSON object as one line.
pub(crate) fn print_line(value: &Value) {
    print_text(&value.to_string());
}

/// Prints a line; a reader that went away is no reason to stop the work.
pub(crate) fn print_text(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// A state's name.
pub(crate) fn state_name(state: GenerationState) -> &'static str {
    match state {
        GenerationState::Unspecified => "unspecified",
        GenerationState::Queued => "queued",
        GenerationState::Encoding => "encoding",
        GenerationState::Denoising => "denoising",
        GenerationState::Decoding => "decoding",
        GenerationState::Completed => "completed",
        GenerationState::Failed => "failed",
        GenerationState::Cancelled => "cancelled",
    }
}

fn stage_name(stage: Stage) -> &'static str {
    match stage {
        Stage::Unspecified => "gateway",
        Stage::AudioEncoder => "audio-encoder",
        Stage::TextEncoder => "text-encoder",
        Stage::ImageEncoder => "image-encoder",
        Stage::Diffusion => "diffusion",
        Stage::VaeDecode => "vae-decode",
    }
}

#[cfg(test)]
mod tests {
    use proto::v1::{Progress as Pace, StageReport};

    use super::*;

    #[test]
    fn an_event_is_one_flat_object() {
        let event = GenerationEvent {
            generation_id: "g".into(),
            state: GenerationState::Denoising.into(),
            progress: Some(Pace { step: 2, steps: 8, percent: 30.0, elapsed_seconds: 1.5, ..Pace::default() }),
            ..Default::default()
        };
        let value = event_json(&event);
        assert_eq!((&value["event"], &value["step"], &value["steps"]), (&json!("denoising"), &json!(2), &json!(8)));
        assert!(value.get("remaining_seconds").is_none() && value.get("stage").is_none());
    }

    #[test]
    fn the_result_names_stages_and_warnings() {
        let report = |stage: Stage, seconds, peak_bytes| StageReport {
            stage: stage.into(),
            seconds,
            peak_bytes,
            ..StageReport::default()
        };
        let outcome = Outcome {
            warnings: vec!["no face was found".into()],
            stages: vec![report(Stage::Diffusion, 1.23456, 7), report(Stage::Unspecified, 0.5, 0)],
            ..Default::default()
        };
        let result = Completed {
            path: "v.mp4".into(),
            frames: 25,
            fps: 25,
            width: 128,
            height: 128,
            steps: 8,
            seed: 1,
            heard_frames: 25,
            denoised_frames: 25,
            ..Completed::default()
        }
        .with_outcome(&outcome);
        assert_eq!(json!(result.seconds), json!({ "diffusion": 1.235, "gateway": 0.5 }));
        assert_eq!(json!(result.peak_bytes), json!({ "diffusion": 7 }));
        assert_eq!(result.warnings.len(), 1);
    }

    #[test]
    fn what_devices_held_stands_beside_what_they_were_planned_to_hold() {
        let planner = planner::Planner {
            table: planner::ModelTable::published().unwrap(),
            tiers: planner::Tiers::default(),
            devices: vec![planner::Device::card(0, Bytes(24 << 30)), planner::Device::card(1, Bytes(80 << 30))],
            placement: Some([0, 0, 0, 1, 0]),
            tier: planner::plan::Choice::Unlimited,
            precisions: vec![planner::Precision::Bf16],
            allow_degrade: false,
        };
        let plan = planner.plan(&Request { frames: Some(9), ..Request::default() }).unwrap();
        let report = |stage: Stage, device_peak_bytes| StageReport {
            stage: stage.into(),
            device_peak_bytes,
            ..StageReport::default()
        };
        let stages = vec![report(Stage::TextEncoder, 5), report(Stage::Diffusion, 9), report(Stage::VaeDecode, 7)];
        let mut done = Completed::default().with_outcome(&Outcome { stages, ..Outcome::default() });
        done.expected(Some(&plan));
        assert_eq!(json!(done.device_peak_bytes), json!({ "cuda:0": 7, "cuda:1": 9 }));
        let predicted = done.predicted.unwrap();
        assert_eq!(
            (&predicted.placement["diffusion"], &predicted.placement["vae-decode"]),
            (&json!("cuda:1"), &json!("cuda:0"))
        );
        let most = plan.phases.iter().filter(|phase| phase.device == "cuda:1").map(|phase| phase.peak_bytes).max();
        assert_eq!(predicted.device_peak_bytes["cuda:1"], json!(most));
    }
}
