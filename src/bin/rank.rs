//! One rank of a Headroom job; see `headroom::rank`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(headroom::rank::main())
}
