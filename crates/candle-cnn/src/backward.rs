//! Backpropagation without needless additions.

use std::cell::RefCell;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

use crate::thread_local::with_local;

/// Parameters and their gradients.
pub(crate) type Pairs = Vec<(Tensor, Tensor)>;

thread_local! {
    /// What is set aside while [`backward`] runs.
    static SET_ASIDE: RefCell<Option<Pairs>> = const { RefCell::new(None) };
}

/// `loss.backward()`, with the same gradients at less cost where this crate's operations are in it.
///
/// Candle adds every gradient to zeros. For all parameters of a network that are three passes over
/// memory of their size, which takes a tenth of a step over small pictures, and on a GPU two launches for each
/// of them. Here the gradients that convolutions, batch norms, [`crate::linear`] and a [`crate::StaticGraph`] have for
/// variables go into the result as they are.
///
/// ```
/// use candle_core::{DType, Device, Var};
///
/// let x = Var::ones(3, DType::F32, &Device::Cpu)?;
/// let gradients = candle_cnn::backward(&x.sqr()?.sum_all()?)?;
/// assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>()?, [2.0; 3]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// In a task of a rayon pool it is `loss.backward()` itself, unless the loss is on a GPU: a worker that waits for a kernel may begin
/// another task meanwhile, whose gradients are not to be mixed up with these. An operation of your own whose backward pass makes
/// another one has to use this function for it, too.
///
/// # Errors
/// Those of `loss.backward()`.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    if loss.device().is_cpu() && rayon::current_thread_index().is_some() {
        return loss.backward();
    }
    let (gradients, set_aside) = setting_aside(|| loss.backward());
    let mut gradients = gradients?;
    for (parameter, gradient) in set_aside {
        let sum = match gradients.remove(&parameter) {
            Some(other) => (other + gradient)?,
            None => gradient,
        };
        gradients.insert(&parameter, sum);
    }
    Ok(gradients)
}

/// Runs `f`, and gives what was set aside meanwhile.
pub(crate) fn setting_aside<R>(f: impl FnOnce() -> R) -> (R, Pairs) {
    with_local(&SET_ASIDE, Some(Pairs::new()), || {
        let result = f();
        (result, SET_ASIDE.take().unwrap_or_default())
    })
}

/// Takes the gradient of a variable aside if [`backward`] runs; else, and without one, it comes back.
pub(crate) fn aside(parameter: &Tensor, gradient: Option<Tensor>) -> Option<Tensor> {
    let gradient = gradient?;
    SET_ASIDE.with_borrow_mut(|set_aside| match set_aside {
        Some(set_aside) if parameter.is_variable() => {
            set_aside.push((parameter.clone(), gradient));
            None
        }
        _ => Some(gradient),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Var};

    use super::*;
    use crate::linear;

    /// The identity, whose backward pass waits as a kernel does: meanwhile the worker takes up another task.
    struct Waits;

    impl CustomOp1 for Waits {
        fn name(&self) -> &'static str {
            "waits"
        }

        fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((x.clone(), layout.shape().clone()))
        }

        fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
            while rayon::yield_now() == Some(rayon::Yield::Executed) {}
            Ok(Some(dy.clone()))
        }
    }

    #[test]
    fn a_task_that_a_worker_takes_up_meanwhile_has_its_own_gradients() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let (both, ours) = pool.unwrap().install(|| {
            let loss_of = |weight: &Var| -> Result<Tensor> {
                let x = Tensor::ones((2, 3), candle_core::DType::F32, &Device::Cpu)?;
                linear(&x, weight, None)?.apply_op1(Waits)?.sum_all()
            };
            let var = || Var::ones((4, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
            let (send, receive) = mpsc::channel();
            rayon::spawn(move || {
                let weight = var();
                let gradients = loss_of(&weight).and_then(|loss| loss.backward()).unwrap();
                send.send(gradients.get(&weight).is_some()).unwrap();
            });
            let weight = var();
            let gradients = backward(&loss_of(&weight).unwrap()).unwrap();
            (receive.try_recv(), gradients.get(&weight).is_some())
        });
        assert_eq!((both, ours), (Ok(true), true));
    }
}
