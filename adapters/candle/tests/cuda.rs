//! Averages of candle's variables on a CUDA device, between ranks that are threads. Needs a GPU, or
//! a simulated driver, for which `tests/simulated` builds and runs it:
//! `cargo test -p param-averager-candle --features cuda --test cuda`.

use candle_core::{DType, Device, Result, Tensor, Var};
use param_averager::{Communicator, Error, Lend, LocalSgd, ParamAverager, Schedule};
use param_averager_candle::VarParams;

fn ranks<T: Send>(count: usize, rank: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    let devices = vec![param_averager::Device::cuda(0); count];
    let world = Communicator::from_devices(&devices).unwrap();
    std::thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> =
            world.into_iter().map(|communicator| scope.spawn(move || rank(communicator))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn var(values: &[f32], dtype: DType, device: &Device) -> Var {
    // Converted on the CPU, so that no kernel of candle runs.
    let values = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    Var::from_tensor(&values.to_device(device).unwrap()).unwrap()
}

fn values(var: &Var) -> Vec<f32> {
    let values = var.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    values.to_vec1().unwrap()
}

fn every_dtype_becomes_the_mean(make: fn(usize) -> Result<Device>) {
    let dtypes = [DType::F32, DType::F64, DType::F16, DType::BF16];
    let found = ranks(2, |communicator| {
        let rank = communicator.rank() as f32;
        let device = make(0).unwrap();
        let vars = dtypes.map(|dtype| var(&[rank, 8.0, 4.0 * rank], dtype, &device));
        let names = ["f32", "f64", "f16", "bf16"].map(str::to_owned);
        let mut params = VarParams::from_vars(names.into_iter().zip(vars.clone())).unwrap();
        let averager = ParamAverager::builder(communicator);
        let averager = averager.start_from(param_averager::Start::Own).build(&mut params).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        sgd.step(&mut params).unwrap();
        sgd.finish(&mut params).unwrap(); // the error of an average that was enqueued
        vars.map(|var| values(&var))
    });
    for vars in found {
        assert_eq!(vars, dtypes.map(|_| vec![0.5, 8.0, 2.0]));
    }
}

#[test]
fn variables_on_a_stream_of_their_own_become_the_mean() {
    every_dtype_becomes_the_mean(Device::new_cuda_with_stream);
}

#[test]
fn variables_on_the_stream_of_a_thread_become_the_mean() {
    every_dtype_becomes_the_mean(Device::new_cuda);
}

#[test]
fn variables_on_two_devices_are_refused() {
    let (first, second) = (Device::new_cuda(0).unwrap(), Device::new_cuda(0).unwrap());
    for (a, b) in [(&first, &Device::Cpu), (&Device::Cpu, &first), (&first, &second)] {
        let vars = [("a", a), ("b", b)]
            .map(|(name, device)| (name.to_owned(), var(&[1.0], DType::F32, device)));
        let mut params = VarParams::from_vars(vars).unwrap();
        let error = params.lend(&mut |_| panic!("lent")).unwrap_err().to_string();
        assert!(error.contains("`a`") && error.contains("`b`"), "{error}");
    }
}

#[test]
fn a_rank_on_another_device_is_refused() {
    let errors = ranks(2, |communicator| {
        let vars = [("w".to_owned(), var(&[1.0], DType::F32, &Device::Cpu))];
        let mut params = VarParams::from_vars(vars).unwrap();
        ParamAverager::builder(communicator).build(&mut params).unwrap_err()
    });
    assert!(errors.iter().all(|it| matches!(it, Error::InvalidTensor { .. })), "{errors:?}");
}
