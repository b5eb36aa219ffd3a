//! The `launch` program; see [`launcher::command`].

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(launcher::command::main(std::env::args_os()))
}
