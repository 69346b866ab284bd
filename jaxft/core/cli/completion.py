"""Completion of command lines in bash, zsh and fish, from the tables of commands and keys."""

from collections.abc import Mapping

from jaxft.core.cli.commands import COMMANDS, DEBUG, HELP
from jaxft.core.cli.keys import ConfigKey, keys_of_task
from jaxft.core.configs.schema import CHOICES

SHELLS = ("bash", "zsh", "fish")
_BASH = """\
# Completion of jaxft for bash. Add to ~/.bashrc: eval "$(jaxft completion bash)"
_jaxft() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} option= words=
    local before=${{COMP_WORDS[COMP_CWORD-1]}}
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
    # bash splits --option=value into three words.
    if [[ $current == = ]]; then option=$before current=
    elif [[ $before == = ]]; then option=${{COMP_WORDS[COMP_CWORD-2]}}
    elif [[ $before == --* ]]; then option=$before
    fi
    case $option in
        {switches}) option= ;;
{values}
    esac
    if [[ -n $option ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{options}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
}}
complete -o default -F _jaxft jaxft
"""
_ZSH = """\
#compdef jaxft
# Completion of jaxft for zsh. Add to ~/.zshrc: eval "$(jaxft completion zsh)"
_jaxft() {{
    local -a found
    if (( CURRENT == 2 )); then
        found=({commands})
        _describe command found
        return
    fi
    case ${{words[CURRENT]}} in
{values}
        --*=*) compset -P '*='; _files; return ;;
        --*) ;;
        *) _files; return ;;
    esac
    case ${{words[2]}} in
{options}
    esac
    _describe -o option found -S ''
}}
compdef _jaxft jaxft
"""


def completion(shell: str, tasks: Mapping[str, type]) -> str:
    """Return the script of a shell. tasks: the dataclass of each task's own keys."""
    keys = {key.name: key for task in tasks for key in keys_of_task(task, tasks)}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](list(keys.values()))


def _choices(key: ConfigKey) -> tuple[str, ...]:
    return CHOICES.get(key.name) or (("True", "False") if key.kind == "switch" else ())


def _bash(keys: list[ConfigKey]) -> str:
    values = [f'        --config.{k.name}) words="{" ".join(_choices(k))}" ;;' for k in keys]
    switches, options = {f"--{HELP.name}", f"--{DEBUG.name}"}, []
    for name, command in COMMANDS.items():
        words = [f"--{one.name}" for one in (*command.options, DEBUG, HELP)]
        words += [f"--config.{key.name}=" for key in keys if command.keys]
        switches |= {f"--{one.name}" for one in command.options if not one.value}
        options.append(f'        {name}) words="{" ".join(words)}" ;;')
    return _BASH.format(
        commands=" ".join([*COMMANDS, "completion"]),
        switches="|".join(sorted(switches)),
        values="\n".join(values),
        options="\n".join(options),
    ).rstrip()


def _zsh(keys: list[ConfigKey]) -> str:
    values = [
        f"        --config.{key.name}=*) compset -P '*='; compadd {' '.join(_choices(key))};"
        " return ;;"
        for key in keys
        if _choices(key)
    ]
    options = []
    for name, command in COMMANDS.items():
        pairs = [
            (f"--{one.name}" + ("=" if one.value else ""), one.about)
            for one in (*command.options, DEBUG, HELP)
        ]
        pairs += [(f"--config.{key.name}=", key.about) for key in keys if command.keys]
        options.append(f"        {name}) found=({_described(pairs)}) ;;")
    commands = _described([(name, one.about) for name, one in COMMANDS.items()])
    return _ZSH.format(
        commands=commands, values="\n".join(values), options="\n".join(options)
    ).rstrip()


def _described(pairs: list[tuple[str, str]]) -> str:
    return " ".join(_literal(f"{word}:{about}") for word, about in pairs)


def _fish(keys: list[ConfigKey]) -> str:
    lines = ["# Completion of jaxft for fish: jaxft completion fish | source"]
    for name, command in COMMANDS.items():
        about = _literal(command.about.partition(". ")[0])
        lines.append(f"complete -c jaxft -f -n __fish_use_subcommand -a {name} -d {about}")
    for name, command in COMMANDS.items():
        start = f"complete -c jaxft -n '__fish_seen_subcommand_from {name}'"
        for one in (*command.options, DEBUG, HELP):
            kind = " -r" if one.value else ""
            lines.append(f"{start} -l {one.name}{kind} -d {_literal(one.about)}")
        for key in keys if command.keys else ():
            words = f" -f -a {_literal(' '.join(_choices(key)))}" if _choices(key) else ""
            lines.append(f"{start} -l config.{key.name} -r{words} -d {_literal(key.about)}")
    return "\n".join(lines)


def _literal(text: str) -> str:
    """Return a text as one word of a shell."""
    return "'" + text.replace("'", "") + "'"
