//! Steps and samples that no average has had yet.

/// Steps and samples since the last average of each fragment.
#[derive(Clone, Debug)]
pub(super) struct Since {
    steps: Vec<u64>,
    /// `None`: steps are not weighted.
    samples: Option<Vec<f64>>,
    /// Wrong weight that the next average gets in the place of samples, so that all ranks learn of
    /// it.
    pub(super) wrong: Option<f64>,
}

impl Since {
    pub(super) fn new(fragments: u32) -> Since {
        Since { steps: vec![0; fragments as usize], samples: None, wrong: None }
    }

    /// From here on, steps are weighted.
    pub(super) fn weigh(&mut self) {
        self.samples.get_or_insert_with(|| vec![0.0; self.steps.len()]);
    }

    /// Counts a step, and its samples if steps are weighted.
    pub(super) fn count(&mut self, samples: f64) {
        self.steps.iter_mut().for_each(|steps| *steps += 1);
        self.samples.iter_mut().flatten().for_each(|before| *before += samples);
    }

    /// Steps of a fragment, or of the whole model: those of the fragment that has most.
    pub(super) fn steps(&self, fragment: Option<usize>) -> u64 {
        match fragment {
            Some(fragment) => self.steps[fragment],
            None => self.steps.iter().copied().max().unwrap_or(0),
        }
    }

    /// Samples of a fragment, or of the whole model; `None` if steps are not weighted.
    pub(super) fn samples(&self, fragment: Option<usize>) -> Option<f64> {
        let samples = self.samples.as_ref()?;
        Some(match fragment {
            Some(fragment) => samples[fragment],
            None => samples.iter().copied().fold(0.0, f64::max),
        })
    }

    /// Weight of an average: the samples, unless a wrong one was given.
    pub(super) fn weight(&self, fragment: Option<usize>) -> Option<f64> {
        self.wrong.or_else(|| self.samples(fragment))
    }

    /// Notes that an average has had all steps.
    pub(super) fn forget(&mut self, fragment: Option<usize>) {
        let all = 0..self.steps.len();
        let range = fragment.map_or(all, |fragment| fragment..fragment + 1);
        self.steps[range.clone()].fill(0);
        self.samples.iter_mut().for_each(|samples| samples[range.clone()].fill(0.0));
    }

    /// Takes back the steps and samples of an average that has failed.
    pub(super) fn take_back(&mut self, fragment: Option<usize>, steps: u64, samples: Option<f64>) {
        let range = fragment.map_or(0..self.steps.len(), |fragment| fragment..fragment + 1);
        self.steps[range.clone()].iter_mut().for_each(|since| *since += steps);
        let lost = samples.filter(|samples| samples.is_finite()).unwrap_or(0.0);
        if let Some(all) = &mut self.samples {
            all[range].iter_mut().for_each(|since| *since += lost);
        }
    }

    /// Restores what was saved.
    pub(super) fn restore(&mut self, steps: u64, samples: Option<f64>) {
        self.steps.fill(steps);
        self.samples = samples.map(|samples| vec![samples; self.steps.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragments_are_counted_apart() {
        let mut since = Since::new(2);
        since.count(9.0);
        assert_eq!((since.steps(None), since.samples(None)), (1, None));
        since.weigh();
        since.count(3.0);
        since.forget(Some(1));
        since.count(4.0);
        assert_eq!([Some(0), Some(1), None].map(|of| since.steps(of)), [3, 1, 3]);
        assert_eq!([Some(0), Some(1), None].map(|of| since.samples(of).unwrap()), [7.0, 4.0, 7.0]);
        since.take_back(Some(1), 2, Some(3.0));
        since.take_back(Some(0), 1, Some(f64::NAN));
        assert_eq!([Some(0), Some(1)].map(|of| since.steps(of)), [4, 3]);
        assert_eq!([Some(0), Some(1)].map(|of| since.samples(of).unwrap()), [7.0, 7.0]);
        since.forget(None);
        assert_eq!((since.steps(None), since.samples(None)), (0, Some(0.0)));
        since.wrong = Some(f64::NAN);
        assert!(since.weight(None).unwrap().is_nan() && since.samples(None) == Some(0.0));
    }
}
