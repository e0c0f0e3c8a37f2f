"""The command line: `opsd train`, `opsd train --resume RUN`, `opsd eval`, `opsd plan`, …"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import NoReturn

# Before torch is loaded: idle OpenMP threads that spin slow everything else on a CPU down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Else a rank that fails because another one has ended prints its C++ stack above our error line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from opsd.config.cli import parse
from opsd.utils import signals
from opsd.utils.errors import RunStopped, UserError
from opsd.utils.going_on import advice
from opsd.utils.paths import check_model_name
from opsd.utils.streams import outlive_readers

USAGE = """usage: opsd COMMAND [OPTIONS]

  opsd train       train a student: --student M --teacher M --prompts FILE --out RUN …, or --config FILE.yaml,
                   or --resume RUN [--steps N]; --dump_config prints a YAML file
  opsd eval        evaluate a model: --model M --suite NAME=FILE … --out FILE.json; run again to continue
  opsd distance    exact divergence of a model from its teacher: --model M --teacher T --prompts FILE --out FILE.json
  opsd inspect     show a step's tokens as coloured text in one HTML file: RUN [--step N] [--out FILE]
  opsd plan        estimate a run's memory and time before it starts: the flags of train, --gpus N; loads no weights
  opsd check-model check whether a model can be trained or be a teacher, one line per check: FOLDER [--tokens N]
  opsd push        upload a run's newest checkpoint with its model card: RUN OWNER/NAME
  opsd selectors   list the rules that select tokens

`opsd train --help` and `opsd eval --help` list all flags; `opsd --version` prints the version."""


def main() -> None:
    """Run a command.

    Exit code 2 for bad input, 1 for a run that cannot continue, 143 after SIGTERM, 130 after Ctrl-C, 129 after a
    terminal was closed; each prints one line.
    """
    outlive_readers()
    with signals.heard():
        try:
            _command(sys.argv[1:])
        except UserError as error:
            _stop(2, str(error))
        except RunStopped as error:
            _stop(1, str(error))
        except signals.Interrupted as wish:
            if wish.orderly and os.environ.get("RANK", "0") != "0":
                signals.end(wish.exit_code)  # all ranks agreed to stop: rank 0 prints the line
            _stop(wish.exit_code, str(wish))
        except KeyboardInterrupt:
            _stop(130, signals.interrupted())
        except Exception as error:
            _fail(error)


def _command(args: list[str]) -> None:
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "eval": _eval,
        "distance": _distance,
        "inspect": _inspect,
        "plan": _plan,
        "check-model": _check_model,
        "selectors": _selectors,
        "push": _push,
    }
    name, rest = (args[0], args[1:]) if args else ("--help", [])
    if name in {"-h", "--help"}:
        print(USAGE)
    elif name in {"-V", "--version"}:
        print(f"opsd {version('opsd-tip')}")
    elif name in commands:
        commands[name](rest)
    else:
        raise UserError(f"unknown command {name!r}; give one of: {', '.join(commands)}")


def _train(args: list[str]) -> None:
    if "--dump_config" in args:
        from opsd.config.file import dumped

        print(dumped(args), end="")
        return
    work = _resumed(args) if "--resume" in args else _started(args)
    from opsd.utils.distributed import leave

    try:
        work()
    except signals.Interrupted as wish:
        if wish.orderly:
            leave()
        raise
    except SystemExit as end:
        # A rule, a grader or a model's own code may call sys.exit.
        raise RunStopped(f"code called by the run ended it with exit code {end.code}; {advice()}") from end
    leave()
    if _among_several():
        signals.end(0)


def _started(args: list[str]) -> Callable[[], None]:
    """Prepare a new run. Whatever needs no slow import is checked first."""
    from opsd.config import TrainConfig
    from opsd.config.file import with_file
    from opsd.config.paths import check_paths

    config = parse(TrainConfig, with_file(args), "opsd train")
    check_paths(config)
    _quiet()
    from opsd.train import start

    return partial(start, config)


def _resumed(args: list[str]) -> Callable[[], None]:
    """Prepare to resume a run, with the same early checks."""
    from opsd.config.saved import check_resumable, parse_resume

    asked = parse_resume(args)
    check_resumable(asked.resume, asked.steps)
    _quiet()
    from opsd.train import resume

    return partial(resume, asked.resume, asked.steps)


def _eval(args: list[str]) -> None:
    if "--model" in args[:-1]:
        check_model_name(args[args.index("--model") + 1], "--model")
    from opsd.eval.command import EvalCommand, evaluate

    config = parse(EvalCommand, args, "opsd eval")
    _quiet()
    evaluate(config)
    if _among_several():
        from opsd.utils.distributed import leave

        leave()
        signals.end(0)


def _distance(args: list[str]) -> None:
    from opsd.eval.distance import DistanceCommand, measure_distance, summary

    config = parse(DistanceCommand, args, "opsd distance")
    _quiet()
    print(summary(measure_distance(config)))
    print(config.out)


def _inspect(args: list[str]) -> None:
    from opsd.viewer.command import InspectConfig, inspect

    config = parse(InspectConfig, args, "opsd inspect")
    _quiet()
    print(inspect(config))


def _plan(args: list[str]) -> None:
    from opsd.estimate.command import PlanConfig, plan

    # These two flags may come without a value.
    for place in range(len(args), 0, -1):
        if args[place - 1] in {"--json", "--brief"} and args[place : place + 1] not in (["True"], ["False"]):
            args = [*args[:place], "True", *args[place:]]
    # A run that does not fit is an answer, not an error: the verdict goes to stdout, and the exit code is 1.
    if not plan(parse(PlanConfig, args, "opsd plan")):
        sys.exit(1)


def _push(args: list[str]) -> None:
    from opsd.run.push import PushConfig, push

    config = parse(PushConfig, args, "opsd push")
    _quiet()
    print(push(config))


def _check_model(args: list[str]) -> None:
    if args and not args[0].startswith("-"):
        check_model_name(args[0], "model")
    from opsd.check_model import CheckModelConfig, check_model

    config = parse(CheckModelConfig, args, "opsd check-model")
    _quiet()
    if not check_model(config).fine:
        sys.exit(2)


def _selectors(args: list[str]) -> None:
    from opsd.selection import describe_selectors

    if args:
        raise UserError(f"`opsd selectors` takes no arguments, but was given {args[0]!r}")
    described = describe_selectors()
    width = max(len(name) for name in described)
    for name, line in described.items():
        print(f"{name:{width}}  {line}")


def _quiet() -> None:
    """Silence the libraries' own progress bars and notices: they would break up our output."""
    # transformers' helpers import DeepSpeed if it is installed, and DeepSpeed then logs details of the machine.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _stop(code: int, message: str, or_left: bool = False) -> NoReturn:
    """End the command with one line; of several ranks, only the first to fail prints it.

    or_left: rank 1 prints it too if rank 0, which keeps the store, does not answer.
    """
    if not _among_several() or _first_to_fail(or_left):
        print(f"opsd: {message}", file=sys.stderr)
    signals.end(code)


def _fail(error: Exception) -> NoReturn:
    """Report a bug in opsd: traceback, exit code 1. Ranks that fail only because another one did print nothing."""
    if not _among_several():
        raise error
    from opsd.utils.distributed import contact_lost

    if (line := contact_lost(error)) is not None:
        _stop(1, line, or_left=True)
    if _first_to_fail(or_left=True):
        traceback.print_exception(error)
    signals.end(1)


def _among_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _first_to_fail(or_left: bool) -> bool:
    from opsd.utils.distributed import first_to_fail

    return first_to_fail(or_left)


if __name__ == "__main__":
    main()
