//! How a convolution on CUDA is computed: what the choice depends on, and the choice itself. Nothing here
//! needs CUDA, so that it is tested everywhere.

use std::collections::HashMap;
use std::fmt;

use candle_core::DType;

use super::{Conv2dConfig, Conv2dGeometry, OP};
use crate::cuda::{F32Math, Settings};
use crate::error::OpError;

/// The three computations of a convolution. Each has engines of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Pass {
    Forward,
    InputGradient,
    WeightGradient,
}

/// How the tensors of a convolution lie in memory, weights like the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MemoryFormat {
    /// (N, C, H, W): a plane per channel.
    Contiguous,
    /// (N, H, W, C): the channels of a pixel side by side. What tensor cores want; cuDNN lays other tensors out anew.
    ChannelsLast,
}

/// What follows a forward pass before its result is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Epilogue {
    /// One value per output channel is added.
    pub(super) bias: bool,
    pub(super) relu: bool,
}

impl Epilogue {
    pub(super) fn is_nothing(&self) -> bool {
        !self.bias && !self.relu
    }
}

/// All that the choice of an engine depends on, besides the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PlanKey {
    pub(super) geometry: Conv2dGeometry,
    pub(super) format: MemoryFormat,
    pub(super) dtype: DType,
    pub(super) pass: Pass,
    /// The arithmetic of f32; `Full` for other types, which have no choice.
    pub(super) math: F32Math,
    pub(super) deterministic: bool,
    /// Whether engines are timed.
    pub(super) timed: bool,
    /// Bytes.
    pub(super) workspace_limit: usize,
    pub(super) epilogue: Epilogue,
    /// Whether the result is added to what is there.
    pub(super) adds: bool,
    /// Bytes of which all addresses are multiples.
    pub(super) alignment: usize,
}

impl PlanKey {
    /// Whether f32 factors must not be rounded.
    pub(super) fn is_full_f32(&self) -> bool {
        (self.dtype, self.math) == (DType::F32, F32Math::Full)
    }

    /// The key of a pass whose result takes the place of what was there, with nothing that follows, on addresses of the best
    /// alignment.
    pub(super) fn new(
        geometry: Conv2dGeometry,
        format: MemoryFormat,
        dtype: DType,
        pass: Pass,
        settings: &Settings,
    ) -> Self {
        Self {
            geometry,
            format,
            dtype,
            pass,
            math: match dtype {
                DType::F32 => settings.convolution,
                _ => F32Math::Full,
            },
            deterministic: settings.deterministic,
            // Times differ from run to run, and so would the choice.
            timed: settings.benchmark && !settings.deterministic,
            workspace_limit: settings.workspace_limit,
            epilogue: Epilogue::default(),
            adds: false,
            alignment: BEST_ALIGNMENT,
        }
    }
}

/// Bytes that an engine moves at once, at the most.
pub(super) const BEST_ALIGNMENT: usize = 16;

/// The bytes of which all addresses are multiples, as far as it matters.
pub(super) fn common_alignment(addresses: impl IntoIterator<Item = usize>) -> usize {
    let bits = addresses
        .into_iter()
        .fold(BEST_ALIGNMENT, |bits, address| bits | address);
    1 << bits.trailing_zeros()
}

impl fmt::Display for PlanKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let g = &self.geometry;
        let pass = match self.pass {
            Pass::Forward => "forward pass",
            Pass::InputGradient => "gradient of the input",
            Pass::WeightGradient => "gradient of the weight",
        };
        let Conv2dConfig {
            stride,
            padding,
            dilation,
        } = g.config;
        write!(
            f,
            "the {pass} of input {:?}, weight {:?}, output {:?}, stride {stride:?}, padding {padding:?}, \
             dilation {dilation:?}, {:?}",
            [g.batch, g.c_in, g.input.0, g.input.1],
            [g.c_out, g.c_in, g.kernel.0, g.kernel.1],
            [g.batch, g.c_out, g.output.0, g.output.1],
            self.dtype,
        )?;
        if (self.dtype, self.math) == (DType::F32, F32Math::Tf32) {
            write!(f, " with TF32 allowed")?;
        }
        if self.format == MemoryFormat::ChannelsLast {
            write!(f, ", channels last")?;
        }
        if self.adds {
            write!(f, ", added to what is there")?;
        }
        if self.epilogue.bias {
            write!(f, ", with bias")?;
        }
        if self.epilogue.relu {
            write!(f, ", with ReLU")?;
        }
        Ok(())
    }
}

