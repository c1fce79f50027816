//! The table that a learner wants to see: what each layer makes of the picture.

use std::fmt;

use candle_cnn::{Conv2dConfig, MaxPool2dConfig};

use crate::cifar::CifarGoogLeNet;
use crate::layers::{Conv, Inception, Stage};
use crate::torchvision::{
    AUX_POOL, AUX1_AFTER, AUX2_AFTER, AuxHead, ConvShape, LinearShape, Network, POOL3,
};

/// One line of a [`Summary`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SummaryRow {
    /// Layer name, indented by its depth.
    pub layer: String,
    /// What the layer does.
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
    let mut rows = vec![];
    let mut size = (height, width);
    rows.push(conv_row("pre_layers", &net.stem, &mut size));
    body_rows(&net.body, &mut size, &mut rows, |_, _| ());
    let (classes, features) = (net.fc.weight.dims()[0], net.fc.weight.dims()[1]);
    head_rows(features, classes, &mut rows);
    Summary {
        input: vec![3, height, width],
        rows,
    }
}

pub(crate) fn summarise_torchvision(
    net: &Network<ConvShape, LinearShape>,
    height: usize,
    width: usize,
) -> Summary {
    let mut size = (height, width);
    let mut rows = vec![conv_row("conv1", &net.conv1, &mut size)];
    rows.push(pool_row("maxpool1", &POOL3, net.conv1.outputs, &mut size));
    rows.push(conv_row("conv2", &net.conv2, &mut size));
    rows.push(conv_row("conv3", &net.conv3, &mut size));
    rows.push(pool_row("maxpool2", &POOL3, net.conv3.outputs, &mut size));
    body_rows(&net.body, &mut size, &mut rows, |block, rows| {
        let heads = [(AUX1_AFTER, "aux1"), (AUX2_AFTER, "aux2")];
        let heads = heads.iter().zip(net.aux.iter().flatten());
        for ((_, name), head) in heads.filter(|((after, _), _)| *after == block) {
            aux_rows(name, head, rows);
        }
    });
    head_rows(net.fc.inputs, net.fc.outputs, &mut rows);
    Summary {
        input: vec![3, height, width],
        rows,
    }
}

/// What the table says of a convolution and what belongs to it.
trait ConvLayer {
    fn name(&self) -> &str;
    /// (C_out, C_in, kernel, kernel).
    fn dims(&self) -> Vec<usize>;
    fn config(&self) -> Conv2dConfig;
    fn parameters(&self) -> usize;
    fn operation(&self) -> String;
}

impl ConvLayer for Conv {
    fn name(&self) -> &str {
        &self.name
    }

    fn dims(&self) -> Vec<usize> {
        self.weight.dims().to_vec()
    }

    fn config(&self) -> Conv2dConfig {
        self.config
    }

    fn parameters(&self) -> usize {
        self.weight.elem_count() + self.bias.elem_count()
    }

    fn operation(&self) -> String {
        let kernel = self.weight.dims()[2];
        format!("conv {kernel}×{kernel} + ReLU")
    }
}

impl ConvLayer for ConvShape {
    fn name(&self) -> &str {
        &self.name
    }

    fn dims(&self) -> Vec<usize> {
        self.dims()
    }

    fn config(&self) -> Conv2dConfig {
        self.config()
    }

    /// Weight, and batch norm's scale and shift.
    fn parameters(&self) -> usize {
        self.dims().iter().product::<usize>() + 2 * self.outputs
    }

