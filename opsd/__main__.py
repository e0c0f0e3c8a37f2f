"""The command line: `opsd train`, `opsd train --resume RUN`, `opsd eval`, `opsd selectors`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch is loaded: idle OpenMP threads that spin slow everything else on a CPU down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from opsd.errors import RunStopped, UserError

USAGE = """usage: opsd COMMAND [OPTIONS]

  opsd train       train a student: --student M --teacher M --prompts FILE --out RUN …, or --resume RUN
  opsd eval        evaluate a model: --model M --suite NAME=FILE … --out FILE.json; the same again goes on where it was
  opsd inspect     a step's tokens as coloured text in one HTML file: RUN [--step N] [--out FILE]
  opsd selectors   list the rules that choose tokens

`opsd train --help` and `opsd eval --help` list all flags."""


def main() -> None:
    """Run a command. Exit code 2 for bad input, 1 for a run that cannot go on, 130 after Ctrl-C; each one line."""
    try:
        _command(sys.argv[1:])
    except UserError as error:
        _stop(2, str(error))
    except RunStopped as error:
        _stop(1, str(error))
    except KeyboardInterrupt:
        _stop(130, "interrupted; go on with: opsd train --resume RUN (an evaluation: the same command again)")
    except Exception:
        # A defect of ours keeps its traceback. Only ranks that fall because another has spoken already end without one.
        if not _speaks():
            sys.exit(1)
        raise


def _command(args: list[str]) -> None:
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "eval": _eval,
        "inspect": _inspect,
        "selectors": _selectors,
    }
    name, rest = (args[0], args[1:]) if args else ("--help", [])
    if name in {"-h", "--help"}:
        print(USAGE)
    elif name in commands:
        commands[name](rest)
    else:
        raise UserError(f"unknown command {name!r}; give one of: {', '.join(commands)}")


def _train(args: list[str]) -> None:
    from opsd.commandline import parse
    from opsd.config import TrainConfig

    if "--resume" in args:
        if len(args) != 2 or args[0] != "--resume":
            raise UserError("--resume RUN goes alone: a resumed run keeps its settings; start a new one to change them")
        _quiet()
        from opsd.train import resume

        resume(Path(args[1]))
    else:
        config = parse(TrainConfig, args, "opsd train")
        _quiet()
        from opsd.train import start

        start(config)
    from opsd.ranks import leave

    leave()


def _eval(args: list[str]) -> None:
    from opsd.commandline import parse
    from opsd.evalcommand import EvalCommand, evaluate

    config = parse(EvalCommand, args, "opsd eval")
    _quiet()
    evaluate(config)


def _inspect(args: list[str]) -> None:
    from opsd.commandline import parse
    from opsd.viewer.command import InspectConfig, inspect

    config = parse(InspectConfig, args, "opsd inspect")
    _quiet()
    print(inspect(config))


def _selectors(args: list[str]) -> None:
    from opsd.hooks import describe_selectors

    if args:
        raise UserError(f"`opsd selectors` takes no arguments, but was given {args[0]!r}")
    described = describe_selectors()
    width = max(len(name) for name in described)
    for name, line in described.items():
        print(f"{name:{width}}  {line}")


def _quiet() -> None:
    """Libraries' own progress bars and notices would tear ours apart."""
    # transformers' helpers import DeepSpeed wherever it is installed, and it reports on the machine.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _speaks() -> bool:
    """Whether this process says what went wrong: of several ranks the first one to fail does, for all."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from opsd.ranks import first_to_fail

    return first_to_fail()


def _stop(code: int, message: str) -> None:
    if _speaks():
        print(f"opsd: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
