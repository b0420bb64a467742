"""The command line. Nothing heavy is imported before a command runs, so that every `--help` answers at once."""

import sys

import typer

from fastgen.commands import evaluation, results, sampling, starting, training
from fastgen.run.quiet import quiet_libraries

app = typer.Typer(
    name="fastgen",
    help="Turn a diffusers pipeline into a few-step one, and know that it worked.",
    no_args_is_help=True,
    # Without this, typer imports pydantic for `fastgen train --help`: to convert the values of fastgen's own --help,
    # --version and so on, which are not given. It converts no bool.
    context_settings={"default_map": dict.fromkeys(("help", "asked", "install_completion", "show_completion"), False)},
    pretty_exceptions_enable=False,
)

OVERRIDES = {"ignore_unknown_options": True}  # what begins with a minus is an override too, and refused as one

app.callback(invoke_without_command=True)(starting.version)
app.command()(starting.new)
app.command()(starting.recipes)
app.command()(starting.objectives)
app.command()(starting.schema)
app.command(context_settings=OVERRIDES)(training.train)
app.command(context_settings=OVERRIDES)(training.plan)
app.command(context_settings=OVERRIDES)(training.prepare)
app.command()(sampling.sample)
app.command()(sampling.stream)
app.command(name="eval")(evaluation.evaluate)
app.command()(evaluation.score)
app.command()(results.export)
app.command()(results.combine)
app.command()(sampling.demo)
app.command()(results.push)


def main() -> None:
    """Runs the command that the arguments of the process name."""
    quiet_libraries()
    try:
        app()
    except Exception as error:
        if not in_words(error):
            raise
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)


def in_words(error: Exception) -> bool:
    """Whether an error says by itself what is wrong, as that of a file that cannot be read or written. Any other is a
    mistake of fastgen's, whose traceback is needed."""
    from safetensors import SafetensorError

    from fastgen.data.base import DataError
    from fastgen.run.checkpoint import CheckpointError

    return isinstance(error, (OSError, SafetensorError, DataError, CheckpointError))


if __name__ == "__main__":
    main()
