"""The command line: parses, calls one function, turns errors into one line and an exit code. Parses without jax."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from clipa_fast.cli.plan import PlanCommand, plan_command
from clipa_fast.cli.scaling import ScalingCommand, scaling_command
from clipa_fast.config import RunConfig, config_to_yaml, load_config
from clipa_fast.errors import UserError
from clipa_fast.hardware import TpuName
from clipa_fast.recipes import RECIPES

EXIT_UNWELL = 1
EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Train:
    """Train a run, or go on with the one in the folder."""

    run_dir: Path | None = None
    """Folder of the run: config, metrics, checkpoints, report. Needed unless it is a dry run."""
    config: Path | None = None
    """YAML file of the run; flags override it."""
    recipe: str | None = None
    """A recipe by name instead of a file; `clipa-fast recipes` lists them."""
    profile_steps: str | None = None
    """FIRST:LAST, such as 100:110: steps that jax's profiler records into RUN/profile, to open with xprof."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where a run has several processes that no launcher (TPU slice, SLURM, MPI) tells so."""
    process_id: int | None = None
    """This process's number, from 0."""
    num_processes: int | None = None
    """How many processes run."""
    dry_run: bool = False
    """Compile the step for a TPU slice that need not be there, and say what it takes. Trains nothing."""
    chip: TpuName = "v5e"
    """TPU generation of a dry run."""
    devices: int = 256
    """Devices of a dry run."""
    dry_run_stage: int = 0
    """Number of the stage that a dry run compiles, from 0."""
    output: Path | None = None
    """Write all that a dry run finds there as JSON too."""
    settings: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Eval:
    """Evaluate a model: zero-shot classification where classes are given, retrieval where there are captions."""

    data: tuple[str, ...]
    """Tar shards (paths, globs, brace lists), a folder of pictures, a saved Hugging Face dataset, or `glyphs` for its
    two unseen styles."""
    run_dir: Path | None = None
    """Folder of a trained run."""
    model: str | None = None
    """A model of another kind instead: a folder in open_clip's format, an .npz of CLIPA's JAX code, or hf://ORG/NAME."""
    tokenizer: str | None = None
    """Replaces the tokenizer beside the weights."""
    image_size: int | None = None
    """Side of the pictures in pixels, for an .npz, which does not tell."""
    captions: Path | None = None
    """Captions of a folder of pictures: COCO's annotations, Karpathy's json, or a .tsv of file name and caption."""
    split: str | None = None
    """Of Karpathy's json or of a dataset, such as test."""
    class_names: str | None = None
    """JSON with "classes" (label, name, ...) and "templates", a .txt with a name per line, or `imagenet`."""
    class_filter: str | None = None
    """FIELD=VALUE: only classes whose entry says so are candidates, such as split=seen; a=true for ImageNet-A."""
    label_map: Path | None = None
    """JSON from the data's labels (folder names) to a label of class_names each, several that count as one, or [] to
    leave them out; or ObjectNet's folder `mappings`."""
    border: int = 0
    """Pixels cut off each side of the pictures first: 2 for ObjectNet, whose pictures have a red frame."""
    candidates: Literal["all", "present", "mapped"] = "all"
    """Which classes compete: all, those that pictures have, or those of the label_map."""
    prompts: str = "own"
    """own (those of class_names), name, photo, clip (80), clipa (81, canonicalised), or a JSON file of templates."""
    resize: Literal["squash", "shorter_side"] | None = None
    """How pictures become square; None: as the model's convention has it."""
    bootstrap: int = 1000
    """Resamples of the confidence intervals; 0: none."""
    batch_size: int = 256
    """Pictures or captions encoded at once, divided among the devices."""
    output: Path | None = None
    """Write the figures there as JSON too."""
    ema: bool = False
    """Evaluate the moving average of the parameters, which a run keeps where optimizer.ema_decay is set."""


