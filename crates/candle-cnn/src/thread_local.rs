//! A thread-local that has another value while a function runs.

use std::cell::RefCell;
use std::thread::LocalKey;

/// Runs `f` with `value` in `place`, and puts back what was there before, even where `f` panics.
pub(crate) fn with_local<V: 'static, R>(
    place: &'static LocalKey<RefCell<V>>,
    value: V,
    f: impl FnOnce() -> R,
) -> R {
    struct Before<V: 'static> {
        place: &'static LocalKey<RefCell<V>>,
        value: V,
    }

    impl<V> Drop for Before<V> {
        fn drop(&mut self) {
            let value = &mut self.value;
            self.place
                .with_borrow_mut(|held| std::mem::swap(held, value));
        }
    }

    let _before = Before {
        place,
        value: place.replace(value),
    };
    f()
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    thread_local! {
        static NUMBER: RefCell<u32> = const { RefCell::new(1) };
    }

    fn number() -> u32 {
        NUMBER.with_borrow(|number| *number)
    }

    #[test]
    fn a_value_holds_while_the_function_runs_and_the_one_before_comes_back() {
        let inner = with_local(&NUMBER, 2, || {
            let inner = with_local(&NUMBER, 3, number);
            (number(), inner)
        });
        assert_eq!((inner, number()), ((2, 3), 1));
        let panicked = catch_unwind(|| with_local(&NUMBER, 2, || panic!("{}", number())));
        assert!(panicked.is_err());
        assert_eq!(number(), 1);
    }
}
