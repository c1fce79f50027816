//! Names that files and servers give, for people.

/// The first `most` of some names on one line, and how many more there are, `unlisted` among them. What would
/// steer a terminal is escaped.
pub fn first_of(names: &[String], most: usize, unlisted: usize) -> String {
    let shown = names.iter().take(most);
    let shown: Vec<String> = shown.map(|name| name.escape_debug().to_string()).collect();
    let (more, shown) = (names.len() - shown.len() + unlisted, shown.join(", "));
    match more {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_as_they_are_but_for_what_steers_a_terminal_and_for_their_number() {
        let names = ["fc.weight", "\u{1b}[2Jé", "a\nb"].map(str::to_owned);
        assert_eq!(first_of(&names, 3, 0), "fc.weight, \\u{1b}[2Jé, a\\nb");
        assert_eq!(first_of(&names, 1, 0), "fc.weight and 2 more");
        assert_eq!(first_of(&names, 1, 5), "fc.weight and 7 more");
        assert_eq!(first_of(&[], 1, 0), "");
    }
}
