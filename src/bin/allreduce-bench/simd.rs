//! Runs a loop compiled for the best instruction set that this machine has. Which one is decided at run time.

/// Instruction sets, each with all of those before it.
pub const BASELINE: u8 = 0;
pub const AVX2: u8 = 1; // and F16C
pub const AVX512: u8 = 2; // F, BW, VL, DQ

/// A loop. `run` is `#[inline(always)]`, so that it is compiled anew in each function below.
pub trait Task {
    /// What it returns.
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