    fn operation(&self) -> String {
        let stride = match self.stride {
            1 => String::new(),
            stride => format!("/{stride}"),
        };
        format!("conv {0}×{0}{stride} + BN + ReLU", self.kernel)
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

/// The row of a convolution, which changes the image's size.
fn conv_row(layer: &str, conv: &impl ConvLayer, size: &mut (usize, usize)) -> SummaryRow {
    let dims = conv.dims();
    let Conv2dConfig {
        stride, padding, ..
    } = conv.config();
    let output = |size: usize, padding: usize, stride: usize| {
        (size + 2 * padding).saturating_sub(dims[2]) / stride + 1
    };
    *size = (
        output(size.0, padding.0, stride.0),
        output(size.1, padding.1, stride.1),
    );
    SummaryRow {
        parameters: conv.parameters(),
        macs: (dims.iter().product::<usize>() * size.0 * size.1) as u64,
        ..row(layer, conv.operation(), vec![dims[0], size.0, size.1])
    }
}

/// The row of a max-pool, which changes the image's size.
fn pool_row(
    layer: &str,
    window: &MaxPool2dConfig,
    channels: usize,
    size: &mut (usize, usize),
) -> SummaryRow {
    let output = |size: usize, kernel: usize, padding: usize, stride: usize| {
        let room = (size + 2 * padding).saturating_sub(kernel);
        match window.ceil_mode {
            true => room.div_ceil(stride) + 1,
            false => room / stride + 1,
        }
    };
    let MaxPool2dConfig {
        kernel_size: kernel,
        stride,
        padding,
        ..
    } = *window;
    *size = (
        output(size.0, kernel.0, padding.0, stride.0),
        output(size.1, kernel.1, padding.1, stride.1),
    );
    let operation = format!("max-pool {0}×{0}, stride {1}", kernel.0, stride.0);
    row(layer, operation, vec![channels, size.0, size.1])
}

/// The rows of blocks and pools; `after_block` may add some behind a block.
fn body_rows<C: ConvLayer>(
    body: &[Stage<C>],
    size: &mut (usize, usize),
    rows: &mut Vec<SummaryRow>,
    after_block: impl Fn(&str, &mut Vec<SummaryRow>),
) {
    let mut channels = 0;
    for stage in body {
        match stage {
            Stage::Block(block) => {
                let block_rows = block_rows(block, *size);
                channels = block_rows[0].output[0];
                rows.extend(block_rows);
                after_block(block.name, rows);
            }
            Stage::MaxPool { name, window } => rows.push(pool_row(name, window, channels, size)),
        }
    }
}

fn block_rows<C: ConvLayer>(block: &Inception<C>, size: (usize, usize)) -> Vec<SummaryRow> {
    let inputs = block.branch1.dims()[1];
    let mut rows: Vec<SummaryRow> = Vec::new();
    for conv in block.convs() {
        let place = conv.name().trim_start_matches(block.name);
        let place = place.trim_start_matches('.');
        if conv.name() == block.branch4.name() {
            let shape = vec![inputs, size.0, size.1];
            rows.push(row("  branch4.0", "max-pool 3×3, stride 1", shape));
        }
        // Stride 1 and "same" padding throughout: the size stays.
        rows.push(conv_row(&format!("  {place}"), conv, &mut size.clone()));
    }
    let widths = [
        &block.branch1,
        &block.branch2[1],
        &block.branch3[1],
        &block.branch4,
    ]
    .map(|conv| conv.dims()[0]);
    let [c1, c2, c3, c4] = widths;
    let output: usize = widths.iter().sum();
    let operation = format!("Inception: {c1}+{c2}+{c3}+{c4} = {output}");
    let shape = vec![output, size.0, size.1];
    let total = total_row(row(block.name, operation, shape), &rows);
    rows.insert(0, total);
    rows
}

fn total_row(total: SummaryRow, rows: &[SummaryRow]) -> SummaryRow {
    SummaryRow {
        parameters: rows.iter().map(|r| r.parameters).sum(),
        macs: rows.iter().map(|r| r.macs).sum(),
        is_total: true,
        ..total
    }
}

fn linear_row(layer: &str, operation: &str, inputs: usize, outputs: usize) -> SummaryRow {
    SummaryRow {
        parameters: (inputs + 1) * outputs,
        macs: (inputs * outputs) as u64,
        ..row(layer, operation, vec![outputs])
    }
}

fn aux_rows(name: &str, head: &AuxHead<ConvShape, LinearShape>, rows: &mut Vec<SummaryRow>) {
    let mut size = (AUX_POOL, AUX_POOL);
    let (fc1, fc2) = (&head.fc1, &head.fc2);
    let pooled = vec![head.conv.inputs, size.0, size.1];
    let layers = [
        row("  avgpool", "adaptive average", pooled),
        conv_row("  conv", &head.conv, &mut size),
        linear_row("  fc1", "linear + ReLU", fc1.inputs, fc1.outputs),
        row("  dropout", "dropout", vec![fc1.outputs]),
        linear_row("  fc2", "linear", fc2.inputs, fc2.outputs),
    ];
    let operation = "auxiliary head (training only)";
    rows.push(total_row(row(name, operation, vec![fc2.outputs]), &layers));
    rows.extend(layers);
}

fn head_rows(features: usize, classes: usize, rows: &mut Vec<SummaryRow>) {
    rows.push(row("avgpool", "global average", vec![features]));
    rows.push(row("dropout", "dropout (training only)", vec![features]));
    rows.push(linear_row("fc", "linear", features, classes));
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
