//! The `culvert` binary: hands the command line to [`culvert::cli`] and turns its answer into an exit code.

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    culvert::cli::main()
}
