//! The ring: tensors are summed while they go round.
//!
//! Of n values, each rank sends 2 · n · (ranks − 1) / ranks, whatever the number of ranks. The values
//! are cut into as many parts as there are ranks. In the first round a part is handed from rank to
//! rank and grows by each one's values, until it is complete; in the second the complete parts are
//! handed on. A part is summed once, in an order that is fixed, so that all ranks get the same bits.

use crate::error::Result;
use crate::shard;
use crate::wire::{Call, Link};

/// The neighbours in the ring.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) next: Link,
    pub(crate) previous: Link,
}

impl Ring {
    /// Replaces `values` by their sums over all ranks.
    pub(crate) fn all_reduce_sum(
        &self,
        values: &mut [f32],
        call: Call,
        rank: usize,
        world_size: usize,
    ) -> Result<()> {
        let len = values.len();
        let part = |number: usize| shard(len, number % world_size, world_size);
        let mut received = Vec::new();
        for turn in 0..world_size - 1 {
            let mine = part(rank + world_size - turn);
            let theirs = part(rank + 2 * world_size - turn - 1);
            self.pass_on(&values[mine], theirs.len(), call, &mut received)?;
            for (value, term) in values[theirs].iter_mut().zip(numbers(&received)) {
                *value += term;
            }
        }
        for turn in 0..world_size - 1 {
            let mine = part(rank + 1 + world_size - turn);
            let theirs = part(rank + world_size - turn);
            self.pass_on(&values[mine], theirs.len(), call, &mut received)?;
            for (value, sum) in values[theirs].iter_mut().zip(numbers(&received)) {
                *value = sum;
            }
        }
        Ok(())
    }

    fn pass_on(
        &self,
        values: &[f32],
        count: usize,
        call: Call,
        received: &mut Vec<u8>,
    ) -> Result<()> {
        let sent: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        received.resize(4 * count, 0);
        self.next.exchange(&self.previous, call, &sent, received)
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}
