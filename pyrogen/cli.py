"""The ``pyrogen`` command: flags and YAML files in, one clear line out when something is wrong."""

import dataclasses
import difflib
import inspect
import os
import re
import sys
import traceback
import warnings
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import register_type
from torch import distributed

from pyrogen.arguments import in_words, shown
from pyrogen.configuration import _FILE_PREFIX, check_names
from pyrogen.data.limits import read_yaml
from pyrogen.experiment import commands
from pyrogen.experiment.comparison import ERROR
from pyrogen.experiment.parts import ROLES, Part, describe_part, names
from pyrogen.experiment.settings import CompareSettings, FitSettings, Settings
from pyrogen.experiment.table import printable, slug
from pyrogen.inference import NonFiniteLoss
from pyrogen.inference.parallel import is_first

__all__ = ["main"]

register_type(Part, serializer=Part.plain, deserializer=Part.read)

DESCRIPTION = """Generative models as Pyro programs: fit them, compare guides on them, analyse the posteriors.

  pyrogen compare                                     four guides, each under what can train it, on the digits
  pyrogen fit --data mnist --family Flow              one model, one guide
  pyrogen fit --model my_model.py:Model --data mnist  a Pyro program of your own
  pyrogen evaluate runs/fit-mnist-001                 log-likelihood, rate and distortion of held-out data
  pyrogen sample runs/fit-mnist-001 --out new.png     new observations
  pyrogen report runs/compare-digits-001              tables and pictures on one page

Every flag but --trust, --overwrite and --anyway can stand in a YAML file instead: --config FILE.yaml. Flags win over
the file. Of classes such a file may name those of pyrogen, torch and Pyro; with --trust, any."""

COMMANDS: dict[str, tuple[tuple[type, ...], str]] = {
    "compare": ((CompareSettings, commands.OutputSettings), "Fit several guides to one model and compare them"),
    "fit": ((FitSettings, commands.FitOutputSettings), "Fit one model with one guide"),
    "evaluate": ((commands.EvaluateSettings,), "Evaluate a fitted run"),
    "sample": ((commands.SampleSettings,), "Sample from a fitted run"),
    "report": ((commands.ReportSettings,), "Show fitted runs on one page"),
}

PLACES = {"run": " RUN", "runs": " RUN..."}
"""Settings that are given by their place and not by a flag."""

CLASSES = """Wherever a class is asked for, give its short name, an import path, or FILE.py:NAME. Its own options
follow as flags:

  --prior Mixture --prior.components 20

or in YAML:

  prior: {class_path: Mixture, init_args: {components: 20}}

An option may be such a class itself: --objective.beta LinearSchedule --objective.beta.steps 1000

--prior.help Mixture prints its documentation, and --prior.help the names."""


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help that reads as prose: lines as they were written, and no Python types."""

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action) or ""
        text = re.sub(r"type: %\(type\)s(, )?", "", text)
        if action.default is None or action.default is False:
            text = re.sub(r"(, )?default: %\(default\)s", "", text)
        return text.replace(" ()", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows ``pyrogen``; by default the process's own.

    Returns:
        The exit code: 0; 1 if training diverged, or a fit of workers or a program of the user's own failed; 2 for bad
        input, with one line on stderr; 130 after Ctrl-C. SIGTERM ends a fit with 143, once its checkpoint is written,
        and a comparison by workers at once.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    formatted, warnings.formatwarning = warnings.formatwarning, _as_line
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        if arguments[:1] == ["fit"] and str(error):
            return _fail(error, 130)
        goes_on = arguments[:1] in (["fit"], ["compare"])
        how = "--resume with the same --out goes on from the last checkpoint" if goes_on else "nothing is half written"
        return _fail(f"interrupted; {how}", 130)
    except BrokenPipeError:  # whoever reads has enough, as in pyrogen ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NonFiniteLoss, ChildProcessError, torch.OutOfMemoryError) as error:
        return _fail(error, 1)
    except (ArgumentError, ValueError, TypeError, OSError, ArithmeticError) as error:
        if _in_users_file(error):
            traceback.print_exc()
            return 1
        return _fail(error, 2)
    finally:
        warnings.formatwarning = formatted


def _fail(error: Any, code: int) -> int:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return code  # the first process says it, for once they are connected an error of one is one of all
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    where = "" if rank == "0" else f" (in process {rank})"
    text = printable(" ".join(str(error).split()))
    print(f"pyrogen: {'error: ' if code != 130 else ''}{text}{where}", file=sys.stderr)
    return code


def _as_line(message: Warning | str, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    return f"{printable(' '.join(str(message).split()))}\n"


def _say(what: Any) -> None:
    print(printable(str(what)))


def _in_users_file(error: BaseException) -> bool:
    """Whether an error came up while a FILE.py of the user's ran, here or in a worker: then the place matters."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(frame.f_globals.get("__name__", "").startswith(_FILE_PREFIX) for frame in frames):
        return True
    files = [module.__file__ for name, module in [*sys.modules.items()] if name.startswith(_FILE_PREFIX)]
    return any(f'File "{file}"' in note for note in getattr(error, "__notes__", ()) for file in files)


