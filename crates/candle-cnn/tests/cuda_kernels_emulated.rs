//! The CUDA kernels' arithmetic and indices, compiled for the CPU from the very same sources
//! (`tools/cuda-emulation`), against the operations on the CPU.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use candle_cnn::*;
use candle_core::{DType, Device, Result, Tensor, Var};
use test_support::{seeded_values, skipped};

/// The program, or why there is none.
fn emulator() -> Option<&'static Path> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let tools = root.join("../../tools/cuda-emulation");
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-emulation");
        let build = |sanitizer: &[&str]| {
            Command::new("c++")
                .args(["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-pthread"])
                .args(sanitizer)
                .arg("-I")
                .arg(&tools)
                .arg("-I")
                .arg(root.join("src"))
                .arg(tools.join("main.cpp"))
                .arg("-o")
                .arg(&program)
                .output()
        };
        let mut output = build(&["-fsanitize=address"]).map_err(|e| format!("c++: {e}"))?;
        if !output.status.success() {
            output = build(&[]).map_err(|e| format!("c++: {e}"))?;
        }
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        // A compiler without C++20 is a reason to skip, a kernel that does not compile is not.
        if errors.contains("'barrier' file not found") || errors.contains("barrier: No such file") {
            return Err("c++ has no <barrier>".to_owned());
        }
        assert!(
            output.status.success(),
            "the kernels do not compile:\n{errors}"
        );
        Ok(program)
    });
    match built {
        Ok(program) => Some(program),
        Err(why) => {
            skipped(why);
            None
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Type {
    F32,
    F64,
    Bf16,
}

const TYPES: [Type; 3] = [Type::F32, Type::F64, Type::Bf16];

impl Type {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bf16 => "bf16",
        }
    }

    /// What statistics, parameters and losses have.
    fn compute(self) -> Self {
        match self {
            Self::Bf16 => Self::F32,
            other => other,
        }
    }

    fn bytes(self, values: &[f64]) -> Vec<u8> {
        match self {
            Self::F32 => values
                .iter()
                .flat_map(|&v| (v as f32).to_le_bytes())
                .collect(),
            Self::F64 => values.iter().flat_map(|&v| v.to_le_bytes()).collect(),
            Self::Bf16 => values
                .iter()
                .flat_map(|&v| ((rounded(v).to_bits() >> 16) as u16).to_le_bytes())
                .collect(),
        }
    }

    fn values(self, bytes: &[u8]) -> Vec<f64> {
        match self {
            Self::F32 => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                .collect(),
            Self::F64 => bytes
                .chunks_exact(8)
                .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            Self::Bf16 => bytes
                .chunks_exact(2)
                .map(|b| f32::from_le_bytes([0, 0, b[0], b[1]]).into())
                .collect(),
        }
    }

    /// Rounding allowed, of the largest value: sums differ in their order, bf16 in its last digit.
    fn tolerance(self) -> f64 {
        match self {
            Self::F32 => 3e-6,
            Self::F64 => 1e-12,
            Self::Bf16 => 1.0 / 256.0,
        }
    }
}

