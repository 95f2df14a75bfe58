"""The command line: one module per verb, thin over the Python API."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
import traceback
import warnings
from contextlib import suppress
from importlib import import_module

import typer

import flashmoe
from flashmoe.cli import streams
from flashmoe.cli.progress import print_error, stderr_console
from flashmoe.common.memory import address_room, spare_addresses
from flashmoe.common.signals import ended_by_signals
from flashmoe.common.units import format_bytes
from flashmoe.errors import FlashMoEError, FlashMoEWarning

_COLLECT_AFTER = 20_000  # new objects, in place of Python's 700: imports make hundreds of thousands that stay
_LEAST_ROOM = 256 << 20  # of addresses: LLVM's library takes more than half of it
_PREFIXES = {"huggingface_hub": "HF_"}  # of the variables that a package reads, where it is not its name
_python_warning = warnings.formatwarning
#: Each is a function of the module of its name, or of the one in _MODULES; of a group it is the module's `app`.
_COMMANDS = (
    "run", "chat", "serve", "batch", "pack", "verify", "doctor", "plan", "quality", "learn", "simulate", "policies",
    "predictors",
)  # fmt: skip
_MODULES = {"policies": "listing", "predictors": "listing"}
_GROUPS = ("bench", "engine", "trace", "train")


def make_app(only: str | None = None) -> typer.Typer:
    """The command line; of one command where `only` is its name, as all together take longer to make than to run."""
    app = typer.Typer(
        name="flashmoe",
        help="Run Mixture-of-Experts models larger than RAM, their experts streamed from the SSD.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback(invoke_without_command=True)(_root)
    names = (*_COMMANDS, *_GROUPS)
    for name in (only,) if only in names else names:
        module = import_module(f"{__name__}.{_MODULES.get(name, name)}")
        if name in _GROUPS:
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, name))
    return app


def _root(
    show_version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True),
) -> None:
    if show_version:
        print(f"flashmoe {flashmoe.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: an error that the user can mend is one line on stderr and exit status 1 or 2."""
    warnings.formatwarning = _warning
    _spare_processor()
    streams.prepare()
    spare_addresses()
    try:
        _check_folder()
        with ended_by_signals():
            make_app(next(iter(sys.argv[1:]), None))()
    except FlashMoEError as error:
        print_error(stderr_console(quiet=False), error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        reason = _limit(error) or _import_failure(error)
        if reason is None:
            raise
        print_error(stderr_console(quiet=False), FlashMoEError(reason))
        _drop_output()
        sys.exit(1)


def _spare_processor() -> None:
    """A fifth of the time of a short command went into looking for garbage where there is none."""
    gc.set_threshold(_COLLECT_AFTER)
    atexit.register(gc.freeze)  # nor at the end, twice, when the system takes all back
    # numpy's threads would wait for work by spinning, a tenth of a second from their start and after each product
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def _check_folder() -> None:
    """Raise FlashMoEError where the current folder is gone: not even compilers work in such a one."""
    try:
        os.getcwd()
    except OSError:
        raise FlashMoEError("the current folder is not there any more: cd to another one") from None


def _limit(error: BaseException) -> str | None:
    """Which limit of the system an error is, and what to do; None where it is another error."""
    if isinstance(error, MemoryError):
        return "the system refuses memory: give a smaller --ram or --cache, or lift a limit (ulimit -v)"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "the system refuses a thread: raise its limits (ulimit -u, ulimit -v)"
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"the output cannot be written ({os.strerror(code)})"
    if code in (errno.EMFILE, errno.ENFILE):
        return f"{os.strerror(code)}: raise the limit (ulimit -n)"
    if code and isinstance(error, OSError) and isinstance(error.filename, str | bytes):
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if (room := address_room()) and room[0] < _LEAST_ROOM:  # libraries fail in ways of their own
        return f"{room[1]} leaves {format_bytes(room[0])} of addresses, too little for libraries: raise it ({error})"
    return None


def _import_failure(error: BaseException) -> str | None:
    """Which package of others cannot be loaded, and what in the environment may be why: several read variables then,
    and fail at a value that is none. None where it is another error."""
    frames = [
        frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"
    ]
    package = str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""
    if package in ("", "__main__", "flashmoe"):
        return None
    prefix = _PREFIXES.get(package, package.upper() + "_")
    # not their values: tokens are among them
    named = [name for name in os.environ if name.startswith(prefix)]
    todo = (
        f"unset or mend {', '.join(named)}" if named else "look at the environment (env), or install it again"
    )
    return f"{package} cannot be loaded ({str(error) or type(error).__name__}): {todo}"


def _drop_output() -> None:
    """What standard output still holds cannot be written either, and Python would try again at its end."""
    with suppress(OSError):  # no more files can be opened
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line; our own warnings without the place in the source that raised them, others without its text."""
    if issubclass(category, FlashMoEWarning):
        return f"warning: {message}\n"
    return _python_warning(str(message).partition("\n")[0], category, filename, lineno, "")
