//! Which algorithm a convolution on CUDA takes: what the choice depends on, and the choice itself. Nothing here
//! needs CUDA, so that it is tested everywhere.

use std::ffi::c_int;
use std::fmt;

use candle_core::DType;

use super::{Conv2dConfig, Conv2dGeometry, OP};
use crate::cuda::{F32Math, Settings};
use crate::error::OpError;

/// The three computations of a convolution. Each has algorithms of its own.
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

/// All that the choice of an algorithm depends on, besides the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PlanKey {
    pub(super) geometry: Conv2dGeometry,
    pub(super) format: MemoryFormat,
    pub(super) dtype: DType,
    pub(super) pass: Pass,
    /// The arithmetic of f32; `Full` for other types, which have no choice.
    pub(super) math: F32Math,
    pub(super) deterministic: bool,
    /// Whether the algorithms are timed.
    pub(super) timed: bool,
    /// Bytes.
    pub(super) workspace_limit: usize,
}

impl PlanKey {
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
        }
    }
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
        match self.format {
            MemoryFormat::Contiguous => Ok(()),
            MemoryFormat::ChannelsLast => write!(f, ", channels last"),
        }
    }
}

/// A geometry in the C integers of descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DescriptorNumbers {
    /// (N, C_in, H, W).
    pub(super) x: [c_int; 4],
    /// (C_out, C_in, R, S).
    pub(super) weight: [c_int; 4],
    /// (N, C_out, H', W').
    pub(super) y: [c_int; 4],
    /// Vertical, horizontal, here and below.
    pub(super) padding: [c_int; 2],
    pub(super) stride: [c_int; 2],
    pub(super) dilation: [c_int; 2],
}

impl DescriptorNumbers {
    /// # Errors
    /// A size, or the number of a tensor's elements, that is no C `int`: cuDNN's strides are such.
    pub(super) fn new(g: &Conv2dGeometry) -> Result<Self, OpError> {
        let tensor = |what: &'static str, sizes: [usize; 4]| -> Result<[c_int; 4], OpError> {
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

fn c_number(what: &'static str, found: usize) -> Result<c_int, OpError> {
    c_int::try_from(found).map_err(|_| OpError::CudnnSize {
        op: OP,
        what,
        found,
    })
}

/// An algorithm that cuDNN offers for a computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate<A> {
    pub(super) algorithm: A,
    /// Whether cuDNN can take it here.
    pub(super) works: bool,
    pub(super) deterministic: bool,
    /// Bytes of workspace.
    pub(super) workspace: usize,
}

/// The candidates in the order in which to try them: cuDNN's own, fastest first, without those that do not work or
/// are not deterministic where they must be. Those beyond the workspace's limit are the last resort, least memory first.
pub(super) fn by_preference<A: Copy>(offered: &[Candidate<A>], key: &PlanKey) -> Vec<Candidate<A>> {
    let usable = offered
        .iter()
        .copied()
        .filter(|c| c.works && (c.deterministic || !key.deterministic));
    let (mut within, mut beyond): (Vec<_>, Vec<_>) =
        usable.partition(|c| c.workspace <= key.workspace_limit);
    beyond.sort_by_key(|c| c.workspace);
    within.append(&mut beyond);
    within
}

/// Into how many parts the sum over `values` of one channel is cut, and how many values each has; the last may
/// have fewer, and none is empty. Both depend on the number alone, hence the bits of the sum as well.
pub(crate) fn parts_of(values: usize) -> (usize, usize) {
    // 16 values for each of a block's 256 threads, before a second block is worth its sum's way through memory. 64
    // parts of 16 channels and more keep all processors of a large GPU busy.
    let wanted = values.div_ceil(16 * 256).clamp(1, 64);
    let per_part = values.div_ceil(wanted).max(1);
    (values.div_ceil(per_part).max(1), per_part)
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
    fn whatever_may_change_the_algorithm_changes_the_key() {
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
    fn deterministic_algorithms_are_never_chosen_by_time() {
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
            call: "cudnnConvolutionForward",
            status: "CUDNN_STATUS_NOT_SUPPORTED".to_owned(),
            details: " (why)".to_owned(),
            problem,
        };
        let text = error.to_string();
        assert!(
            text.starts_with(
                "conv2d: cudnnConvolutionForward failed with CUDNN_STATUS_NOT_SUPPORTED (why), for the forward"
            ),
            "{text}"
        );
    }

    #[test]
    fn the_fastest_that_works_within_the_limit_comes_first() {
        let candidate = |algorithm, works, deterministic, workspace| Candidate {
            algorithm,
            works,
            deterministic,
            workspace,
        };
        let offered = [
            candidate("does not work", false, true, 0),
            candidate("hungry", true, true, 900),
            candidate("fast", true, false, 100),
            candidate("greedy", true, true, 300),
            candidate("steady", true, true, 0),
        ];
        let order = |deterministic| {
            let settings = Settings {
                deterministic,
                workspace_limit: 200,
                ..Settings::default()
            };
            by_preference(&offered, &key(settings))
                .iter()
                .map(|c| c.algorithm)
                .collect::<Vec<_>>()
        };
        assert_eq!(order(false), ["fast", "steady", "greedy", "hungry"]);
        assert_eq!(order(true), ["steady", "greedy", "hungry"]);
    }

    #[test]
    fn parts_of_a_sum_cover_all_values_and_none_is_empty() {
        for values in (1..10_000).chain([1 << 18, (1 << 18) + 1, 3_211_264, (1 << 31) - 1]) {
            let (parts, per_part) = parts_of(values);
            assert!(parts <= 64, "{values}: {parts} parts");
            assert!(
                parts * per_part >= values,
                "{values}: {parts} of {per_part}"
            );
            assert!(
                (parts - 1) * per_part < values,
                "{values}: the last is empty"
            );
        }
        assert_eq!(parts_of(4096).0, 1);
        assert_eq!(parts_of(3_211_264), (64, 50_176));
    }
}
