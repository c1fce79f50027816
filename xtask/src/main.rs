//! `cargo xtask <command>`: the project's own commands, a file or folder each.

mod bench;
mod cuda_check;
mod cuda_emulate;
mod cuda_stand_in;
mod download_data;
mod gpu_report;
mod record;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

/// The project's own commands
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
enum Command {
    DownloadData(download_data::DownloadData),
    CudaCheck(cuda_check::CudaCheck),
    CudaEmulate(cuda_emulate::CudaEmulate),
    GpuReport(gpu_report::GpuReport),
    /// Time our code beside PyTorch's
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::DownloadData(arguments) => download_data::run(arguments),
        Command::CudaCheck(check) => cuda_check::run(&check).map(|()| ExitCode::SUCCESS),
        Command::CudaEmulate(emulate) => cuda_emulate::run(&emulate).map(|()| ExitCode::SUCCESS),
        Command::GpuReport(report) => gpu_report::run(&report).map(|()| ExitCode::SUCCESS),
        Command::Bench(bench) => bench::run(&bench).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
