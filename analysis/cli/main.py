"""The `tandem` command line: paths in, folders out, no hidden state."""

from __future__ import annotations

import signal
import sys
from io import TextIOWrapper
from threading import current_thread, main_thread
from typing import Annotated, NoReturn

import typer

from analysis.cli import bench, compare, fidelity, policies, profile, run, serve, trace
from analysis.cli.options import Commands, option, with_groups
from traces.errors import TandemError, UnmetError

EPILOG = """
Examples:

  tandem trace synthetic --requests 1000 --rate 6 --out trace.parquet
  tandem simulate -t trace.parquet -p h100-80gb/llama-3-8b --out sim
  tandem serve --backend sim --profile h100-80gb/llama-3-8b --port 8000

Every command has a help: tandem simulate -h.

Exit status: 0 as asked; 1 asked for and not met (decisions differ, an error is outside, no request completed,
--strict); 2 bad input; 130 interrupted.
"""

app = Commands(name="tandem")
for group in (run, compare, serve, trace, profile, policies, bench, fidelity):
    app.add_typer(group.app)  # of one without a name, the commands are of the top level

EXTRAS = dict.fromkeys(
    ("gguf", "google", "pynvml", "safetensors", "sentencepiece", "torch", "transformers", "triton"), "engine"
) | dict.fromkeys(
    ("fastapi", "httptools", "jiter", "prometheus_client", "pydantic", "starlette", "uvicorn", "uvloop"), "serve"
)
"""What a simulation needs not -> the extra of the package that brings it."""


def _print_version(asked: bool) -> None:
    from importlib.metadata import version

    if asked:
        print(version("tandem-llm"))
        raise typer.Exit


@app.callback(epilog=EPILOG)
@with_groups
def tandem(
    version: Annotated[
        bool, option("Print the version and exit.", "--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Try an LLM serving policy in simulation, then on a real engine, and compare.

    One scheduler and one serving loop run on both backends.
    """


def main() -> None:
    """Entry point. An error that the user can mend becomes one line and exit status 2, or 1 if not met."""
    _print_in_any_locale()
    _end_as_by_ctrl_c()
    try:
        status = app(standalone_mode=False)
    except TandemError as error:
        _fail(str(error), 1 if isinstance(error, UnmetError) else 2)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _fail(f"this needs {error.name}, which is not installed: pip install 'tandem-llm[{EXTRAS[error.name]}]'", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), 2)  # bad usage, in click's words
    sys.exit(status if isinstance(status, int) else 0)


def _print_in_any_locale() -> None:
    """Characters that the terminal's encoding lacks are shown as question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _end_as_by_ctrl_c() -> None:
    """A batch system, a container and a closed terminal end a command as Ctrl-C does: it keeps what it recorded.

    They may send the signal several times. All but the first are ignored.
    """

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if current_thread() is main_thread() and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, interrupt)


def _fail(message: str, status: int) -> NoReturn:
    if message:  # click has none where it has printed the help instead
        print(f"tandem: {message}", file=sys.stderr)
    sys.exit(status)
