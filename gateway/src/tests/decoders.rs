//! Several decoders.

use super::*;

/// A desk with two decoders: the first one is the script's, the second one that of `spare`.
async fn with_spare_decoder(script: &Arc<Script>, spare: &Arc<Script>, options: Options) -> Desk {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { data_dir: folder.path().to_owned(), ..options };
    let mut stages = fakes::start(script);
    stages.spare_decoders = vec![fakes::start(spare).vae_decode];
    Desk { gateway: Gateway::new(&options, stages).await.unwrap(), folder }
}

#[tokio::test]
async fn a_decoder_that_never_has_memory_is_left_for_the_next_one_and_no_step_is_repeated() {
    let (script, spare) =
        (Arc::new(Script { tiles_that_fit: u32::MAX, ..Script::default() }), Arc::new(Script::default()));
    let desk = with_spare_decoder(&script, &spare, Options::default()).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)).await.unwrap();
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let tried = |script: &Script| rungs(script.decodes.lock().unwrap().iter());
    assert_eq!((tried(&script), tried(&spare)), (vec![1, 2, 4], vec![1]), "the whole ladder comes first");
    assert_eq!(script.passes.lock().unwrap().len(), 2);
    let events = desk.events(id).await;
    let told = events.iter().find(|event| event.message.contains("vae-decode 1 of 2 ran out of memory")).unwrap();
    assert!(told.stage() == Stage::VaeDecode && told.message.contains("2 of 2 is tried"), "{told:?}");
}

#[tokio::test]
async fn a_decoder_that_is_away_or_full_is_not_waited_for_where_another_is_free() {
    for first in [
        Script { decoder_away: AtomicUsize::new(usize::MAX), ..Script::default() },
        Script { decoder_full: AtomicUsize::new(usize::MAX), ..Script::default() },
    ] {
        let (script, spare) = (Arc::new(first), Arc::new(Script::default()));
        let desk = with_spare_decoder(&script, &spare, Options::default()).await;
        let id = desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 5)).await.unwrap();
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
        let left = script.decoder_away.load(Ordering::SeqCst).max(script.decoder_full.load(Ordering::SeqCst));
        assert_eq!((usize::MAX - left, spare.decodes.lock().unwrap().len()), (1, 1), "each is asked once");
    }
}

#[tokio::test]
async fn a_decoder_that_stands_still_is_left_for_the_next_one_and_no_step_is_repeated() {
    let (script, spare) =
        (Arc::new(Script { stalls: vec![(Stage::VaeDecode, 0)], ..Script::default() }), Arc::new(Script::default()));
    let options = Options { stuck_after: Duration::from_millis(50), previews: 0, ..Options::default() };
    let desk = with_spare_decoder(&script, &spare, options).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)).await.unwrap();
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!((script.passes.lock().unwrap().len(), spare.decodes.lock().unwrap().len()), (2, 1));
    let said: Vec<String> = desk.events(id).await.into_iter().map(|event| event.message).collect();
    for part in ["vae-decode is suspected to be stuck", "; 2 of 2 is tried"] {
        assert!(said.iter().any(|message| message.contains(part)), "{part}: {said:?}");
    }
}

#[tokio::test]
async fn while_one_decoder_has_no_memory_another_one_that_is_away_is_waited_for() {
    let script = Arc::new(Script { tiles_that_fit: u32::MAX, ..Script::default() });
    let spare = Arc::new(Script { decoder_away: AtomicUsize::new(2), ..Script::default() });
    let desk = with_spare_decoder(&script, &spare, Options::default()).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 5)).await.unwrap();
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    assert_eq!(rungs(script.decodes.lock().unwrap().iter()), [1, 2, 4], "what was tried in vain is not tried again");

    let full = || Arc::new(Script { tiles_that_fit: u32::MAX, ..Script::default() });
    let (script, spare) = (full(), full());
    let desk = with_spare_decoder(&script, &spare, Options::default()).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 5)).await.unwrap();
    let failure = desk.ended(id).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("RESOURCE_EXHAUSTED", Stage::VaeDecode));
    assert!(failure.message.contains("tiles 4 times shorter"), "{failure:?}");
}
