//! Files as `torch.save` wrote them until PyTorch 1.5, for tests that need whole networks in one.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor, bail};

/// The bytes of a legacy `.pth` file of a state dict; its tensors may be f16, bf16, f32, f64 and i64. PyTorch
/// 2.15's `torch.load(…, weights_only=True)` takes them.
///
/// # Errors
/// Another type, or Candle's error when a tensor cannot be read.
pub fn legacy_pth(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    // 0x1950a86a20f9469cfc6c, the format's magic number, as a pickle.
    file.extend(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.");
    file.extend(b"\x80\x02M\xe9\x03."); // 1001, its version
    file.extend(b"\x80\x02}(");
    text(&mut file, "protocol_version");
    file.extend(b"M\xe9\x03");
    text(&mut file, "little_endian");
    file.extend(b"\x88u.");

    file.extend(b"\x80\x02ccollections\nOrderedDict\n)R(");
    for (index, (name, tensor)) in tensors.iter().enumerate() {
        text(&mut file, name);
        file.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut file, "storage");
        file.extend(format!("ctorch\n{}\n", storage(tensor.dtype())?).bytes());
        text(&mut file, &index.to_string());
        text(&mut file, "cpu");
        integer(&mut file, tensor.elem_count());
        file.extend(b"NtQK\x00"); // no view; tuple; persistent id; offset 0
        tuple(&mut file, tensor.dims());
        tuple(&mut file, tensor.contiguous()?.stride());
        file.extend(b"\x89ccollections\nOrderedDict\n)RtR"); // needs no gradient, has no hooks
    }
    file.extend(b"u.");

    file.extend(b"\x80\x02](");
    for index in 0..tensors.len() {
        text(&mut file, &index.to_string());
    }
    file.extend(b"e.");
    for tensor in tensors.values() {
        file.extend((tensor.elem_count() as u64).to_le_bytes());
        file.extend(little_endian(tensor)?);
    }
    Ok(file)
}

fn storage(dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F16 => "HalfStorage",
        DType::BF16 => "BFloat16Storage",
        DType::F32 => "FloatStorage",
        DType::F64 => "DoubleStorage",
        DType::I64 => "LongStorage",
        other => bail!("no storage of PyTorch for {other:?}"),
    })
}

fn little_endian(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F16 => bytes(flat.to_vec1::<half::f16>()?, half::f16::to_le_bytes),
        DType::BF16 => bytes(flat.to_vec1::<half::bf16>()?, half::bf16::to_le_bytes),
        DType::F32 => bytes(flat.to_vec1()?, f32::to_le_bytes),
        DType::F64 => bytes(flat.to_vec1()?, f64::to_le_bytes),
        _ => bytes(flat.to_vec1()?, i64::to_le_bytes),
    })
}

fn bytes<T, const N: usize>(values: Vec<T>, each: fn(T) -> [u8; N]) -> Vec<u8> {
    values.into_iter().flat_map(each).collect()
}

fn text(file: &mut Vec<u8>, text: &str) {
    file.push(b'X');
    file.extend((text.len() as u32).to_le_bytes());
    file.extend(text.bytes());
}

fn integer(file: &mut Vec<u8>, value: usize) {
    file.push(b'J');
    file.extend((value as u32).to_le_bytes());
}

fn tuple(file: &mut Vec<u8>, values: &[usize]) {
    file.push(b'(');
    for &value in values {
        integer(file, value);
    }
    file.push(b't');
}
