//! Which of several engines is taken. Nothing here needs CUDA, so that it is tested everywhere.

/// Engines in the order in which they are to be taken.
///
/// One may refuse in spite of having been offered. And where they are on trial, one may deviate too far from what it should compute:
/// then it is left out, unless there is no other.
pub(super) struct Candidates<C> {
    /// The next last.
    waiting: Vec<C>,
    /// Candidates that deviate too far, and how far.
    left_out: Vec<(C, f64)>,
    on_trial: bool,
    /// Whether the next one may be taken.
    admitted: bool,
}

/// What comes of trying one out.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trial {
    Deviates(f64),
    Refused,
    /// The candidate could not be tried out.
    Unknown,
}

impl<C> Candidates<C> {
    pub(super) fn new(mut next_first: Vec<C>, on_trial: bool) -> Self {
        next_first.reverse();
        Self {
            waiting: next_first,
            left_out: Vec::new(),
            on_trial,
            admitted: false,
        }
    }

    /// The one to take.
    pub(super) fn next(&self) -> Option<&C> {
        self.waiting.last()
    }

    /// Takes away the next one, which has refused.
    pub(super) fn refused(&mut self) {
        self.waiting.pop();
        self.admitted = false;
    }

    /// Whether [`Self::admit`] comes before the next one is taken.
    pub(super) fn needs_trial(&self) -> bool {
        self.on_trial && !self.admitted
    }

    /// Leaves out those that deviate by more than `most`, up to the first that does not, or of which nothing is known. Where none is
    /// left, the one that deviates least comes back, if that is by no more than `last_resort`, and this returns by how much.
    pub(super) fn admit(
        &mut self,
        most: f64,
        last_resort: f64,
        mut try_out: impl FnMut(&C) -> Trial,
    ) -> Option<f64> {
        self.admitted = true;
        while let Some(candidate) = self.waiting.pop() {
            match try_out(&candidate) {
                Trial::Refused => continue,
                Trial::Unknown => {}
                Trial::Deviates(by) if by <= most => {}
                Trial::Deviates(by) => {
                    self.left_out.push((candidate, by));
                    continue;
                }
            }
            self.waiting.push(candidate);
            return None;
        }
        let deviations = self.left_out.iter().map(|(_, by)| *by).enumerate();
        let (least, by) = deviations
            .min_by(|(_, a), (_, b)| a.total_cmp(b))
            .filter(|(_, by)| *by <= last_resort)?;
        self.waiting.push(self.left_out.swap_remove(least).0);
        Some(by)
    }
}

/// How long a run takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Timing {
    /// Time of one run; infinite where it fails.
    pub(super) milliseconds: f32,
    /// Whether the run could not be captured.
    pub(super) outside_graph: bool,
}

impl Default for Timing {
    /// The timing of what does not run.
    fn default() -> Self {
        Self {
            milliseconds: f32::INFINITY,
            outside_graph: false,
        }
    }
}

/// The least time of those that can be captured: what is slower than that need not be captured to be left out.
pub(super) fn best_in_graph(timings: &[Timing]) -> f32 {
    let captured = timings.iter().filter(|t| !t.outside_graph);
    captured.fold(f32::INFINITY, |best, t| best.min(t.milliseconds))
}

/// Milliseconds, infinite of those that cannot be captured, unless none can: a single one would keep a whole step from being recorded.
pub(super) fn in_graphs_if_any(timings: &[Timing]) -> Vec<f32> {
    let runs_in_graph = |t: &Timing| !t.outside_graph && t.milliseconds.is_finite();
    let any = timings.iter().any(runs_in_graph);
    let counts = |t: &Timing| !any || runs_in_graph(t);
    let times = timings.iter().map(|t| match counts(t) {
        true => t.milliseconds,
        false => f32::INFINITY,
    });
    times.collect()
}

