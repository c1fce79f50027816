//! Learning-rate schedules: pure functions of the step.

use serde::{Deserialize, Serialize};

use crate::config::ConfigError;

/// A span of training in the unit its author thinks in; resolved to steps once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Span {
    /// Passes over the training set; fractions are allowed.
    Epochs(f64),
    /// Optimiser steps.
    Steps(u64),
    /// Training images seen.
    Examples(u64),
}

impl Span {
    /// This span in steps, rounded to the nearest.
    pub fn steps(self, steps_per_epoch: u64, batch_size: usize) -> u64 {
        match self {
            Span::Epochs(epochs) => (epochs * steps_per_epoch as f64).round() as u64,
            Span::Steps(steps) => steps,
            Span::Examples(examples) => (examples as f64 / batch_size.max(1) as f64).round() as u64,
        }
    }
}

/// How the learning rate changes over the run.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// The same rate at every step.
    #[default]
    Constant,
    /// Multiplied by `factor` after each `every` (PyTorch's `StepLR`).
    Step {
        /// Length of a plateau.
        every: Span,
        /// Factor from one plateau to the next.
        factor: f64,
    },
    /// Linear rise from 0 over `warmup`, then half a cosine down to `end_factor` × rate at the
    /// last step.
    Cosine {
        /// Length of the rise; zero starts at the full rate, and a run that is shorter ends before it.
        warmup: Span,
        /// The rate at the end as a fraction of the full rate.
        end_factor: f64,
    },
}

impl Schedule {
    /// Fixes the schedule to a run of `total_steps`.
    ///
    /// # Errors
    /// A plateau of no steps; epochs or a factor that are negative or not finite.
    pub fn resolve(
        self,
        total_steps: u64,
        steps_per_epoch: u64,
        batch_size: usize,
    ) -> Result<ResolvedSchedule, ConfigError> {
        let invalid = |setting, found: String, expected| ConfigError {
            setting,
            found,
            expected,
        };
        let in_steps = |setting, span: Span| match span {
            Span::Epochs(epochs) if !(epochs.is_finite() && epochs >= 0.0) => {
                let expected = "a finite number of epochs of at least 0";
                Err(invalid(setting, epochs.to_string(), expected))
            }
            span => Ok(span.steps(steps_per_epoch, batch_size)),
        };
        Ok(match self {
            Schedule::Constant => ResolvedSchedule::Constant,
            Schedule::Step { every, factor } => {
                if !(factor.is_finite() && factor >= 0.0) {
                    return Err(invalid(
                        "schedule.factor",
                        factor.to_string(),
                        "a finite number of at least 0",
                    ));
                }
                match in_steps("schedule.every", every)? {
                    0 => {
                        return Err(invalid(
                            "schedule.every",
                            format!("{every:?}"),
                            "at least one step",
                        ));
                    }
                    every_steps => ResolvedSchedule::Step {
                        every_steps,
                        factor,
                    },
                }
            }
            Schedule::Cosine { warmup, end_factor } => {
                if !(end_factor.is_finite() && end_factor >= 0.0) {
                    return Err(invalid(
                        "schedule.end_factor",
                        end_factor.to_string(),
                        "a finite number of at least 0",
                    ));
                }
                ResolvedSchedule::Cosine {
                    warmup_steps: in_steps("schedule.warmup", warmup)?,
                    total_steps,
                    end_factor,
                }
            }
        })
    }
}

/// A [`Schedule`] in steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResolvedSchedule {
    /// Factor 1.
    Constant,
    /// `factor ^ (step / every_steps)`.
    Step {
        /// Length of a plateau in steps.
        every_steps: u64,
        /// Factor from one plateau to the next.
        factor: f64,
    },
    /// Linear warm-up, then half a cosine.
    Cosine {
        /// Steps of the rise.
        warmup_steps: u64,
        /// Steps of the run.
        total_steps: u64,
        /// Factor at the last step.
        end_factor: f64,
    },
}