/// A geometry in the integers of descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DescriptorNumbers {
    /// (N, C_in, H, W).
    pub(super) x: [i64; 4],
    /// (C_out, C_in, R, S).
    pub(super) weight: [i64; 4],
    /// (N, C_out, H', W').
    pub(super) y: [i64; 4],
    /// Vertical, then horizontal, as are `stride` and `dilation`.
    pub(super) padding: [i64; 2],
    pub(super) stride: [i64; 2],
    pub(super) dilation: [i64; 2],
}

impl DescriptorNumbers {
    /// # Errors
    /// A size, or the number of a tensor's elements, that is no C `int`: many engines, and our kernels, count in such.
    pub(super) fn new(g: &Conv2dGeometry) -> Result<Self, OpError> {
        let tensor = |what: &'static str, sizes: [usize; 4]| -> Result<[i64; 4], OpError> {
            let elements = sizes
                .iter()
                .fold(1usize, |product, &size| product.saturating_mul(size));
            let mut numbers = [0; 4];
            for (number, size) in numbers.iter_mut().zip(sizes) {
                *number = c_number(what, size)?;
            }
            c_number(what, elements)?;
            Ok(numbers)
        };
        let pair = |what: &'static str, (vertical, horizontal)| {
            Ok::<_, OpError>([c_number(what, vertical)?, c_number(what, horizontal)?])
        };
        Ok(Self {
            x: tensor(
                "elements of the input",
                [g.batch, g.c_in, g.input.0, g.input.1],
            )?,
            weight: tensor(
                "elements of the weight",
                [g.c_out, g.c_in, g.kernel.0, g.kernel.1],
            )?,
            y: tensor(
                "elements of the output",
                [g.batch, g.c_out, g.output.0, g.output.1],
            )?,
            padding: pair("padding", g.config.padding)?,
            stride: pair("stride", g.config.stride)?,
            dilation: pair("dilation", g.config.dilation)?,
        })
    }
}

fn c_number(what: &'static str, found: usize) -> Result<i64, OpError> {
    i32::try_from(found)
        .map(i64::from)
        .map_err(|_| OpError::CudnnSize {
            op: OP,
            what,
            found,
        })
}

/// The distances between neighbours along each dimension of a tensor of `sizes`, which has no gaps.
pub(super) fn strides([_, c, h, w]: [i64; 4], format: MemoryFormat) -> [i64; 4] {
    match format {
        MemoryFormat::Contiguous => [c * h * w, h * w, w, 1],
        MemoryFormat::ChannelsLast => [c * h * w, 1, w * c, c],
    }
}

/// What distinguishes the arithmetic of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Notes {
    /// Products on tensor cores: for f32 with factors rounded to TF32.
    pub(crate) tensor_cores: bool,
    /// Factors rounded to a smaller type.
    pub(crate) rounds_factors: bool,
    /// Sums of less than f32.
    pub(crate) rounds_sums: bool,
    /// Products of what a transform makes of the factors (Fourier's, Winograd's), which rounds more.
    pub(crate) transforms: bool,
    /// Gives other bits from run to run.
    pub(crate) nondeterministic: bool,
}

impl Notes {
    /// Whether an engine may compute what the key describes.
    pub(super) fn suit(&self, key: &PlanKey) -> bool {
        // For f64 there are tensor cores that round nothing, and bf16 is theirs.
        let inexact = self.tensor_cores || self.transforms;
        let rounds = self.rounds_factors || self.rounds_sums || (inexact && key.is_full_f32());
        !rounds && (!self.nondeterministic || !key.deterministic)
    }
}

/// Lets each engine be a candidate only so many times: its settings are often alike.
pub(super) struct EngineQuota {
    most: usize,
    taken: HashMap<i64, usize>,
}