/// The candidates that run, the fastest first.
pub(super) fn by_time<C>(candidates: Vec<C>, times: &[f32]) -> Vec<C> {
    let mut timed: Vec<_> = times.iter().zip(candidates).collect();
    timed.retain(|(time, _)| time.is_finite());
    timed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    timed.into_iter().map(|(_, candidate)| candidate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: f64 = 1.0;
    const LAST_RESORT: f64 = 10.0;

    /// Candidates that are their own trials.
    fn on_trial(trials: &[Trial]) -> Candidates<Trial> {
        Candidates::new(trials.to_vec(), true)
    }

    fn next_deviation(candidates: &Candidates<Trial>) -> Option<f64> {
        match candidates.next() {
            Some(Trial::Deviates(by)) => Some(*by),
            _ => None,
        }
    }

    #[test]
    fn the_fastest_comes_first_and_who_does_not_run_is_left_out() {
        let sorted = by_time(vec!["a", "b", "c", "d"], &[2.0, 1.0, f32::INFINITY, 1.5]);
        assert_eq!(sorted, ["b", "d", "a"]);
        assert!(by_time(vec!["a"], &[f32::INFINITY]).is_empty());
    }

    #[test]
    fn what_cannot_be_captured_is_taken_only_where_nothing_can() {
        let timing = |milliseconds, outside_graph| Timing {
            milliseconds,
            outside_graph,
        };
        let outside = [timing(1.0, true), Timing::default()];
        assert_eq!(in_graphs_if_any(&outside), [1.0, f32::INFINITY]);
        let some = [timing(1.0, true), timing(3.0, false), timing(2.0, false)];
        assert_eq!(in_graphs_if_any(&some), [f32::INFINITY, 3.0, 2.0]);
        // By the first of them nobody is too slow to be tried.
        assert_eq!(best_in_graph(&some), 2.0);
        assert_eq!(best_in_graph(&outside), f32::INFINITY);
    }

    #[test]
    fn without_a_trial_the_first_that_does_not_refuse_is_taken() {
        let mut candidates = Candidates::new(vec![1, 2], false);
        assert!(!candidates.needs_trial());
        assert_eq!(candidates.next(), Some(&1));
        candidates.refused();
        assert!(!candidates.needs_trial());
        assert_eq!(candidates.next(), Some(&2));
        candidates.refused();
        assert_eq!(candidates.next(), None);
    }

    #[test]
    fn the_first_that_does_not_deviate_too_far_is_taken() {
        use Trial::{Deviates, Refused};
        let mut candidates = on_trial(&[
            Deviates(2.0),
            Refused,
            Deviates(f64::INFINITY),
            Deviates(1.0),
            Deviates(0.5),
        ]);
        assert!(candidates.needs_trial());
        let mut tried = 0;
        let admitted = candidates.admit(MOST, LAST_RESORT, |trial| {
            tried += 1;
            *trial
        });
        assert_eq!((admitted, tried), (None, 4));
        assert!(!candidates.needs_trial());
        assert_eq!(next_deviation(&candidates), Some(1.0));
        // One that refuses later is replaced by another, which is tried out as well.
        candidates.refused();
        assert!(candidates.needs_trial());
        assert_eq!(candidates.admit(MOST, LAST_RESORT, |trial| *trial), None);
        assert_eq!(next_deviation(&candidates), Some(0.5));
    }

    #[test]
    fn where_all_deviate_the_least_is_taken_and_then_the_next() {
        use Trial::{Deviates, Refused};
        // The second is wrong, and not rounded.
        let trials = [3.0, f64::INFINITY, 2.0].map(Deviates);
        let mut candidates = on_trial(&[trials.as_slice(), &[Refused]].concat());
        for least in [2.0, 3.0] {
            assert_eq!(
                candidates.admit(MOST, LAST_RESORT, |trial| *trial),
                Some(least)
            );
            assert!(!candidates.needs_trial());
            assert!(candidates.next().is_some());
            candidates.refused();
        }
        assert_eq!(candidates.admit(MOST, LAST_RESORT, |trial| *trial), None);
        assert!(candidates.next().is_none());
    }

    #[test]
    fn where_there_is_another_way_none_is_taken_that_deviates() {
        let mut candidates = on_trial(&[Trial::Deviates(3.0)]);
        assert_eq!(candidates.admit(MOST, MOST, |trial| *trial), None);
        assert!(candidates.next().is_none());
        assert!(!candidates.needs_trial());
    }

    #[test]
    fn one_that_cannot_be_tried_out_is_taken() {
        let mut candidates = on_trial(&[Trial::Unknown, Trial::Deviates(0.0)]);
        assert_eq!(candidates.admit(MOST, LAST_RESORT, |trial| *trial), None);
        assert!(matches!(candidates.next(), Some(Trial::Unknown)));
    }
}
