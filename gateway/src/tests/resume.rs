//! Restarts: what goes on from where.

use super::*;

/// The video of a run that is stopped before a step is that of a run that is not, and no step is taken twice.
#[tokio::test]
async fn a_generation_goes_on_after_a_restart_where_it_was() {
    let spec = || GenerationSpec { steps: Some(4), ..Default::default() };
    let undisturbed = Arc::new(Script::default());
    let (desk, id) = start_with(&undisturbed, spec(), 5).await;
    desk.ended(id).await;

    let script =
        Arc::new(Script { away_at: Some((2, 1_000_000)), identity: Mutex::new("m".into()), ..Default::default() });
    let (desk, id) = start_with(&script, spec(), 5).await;
    until(|| script.predicted.load(Ordering::SeqCst) > 2).await;
    assert_eq!(desk.gateway.store().get(&id.to_string()).await.unwrap().state(), GenerationState::Denoising);
    let again = Arc::new(Script { identity: Mutex::new("m".into()), ..Script::default() });
    let desk = desk.restart(&again).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!(again.encoded.load(Ordering::SeqCst), 0, "what the encoders gave was kept");
    let steps: Vec<u32> = again.passes.lock().unwrap().iter().map(|(header, _)| header.step).collect();
    assert_eq!(steps, [2, 3]);
    assert_eq!(*again.decoded.lock().unwrap(), *undisturbed.decoded.lock().unwrap());
    let events = desk.events(id).await;
    assert_eq!(
        events.iter().map(|event| event.number).collect::<Vec<_>>(),
        (1..=events.len() as u64).collect::<Vec<_>>()
    );
    for pair in events.windows(2) {
        assert!(life::may_follow(pair[0].state(), pair[1].state()), "{pair:?}");
    }
}

#[tokio::test]
async fn a_finished_denoise_is_not_repeated_for_the_decoder() {
    let script = Arc::new(Script { decoder_away: AtomicUsize::new(usize::MAX), ..Script::default() });
    let (desk, id) = start(&script, 2).await;
    until(|| script.decoder_away.load(Ordering::SeqCst) < usize::MAX).await;
    let again = Arc::new(Script { decoder_away: AtomicUsize::new(2), ..Script::default() });
    let desk = desk.restart(&again).await;
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    assert_eq!(again.predicted.load(Ordering::SeqCst), 0);
    assert_eq!(again.opened.load(Ordering::SeqCst), 0);
    assert_eq!(again.decoded.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn latents_of_another_model_are_not_gone_on_with() {
    let script =
        Arc::new(Script { away_at: Some((2, 1_000_000)), identity: Mutex::new("old".into()), ..Default::default() });
    let (desk, id) = start(&script, 3).await;
    until(|| script.predicted.load(Ordering::SeqCst) > 2).await;
    let again = Arc::new(Script { identity: Mutex::new("new".into()), ..Script::default() });
    let desk = desk.restart(&again).await;
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    assert_eq!((again.encoded.load(Ordering::SeqCst), again.predicted.load(Ordering::SeqCst)), (3, 3));
    let warnings = desk.ended(id).await.outcome.unwrap().warnings;
    assert!(warnings.iter().any(|said| said.contains("is of another checkpoint")), "{warnings:?}");
}

#[tokio::test]
async fn the_same_inputs_are_encoded_once() {
    let script = Arc::new(Script { identity: Mutex::new("m".into()), ..Script::default() });
    let desk = Desk::new(&script).await;
    for (seed, prompt, encoded) in [(1, "a", 3), (2, "a", 3), (3, "b", 4)] {
        let spec = GenerationSpec { seed: Some(seed), steps: Some(1), prompt: prompt.into(), ..Default::default() };
        let id = desk.accept(upload(spec, 5)).await.unwrap();
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
        assert_eq!(script.encoded.load(Ordering::SeqCst), encoded);
        assert_eq!(generation.outcome.unwrap().stages.len(), 5);
    }
}

#[tokio::test]
async fn what_waits_and_what_was_cancelled_is_so_after_a_restart() {
    let script = Arc::new(Script { predict_time: Duration::from_secs(600), ..Script::default() });
    let desk = Desk::with(&script, Options { concurrent: 1, ..Options::default() }).await;
    let running = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)).await.unwrap();
    until(|| script.opened.load(Ordering::SeqCst) > 0).await;
    let spec = || GenerationSpec { steps: Some(1), ..Default::default() };
    let waiting = desk.accept(upload(spec(), 5)).await.unwrap();
    let cancelled = desk.accept(upload(spec(), 5)).await.unwrap();
    let ended = desk.gateway.store().cancel(&cancelled.to_string()).await.unwrap();
    assert_eq!(ended.state(), GenerationState::Cancelled);
    let place = desk.gateway.admit(&Order::default()).await.unwrap();
    let attached = desk.gateway.accept(upload(spec(), 5), place, true).await.unwrap().generation_id;
    let again = Arc::new(Script::default());
    let desk = desk.restart(&again).await;
    assert_eq!(desk.ended(running).await.state(), GenerationState::Completed);
    assert_eq!(desk.ended(waiting).await.state(), GenerationState::Completed);
    assert_eq!(desk.ended(cancelled).await.state(), GenerationState::Cancelled);
    let gone = desk.gateway.store().get(&attached).await.unwrap_err();
    assert_eq!(gone.kind, Kind::NotFound, "it went with the call that it belonged to");
}

