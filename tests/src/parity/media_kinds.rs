//! Cases of the plain arithmetic around the networks: pictures, masks, mel spectra, stored weights.

use anyhow::{Result, anyhow};
use candle_core::{DType, Device, Tensor};
use model::{
    image::{
        Rgb8,
        face::{self, FaceBox, Postprocess},
        llava_pixels, resize_bilinear, resize_cv2_linear, resize_lanczos,
    },
    nn::Linear,
    weights::{Matrix, fp8},
};
use planner::size::reference_size;

use super::{Case, Outputs};

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

pub fn log_mel(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let mel = model::audio::log_mel(&floats(case.input("wav")?)?)?; // (80, 3000)
    let kept: usize = case.get("frames_kept")?;
    outputs.check("mel", &mel.narrow(1, 0, kept)?)?;
    if outputs.expects("mel_filters") {
        outputs.check("mel_filters", &model::audio::mel_filters()?)?;
    }
    // The case leaves out the columns that are all equal, and says their value.
    let (pad, tolerance): (f32, f32) = (case.get("pad_value")?, case.get("tolerance_max_rel")?);
    let rest = floats(&mel.narrow(1, kept, mel.dim(1)? - kept)?)?;
    match rest.iter().find(|v| !((*v - pad).abs() <= tolerance * pad.abs())) {
        None => Ok(()),
        Some(value) => Err(anyhow!("a column past {kept} holds {value}, the reference {pad}")),
    }
}

pub fn face_mask_tokens(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let (width, height): (usize, usize) = (case.get("W")?, case.get("H")?);
    let (w, h, frames) = (width / 8, height / 8, case.get("ot")?);
    let latent = face::latent_mask(&floats(case.input("mask")?)?, width, height);
    let tokens = face::token_gate(&latent, w, h, frames);
    outputs.check("latent", &Tensor::from_vec(latent, (1, 1, 1, h, w), &Device::Cpu)?)?;
    let length = tokens.len();
    outputs.check("tokens", &Tensor::from_vec(tokens, (1, length, 1), &Device::Cpu)?)
}

pub fn face_mask_box(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let (width, height): (usize, usize) = (case.get("W")?, case.get("H")?);
    for (name, values) in &case.inputs {
        let corners: Vec<f64> = values.to_dtype(DType::F64)?.to_vec1()?;
        let &[x, y, w, h] = corners.as_slice() else { return Err(anyhow!("{name} has {} values", corners.len())) };
        // The reference writes "no face" as a box of -1.
        let found = (corners != [-1.0; 4]).then_some(FaceBox { x, y, width: w, height: h, score: None });
        let mask = face::mask(found.as_ref(), width, height);
        let mask = Tensor::from_vec(mask, (1, 1, 1, height, width), &Device::Cpu)?;
        outputs.check(&name.replace("box", "mask"), &mask)?;
    }
    Ok(())
}

pub fn face_detection(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let network: [usize; 4] = case.get("net_input_shape")?;
    let picture = (case.get("W")?, case.get("H")?);
    let network = (network[3], network[2]);
    if face::network_size(picture.0, picture.1) != network {
        return Err(anyhow!("the detector would see {:?}", face::network_size(picture.0, picture.1)));
    }
    let rule = Postprocess { confidence: case.get("conf")?, overlap: case.get("iou")?, network, picture };
    let found = face::postprocess(&floats(case.input("pred")?)?, &rule);
    let corners = |f: &FaceBox| [f.x, f.y, f.width, f.height];
    let faces: Vec<FaceBox> = found.iter().map(|d| d.face).collect();
    let table = |values: Vec<f64>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu);
    let n = faces.len();
    outputs.check("boxes_xywh", &table(faces.iter().flat_map(corners).collect(), &[n, 4])?)?;
    outputs.check("scores", &table(faces.iter().filter_map(|f| f.score).collect(), &[n])?)?;
    let points = found.iter().flat_map(|d| d.landmarks.as_flattened().to_vec()).collect();
    outputs.check("landmarks", &table(points, &[n, 5, 2])?)?;
    let largest = face::largest_of_reference(&faces).ok_or_else(|| anyhow!("no face was found"))?;
    outputs.check("largest", &table(corners(largest).to_vec(), &[4])?)
}

pub fn picture_size(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let rows: Vec<Vec<i64>> = case.outputs["table"].to_vec2()?;
    let mut computed = Vec::new();
    for row in &rows {
        let &[size, width, height, ..] = row.as_slice() else { return Err(anyhow!("a row of {} values", row.len())) };
        let made = reference_size(size.try_into()?, width.try_into()?, height.try_into()?);
        computed.extend([size, width, height, made.width.into(), made.height.into()]);
    }
    outputs.check("table", &Tensor::from_vec(computed, (rows.len(), 5), &Device::Cpu)?)
}

pub fn picture_resize(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let (height, width, _) = case.input("image")?.dims3()?;
    let picture = Rgb8::new(width, height, case.input("image")?.flatten_all()?.to_vec1()?)?;
    let tensor = |p: Rgb8| Tensor::from_vec(p.data, (p.height, p.width, 3), &Device::Cpu);
    let sizes: Vec<[usize; 2]> = case.get("lanczos_wh")?;
    for (n, [w, h]) in sizes.into_iter().enumerate() {
        outputs.check(&format!("lanczos{n}"), &tensor(resize_lanczos(&picture, w, h))?)?;
    }
    let [w, h]: [usize; 2] = case.get("bilinear_wh")?;
    outputs.check("bilinear", &tensor(resize_bilinear(&picture, w, h))?)?;
    if outputs.expects("llava_pixels") {
        outputs.check("llava_pixels", &llava_pixels(&picture, w)?)?;
    }
    let [w, h]: [usize; 2] = case.get("cv2_wh")?;
    outputs.check("cv2_linear", &tensor(resize_cv2_linear(&picture, w, h))?)
}

pub fn float8(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let bytes = case.input("weight_bytes")?;
    let scale = floats(case.input("scale")?)?[0];
    let bytes_of = bytes.flatten_all()?.to_vec1::<u8>()?;
    let mut weight = vec![0f32; bytes_of.len()];
    fp8::dequantise_into(&bytes_of, scale, &mut weight);
    let weight = Tensor::from_vec(weight, bytes.dims(), &Device::Cpu)?;
    // A bf16 product is exact in f32, so the sums alone are rounded.
    let wide = |name: &str| -> Result<Tensor> { Ok(case.input(name)?.to_dtype(DType::F32)?) };
    let layer = Linear::new(Matrix::new(&weight)?, Some(wide("bias")?));
    outputs.check("y", &layer.forward(&wide("x")?)?)?;
    outputs.check("dequant", &weight.to_dtype(DType::BF16)?)
}
