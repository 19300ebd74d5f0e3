"""What a terminal, a pipe and a shell get: nothing raw from files, no traceback, exit codes by convention."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import pytest

from marks import quick
from upcycle import cli
from upcycle.cli import bars, screen
from upcycle.errors import UpcycleError, printable
from upcycle.system.wording import quoted

EVIL = "a\n\x1b[31mb\x1b]0;title\x07 :bug: [red]c[/red] ‮\u200bé"


@pytest.fixture(autouse=True)
def _interruptible():
    """A shell starts what runs in the background with SIGINT ignored, and Python leaves it at that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def upcycle(*args: object, shell: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, or a line of a shell in which $UPCYCLE is it."""
    line = [sys.executable, "-m", "upcycle", *map(str, args)]
    env = {**os.environ, **environment, "UPCYCLE": shlex.join(line[:3])}
    if shell:
        return subprocess.run(["bash", "-c", shell], capture_output=True, env=env, timeout=120)
    return subprocess.run(line, capture_output=True, env=env, timeout=120)


def fails_with(error: BaseException, monkeypatch, capsys) -> tuple[int, str]:
    """The exit code and the message of a command in which an error comes up."""
    from upcycle.cli import catalogue

    def raises():
        raise error

    monkeypatch.setattr(catalogue, "everything", raises)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["list"])
    return exit_.value.code, capsys.readouterr().err


def test_printable():
    assert printable("plain, é, 日本") == "plain, é, 日本"
    assert printable("a\n\x1b[31m\x9b\u202e\udcff") == r"a\n\x1b[31m\x9b\u202e\udcff"


def test_nothing_of_a_name_reaches_the_terminal_raw(capsys, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(screen.out, "_file", shown)
    table = screen.grid(EVIL, "a", EVIL)
    table.add_row(EVIL, EVIL)
    screen.out.print(table)
    screen.out.print(EVIL)
    screen.show_warnings([EVIL])
    got = shown.getvalue()
    assert ":bug:" in got
    assert "[red]c[/red]" in got
    assert not set("\x1b\x07‮\u200b") & set(got)


def test_errors_are_printable(monkeypatch, capsys):
    code, said = fails_with(UpcycleError(EVIL), monkeypatch, capsys)
    assert code == 2
    assert said.startswith(r"upcycle: error: a\n\x1b[31mb")
    assert said.count("\n") == 1


def test_a_narrow_terminal_cuts_no_number():
    shown = io.StringIO()
    table = screen.grid("", "layer", "cosine between")
    table.add_row("0", "0.9987 (0.9876..0.9999)")
    screen.Screen(file=shown, width=16).print(table)
    last_words = [line.split()[-1] for line in shown.getvalue().splitlines() if line.strip()]
    assert "".join(last_words).endswith("0.9987(0.9876..0.9999)")


@pytest.mark.parametrize(
    "word", ["plain/path", "a b", ":bug:", "-dash", "it's", "$(x)", "a\nb", "a\\'\tb", "é\x1b"]
)
def test_commands_for_copying_are_quoted(word):
    line = f"printf %s {quoted(word)}"
    assert line.isprintable()
    got = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert got == (f"./{word}" if word.startswith("-") else word)


def test_a_converted_folder_of_an_odd_name(dense, tmp_path, capsys):
    source, out = Path(shutil.copytree(dense("llama"), tmp_path / "a :bug: b")), tmp_path / "-it's"
    cli.main(["convert", str(source), str(out)])
    said = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(said)[-2:] == [str(source), str(out)]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_console_that_cannot_print_a_character(encoding, dense, tmp_path, monkeypatch):
    source = shutil.copytree(dense("llama"), tmp_path / "日本 ±")
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(screen.out, "_file", stream)
    cli.main(["convert", str(source), str(tmp_path / "moe")])
    stream.flush()
    assert "日本 ±".encode(encoding, "backslashreplace") in raw.getvalue()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (MemoryError(), 2, "the memory does not reach"),
        (OSError(errno.ENOSPC, "No space left", "x.bin"), 2, "error: x.bin: No space left; make room"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), 2, "error: a to b: Invalid link"),
        (ValueError("embedded null byte"), 2, "a path holds a NUL character"),
        (ValueError("odd"), 3, "internal error: ValueError: odd"),
        (ZeroDivisionError(), 3, "UPCYCLE_TRACEBACK=1"),
    ],
)  # fmt: skip
def test_exit_codes(error, code, said, monkeypatch, capsys):
    got, err = fails_with(error, monkeypatch, capsys)
    assert got == code
    assert said in err
    assert "Traceback" not in err
    assert err.count("\n") == bool(said)


def test_a_full_disk_names_the_file_that_was_open(tmp_path, monkeypatch, capsys):
    from upcycle.cli import catalogue

    def writes():
        with (tmp_path / "big.bin").open("w") as file:
            file.write("x")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(catalogue, "everything", writes)
    with pytest.raises(SystemExit):
        cli.main(["list"])
    assert f"{tmp_path / 'big.bin'}: No space left on device; make room" in capsys.readouterr().err


def test_a_fault_shows_where_it_comes_from_if_asked(monkeypatch, capsys):
    monkeypatch.setenv("UPCYCLE_TRACEBACK", "1")
    assert "Traceback" in fails_with(ValueError("odd"), monkeypatch, capsys)[1]


def test_verify_that_breaks_is_no_verdict(monkeypatch, capsys, dense, tmp_path):
    from upcycle import verification

    monkeypatch.setattr(verification, "verify", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", "a", "b"])
    assert exit_.value.code == 3


def test_ctrl_c_is_ctrl_c_whatever_a_library_makes_of_it(monkeypatch, capsys):
    from upcycle.cli import catalogue

    def interrupted():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RuntimeError("a library turned it into this") from None

    monkeypatch.setattr(catalogue, "everything", interrupted)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["list"])
    assert exit_.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("own_code", [None, 0, 1])
def test_ctrl_c_that_python_drops_is_no_success(own_code, monkeypatch, capsys):
    """As it does in a callback of the import system: it writes 'Exception ignored in' and goes on."""
    from upcycle.cli import catalogue

    everything = catalogue.everything

    def goes_on():
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        if own_code is not None:
            sys.exit(own_code)
        return everything()

    monkeypatch.setattr(catalogue, "everything", goes_on)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["list"])
    assert exit_.value.code == 130
    assert capsys.readouterr().err == f"upcycle: {cli.GO_ON}\n"


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        ("$UPCYCLE list | head -1; exit ${PIPESTATUS[0]}", {0, 141}),
        pytest.param("$UPCYCLE list >&-", {0}, marks=pytest.mark.slow),
        ("$UPCYCLE list --json >/dev/full", {2}),
        pytest.param("$UPCYCLE plan nowhere 2>&-", {2}, marks=pytest.mark.slow),
        ("$UPCYCLE list >&- 2>&-", {0}),
        pytest.param("PYTHONIOENCODING=ascii LC_ALL=C $UPCYCLE list", {0}, marks=pytest.mark.slow),
    ],
)
def test_outputs_that_nobody_takes(line, codes):
    got = upcycle(shell=line)
    assert got.returncode in codes, got.stderr
    assert b"Traceback" not in got.stderr
    assert b"Exception ignored" not in got.stderr


@pytest.mark.parametrize("wait", [0.1, 0.2, 0.35, 0.6])
def test_ctrl_c_early_in_a_command(wait):
    process = subprocess.Popen(
        [sys.executable, "-m", "upcycle", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # Before Python has come to our first line it is Python's own: killed by the signal.
    assert process.returncode in (0, 130, 1, -signal.SIGINT)
    if process.returncode == 1:
        assert b"upcycle/cli/program" not in err


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    shown, now = io.StringIO(), [0.0]
    monkeypatch.setattr(screen.err, "_file", shown)
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with bars.Bars().work("decoding", "examples") as work:
        work.total(50_000)
        for _ in range(50):
            now[0] += 1
            work.advance(1000)
    assert shown.getvalue().splitlines() == [
        f"decoding: {n:,} of 50,000, {n // 500}%" for n in (10_000, 20_000, 30_000, 40_000, 50_000)
    ]
    shown.truncate(0)
    with bars.Bars().work("writing", "bytes") as work:
        work.advance(10)
    assert shown.getvalue() == ""


def test_json_of_odd_texts_is_json(capsys):
    screen.show_json({"a": EVIL + "\udcff"})
    assert json.loads(capsys.readouterr().out)["a"].startswith("a\n")


COMMANDS = ["plan", "convert", "verify", "inspect", "calibrate", "eval", "train"]


@pytest.mark.parametrize("command", quick(COMMANDS, "convert", "verify"))
def test_ctrl_c_in_the_middle_of_a_command(command, trainable, tmp_path):
    """At any moment: 130 and one sentence, or the command was done before."""
    source, text = trainable
    source = shutil.copytree(source, tmp_path / "source")
    cli.main(["convert", str(source), str(tmp_path / "moe"), "--experts", "2"])
    (tmp_path / "run.toml").write_text(
        f'source = "{source}"\nout = "OUT"\ntrain = {{steps = 3, batch_tokens = 256, sequence_length = 64}}\n'
        f'schedule.peak = 1e-3\ndata.sources = [{{path = "{text}"}}]\nmoe.num_experts = 2\n'
    )
    seen = set()
    # Once to its end: libraries must not be stopped while they are imported, and imported again.
    for number, moment in enumerate((0, 0.002, 0.02, 0.1, 0.2, 0.4, 0.8)):
        out = tmp_path / f"out-{number}"
        arguments = {
            "plan": [source],
            "convert": [source, out, "--experts", "4"],
            "verify": [source, tmp_path / "moe"],
            "inspect": [tmp_path / "moe"],
            "calibrate": [source, "--text", text, "--limit", 64, "--out", out.with_suffix(".safetensors")],
            "eval": [source, "--text", text, "--limit", 8],
            "train": [tmp_path / "run.toml", "--set", f"out={out}"],
        }[command]
        if not number:
            with suppress(SystemExit):  # `verify` ends with its verdict
                cli.main([command, *map(str, arguments)])
            continue
        seen.add(_stopped(moment, tmp_path / "said", command, *arguments))
        err = (tmp_path / "said").read_text()
        assert "Traceback" not in err
        assert "internal error" not in err
    assert seen <= {0, 130}
    assert 130 in seen


def _stopped(moment: float, said: Path, *command: object) -> int:
    """The exit code of a command that Ctrl-C stops after so many seconds; what it prints goes to `said`.

    It runs in a process of its own: an interrupt may come between the entry of a context and its body, and
    leave torch without gradients.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code: object = 0
    with said.open("w") as file:
        sys.stdout = sys.stderr = file
        try:
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, moment)
            cli.main([str(word) for word in command])
        except SystemExit as exit_:
            code = exit_.code
        except KeyboardInterrupt:  # it came when the command was done
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 99
        file.flush()
    os._exit(code if isinstance(code, int) else 0)
