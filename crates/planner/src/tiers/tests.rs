use super::*;

/// The table of the design.
#[test]
fn the_seven_tiers_have_their_limits_and_their_cards() {
    let tiers = Tiers::default();
    let rows: Vec<_> = tiers
        .all()
        .iter()
        .map(|t| (t.name.as_str(), t.limits.pixels, t.limits.frames, t.limits.audio_seconds, t.limits.steps))
        .collect();
    assert_eq!(
        rows,
        [
            ("emergency", 96, 4, 8, 10),
            ("ultra-minimal", 128, 8, 15, 15),
            ("ultra-low", 256, 16, 20, 20),
            ("low", 384, 32, 30, 25),
            ("balanced", 512, 64, 45, 30),
            ("high", 704, 128, 60, 35),
            ("maximum", 1024, 256, 120, 50),
        ]
    );
    let windows: Vec<usize> = tiers.all().iter().map(|t| t.limits.window()).collect();
    assert_eq!(windows, [2, 3, 5, 9, 17, 33, 33]);
}

#[test]
fn a_card_is_read_at_the_size_on_its_box() {
    let tiers = Tiers::default();
    for (total, name) in [
        ("512MiB", "emergency"),
        ("4GiB", "emergency"),
        ("4096MiB", "emergency"),
        ("5GiB", "ultra-minimal"),
        ("6144MiB", "ultra-minimal"),
        ("8188MiB", "ultra-low"),
        ("8GB", "ultra-low"),
        ("10GiB", "low"),
        ("12282MiB", "low"),
        ("16376MiB", "balanced"),
        ("20GiB", "high"),
        ("23.4GiB", "high"),
        ("24564MiB", "maximum"),
        ("80GiB", "maximum"),
    ] {
        assert_eq!(tiers.for_total(total.parse().unwrap()).unwrap().name, name, "{total}");
    }
}

#[test]
fn a_file_adds_tiers_and_changes_single_values() {
    let text = "[high]\nto_gb = 22\n[edge]\nfrom_gb = 23\nto_gb = 23\npixels = 640\nframes = 40\naudio_seconds = 9\nsteps = 8\n[by-hand]\npixels = 64\nframes = 1\naudio_seconds = 1\nsteps = 1\n";
    let tiers = Tiers::with_file(text).unwrap();
    assert_eq!(tiers.named("high").unwrap().limits.pixels, 704);
    assert_eq!(tiers.for_total(Bytes::gib(23)).unwrap().name, "edge");
    assert_eq!(tiers.named("by-hand").unwrap().nominal_card(), None);
    assert_eq!(tiers.all().len(), 9);
    assert_eq!(tiers.all().last().unwrap().name, "by-hand");
}

#[test]
fn everything_that_is_wrong_with_a_file_is_told_at_once() {
    let told = |text: &str| Tiers::with_file(text).unwrap_err().0;
    let wrong = told(
        "[high]\npixles = 3\nsteps = 0\n[New]\npixels = 96\n[low]\nframes = \"many\"\nfrom_gb = -1\n[auto]\n[x]\nsteps = 2.5\n",
    );
    for part in [
        "high: unknown key \"pixles\"; the keys are from_gb",
        "high: steps = 0; a whole number from 1 to 200",
        "\"New\": a tier's name is",
        "low: frames = \"many\"",
        "low: from_gb = -1",
        "\"auto\": a tier's name",
        "x: steps = 2.5",
    ] {
        assert!(wrong.iter().any(|line| line.contains(part)), "{part} in {wrong:#?}");
    }
    let wrong = told("[high]\nto_gb = 30\n[own]\nfrom_gb = 9\nto_gb = 3\n[none]\npixels = 96\n");
    for part in [
        "maximum: 24 GB and more overlaps high: 17 to 30 GB",
        "own: a tier of its own needs pixels, frames, audio_seconds, steps",
        "own: from_gb = 9 is more than to_gb = 3",
        "none: a tier of its own needs frames, audio_seconds, steps",
    ] {
        assert!(wrong.iter().any(|line| line.contains(part)), "{part} in {wrong:#?}");
    }
    // What is wrong with one tier, or with one value of it, hides nothing of the others or of its other values.
    let wrong = told("[low]\nstep = 7\npixels = 0\n[high]\nsteps = 0\nto_gb = 99\n[odd]\nfrom_gb = \"x\"\nto_gb = 3\n");
    for part in [
        "low: unknown key \"step\"",
        "low: pixels = 0",
        "high: steps = 0",
        "maximum: 24 GB and more overlaps high: 17 to 99 GB",
        "odd: from_gb = \"x\"",
        "odd: a tier of its own needs pixels, frames, audio_seconds, steps",
    ] {
        assert!(wrong.iter().any(|line| line.contains(part)), "{part} in {wrong:#?}");
    }
    assert_eq!(wrong.len(), 6, "{wrong:#?}");
    assert_eq!(told("steps = 3\n"), ["steps: not a table, as in [steps]"]);
    assert!(told("[high\n")[0].contains("line 1"), "{:?}", told("[high\n"));
    assert!(told(&"#".repeat(70_000))[0].contains("65536"));
    let many: String = (0..80).map(|i| format!("[t{i}]\nsteps = 1\n")).collect();
    assert!(told(&many)[0].contains("the most are 64"));
}

#[test]
fn an_unknown_name_is_refused_with_the_names_there_are() {
    let error = Tiers::default().named("medium").unwrap_err().to_string();
    assert!(error.contains("\"medium\" is no tier; the tiers are emergency, ultra-minimal"), "{error}");
}

#[test]
fn a_request_past_the_limits_is_named_value_by_value_and_can_be_lowered() {
    let tiers = Tiers::default();
    let low = tiers.named("low").unwrap();
    let wanted = Wanted { size: 704, steps: 50, seconds: 31.0, window_frames: None };
    let told: Vec<String> = low.excesses(&wanted).iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "tier low allows size of at most 384 pixels, 704 were asked for",
            "tier low allows steps of at most 25 steps, 50 were asked for",
            "tier low allows audio of at most 30 seconds, 31 were asked for",
        ]
    );
    let (lowered, changes) = low.lowered(&wanted).unwrap();
    assert_eq!((lowered.size, lowered.steps, lowered.seconds), (384, 25, 30.0));
    assert_eq!(changes[0].to_string(), "size was lowered from 704 to 384 pixels");
    assert!(low.excesses(&lowered).is_empty() && low.lowered(&lowered).unwrap().1.is_empty());
    let reference = Wanted { window_frames: Some(129), ..lowered };
    assert_eq!(low.lowered(&reference).unwrap_err().field, "parity");
    assert_eq!(low.excesses(&Wanted { seconds: f64::NAN, ..lowered }).len(), 1);
}
