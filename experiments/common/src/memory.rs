//! The allocator of the experiments.
//!
//! A training step allocates and frees several hundred megabytes. Pages that go back to the system
//! come back cleared: measured at a fifth of the step's time with
//! mimalloc's defaults. So freed pages are kept for the next step.

/// Tells mimalloc, which each experiment installs as its `#[global_allocator]`, never to give freed
/// pages back; call it first in `main`.
#[allow(unsafe_code)]
pub fn keep_freed_pages() {
    /// `mi_option_purge_delay` in mimalloc.h, which the bindings do not list:
    /// milliseconds until freed pages go back, -1 for never.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: setting an option is allowed at any time, from any thread; an
    // option number that the library does not know is ignored.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) }
}
