use super::*;

const SHAPE: FrameShape = FrameShape { channels: 2, rows: 2, columns: 3 };

fn setup(clip: &ClipPlan, steps: usize) -> Setup {
    let schedule = Schedule { steps, flow_shift: 5.0, guidance_scale: 7.5 };
    Setup { plan: StepPlan::scaled(schedule), clip: clip.clone(), shape: SHAPE, rounding: Rounding::Nowhere }
}

/// A network that mixes what a window holds with everything else that a request says.
fn velocity(request: &Request) -> Vec<f32> {
    let offset = request.timestep / 1000.0
        + if request.silent { 0.3 } else { 0.0 }
        + if request.prompt == Prompt::Negative { 0.1 } else { 0.0 }
        + request.audio_frames[0] as f32 * 0.01;
    request.latents.iter().enumerate().map(|(i, x)| (x * 0.7 + offset * (i % 7) as f32).sin()).collect()
}

fn run(sampler: &mut Sampler, order: impl Fn(&mut Vec<Request>)) {
    while sampler.current().is_some() {
        let mut requests = sampler.requests();
        order(&mut requests);
        for request in requests {
            let velocity = velocity(&request);
            sampler.accept(request.index, velocity).unwrap();
        }
        sampler.advance().unwrap();
    }
}

fn long_clip() -> ClipPlan {
    ClipPlan::new(200, 1, 9)
}

#[test]
fn the_order_of_arrival_does_not_change_a_bit() {
    let clip = long_clip();
    assert!(clip.starts().count() > 3);
    let noise = noise(3, SHAPE.values(clip.latent_frames));
    let results: Vec<Vec<u32>> = [0usize, 1, 2]
        .into_iter()
        .map(|order| {
            let mut sampler = Sampler::new(setup(&clip, 12), noise.clone()).unwrap();
            run(&mut sampler, |requests| match order {
                0 => {}
                1 => requests.reverse(),
                _ => requests.rotate_left(3),
            });
            sampler.latents().iter().map(|v| v.to_bits()).collect()
        })
        .collect();
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
}

/// Each worker answers in its own order and at its own speed; the mix is another in every step.
#[test]
fn however_many_workers_answer_the_bits_are_the_same() {
    let clip = long_clip();
    let start = noise(6, SHAPE.values(clip.latent_frames));
    let run_with = |workers: usize| -> Vec<u32> {
        let mut sampler = Sampler::new(setup(&clip, 12), start.clone()).unwrap();
        let mut state = workers as u64;
        while sampler.current().is_some() {
            let mut queues: Vec<Vec<Request>> = vec![Vec::new(); workers];
            for request in sampler.requests() {
                let worker = request.index % workers;
                queues[worker].push(request);
            }
            while sampler.missing() > 0 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let queue = &mut queues[(state >> 33) as usize % workers];
                if let Some(request) = queue.pop() {
                    sampler.accept(request.index, velocity(&request)).unwrap();
                }
            }
            sampler.advance().unwrap();
        }
        sampler.latents().iter().map(|v| v.to_bits()).collect()
    };
    let alone = run_with(1);
    for workers in [2, 3, 5, 16] {
        assert_eq!(run_with(workers), alone, "{workers} workers");
    }
}

/// Our plan of a clip that fits one window, and the reference's special case for it.
#[test]
fn one_window_runs_as_the_references_short_case() {
    let start = noise(7, SHAPE.values(33));
    let results = [ClipPlan::new(129, 1, 33), reference_clip(129, 65)].map(|clip| {
        assert_eq!((clip.latent_frames, clip.kept_latent_frames, clip.frames), (33, 33, 129));
        let mut sampler = Sampler::new(setup(&clip, 50), start.clone()).unwrap();
        run(&mut sampler, |_| {});
        sampler.kept_latents()
    });
    assert_eq!(results[0], results[1]);
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let clip = long_clip();
    let noise = noise(4, SHAPE.values(clip.latent_frames));
    let mut whole = Sampler::new(setup(&clip, 12), noise.clone()).unwrap();
    run(&mut whole, |_| {});
    let mut first = Sampler::new(setup(&clip, 12), noise).unwrap();
    for _ in 0..5 {
        for request in first.requests() {
            first.accept(request.index, velocity(&request)).unwrap();
        }
        first.advance().unwrap();
    }
    let mut second = Sampler::resume(setup(&clip, 12), first.step(), first.latents().to_vec()).unwrap();
    run(&mut second, |_| {});
    assert_eq!(second.latents(), whole.latents());
    let refused = Sampler::resume(setup(&clip, 50), 17, second.latents().to_vec());
    assert_eq!(refused.err(), Some(SamplerError::NotResumable { step: 17, steps: 50 }));
}

