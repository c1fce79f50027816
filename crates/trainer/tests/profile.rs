//! What the steps of a run tell a profile.
//!
//! A process of its own, with one test: an event that a thread without a subscriber is the first to
//! meet counts as unwanted for all threads (`tracing` asks the only subscriber's thread alone).

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use candle_cnn::Mode;
use candle_core::{DType, Device, Result, Tensor, Var};
use cifar_data::{Normalization, Split, shapes};
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use trainer::{
    DataSets, Environment, Execution, Model, PROFILE_TARGET, Program, RunDirectory, Silent,
    Training, TrainingConfig,
};

struct Linear(Var);

impl Model for Linear {
    fn forward(&self, images: &Tensor, _: Mode) -> Result<Tensor> {
        images.flatten_from(1)?.matmul(self.0.as_tensor())
    }

    fn named_parameters(&self) -> Vec<(String, Var)> {
        vec![("fc.weight".into(), self.0.clone())]
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }
}

/// The parts of the events of [`PROFILE_TARGET`].
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<String>>>);

impl<S: tracing::Subscriber> Layer<S> for Told {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        struct Part<'a>(&'a mut Vec<String>);
        impl Visit for Part<'_> {
            fn record_str(&mut self, field: &Field, part: &str) {
                assert_eq!(field.name(), "part");
                self.0.push(part.to_string());
            }
            fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
        }
        if event.metadata().target() == PROFILE_TARGET {
            event.record(&mut Part(&mut self.0.lock().unwrap()));
        }
    }
}

const STEPS: usize = 4;

/// The parts of two epochs of two steps, the last of which is smaller, with their evaluations.
fn told_of_a_run(execution: Execution) -> Vec<String> {
    let data = DataSets {
        train: Arc::new(shapes::generate(0, Split::Train, 6)),
        validation: None,
        test: Arc::new(shapes::generate(0, Split::Test, 3)),
        normalization: Normalization::HALF,
    };
    let config = TrainingConfig {
        epochs: 2,
        batch_size: 4,
        ..TrainingConfig::default()
    };
    let program = Program {
        name: "profile",
        version: "0",
        sources: env!("CARGO_MANIFEST_DIR"),
    };
    let environment = Environment::capture(program, "cpu", 1, config.seed);
    let out = tempfile::tempdir().unwrap();
    let run = RunDirectory::create(out.path(), "profile", &config, &data, &environment).unwrap();
    let model = Linear(Var::zeros((3 * 32 * 32, 10), DType::F32, &Device::Cpu).unwrap());
    let training = Training::new(&model, data, &Device::Cpu, config, run).unwrap();
    let mut training = training.executed(execution);
    let told = Told::default();
    let subscriber = tracing_subscriber::registry().with(told.clone());
    tracing::subscriber::with_default(subscriber, || {
        training.run(&mut Silent, &|| false).unwrap();
    });
    let told = told.0.lock().unwrap();
    told.clone()
}

#[test]
fn a_step_has_each_of_its_parts_once_wherever_the_data_are() {
    let by_the_host = Execution::on(&Device::Cpu);
    assert_eq!(
        told_of_a_run(by_the_host),
        ["data", "forward", "loss", "backward", "update"].repeat(STEPS)
    );
    let resident = Execution {
        resident: true,
        ..by_the_host
    };
    assert_eq!(
        told_of_a_run(resident),
        ["data", "gather", "forward", "loss", "backward", "update"].repeat(STEPS)
    );
}
