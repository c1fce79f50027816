//! What a test says that has passed without having checked anything.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

/// Says on standard error that the test on this thread, and each that says the same after it, is skipped, and why: one
/// line for each reason in a process.
///
/// ```text
/// the_whole_data_set_has_the_published_sizes: skipped: CIFAR_DATA_DIR names no folder with CIFAR-10
/// ```
pub fn skipped(why: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.insert(why.to_owned()) {
        let thread = std::thread::current();
        let line = format!("{}: skipped: {why}\n", thread.name().unwrap_or("a test"));
        // Not by a macro that prints: libtest keeps to itself what those print in a test that passes.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_a_passing_test_says_is_seen_once_for_each_reason() {
        const INNER: &str = "SKIPPED_IN_A_TEST_OF_SKIPPED";
        if std::env::var_os(INNER).is_some() {
            for why in ["one reason", "one reason", "another"] {
                skipped(why);
            }
            return;
        }
        let name = "skipped::tests::what_a_passing_test_says_is_seen_once_for_each_reason";
        let program = std::env::current_exe().expect("the program of this test");
        let output = Command::new(program)
            .args(["--exact", name])
            .env(INNER, "1")
            .output()
            .expect("this program once more");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let expected = ["one reason", "another"].map(|why| format!("{name}: skipped: {why}\n"));
        assert_eq!(said, expected.concat());
    }
}