impl ResolvedSchedule {
    /// What the base learning rate is multiplied by at `step` (0-based).
    pub fn factor(&self, step: u64) -> f64 {
        match *self {
            ResolvedSchedule::Constant => 1.0,
            ResolvedSchedule::Step {
                every_steps,
                factor,
            } => factor.powi((step / every_steps).min(i32::MAX as u64) as i32),
            ResolvedSchedule::Cosine { warmup_steps, .. } if step < warmup_steps => {
                (step + 1) as f64 / warmup_steps.saturating_add(1) as f64
            }
            ResolvedSchedule::Cosine {
                warmup_steps,
                total_steps,
                end_factor,
            } => {
                // The last step is number total - 1 and gets exactly `end_factor`.
                let falls_from = warmup_steps.saturating_add(1);
                let span = total_steps.saturating_sub(falls_from).max(1) as f64;
                let progress = ((step - warmup_steps) as f64 / span).min(1.0);
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
                end_factor + (1.0 - end_factor) * cosine
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rise_without_end_hardly_begins() {
        let cosine = Schedule::Cosine {
            warmup: Span::Epochs(1e18),
            end_factor: 0.0,
        };
        let factor = cosine.resolve(10, 1563, 32).unwrap().factor(9);
        assert!(factor > 0.0 && factor < 1e-15, "{factor}");
    }

    #[test]
    fn epochs_that_are_no_length_are_refused() {
        for epochs in [f64::INFINITY, f64::NAN, -1.0] {
            let span = Span::Epochs(epochs);
            let (factor, end_factor) = (0.1, 0.0);
            for schedule in [
                Schedule::Step {
                    every: span,
                    factor,
                },
                Schedule::Cosine {
                    warmup: span,
                    end_factor,
                },
            ] {
                let error = schedule.resolve(100, 10, 4).unwrap_err();
                assert!(error.to_string().contains("number of epochs"), "{error}");
            }
        }
    }

    #[test]
    fn spans_of_epochs_steps_and_examples_resolve_to_steps() {
        assert_eq!(Span::Epochs(1.5).steps(100, 32), 150);
        assert_eq!(Span::Steps(7).steps(100, 32), 7);
        assert_eq!(Span::Examples(320).steps(100, 32), 10);
    }

    #[test]
    fn step_schedule_multiplies_after_each_plateau() {
        let schedule = Schedule::Step {
            every: Span::Epochs(1.0),
            factor: 0.5,
        };
        let resolved = schedule.resolve(30, 10, 4).unwrap();
        let factors: Vec<f64> = [0, 9, 10, 19, 20].map(|step| resolved.factor(step)).into();
        assert_eq!(factors, [1.0, 1.0, 0.5, 0.5, 0.25]);
    }

    #[test]
    fn cosine_rises_to_the_full_rate_and_ends_at_its_end_factor() {
        let schedule = Schedule::Cosine {
            warmup: Span::Steps(3),
            end_factor: 0.1,
        };
        let resolved = schedule.resolve(14, 7, 4).unwrap();
        assert_eq!(resolved.factor(0), 0.25);
        assert_eq!(resolved.factor(2), 0.75);
        assert_eq!(resolved.factor(3), 1.0);
        assert!((resolved.factor(8) - 0.55).abs() < 1e-12);
        assert!((resolved.factor(13) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn a_plateau_of_no_steps_is_refused() {
        let schedule = Schedule::Step {
            every: Span::Steps(0),
            factor: 0.5,
        };
        let error = schedule.resolve(10, 5, 4).unwrap_err().to_string();
        assert!(error.contains("schedule.every"), "{error}");
    }

    #[test]
    fn a_run_that_is_shorter_than_the_warmup_ends_while_the_rate_rises() {
        let schedule = Schedule::Cosine {
            warmup: Span::Steps(3),
            end_factor: 0.0,
        };
        let resolved = schedule.resolve(2, 2, 4).unwrap();
        assert_eq!([0, 1].map(|step| resolved.factor(step)), [0.25, 0.5]);
    }
}