/// To the nearest bf16.
fn rounded(value: f64) -> f32 {
    let bits = (value as f32).to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

/// What `main.cpp` reads.
#[derive(Default)]
struct Program {
    buffers: Vec<Vec<u8>>,
    launches: u32,
    bytes: Vec<u8>,
}

/// A buffer's number plus one, as the kernels' pointers have it.
#[derive(Clone, Copy)]
struct At(u32);

const NULL: At = At(0);

impl Program {
    fn buffer(&mut self, bytes: Vec<u8>) -> At {
        self.buffers.push(bytes);
        At(self.buffers.len() as u32)
    }

    fn given(&mut self, kind: Type, values: &[f64]) -> At {
        self.buffer(kind.bytes(values))
    }

    fn labels(&mut self, labels: &[u32]) -> At {
        self.buffer(labels.iter().flat_map(|l| l.to_le_bytes()).collect())
    }

    /// To be written: NaN before.
    fn result(&mut self, kind: Type, elements: usize) -> At {
        self.given(kind, &vec![f64::NAN; elements])
    }

    fn launch(&mut self, name: &str, (x, y): (usize, usize)) -> &mut Self {
        self.launches += 1;
        let grid = [name.len() as u32, x as u32, y as u32].map(u32::to_le_bytes);
        self.bytes.extend(grid[0]);
        self.bytes.extend(name.as_bytes());
        self.bytes.extend(grid[1..].concat());
        self
    }

    /// With a thread for each of `threads`.
    fn threads(&mut self, name: &str, kind: Type, threads: usize) -> &mut Self {
        self.launch(
            &format!("{name}_{}", kind.name()),
            (threads.div_ceil(256), 1),
        )
    }

    fn at(&mut self, pointers: &[At]) -> &mut Self {
        pointers
            .iter()
            .for_each(|p| self.bytes.extend(p.0.to_le_bytes()));
        self
    }

    fn numbers(&mut self, numbers: &[usize]) -> &mut Self {
        let numbers = numbers.iter().flat_map(|&n| (n as u32).to_le_bytes());
        self.bytes.extend(numbers);
        self
    }

    fn double(&mut self, number: f64) -> &mut Self {
        self.bytes.extend(number.to_le_bytes());
        self
    }

    /// All buffers after the launches.
    fn run(&self, program: &Path) -> Vec<Vec<u8>> {
        let mut input = (self.buffers.len() as u32).to_le_bytes().to_vec();
        for buffer in &self.buffers {
            input.extend((buffer.len() as u64).to_le_bytes());
            input.extend(buffer);
        }
        input.extend(self.launches.to_le_bytes());
        input.extend(&self.bytes);
        let mut child = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the emulator starts");
        child
            .stdin
            .take()
            .unwrap()
            .write_all(&input)
            .expect("it reads its input");
        let output = child.wait_with_output().expect("it ends");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let mut rest = &output.stdout[..];
        self.buffers
            .iter()
            .map(|buffer| {
                let (content, after) = rest.split_at(buffer.len());
                rest = after;
                content.to_vec()
            })
            .collect()
    }

    fn values(&self, program: &Path, results: &[(At, Type)]) -> Vec<Vec<f64>> {
        let buffers = self.run(program);
        let values = results
            .iter()
            .map(|(at, kind)| kind.values(&buffers[at.0 as usize - 1]));
        values.collect()
    }
}

/// `Divisor` of the kernels.
fn divisor(number: usize) -> [usize; 3] {
    let shift = number.next_power_of_two().trailing_zeros() as usize;
    let multiplier = (((1u64 << shift) - number as u64) << 32) / number as u64 + 1;
    [number, multiplier as usize, shift]
}

fn random(name: &str, elements: usize) -> Vec<f64> {
    seeded_values(name, elements, 2.0)
        .into_iter()
        .map(|v| rounded(v.into()).into())
        .collect()
}

fn assert_close(what: &str, kind: Type, found: &[f64], expected: &Tensor) -> Result<()> {
    let expected = expected
        .flatten_all()?
        .to_dtype(DType::F64)?
        .to_vec1::<f64>()?;
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1.0, |max: f64, v| max.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
        let close = (f - e).abs() <= kind.tolerance() * scale;
        assert!(
            close || (f.is_nan() && e.is_nan()),
            "{what} {}: at {i} {f}, not {e}",
            kind.name()
        );
    }
    Ok(())
}

fn variable(values: &[f64], dims: &[usize]) -> Result<Var> {
    Var::from_tensor(&Tensor::from_slice(values, dims, &Device::Cpu)?)
}

/// Output, and the gradient of `x` where the output's is `dy`.
fn with_gradient(y: &Tensor, dy: &[f64], x: &Var) -> Result<Tensor> {
    let dy = Tensor::from_slice(dy, y.shape(), &Device::Cpu)?;
    let gradients = (y * dy)?.sum_all()?.backward()?;
    Ok(gradients.get(x).unwrap().clone())
}

#[test]
fn relu_keeps_what_is_positive_and_nan() -> Result<()> {
    let Some(emulator) = emulator() else {
        return Ok(());
    };
    for kind in TYPES {
        let mut values = random("x", 1000);
        (values[3], values[4]) = (0.0, f64::NAN);
        let mut program = Program::default();
        let x = program.given(kind, &values);
        let y = program.result(kind, 1000);
        program
            .threads("relu", kind, 1000)
            .at(&[x, x, y])
            .numbers(&[1000]);
        let found = program.values(emulator, &[(y, kind)]);
        let x = Tensor::new(&values[..], &Device::Cpu)?;
        assert_close("y", kind, &found[0], &relu(&x)?)?;
    }
    Ok(())
}

