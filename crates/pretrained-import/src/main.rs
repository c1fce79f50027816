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
use pretrained_import::source::TORCHVISION_GOOGLENET;
use pretrained_import::{
    AuxHeads, FetchOptions, ImportError, MatchOptions, Report, Source, StateDict, can_be_written,
    first_of, match_googlenet, write_safetensors,
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
    /// Write that the network was trained with its input converted from ImageNet's mean and standard
    /// deviation to 0.5, as torchvision's googlenet(weights=…) does [default: what is known: of
    /// torchvision's own weights that they were, of others what the file says; else nothing is written]
    #[arg(long)]
    transform_input: bool,
    /// Write that it was trained without that conversion, as torchvision's googlenet() without
    /// weights is
    #[arg(long, conflicts_with = "transform_input")]
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
        return printed(list(&state, arguments.json));
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
    let conversion = Conversion::known(arguments, &state, &sha256, &found.path)
        .context("cannot import it unless --transform-input or --no-transform-input says which")?;
    // What a safetensors file says beyond that, such as the names of its classes, is kept.
    let mut metadata = state.metadata;
    metadata.remove("transform_input");
    if let Some(conversion) = &conversion {
        metadata.insert("transform_input".into(), conversion.is_done.to_string());
    }
    metadata.extend([
        ("architecture".into(), GoogLeNet::ARCHITECTURE.into()),
        ("classes".into(), matched.report.classes.to_string()),
        ("source".into(), found.origin),
        ("source_sha256".into(), sha256),
        ("source_format".into(), state.format.to_string()),
        (
            "imported".into(),
            jiff::Timestamp::now().strftime("%FT%TZ").to_string(),
        ),
    ]);
    write_safetensors(&arguments.out, &matched.tensors, &metadata, arguments.force)?;
    printed(match arguments.json {
        true => print_json(arguments, &metadata, &matched.report),
        false => print_report(arguments, &metadata, conversion.as_ref(), &matched.report),
    })
}

/// What came of printing. That a reader has gone away, such as `head`, is no failure.
fn printed(outcome: Result<()>) -> Result<()> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    match outcome {
        Err(error) if error.downcast_ref().is_some_and(gone) => Ok(()),
        outcome => outcome.context("cannot write to standard output"),
    }
}

/// Whether the network converts its input, torchvision's `transform_input`, and how that is known.
#[derive(Debug, PartialEq)]
struct Conversion {
    is_done: bool,
    known: &'static str,
}