#[test]
fn windows_wrap_around_and_shared_frames_are_averaged() {
    let clip = reference_clip(185, 65);
    assert_eq!((clip.latent_frames, clip.kept_latent_frames, clip.window, clip.shift), (65, 47, 33, 10));
    let mut sampler = Sampler::new(setup(&clip, 6), vec![1.0; SHAPE.values(65)]).unwrap();
    let requests = sampler.requests();
    assert_eq!(requests.len(), 4);
    assert_eq!(requests[2].latent_frames, (33..65).chain([0]).collect::<Vec<_>>());
    assert_eq!(requests[2].audio_frames, (132..260).chain([0]).collect::<Vec<_>>());
    assert!(requests[1].silent && !requests[0].silent && requests[1].latent_frames == requests[0].latent_frames);
    // The first window moves by 1, the second by 2: frame 0 is in both.
    for request in &requests {
        let values = vec![if request.index < 2 { 1.0 } else { 2.0 }; request.latents.len()];
        sampler.accept(request.index, values).unwrap();
    }
    let change = sampler.current().unwrap().sigma_change;
    sampler.advance().unwrap();
    let plane = SHAPE.rows * SHAPE.columns;
    let at = |frame: usize| sampler.latents()[frame * plane];
    assert!((at(0) - (1.0 + 1.5 * change)).abs() < 1e-6);
    assert!((at(1) - (1.0 + change)).abs() < 1e-6);
    assert!((at(64) - (1.0 + 2.0 * change)).abs() < 1e-6);
    let shifted = sampler.requests();
    assert_eq!(shifted[0].latent_frames, (55..65).chain(0..23).collect::<Vec<_>>());
    assert_eq!(shifted[0].audio_frames, (220..260).chain(0..89).collect::<Vec<_>>());
    assert_eq!(sampler.kept_latents().len(), SHAPE.values(47));
}

#[test]
fn without_guidance_there_is_one_request_a_window() {
    let clip = long_clip();
    let plan = StepPlan::scaled(Schedule { steps: 4, flow_shift: 5.0, guidance_scale: 1.0 });
    let setup = Setup { plan, ..setup(&clip, 4) };
    let sampler = Sampler::new(setup, noise(1, SHAPE.values(clip.latent_frames))).unwrap();
    let requests = sampler.requests();
    assert_eq!(requests.len(), clip.starts().count());
    assert!(requests.iter().all(|r| r.branch == Branch::Conditional && !r.silent && r.face_mask_scale == 1.0));
}

#[test]
fn wrong_velocities_are_refused_and_change_nothing() {
    let clip = ClipPlan::new(20, 1, 33);
    let latents = noise(5, SHAPE.values(clip.latent_frames));
    let mut sampler = Sampler::new(setup(&clip, 4), latents.clone()).unwrap();
    let good = vec![0.5; SHAPE.values(clip.window)];
    assert_eq!(sampler.advance(), Err(SamplerError::Missing { step: 0, missing: 2 }));
    assert_eq!(sampler.accept(2, good.clone()), Err(SamplerError::Unasked { index: 2, requests: 2 }));
    let short = good[1..].to_vec();
    let (got, expected) = (short.len(), good.len());
    assert_eq!(sampler.accept(0, short), Err(SamplerError::Velocity { index: 0, got, expected }));
    let mut broken = good.clone();
    broken[3] = f32::NAN;
    assert_eq!(sampler.accept(0, broken), Err(SamplerError::NotFinite { index: 0, at: 3 }));
    sampler.accept(0, good.clone()).unwrap();
    assert_eq!(sampler.accept(0, good.clone()), Err(SamplerError::Unasked { index: 0, requests: 2 }));
    assert_eq!(sampler.advance(), Err(SamplerError::Missing { step: 0, missing: 1 }));
    assert_eq!((sampler.step(), sampler.latents()), (0, latents.as_slice()));
    sampler.accept(1, good).unwrap();
    sampler.advance().unwrap();
    assert_eq!((sampler.step(), sampler.missing()), (1, 2));
    let refused = Sampler::new(setup(&clip, 4), latents[1..].to_vec());
    assert_eq!(refused.err(), Some(SamplerError::Latents { got: latents.len() - 1, expected: latents.len() }));
}

