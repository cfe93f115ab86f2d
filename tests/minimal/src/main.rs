//! Two ranks on threads, in a build of the library without features.

use param_averager::{Communicator, Device, Error, LocalSgd, ParamAverager, Schedule};

fn main() -> Result<(), Error> {
    Communicator::run(&[Device::cpu(); 2], |communicator| {
        let rank = communicator.rank() as f32;
        let mut model = vec![vec![0.0; 1000], vec![1.0; 10]];
        let averager = ParamAverager::builder(communicator).build(&mut model)?;
        model[0].fill(rank);
        let mut sgd = LocalSgd::new(averager, Schedule::every(2));
        for _ in 0..3 {
            sgd.step(&mut model)?;
        }
        sgd.finish(&mut model)?;
        assert!(model[0] == [0.5; 1000] && model[1] == [1.0; 10]);
        Ok::<_, Error>(())
    })?;
    let cuda = Communicator::from_devices(&[Device::cuda(0)]).unwrap_err();
    assert!(cuda.to_string().contains("feature `cuda`"), "{cuda}");
    println!("0.5 on both ranks; a CUDA device is refused: {cuda}");
    Ok(())
}
