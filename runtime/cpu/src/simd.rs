//! Loops compiled for the vector instructions that the machine has, chosen at run time.

use std::sync::OnceLock;

/// Vector instructions that loops are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    /// What every machine of the architecture has.
    Baseline,
    /// 256 bits with fused multiply-add.
    Avx2,
    /// 512 bits.
    Avx512,
}

/// The widest of this machine.
pub(crate) fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                return Isa::Avx512;
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Baseline
    })
}

/// Defines functions whose loops the compiler turns into vector instructions of the machine at hand.
///
/// The body is compiled once for each [`Isa`]; what it calls should be `#[inline(always)]`, or stays at the baseline.
macro_rules! vectorised {
    ($($(#[$attribute:meta])* $visible:vis fn $name:ident $(<$($generic:ident: $bound:path),+>)?
       ($($argument:ident: $ty:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$attribute])*
        #[expect(unsafe_code, reason = "functions for an instruction set are called after it was detected")]
        $visible fn $name $(<$($generic: $bound),+>)? ($($argument: $ty),*) $(-> $result)? {
            #[inline(always)]
            fn body $(<$($generic: $bound),+>)? ($($argument: $ty),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($generic: $bound),+>)? ($($argument: $ty),*) $(-> $result)? {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512 $(<$($generic: $bound),+>)? ($($argument: $ty),*) $(-> $result)? {
                    body($($argument),*)
                }
                match $crate::simd::isa() {
                    // SAFETY: the machine was found to have these instructions.
                    $crate::simd::Isa::Avx512 => return unsafe { avx512($($argument),*) },
                    // SAFETY: as above.
                    $crate::simd::Isa::Avx2 => return unsafe { avx2($($argument),*) },
                    $crate::simd::Isa::Baseline => {}
                }
            }
            body($($argument),*)
        }
    )*};
}
pub(crate) use vectorised;