impl Conversion {
    /// None where nobody says it: it is then left to the programs that use the weights, which say what they assume.
    /// What a file says that cannot be read is an error, unless a flag overrides it.
    fn known(
        arguments: &Arguments,
        state: &StateDict,
        sha256: &str,
        path: &Path,
    ) -> Result<Option<Self>, ImportError> {
        let (is_done, known) = if arguments.transform_input {
            (true, "--transform-input")
        } else if arguments.no_transform_input {
            (false, "--no-transform-input")
        } else {
            match state.transform_input(path)? {
                Some(said) => (said, "the file says so"),
                None if TORCHVISION_GOOGLENET.is(sha256) => (true, "torchvision's own weights"),
                None => return Ok(None),
            }
        };
        Ok(Some(Self { is_done, known }))
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
            "ignored": state.ignored.keys,
            "ignored_more": state.ignored.more,
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    for (name, tensor) in &state.tensors {
        let (dtype, dims) = (tensor.dtype().as_str(), tensor.dims());
        writeln!(out, "{}  {dtype} {dims:?}", name.escape_debug())?;
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
    conversion: Option<&Conversion>,
    report: &Report,
) -> Result<()> {
    let mut out = io::stdout().lock();
    print_origin(&mut out, metadata)?;
    print_network(&mut out, conversion, report)?;
    print_tensors(&mut out, report)?;
    let shown = arguments.out.display();
    let size = std::fs::metadata(&arguments.out).map_or(0, |file| file.len());
    writeln!(out, "written     {shown} ({})", DecimalBytes(size))?;
    print_next(&mut out, &arguments.out, report)?;
    Ok(())
}

fn print_origin(out: &mut impl Write, metadata: &BTreeMap<String, String>) -> io::Result<()> {
    let said = |key: &str| metadata.get(key).map_or("", String::as_str);
    writeln!(out, "source      {}", said("source"))?;
    writeln!(
        out,
        "            {}, SHA-256 {}",
        said("source_format"),
        said("source_sha256")
    )
}

fn print_network(
    out: &mut impl Write,
    conversion: Option<&Conversion>,
    report: &Report,
) -> io::Result<()> {
    let heads = match report.aux_heads {
        true => "with auxiliary heads",
        false => "without auxiliary heads",
    };
    writeln!(
        out,
        "network     torchvision's GoogLeNet, {} classes, {heads}",
        report.classes
    )?;
    let input = match conversion {
        Some(Conversion { is_done, known }) => {
            let converted = match is_done {
                true => "converted from ImageNet's normalisation to that of 0.5",
                false => "taken as it is, without a conversion",
            };
            format!("{converted} (transform_input={is_done}: {known})")
        }
        None => "not known whether it is converted, so the file says nothing of transform_input, and programs assume it \
                 is; say --transform-input or --no-transform-input"
            .into(),
    };
    writeln!(out, "input       {input}")
}

/// How many tensors there are, and which do not fit or are not as in the file.
fn print_tensors(out: &mut impl Write, report: &Report) -> io::Result<()> {
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
    /// All of them are in the JSON.
    const SHOWN: usize = 100;
    for (what, names, unlisted) in [
        ("missing", &report.missing, 0),
        ("unexpected", &report.unexpected, 0),
        ("misshapen", &misshapen, 0),
        ("filled with 0", &report.filled, 0),
        ("left out", &report.ignored.keys, report.ignored.more),
    ] {
        if !names.is_empty() {
            let names = first_of(names, SHOWN, unlisted);
            writeln!(out, "            {what}: {names}")?;
        }
    }
    if !report.dropped.is_empty() {
        let count = report.dropped.len();
        writeln!(out, "            {count} of the auxiliary heads left out")?;
    }
    for (dtype, count) in &report.converted {
        writeln!(out, "            {count} converted from {dtype}")?;
    }
    Ok(())
}

/// What can be done with the file that was written.
fn print_next(out: &mut impl Write, written: &Path, report: &Report) -> io::Result<()> {
    let misshapen = report.misshapen.iter().map(|found| &found.name);
    let mut gaps = report.missing.iter().chain(misshapen);
    // The programs do without these.
    if gaps.any(|name| !GoogLeNet::is_auxiliary(name)) {
        return writeln!(
            out,
            "\nIt is not whole: predict does not take it, nor does finetune-full if more than the head is missing"
        );
    }
    let path = written.to_string_lossy();
    // Only a zero byte cannot be quoted, and no path has one.
    let quoted = shlex::try_quote(&path).unwrap_or(Cow::Borrowed(&path));
    writeln!(
        out,
        "\nNext:\n  cargo run -p finetune-full -- --weights {quoted}"
    )?;
    writeln!(
        out,
        "  cargo run -p predict -- --weights {quoted} picture.jpg"
    )
}

#[cfg(test)]
mod tests {
    use pretrained_import::{Format, Ignored};

    use super::*;

    #[test]
    fn whether_the_input_is_converted_is_told_by_a_flag_the_file_or_torchvisions_hash_and_else_unknown()
     {
        let published = TORCHVISION_GOOGLENET.pin.hash().to_owned();
        let known = |flags: &str, said: Option<&str>, sha256: &str| {
            let line = ["pretrained-import"].into_iter();
            let arguments = Arguments::parse_from(line.chain(flags.split_whitespace()));
            let said = said.map(|said| ("transform_input".to_owned(), said.to_owned()));
            let state = StateDict {
                tensors: BTreeMap::new(),
                ignored: Ignored::default(),
                metadata: said.into_iter().collect(),
                format: Format::Safetensors,
            };
            let known = Conversion::known(&arguments, &state, sha256, Path::new("w.safetensors"));
            let known = known.map(|known| known.map(|conversion| conversion.is_done));
            known.map_err(|error| error.to_string())
        };
        let other = "0".repeat(64);
        for (flags, said, sha256, expected) in [
            ("", None, &published, Some(true)),
            ("", None, &other, None),
            ("", Some("false"), &other, Some(false)),
            ("", Some("True"), &other, Some(true)),
            ("--transform-input", Some("nein"), &other, Some(true)),
            ("--no-transform-input", Some("nein"), &other, Some(false)),
            ("--transform-input", Some("false"), &other, Some(true)),
            ("--no-transform-input", Some("true"), &other, Some(false)),
            ("--no-transform-input", None, &published, Some(false)),
        ] {
            let found = known(flags, said, sha256);
            assert_eq!(found, Ok(expected), "{flags:?}, {said:?}, {sha256}");
        }
        for said in ["nein", "1", ""] {
            let error = known("", Some(said), &published).unwrap_err();
            let expected = format!(
                "w.safetensors: transform_input is {said:?} in its metadata, and it must be true or false"
            );
            assert_eq!(error, expected);
        }
    }
}
