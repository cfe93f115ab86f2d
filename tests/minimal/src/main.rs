//! Two ranks on threads, in a build of the library without features.

use param_averager::{Communicator, Device, Error, LocalSgd, ParamAverager, Schedule};

fn main() -> Result<(), Error> {
    let world = Communicator::from_devices(&[Device::cpu(); 2])?;
    let ranks: Vec<_> = world
        .into_iter()
        .map(|communicator| {
            std::thread::spawn(move || {
                let mut model = vec![vec![communicator.rank() as f32; 1000], vec![1.0; 10]];
                let averager = ParamAverager::builder(communicator).build(&mut model)?;
                let mut sgd = LocalSgd::new(averager, Schedule::every(2));
                for _ in 0..3 {
                    sgd.step(&mut model)?;
                }
                sgd.finish(&mut model)?;
                assert!(model[0] == [0.5; 1000] && model[1] == [1.0; 10]);
                Ok::<_, Error>(())
            })
        })
        .collect();
    for rank in ranks {
        rank.join().expect("a rank does not panic")?;
    }
    let cuda = Communicator::from_devices(&[Device::cuda(0)]).unwrap_err();
    assert!(cuda.to_string().contains("feature `cuda`"), "{cuda}");
    println!("0.5 on both ranks; a CUDA device is refused: {cuda}");
    Ok(())
}
