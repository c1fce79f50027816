//! The fully connected layer, on Candle's own matrix multiplication.

#[cfg(feature = "cuda")]
mod cuda;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType as _,
};

use crate::backward::aside;
use crate::element::{dispatch, float_dtype, slice};
use crate::error::OpError;

const OP: &str = "linear";

/// `x · weightᵀ + bias` for `x` (N, I), `weight` (O, I), `bias` (O); returns
/// (N, O), as `torch.nn.functional.linear` of matrices: inputs of other ranks are reshaped before. f32 and
/// f64, on CUDA bf16 too.
///
/// # Errors
/// [`OpError`] for shapes and dtypes that do not fit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[3f32, 4.0]], &Device::Cpu)?;
/// let bias = Tensor::new(&[5f32], &Device::Cpu)?;
/// let y = candle_cnn::linear(&x, &weight, Some(&bias))?;
/// assert_eq!(y.to_vec2::<f32>()?, [[16.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let dtype = float_dtype(OP, &[x, weight])?;
    let Ok((examples, inputs)) = x.dims2() else {
        return Err(OpError::shape(OP, "input", x, "(N, I)"));
    };
    let mismatch = |name, tensor: &Tensor, rule| {
        OpError::shapes(OP, ("input", x.dims()), (name, tensor.dims()), rule)
    };
    let Ok((outputs, weight_inputs)) = weight.dims2() else {
        return Err(OpError::shape(OP, "weight", weight, "(O, I)"));
    };
    if inputs != weight_inputs {
        return Err(mismatch(
            "weight",
            weight,
            "dimension 1 of both is the number of inputs",
        ));
    }
    if let Some(bias) = bias {
        if bias.dims() != [outputs] {
            return Err(mismatch("bias", bias, "the bias has one value per output"));
        }
        float_dtype(OP, &[x, bias])?;
    }
    let op = Linear {
        examples,
        inputs,
        outputs,
        dtype,
    };
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    match bias {
        None => x.apply_op2(&weight, op),
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, op),
    }
}

/// A contiguous operand on the CPU.
type Operand<'a> = (&'a CpuStorage, &'a Layout);

/// The operation as a node of Candle's graph, which knows who needs a gradient.
struct Linear {
    examples: usize,
    inputs: usize,
    outputs: usize,
    dtype: DType,
}

impl Linear {
    fn shape(&self) -> Shape {
        Shape::from((self.examples, self.outputs))
    }

    /// Whether there is nothing to multiply. BLAS takes no empty matrices.
    fn is_empty(&self) -> bool {
        self.examples * self.inputs * self.outputs == 0
    }

    /// `x · weightᵀ`, where there is something to multiply.
    fn product<S: BackendStorage>(
        &self,
        (x, x_layout): (&S, &Layout),
        (weight, weight_layout): (&S, &Layout),
    ) -> Result<S> {
        let sizes = (1, self.examples, self.outputs, self.inputs);
        x.matmul(weight, sizes, x_layout, &weight_layout.transpose(0, 1)?)
    }

    fn product_on_cpu(&self, x: Operand, weight: Operand) -> Result<CpuStorage> {
        match self.is_empty() {
            true => x.0.device().zeros_impl(&self.shape(), self.dtype),
            false => self.product(x, weight),
        }
    }

    fn forward(&self, x: Operand, weight: Operand, bias: Operand) -> Result<(CpuStorage, Shape)> {
        let product = self.product_on_cpu(x, weight)?;
        dispatch!(OP, self.dtype, T => {
            let mut y = T::cpu_storage_data(product)?;
            for (y, b) in y.iter_mut().zip(slice::<T>(OP, bias.0, bias.1)?.iter().cycle()) {
                *y += *b;
            }
            Ok((T::to_cpu_storage_owned(y), self.shape()))
        })
    }

