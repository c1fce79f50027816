//! What of a graph a GPU runs at once. A launch costs as much as a small convolution, so that operations that wait for the
//! same earlier ones form a stage, in which one launch does the like work of all; and convolutions that read the same map
//! in the same way run as one. Nothing here needs CUDA.

use super::builder::{Convolution, Operation};
use super::plan::Network;

/// Operations that wait for the same earlier ones.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Stage {
    pub(super) units: Vec<Unit>,
    /// The max-poolings, by their number among the operations.
    pub(super) pools: Vec<usize>,
    /// The part of the weights' memory that holds those of the units.
    pub(super) part: usize,
}

/// Convolutions of one map with kernels of one size: one convolution whose output channels are theirs, one after the other.
#[derive(Debug, PartialEq)]
pub(super) struct Unit {
    /// The element of the stage's part of the weights' memory at which the unit's weights begin.
    pub(super) weight: usize,
    pub(super) c_out: usize,
    pub(super) trains: bool,
    pub(super) members: Vec<Member>,
}

#[derive(Debug, PartialEq)]
pub(super) struct Member {
    pub(super) convolution: Convolution,
    /// The convolution's first channel in the unit.
    pub(super) channel: usize,
}

#[cfg(feature = "cuda")]
impl Stage {
    /// The members of all the stage's units.
    pub(super) fn members(&self) -> impl Iterator<Item = &Member> {
        self.units.iter().flat_map(|unit| &unit.members)
    }
}

impl Unit {
    /// What the members have in common: input, kernel, stride and padding.
    pub(super) fn shape(&self) -> &Convolution {
        &self.members[0].convolution
    }
}

/// A graph's stages, and how many elements each part of their weights takes: a part can be given back while others are still
/// needed.
///
/// `trainable` says of each convolution whether it trains: those that do are kept apart from those that do not. `width` is
/// how many channels the pixels of a map have in memory.
pub(super) fn stages(
    graph: &Network,
    trainable: &[bool],
    width: impl Fn(usize) -> usize,
) -> (Vec<Stage>, Vec<usize>) {
    let stage = |level: &Vec<usize>| {
        let mut stage = Stage::default();
        for &index in level {
            let convolution = match graph.operations[index] {
                Operation::Convolution(convolution) => convolution,
                Operation::MaxPool(_) => {
                    stage.pools.push(index);
                    continue;
                }
            };
            let trains = trainable[convolution.number];
            let shape = |c: &Convolution| (c.input, c.kernel, c.stride, c.padding);
            let fits =
                |u: &&mut Unit| u.trains == trains && shape(u.shape()) == shape(&convolution);
            let member = |channel| Member {
                convolution,
                channel,
            };
            match stage.units.iter_mut().find(fits) {
                Some(unit) => {
                    unit.members.push(member(unit.c_out));
                    unit.c_out += convolution.c_out;
                }
                None => stage.units.push(Unit {
                    weight: 0,
                    c_out: convolution.c_out,
                    trains,
                    members: vec![member(0)],
                }),
            }
        }
        stage
    };
    let mut stages: Vec<Stage> = graph.levels.iter().map(stage).collect();
    let parts = divide_weights(&mut stages, width);
    (stages, parts)
}

