"""The command line: one small file per command; whatever is heavy is imported when a command runs."""

import sys
import warnings

import typer

from transformers_badge.cli.benchmark import benchmark
from transformers_badge.cli.calibrate import calibrate
from transformers_badge.cli.convert import convert
from transformers_badge.cli.demo import demo
from transformers_badge.cli.evaluate import evaluate
from transformers_badge.cli.export import export
from transformers_badge.cli.predict import predict
from transformers_badge.cli.train import train


app = typer.Typer(
    help="Early exit for Hugging Face text classifiers. Each command has --help with an example.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
app.command()(convert)
app.command()(train)
app.command()(calibrate)
app.command()(predict)
app.command()(evaluate)
app.command()(export)
app.command()(benchmark)
app.command()(demo)


def main() -> None:
    """Run the command line; what a user can mend is reported in one sentence, without a traceback or a line of code."""
    from huggingface_hub.errors import StrictDataclassError

    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    try:
        app()
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
