//! Where weights come from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use experiment_common::{DownloadProgress, InitFile, say};
use inception_model::GoogLeNet;
use pretrained_import::source::TORCHVISION_GOOGLENET;
use pretrained_import::{
    AuxHeads, FetchOptions, MatchError, MatchOptions, Matched, Source, StateDict, match_backbone,
    match_googlenet,
};

use crate::arguments::image_size;

/// The value of `--weights`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightsSource {
    /// None: drawn at random.
    Random,
    /// A file, the folder of a finished run, or what is fetched and verified.
    Pretrained(Source),
}

impl FromStr for WeightsSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "random" => Ok(Self::Random),
            _ => match text.parse() {
                Ok(source) => Ok(Self::Pretrained(source)),
                Err(_) => Err(EXPECTED.into()),
            },
        }
    }
}

const EXPECTED: &str = "there is no such file; it must be torchvision, random, a .pth or .safetensors \
                        file, a finished run, or a Hub repository as owner/name[@revision][:file]";

impl fmt::Display for WeightsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random => f.write_str("random"),
            Self::Pretrained(source) => source.fmt(f),
        }
    }
}

/// A file of weights and where it is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundWeights {
    /// The file.
    pub file: InitFile,
    /// Where it was fetched from: the address, or repository, commit and file; None for files that
    /// were there.
    pub origin: Option<String>,
}

impl WeightsSource {
    /// torchvision's ImageNet weights.
    pub const TORCHVISION: WeightsSource = WeightsSource::Pretrained(Source::Torchvision);

    /// The file, fetched and verified if need be; None for random weights. `ways_on` are the flags
    /// that help without a network, as lines of two columns.
    ///
    /// # Errors
    /// What cannot be found or fetched, with what to do.
    pub fn find(&self, ways_on: &[&str]) -> Result<Option<FoundWeights>> {
        let found = match self {
            Self::Random => return Ok(None),
            Self::Pretrained(Source::File(path)) => FoundWeights {
                file: weights_file(path, "--weights")?,
                origin: None,
            },
            Self::Pretrained(source) => fetch(source, ways_on)?,
        };
        Ok(Some(FoundWeights {
            file: found.file.resolve("--weights")?,
            ..found
        }))
    }
}

fn fetch(source: &Source, ways_on: &[&str]) -> Result<FoundWeights> {
    let mut progress = DownloadProgress::new();
    let found = source.find(&FetchOptions::from_env(), &mut |event| {
        progress.show(&event);
    });
    let found = found.map_err(|error| {
        let heading = match error.is_for_want_of_a_network() {
            true => format!(
                "the weights {} are not here and could not be fetched. Without a network:\n  \
                 {}\nThe reason",
                source.in_errors(),
                ways_on.join("\n  ")
            ),
            false => format!("cannot use --weights {}", source.in_errors()),
        };
        anyhow::Error::new(error).context(heading)
    })?;
    say(&format!("Weights: {}", found.origin));
    Ok(FoundWeights {
        file: InitFile::given(found.path),
        origin: Some(found.origin),
    })
}

/// The file of weights that a path means: a file itself, the final weights of a finished run, or
/// those of a checkpoint. `flag` names the argument in errors.
///
/// # Errors
/// A folder that is none of these, or does not say which weights it should have.
pub fn weights_file(path: &Path, flag: &str) -> Result<InitFile> {
    if !path.is_dir() {
        return Ok(InitFile::given(path.to_path_buf()));
    }
    let shown = path.display();
    let found = InitFile::in_folder(path).with_context(|| {
        format!("cannot use {flag} {shown} (--resume of a finished run writes its result again)")
    })?;
    if found.path.is_file() {
        return Ok(found);
    }
    if path.join("config.json").is_file() {
        bail!(
            "cannot use {flag} {shown}: this run is not finished. Finish it with --resume, or give one \
             of its checkpoints, {shown}/checkpoints/step-…"
        );
    }
    bail!("cannot use {flag} {shown}: the folder is neither a run nor a checkpoint of one")
}

/// A file of weights that has been read.
#[derive(Debug, Clone)]
pub struct Weights {
    /// Where it is.
    pub path: PathBuf,
    /// What it holds.
    pub state: StateDict,
    /// Of the file, in hexadecimal.
    pub sha256: String,
}

impl Weights {
    /// Reads a file of any format, which must be the one that was resolved.
    ///
    /// # Errors
    /// A file that has changed, or that holds no weights.
    pub fn read(file: &InitFile) -> Result<Self> {
        Ok(Self {
            path: file.path.clone(),
            state: StateDict::from_bytes(&file.read()?, &file.path)?,
            sha256: file.sha256.clone(),
        })
    }

    /// Whether these are torchvision's ImageNet weights: the published file, or what `pretrained-import`
    /// has made of it.
    pub fn are_torchvisions(&self) -> bool {
        let imported_from = self.state.metadata.get("source_sha256");
        TORCHVISION_GOOGLENET.is(&self.sha256)
            || imported_from.is_some_and(|sha256| TORCHVISION_GOOGLENET.is(sha256))
    }

    /// Whether the network converts its input, as the file says or torchvision's own weights are known to be used.
    ///
    /// # Errors
    /// A file that says what is neither yes nor no.
    pub fn transform_input(&self) -> Result<Option<bool>> {
        let said = self.state.transform_input(&self.path)?;
        Ok(said.or_else(|| self.are_torchvisions().then_some(true)))
    }

    /// Height and width to which its pictures are resized, in pixels, where the file says so.
    ///
    /// # Errors
    /// A file that says what `--image-size` does not take.
    pub fn image_size(&self) -> Result<Option<usize>> {
        Ok(self.state.said("image_size", &self.path, image_size)?)
    }

