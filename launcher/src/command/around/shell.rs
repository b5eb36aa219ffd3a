//! `launch completions` and `launch man`: made from the same definition as the command line itself.

use super::super::{Error, io, print, shown};
use crate::cli::{self, CliError, CompletionsArgs, ManArgs};
use spec::contract::exit;

/// Keys of configs, for bash: clap knows options, not what stands behind `--set`. `compgen -W` runs what stands in `$(…)`, so a
/// name with such characters is none.
const BASH_KEYS: &str = r#"
_launch_keys() { launch help --markdown 2>/dev/null | sed -n 's/^| `\([a-z_0-9.]*\)`.*/\1=/p'; }
_launch_names() { ls "$1" 2>/dev/null | grep -E '^[A-Za-z0-9_.-]+$'; }
_launch_values() {
    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}"
    case "$prev" in
        --set) COMPREPLY=($(compgen -W "$(_launch_keys)" -- "$cur")); compopt -o nospace; return ;;
        --config) COMPREPLY=($(compgen -f -X '!*.yaml' -- "$cur") $(compgen -W "$(_launch_names configs | sed -n 's/\.yaml$//p')" -- "$cur")); return ;;
        --name|--run|report|compare|analyze|doctor|predict|evaluate|export-metrics)
            COMPREPLY=($(compgen -W "$(_launch_names runs)" -- "$cur")); [ ${#COMPREPLY[@]} -gt 0 ] && return ;;
    esac
    _launch "$@"
}
complete -F _launch_values -o nosort -o bashdefault -o default launch 2>/dev/null || complete -F _launch_values -o bashdefault -o default launch
"#;

pub(super) fn completions(args: &CompletionsArgs) -> Result<u8, Error> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut cli::definition(), "launch", &mut text);
    let mut text = String::from_utf8_lossy(&text).into_owned();
    if args.shell == clap_complete::Shell::Bash {
        text.push_str(BASH_KEYS);
    }
    print::out(text)?;
    Ok(exit::OK)
}

/// A page by its verb.
fn page(command: &clap::Command, name: String) -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    let command = command.clone().bin_name(name.replacen('-', " ", 1)).display_name(name.clone());
    let man = clap_mangen::Man::new(command.version(env!("CARGO_PKG_VERSION"))).title(name);
    man.render(&mut text).map_err(io("cannot write a manual page", exit::INTERNAL))?;
    Ok(text)
}

pub(super) fn man(args: &ManArgs) -> Result<u8, Error> {
    let mut command = cli::definition();
    command.build();
    let find = |verb: &str| command.find_subcommand(verb);
    if let Some(out) = &args.out {
        let write = |name: &str, text: Vec<u8>| {
            let path = out.join(format!("{name}.1"));
            std::fs::write(&path, text).map_err(io(format!("cannot write {}", shown(&path)), exit::USAGE))
        };
        std::fs::create_dir_all(out).map_err(io(format!("cannot make {}", shown(out)), exit::USAGE))?;
        write("launch", page(&command, "launch".into())?)?;
        for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let name = format!("launch-{}", verb.get_name());
            write(&name, page(verb, name.clone())?)?;
        }
        print::out(shown(out))?;
        return Ok(exit::OK);
    }
    let text = match &args.verb {
        None => page(&command, "launch".into())?,
        Some(verb) => match find(verb) {
            Some(of) => page(of, format!("launch-{verb}"))?,
            None => return Err(CliError::Usage(format!("{verb} is no verb of launch: see launch --help")).into()),
        },
    };
    print::out(String::from_utf8_lossy(&text))?;
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page_and_bash_completes_it() {
        let dir = tempfile::tempdir().unwrap();
        let args = ManArgs { verb: None, out: Some(dir.path().join("man1")) };
        assert_eq!(man(&args).unwrap(), exit::OK);
        let text = std::fs::read_to_string(dir.path().join("man1/launch-plan.1")).unwrap();
        assert!(text.contains(".TH launch-plan 1") && text.contains("write\\-machine"), "{text}");
        let verbs = dir.path().join("man1").read_dir().unwrap().count();
        assert!(verbs > 12, "{verbs}");
        assert!(man(&ManArgs { verb: Some("nonsense".into()), out: None }).is_err());
        let mut text = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut cli::definition(), "launch", &mut text);
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("export-metrics") && text.contains("--max-restarts"), "{text}");
    }

    #[test]
    fn a_folders_name_is_completed_and_never_run() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["night", "$(touch hit)"] {
            std::fs::create_dir_all(dir.path().join("runs").join(name)).unwrap();
        }
        let ask = "COMP_WORDS=(launch report ''); COMP_CWORD=2; _launch_values; echo ${COMPREPLY[@]}";
        let script = format!("_launch() {{ :; }}\n{BASH_KEYS}\n{ask}");
        let Ok(done) = std::process::Command::new("bash").args(["-c", &script]).current_dir(dir.path()).output() else {
            return println!("no bash here");
        };
        assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), "night");
        assert!(!dir.path().join("hit").exists());
    }
}
