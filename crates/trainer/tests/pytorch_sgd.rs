//! 100 steps of every kind of SGD beside `torch.optim.SGD`, from `tools/pytorch/sgd.py`.

use candle_core::Var;
use test_support::{Fixture, assert_close};
use trainer::{Sgd, SgdConfig};

#[test]
fn one_hundred_steps_of_every_kind_of_sgd_agree_with_pytorch() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/sgd.safetensors"
    );
    let fixture = Fixture::load(path);
    let cases = fixture.json("cases");
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 7);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let config: SgdConfig = serde_json::from_value(case.clone()).unwrap();
        // Near the minimum the velocity has shrunk to the rounding errors of the gradients that made
        // it, so in f32 it agrees to fewer digits than the parameters that it moves.
        for (dtype, parameter, velocity) in [("f32", 1e-6, 1e-5), ("f64", 1e-13, 1e-13)] {
            follow(&fixture, name, dtype, config, [parameter, velocity]);
        }
    }
}

fn follow(fixture: &Fixture, case: &str, dtype: &str, config: SgdConfig, tolerances: [f64; 2]) {
    let start = |name: &str| fixture.tensor(&format!("{dtype}.{name}"));
    let [weight, bias] = ["weight", "bias"].map(|name| Var::from_tensor(start(name)).unwrap());
    let (x, target) = (start("x"), start("target"));
    let parameters = vec![
        ("weight".into(), weight.clone()),
        ("bias".into(), bias.clone()),
    ];
    let mut sgd = Sgd::new(parameters, config).unwrap();
    for step in 1..=100 {
        let prediction = x.matmul(&weight.t().unwrap()).unwrap();
        let residual = prediction
            .broadcast_add(&bias)
            .unwrap()
            .sub(target)
            .unwrap();
        let loss = residual.sqr().unwrap().mean_all().unwrap();
        sgd.step(&loss.backward().unwrap(), config.lr).unwrap();
        if ![1, 2, 10, 100].contains(&step) {
            continue;
        }
        let mut found = vec![
            ("weight".to_string(), weight.as_detached_tensor()),
            ("bias".to_string(), bias.as_detached_tensor()),
        ];
        for (name, buffer) in sgd.state().unwrap() {
            found.push((name.replace(".momentum_buffer", "_momentum"), buffer));
        }
        assert_eq!(found.len(), if config.momentum > 0.0 { 4 } else { 2 });
        for (name, tensor) in found {
            let expected = fixture.tensor(&format!("{case}.{dtype}.{name}.{step}"));
            let tolerance = tolerances[usize::from(name.ends_with("_momentum"))];
            let what = format!("{case} {dtype} {name} step {step}");
            assert_close(&what, &tensor, expected, tolerance);
        }
    }
}