impl EngineQuota {
    /// A quota of `most` candidates for each engine.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            taken: HashMap::new(),
        }
    }

    /// Takes one of the engine's quota; `false` where none is left.
    pub(super) fn take(&mut self, engine: i64) -> bool {
        let taken = self.taken.entry(engine).or_insert(0);
        *taken += 1;
        *taken <= self.most
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn geometry() -> Conv2dGeometry {
        Conv2dGeometry {
            batch: 2,
            c_in: 3,
            input: (8, 9),
            c_out: 5,
            kernel: (3, 2),
            output: (4, 4),
            config: Conv2dConfig {
                stride: (2, 3),
                padding: (1, 2),
                dilation: (1, 2),
            },
        }
    }

    fn key(settings: Settings) -> PlanKey {
        PlanKey::new(
            geometry(),
            MemoryFormat::Contiguous,
            DType::F32,
            Pass::Forward,
            &settings,
        )
    }

    #[test]
    fn whatever_may_change_the_engine_changes_the_key() {
        let default = Settings::default();
        let full = Settings {
            convolution: F32Math::Full,
            ..default
        };
        let wider = Conv2dGeometry {
            c_out: 6,
            ..geometry()
        };
        let keys = [
            key(default),
            key(full),
            key(Settings {
                deterministic: true,
                ..default
            }),
            key(Settings {
                benchmark: false,
                ..default
            }),
            key(Settings {
                workspace_limit: 1,
                ..default
            }),
            PlanKey::new(
                geometry(),
                MemoryFormat::Contiguous,
                DType::F32,
                Pass::WeightGradient,
                &default,
            ),
            PlanKey::new(
                geometry(),
                MemoryFormat::Contiguous,
                DType::F32,
                Pass::InputGradient,
                &default,
            ),
            PlanKey::new(
                geometry(),
                MemoryFormat::Contiguous,
                DType::BF16,
                Pass::Forward,
                &default,
            ),
            PlanKey::new(
                geometry(),
                MemoryFormat::Contiguous,
                DType::F64,
                Pass::Forward,
                &default,
            ),
            PlanKey::new(
                wider,
                MemoryFormat::Contiguous,
                DType::F32,
                Pass::Forward,
                &default,
            ),
            PlanKey::new(
                geometry(),
                MemoryFormat::ChannelsLast,
                DType::F32,
                Pass::Forward,
                &default,
            ),
            PlanKey {
                adds: true,
                ..key(default)
            },
            PlanKey {
                alignment: 4,
                ..key(default)
            },
            PlanKey {
                epilogue: Epilogue {
                    bias: true,
                    relu: false,
                },
                ..key(default)
            },
            PlanKey {
                epilogue: Epilogue {
                    bias: true,
                    relu: true,
                },
                ..key(default)
            },
        ];
        let distinct: HashSet<_> = keys.into_iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }

    #[test]
    fn what_changes_nothing_leaves_the_key() {
        let default = Settings::default();
        let tf32_of_f64 = |convolution| {
            let settings = Settings {
                convolution,
                ..default
            };
            PlanKey::new(
                geometry(),
                MemoryFormat::Contiguous,
                DType::F64,
                Pass::Forward,
                &settings,
            )
        };
        assert_eq!(tf32_of_f64(F32Math::Tf32), tf32_of_f64(F32Math::Full));
        let matmul = Settings {
            matmul: F32Math::Tf32,
            ..default
        };
        assert_eq!(key(matmul), key(default));
    }

    #[test]
    fn deterministic_engines_are_never_chosen_by_time() {
        let settings = Settings {
            deterministic: true,
            benchmark: true,
            ..Settings::default()
        };
        assert!(!key(settings).timed);
        assert!(key(Settings::default()).timed);
    }

    #[test]
    fn descriptors_get_the_sizes_vertical_first() {
        let numbers = DescriptorNumbers::new(&geometry()).unwrap();
        assert_eq!(
            numbers,
            DescriptorNumbers {
                x: [2, 3, 8, 9],
                weight: [5, 3, 3, 2],
                y: [2, 5, 4, 4],
                padding: [1, 2],
                stride: [2, 3],
                dilation: [1, 2],
            }
        );
    }

    #[test]
    fn sizes_beyond_a_c_int_are_errors_that_name_them() {
        let batch = Conv2dGeometry {
            batch: 1 << 25,
            ..geometry()
        };
        let text = DescriptorNumbers::new(&batch).unwrap_err().to_string();
        assert!(text.contains("elements of the input"), "{text}");
        assert!(text.contains(&((1usize << 25) * 216).to_string()), "{text}");
        assert!(text.contains("2147483647"), "{text}");
        let mut padding = geometry();
        padding.config.padding.1 = 1 << 40;
        let text = DescriptorNumbers::new(&padding).unwrap_err().to_string();
        assert!(text.contains("padding is 1099511627776"), "{text}");
    }

    #[test]
    fn errors_name_the_call_the_shapes_and_the_settings() {
        let problem = key(Settings::default()).to_string();
        assert_eq!(
            problem,
            "the forward pass of input [2, 3, 8, 9], weight [5, 3, 3, 2], output [2, 5, 4, 4], stride (2, 3), \
             padding (1, 2), dilation (1, 2), F32 with TF32 allowed"
        );
        let error = OpError::Cudnn {
            op: OP,
            call: "cudnnBackendExecute",
            status: "CUDNN_STATUS_NOT_SUPPORTED".to_owned(),
            details: " (why)".to_owned(),
            problem,
        };
        let text = error.to_string();
        assert!(
            text.starts_with(
                "conv2d: cudnnBackendExecute failed with CUDNN_STATUS_NOT_SUPPORTED (why), for the forward"
            ),
            "{text}"
        );
    }

    #[test]
    fn engines_that_round_or_do_not_repeat_are_taken_only_where_that_is_allowed() {
        let with = |dtype, convolution, deterministic| PlanKey {
            dtype,
            ..key(Settings {
                convolution,
                deterministic,
                ..Settings::default()
            })
        };
        let plain = Notes::default();
        let tensor_cores = Notes {
            tensor_cores: true,
            ..plain
        };
        let transforms = Notes {
            transforms: true,
            ..plain
        };
        let nondeterministic = Notes {
            nondeterministic: true,
            ..plain
        };
        let rounding = [
            Notes {
                rounds_factors: true,
                ..plain
            },
            Notes {
                rounds_sums: true,
                ..plain
            },
        ];
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            for math in [F32Math::Full, F32Math::Tf32] {
                for deterministic in [false, true] {
                    let key = with(dtype, math, deterministic);
                    assert!(plain.suit(&key), "{key:?}");
                    assert_eq!(nondeterministic.suit(&key), !deterministic, "{key:?}");
                    let rounds = (dtype, math) == (DType::F32, F32Math::Full);
                    assert_eq!(tensor_cores.suit(&key), !rounds, "{key:?}");
                    assert_eq!(transforms.suit(&key), !rounds, "{key:?}");
                    assert!(!rounding.iter().any(|notes| notes.suit(&key)), "{key:?}");
                }
            }
        }
    }

    #[test]
    fn a_bias_or_a_relu_is_something_that_follows() {
        assert!(Epilogue::default().is_nothing());
        for (bias, relu) in [(false, true), (true, false), (true, true)] {
            assert!(!Epilogue { bias, relu }.is_nothing(), "{bias} {relu}");
        }
    }

    #[test]
    fn an_engine_has_its_quota_and_the_others_have_theirs() {
        let mut quota = EngineQuota::new(2);
        let taken = [1, 1, 1, 2, 1, 3].map(|engine| quota.take(engine));
        assert_eq!(taken, [true, true, false, true, false, true]);
    }

    #[test]
    fn tensors_without_gaps_step_over_what_lies_within() {
        let sizes = [2, 3, 5, 7];
        assert_eq!(strides(sizes, MemoryFormat::Contiguous), [105, 35, 7, 1]);
        assert_eq!(strides(sizes, MemoryFormat::ChannelsLast), [105, 1, 21, 3]);
    }

    #[test]
    fn the_alignment_is_that_of_the_least_aligned_address() {
        assert_eq!(common_alignment([]), 16);
        assert_eq!(common_alignment([0, 256, 64]), 16);
        assert_eq!(common_alignment([256, 24]), 8);
        assert_eq!(common_alignment([256, 24, 2]), 2);
    }
}
