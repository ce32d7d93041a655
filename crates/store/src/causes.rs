//! Errors as one sentence for people.

use std::error::Error;

/// An error with its causes.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use crate::layout::Root;
    use crate::store::Store;

    use super::*;

    #[test]
    fn an_error_is_told_with_its_causes() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(Root::open(place.path()).unwrap());
        let error = store.snapshot("no/name").unwrap_err();
        let told = with_causes(&error);
        let cause = error.source().unwrap().to_string();
        assert!(
            told.starts_with("\"no/name\" is no name of a snapshot: ") && told.ends_with(&cause),
            "{told}"
        );
    }
}