@dataclass(frozen=True)
class Import:
    """Read a model of another origin, check every tensor, write it as a folder that load, eval and train start from."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder or file in open_clip's format, an .npz of CLIPA's JAX code, or hf://ORG/NAME."""
    output: Path
    """The new folder."""
    tokenizer: str | None = None
    """Replaces the tokenizer beside the weights."""
    image_size: int | None = None
    """Side of the pictures in pixels, for an .npz, which does not tell. None: 224."""
    image_pool: Literal["gap", "tok"] = "gap"
    """Pooling, for an .npz, which does not tell either: gap for CLIPA-v2, tok for most of v1."""


@dataclass(frozen=True)
class Export:
    """Write a trained model for open_clip, or as StableHLO with a loader that needs jax alone."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a run, or any model that import reads."""
    output: Path
    """The new folder."""
    format: Literal["open_clip", "stablehlo"] = "open_clip"
    """open_clip: safetensors, config and tokenizer files. stablehlo: both towers as programs, with their weights."""
    tokenizer: str | None = None
    """Replaces the tokenizer beside the weights."""
    hub_name: str | None = None
    """ORG/NAME of the hub repository an open_clip folder is meant for, where its tokenizer is to be found."""


@dataclass(frozen=True)
class Demo:
    """Learn the names of glyphs on few tokens, read them in two unseen styles, write a report. Needs no data."""

    run_dir: Path = Path("runs/demo")
    """Folder of the run; an interrupted demo goes on there."""
    seed: int = 0
    """Seed of the run."""
    samples_scale: float = 1.0
    """Multiplies the samples of both stages; below 1 for a quick look."""


@dataclass(frozen=True)
class Recipes:
    """List the built-in recipes, or print one as YAML to start a config from."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Recipe to print."""


@dataclass(frozen=True)
class Profile:
    """Measure where a run's step goes (--config), or compile a kernel or a whole train step for a TPU that is not there
    and estimate its time statically."""

    config: Path | None = None
    """YAML file of a run: train some of its steps on the device at hand, under jax's profiler."""
    steps: int = 20
    """Steps measured with --config."""
    stage: int = 0
    """Number of the stage measured with --config, from 0."""

    function: Annotated[
        Literal["attention", "block", "contrastive", "train-step", "self-check"], tyro.conf.Positional
    ] = "attention"
    """attention alone, block (with the projections around it), contrastive, train-step, or the profiler's
    self-check."""
    chip: TpuName = "v5e"
    """TPU generation."""
    implementation: Literal["tpu", "xla", "jax", "none"] = "tpu"
    """Ours on TPU, ours on XLA, jax.nn.dot_product_attention, or no attention at all."""
    seq_len: int = 64
    """Tokens of a sequence."""
    num_heads: int = 12
    """Heads."""
    head_dim: int = 64
    """Elements of a head."""
    batch: int | None = None
    """Sequences (None: about 32,768 tokens), pairs of the contrastive loss (None: 32,768) or of the train step (None:
    128 for each device)."""
    is_causal: bool = False
    """Causal attention."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the operands."""
    backward: bool = True
    """With gradients."""
    width: int = 512
    """Feature width of the contrastive loss."""
    preset: str = "B/16"
    """Towers of the train step."""
    image_size: int = 112
    """Side of the train step's pictures in pixels."""
    text_length: int = 16
    """Tokens of the train step's captions."""
    devices: int = 1
    """Devices that the pairs of the contrastive loss or of the train step are spread over."""
    rows: int = 20
    """Rows of the table."""
    output: Path | None = None
    """Write everything there as JSON too."""


