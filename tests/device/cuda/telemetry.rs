//! Telemetry of averages on a device.

use param_averager::*;
use test_support::ranks_of;

use super::model::Model;
use super::way::shapes;

/// Reports of two averages, by rank.
fn told(devices: &[Device], algorithm: Algorithm, all_or_nothing: bool) -> Vec<Vec<Report>> {
    let shapes = shapes();
    let told = ranks_of(devices, |communicator| {
        let (rank, on) = (communicator.rank(), communicator.device());
        let mut model = Model::new(on, &shapes, rank as u64);
        let mut averager = test_support::options(communicator)
            .algorithm(algorithm)
            .all_or_nothing(all_or_nothing)
            .telemetry(true)
            .channels(2)
            .chunk_bytes(4096)
            .build(&mut model)
            .unwrap();
        let told = (0..2).map(|_| averager.average(&mut model).unwrap());
        let told = told.collect();
        model.download();
        assert!(model.guards_are_whole());
        (told, averager)
    });
    let told: Vec<Vec<Report>> = told.into_iter().map(|(told, _)| told).collect();
    // Waits of all ranks, in the average before.
    let waited: Vec<_> = told.iter().map(|reports| reports[0].waited).collect();
    for reports in &told {
        let [first, second] = [0, 1].map(|i| reports[i].telemetry.unwrap());
        assert!(first.waits().iter().all(|wait| wait.is_zero()), "{first:?}");
        assert_eq!(second.waits(), waited, "{algorithm:?}, {all_or_nothing}, {devices:?}");
    }
    told
}

pub fn on_one_device() {
    for ranks in [2, 3] {
        let devices = vec![Device::cuda(0); ranks];
        compare(&devices, &[DIRECT, RING, RING_WITHOUT_COMMIT]);
    }
}

pub fn on_two_devices() {
    compare(&[Device::cuda(0), Device::cuda(1)], &[DIRECT, RING, RING_WITHOUT_COMMIT]);
}

const DIRECT: (Algorithm, bool) = (Algorithm::Direct, true);
const RING: (Algorithm, bool) = (Algorithm::Ring, true);
const RING_WITHOUT_COMMIT: (Algorithm, bool) = (Algorithm::Ring, false);

/// Devices have the sample of the CPU, and its numbers but for the order of sums.
fn compare(devices: &[Device], ways: &[(Algorithm, bool)]) {
    let cpus = vec![Device::cpu(); devices.len()];
    let mut has_waited = false;
    for &(algorithm, all_or_nothing) in ways {
        let what = (algorithm, all_or_nothing, devices);
        let of = |devices: &[Device]| told(devices, algorithm, all_or_nothing);
        for (gpu, cpu) in of(devices).into_iter().zip(of(&cpus)) {
            let numbers = |reports: Vec<Report>| -> Vec<Telemetry> {
                reports.into_iter().map(|report| report.telemetry.unwrap()).collect()
            };
            let (gpu, cpu) = (numbers(gpu), numbers(cpu));
            has_waited |= gpu[1].waits().iter().any(|wait| !wait.is_zero());
            for (gpu, cpu) in gpu.iter().zip(&cpu) {
                let is_near = |gpu: f64, cpu: f64| (gpu - cpu).abs() <= 1e-12 * cpu;
                assert!(is_near(gpu.norm, cpu.norm), "{what:?}: {gpu:?} {cpu:?}");
                assert!(is_near(gpu.change, cpu.change), "{what:?}: {gpu:?} {cpu:?}");
                assert_eq!(gpu.largest_change, cpu.largest_change, "{what:?}");
                assert_eq!((gpu.non_finite, cpu.non_finite), (0.0, 0.0));
            }
            assert!(gpu[0].norm > 0.0 && gpu[0].change > 0.0, "{gpu:?}");
            assert!(gpu[1].change < 1e-3 * gpu[0].change, "equal by now: {gpu:?}");
        }
    }
    assert!(has_waited);
}
