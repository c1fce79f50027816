//! What the user of a program can do about an error of the trainer, which knows no flags.

use anyhow::anyhow;
use trainer::{Error, Place};

/// The error, with the flags that help where some do.
pub(crate) fn advised(error: Error) -> anyhow::Error {
    let advice = match &error {
        Error::OutOfMemory {
            place: Place::Set(_),
            ..
        } => "fewer pictures need less (--train-limit, --test-limit)".to_string(),
        Error::OutOfMemory {
            place: Place::Batch { .. },
            ..
        } => "smaller images need less, where there is --image-size, and so does a --batch-size below 64"
            .to_string(),
        Error::OutOfMemory { .. } => {
            "a smaller --batch-size needs less, and so do smaller images where there is --image-size \
             and, on a GPU, --precision bf16"
                .to_string()
        }
        // An error of candle-cnn's within one of Candle's, of which only the text is left.
        Error::Tensor { source, .. } if source.to_string().contains("Settings::channels_last") => {
            "--no-channels-last turns it off".to_string()
        }
        Error::NotARun { .. } => {
            "--resume takes the folder of a run, runs/<experiment>/<time>".to_string()
        }
        Error::OtherExperiment { found, .. } => format!("resume it with {found}"),
        _ => return error.into(),
    };
    let text = format!("{error}: {advice}");
    match error {
        Error::OutOfMemory { source, .. } | Error::Tensor { source, .. } => {
            anyhow::Error::new(source).context(text)
        }
        _ => anyhow!(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_memory_says_what_to_lower_and_keeps_its_cause() {
        let lack = |place| {
            let error = advised(Error::OutOfMemory {
                during: "the forward pass",
                place,
                source: Box::new(candle_core::Error::Msg("CUDA_ERROR_OUT_OF_MEMORY".into())),
            });
            format!("{error:#}")
        };
        let step = lack(Place::Step {
            step: 7,
            batch_size: 512,
        });
        for part in ["step 7", "512 images", "--batch-size", "CUDA_ERROR"] {
            assert!(step.contains(part), "{step}");
        }
        let batch = lack(Place::Batch {
            batch: 3,
            images: 64,
        });
        assert!(
            batch.contains("batch 3") && !batch.contains("bf16"),
            "{batch}"
        );
        let set = lack(Place::Set("test"));
        assert!(set.contains("--test-limit"), "{set}");
        assert!(!set.contains("--batch-size"), "{set}");
    }
}
