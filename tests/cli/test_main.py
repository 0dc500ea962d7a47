"""The command line as a whole: help, completion, exit codes, errors."""

import json
import subprocess
import sys

import pytest

from hf_gg.cli.main import COMMANDS, build_parser, main


def actions(name):
    parser = build_parser(load=[name])
    (commands,) = (action for action in parser._actions if action.dest == "command")
    return commands.choices[name]


def test_help_lists_commands_examples_and_exit_codes(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, line) in COMMANDS.items():
        assert name in text and line in text
    assert "examples:" in text and "exit codes:" in text
    assert main([]) == 0 and capsys.readouterr().out == text


def test_help_is_quick():
    """No command's module is imported for the list of commands."""
    code = "import sys; from hf_gg.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_debug_and_a_text(name):
    parser = actions(name)
    options = {option for action in parser._actions for option in action.option_strings}
    assert {"--json", "--debug", "--help"} <= options
    assert len(parser.description.splitlines()) > 2
    assert all(action.help for action in parser._actions)


def test_unknown_command(capsys):
    assert main(["quantise"]) == 2
    assert "invalid choice: 'quantise'" in capsys.readouterr().err


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [ValueError("bad\nvalue"), KeyError("x")])
def test_errors(monkeypatch, capsys, error, before):
    def run(args):
        raise error

    monkeypatch.setattr("hf_gg.cli.completion.run", run)
    assert main(["completion", "bash"]) == 1
    shown = capsys.readouterr()
    expected = "bad value" if isinstance(error, ValueError) else "unexpected KeyError: 'x' (--debug shows where)"
    assert shown.err == f"hf-gg completion: error: {expected}\n" and shown.out == ""
    with pytest.raises(type(error)):
        main(["--debug", "completion", "bash"] if before else ["completion", "--debug", "bash"])


def test_interrupted(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_gg.cli.completion.run", run)
    assert main(["completion", "bash"]) == 130
    assert capsys.readouterr().err == "hf-gg: interrupted\n"


@pytest.mark.parametrize("size", [10, 100_000])
def test_results_that_cannot_be_written_are_an_error(size):
    """As with a full disk; also what is only written when Python ends."""
    code = (
        "import sys, hf_gg.cli.completion as c; from hf_gg.cli import main; "
        f"c.run = lambda args: print('x' * {size}); sys.exit(main(['completion', 'bash']))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "hf-gg completion: error: " in done.stderr, done.stderr
    assert "No space left on device" in done.stderr


def complete(script, *words):
    """What bash offers for the last word."""
    line = " ".join(words)
    code = (
        f"source {script}; COMP_WORDS=({' '.join(repr(w) for w in words)}); COMP_CWORD={len(words) - 1}; "
        f"COMP_LINE={line!r}; COMP_POINT={len(line)}; $(complete -p hf-gg | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_completion_in_bash(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "hf-gg.bash"
    script.write_text(capsys.readouterr().out)
    assert set(COMMANDS) <= set(complete(script, "hf-gg", ""))
    assert complete(script, "hf-gg", "compress", "--target-b") == ["--target-bits"]
    assert set(complete(script, "hf-gg", "compress", "m", "o", "--coding", "")) >= {"rans", "eg0"}
    (tmp_path / "checkpoint").mkdir()
    assert complete(script, "hf-gg", "inspect", f"{tmp_path}/check") == [f"{tmp_path}/checkpoint"]


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh", "powershell"])
def test_completion_of_other_shells(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shell"] == shell and "target-bits" in found["script"]


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install shtab" in capsys.readouterr().err