#[test]
fn max_pool2d_has_the_winners_of_the_cpu() -> Result<()> {
    let Some(emulator) = emulator() else {
        return Ok(());
    };
    for (dims, (kernel, stride, padding), ceil_mode) in [
        ([2, 3, 7, 5], ((3, 3), (2, 2), (1, 1)), false),
        ([2, 3, 8, 9], ((3, 3), (2, 2), (0, 0)), true),
        ([3, 20, 2, 1], ((3, 3), (1, 1), (1, 1)), false),
        ([1, 2, 6, 4], ((2, 3), (3, 1), (1, 0)), true),
        ([2, 1, 5, 5], ((1, 1), (2, 3), (0, 0)), false),
        ([1, 2, 9, 9], ((5, 4), (1, 2), (2, 2)), true),
    ] {
        for kind in TYPES {
            let mut values = random("x", dims.iter().product());
            // Ties everywhere, a window of −∞, two NaNs.
            values.iter_mut().for_each(|v| *v = (*v * 2.0).round());
            values[..4].fill(f64::NEG_INFINITY);
            (values[5], values[6]) = (f64::NAN, f64::NAN);
            let config = MaxPool2dConfig {
                kernel_size: kernel,
                stride,
                padding,
                ceil_mode,
            };
            let x = variable(&values, &dims)?;
            let y = max_pool2d(&x, config)?;
            let dy = random("dy", y.elem_count());
            // NaN · dy would not be dy: the gradient is taken of the finite part alone.
            let (h, w) = (y.dim(2)?, y.dim(3)?);
            let axes = [
                [dims[2], h, kernel.0, stride.0, padding.0],
                [dims[3], w, kernel.1, stride.1, padding.1],
            ]
            .concat();
            let mut program = Program::default();
            let (outputs, inputs) = (y.elem_count(), values.len());
            let (x_at, dy_at) = (program.given(kind, &values), program.given(kind, &dy));
            let (y_at, dx_at) = (program.result(kind, outputs), program.result(kind, inputs));
            let winners = program.labels(&vec![u32::MAX; outputs]);
            program.threads("max_pool2d_forward", kind, outputs);
            let of_outputs = [divisor(w), divisor(h * w)].concat();
            let of_inputs = [divisor(dims[3]), divisor(dims[2] * dims[3])].concat();
            program.at(&[x_at, y_at]).numbers(&axes);
            program.numbers(&of_outputs).numbers(&[outputs]);
            program.threads("max_pool2d_winners", kind, outputs);
            program.at(&[x_at, winners]).numbers(&axes);
            program.numbers(&of_outputs).numbers(&[outputs]);
            program.threads("max_pool2d_backward", kind, inputs);
            program.at(&[winners, dy_at, dx_at]).numbers(&axes);
            program.numbers(&of_inputs).numbers(&[inputs]);
            let found = program.values(emulator, &[(y_at, kind), (dx_at, kind)]);
            let what = format!("{dims:?} {config:?}");
            let finite = |t: &[f64]| t.iter().map(|v| v.clamp(-1e9, 1e9)).collect::<Vec<_>>();
            let y_values = finite(&y.flatten_all()?.to_vec1::<f64>()?);
            let y_values = Tensor::new(&y_values[..], &Device::Cpu)?;
            assert_close(&format!("y {what}"), kind, &finite(&found[0]), &y_values)?;
            let dx = with_gradient(&y, &dy, &x)?;
            assert_close(&format!("dx {what}"), kind, &found[1], &dx)?;
        }
    }
    Ok(())
}

/// (N, C, pixels) as (N, pixels, C).
fn channels_last(values: &[f64], (images, channels): (usize, usize)) -> Vec<f64> {
    let pixels = values.len() / (images * channels);
    let at = |i: usize| {
        let (pixel, c) = (i / channels, i % channels);
        values[(pixel / pixels * channels + c) * pixels + pixel % pixels]
    };
    (0..values.len()).map(at).collect()
}

#[test]
fn a_graphs_max_pool_has_the_winners_of_the_cpu() -> Result<()> {
    let Some(emulator) = emulator() else {
        return Ok(());
    };
    // Windows that kernels know, over whole packs, and others.
    for ([n, c, height, width], (kernel, stride, padding), ceil_mode) in [
        ([2, 24, 7, 5], (3, 1, 1), false),
        ([1, 16, 8, 9], (3, 1, 0), false),
        ([3, 8, 2, 1], (3, 1, 1), false),
        ([1, 8, 1, 6], (3, 1, 1), false),
        ([2, 16, 7, 6], (3, 2, 1), false),
        ([2, 8, 8, 9], (3, 2, 0), true),
        ([1, 8, 6, 5], (3, 2, 1), true),
        ([2, 16, 5, 7], (2, 2, 0), true),
        ([1, 8, 9, 4], (3, 4, 1), false),
        ([2, 5, 7, 5], (3, 1, 1), false),
        ([1, 3, 8, 9], (3, 2, 0), true),
    ] {
        for kind in [Type::F32, Type::Bf16] {
            let dims = [n, c, height, width];
            let mut values = random("x", dims.iter().product());
            // Ties everywhere, a window of −∞, two NaNs.
            values.iter_mut().for_each(|v| *v = (*v * 2.0).round());
            let last = values.len() - 1;
            values[..4].fill(f64::NEG_INFINITY);
            values[last - 7..].fill(f64::NEG_INFINITY);
            (values[5], values[6]) = (f64::NAN, f64::NAN);
            let config = MaxPool2dConfig {
                ceil_mode,
                ..MaxPool2dConfig::square(kernel, stride, padding)
            };
            let x = variable(&values, &dims)?;
            let y = max_pool2d(&x, config)?;
            let (h, w) = (y.dim(2)?, y.dim(3)?);
            let (inputs, outputs) = (values.len(), y.elem_count());
            let dy = random("dy", outputs);
            let before = random("before", inputs);
            let whole = if kind == Type::F32 { 4 } else { 8 };
            let pack = if c % whole == 0 { whole } else { 1 };
            let known = pack > 1 && kernel == 3 && stride <= 2;
            let name = match known {
                true => format!("3_{stride}_{pack}"),
                false => format!("{pack}"),
            };
            let lines = if known && stride == 1 {
                h.div_ceil(2)
            } else {
                h
            };
            let axes = [
                [height, h, kernel, stride, padding],
                [width, w, kernel, stride, padding],
            ]
            .concat();
            let packs = divisor(c / pack);
            let mut program = Program::default();
            let x_at = program.given(kind, &channels_last(&values, (n, c)));
            let dy_at = program.given(kind, &channels_last(&dy, (n, c)));
            let y_at = program.result(kind, outputs);
            let without_winners = program.result(kind, outputs);
            let dx_at = program.result(kind, inputs);
            let added_at = program.given(kind, &before);
            let winners = program.buffer(vec![255; outputs]);
            for (y_at, winners) in [(y_at, winners), (without_winners, NULL)] {
                let threads = n * lines * w * (c / pack);
                let pool = format!("static_graph_max_pool_{name}");
                program.threads(&pool, kind, threads);
                program.at(&[x_at, y_at, winners]).numbers(&axes);
                let divisors = [packs, divisor(w), divisor(lines)].concat();
                program.numbers(&divisors).numbers(&[threads]);
            }
            for (dx_at, add) in [(dx_at, 0), (added_at, 1)] {
                let threads = inputs / pack;
                let pool = format!("static_graph_max_pool_gradient_{name}");
                program.threads(&pool, kind, threads);
                program.at(&[winners, dy_at, dx_at]).numbers(&axes);
                let divisors = [packs, divisor(width), divisor(height)].concat();
                program.numbers(&divisors).numbers(&[add, threads]);
            }
            let results = [y_at, without_winners, dx_at, added_at].map(|at| (at, kind));
            let found = program.values(emulator, &results);
            let what = format!("{dims:?} {config:?}");
            let bits = |t: &[f64]| t.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            let expected = channels_last(&y.flatten_all()?.to_vec1::<f64>()?, (n, c));
            let quiet = |t: &[f64]| t.iter().map(|v| v.max(-1e300)).collect::<Vec<_>>();
            let is_nan = |t: &[f64]| t.iter().map(|v| v.is_nan()).collect::<Vec<_>>();
            for y in &found[..2] {
                assert!(is_nan(y) == is_nan(&expected), "y {what}: other NaNs");
                assert!(
                    bits(&quiet(y)) == bits(&quiet(&expected)),
                    "y {what}: other bits"
                );
            }
            let dx = with_gradient(&y, &dy, &x)?.flatten_all()?;
            let dx = channels_last(&dx.to_vec1::<f64>()?, (n, c));
            let added: Vec<_> = dx.iter().zip(&before).map(|(a, b)| a + b).collect();
            for (what_of, found, expected) in
                [("dx", &found[2], dx), ("dx added", &found[3], added)]
            {
                let expected = Tensor::new(&expected[..], &Device::Cpu)?;
                assert_close(&format!("{what_of} {what}"), kind, found, &expected)?;
            }
        }
    }
    Ok(())
}

