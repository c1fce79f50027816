//! The table that a learner wants to see: what each layer makes of the picture.

use std::fmt;

use crate::cifar::{CifarGoogLeNet, Stage};
use crate::layers::{Conv, Inception};

/// One line of a [`Summary`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SummaryRow {
    /// Layer name, indented by its depth.
    pub layer: String,
    /// What it does.
    pub operation: String,
    /// Output shape of one picture.
    pub output: Vec<usize>,
    /// Trainable values.
    pub parameters: usize,
    /// Multiply-accumulates for one picture.
    pub macs: u64,
    /// Whether the row repeats what the rows below it add up to.
    is_total: bool,
}

/// The layers of a network with shapes, parameters and work for one picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Shape of the picture.
    pub input: Vec<usize>,
    /// One row per layer; an Inception block has a row of its own above those
    /// of its branches.
    pub rows: Vec<SummaryRow>,
}

impl Summary {
    /// Trainable values of the whole network.
    pub fn parameters(&self) -> usize {
        self.leaves().map(|row| row.parameters).sum()
    }

    /// Multiply-accumulates for one picture.
    pub fn macs(&self) -> u64 {
        self.leaves().map(|row| row.macs).sum()
    }

    fn leaves(&self) -> impl Iterator<Item = &SummaryRow> {
        self.rows.iter().filter(|row| !row.is_total)
    }
}

pub(crate) fn summarise(net: &CifarGoogLeNet, height: usize, width: usize) -> Summary {
    let mut rows = vec![conv_row("pre_layers", &net.stem, (height, width))];
    let (mut h, mut w) = (height, width);
    let mut last_block = "";
    for stage in &net.body {
        match stage {
            Stage::Block(block) => {
                last_block = block.name;
                rows.extend(block_rows(block, (h, w)));
            }
            Stage::MaxPool => {
                (h, w) = ((h.max(1) - 1) / 2 + 1, (w.max(1) - 1) / 2 + 1);
                let channels = rows.iter().rev().find(|row| row.is_total);
                let channels = channels.map_or(0, |row| row.output[0]);
                let name = format!("{last_block}.maxpool");
                rows.push(row(name, "max-pool 3×3, stride 2", vec![channels, h, w]));
            }
        }
    }
    let (classes, features) = (net.fc.weight.dims()[0], net.fc.weight.dims()[1]);
    rows.push(row("avgpool", "global average", vec![features]));
    rows.push(row("dropout", "dropout (training only)", vec![features]));
    rows.push(SummaryRow {
        parameters: net.fc.weight.elem_count() + net.fc.bias.elem_count(),
        macs: (classes * features) as u64,
        ..row("fc", "linear", vec![classes])
    });
    Summary {
        input: vec![3, height, width],
        rows,
    }
}

fn row(layer: impl Into<String>, operation: impl Into<String>, output: Vec<usize>) -> SummaryRow {
    SummaryRow {
        layer: layer.into(),
        operation: operation.into(),
        output,
        parameters: 0,
        macs: 0,
        is_total: false,
    }
}

fn conv_row(layer: &str, conv: &Conv, (h, w): (usize, usize)) -> SummaryRow {
    let dims = conv.weight.dims();
    SummaryRow {
        parameters: conv.weight.elem_count() + conv.bias.elem_count(),
        macs: (conv.weight.elem_count() * h * w) as u64,
        ..row(
            layer,
            format!("conv {}×{} + ReLU", dims[2], dims[3]),
            vec![dims[0], h, w],
        )
    }
}

fn block_rows(block: &Inception, size: (usize, usize)) -> Vec<SummaryRow> {
    let inputs = block.branch1.weight.dims()[1];
    let mut rows: Vec<SummaryRow> = Vec::new();
    for conv in block.convs() {
        let place = conv
            .name
            .trim_start_matches(block.name)
            .trim_start_matches('.');
        if conv.name == block.branch4.name {
            let shape = vec![inputs, size.0, size.1];
            rows.push(row("  branch4.0", "max-pool 3×3, stride 1", shape));
        }
        rows.push(conv_row(&format!("  {place}"), conv, size));
    }
    let widths = [
        &block.branch1,
        &block.branch2[1],
        &block.branch3[1],
        &block.branch4,
    ]
    .map(|conv| conv.weight.dims()[0]);
    let [c1, c2, c3, c4] = widths;
    let output: usize = widths.iter().sum();
    let total = SummaryRow {
        parameters: rows.iter().map(|r| r.parameters).sum(),
        macs: rows.iter().map(|r| r.macs).sum(),
        is_total: true,
        ..row(
            block.name,
            format!("Inception: {c1}+{c2}+{c3}+{c4} = {output}"),
            vec![output, size.0, size.1],
        )
    };
    rows.insert(0, total);
    rows
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = |dims: &[usize]| {
            let dims: Vec<String> = dims.iter().map(usize::to_string).collect();
            dims.join("×")
        };
        writeln!(
            f,
            "{:<14} {:<34} {:>11} {:>12} {:>15}",
            "layer", "operation", "output", "parameters", "MACs"
        )?;
        writeln!(f, "{:<14} {:<34} {:>11}", "input", "", shape(&self.input))?;
        for row in &self.rows {
            let number = |n: u64| if n == 0 { String::new() } else { grouped(n) };
            let line = format!(
                "{:<14} {:<34} {:>11} {:>12} {:>15}",
                row.layer,
                row.operation,
                shape(&row.output),
                number(row.parameters as u64),
                number(row.macs),
            );
            writeln!(f, "{}", line.trim_end())?;
        }
        write!(
            f,
            "{:<14} {:<34} {:>11} {:>12} {:>15}",
            "total",
            "",
            "",
            grouped(self.parameters() as u64),
            grouped(self.macs())
        )
    }
}

/// 1234567 → 1,234,567.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
