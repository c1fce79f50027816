//! Decoders of others that panic on some damaged or odd files.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is caught here and told as an error.
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Makes a panic of `call` an error, and prints nothing of it. What `call` was working on is given up afterwards, so it does
/// not matter in which state it was left.
pub(crate) fn guarded<V, E>(
    call: impl FnOnce() -> Result<V, E>,
    error: impl FnOnce(String) -> E,
) -> Result<V, E> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !IS_GUARDED.get() {
                others(panic);
            }
        }));
    });
    let was_guarded = IS_GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    IS_GUARDED.set(was_guarded);
    result.unwrap_or_else(|panic| {
        let reason = reason(&*panic);
        Err(error(format!(
            "the file is damaged, the reader gave up: {reason}"
        )))
    })
}

fn reason(panic: &(dyn Any + Send)) -> &str {
    (panic.downcast_ref::<&str>().copied())
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no reason given")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_that_gives_its_reason() {
        let call = || -> Result<(), String> { panic!("row {}", 7) };
        let error = guarded(call, |reason| reason).unwrap_err();
        assert!(error.ends_with("the reader gave up: row 7"), "{error}");
        assert!(!IS_GUARDED.get(), "the next panic of this thread is told");
        assert_eq!(guarded(|| Ok::<_, String>(1), |reason| reason), Ok(1));
    }

    #[test]
    fn a_guard_within_a_guard_leaves_the_outer_one_on() {
        let inner = || guarded(|| Ok::<_, String>(()), |reason| reason);
        let call = || {
            inner()?;
            Ok::<_, String>(IS_GUARDED.get())
        };
        assert_eq!(guarded(call, |reason| reason), Ok(true));
    }
}
