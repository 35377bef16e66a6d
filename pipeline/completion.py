"""Completion for bash and zsh, from the table of options.

In: the name of a program and its options. Out: a script that the shell reads, as in
``source <(bindsnoop-replay --completion bash)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline import event

if TYPE_CHECKING:
    from pipeline.config import Option

_CUSTOM = "custom-columns="


def script(program: str, options: Iterable[Option], shell: str) -> str:
    """The completion script for ``bash`` or ``zsh``."""
    return _bash(program, list(options)) if shell == "bash" else _zsh(program, list(options))


def _bash(program: str, options: list[Option]) -> str:
    function = "_" + program.replace("-", "_")
    flags = " ".join(flag for option in options for flag in option.flags)
    cases = []
    for option in options:
        pattern = "|".join(option.flags)
        if option.kind.choices == ("true", "false"):
            cases.append(f"        {pattern}) [[ $equals ]] && words='true false' ;;")
        elif option.kind.choices:
            cases.append(f"        {pattern}) words='{' '.join(option.kind.choices)}' ;;")
        elif option.kind.paths:
            kind = "-d" if option.kind.paths == "directory" else "-f"
            cases.append(f"        {pattern}) paths={kind} ;;")
        else:
            cases.append(f"        {pattern}) [[ $cur == -* ]] || return ;;")
    body = "\n".join(cases)
    return f"""\
{function}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} flag=${{COMP_WORDS[COMP_CWORD-1]}} words='' equals='' done='' paths=''
    # "=" divides words: --layout=ig comes as three.
    if [[ $cur == = ]]; then
        cur='' equals=1
    elif [[ $flag == = ]]; then
        flag=${{COMP_WORDS[COMP_CWORD-2]}} equals=1
    fi
    if [[ $flag == custom-columns ]]; then
        [[ $cur == *,* ]] && done=${{cur%,*}},
        mapfile -t COMPREPLY < <(compgen -P "$done" -W '{" ".join(event.columns())}' -- "${{cur##*,}}")
        compopt -o nospace
        return
    fi
    case $flag in
{body}
    esac
    if [[ $paths ]]; then
        mapfile -t COMPREPLY < <(compgen "$paths" -- "$cur")
        compopt -o filenames
        return
    fi
    [[ $words ]] || words='{flags}'
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    [[ ${{COMPREPLY[*]}} == *= ]] && compopt -o nospace
}}
complete -F {function} {program}
"""


def _zsh(program: str, options: list[Option]) -> str:
    lines = []
    for option in options:
        about = option.help.replace("'", "'\\''").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
        kind = option.kind
        if kind.choices == ("true", "false"):
            value = ""
        else:
            if _CUSTOM in kind.choices:
                action = f"_{program}_output"
            elif kind.choices:
                action = f"({' '.join(kind.choices)})"
            else:
                action = {"file": "_files", "directory": "_files -/"}.get(kind.paths, " ")
            value = f":{option.name}:{action}"
        repeat = "*" if option.many else ""
        for flag in option.flags:
            others = "" if option.many else f"({' '.join(option.flags)})"
            sign = "" if not value else "=" if flag.startswith("--") else "+"
            lines.append(f"    '{others}{repeat}{flag}{sign}[{about}]{value}'")
    body = " \\\n".join(lines)
    forms = " ".join(
        choice
        for option in options
        if _CUSTOM in option.kind.choices
        for choice in option.kind.choices
        if choice != _CUSTOM
    )
    return f"""\
#compdef {program}
_{program}_output() {{
    if compset -P 'custom-columns='; then
        _values -s , column {" ".join(event.columns())}
    else
        compadd -S '' custom-columns=
        compadd {forms}
    fi
}}
_{program}() {{
    _arguments \\
{body}
}}
if [[ $funcstack[1] == _{program} ]]; then
    _{program} "$@"
else
    compdef _{program} {program}
fi
"""
