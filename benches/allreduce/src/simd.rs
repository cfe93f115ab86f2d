//! Runs a loop compiled for the best instruction set that this machine has. Which one is decided at
//! run time.

/// Instruction sets, each with all of those before it.
pub const BASELINE: u8 = 0;
pub const AVX2: u8 = 1; // and F16C
pub const AVX512: u8 = 2; // F, BW, VL, DQ

/// A loop. `run` is `#[inline(always)]`, so that it is compiled anew in each function below.
pub trait Task {
    /// Its result.
    type Output;
    /// Runs it on a machine that has this instruction set.
    fn run<const ISA: u8>(self) -> Self::Output;
}

/// Runs `task`.
pub fn best<T: Task>(task: T) -> T::Output {
    on(available(), task)
}

/// `isa`: at most `available`.
fn on<T: Task>(isa: u8, task: T) -> T::Output {
    match isa {
        // SAFETY: the machine has what the functions were compiled for.
        #[cfg(target_arch = "x86_64")]
        AVX512 => unsafe { avx512(task) },
        #[cfg(target_arch = "x86_64")]
        AVX2 => unsafe { avx2(task) },
        _ => task.run::<BASELINE>(),
    }
}

/// The best instruction set of this machine.
fn available() -> u8 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("f16c");
        if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
            return AVX512;
        }
        if avx2 {
            return AVX2;
        }
    }
    BASELINE
}

/// Writes past the caches, where the machine has an instruction for it and `to` lies at a multiple
/// of 16 bytes.
///
/// # Safety
/// `to` is valid for a write at any alignment. `stream_fence` comes before another thread may look.
#[inline(always)]
pub unsafe fn stream<T: Copy>(to: *mut T, value: &T) {
    #[cfg(target_arch = "x86_64")]
    if size_of::<T>().is_multiple_of(16) && to.addr().is_multiple_of(16) {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        let (from, to) = (std::ptr::from_ref(value).cast::<__m128i>(), to.cast::<__m128i>());
        for part in 0..size_of::<T>() / 16 {
            // SAFETY: inside of `value` and of `to`, which is aligned. Every x86-64 has SSE2.
            unsafe { _mm_stream_si128(to.add(part), _mm_loadu_si128(from.add(part))) };
        }
        return;
    }
    // SAFETY: as this function's.
    unsafe { to.write_unaligned(*value) }
}

/// Orders what `stream` wrote before what this thread does next.
#[inline(always)]
pub fn stream_fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE.
    unsafe {
        std::arch::x86_64::_mm_sfence()
    }
}

/// Runs the task on every instruction set that this machine has.
#[cfg(test)]
pub fn each<T: Task>(task: impl Fn() -> T, check: impl Fn(T::Output)) {
    for isa in BASELINE..=available() {
        check(on(isa, task()));
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")]
fn avx512<T: Task>(task: T) -> T::Output {
    task.run::<AVX512>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn avx2<T: Task>(task: T) -> T::Output {
    task.run::<AVX2>()
}
