//! What a [`candle_cnn::StaticGraph`] tells a profile.
//!
//! A process of its own, with one test: an event that a thread without a subscriber is the first to
//! meet counts as unwanted for all threads (`tracing` asks the only subscriber's thread alone).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_cnn::{
    ConvParameters, MaxPool2dConfig, PROFILE_TARGET, StaticGraph, StaticGraphBuilder,
};
use candle_core::{Device, Tensor, Var};
use test_support::seeded_values;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

fn tensor(name: &str, shape: &[usize]) -> Tensor {
    let values = seeded_values(name, shape.iter().product(), 1.0);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The fields of the events of [`PROFILE_TARGET`].
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<BTreeMap<String, String>>>>);

impl<S: tracing::Subscriber> Layer<S> for Told {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        struct Fields(BTreeMap<String, String>);
        impl tracing::field::Visit for Fields {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                let value = format!("{value:?}").trim_matches('"').to_string();
                self.0.insert(field.name().to_string(), value);
            }
        }
        if event.metadata().target() == PROFILE_TARGET {
            let mut fields = Fields(BTreeMap::new());
            event.record(&mut fields);
            self.0.lock().unwrap().push(fields.0);
        }
    }
}

/// What both passes through a graph of two 8×8 images tell, in order.
fn told_of_a_step(graph: &StaticGraph, parameters: &[ConvParameters<'_>]) -> Vec<String> {
    // The one thread of a pool: a subscriber for tests is one thread's.
    let told = Told::default();
    let subscriber = tracing_subscriber::registry().with(told.clone());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1);
    let dispatch = tracing::Dispatch::new(subscriber);
    let pool = pool.build().unwrap();
    pool.install(|| {
        tracing::dispatcher::with_default(&dispatch, || {
            let images = tensor("images", &[2, 3, 8, 8]);
            let features = graph.forward(&images, parameters).unwrap().features;
            features.sum_all().unwrap().backward().unwrap();
        })
    });
    let told = told.0.lock().unwrap();
    told.iter()
        .map(|t| {
            format!(
                "{}, {}: {} flop, {} bytes",
                t["layer"], t["pass"], t["flop"], t["bytes"]
            )
        })
        .collect()
}

#[test]
fn a_profile_names_every_layer_and_pass_with_the_cost_of_a_direct_computation() {
    let mut builder = StaticGraphBuilder::new(3, (8, 8));
    let stem = builder.conv2d_relu(builder.input(), 16, 3, 1).unwrap();
    builder.name(stem, "stem");
    let pooled = builder
        .max_pool2d(stem, MaxPool2dConfig::square(2, 2, 0))
        .unwrap();
    let last = builder.conv2d_relu(pooled, 4, 1, 0).unwrap();
    let graph = builder.global_avg_pool2d(last).unwrap();
    let var = |name: &str, shape: &[usize]| Var::from_tensor(&tensor(name, shape)).unwrap();
    let (weight1, bias1) = (var("w1", &[16, 3, 3, 3]), var("b1", &[16]));
    let (weight2, bias2) = (var("w2", &[4, 16, 1, 1]), var("b2", &[4]));
    let parameters = [(&weight1, &bias1), (&weight2, &bias2)]
        .map(|(weight, bias)| ConvParameters::Bias { weight, bias });

    let lines = told_of_a_step(&graph, &parameters);
    // 2·N·H·W·C_out·C_in·k² operations; 4 bytes of each value of input, output and weight.
    let (stem_flop, last_flop) = (2 * 2 * 64 * 16 * 27, 2 * 2 * 16 * 4 * 16);
    let stem_bytes = 4 * (2 * 64 * 3 + 2 * 64 * 16 + 16 * 27);
    let (pool_bytes, last_bytes) = (4 * 2 * 80 * 16, 4 * (2 * 16 * 20 + 64));
    assert_eq!(
        lines,
        [
            format!("stem, forward: {stem_flop} flop, {stem_bytes} bytes"),
            format!("1: max pool 2×2 to 4 × 4, forward: 0 flop, {pool_bytes} bytes"),
            format!(
                "2: convolution 1×1 to 4 × 4 × 4, forward: {last_flop} flop, {last_bytes} bytes"
            ),
            format!(
                "2: convolution 1×1 to 4 × 4 × 4, input gradient: {last_flop} flop, {last_bytes} bytes"
            ),
            format!(
                "2: convolution 1×1 to 4 × 4 × 4, weight gradient: {last_flop} flop, {last_bytes} bytes"
            ),
            "2: convolution 1×1 to 4 × 4 × 4, other gradient: 0 flop, 0 bytes".to_string(),
            format!("1: max pool 2×2 to 4 × 4, input gradient: 0 flop, {pool_bytes} bytes"),
            format!("stem, weight gradient: {stem_flop} flop, {stem_bytes} bytes"),
            "stem, other gradient: 0 flop, 0 bytes".to_string(),
        ]
    );

    // Frozen weights cost no gradient of theirs, though their biases train.
    let frozen = [weight1.as_detached_tensor(), weight2.as_detached_tensor()];
    let parameters = [(&frozen[0], &bias1), (&frozen[1], &bias2)]
        .map(|(weight, bias)| ConvParameters::Bias { weight, bias });
    let lines = told_of_a_step(&graph, &parameters);
    let passes = lines[3..]
        .iter()
        .filter_map(|line| line.rsplit(": ").nth(1));
    assert_eq!(
        passes.collect::<Vec<_>>(),
        [
            "convolution 1×1 to 4 × 4 × 4, input gradient",
            "convolution 1×1 to 4 × 4 × 4, other gradient",
            "max pool 2×2 to 4 × 4, input gradient",
            "stem, other gradient",
        ]
    );
}