#[tokio::test]
async fn two_gateways_do_not_share_a_folder() {
    let desk = Desk::new(&Arc::new(Script::default())).await;
    let options = Options { data_dir: desk.folder.path().to_owned(), ..Options::default() };
    let error = Gateway::new(&options, fakes::start(&Arc::new(Script::default()))).await.unwrap_err();
    assert!(error.to_string().contains("another process uses it"), "{error}");
}

/// A script of stages of a model on a device.
fn on(device: &str, script: Script) -> Arc<Script> {
    Arc::new(Script { identity: Mutex::new("m".into()), device: Mutex::new(device.into()), ..script })
}

#[tokio::test]
async fn where_a_device_is_gone_the_denoise_goes_on_with_another_one_and_the_record_says_that_bits_may_differ() {
    let steps_of =
        |script: &Script| -> Vec<u32> { script.passes.lock().unwrap().iter().map(|(header, _)| header.step).collect() };
    let mixed = |generation: &Generation| {
        let warnings = &generation.outcome.as_ref().unwrap().warnings;
        warnings.iter().filter(|said| said.contains("may differ in the last place")).count()
    };
    let script = on("cuda:0", Script { away_at: Some((2, 1_000_000)), ..Script::default() });
    let (desk, id) = start(&script, 4).await;
    until(|| script.predicted.load(Ordering::SeqCst) > 2).await;
    let second = on("cpu", Script { hold: Mutex::new(Some(3)), ..Script::default() });
    let desk = desk.restart(&second).await;
    steps_done(&desk, id, 3).await;
    let third = on("cpu", Script::default());
    let desk = desk.restart(&third).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!((steps_of(&script), steps_of(&second), steps_of(&third)), (vec![0, 1], vec![2], vec![3]));
    assert_eq!(mixed(&generation), 1, "also of what was mixed before the last restart");
    let told = desk.events(id).await;
    assert_eq!(told.iter().filter(|event| event.warning && event.message.contains("in the last place")).count(), 1);

    let script = on("cuda:0", Script { away_at: Some((2, 1_000_000)), ..Script::default() });
    let (desk, id) = start(&script, 4).await;
    until(|| script.predicted.load(Ordering::SeqCst) > 2).await;
    let desk = desk.restart(&on("cuda:0", Script::default())).await;
    assert_eq!(mixed(&desk.ended(id).await), 0, "the same device");
}

/// Stages of which the decoder alone is there.
fn decoder_alone(script: &Arc<Script>) -> crate::Stages {
    let gone = || service_kit::client::in_memory().0;
    crate::Stages {
        audio_encoder: gone(),
        text_encoder: gone(),
        image_encoder: gone(),
        diffusion: gone(),
        ..fakes::start(script)
    }
}

#[tokio::test]
async fn a_finished_denoise_needs_the_decoder_alone() {
    let face = FaceBox { x: 2.0, y: 4.0, width: 30.0, height: 30.0, score: Some(0.9) };
    let away = Script { decoder_away: AtomicUsize::new(usize::MAX), faces: vec![face], ..Script::default() };
    let script = on("cuda:0", away);
    let (desk, id) = start(&script, 2).await;
    until(|| script.decoder_away.load(Ordering::SeqCst) < usize::MAX).await;
    let Desk { gateway, folder } = desk;
    gateway.drain(Duration::ZERO).await;
    drop(gateway);
    let again = Arc::new(Script::default());
    let options = Options { data_dir: folder.path().to_owned(), stage_patience: Duration::ZERO, ..Options::default() };
    let gateway = loop {
        match Gateway::new(&options, decoder_alone(&again)).await {
            Ok(gateway) => break gateway,
            Err(error) => assert!(error.to_string().contains("another process"), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let generation = Desk { gateway, folder }.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!(again.decoded.lock().unwrap().len(), 1);
    assert_eq!(generation.outcome.unwrap().faces, [face], "what the encoders said is known");
}

/// The video's encoder, which finds no space on the disk as long as the file `full` is there.
fn encoder_of_a_full_disk(folder: &std::path::Path) -> std::path::PathBuf {
    let (program, full) = (folder.join("encoder"), folder.join("full"));
    let said = "av_interleaved_write_frame(): No space left on device";
    let script = format!(
        "#!/bin/sh\nif [ -e '{}' ]; then touch '{}'; echo '{said}' >&2; exit 228; fi\nexec ffmpeg \"$@\"\n",
        full.display(),
        folder.join("refused").display()
    );
    std::fs::write(&full, "").unwrap();
    // Written by another process: one of this process's children could hold it open while it is to be run.
    let make = format!("cat > '{0}' && chmod +x '{0}'", program.display());
    let mut shell =
        std::process::Command::new("sh").args(["-c", &make]).stdin(std::process::Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut shell.stdin.take().unwrap(), script.as_bytes()).unwrap();
    assert!(shell.wait().unwrap().success());
    program
}

#[tokio::test]
async fn a_video_that_finds_no_space_is_made_once_there_is_some_and_no_step_is_repeated() {
    let (script, own) = (Arc::new(Script::default()), tempfile::tempdir().unwrap());
    let options = Options { ffmpeg: encoder_of_a_full_disk(own.path()), ..Options::default() };
    let desk = Desk::with(&script, options).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)).await.unwrap();
    until(|| script.decoded.lock().unwrap().len() == 1 && own.path().join("refused").exists()).await;
    std::fs::remove_file(own.path().join("full")).unwrap();
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!((script.predicted.load(Ordering::SeqCst), script.decoded.lock().unwrap().len()), (2, 2));
}