    /// The gradients that somebody needs.
    fn backward(
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        dy: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let needed = |of: &Tensor, gradient: &dyn Fn() -> Result<Tensor>| {
            of.track_op().then(gradient).transpose()
        };
        let d_weight = needed(weight, &|| dy.t()?.matmul(&x.detach()))?;
        let d_bias = match bias {
            Some(bias) => aside(bias, needed(bias, &|| dy.sum(0))?),
            None => None,
        };
        let d_x = needed(x, &|| dy.matmul(&weight.detach()))?;
        Ok([d_x, aside(weight, d_weight), d_bias])
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.product_on_cpu((x, x_layout), (weight, weight_layout))?;
        Ok((y, self.shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = cuda::product(self, (x, x_layout), (weight, weight_layout))?;
        Ok((y, self.shape()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [d_x, d_weight, _] = Self::backward(x, weight, None, dy)?;
        Ok((d_x, d_weight))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((x, x_layout), (weight, weight_layout), (bias, bias_layout))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let mut y = cuda::product(self, (x, x_layout), (weight, weight_layout))?;
        cuda::add_to_rows(&mut y, (bias, bias_layout), self.shape().elem_count())?;
        Ok((y, self.shape()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [d_x, d_weight, d_bias] = Self::backward(x, weight, Some(bias), dy)?;
        Ok((d_x, d_weight, d_bias))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use test_support::{devices, relative_error, seeded_values};

    use super::*;

    fn numbers(name: &str, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let values = seeded_values(name, shape.elem_count(), 2.0);
        Tensor::from_vec(values, shape, device)
    }

    /// The layer's definition, by Candle's operations.
    fn composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = x.matmul(&weight.t()?)?;
        bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
    }

    #[test]
    fn output_and_gradients_are_those_of_candles_operations() -> Result<()> {
        for device in devices() {
            for (examples, inputs, outputs) in [(1, 1, 1), (32, 24, 10), (7, 5, 3)] {
                let x = Var::from_tensor(&numbers("x", (examples, inputs), &device)?)?;
                let weight = Var::from_tensor(&numbers("weight", (outputs, inputs), &device)?)?;
                let bias = Var::from_tensor(&numbers("bias", outputs, &device)?)?;
                let upstream = numbers("upstream", (examples, outputs), &device)?;
                for bias in [None, Some(&bias)] {
                    let y = linear(&x, &weight, bias.map(Var::as_tensor))?;
                    let expected = composed(&x, &weight, bias.map(Var::as_tensor))?;
                    assert_close(&y, &expected)?;
                    let expected = (expected * &upstream)?.sum_all()?.backward()?;
                    let loss = (y * &upstream)?.sum_all()?;
                    for gradients in [loss.backward()?, crate::backward(&loss)?] {
                        for var in [&x, &weight].into_iter().chain(bias) {
                            let of = |g: &candle_core::backprop::GradStore| g.get(var).cloned();
                            assert_close(&of(&gradients).unwrap(), &of(&expected).unwrap())?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_that_nobody_needs_are_not_computed() -> Result<()> {
        let x = numbers("x", (4, 3), &Device::Cpu)?;
        let weight = Var::from_tensor(&numbers("weight", (2, 3), &Device::Cpu)?)?;
        let [d_x, d_weight, d_bias] = Linear::backward(
            &x,
            &weight,
            Some(&numbers("bias", 2, &Device::Cpu)?),
            &numbers("dy", (4, 2), &Device::Cpu)?,
        )?;
        assert!(d_x.is_none() && d_bias.is_none());
        assert_eq!(d_weight.unwrap().dims(), [2, 3]);
        Ok(())
    }

    #[test]
    fn gradients_of_variables_are_set_aside() -> Result<()> {
        let var = |name, shape: &[usize]| Var::from_tensor(&numbers(name, shape, &Device::Cpu)?);
        let (weight, bias) = (var("weight", &[2, 3])?, var("bias", &[2])?);
        let x = var("x", &[4, 3])?.sqr()?;
        let dy = numbers("dy", (4, 2), &Device::Cpu)?;
        let (found, set_aside) =
            crate::backward::setting_aside(|| Linear::backward(&x, &weight, Some(&bias), &dy));
        // What is no variable gets its gradient by Candle.
        assert_eq!(
            found?.map(|gradient| gradient.is_some()),
            [true, false, false]
        );
        let of: Vec<_> = set_aside
            .iter()
            .map(|(parameter, _)| parameter.id())
            .collect();
        assert_eq!(of.len(), 2);
        assert!(of.contains(&weight.id()) && of.contains(&bias.id()));
        Ok(())
    }

    #[test]
    fn views_give_what_their_copies_give() -> Result<()> {
        for device in devices() {
            let x = Var::from_tensor(&numbers("x", (5, 4), &device)?)?;
            let weight = Var::from_tensor(&numbers("weight", (3, 2), &device)?)?;
            let bias = numbers("bias", 5, &device)?.narrow(0, 2, 2)?;
            let loss = |of: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>| {
                let y = of(&x.t()?.narrow(1, 1, 3)?, &weight.t()?)?;
                y.sqr()?.sum_all()?.backward()
            };
            let found = loss(&|x, weight| linear(x, weight, Some(&bias)))?;
            let expected =
                loss(&|x, weight| composed(&x.contiguous()?, &weight.contiguous()?, Some(&bias)))?;
            for var in [&x, &weight] {
                assert_close(found.get(var).unwrap(), expected.get(var).unwrap())?;
            }
        }
        Ok(())
    }

    #[test]
    fn an_empty_batch_has_gradients_of_zeros() -> Result<()> {
        let cpu = &Device::Cpu;
        let x = Var::zeros((0, 3), DType::F32, cpu)?;
        let weight = Var::from_tensor(&numbers("weight", (2, 3), cpu)?)?;
        let bias = Var::from_tensor(&numbers("bias", 2, cpu)?)?;
        let loss = linear(&x, &weight, Some(&bias))?.sum_all()?;
        for gradients in [loss.backward()?, crate::backward(&loss)?] {
            for var in [&x, &weight, &bias] {
                let gradient = gradients
                    .get(var)
                    .unwrap_or_else(|| panic!("{:?}", var.dims()));
                assert_eq!(gradient.dims(), var.dims());
                assert_eq!(gradient.abs()?.sum_all()?.to_scalar::<f32>()?, 0.0);
            }
        }
        Ok(())
    }

    #[test]
    fn empty_matrices_have_a_product() -> Result<()> {
        let cpu = &Device::Cpu;
        let (weight, bias) = (numbers("weight", (2, 3), cpu)?, numbers("bias", 2, cpu)?);
        let x = Tensor::zeros((4, 0), DType::F32, cpu)?;
        let y = linear(&x, &weight.narrow(1, 0, 0)?, Some(&bias))?;
        let expected = bias.broadcast_as((4, 2))?;
        assert_eq!(y.to_vec2::<f32>()?, expected.to_vec2::<f32>()?);

        for device in devices() {
            // On CUDA a view is all of an empty tensor that there is.
            let x = numbers("x", (4, 3), &device)?.narrow(0, 0, 0)?;
            let (weight, bias) = (weight.to_device(&device)?, bias.to_device(&device)?);
            for bias in [None, Some(&bias)] {
                let y = linear(&x, &weight, bias)?;
                assert_eq!(y.dims(), [0, 2]);
                assert!(y.to_vec2::<f32>()?.is_empty());
            }
        }
        Ok(())
    }

    fn assert_close(actual: &Tensor, expected: &Tensor) -> Result<()> {
        assert_eq!(actual.dims(), expected.dims());
        let [actual, expected] = [actual, expected].map(|t| t.to_device(&Device::Cpu));
        let error = relative_error(&actual?, &expected?)?;
        assert!(error < 1e-6, "{error:.1e}");
        Ok(())
    }
}
