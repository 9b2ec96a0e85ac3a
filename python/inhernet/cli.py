"""The command line: `inhernet plan|convert|train|eval|bench|optimize|doctor|demo`.

Exit status: 0 done, 1 a check failed, 2 wrong input, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from inhernet.console import say, table

if TYPE_CHECKING:
    from torch import nn

    from inhernet.config import InheritConfig
    from inhernet.decompose import Plan

TEACHER_HELP = "hf:DIR, or package.module:function returning an nn.Module"
DATA_HELP = "digits, or package.module:function returning loaders (see `inhernet --help`)"
OVERWRITE_HELP = "let --out replace an earlier result of inhernet (never anything else)"
EPILOG = """\
TEACHER  hf:DIR (a transformers directory), or package.module:function called without arguments; with
         --weights FILE.safetensors for its weights
DATA     digits, or package.module:function returning (train, val), (train, val, test), a mapping with these keys,
         or one iterable of batches (x, target)
DIR      a directory that `convert` wrote (or `optimize`)

examples
  inhernet plan inhernet.models:resnet20 --rank 8
  inhernet convert TEACHER --weights W.safetensors --data DATA --budget 0.5 --out DIR
  inhernet train DIR --teacher TEACHER --weights W.safetensors --data digits --epochs 5 --out TRAINED
  inhernet eval TRAINED --teacher TEACHER --weights W.safetensors --data digits
  inhernet bench TRAINED
  inhernet optimize TRAINED --input 3x32x32 --batch 1 --out FAST
  inhernet demo digits"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        say(f"inhernet: error: {message} (see `{self.prog} --help`)", stderr=True)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Example:
        >>> main(["plan", "inhernet.models:resnet20", "--rank", "x"])  # doctest: +SKIP
        2
    """
    try:
        arguments = build_parser().parse_args(argv)
        return _guarded(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0


def _guarded(arguments: argparse.Namespace) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signum", signal.SIGINT)
        text = str(stop) or "stopped"
        again = "; the same command goes on from there" if hasattr(stop, "path") else ""
        say(f"inhernet: {text}{again}", stderr=True)
        return 128 + number
    except BrokenPipeError:
        # The reader (head, less) went away: nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        return _failed(arguments, error, 2)
    except Exception as error:
        return _failed(arguments, error, 1)


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    say(f"inhernet: warning: {' '.join(str(message).split())}", stderr=True)


def _failed(arguments: argparse.Namespace, error: Exception, status: int) -> int:
    if arguments.debug:
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    hint = "" if status == 2 else f" ({type(error).__name__}; --debug shows where)"
    say(f"inhernet: error: {text}{hint}", stderr=True)
    return status


def build_parser() -> Parser:
    """The parser of all commands."""
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = Parser("inhernet", description="Make a trained network smaller by inheriting from it.", epilog=EPILOG,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(run=run)
        return added

    plan = command("plan", run_plan, "show what conversion would do to every layer; nothing is changed")
    _add_teacher(plan)
    _add_config(plan)
    plan.add_argument("--out", metavar="DIR", help="write the plan here, to be edited and given to `convert --plan`")
    plan.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)

    convert = command("convert", run_convert, "write an inherited network")
    _add_teacher(convert)
    _add_config(convert)
    convert.add_argument("--plan", metavar="DIR", help="follow a plan that `inhernet plan --out` wrote")
    convert.add_argument("--keep-batchnorm", action="store_true", help="leave BatchNorm statistics as the teacher's: for "
                         "data that is not like its training's")  # fmt: skip
    convert.add_argument("--out", metavar="DIR", required=True, help="directory to write")
    convert.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)

    train = command("train", run_train, "fine-tune an inherited network against its teacher; resumes where it stopped")
    _add_model(train)
    train.add_argument("--teacher", metavar="TEACHER", help=TEACHER_HELP)
    _add_weights(train)
    train.add_argument("--data", metavar="DATA", required=True, help=DATA_HELP)
    train.add_argument("--objective", choices=("default", "published", "published-demo", "task"), help="loss (default: "
                       "default with a teacher, task without)")  # fmt: skip
    train.add_argument("--epochs", type=int, default=5)
    train.add_argument("--lr", type=float, default=0.02)
    train.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    train.add_argument("--weight-decay", type=float, default=5e-4, help="of dense weights; factors are not decayed")
    train.add_argument("--clip-norm", type=float, default=1.0)
    train.add_argument("--accumulate", type=int, default=1, help="batches per step")
    train.add_argument("--ema", type=float, help="decay of an average of the weights, such as 0.999")
    train.add_argument("--amp", choices=("bfloat16",), help="autocast dtype")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", metavar="DIR", help="where to write (with --overwrite default: DIR itself)")
    train.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    train.add_argument("--restart", action="store_true", help="forget an interrupted run")

    evaluate = command("eval", run_eval, "accuracy, and fidelity to the teacher, on the data's test part")
    _add_model(evaluate)
    evaluate.add_argument("--teacher", metavar="TEACHER", help=TEACHER_HELP)
    _add_weights(evaluate)
    evaluate.add_argument("--data", metavar="DATA", required=True, help=DATA_HELP)

    bench = command(
        "bench", run_bench, "latency against the dense network and the published form, interleaved, medians"
    )
    _add_model(bench)
    bench.add_argument("--teacher", metavar="TEACHER", help=f"{TEACHER_HELP} (default: the dense architecture of DIR)")
    _add_weights(bench)
    bench.add_argument("--data", metavar="DATA", help=f"take an input from here: {DATA_HELP}")
    bench.add_argument("--input", metavar="SHAPE", help="shape of one example, such as 3x32x32")
    bench.add_argument("--batch", type=int, nargs="+", default=[1, 64], metavar="B")
    bench.add_argument("--seconds", type=float, default=1.0, help="per figure")
    bench.add_argument("--compile", action="store_true", help="add torch.compile of all three")

    fast = command("optimize", run_optimize, "the fastest form of every layer for inference here, by measuring")
    _add_model(fast)
    fast.add_argument("--out", metavar="DIR", required=True, help="where to write")
    fast.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    fast.add_argument("--data", metavar="DATA", help=f"take an input from here: {DATA_HELP}")
    fast.add_argument("--input", metavar="SHAPE", help="shape of one example, such as 3x32x32")
    fast.add_argument("--batch", type=int, default=1, metavar="B", help="examples per call (default: 1)")
    fast.add_argument("--seconds", type=float, default=0.1, help="per figure")

    command("doctor", run_doctor, "what is installed, built and fast here, and why not")

    demo = command("demo", run_demo, "the whole job on real data")
    demo.add_argument("name", choices=("digits", "minilm"))
    demo.add_argument("--out", metavar="DIR", help="where results go (default: runs/NAME)")
    demo.add_argument("--seeds", type=int, default=1, help="digits: runs per split")
    demo.add_argument("--splits", type=int, default=1, help="digits: divisions of the images")
    demo.add_argument("--no-compile", action="store_true", help="digits: leave out torch.compile of the published form")
    return parser


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", metavar="TEACHER", help=TEACHER_HELP)
    _add_weights(parser)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="FILE", help="safetensors file with the teacher's weights")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="inherited network")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE",
                        help="let DIR build its architecture by this package's code")  # fmt: skip


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DATA", help=f"calibration data: {DATA_HELP}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--budget", type=float, help="share of the parameters, or a count above 1 (default 0.5)")
    size.add_argument("--rank", type=int, help="the same rank everywhere")
    size.add_argument("--ratio", type=float, help="share of each layer's parameters")
    size.add_argument("--energy", type=float, help="share of the squared singular values to keep in each layer")
    parser.add_argument("--of", choices=("selected", "model"), default="selected", help="what --budget is a share of")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where the network will run: a GPU gets ranks that it "
                        "multiplies fast (default: cpu)")  # fmt: skip
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--init", choices=("svd", "activation", "fisher", "random", "published"),
                        help="default: fisher with --data, svd without")  # fmt: skip
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="NAME", help='layer, or "re:PATTERN"; repeatable'
    )
    parser.add_argument("--seed", type=int, default=0)


def config_of(arguments: argparse.Namespace) -> InheritConfig:
    """The configuration that the options describe (ValueError naming a bad one)."""
    from inhernet.config import EnergyBudget, InheritConfig, ParamBudget, UniformRank, UniformRatio

    if arguments.rank is not None:
        budget: Any = UniformRank(arguments.rank)
    elif arguments.ratio is not None:
        budget = UniformRatio(arguments.ratio)
    elif arguments.energy is not None:
        budget = EnergyBudget(arguments.energy)
    else:
        amount = 0.5 if arguments.budget is None else arguments.budget
        budget = ParamBudget(int(amount) if amount > 1 and amount == int(amount) else amount, of=arguments.of)
    return InheritConfig(
        heads=arguments.heads, budget=budget, init=arguments.init, exclude=tuple(arguments.exclude), seed=arguments.seed,
        device=arguments.device,
    )  # fmt: skip


def need_free(out: str | os.PathLike[str], arguments: argparse.Namespace, *inputs: str | None) -> None:
    """Refuse, before any work is done, to write where something is that would be lost (UsageError, ValueError).

    `inputs`: directories and files that the command reads, which it must not write to even when told to overwrite.
    """
    from inhernet import checkpoint, specs

    target = Path(os.path.realpath(out))
    for name in filter(None, inputs):
        if target in (
            Path(os.path.realpath(name)),
            Path(os.path.realpath(name)).parent if Path(name).is_file() else None,
        ):
            raise specs.UsageError(f"--out is {str(out)!r}, which holds the input {name!r}; give another directory")
    checkpoint.check_target(target)
    if not arguments.overwrite and target.is_dir() and any(target.iterdir()):
        raise specs.UsageError(
            f"--out is {str(out)!r}, which holds an earlier result; give another directory, or --overwrite to replace it"
        )


def run_plan(arguments: argparse.Namespace) -> None:
    if arguments.out:
        need_free_for_plan(arguments)
    plan = _plan(arguments)[1]
    show_plan(plan)
    if arguments.out:
        plan.save(arguments.out)
        say(f"plan written to {arguments.out}")


def need_free_for_plan(arguments: argparse.Namespace) -> None:
    from inhernet import specs
    from inhernet.decompose import Plan

    Plan.check_target(arguments.out)
    if not arguments.overwrite and (Path(arguments.out) / "plan.json").exists():
        raise specs.UsageError(
            f"--out is {arguments.out!r}, which holds a plan; give another directory, or --overwrite to replace it"
        )


def run_convert(arguments: argparse.Namespace) -> None:
    import inhernet
    from inhernet import specs
    from inhernet.decompose import Plan

    teacher_directory = arguments.teacher.removeprefix("hf:") if arguments.teacher.startswith("hf:") else None
    need_free(arguments.out, arguments, teacher_directory, arguments.weights, arguments.plan)
    if arguments.plan:
        blank = argparse.ArgumentParser(add_help=False)
        _add_config(blank)
        for name, default in vars(blank.parse_args([])).items():
            if name != "data" and getattr(arguments, name) != default:
                raise specs.UsageError(f"--{name} is given beside --plan, which has decided it: leave one of them out")
        try:
            plan = Plan.load(arguments.plan)
        except FileNotFoundError as error:
            raise specs.UsageError(
                f"--plan is {arguments.plan!r}, which has no plan.json: write one with `inhernet plan --out`"
            ) from error
        teacher = specs.teacher(arguments.teacher, arguments.weights)
    else:
        teacher, plan = _plan(arguments)
    calibration = specs.data(arguments.data).calibration if arguments.data else None
    started = time.perf_counter()
    model = inhernet.inherit(teacher, plan, calibration=calibration, batchnorm=not arguments.keep_batchnorm)
    show_plan(plan)
    factory = None
    if not hasattr(teacher, "inhernet_factory") and not arguments.teacher.startswith("hf:"):
        factory = specs.function_of(arguments.teacher, "TEACHER")
    inhernet.save(model, arguments.out, factory=factory)
    say(f"converted in {time.perf_counter() - started:.1f} s; written to {arguments.out}")


def _plan(arguments: argparse.Namespace) -> tuple[nn.Module, Plan]:
    import inhernet
    from inhernet import specs

    config = config_of(arguments)
    teacher = specs.teacher(arguments.teacher, arguments.weights)
    if arguments.weights is None and not arguments.teacher.startswith("hf:"):
        say("note: no --weights, so the teacher is as its function built it", stderr=True)
    calibration = specs.data(arguments.data).calibration if arguments.data else None
    return teacher, inhernet.plan(teacher, config, calibration=calibration)


def show_plan(plan: Plan) -> None:
    """The plan as a table that fits the window."""
    rows = []
    for layer in plan.layers:
        shape = "×".join(str(size) for size in layer.shape)
        share = f"{layer.params / layer.dense_params:.1%}" if layer.dense_params else ""
        rank = "dense" if layer.rank is None else layer.rank
        heads = "" if layer.rank is None else layer.heads
        note = layer.reason if layer.rank is None else layer.init
        rows.append((layer.name, shape, rank, heads, f"{layer.dense_params:,}", f"{layer.params:,}", share, note))
    columns = ("layer", "shape", "rank", "heads", "dense", "inherited", "share", "init, or why it stays dense")
    table(f"plan: {len(plan.factorised)} of {len(plan.layers)} layers factorised", columns, rows, left=(0, 7))
    for what, (after, before) in (("selected layers", plan.selected_params), ("whole model", plan.total_params)):
        say(f"{what}: {after:,} of {before:,} parameters ({after / max(before, 1):.1%})")
    for sentence in plan.advice:
        say(sentence.replace("device='cuda'", "--device cuda"))


def run_train(arguments: argparse.Namespace) -> None:
    import inhernet
    from inhernet import specs
    from inhernet.distill import OBJECTIVES, TrainConfig, fit

    names = ("epochs", "lr", "optimizer", "weight_decay", "clip_norm", "accumulate", "ema", "amp", "seed")
    config = TrainConfig(**{name: getattr(arguments, name) for name in names})
    objective = OBJECTIVES[arguments.objective or ("default" if arguments.teacher else "task")]
    if objective.kd and not arguments.teacher:
        raise specs.UsageError(f"--objective is {arguments.objective!r}, which needs --teacher TEACHER")
    if arguments.out is None and not arguments.overwrite:
        raise specs.UsageError("--out is missing; give a directory to write to, or --overwrite to replace DIR itself")
    out = Path(arguments.out or arguments.dir)
    need_free(out, arguments)
    model = _load(arguments, optimized=False)
    teacher = specs.teacher(arguments.teacher, arguments.weights) if arguments.teacher else None
    data = specs.data(arguments.data)
    # Beside the directory, not in it: the model stays a model, and the run can go on until it is complete.
    state = out.resolve().parent / f"{out.resolve().name}.training"

    result = fit(
        model,
        data.train,
        config,
        loss=objective,
        teacher=teacher,
        validate=_validation(data.val, teacher),
        checkpoint_dir=state,
        resume=not arguments.restart,
    )
    last = result.history[-1 if result.best_epoch is None else result.best_epoch]
    need_finite(model, last, f"nothing was written to {out}, the run is in {state}; try --restart with a lower --lr")
    inhernet.save(model, out)
    shutil.rmtree(state, ignore_errors=True)
    say(f"trained in {result.seconds:.1f} s; written to {out}")


def need_finite(model: nn.Module, figures: Mapping[str, float], consequence: str) -> None:
    """Raise FloatingPointError for a trained network that is broken, by its validation figures or its tensors.

    An infinity in a buffer is none: attention masks hold some.
    """
    bad = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
    bad += [f"{name} holds NaN or infinity" for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    bad += [f"{name} holds NaN" for name, buffer in model.named_buffers() if bool(buffer.isnan().any())]
    if bad:
        raise FloatingPointError(f"the trained network is broken ({'; '.join(bad[:3])}): {consequence}")


def _validation(
    loader: Iterable[Any] | None, teacher: nn.Module | None
) -> Callable[[nn.Module], dict[str, float]] | None:
    from inhernet.distill import evaluate

    if loader is None:
        return None

    def validate(model: nn.Module) -> dict[str, float]:
        figures = evaluate(model, loader, teacher)
        return {f"val_{name}": figures[name] for name in ("accuracy", "loss", "kl") if name in figures}

    return validate


def run_eval(arguments: argparse.Namespace) -> int:
    import inhernet
    from inhernet import specs
    from inhernet.distill import evaluate

    model = _load(arguments)
    judge = specs.data(arguments.data).judge
    trouble = ""
    if arguments.teacher is None:
        figures: dict[str, Any] = {**evaluate(model, judge)}
        if bad := figures.pop("nonfinite_rows", 0):
            trouble = f"the network's output is not finite (NaN or infinity) in {bad:,} rows"
    else:
        teacher = specs.teacher(arguments.teacher, arguments.weights)
        report = inhernet.verify(model, teacher, judge)
        trouble = report.trouble
        figures = {"parameters": report.params, "teacher's parameters": report.teacher_params}
        if report.accuracy is not None:
            figures |= {"accuracy": report.accuracy, "teacher's accuracy": report.teacher_accuracy}
        for output in report.outputs:
            prefix = "" if len(report.outputs) == 1 else f"{output.name}: "
            figures |= {f"{prefix}rows": output.rows, f"{prefix}cosine": output.cosine}
            figures |= {f"{prefix}relative error": output.relative_error}
            if output.kl is not None:
                figures |= {f"{prefix}KL to the teacher": output.kl, f"{prefix}same decision": output.agreement}
    rows = [(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}") for name, value in figures.items()]
    table(str(arguments.dir), ("figure", "value"), rows)
    if not trouble and not all(math.isfinite(value) for value in figures.values()):
        trouble = "a figure is not finite: the targets are not, or the teacher's outputs are all 0"
    if trouble:
        say(f"inhernet: {trouble}", stderr=True)
    return 1 if trouble else 0


def run_bench(arguments: argparse.Namespace) -> None:
    import torch

    from inhernet import specs
    from inhernet.demos.published import published
    from inhernet.measure import interleaved

    if min(arguments.batch) < 1:
        raise specs.UsageError(f"--batch is {arguments.batch}, expected sizes of at least 1")
    model, fast = _load(arguments, optimized=False), _load(arguments)
    dense = (
        specs.teacher(arguments.teacher, arguments.weights)
        if arguments.teacher
        else dense_like(model, trusted(arguments))
    )
    example = specs.example_inputs(model, arguments.input, specs.data(arguments.data).judge if arguments.data else None)
    networks: dict[str, Any] = {"dense": dense.eval(), "inherited": model, "published form": published(model).eval()}
    if hasattr(fast, "optimization"):
        networks["optimised"] = fast
    if arguments.compile:
        networks |= {f"{name}, torch.compile": torch.compile(network) for name, network in list(networks.items())}
    rows = []
    for size in arguments.batch:
        inputs = example(size)

        def call(network: Callable[..., Any], inputs: Any = inputs) -> Any:
            return network(**inputs) if isinstance(inputs, dict) else network(inputs)

        calls = {name: (lambda network=network, call=call: call(network)) for name, network in networks.items()}
        found = interleaved(calls, arguments.seconds)
        base = found["dense"].p50
        for name, value in found.items():
            figures = [f"{figure:.3f}" for figure in (value.p20, value.p50, value.p80)]
            rows.append((name, size, *figures, f"{base / value.p50:.2f}×", value.rounds))
    threads = torch.get_num_threads()
    columns = ("network", "batch", "p20 ms", "median ms", "p80 ms", "speed, dense = 1", "calls")
    table(f"latency of {arguments.dir}, {threads} threads, interleaved", columns, rows)


def run_optimize(arguments: argparse.Namespace) -> None:
    import inhernet
    from inhernet import specs

    if arguments.batch < 1:
        raise specs.UsageError(f"--batch is {arguments.batch}, expected at least 1")
    need_free(arguments.out, arguments)
    model = _load(arguments, optimized=False)
    loader = specs.data(arguments.data).judge if arguments.data else None
    inputs = specs.example_inputs(model, arguments.input, loader)(arguments.batch)
    inhernet.save(inhernet.optimize(model, inputs, seconds=arguments.seconds), arguments.out)
    say(f"written to {arguments.out}")


def dense_like(model: nn.Module, trust: Sequence[str] = ()) -> nn.Module:
    """The dense architecture behind a loaded network, with arbitrary weights: enough to be timed."""
    import torch

    from inhernet import architecture

    name, args = cast("tuple[str, dict[str, Any]]", model.inhernet_factory)
    dense = architecture.build(name, args, None, tuple(trust)).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in dense.state_dict().values():
            # Ordinary numbers: NaN or denormals of fresh memory would be timed as something else.
            tensor.copy_(torch.full_like(tensor, 0.02) if tensor.is_floating_point() else torch.zeros_like(tensor))
    return dense.eval()


def trusted(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What `--trust` names, and the module of a `--teacher module:function`: the command runs that anyway."""
    module = (getattr(arguments, "teacher", None) or "").partition(":")[0]
    return (*arguments.trust, *([module] if module not in ("", "hf") else []))


def _load(arguments: argparse.Namespace, optimized: bool = True) -> nn.Module:
    import inhernet
    from inhernet import architecture, specs

    if trusted(arguments):
        specs.find_in_current_directory()
    try:
        return inhernet.load(arguments.dir, trust=trusted(arguments), optimized=optimized)
    except architecture.Untrusted as error:
        raise specs.UsageError(
            f"{arguments.dir}: {error.message}; if you trust it, add --trust {error.package}"
        ) from error


def run_doctor(arguments: argparse.Namespace) -> None:
    from inhernet.doctor import doctor

    doctor()


def run_demo(arguments: argparse.Namespace) -> int:
    from inhernet.specs import UsageError

    out = Path(arguments.out or Path("runs") / arguments.name)
    for name in ("seeds", "splits"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.name == "minilm":
        from inhernet.demos import minilm

        minilm.run(out)
        return 0
    from inhernet.demos import digits

    config = digits.DigitsConfig(compile=not arguments.no_compile)
    return digits.run(out, config, seeds=arguments.seeds, splits=arguments.splits)


if __name__ == "__main__":
    sys.exit(main())
