//! The paper's Table 1: widths of the nine Inception blocks.

/// Output channels of an Inception block's six convolutions, in the order of
/// the paper's columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockWidths {
    /// `#1×1`: branch 1.
    pub conv1x1: usize,
    /// `#3×3 reduce`: the 1×1 before branch 2's 3×3.
    pub reduce3x3: usize,
    /// `#3×3`: branch 2.
    pub conv3x3: usize,
    /// `#5×5 reduce`: the 1×1 before branch 3's 5×5.
    pub reduce5x5: usize,
    /// `#5×5`: branch 3.
    pub conv5x5: usize,
    /// `pool proj`: the 1×1 after branch 4's max-pool.
    pub pool_proj: usize,
}

impl BlockWidths {
    /// Channels of the concatenated output.
    pub const fn output(&self) -> usize {
        self.conv1x1 + self.conv3x3 + self.conv5x5 + self.pool_proj
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An Inception block.
    Block(BlockName, BlockWidths),
    /// A max-pool that halves the image; each network has its own window.
    MaxPool,
}

/// What the two networks call a block of the paper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockName {
    /// The lesson's name, such as `a3`.
    pub lesson: &'static str,
    /// torchvision's, such as `inception3a`.
    pub torchvision: &'static str,
}

const fn block(lesson: &'static str, torchvision: &'static str, widths: [usize; 6]) -> Entry {
    let [conv1x1, reduce3x3, conv3x3, reduce5x5, conv5x5, pool_proj] = widths;
    let widths = BlockWidths {
        conv1x1,
        reduce3x3,
        conv3x3,
        reduce5x5,
        conv5x5,
        pool_proj,
    };
    let name = BlockName {
        lesson,
        torchvision,
    };
    Entry::Block(name, widths)
}

/// Channels that enter the first block, in both networks.
pub const STEM_WIDTH: usize = 192;

/// The paper's blocks 3a … 5b and the pools between them, of both networks.
/// Input widths follow from the row before.
#[rustfmt::skip]
pub const BLOCKS: [Entry; 11] = [
    //                          1×1  3×3r  3×3  5×5r 5×5  pool
    block("a3", "inception3a", [ 64,   96, 128,  16,  32,  32]),
    block("b3", "inception3b", [128,  128, 192,  32,  96,  64]),
    Entry::MaxPool,
    block("a4", "inception4a", [192,   96, 208,  16,  48,  64]),
    block("b4", "inception4b", [160,  112, 224,  24,  64,  64]),
    block("c4", "inception4c", [128,  128, 256,  24,  64,  64]),
    block("d4", "inception4d", [112,  144, 288,  32,  64,  64]),
    block("e4", "inception4e", [256,  160, 320,  32, 128, 128]),
    Entry::MaxPool,
    block("a5", "inception5a", [256,  160, 320,  32, 128, 128]),
    block("b5", "inception5b", [384,  192, 384,  48, 128, 128]),
];

/// Channels that leave the last block. The heads of both networks read their means.
pub const FEATURES: usize = match BLOCKS[BLOCKS.len() - 1] {
    Entry::Block(_, widths) => widths.output(),
    Entry::MaxPool => panic!("the table ends with a block"),
};