/// Gives each unit its place in the memory of the weights. A stage begins a new part of it once the last one holds
/// its share of all elements, one of `PARTS`. Returns the elements of each part.
fn divide_weights(stages: &mut [Stage], width: impl Fn(usize) -> usize) -> Vec<usize> {
    /// How many parts there are at the most: few, since each allocation takes time.
    const PARTS: usize = 4;
    // Vectors of any type begin at such an element.
    const ALIGNMENT: usize = 64;
    let elements = |unit: &Unit| {
        let c = unit.shape();
        (unit.c_out * c.kernel * c.kernel * width(c.input)).next_multiple_of(ALIGNMENT)
    };
    let all: usize = stages.iter().flat_map(|s| &s.units).map(elements).sum();
    let mut parts = vec![0];
    for stage in stages {
        let is_full = parts[parts.len() - 1] * PARTS >= all;
        if is_full && !stage.units.is_empty() {
            parts.push(0);
        }
        stage.part = parts.len() - 1;
        for unit in &mut stage.units {
            unit.weight = parts[stage.part];
            parts[stage.part] += elements(unit);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use crate::{MaxPool2dConfig, StaticGraph, StaticGraphBuilder};

    use super::*;

    /// A stem and an Inception block.
    fn block() -> StaticGraph {
        let mut b = StaticGraphBuilder::new(3, (8, 8));
        let x = b.conv2d_relu(b.input(), 16, 3, 1).unwrap();
        let one = b.conv2d_relu(x, 16, 1, 0).unwrap();
        let reduced = b.conv2d_relu(x, 8, 1, 0).unwrap();
        let three = b.conv2d_relu(reduced, 32, 3, 1).unwrap();
        let reduced = b.conv2d_relu(x, 24, 1, 0).unwrap();
        let five = b.conv2d_relu(reduced, 16, 5, 2).unwrap();
        let pooled = b.max_pool2d(x, MaxPool2dConfig::square(3, 1, 1)).unwrap();
        let four = b.conv2d_relu(pooled, 8, 1, 0).unwrap();
        let whole = b.concat(&[one, three, five, four]).unwrap();
        b.global_avg_pool2d(whole).unwrap()
    }

    /// The members of each stage's units, and the number of its poolings.
    fn members(stages: &[Stage]) -> Vec<(Vec<Vec<usize>>, usize)> {
        let numbers = |unit: &Unit| unit.members.iter().map(|m| m.convolution.number).collect();
        stages
            .iter()
            .map(|stage| (stage.units.iter().map(numbers).collect(), stage.pools.len()))
            .collect()
    }

    #[test]
    fn a_block_takes_two_stages_and_its_reductions_are_one_convolution() {
        let graph = block();
        let (stages, parts) = stages(&graph.network, &[true; 7], |node| match node {
            0 => 4,
            node => graph.network.nodes[node].channels,
        });
        // In the order of description: stem, one, reduced, three, reduced, five, four.
        let expected = vec![
            (vec![vec![0]], 0),
            (vec![vec![1, 2, 4]], 1),
            (vec![vec![3], vec![5], vec![6]], 0),
        ];
        assert_eq!(members(&stages), expected);
        let unit = &stages[1].units[0];
        let channels: Vec<_> = unit.members.iter().map(|m| m.channel).collect();
        assert_eq!((channels, unit.c_out), (vec![0, 16, 24], 48));
        // Each begins at a multiple of 64: 16·9·4, 48·16, 32·9·8, 16·25·24, 8·16.
        let lengths = [576, 768, 2304, 9600, 128];
        let begins: Vec<_> = stages
            .iter()
            .flat_map(|s| &s.units)
            .map(|u| u.weight)
            .collect();
        assert_eq!(begins, [0, 576, 1344, 3648, 13248]);
        assert_eq!(parts, [lengths.iter().sum::<usize>()]);
    }

    #[test]
    fn weights_take_a_new_part_once_one_holds_its_share() {
        let mut b = StaticGraphBuilder::new(16, (8, 8));
        let mut x = b.input();
        for kernel in [3, 1, 3] {
            x = b.conv2d_relu(x, 16, kernel, kernel / 2).unwrap();
        }
        let x = b.max_pool2d(x, MaxPool2dConfig::square(2, 2, 0)).unwrap();
        let graph = b.global_avg_pool2d(x).unwrap();
        let (stages, parts) = stages(&graph.network, &[true; 3], |_| 16);
        // 16·9·16, then 16·16 and again the first. A pooling has no weights, and begins no part.
        assert_eq!(parts, [2304, 256 + 2304]);
        let of_stages: Vec<_> = stages.iter().map(|s| s.part).collect();
        assert_eq!(of_stages, [0, 1, 1, 1]);
        let begins: Vec<_> = stages[1..3].iter().map(|s| s.units[0].weight).collect();
        assert_eq!(begins, [0, 256]);
    }

    #[test]
    fn a_convolution_that_trains_is_kept_apart_from_one_that_does_not() {
        let graph = block();
        let trainable = [true, true, false, true, true, true, true];
        let (stages, _) = stages(&graph.network, &trainable, |_| 16);
        assert_eq!(members(&stages)[1].0, vec![vec![1, 4], vec![2]]);
        assert!(!stages[1].units[1].trains);
    }
}
