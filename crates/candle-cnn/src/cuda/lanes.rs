//! Work that need not wait for each other, on streams beside the device's own.
//!
//! A convolution over small maps fills a tenth of a large GPU. So those that wait for the same run side by side: the other
//! streams wait for what the device's own stream had to do so far, and it waits for them at the end. Tensors' memory is taken and freed in
//! its order alone, an engine's workspace in that of the engine's stream. A CUDA graph that captures the device's stream captures the others as well.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};

use super::settings;

thread_local! {
    static OTHERS: RefCell<HashMap<DeviceId, Vec<Arc<CudaStream>>>> = RefCell::new(HashMap::new());
}

/// The stream of a lane for the calling thread; lane 0 is the device's own.
pub(crate) fn stream(device: &CudaDevice, lane: usize) -> Result<Arc<CudaStream>> {
    let Some(other) = lane.checked_sub(1) else {
        return Ok(device.cuda_stream());
    };
    OTHERS.with_borrow_mut(|others| {
        let others = others.entry(device.id()).or_default();
        while others.len() <= other {
            others.push(device.cuda_stream().context().new_stream().w()?);
        }
        Ok(Arc::clone(&others[other]))
    })
}

/// Waits for the device's own stream and all lanes of the calling thread.
pub(crate) fn synchronize(device: &CudaDevice) -> Result<()> {
    device.cuda_stream().synchronize().w()?;
    OTHERS.with_borrow(|others| {
        let mut others = others.get(&device.id()).into_iter().flatten();
        others.try_for_each(|other| other.synchronize().w())
    })
}

/// Gives each of `tasks` to a lane, in turn, where none waits for another; then `meanwhile`, which has lane 0 for itself,
/// if there is such a thing. Returns when all is given, and what comes later on the device's stream waits for all of it.
///
/// Tasks write to memory that was taken before, and take none but in the order of their own lane.
pub(crate) fn side_by_side<T>(
    device: &CudaDevice,
    tasks: &[T],
    mut run: impl FnMut(usize, &T) -> Result<()>,
    meanwhile: Option<&mut dyn FnMut() -> Result<()>>,
) -> Result<()> {
    let first = usize::from(meanwhile.is_some());
    let lanes = settings().streams.clamp(1, (first + tasks.len()).max(1));
    // A single lane is for the tasks too: `meanwhile` then has its turn at the end.
    let first = if lanes > first { first } else { 0 };
    let main = device.cuda_stream();
    let others = (1..lanes).map(|lane| stream(device, lane));
    let others = others.collect::<Result<Vec<_>>>()?;
    let mut forked = 0;
    let mut given: Result<()> = others.iter().try_for_each(|other| {
        other.join(&main).w()?;
        forked += 1;
        Ok(())
    });
    if given.is_ok() {
        given = tasks
            .iter()
            .enumerate()
            .try_for_each(|(i, task)| run(first + i % (lanes - first), task));
    }
    if let (Ok(()), Some(meanwhile)) = (&given, meanwhile) {
        given = meanwhile();
    }
    // Lanes are joined even where something failed: memory must not be freed under those that run. An error that the context has
    // noted would be returned in place of a join.
    let noted = main.context().check_err().w();
    let joined = for_each(&others[..forked], |other| main.join(other).w());
    given.and(noted).and(joined)
}

/// Calls `f` with each of `items`, whatever fails, and returns the first error.
fn for_each<T>(items: &[T], f: impl FnMut(&T) -> Result<()>) -> Result<()> {
    items.iter().map(f).fold(Ok(()), Result::and)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lanes_are_joined_where_one_fails_and_the_first_error_is_returned() {
        let mut joined = Vec::new();
        let outcome = for_each(&[1, 2, 3, 4], |&lane| {
            joined.push(lane);
            match lane {
                2 | 3 => candle_core::bail!("lane {lane}"),
                _ => Ok(()),
            }
        });
        assert_eq!(joined, [1, 2, 3, 4]);
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains("lane 2"), "{text}");
        assert!(for_each(&[1], |_| Ok(())).is_ok());
    }
}