    /// Whether there are auxiliary heads in it.
    pub fn has_aux(&self) -> bool {
        let mut names = self.state.tensors.keys();
        names.any(|name| GoogLeNet::is_auxiliary(name))
    }

    /// torchvision's GoogLeNet, head included, as `pretrained-import` takes it from the same file; with auxiliary heads or without.
    ///
    /// # Errors
    /// What is missing, unexpected or misshapen.
    pub fn whole(&self, aux_heads: bool) -> Result<BTreeMap<String, Tensor>> {
        self.matched(match_googlenet, aux_heads)
    }

    /// The same without the head, which the file need not have.
    ///
    /// # Errors
    /// As [`Self::whole`].
    pub fn backbone(&self, aux_heads: bool) -> Result<BTreeMap<String, Tensor>> {
        self.matched(match_backbone, aux_heads)
    }

    fn matched(
        &self,
        how: impl FnOnce(&StateDict, MatchOptions) -> Result<Matched, Box<MatchError>>,
        aux_heads: bool,
    ) -> Result<BTreeMap<String, Tensor>> {
        let options = MatchOptions {
            aux_heads: match aux_heads {
                true => AuxHeads::Keep,
                false => AuxHeads::Drop,
            },
            strict: true,
        };
        let matched = how(&self.state, options)
            .with_context(|| format!("{} does not fit", self.path.display()))?;
        Ok(matched.tensors.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use pretrained_import::{Format, Ignored};

    use super::*;

    #[test]
    fn the_value_of_the_flag_is_random_or_a_source_and_prints_as_it_was_given() {
        let here = env!("CARGO_MANIFEST_DIR");
        for text in ["random", "torchvision", "o/n@main:a/b.pth", here] {
            let source: WeightsSource = text.parse().unwrap();
            assert_eq!(source == WeightsSource::Random, text == "random");
            assert_eq!(source.to_string(), text);
        }
        for text in ["", "absent.pth", "a/b/c"] {
            let error = text.parse::<WeightsSource>().unwrap_err();
            for way in ["torchvision", "random", "owner/name[@revision][:file]"] {
                assert!(error.contains(way), "{text}: {error}");
            }
        }
    }

    #[test]
    fn torchvisions_weights_are_known_by_their_hash_and_convert_unless_the_file_says_no() {
        let published = TORCHVISION_GOOGLENET.pin.hash();
        for (sha256, said, are_torchvisions, transform_input) in [
            (published, &[][..], true, Some(true)),
            ("1", &[], false, None),
            ("1", &[("source_sha256", published)], true, Some(true)),
            ("1", &[("source_sha256", "2")], false, None),
            (
                published,
                &[("transform_input", "false")],
                true,
                Some(false),
            ),
            ("1", &[("transform_input", "true")], false, Some(true)),
        ] {
            let said = said.iter().map(|(k, v)| (k.to_string(), v.to_string()));
            let weights = Weights {
                path: "weights".into(),
                state: StateDict {
                    tensors: BTreeMap::new(),
                    ignored: Ignored::default(),
                    metadata: said.collect(),
                    format: Format::Safetensors,
                },
                sha256: sha256.into(),
            };
            let shown = format!("{sha256} {:?}", weights.state.metadata);
            assert_eq!(weights.are_torchvisions(), are_torchvisions, "{shown}");
            let found = weights.transform_input().unwrap();
            assert_eq!(found, transform_input, "{shown}");
        }
    }

    #[test]
    fn a_folder_means_the_weights_of_the_finished_run_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let of = |path: &Path| {
            let file = weights_file(path, "--init").and_then(|file| file.resolve("--init"));
            file.map_err(|error| format!("{error:#}"))
        };
        let error = of(dir.path()).unwrap_err();
        assert!(error.contains("neither a run"), "{error}");
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let error = of(dir.path()).unwrap_err();
        assert!(
            error.contains("not finished") && error.contains("--resume"),
            "{error}"
        );
        let file = dir.path().join("model.safetensors");
        std::fs::write(&file, "").unwrap();
        let resolved = of(&file).unwrap();
        assert_eq!(resolved.path, file.canonicalize().unwrap());
        assert_eq!(of(dir.path()), Ok(resolved.clone()));

        // What a finished run and a checkpoint record.
        let summary = |sha256: &str| {
            format!(
                r#"{{"steps": 1, "epochs": 1, "evaluations": {{}}, "weights_sha256": "{sha256}"}}"#
            )
        };
        let sums = |sha256: &str| format!("{sha256}  model.safetensors\n1  state.json\n");
        let records = [
            (
                "finished.json is damaged",
                summary(&resolved.sha256),
                summary("1234"),
            ),
            (
                "SHA256SUMS has no entry",
                sums(&resolved.sha256),
                sums("1234"),
            ),
        ];
        for (problem, right, wrong) in records {
            let name = problem.split(' ').next().unwrap();
            let record = dir.path().join(name);
            std::fs::write(&record, right).unwrap();
            assert_eq!(of(dir.path()), Ok(resolved.clone()));
            std::fs::write(&record, wrong).unwrap();
            let error = of(dir.path()).unwrap_err();
            assert!(error.contains("recorded beside it is 1234"), "{error}");
            // Nothing is recorded of a file that is given itself.
            assert_eq!(of(&file), Ok(resolved.clone()));
            std::fs::write(&record, "{").unwrap();
            let error = of(dir.path()).unwrap_err();
            assert!(error.contains(problem), "{error}");
            std::fs::remove_file(&record).unwrap();
        }
    }
}
