//! How much of a test set a network gets right.

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_cnn::{CrossEntropyConfig, cross_entropy};
use cifar_data::{Batch, Batches, ImageSet, Normalization};
use experiment_common::bar_of_pictures;
use serde::Serialize;
use trainer::first_maximum;

use crate::classifier::Classifier;

/// As in the evaluation of a run with the lesson's settings, so that the same weights have the same loss.
const BATCH: usize = 32;

/// What a network makes of a test set.
#[derive(Debug, Serialize)]
pub(crate) struct Evaluation {
    /// Of all pictures, 0 to 1.
    accuracy: f64,
    correct: u64,
    images: u64,
    /// Mean cross entropy.
    loss: f64,
    classes: Vec<OfClass>,
}

/// What it makes of the pictures of one class.
#[derive(Debug, Serialize)]
struct OfClass {
    class: String,
    images: u64,
    /// How many it took for each class.
    taken_for: Vec<u64>,
}

/// Asks the network of all pictures.
pub(crate) fn run(classifier: &Classifier, set: &Arc<ImageSet>) -> Result<Evaluation> {
    let names = classifier.class_names();
    let of_class = |name: &String| OfClass {
        class: name.clone(),
        images: 0,
        taken_for: vec![0; names.len()],
    };
    let mut classes: Vec<OfClass> = names.iter().map(of_class).collect();
    let order = (0..set.len() as u32).collect();
    let normalization = Normalization::HALF;
    let batches = Batches::new(
        set.clone(),
        order,
        BATCH,
        normalization,
        classifier.device(),
    )?;
    let bar = bar_of_pictures(set.len() as u64);
    let mut loss = 0.0;
    for batch in batches {
        let Batch {
            images,
            labels,
            len,
        } = batch?;
        let logits = classifier.logits(&images)?;
        let mean = cross_entropy(&logits, &labels, CrossEntropyConfig::default())?;
        loss += f64::from(mean.to_scalar::<f32>()?) * len as f64;
        for (row, label) in logits
            .to_vec2::<f32>()?
            .iter()
            .zip(labels.to_vec1::<u32>()?)
        {
            let of_class = &mut classes[label as usize];
            of_class.images += 1;
            of_class.taken_for[first_maximum(row)] += 1;
        }
        bar.inc(len as u64);
    }
    bar.finish_and_clear();
    let images = set.len() as u64;
    let loss = loss / images as f64;
    ensure!(
        loss.is_finite(),
        "the weights give answers that are not finite"
    );
    let correct = classes
        .iter()
        .enumerate()
        .map(|(index, of)| of.taken_for[index])
        .sum();
    Ok(Evaluation {
        accuracy: correct as f64 / images as f64,
        correct,
        images,
        loss,
        classes,
    })
}

impl Evaluation {
    /// For people.
    pub(crate) fn lines(&self) -> Vec<String> {
        let percent = |part: u64, of: u64| 100.0 * part as f64 / of as f64;
        let mut lines = vec![format!(
            "Test accuracy: {:.2}% ({} of {}), loss {:.4}",
            percent(self.correct, self.images),
            self.correct,
            self.images,
            self.loss
        )];
        let width = self.classes.iter().map(|of| of.class.len()).max();
        let width = width.unwrap_or(0);
        for (index, of) in self
            .classes
            .iter()
            .enumerate()
            .filter(|(_, of)| of.images > 0)
        {
            let right = percent(of.taken_for[index], of.images);
            let wrong = (0..self.classes.len()).filter(|&other| other != index);
            // The first of equals.
            let most = wrong.rev().max_by_key(|&other| of.taken_for[other]);
            let most = most.filter(|&other| of.taken_for[other] > 0).map(|other| {
                let name = &self.classes[other].class;
                format!(
                    ", {:.1} % taken for {name}",
                    percent(of.taken_for[other], of.images)
                )
            });
            lines.push(format!(
                "  {:width$}  {right:6.2} % of {}{}",
                of.class,
                of.images,
                most.unwrap_or_default()
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_is_told_with_what_it_is_taken_for_most() {
        let of_class = |class: &str, taken_for: [u64; 3]| OfClass {
            class: class.into(),
            images: taken_for.iter().sum(),
            taken_for: taken_for.into(),
        };
        let evaluation = Evaluation {
            accuracy: 0.5,
            correct: 5,
            images: 10,
            loss: 1.25,
            classes: vec![
                of_class("cat", [3, 1, 1]),
                of_class("horse", [3, 2, 0]),
                of_class("ship", [0, 0, 0]),
            ],
        };
        assert_eq!(
            evaluation.lines(),
            [
                "Test accuracy: 50.00% (5 of 10), loss 1.2500",
                "  cat     60.00 % of 5, 20.0 % taken for horse",
                "  horse   40.00 % of 5, 60.0 % taken for cat",
            ]
        );
    }
}
