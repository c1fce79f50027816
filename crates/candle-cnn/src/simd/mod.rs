//! Vectors of the instruction sets that a machine may have, chosen at run time.
//!
//! A kernel is written once over [`Simd`] and compiled once per instruction
//! set inside a `#[target_feature]` function; [`Isa::detect`] picks the widest
//! set that the processor reports, so that one binary runs everywhere and no
//! build flag is needed.

mod tiles;
mod vectors;

use std::sync::OnceLock;

pub(crate) use tiles::{Gather, KernelTable, Kernels, MAX_VECTORS, OUTER_HEIGHTS, Outer};

/// An instruction set that the CPU kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// 512-bit vectors (x86-64 with AVX-512F).
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 256-bit vectors (x86-64 with AVX2 and FMA).
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Plain arithmetic on small arrays, which the compiler maps to what the
    /// target has (NEON, SSE2).
    Portable,
}

impl Isa {
    /// Every instruction set that this processor can run, best first.
    pub fn available() -> Vec<Self> {
        let mut available = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                available.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                available.push(Self::Avx2);
            }
        }
        available.push(Self::Portable);
        available
    }

    /// The instruction set in use: the best available one, unless the
    /// environment variable `CANDLE_CNN_ISA` (`avx512`, `avx2` or `portable`)
    /// asks for a lesser one that is available.
    pub fn detect() -> Self {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| {
            let available = Self::available();
            std::env::var("CANDLE_CNN_ISA")
                .ok()
                .and_then(|wanted| available.iter().find(|isa| isa.name() == wanted).copied())
                .unwrap_or(available[0])
        })
    }

    /// The name that `CANDLE_CNN_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}