#[test]
fn avg_pool2d_has_the_bins_of_the_cpu() -> Result<()> {
    let Some(emulator) = emulator() else {
        return Ok(());
    };
    let windows = |kernel, stride, padding, ceil_mode, count_include_pad| {
        Some(AvgPool2dConfig {
            kernel_size: kernel,
            stride,
            padding,
            ceil_mode,
            count_include_pad,
        })
    };
    for (dims, config, output) in [
        (
            [2, 3, 7, 5],
            windows((3, 3), (2, 2), (1, 1), true, true),
            (0, 0),
        ),
        (
            [2, 3, 7, 6],
            windows((3, 2), (2, 3), (1, 1), true, false),
            (0, 0),
        ),
        (
            [1, 30, 5, 5],
            windows((5, 5), (3, 3), (0, 0), false, true),
            (0, 0),
        ),
        ([2, 3, 7, 5], None, (4, 3)),
        ([2, 3, 3, 2], None, (7, 5)),
        ([5, 70, 7, 7], None, (1, 1)),
    ] {
        for kind in TYPES {
            let values = random("x", dims.iter().product());
            let x = variable(&values, &dims)?;
            let y = match config {
                Some(config) => avg_pool2d(&x, config)?,
                None => adaptive_avg_pool2d(&x, output)?,
            };
            let dy = random("dy", y.elem_count());
            let bins = |i: usize| {
                let (input, output) = (dims[2 + i], y.dims()[2 + i]);
                let pick = |(h, w): (usize, usize)| [h, w][i];
                match config {
                    None => [input, output, 1, 0, 0, 0, 0],
                    Some(c) => [
                        input,
                        output,
                        0,
                        pick(c.kernel_size),
                        pick(c.stride),
                        pick(c.padding),
                        c.count_include_pad.into(),
                    ],
                }
            };
            let axes = [bins(0), bins(1)].concat();
            let mut program = Program::default();
            let (outputs, inputs) = (y.elem_count(), values.len());
            let (x_at, dy_at) = (program.given(kind, &values), program.given(kind, &dy));
            let (y_at, dx_at) = (program.result(kind, outputs), program.result(kind, inputs));
            program.threads("avg_pool2d_forward", kind, outputs);
            program.at(&[x_at, y_at]).numbers(&axes).numbers(&[outputs]);
            program.threads("avg_pool2d_backward", kind, inputs);
            program
                .at(&[dy_at, dx_at])
                .numbers(&axes)
                .numbers(&[inputs]);
            let found = program.values(emulator, &[(y_at, kind), (dx_at, kind)]);
            assert_close(&format!("y {dims:?} {config:?}"), kind, &found[0], &y)?;
            let dx = with_gradient(&y, &dy, &x)?;
            assert_close(&format!("dx {dims:?} {config:?}"), kind, &found[1], &dx)?;
        }
    }
    Ok(())
}

