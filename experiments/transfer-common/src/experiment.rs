//! Fine-tuning, whole or of the head alone, as an experiment.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use cifar_data::CLASSES;
use experiment_common::{DataConfig, Dataset, Experiment, RunConfig, print};
use inception_model::{GoogLeNet, GoogLeNetConfig, LARGEST_OF_ONE_PIXEL};
use serde::Deserialize;
use trainer::{DataSets, RunDirectory};

use crate::config::{Begin, BeginConfig, Request, Trained, TransferConfig};
use crate::network::{Network, NetworkSettings};
use crate::source::{FoundWeights, Weights, WeightsSource, weights_file};

/// One of the two experiments.
pub trait Stage {
    /// Name of its package.
    const NAME: &'static str;
    /// Version of its package.
    const VERSION: &'static str;
}

/// The experiment of a [`Stage`].
#[derive(Debug)]
pub struct FineTune<S>(PhantomData<S>);

/// Pictures as CIFAR-10 has them, unless `--image-size` says otherwise.
const IMAGE_SIZE: usize = 32;

impl<S: Stage> Experiment for FineTune<S> {
    const NAME: &'static str = S::NAME;
    const VERSION: &'static str = S::VERSION;
    type Request = Request;
    type ModelConfig = TransferConfig;
    type Network = Network;

    fn resolve(request: Request, data: &DataConfig, out: &Path) -> Result<TransferConfig> {
        let dataset = data.dataset;
        let (begin, known) = match &request.begin {
            Begin::Weights(source) => find_backbone(source, &request)?,
            Begin::Init(path) => find_state(path, &request, dataset)?,
            Begin::NewestRunOf(experiment) => {
                let run = newest_run(out, experiment, dataset)?;
                print(&format!(
                    "Weights: {}, the newest finished run of {experiment} (--init takes another)",
                    run.display()
                ));
                find_state(&run, &request, dataset)?
            }
        };
        let transform_input = known.transform_input.unwrap_or(true);
        let is_converted_twice = known.is_foreign
            && transform_input
            && request.trained == Trained::HeadWithFixedStatistics;
        if is_converted_twice {
            print(
                "The pictures, already at −1…1, are converted once more in front of the network (transform_input), as in the \
                 lesson. The batch's statistics undo that, and those that --bn-eval fixes cannot, unless the weights were trained so: \
                 better are ones with it off, which pretrained-import --no-transform-input writes",
            );
        } else if known.transform_input.is_none() && begin != BeginConfig::Random {
            print(
                "These weights do not say whether the network converts its input: it does, as torchvision's pretrained one \
                 (pretrained-import --no-transform-input turns it off)",
            );
        }
        Ok(TransferConfig {
            begin,
            transform_input,
            image_size: request
                .image_size
                .or(known.image_size)
                .unwrap_or(IMAGE_SIZE),
            dropout: request.dropout,
            aux_heads: request.aux_heads,
            trained: request.trained,
        })
    }

    fn network(config: &RunConfig<TransferConfig>, device: &Device) -> Result<Network> {
        let model = &config.model;
        let settings = NetworkSettings {
            classes: CLASSES,
            transform_input: model.transform_input,
            image_size: Some(model.image_size),
            dropout: model.dropout,
            aux_heads: model.aux_heads,
            trained: model.trained,
            class_names: config.data.dataset.name().into(),
        };
        Network::new(settings, config.training.seed, device)
    }

    fn load_initial_weights(network: &Network, config: &RunConfig<TransferConfig>) -> Result<()> {
        match &config.model.begin {
            BeginConfig::Random => Ok(()),
            BeginConfig::Backbone { file, .. } => {
                let weights = Weights::read(file)?;
                let loaded = network.load_backbone(&weights);
                loaded.context("cannot use --weights")
            }
            BeginConfig::State { file } => {
                let weights = Weights::read(file)?;
                let loaded = network.load_state(&weights);
                loaded.context("cannot use --init")
            }
        }
    }

    /// A training batch that leaves one value a channel has no variance. Each process normalises by its own part.
    fn check_data(config: &RunConfig<TransferConfig>, data: &DataSets) -> Result<()> {
        let (training, images) = (&config.training, data.train.len());
        let processes = config.compute.processes;
        let (batch, last) = (training.batch_size, images % training.batch_size);
        let reaches_last = training.total_steps(images) >= training.steps_per_epoch(images);
        // Parts differ by one picture at most, and those of none make no step.
        let leaves_one = |pictures: usize| pictures > 0 && pictures / processes <= 1;
        let single = leaves_one(batch) || (leaves_one(last) && reaches_last);
        let normalises_by_batch = config.model.trained != Trained::HeadWithFixedStatistics;
        let shared_out = match processes {
            1 => String::new(),
            _ => format!(", shared out among {processes} processes"),
        };
        ensure!(
            !(single && normalises_by_batch && config.model.image_size <= LARGEST_OF_ONE_PIXEL),
            "a training batch would have a single picture ({images} pictures in batches of {batch}{shared_out}), \
             from which the last batch norms, at 1×1 pixels a channel, have no variance: change --batch-size or \
             --train-limit"
        );
        Ok(())
    }

