//! Errors as one sentence for people.

use std::error::Error;

/// An error with its causes.
pub(crate) fn with_causes(error: &dyn Error) -> String {
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
    use rekindle_pager::take_descriptor;

    use super::*;

    #[test]
    fn an_error_is_told_with_its_causes() {
        let error = take_descriptor(0).unwrap_err();
        let told = with_causes(&error);
        assert!(
            told.starts_with("cannot open the VM, process 0: "),
            "{told}"
        );
    }
}
