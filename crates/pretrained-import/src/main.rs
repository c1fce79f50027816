//! `pretrained-import`: torchvision's GoogLeNet as a safetensors file.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use inception_model::GoogLeNet;
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use pretrained_import::{
    AuxHeads, FetchOptions, MatchOptions, Report, Source, StateDict, can_be_written,
    match_googlenet, write_safetensors,
};
use sha2::{Digest, Sha256};
use verified_download::Event;

/// Turns the weights of torchvision's GoogLeNet into a safetensors file, verified and matched key by key.
///
/// Reads PyTorch's formats (legacy and zip) and safetensors. Nothing in a .pth file is ever run.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    /// torchvision (fetched and verified), a file, or a Hub repository as owner/name[@revision][:file]
    #[arg(default_value = "torchvision", value_name = "SOURCE")]
    source: Source,
    /// The file to write
    #[arg(
        long,
        value_name = "FILE",
        default_value = "weights/googlenet.safetensors"
    )]
    out: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    /// Fail where the two auxiliary heads are missing [default: keep them if the file has them]
    #[arg(long)]
    keep_aux: bool,
    /// Leave the two auxiliary heads out, as torchvision does after loading
    #[arg(long, conflicts_with = "keep_aux")]
    drop_aux: bool,
    /// Write what fits, whatever is missing, unexpected or misshapen
    #[arg(long)]
    no_strict: bool,
    /// The network expects mean and standard deviation 0.5 and not ImageNet's: no conversion in
    /// front of it. torchvision's own weights are used with the conversion
    #[arg(long)]
    no_transform_input: bool,
    /// Only list the tensors of the file, of any network
    #[arg(long, conflicts_with_all = ["out", "force", "keep_aux", "drop_aux", "no_strict"])]
    list: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Where fetched files are kept [default: PyTorch's and the Hub's own caches]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if !arguments.list {
        // Before anything is fetched.
        can_be_written(&arguments.out, arguments.force)?;
    }
    let found = find(arguments)?;
    let state = StateDict::read(&found.path)?;
    if arguments.list {
        return list(&state, arguments.json);
    }
    let options = MatchOptions {
        aux_heads: match (arguments.keep_aux, arguments.drop_aux) {
            (true, _) => AuxHeads::Keep,
            (_, true) => AuxHeads::Drop,
            _ => AuxHeads::AsInFile,
        },
        strict: !arguments.no_strict,
    };
    let matched = match_googlenet(&state, options)
        .with_context(|| format!("cannot import {}", found.path.display()))?;
    let sha256 = match found.sha256 {
        Some(sha256) => sha256,
        None => sha256_of(&found.path)?,
    };
    let transform_input = match state.metadata.get("transform_input") {
        Some(said) if !arguments.no_transform_input => said.clone(),
        _ => (!arguments.no_transform_input).to_string(),
    };
    let metadata = BTreeMap::from([
        ("architecture".into(), GoogLeNet::ARCHITECTURE.into()),
        ("classes".into(), matched.report.classes.to_string()),
        ("transform_input".into(), transform_input),
        ("source".into(), found.origin),
        ("source_sha256".into(), sha256),
        ("source_format".into(), state.format.to_string()),
        (
            "imported".into(),
            jiff::Timestamp::now().strftime("%FT%TZ").to_string(),
        ),
    ]);
    // What a safetensors file says beyond that, such as the names of its classes, is kept.
    let metadata = state.metadata.clone().into_iter().chain(metadata).collect();
    write_safetensors(&arguments.out, &matched.tensors, &metadata, arguments.force)?;
    match arguments.json {
        true => print_json(arguments, &metadata, &matched.report),
        false => print_report(arguments, &metadata, &matched.report),
    }
}

/// Shows a download as a bar in a terminal, and its beginning and end as lines.
fn find(arguments: &Arguments) -> Result<pretrained_import::FoundFile> {
    let mut options = FetchOptions::from_env();
    if let Some(dir) = &arguments.cache_dir {
        let kept = FetchOptions::new(dir);
        options.hub.cache = kept.hub.cache;
        options.torch_checkpoints = kept.torch_checkpoints;
    }
    let bar = ProgressBar::hidden();
    let found = arguments.source.find(&options, &mut |event| match event {
        // That all is as it should be is nothing to say each time.
        Event::Checking { .. } | Event::AlreadyComplete { .. } => {}
        Event::Transferring { .. } if io::stderr().is_terminal() => {
            bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(
                "{decimal_bytes:>10} of {decimal_total_bytes} {wide_bar} {decimal_bytes_per_sec}, {eta} left",
            ) {
                bar.set_style(style);
            }
        }
        Event::Progress { done, bytes } => {
            bar.set_length(bytes);
            bar.set_position(done);
        }
        event => {
            if matches!(event, Event::Complete { .. }) {
                bar.finish_and_clear();
            }
            if let Some(line) = event.message() {
                bar.suspend(|| eprintln!("{line}"));
            }
        }
    });
    bar.finish_and_clear();
    found.map_err(|error| {
        let advice = match error.is_for_want_of_a_network() {
            true => {
                ". Without a network, fetch the file elsewhere and name it: pretrained-import FILE"
            }
            false => "",
        };
        let source = arguments.source.in_errors();
        anyhow::Error::new(error).context(format!("cannot get {source}{advice}"))
    })
}