    fn summary(request: &Request) -> Result<String> {
        let config = GoogLeNetConfig {
            num_classes: CLASSES,
            aux_heads: request.aux_heads,
            transform_input: true,
            dropout: request.dropout,
            ..GoogLeNetConfig::default()
        };
        let size = request.image_size.unwrap_or(IMAGE_SIZE);
        // The table needs no weights that mean anything.
        let network = GoogLeNet::new(
            &config,
            &Device::Cpu,
            &mut trainer::random::stream(0, "", 0),
        );
        Ok(network?.summary(size, size).to_string())
    }
}

/// What `--weights` takes where there is no network.
const WAYS_ON: &[&str] = &[
    "--weights FILE        a .pth or .safetensors file of torchvision's GoogLeNet",
    "--weights RUN         a finished run of finetune-full or finetune-frozen",
    "--weights random      no pretrained weights",
];

/// What a file of weights says of how it was trained.
#[derive(Debug, Default)]
struct Known {
    transform_input: Option<bool>,
    image_size: Option<usize>,
    /// Whether it was not trained by these programs, which say of the pictures how large they were.
    is_foreign: bool,
}

fn find_backbone(source: &WeightsSource, request: &Request) -> Result<(BeginConfig, Known)> {
    let Some(FoundWeights { file, origin }) = source.find(WAYS_ON)? else {
        return Ok((BeginConfig::Random, Known::default()));
    };
    let weights = Weights::read(&file).context("cannot use --weights")?;
    check_architecture(&weights, "--weights")?;
    ensure!(
        !request.aux_heads || weights.has_aux(),
        "--aux cannot be combined with --weights {source}: these weights have no auxiliary heads"
    );
    let fits = weights.backbone(request.aux_heads);
    fits.context("cannot use --weights")?;
    let transform_input = weights.transform_input();
    let known = Known {
        // How the features were trained decides; the size of the pictures is free.
        transform_input: transform_input.context("cannot use --weights")?,
        image_size: None,
        is_foreign: is_foreign(&weights),
    };
    let begin = BeginConfig::Backbone {
        source: source.to_string(),
        origin,
        file,
    };
    Ok((begin, known))
}

fn find_state(path: &Path, request: &Request, dataset: Dataset) -> Result<(BeginConfig, Known)> {
    let file = weights_file(path, "--init")?.resolve("--init")?;
    let weights = Weights::read(&file).context("cannot use --init")?;
    check_architecture(&weights, "--init")?;
    let image_size = match request.image_size {
        Some(_) => Ok(None),
        None => weights.image_size(),
    };
    let transform_input = weights.transform_input();
    let known = Known {
        transform_input: transform_input.context("cannot use --init")?,
        image_size: image_size.context("cannot use --init")?,
        is_foreign: is_foreign(&weights),
    };
    let shown = path.display();
    let classes = weights
        .state
        .tensors
        .get("fc.weight")
        .and_then(|head| head.dim(0).ok());
    ensure!(
        classes.is_none_or(|classes| classes == CLASSES),
        "--init {shown} has a head of {} classes, these pictures have {CLASSES}: --weights {shown} \
         takes its backbone under a fresh head",
        classes.unwrap_or_default()
    );
    if let Some(other) = weights.state.metadata.get("class_names")
        && other != dataset.name()
    {
        print(&format!(
            "The head of these weights knows the classes of {}, and now it is to learn those of {}",
            other.escape_debug(),
            dataset.name()
        ));
    }
    match (weights.has_aux(), request.aux_heads) {
        (false, true) => bail!(
            "--aux cannot be combined with --init {shown}: that state has no auxiliary heads, and \
             --init adds nothing to it"
        ),
        (true, false) if request.trained == Trained::Everything => {
            bail!("--init {shown} has auxiliary heads, and --init leaves nothing out: add --aux")
        }
        (true, false) => print(
            "The auxiliary heads of these weights are left out: they only ever train the backbone",
        ),
        _ => {}
    }
    let fits = weights.whole(request.aux_heads);
    fits.context("cannot use --init")?;
    Ok((BeginConfig::State { file }, known))
}

fn is_foreign(weights: &Weights) -> bool {
    !weights.state.metadata.contains_key("image_size")
}

fn check_architecture(weights: &Weights, flag: &str) -> Result<()> {
    match weights.state.metadata.get("architecture") {
        Some(other) if other != GoogLeNet::ARCHITECTURE => bail!(
            "cannot use {flag}: {} is a {}, this experiment trains {}",
            weights.path.display(),
            other.escape_debug(),
            GoogLeNet::ARCHITECTURE
        ),
        _ => Ok(()),
    }
}

/// The newest finished run of an experiment on the same pictures: those of another set, as `--quick` draws them, leave a network that
/// knows nothing of these.
fn newest_run(out: &Path, experiment: &str, dataset: Dataset) -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct OfPictures {
        data: DataConfig,
    }
    let is_on_them = |config: &OfPictures| config.data.dataset == dataset;
    RunDirectory::newest_finished(out, experiment, is_on_them)?.with_context(|| {
        let pictures = dataset.name();
        let given = match dataset {
            Dataset::Cifar10 => "",
            Dataset::Shapes => " -- --quick",
        };
        format!(
            "there is no finished run of {experiment} on {pictures} under --out {} to begin with. Three ways on:\n  \
             cargo run -p {experiment}{given}    makes one\n  \
             --init FILE or RUN           begins with that state, head included\n  \
             --weights WEIGHTS            takes a backbone under a fresh head: torchvision, a FILE, a \
             Hub repository, or random",
            out.display()
        )
    })
}