def _run(arguments: list[str]) -> int:
    arguments, options, wanted = _split_part_options(arguments)
    if wanted is not None:
        print(describe_part(Part(wanted[1]), wanted[0]) if wanted[1] else ", ".join(names(wanted[0])))
        return 0
    parser = _parser(trust="--trust" in arguments)
    try:
        values = parser.parse_args(arguments)
    except ArgumentError as error:
        groups = next((COMMANDS[word][0] for word in arguments if word in COMMANDS), ())
        raise ValueError(f"{_in_fewer_words(error, groups)}{_nearest_flag(str(error), arguments)}") from error
    command = values.subcommand
    settings = _settings(values[command], COMMANDS[command][0], options)
    if command not in ("fit", "compare") and not is_first():  # a comparison is refused by all
        return 0
    match command:
        case "compare":
            table, folder = commands.run_compare(*settings)
            _say(table)
            _say(f"Written to {folder}")
            if failed := getattr(table, "failed", {}):
                each = ", ".join(f"{name} (see {folder / slug(name) / ERROR})" for name in failed)
                several = f"{len(failed)} of {len(failed) + len(table)} fits failed: {each}"
                return _fail(f"{several}; --resume with the same --out tries again", 1)
        case "fit":
            run, folder = commands.run_fit(*settings)
            if is_first():
                _say(run)
                _say(f"Written to {folder}")
        case "evaluate":
            _say(commands.run_evaluate(*settings))
        case "sample":
            _say(f"Written to {commands.run_sample(*settings)}")
        case "report":
            _say(f"Written to {commands.run_report(*settings)}")
    return 0


def _parser(*, trust: bool) -> ArgumentParser:
    look: Any = {"exit_on_error": False, "formatter_class": _Formatter, "allow_abbrev": False}
    parser = ArgumentParser(prog="pyrogen", description=DESCRIPTION, **look)
    commands_of = parser.add_subcommands()
    for name, (groups, title) in COMMANDS.items():
        place = "".join(PLACES.get(field.name, "") for field in dataclasses.fields(groups[0]))
        usage = f"pyrogen {name}{place} [--config FILE.yaml] [options]"
        command = ArgumentParser(description=_head(groups[0]), usage=usage, **look)
        file = "A YAML file with any of these options, such as the one that a run wrote."
        command.add_argument("--config", action=_config_action(groups, trust), help=file)
        for group in groups:
            _add(command, group)
        commands_of.add_subcommand(name, command, help=title)
    return parser


