//! Vectors of the instruction sets that a machine may have, chosen at run time.
//!
//! A kernel is written once over [`Simd`] and compiled once per instruction
//! set inside a `#[target_feature]` function; [`Isa::detect`] picks the widest
//! set that the processor reports, so that one binary runs everywhere and no
//! build flag is needed.

mod tiles;
mod transpose;
mod vectors;

use std::ffi::OsStr;
use std::sync::OnceLock;

pub(crate) use tiles::{
    Accumulate, Gather, KernelTable, Kernels, MAX_VECTORS, OUTER_HEIGHTS, Outer, Tap,
};
pub(crate) use transpose::transpose;

use crate::error::OpError;

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

    /// The instruction set in use: that of [`Isa::requested`], or the best
    /// available one where that is an error.
    pub fn detect() -> Self {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| Self::requested().unwrap_or(Self::available()[0]))
    }

    /// The best available instruction set, unless the environment variable
    /// `CANDLE_CNN_ISA` (`avx512`, `avx2` or `portable`) asks for another one
    /// that is available. A program calls this at its start, to find out
    /// whether its operations will use what was asked for.
    ///
    /// # Errors
    /// [`OpError::Unavailable`] when the variable names none, or one that this
    /// processor lacks.
    pub fn requested() -> Result<Self, OpError> {
        Self::named(std::env::var_os("CANDLE_CNN_ISA").as_deref())
    }

    fn named(wanted: Option<&OsStr>) -> Result<Self, OpError> {
        let available = Self::available();
        let Some(wanted) = wanted else {
            return Ok(available[0]);
        };
        let found = available.iter().find(|isa| wanted == isa.name());
        found.copied().ok_or_else(|| OpError::Unavailable {
            variable: "CANDLE_CNN_ISA",
            found: wanted.to_string_lossy().into_owned(),
            available: available.iter().map(|isa| isa.name()).collect(),
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
                    // SAFETY: the processor has these features: no public
                    // function takes an `Isa` to compute with, and this
                    // crate computes with those of `Isa::available` alone.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_available_instruction_set_can_be_asked_for_by_its_name() {
        let best = Isa::available()[0];
        assert_eq!(Isa::named(None).unwrap(), best);
        for isa in Isa::available() {
            assert_eq!(Isa::named(Some(isa.name().as_ref())).unwrap(), isa);
        }
        for unknown in ["", "AVX2", "sse2", " portable"] {
            let error = Isa::named(Some(unknown.as_ref())).unwrap_err().to_string();
            assert!(error.contains(&format!("{unknown:?}")), "{error}");
            assert!(error.contains("portable"), "{error}");
        }
    }
}
