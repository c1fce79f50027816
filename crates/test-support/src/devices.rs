//! The devices that tests run on.

use std::sync::OnceLock;

use candle_core::Device;

/// The devices for the body of a test that holds on all: the CPU, and the first CUDA device where there is one and
/// the tests are built with the feature `cuda` of the crate under test.
///
/// The CUDA device is opened once in a process and has one stream, so that tests on several threads may share it. Where
/// there is none, [`crate::skipped`] says why.
///
/// # Panics
/// Where there is none and the environment has `CUDA_TESTS_MUST_RUN`.
pub fn devices() -> Vec<Device> {
    static CUDA: OnceLock<Option<Device>> = OnceLock::new();
    let cuda = CUDA.get_or_init(|| match open_cuda() {
        Ok(device) => Some(device),
        Err(why) => {
            assert!(
                std::env::var_os("CUDA_TESTS_MUST_RUN").is_none(),
                "there is no CUDA device: {why}"
            );
            crate::skipped(&format!("CUDA, in this and all other tests: {why}"));
            None
        }
    });
    std::iter::once(Device::Cpu).chain(cuda.clone()).collect()
}

fn open_cuda() -> Result<Device, String> {
    if !candle_core::utils::cuda_is_available() {
        return Err("built without the feature cuda".to_owned());
    }
    Device::new_cuda_with_stream(0).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_comes_first_and_nothing_comes_twice() {
        let devices = devices();
        assert!(devices[0].is_cpu());
        assert!(devices[1..].iter().all(Device::is_cuda));
        assert!(devices.len() <= 2);
    }
}