def _config_action(groups: tuple[type, ...], trust: bool) -> type[ActionConfigFile]:
    """What ``--config`` does: a file that may be a stranger's is looked at before anything is made of it."""
    known = {each.name: each.type for group in groups for each in dataclasses.fields(group)}
    plain = {name for name, kind in known.items() if "Part" not in str(kind)}

    class ConfigFile(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
            if not (path := Path(values)).exists():
                raise FileNotFoundError(f"there is no file {path}")
            settings = read_yaml(path)
            if not isinstance(settings, dict) or not settings:
                came = "nothing" if settings in (None, {}) else shown(settings)
                raise ValueError(f"{path} holds {came}; expected settings by name, one a line, such as epochs: 10")
            if {"format", "options"} <= settings.keys():
                raise ValueError(f"{path} is the record of a run; its settings for --config are in fit.yaml beside it")
            for key, value in settings.items():
                if value and str(key).rstrip("+") in ("trust", "overwrite", "anyway", "config"):
                    raise ValueError(f"{path} sets '{key}', which is only taken from the command line; remove it")
                if not trust and key not in plain:
                    try:
                        check_names(value)
                    except ValueError as error:
                        raise ValueError(f"{path}: {key}: {error}") from error
                if (name := str(key).rstrip("+")) not in known:
                    raise ValueError(f"{path}: there is no setting '{key}'{_near(name, known)}")
                if str(known[name]).startswith("list") and name == key and not isinstance(value, list | None):
                    raise ValueError(f"{path}: {key} must be a list, got {shown(value)}")
            try:
                super().__call__(parser, cfg, values, option_string)
            except (ArgumentError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: {_in_fewer_words(error, groups)}") from error

    return ConfigFile


def _head(group: type) -> str:
    """What stands above the options of a command."""
    text = inspect.cleandoc(group.__doc__ or "").partition("Args:")[0].strip()
    return f"{text}\n\n{CLASSES}" if issubclass(group, Settings) else text


def _add(parser: ArgumentParser, group: type) -> None:
    """Add a dataclass's fields as flags; switches without a value, lists of several words, runs by their place."""
    documented = _documentation(group)
    own = {*PLACES} | {f.name for f in dataclasses.fields(group) if f.type is bool or str(f.type).startswith("list")}
    for each in dataclasses.fields(group):
        text = documented[each.name]
        if each.name in PLACES:
            several: dict[str, Any] = {"nargs": "+"} if each.name == "runs" else {}
            parser.add_argument(each.name, type=str, help=text, **several)
        elif each.type is bool and each.default is False:
            parser.add_argument(f"--{each.name}", action="store_true", help=text)
        elif each.type is bool:
            parser.add_argument(f"--{each.name}", type=bool, default=each.default, help=text)
        elif each.name in own:
            missing = dataclasses.MISSING
            default = each.default if each.default_factory is missing else each.default_factory()
            kind = str if "str" in str(each.type) else Part
            parser.add_argument(f"--{each.name}", nargs="+", type=kind, default=default, help=text)
    skipped = own & {each.name for each in dataclasses.fields(group)}
    parser.add_class_arguments(group, as_group=False, skip=skipped)


def _documentation(group: type) -> dict[str, str]:
    """The text on every field, from the ``Args`` section of a dataclass and of those that it extends."""
    found = {}
    for each in reversed(group.__mro__):
        section = (each.__doc__ or "").partition("Args:")[2]
        for name, text in re.findall(r"^        (\w+): (.*?)(?=^        \w+: |\Z)", section, re.M | re.S):
            found[name] = " ".join(text.split())
    return found


def _split_part_options(arguments: list[str]) -> tuple[list[str], dict[str, dict[str, Any]], tuple[str, str] | None]:
    """Take ``--prior.components 20`` and its like out of the arguments, and ``--prior.help NAME`` too."""
    left: list[str] = []
    options: dict[str, dict[str, Any]] = {}
    flag = re.compile(rf"--({'|'.join(ROLES)})\.(\w+(?:\.\w+)*)(?:=(.*))?", re.S)
    words = iter(arguments)
    for word in words:
        found = flag.fullmatch(word)
        if found is None:
            left.append(word)
            continue
        role, key, raw = found.groups()
        raw = next(words, None) if raw is None else raw
        if key == "help":
            return left, options, (role, raw or "")
        if raw is None:
            raise ValueError(f"{word} needs a value")
        *outer, last = key.split(".")
        place = options.setdefault(role, {})
        for each in outer:
            named = place.get(each)
            if isinstance(named, str):
                place[each] = named = {"class_path": named, "init_args": {}}
            if not isinstance(named, dict) or "init_args" not in named:
                raise ValueError(f"{word} is an option of what --{role}.{each} NAME names; name that before it")
            place = named["init_args"]
        try:
            place[last] = yaml.safe_load(raw)
        except yaml.YAMLError:
            place[last] = raw
    return left, options, None


def _settings(values: Namespace, groups: tuple[type, ...], options: dict[str, dict[str, Any]]) -> list[Any]:
    """The dataclasses of a command, from what was parsed and the options of its parts."""
    chosen = {key: value for key, value in values.as_dict().items() if key != "config"}
    defaults = {"prior": Part("StandardNormal"), "decoder": Part("MLP")}
    for role, given in options.items():
        if role not in chosen:
            raise ValueError(f"unrecognized arguments: {', '.join(f'--{role}.{key}' for key in given)}")
        part = chosen[role] or defaults.get(role)
        if part is None:
            raise ValueError(f"--{role}.{next(iter(given))} is an option of what --{role} NAME names; name it")
        chosen[role] = Part(part.name, part.init_args | given)
    return [group(**{f.name: chosen[f.name] for f in dataclasses.fields(group)}) for group in groups]


def _in_fewer_words(error: Exception, groups: tuple[type, ...]) -> str:
    """What an error of jsonargparse's says of a setting: what it has to be, and what came."""
    message = " ".join(str(error).split())
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    found = re.fullmatch(r'Parser key "(\w+)"(?: element \d+)?: (?:.*(?:Got|Given) value: (.*)|.*)', message)
    if found is None or found[1] not in hints:
        return message
    if part := re.search(r"Not of type Part: (.*?)(?: - Expected a |$)", message):
        return f"{found[1]}: {part[1]}"
    return f"{found[1]} must be {in_words(hints[found[1]]).replace('None', 'null')}, got {found[2]}"


def _nearest_flag(message: str, arguments: list[str]) -> str:
    """Which flag may have been meant by one that is not known."""
    unknown = re.search(r"unrecognized arguments: --([\w-]+)", message)
    command = next((word for word in arguments if word in COMMANDS), None)
    if unknown is None or command is None:
        return ""
    flags = [field.name for group in COMMANDS[command][0] for field in dataclasses.fields(group)] + ["config"]
    return _near(unknown[1].replace("-", "_"), flags, "--")


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Which known names may have been meant by one that is not."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(f'{prefix}{each}' for each in near)}?" if near else ""
