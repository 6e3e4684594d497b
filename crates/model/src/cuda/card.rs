//! Launching kernels on a card.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CudaStorage, DType, Device, Result, Shape, Storage, Tensor,
    backend::{BackendDevice as _, BackendStorage as _},
    cuda_backend::{
        WrapErr as _,
        cudarc::{
            driver::{
                CudaFunction, CudaModule, CudaStream, DevicePtr as _, DevicePtrMut as _, LaunchConfig,
                PushKernelArg as _, SyncOnDrop,
            },
            nvrtc::Ptx,
        },
    },
    op::BackpropOp,
};
use half::{bf16, f16};

use super::launch::{File, Launch, Number};

impl File {
    /// Machine code for several generations of cards.
    fn image(self) -> &'static [u8] {
        macro_rules! image {
            ($name:literal) => {
                include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin"))
            };
        }
        match self {
            Self::Attention => image!("attention"),
            Self::Conv => image!("conv"),
            Self::Decode => image!("decode"),
            Self::Group => image!("group"),
            Self::Heads => image!("heads"),
            Self::Layer => image!("layer"),
            Self::Norm => image!("norm"),
        }
    }
}

impl Launch<'_> {
    /// Runs the kernel on `device`, where its inputs are.
    pub(super) fn run_on(&self, device: &Device, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let Device::Cuda(device) = device else {
            candle_core::bail!("{}: tensors on {device:?}, expected a card", self.kernel)
        };
        let shape = Shape::from(shape);
        let side = |value: usize, most: u32| match u32::try_from(value) {
            Ok(value) if value <= most => Ok(value),
            _ => candle_core::bail!("{}: a grid of {:?} blocks", self.kernel, self.grid),
        };
        let config = LaunchConfig {
            grid_dim: (side(self.grid[0], i32::MAX as u32)?, side(self.grid[1], 65535)?, side(self.grid[2], 65535)?),
            block_dim: (self.threads, 1, 1),
            shared_mem_bytes: self.shared,
        };
        let stream = device.cuda_stream();
        let function = function(&stream, self.file, &self.kernel)?;
        // SAFETY: the kernel writes every value before anybody reads one.
        let mut out = unsafe { device.alloc_uninit(&shape, dtype)? };
        {
            let guards: Vec<_> = self.inputs.iter().map(|x| x.map(Tensor::storage_and_layout)).collect();
            let inputs = guards.iter().map(|guard| match guard {
                None => Ok(Address { at: 0, _used: None }),
                Some((storage, layout)) => match &**storage {
                    Storage::Cuda(storage) => address(storage, layout.start_offset(), &stream),
                    _ => candle_core::bail!("{}: an input that is not on the card", self.kernel),
                },
            });
            let inputs: Vec<Address<'_>> = inputs.collect::<Result<_>>()?;
            let out = address_mut(&mut out, &stream)?;
            let mut builder = stream.launch_builder(&function);
            inputs.iter().for_each(|input| {
                builder.arg(&input.at);
            });
            builder.arg(&out.at);
            for number in self.numbers {
                match number {
                    Number::Int(v) => builder.arg(v),
                    Number::Long(v) => builder.arg(v),
                    Number::Float(v) => builder.arg(v),
                    Number::Double(v) => builder.arg(v),
                };
            }
            // SAFETY: arguments are those of the kernel of that name, and its inputs are as large as its numbers say.
            unsafe { builder.launch(config) }.w()?;
        }
        Ok(Tensor::from_storage(Storage::Cuda(out), shape, BackpropOp::none(), false))
    }
}

/// A kernel; its file's image is loaded at the first need.
fn function(stream: &CudaStream, file: File, kernel: &str) -> Result<CudaFunction> {
    static LOADED: Mutex<Option<HashMap<(usize, File), Arc<CudaModule>>>> = Mutex::new(None);
    let context = stream.context();
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let modules = loaded.get_or_insert_with(HashMap::new);
    let key = (context.ordinal(), file);
    let module = match modules.get(&key) {
        Some(module) => module.clone(),
        None => {
            let module = context.load_module(Ptx::from_binary(file.image().to_vec())).w()?;
            modules.insert(key, module.clone());
            module
        }
    };
    module.load_function(kernel).w()
}

/// Where a tensor's values begin, and the note for other streams that they are in use.
struct Address<'a> {
    at: u64,
    _used: Option<SyncOnDrop<'a>>,
}

/// Calls a generic function for the element type of a storage.
macro_rules! by_type {
    ($dtype:expr, $f:ident) => {
        match $dtype {
            DType::F32 => $f!(f32),
            DType::BF16 => $f!(bf16),
            DType::F16 => $f!(f16),
            DType::U8 => $f!(u8),
            DType::U32 => $f!(u32),
            other => candle_core::bail!("no kernel takes values of type {other:?}"),
        }
    };
}

fn address<'a>(storage: &'a CudaStorage, start: usize, stream: &'a CudaStream) -> Result<Address<'a>> {
    macro_rules! at {
        ($type:ty) => {{
            let (at, used) = storage.as_cuda_slice::<$type>()?.device_ptr(stream);
            Address { at: at + (start * size_of::<$type>()) as u64, _used: Some(used) }
        }};
    }
    Ok(by_type!(storage.dtype(), at))
}

fn address_mut<'a>(storage: &'a mut CudaStorage, stream: &'a CudaStream) -> Result<Address<'a>> {
    macro_rules! at {
        ($type:ty) => {{
            let (at, used) = storage.as_cuda_slice_mut::<$type>()?.device_ptr_mut(stream);
            Address { at, _used: Some(used) }
        }};
    }
    Ok(by_type!(storage.dtype(), at))
}
