//! Pictures of how far a denoise is.

use super::*;

/// A desk whose generations have previews.
async fn with_previews(script: &Arc<Script>, previews: usize) -> Desk {
    Desk::with(script, Options { previews, ..Options::default() }).await
}

/// Waits for an event about a preview.
async fn preview_told(desk: &Desk, id: Uuid) -> GenerationEvent {
    let events = desk.gateway.store().events(id, 1).map(Result::unwrap);
    let mut told = events.filter(|event| std::future::ready(event.preview.is_some())).boxed();
    let told = tokio::time::timeout(Duration::from_secs(120), told.next()).await.unwrap();
    told.expect("it ended without a preview")
}

#[tokio::test]
async fn a_preview_is_told_of_while_the_steps_go_on_and_can_be_fetched_until_the_generation_is_removed() {
    let plain = Arc::new(Script::default());
    let spec = || GenerationSpec { steps: Some(4), ..Default::default() };
    let (desk, id) = start_with(&plain, spec(), 5).await;
    desk.ended(id).await;

    // The only preview is that after step 2.
    let script = Arc::new(Script { hold: Mutex::new(Some(2)), ..Script::default() });
    let desk = with_previews(&script, 1).await;
    let id = desk.accept(upload(spec(), 5)).await.unwrap();
    let event = preview_told(&desk, id).await;
    let preview = event.preview.clone().unwrap();
    assert_eq!((preview.step, preview.width, preview.height), (2, 64, 64));
    assert_eq!((event.state(), event.stage()), (GenerationState::Denoising, Stage::VaeDecode));
    let path = format!("/v1/videos/{id}/previews/2");
    let (status, headers, file) = rest(&desk, &path, &[]).await;
    assert_eq!((status, headers["content-type"].to_str().unwrap()), (200, "image/jpeg"));
    assert_eq!(
        (file.len() as u64, headers["etag"].to_str().unwrap()),
        (preview.bytes, &*format!("\"{}\"", preview.sha256))
    );
    let picture = image::load_from_memory_with_format(&file, image::ImageFormat::Jpeg).unwrap();
    assert_eq!((picture.width(), picture.height()), (64, 64));
    let tag = headers["etag"].to_str().unwrap();
    assert_eq!(rest(&desk, &path, &[("if-none-match", tag)]).await.0, 304);
    for none in ["1", "3", "x", "-1"] {
        assert_eq!(rest(&desk, &format!("/v1/videos/{id}/previews/{none}"), &[]).await.0, 404, "{none}");
    }

    *script.hold.lock().unwrap() = None;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let decodes = script.decodes.lock().unwrap().clone();
    let asked: Vec<_> = decodes.iter().map(|header| (header.frame_limit, header.tile_divisor)).collect();
    assert_eq!(asked, [(1, 2), (5, 1)], "one frame in small tiles, then the video");
    let decoded = script.decoded.lock().unwrap().clone();
    assert_eq!(decoded[0].len(), 2 * 8 * 8, "one latent frame");
    assert!(decoded[1] == plain.decoded.lock().unwrap()[0], "the video's latents are those without a preview");
    let events = String::from_utf8(rest(&desk, &format!("/v1/videos/{id}/events"), &[]).await.2).unwrap();
    assert!(events.contains(&format!("\"url\":\"{path}\"")), "{events}");
    assert_eq!(rest(&desk, &path, &[]).await.0, 200, "it stays with the video");
    desk.gateway.store().remove(&id.to_string()).await.unwrap();
    assert_eq!(rest(&desk, &path, &[]).await.0, 404);
    until(|| desk.files() == 0).await;
}

#[tokio::test]
async fn a_decoder_that_is_away_full_or_out_of_memory_costs_the_preview_alone_and_is_not_asked_again() {
    let scripts = [
        Script { decoder_away: AtomicUsize::new(1), ..Script::default() },
        Script { decoder_full: AtomicUsize::new(1), ..Script::default() },
        Script { out_of_memory: vec![(Stage::VaeDecode, 0)], ..Script::default() },
    ];
    for script in scripts {
        let script = Arc::new(Script { hold: Mutex::new(Some(1)), ..script });
        let spec = GenerationSpec { steps: Some(2), ..Default::default() };
        let desk = with_previews(&script, 1).await;
        let id = desk.accept(upload(spec, 5)).await.unwrap();
        let refused = || {
            script.decoder_away.load(Ordering::SeqCst) + script.decoder_full.load(Ordering::SeqCst) == 0
                && (script.out_of_memory.is_empty() || script.calls.lock().unwrap().contains_key(&Stage::VaeDecode))
        };
        until(refused).await;
        *script.hold.lock().unwrap() = None;
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
        let events = desk.events(id).await;
        assert!(events.iter().all(|event| event.preview.is_none() && !event.message.contains("ran out of memory")));
        assert_eq!(script.passes.lock().unwrap().len(), 2, "no step is repeated");
        assert_eq!(script.decoded.lock().unwrap().len(), 1, "the video alone");
        assert_eq!(script.unloads.load(Ordering::SeqCst), 0, "nobody is unloaded for a preview");
    }
}

#[tokio::test]
async fn without_previews_the_decoder_is_asked_for_the_video_alone() {
    let script = Arc::new(Script::default());
    let (desk, id) = start(&script, 6).await;
    desk.ended(id).await;
    assert_eq!(script.decodes.lock().unwrap().len(), 1);
    assert!(desk.events(id).await.iter().all(|event| event.preview.is_none()));
}