@dataclass(frozen=True)
class Pack:
    """Re-encode shards once for low-token training: small pictures, keys and captions untouched. Resumable."""

    data: tuple[str, ...]
    """Tar shards: paths, URLs, globs, brace lists."""
    output: Path
    """Folder for the new shards, of the old ones' names."""
    px: int = 128
    """Shorter side of the new pictures; smaller ones stay as they are."""
    quality: int = 90
    """JPEG quality, 1 to 95."""
    workers: int | None = None
    """Processes; None: as many as cores."""
    process_index: int = 0
    """Which of `process_count` machines or jobs this is; each packs its share of the shards."""
    process_count: int = 1
    """Machines or jobs that pack into the same output."""
    max_bad_share: float = 0.1
    """Share of unreadable samples above which packing stops; below, they are left out and counted."""


@dataclass(frozen=True)
class Doctor:
    """Overfit 128 pairs of your own data and say whether loss, temperature and gradients behave."""

    data: tuple[str, ...] = ()
    """Tar shards, or `glyphs`; empty: those of the config."""
    config: Path | None = None
    """YAML file of the run to try: its first stage's sizes, its tokenizer and conventions."""
    recipe: str | None = None
    """A recipe by name instead of a file."""
    steps: int = 200
    """Optimizer steps on the one batch."""
    full_model: bool = False
    """The config's own towers, instead of small ones that take a minute or two on a CPU."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Recipes, tyro.conf.subcommand("recipes")]
    | Annotated[Pack, tyro.conf.subcommand("pack")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[ScalingCommand, tyro.conf.subcommand("scaling")]
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `clipa-fast`.

    Exit codes: 0 done, 1 the doctor found something, 2 wrong input, 3 loss not finite, 75 told to stop by SIGTERM and
    130 by SIGINT; training then wrote a checkpoint first, and the same command goes on.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _errors_in_one_line():
            arguments = _parse(argv)
        _run(arguments, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from error
    except KeyboardInterrupt as stopped:
        print("stopped", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from stopped


@contextlib.contextmanager
def _errors_in_one_line():
    """Turns the parser's box of several lines into a UserError of one."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as error:
        if not error.code:
            raise
        # A title, the error over one or more lines, and below a rule hints that --help gives too.
        lines = [line.strip("│╭╮╰╯ ") for line in box.getvalue().splitlines()[1:]]
        rule = next((row for row, line in enumerate(lines) if not line.strip("─")), len(lines))
        raise UserError(" ".join(lines[:rule])) from error


def _parse(argv: list[str]):
    if argv[:1] != ["train"]:
        return tyro.cli(Command, args=argv, prog="clipa-fast", description="Train CLIP on few tokens.")
    # The file or recipe gives the defaults that `--help` shows and flags override.
    base = Train(settings=_base_config(argv))
    # A tower's sizes are a file's matter: as flags they would be a subcommand each.
    plain = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(Train, default=base, args=argv[1:], prog="clipa-fast train", config=plain)


def _base_config(argv: list[str]) -> RunConfig:
    config, recipe = _flag(argv, "--config"), _flag(argv, "--recipe")
    if config is not None and recipe is not None:
        raise UserError("--config and --recipe: give one of them")
    if config is not None:
        return load_config(config)
    return RunConfig() if recipe is None else find_recipe(recipe)


def _flag(argv: list[str], name: str) -> str | None:
    for index, word in enumerate(argv):
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(name + "="):
            return word.split("=", 1)[1]
    return None


def _stoppable(run: Callable[[], object], argv: list[str]) -> None:
    """Runs a training command; exit codes as `main` has them."""
    from clipa_fast.training.loop import Interrupted
    from clipa_fast.training.non_finite import NonFiniteLoss

    try:
        run()
    except Interrupted as stopped:
        print(f"{stopped}; a checkpoint is written. To go on: {shlex.join(['clipa-fast', *argv])}", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED if stopped.signal == signal.SIGTERM else EXIT_INTERRUPTED) from stopped
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_NON_FINITE) from error


def find_recipe(name: str) -> RunConfig:
    """The recipe called `name`. Raises UserError with the known ones."""
    if name not in RECIPES:
        raise UserError(f"recipe: unknown {name!r}; accepted: {', '.join(RECIPES)}")
    return RECIPES[name]