/// Both kinds of rounding give values of bf16 where one window covers each frame: an f16 of a bf16 is one too.
#[test]
fn latents_are_rounded_after_every_step_where_the_reference_rounds_them() {
    let bits = |latents: &[f32]| latents.iter().filter(|x| x.to_bits() & 0xffff != 0).count();
    let clip = ReferenceSpeech::new(20).clip;
    let start = noise(6, SHAPE.values(clip.latent_frames));
    for (rounding, rounded) in [(Rounding::Nowhere, false), (Rounding::Windows, true), (Rounding::Reference, true)] {
        let mut sampler = Sampler::new(Setup { rounding, ..setup(&clip, 4) }, start.clone()).unwrap();
        let as_given = sampler.latents() == start.as_slice();
        assert_eq!(as_given, rounding != Rounding::Reference, "the reference's noise is f16");
        while sampler.current().is_some() {
            for request in sampler.requests() {
                sampler.accept(request.index, velocity(&request)).unwrap();
            }
            sampler.advance().unwrap();
            assert_eq!(bits(sampler.latents()) == 0, rounded, "{rounding:?}");
        }
    }
}

#[test]
fn averages_of_windows_are_kept_in_f16_as_the_reference_keeps_them() {
    let clip = ReferenceSpeech::new(150).clip;
    let setup = Setup { rounding: Rounding::Reference, ..setup(&clip, 4) };
    let mut sampler = Sampler::new(setup, noise(7, SHAPE.values(clip.latent_frames))).unwrap();
    for request in sampler.requests() {
        sampler.accept(request.index, velocity(&request)).unwrap();
    }
    sampler.advance().unwrap();
    assert!(sampler.latents().iter().all(|x| half::f16::from_f32(*x).to_f32() == *x));
}

#[test]
fn rounding_to_bf16_takes_halves_to_even() {
    for (value, rounded) in [
        (1.0f32, 1.0f32),
        (f32::from_bits(0x3f80_8000), 1.0),
        (f32::from_bits(0x3f81_8000), f32::from_bits(0x3f82_0000)),
        (f32::from_bits(0x3f80_8001), f32::from_bits(0x3f81_0000)),
        (f32::from_bits(0xbf80_7fff), -1.0),
        (0.0, 0.0),
    ] {
        assert_eq!(Rounding::Windows.moved(value).to_bits(), rounded.to_bits(), "{value}");
    }
}

/// A network that knows the picture: its velocity is that of flow matching, whatever the time.
#[test]
fn the_first_frame_is_foreseen_exactly_where_every_step_goes_straight_to_the_picture() {
    let clip = long_clip();
    let start = noise(9, SHAPE.values(clip.latent_frames));
    let picture = |i: usize| (i as f32 * 0.37).cos();
    let mut sampler = Sampler::new(setup(&clip, 12), start).unwrap();
    assert_eq!(sampler.foreseen_first_frame(&[]), None, "no step is taken yet");
    let plane = SHAPE.rows * SHAPE.columns;
    while sampler.current().is_some() {
        let (before, sigma) = (sampler.first_frame(), sampler.plan().sigmas()[sampler.step()]);
        for request in sampler.requests() {
            let frames = request.latent_frames.len();
            let value = |at: usize| {
                let (channel, frame) = (at / (frames * plane), request.latent_frames[at / plane % frames]);
                picture((channel * clip.latent_frames + frame) * plane + at % plane)
            };
            let straight = |(at, x): (usize, &f32)| (x - value(at)) / sigma;
            let velocity = request.latents.iter().enumerate().map(straight).collect();
            sampler.accept(request.index, velocity).unwrap();
        }
        sampler.advance().unwrap();
        let foreseen = sampler.foreseen_first_frame(&before).unwrap();
        let wanted = (0..SHAPE.channels).flat_map(|c| (0..plane).map(move |i| c * clip.latent_frames * plane + i));
        for (got, wanted) in foreseen.iter().zip(wanted.map(picture)) {
            assert!((got - wanted).abs() < 1e-2, "step {}: {got} instead of {wanted}", sampler.step());
        }
    }
}