fn sha256_of(path: &Path) -> Result<String> {
    let read = || -> io::Result<Sha256> {
        let mut hasher = Sha256::new();
        let mut file = File::open(path)?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher),
                count => hasher.update(&buffer[..count]),
            }
        }
    };
    let hasher = read().with_context(|| format!("cannot read {}", path.display()))?;
    let digest = hasher.finalize();
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn list(state: &StateDict, json: bool) -> Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let tensors = state.tensors.iter().map(|(name, tensor)| {
            serde_json::json!({
                "name": name,
                "shape": tensor.dims(),
                "dtype": tensor.dtype().as_str(),
            })
        });
        let all = serde_json::json!({
            "format": state.format.to_string(),
            "metadata": state.metadata,
            "tensors": tensors.collect::<Vec<_>>(),
            "ignored": state.ignored,
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    for (name, tensor) in &state.tensors {
        let (dtype, dims) = (tensor.dtype().as_str(), tensor.dims());
        writeln!(out, "{name}  {dtype} {dims:?}")?;
    }
    let values: usize = state
        .tensors
        .values()
        .map(|tensor| tensor.elem_count())
        .sum();
    let count = state.tensors.len();
    writeln!(
        out,
        "{count} tensors with {values} values, {}",
        state.format
    )?;
    Ok(())
}

fn print_json(
    arguments: &Arguments,
    metadata: &BTreeMap<String, String>,
    report: &Report,
) -> Result<()> {
    let all = serde_json::json!({
        "out": arguments.out,
        "metadata": metadata,
        "report": report,
    });
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&all)?)?;
    Ok(())
}

fn print_report(
    arguments: &Arguments,
    metadata: &BTreeMap<String, String>,
    report: &Report,
) -> Result<()> {
    let mut out = io::stdout().lock();
    let said = |key: &str| metadata.get(key).map_or("", String::as_str);
    writeln!(out, "source      {}", said("source"))?;
    writeln!(
        out,
        "            {}, SHA-256 {}",
        said("source_format"),
        said("source_sha256")
    )?;
    let heads = match report.aux_heads {
        true => "with auxiliary heads",
        false => "without auxiliary heads",
    };
    writeln!(
        out,
        "network     torchvision's GoogLeNet, {} classes, {heads}",
        report.classes
    )?;
    writeln!(
        out,
        "tensors     {} loaded, {} missing, {} unexpected, {} misshapen",
        report.loaded.len(),
        report.missing.len(),
        report.unexpected.len(),
        report.misshapen.len()
    )?;
    let misshapen = report.misshapen.iter();
    let misshapen: Vec<String> = misshapen
        .map(|m| format!("{} {:?}, expected {:?}", m.name, m.found, m.expected))
        .collect();
    for (what, names) in [
        ("missing", &report.missing),
        ("unexpected", &report.unexpected),
        ("misshapen", &misshapen),
        ("filled with 0", &report.filled),
        ("left out", &report.ignored),
    ] {
        if !names.is_empty() {
            writeln!(out, "            {what}: {}", names.join(", "))?;
        }
    }
    if !report.dropped.is_empty() {
        let count = report.dropped.len();
        writeln!(out, "            {count} of the auxiliary heads left out")?;
    }
    for (dtype, count) in &report.converted {
        writeln!(out, "            {count} converted from {dtype}")?;
    }
    let shown = arguments.out.display();
    let size = std::fs::metadata(&arguments.out).map_or(0, |file| file.len());
    writeln!(out, "written     {shown} ({})", DecimalBytes(size))?;
    let path = arguments.out.to_string_lossy();
    // Only a zero byte cannot be quoted, and no path has one.
    let quoted = shlex::try_quote(&path).unwrap_or(Cow::Borrowed(&path));
    writeln!(
        out,
        "\nNext:\n  cargo run -p finetune-full -- --weights {quoted}"
    )?;
    writeln!(
        out,
        "  cargo run -p predict -- --weights {quoted} picture.jpg"
    )?;
    Ok(())
}