def _profile(arguments: Profile) -> None:
    settings = dataclasses.asdict(arguments)
    config, steps, stage = (settings.pop(name) for name in ("config", "steps", "stage"))
    if config is None:
        from clipa_fast.cli.profile import profile_command

        return print(profile_command(**settings))
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise UserError(f"output: no such folder: {arguments.output.parent}")
    run = load_config(config)
    from clipa_fast.profiling.measured.step_profile import profile_run

    profile = profile_run(run, steps, stage, console=Console())
    if arguments.output is not None:
        arguments.output.write_text(profile.to_json() + "\n")
    print(profile.table())


def _run(arguments: Any, argv: list[str]) -> None:
    if isinstance(arguments, Recipes):
        from clipa_fast.cli.recipe_table import print_recipes

        return print(config_to_yaml(find_recipe(arguments.name)), end="") if arguments.name else print_recipes()
    if isinstance(arguments, Pack):
        from clipa_fast.data.pack import pack_command

        pack_command(**dataclasses.asdict(arguments))
        return None
    if isinstance(arguments, PlanCommand):
        return plan_command(arguments)
    # What follows needs jax.
    if isinstance(arguments, Profile):
        return _profile(arguments)
    if isinstance(arguments, Train) and arguments.dry_run:
        from clipa_fast.training.dry_run import dry_run_command

        where = (arguments.chip, arguments.devices, arguments.dry_run_stage)
        return print(dry_run_command(arguments.settings, *where, output=arguments.output))
    if isinstance(arguments, Train) and arguments.run_dir is None:
        raise UserError("run_dir: missing; accepted: --run-dir FOLDER, or --dry-run")
    from clipa_fast.parallel.cpu_settings import prepare_cpu

    prepare_cpu()
    if isinstance(arguments, Import | Export):
        from clipa_fast.cli.convert import export_command, import_command

        run = import_command if isinstance(arguments, Import) else export_command
        return run(**{item.name: getattr(arguments, item.name) for item in dataclasses.fields(arguments)})
    if isinstance(arguments, Eval):
        return _evaluate(arguments)
    if isinstance(arguments, Train):
        from clipa_fast.cli.train import train_command
        from clipa_fast.parallel.distributed import initialize

        initialize(arguments.coordinator, arguments.process_id, arguments.num_processes)
        options = {"profile_steps": arguments.profile_steps}
        return _stoppable(partial(train_command, arguments.settings, arguments.run_dir, **options), argv)
    if isinstance(arguments, Doctor):
        from clipa_fast.training.doctor import doctor_command

        config = _base_config(argv)
        findings = doctor_command(arguments.data, config, steps=arguments.steps, full_model=arguments.full_model)
        raise SystemExit(0 if all(finding.is_fine for finding in findings) else EXIT_UNWELL)
    if isinstance(arguments, ScalingCommand):
        return _stoppable(partial(scaling_command, arguments), argv)
    from clipa_fast.cli.demo import demo_command

    run = partial(demo_command, arguments.run_dir, arguments.seed, arguments.samples_scale)
    return _stoppable(run, argv)


def _evaluate(arguments: Eval) -> None:
    from clipa_fast.evaluation.evaluate import EvaluationData, Protocol, eval_command
    from clipa_fast.run.folder import open_run

    if (arguments.run_dir is None) == (arguments.model is None):
        raise UserError("--run-dir and --model: give one of them")

    def part(kind):
        return kind(**{item.name: getattr(arguments, item.name) for item in dataclasses.fields(kind)})

    if arguments.run_dir is not None:
        open_run(arguments.run_dir)
    model = arguments.model or arguments.run_dir
    same = {name: getattr(arguments, name) for name in ("tokenizer", "image_size", "batch_size", "output", "ema")}
    eval_command(str(model), part(EvaluationData), part(Protocol), **same)