#[test]
fn batch_norm_has_the_statistics_and_gradients_of_the_cpu() -> Result<()> {
    let Some(emulator) = emulator() else {
        return Ok(());
    };
    for (dims, per_part, relu, training) in [
        ([3, 5, 7, 4], 84, true, true),
        ([3, 5, 7, 4], 31, false, true),
        ([2, 300, 1, 1], 2, true, true),
        ([2, 2, 20, 40], 1000, true, true),
        ([3, 5, 7, 4], 31, true, false),
    ] {
        for kind in TYPES {
            let (images, channels, pixels) = (dims[0], dims[1], dims[2] * dims[3]);
            let count: usize = images * pixels;
            let parts = count.div_ceil(per_part);
            // A mean that is large beside the deviation; bf16 could not tell the values apart.
            let shift = if kind == Type::Bf16 { 0.0 } else { 1000.0 };
            let values: Vec<f64> = random("x", count * channels)
                .iter()
                .map(|v| f64::from((v + shift) as f32))
                .collect();
            let [weights, biases, means] = ["weight", "bias", "mean"].map(|n| random(n, channels));
            let means: Vec<f64> = means.iter().map(|v| v + shift).collect();
            let variances = vec![0.75; channels];
            let eps = 1e-3;
            let x = variable(&values, &dims)?;
            let (weight, bias) = (
                variable(&weights, &[channels])?,
                variable(&biases, &[channels])?,
            );
            let tensor = |v: &[f64]| Tensor::new(v, &Device::Cpu);
            let (y, unbiased) = match (training, relu) {
                (true, true) => batch_norm_relu_train(&x, &weight, &bias, eps)?,
                (true, false) => batch_norm_train(&x, &weight, &bias, eps)?,
                (false, _) => {
                    let (mean, variance) = (tensor(&means)?, tensor(&variances)?);
                    let running = RunningStatistics {
                        mean: &mean,
                        variance: &variance,
                    };
                    let y = batch_norm_relu_eval(&x, &weight, &bias, running, eps)?;
                    (
                        y,
                        BatchStatistics {
                            mean,
                            unbiased_variance: variance,
                        },
                    )
                }
            };
            let dy = random("dy", values.len());
            let gradients = (&y * Tensor::from_slice(&dy, &dims, &Device::Cpu)?)?
                .sum_all()?
                .backward()?;

            let statistic = kind.compute();
            let mut program = Program::default();
            let p = &mut program;
            let (x_at, dy_at) = (p.given(kind, &values), p.given(kind, &dy));
            let (y_at, dx_at) = (p.result(kind, values.len()), p.result(kind, values.len()));
            let (weight_at, bias_at) = (p.given(statistic, &weights), p.given(statistic, &biases));
            let mean_at = p.given(statistic, &means);
            let variance_at = p.given(statistic, &variances);
            let means_at = p.result(Type::F64, channels * parts);
            let squares_at = p.result(statistic, channels * parts);
            let [inverse_at, dweight_at, dbias_at] =
                [(); 3].map(|()| p.result(statistic, channels));
            let sums_at = p.result(statistic, 2 * channels * parts);
            let sizes = [&[images, channels][..], &divisor(pixels), &[per_part]].concat();
            if training {
                p.launch(
                    &format!("batch_norm_moments_{}", kind.name()),
                    (channels, parts),
                );
                p.at(&[x_at, means_at, squares_at]).numbers(&sizes);
                p.threads("batch_norm_join_moments", statistic, channels);
                p.at(&[means_at, squares_at, mean_at, inverse_at, variance_at]);
                p.numbers(&[count, channels, parts, per_part]).double(eps);
            } else {
                p.threads("batch_norm_invert", statistic, channels);
                p.at(&[variance_at, inverse_at])
                    .numbers(&[channels])
                    .double(eps);
            }
            let numbers = [mean_at, inverse_at, weight_at, bias_at];
            let last = [relu.into(), values.len()];
            let behind = [&divisor(channels)[..], &divisor(pixels), &last].concat();
            p.threads("batch_norm_apply", kind, values.len());
            p.at(&[x_at, y_at]).at(&numbers).numbers(&behind);
            p.launch(
                &format!("batch_norm_gradient_sums_{}", kind.name()),
                (channels, parts),
            );
            p.at(&[x_at, dy_at])
                .at(&numbers)
                .at(&[sums_at])
                .numbers(&sizes)
                .numbers(&[relu.into()]);
            p.threads("batch_norm_join_sums", statistic, channels);
            p.at(&[sums_at, dbias_at, dweight_at])
                .numbers(&[channels, parts]);
            p.threads("batch_norm_input_gradient", kind, values.len());
            p.at(&[x_at, dy_at, dx_at])
                .at(&numbers)
                .at(&[dbias_at, dweight_at]);
            p.double(if training { 1.0 / count as f64 } else { 0.0 })
                .numbers(&behind);
            let found = program.values(
                emulator,
                &[
                    (mean_at, statistic),
                    (variance_at, statistic),
                    (y_at, kind),
                    (dx_at, kind),
                    (dweight_at, statistic),
                    (dbias_at, statistic),
                ],
            );
            // An f32 mean of about 1000 has an error of 3e-5: so do the values less their mean.
            let loose = if kind == Type::F32 { Type::Bf16 } else { kind };
            let what = format!("{dims:?} relu {relu} training {training}");
            assert_close(
                &format!("mean {what}"),
                statistic,
                &found[0],
                &unbiased.mean,
            )?;
            assert_close(
                &format!("variance {what}"),
                statistic,
                &found[1],
                &unbiased.unbiased_variance,
            )?;
            assert_close(&format!("y {what}"), loose, &found[2], &y)?;
            for (name, found, variable) in [
                ("dx", &found[3], &x),
                ("dweight", &found[4], &weight),
                ("dbias", &found[5], &bias),
            ] {
                assert_close(
                    &format!("{name} {what}"),
                    loose,
                    found,
                    gradients.get(variable).unwrap(),
                )?;
            }
        }
    }
    Ok(())
}

