//! Backpropagation without needless additions.

use std::cell::RefCell;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

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
/// # Errors
/// Those of `loss.backward()`.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
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
    let _outer = Outer(SET_ASIDE.replace(Some(Pairs::new())));
    let result = f();
    (result, SET_ASIDE.take().unwrap_or_default())
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

/// What was set aside before, put back even where a backward pass panics.
struct Outer(Option<Pairs>);

impl Drop for Outer {
    fn drop(&mut self) {
        SET_ASIDE.set(self.0.take());
    }
}
