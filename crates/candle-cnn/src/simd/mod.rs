//! Vectors of the instruction sets that a machine may have, chosen at run time.
//!
//! A kernel is written once over [`Simd`] and compiled once per instruction
//! set inside a `#[target_feature]` function; [`Isa::detect`] picks the widest
//! set that the processor reports, so that one binary runs everywhere and no
//! build flag is needed.

mod tiles;
mod transpose;
mod vectors;

use std::sync::OnceLock;

pub(crate) use tiles::{Gather, KernelTable, Kernels, MAX_VECTORS, OUTER_HEIGHTS, Outer, Tap};
pub(crate) use transpose::Transpose;

/// An instruction set that the CPU kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// 512-bit vectors (x86-64 with AVX-512 F, BW, DQ and VL).
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
            // The four parts that every processor with AVX-512 but the first
            // (Knights Landing) has: see `multiversion`.
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
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

/// Defines a function that runs plain Rust compiled for an instruction set, so
/// that the compiler may vectorise its loops with it. The code itself must be
/// `#[inline(always)]`; closures would not inherit the instruction set.
macro_rules! multiversion {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<$t:ident: $bound:path>($($arg:ident: $ty:ty),* $(,)?) $(-> $result:ty)? = $body:path) => {
        $(#[$doc])*
        #[allow(unsafe_code)]
        $vis fn $name<$t: $bound>(isa: $crate::simd::Isa, $($arg: $ty),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512<$t: $bound>($($arg: $ty),*) $(-> $result)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$t: $bound>($($arg: $ty),*) $(-> $result)? {
                    $body($($arg),*)
                }
                match isa {
                    // SAFETY: this variant exists only where the processor
                    // has these features (`Isa::available`).
                    $crate::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                    $crate::simd::Isa::Portable => $body($($arg),*),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = isa;
                $body($($arg),*)
            }
        }
    };
}
pub(crate) use multiversion;