#[test]
fn dropout_draws_the_masks_of_the_cpu() -> Result<()> {
    let Some(emulator) = emulator() else {
        return Ok(());
    };
    for (elements, seed, salt, p) in [
        (1, 0, 0, 0.5),
        (1000, 7, 1, 0.4),
        (70_001, u64::MAX - 5, 1 << 40, 0.9),
        (33, 1 << 33, 3, 1.0),
    ] {
        for kind in TYPES {
            for on_device in [false, true] {
                let values = random("x", elements);
                let x = Tensor::new(&values[..], &Device::Cpu)?;
                let y = dropout(&x, p, salt, Mode::Train { dropout_seed: seed })?;
                let mut program = Program::default();
                let x_at = program.given(kind, &values);
                let y_at = program.result(kind, elements);
                let seed_at = match on_device {
                    true => program.labels(&[seed as u32, (seed >> 32) as u32]),
                    false => NULL,
                };
                program.threads("dropout", kind, elements.div_ceil(16));
                program.at(&[x_at, y_at, seed_at]);
                let threshold = (p * 4_294_967_296.0) as u64;
                let given = if on_device { 99 } else { seed };
                for number in [given, salt, threshold] {
                    program.bytes.extend(number.to_le_bytes());
                }
                program.double(1.0 / (1.0 - p)).numbers(&[elements]);
                let found = program.values(emulator, &[(y_at, kind)]);
                assert_close(&format!("{elements} seed {seed}"), kind, &found[0], &y)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_layers_bias_is_added_to_each_row() -> Result<()> {
    let Some(emulator) = emulator() else {
        return Ok(());
    };
    for (examples, outputs) in [(1, 1), (7, 5), (32, 10), (300, 3)] {
        for kind in TYPES {
            let (y, bias) = (random("y", examples * outputs), random("bias", outputs));
            let mut program = Program::default();
            let y_at = program.given(kind, &y);
            let bias_at = program.given(kind, &bias);
            program.threads("linear_add_to_rows", kind, y.len());
            program.at(&[y_at, bias_at]).numbers(&divisor(outputs));
            program.numbers(&[y.len()]);
            let found = program.values(emulator, &[(y_at, kind)]);
            let tensor = |values: &[f64], shape: &[usize]| {
                let bytes = kind.bytes(values);
                Tensor::from_vec(kind.values(&bytes), shape, &Device::Cpu)
            };
            let y = tensor(&y, &[examples, outputs])?;
            let expected = y.broadcast_add(&tensor(&bias, &[outputs])?)?;
            assert_close(&format!("{examples}x{outputs}"), kind, &found[0], &expected)?;
        }
    }
    Ok(())
}

#[test]
fn cross_entropy_has_loss_and_gradient_of_the_cpu_and_nan_for_a_label_that_is_no_class()
-> Result<()> {
    let Some(emulator) = emulator() else {
        return Ok(());
    };
    for (examples, classes, label_smoothing) in
        [(1, 1, 0.0), (5, 10, 0.1), (300, 3, 0.0), (2, 1000, 0.2)]
    {
        for kind in TYPES {
            for bad in [false, true] {
                let values = random("logits", examples * classes);
                let mut labels: Vec<u32> =
                    (0..examples).map(|i| (i * 7 % classes) as u32).collect();
                let logits = variable(&values, &[examples, classes])?;
                let config = CrossEntropyConfig { label_smoothing };
                let loss =
                    cross_entropy(&logits, &Tensor::new(&labels[..], &Device::Cpu)?, config)?;
                let gradients = (&loss * 0.3)?.backward()?;
                if bad {
                    labels[examples - 1] = classes as u32 + 5;
                }
                let sum = kind.compute();
                let mut program = Program::default();
                let (logits_at, labels_at) =
                    (program.given(kind, &values), program.labels(&labels));
                let losses_at = program.result(Type::F64, examples);
                let (loss_at, upstream_at) = (program.result(sum, 1), program.given(sum, &[0.3]));
                let dlogits_at = program.result(kind, values.len());
                let kernel = |name: &str| format!("cross_entropy_{name}_{}", kind.name());
                program.launch(&kernel("rows"), (examples, 1));
                program
                    .at(&[logits_at, labels_at, losses_at])
                    .numbers(&[classes])
                    .double(label_smoothing);
                program
                    .launch(&kernel("mean"), (1, 1))
                    .at(&[losses_at, loss_at])
                    .numbers(&[examples]);
                program.launch(&kernel("gradient"), (examples, 1));
                program.at(&[logits_at, labels_at, upstream_at, dlogits_at]);
                program
                    .numbers(&[examples, classes])
                    .double(label_smoothing);
                let found = program.values(emulator, &[(loss_at, sum), (dlogits_at, kind)]);
                if bad {
                    assert!(found[0][0].is_nan());
                    continue;
                }
                assert_close("loss", sum, &found[0], &loss)?;
                assert_close("dlogits", kind, &found[1], gradients.get(&logits).unwrap())?;
            }
        }
    }
    Ok(())
}

#[test]
fn convolution_adds_its_bias_and_masks_and_sums_its_gradient() -> Result<()> {
    let Some(emulator) = emulator() else {
        return Ok(());
    };
    for (images, channels, pixels, per_part) in [(2, 3, 5, 10), (3, 7, 1, 2), (2, 2, 700, 500)] {
        for kind in TYPES {
            let elements = images * channels * pixels;
            let (values, biases) = (random("y", elements), random("bias", channels));
            let dy = random("dy", elements);
            let parts = (images * pixels).div_ceil(per_part);
            let mut program = Program::default();
            let (y_at, bias_at) = (program.given(kind, &values), program.given(kind, &biases));
            let (dy_at, masked_at) = (program.given(kind, &dy), program.result(kind, elements));
            let sums_at = program.result(kind.compute(), channels * parts);
            let dbias_at = program.result(kind, channels);
            program.threads("conv2d_bias_activation", kind, elements.div_ceil(4));
            program
                .at(&[y_at, bias_at])
                .numbers(&[1])
                .numbers(&[divisor(channels), divisor(pixels)].concat())
                .numbers(&[elements]);
            program.launch(
                &format!("conv2d_mask_and_sum_{}", kind.name()),
                (channels, parts),
            );
            program
                .at(&[dy_at, y_at, masked_at, sums_at])
                .numbers(&[images, channels])
                .numbers(&divisor(pixels))
                .numbers(&[per_part]);
            program.threads("conv2d_add_parts", kind, channels);
            program.at(&[sums_at, dbias_at]).numbers(&[channels, parts]);
            let found = program.values(
                emulator,
                &[(y_at, kind), (masked_at, kind), (dbias_at, kind)],
            );
            let dims = [images, channels, pixels];
            let bias = Tensor::from_slice(&biases, (1, channels, 1), &Device::Cpu)?;
            let y = relu(&Tensor::from_slice(&values, &dims, &Device::Cpu)?.broadcast_add(&bias)?)?;
            let masked = (Tensor::from_slice(&dy, &dims, &Device::Cpu)?
                * y.gt(0.0)?.to_dtype(DType::F64)?)?;
            assert_close("y", kind, &found[0], &y)?;
            assert_close("masked", kind, &found[1], &masked)?;
            assert_close("dbias", kind, &found[2], &masked.sum((0, 2))?)?;
        }
    }
    Ok(())
}

#[test]
fn gather_normalises_to_the_bits_of_the_host_and_gives_nan_beyond_the_images() {
    let Some(emulator) = emulator() else { return };
    let (total, pixels) = (5usize, 35usize);
    let bytes: Vec<u8> = (0..total * 3 * pixels)
        .map(|i| (i * 37 % 256) as u8)
        .collect();
    let (mean, std) = ([0.4914f32, 0.4822, 0.4465], [0.2470f32, 0.2435, 0.2616]);
    let indices = [4u32, 0, 5, 2, 2, 1];
    for kind in TYPES {
        let elements = indices.len() * 3 * pixels;
        let mut program = Program::default();
        let (images_at, indices_at) = (program.buffer(bytes.clone()), program.labels(&indices));
        let out_at = program.result(kind, elements);
        program.threads("gather_normalized", kind, elements);
        program
            .at(&[images_at, indices_at, out_at])
            .numbers(&[total, pixels]);
        mean.iter()
            .chain(&std)
            .for_each(|v| program.bytes.extend(v.to_le_bytes()));
        program.numbers(&[elements]);
        let found = program.values(emulator, &[(out_at, kind)]);
        for (i, &found) in found[0].iter().enumerate() {
            let (image, within) = (indices[i / (3 * pixels)] as usize, i % (3 * pixels));
            if image >= total {
                assert!(found.is_nan(), "{i}: {found}");
                continue;
            }
            let c = within / pixels;
            let value = (f32::from(bytes[image * 3 * pixels + within]) / 255.0 - mean[c]) / std[c];
            let value = if kind == Type::Bf16 {
                rounded(value.into())
            } else {
                value
            };
            assert_eq!(found, f64::from(value), "at {i}");
        }
    }
}

#[test]
fn right_answers_are_first_maxima_at_the_label() {
    let Some(emulator) = emulator() else { return };
    for kind in TYPES {
        let (rows, classes) = (600, 4);
        let values: Vec<f64> = random("logits", rows * classes)
            .iter()
            .map(|v| v.round())
            .collect();
        let labels: Vec<u32> = (0..rows as u32).map(|i| i % 5).collect();
        let mut program = Program::default();
        let (logits_at, labels_at) = (program.given(kind, &values), program.labels(&labels));
        let correct_at = program.result(Type::F32, 1);
        program.launch(&format!("count_correct_{}", kind.name()), (1, 1));
        program
            .at(&[logits_at, labels_at, correct_at])
            .numbers(&[rows, classes]);
        let found = program.values(emulator, &[(correct_at, Type::F32)]);
        let expected = values.chunks(classes).zip(&labels).filter(|(row, label)| {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter().position(|&v| v == max) == Some(**label as usize)
        });
        assert_eq!(found[0], [expected.count() as f64]);
    }
}

#[test]
fn sgd_moves_many_tensors_by_pytorchs_rule() {
    let Some(emulator) = emulator() else { return };
    let sizes = [1usize, 1024, 0, 1025, 5000, 3];
    let (lr, dampening, weight_decay) = (0.1f32, 0.25, 0.01);
    for kind in [Type::F32, Type::F64] {
        for (momentum, nesterov) in [(0.0, false), (0.9, false), (0.9, true)] {
            let mut program = Program::default();
            let mut chunk = vec![0u8; 3 * 96 * 8 + 2 * 96 * 4 + 96];
            // Where the blocks of no tensor end.
            chunk[3 * 96 * 8 + 96 * 4..][..96 * 4].fill(0xff);
            let mut put =
                |at: usize, bytes: &[u8]| chunk[at..at + bytes.len()].copy_from_slice(bytes);
            let (mut blocks, mut expected) = (0usize, Vec::new());
            for (i, &size) in sizes.iter().enumerate() {
                let [p, g, b] = ["p", "g", "b"].map(|n| random(&format!("{n}{i}"), size));
                let ats = [&p, &g, &b].map(|values| program.given(kind, values));
                let first = i % 2 == 1;
                for (field, at) in ats.iter().enumerate() {
                    let number = if field == 2 && momentum == 0.0 {
                        NULL
                    } else {
                        *at
                    };
                    put((field * 96 + i) * 8, &u64::from(number.0).to_le_bytes());
                }
                blocks += size.div_ceil(1024);
                put(3 * 96 * 8 + i * 4, &(size as u32).to_le_bytes());
                put(3 * 96 * 8 + (96 + i) * 4, &(blocks as u32).to_le_bytes());
                put(3 * 96 * 8 + 2 * 96 * 4 + i, &[first.into()]);
                for (j, ((&p, &g), &b)) in p.iter().zip(&g).zip(&b).enumerate() {
                    let d = g + weight_decay * p;
                    let velocity = if first {
                        d
                    } else {
                        momentum * b + (1.0 - dampening) * d
                    };
                    let direction = match (momentum == 0.0, nesterov) {
                        (true, _) => d,
                        (_, true) => d + momentum * velocity,
                        _ => velocity,
                    };
                    let buffer = if momentum == 0.0 { b } else { velocity };
                    expected.push((ats, j, p - f64::from(lr) * direction, buffer));
                }
            }
            let lr_at = program.given(Type::F32, &[lr.into()]);
            program.launch(&format!("sgd_{}", kind.name()), (blocks, 1));
            program.bytes.extend(&chunk);
            program
                .at(&[lr_at])
                .double(momentum)
                .double(dampening)
                .double(weight_decay);
            program.numbers(&[nesterov.into()]);
            let buffers = program.run(emulator);
            let width = if kind == Type::F32 { 4 } else { 8 };
            for ([p_at, _, b_at], j, p, b) in expected {
                for (at, expected) in [(p_at, p), (b_at, b)] {
                    let bytes = &buffers[at.0 as usize - 1][j * width..][..width];
                    let found = kind.values(bytes)[0];
                    let close = (found - expected).abs() <= 10.0 * kind.tolerance();
                    assert!(
                        close,
                        "{} momentum {momentum}: {found}, not {expected}",
                        kind.name()
                    );
                }
            }
        }
    }
}

#[test]
fn a_step_beyond_a_buffer_is_caught() {
    let Some(emulator) = emulator() else { return };
    let sanitized = std::fs::read(emulator)
        .is_ok_and(|program| program.windows(6).any(|name| name == b"__asan"));
    if !sanitized {
        skipped("c++ has no AddressSanitizer");
        return;
    }
    let relu = |elements: usize| {
        let mut program = Program::default();
        let x = program.given(Type::F32, &[1.0; 8]);
        let y = program.result(Type::F32, 8);
        program
            .threads("relu", Type::F32, elements)
            .at(&[x, x, y])
            .numbers(&[elements]);
        std::panic::catch_unwind(|| program.run(emulator))
    };
    assert!(relu(8).is_ok(), "eight elements are within eight");
    let outcome = relu(9).expect_err("the ninth of eight elements was taken");
    let report = outcome.downcast_ref::<String>().expect("a message");
    assert!(report.contains("AddressSanitizer"), "{report}");
}
