"""One trainer for every recipe: plain torch, resumable to the bit, safe against Ctrl-C and SIGTERM."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from inhernet.console import Steps, progress
from inhernet.decompose.batches import copied, floating_outputs
from inhernet.decompose.rows import batches_of, length_of, target_of
from inhernet.fingerprint import contents
from inhernet.nn import LowRankModule

from . import state as checkpoints
from .batches import default_forward, outside_inference, to_device
from .guards import Interrupted, caught_signals, evaluating
from .identity import Identity, identify, same_first_batch
from .losses import Loss

Validate = Callable[[nn.Module], Mapping[str, float]]
# Where a run is: attributes that a checkpoint keeps as numbers.
COUNTERS = ("epoch", "position", "step", "loss_sum", "seconds")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; plain values, so that a checkpoint can tell whether it belongs to this run.

    Args:
        epochs: passes over the loader.
        optimizer: "sgd" (Nesterov) or "adamw".
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: of dense weights.
        factor_weight_decay: of `down` and `up`. Zero by default: decaying both factors decays their product twice.
        warmup: share of all steps in which the learning rate rises linearly; a cosine to 0 follows.
        clip_norm: largest gradient norm, None for no clipping.
        accumulate: batches per optimiser step (the gradient is their mean).
        ema: decay of an exponential moving average of the weights, None for none. It is then what is validated.
        amp: "bfloat16" for autocast, None for the model's own dtype.
        keep_best: "min:NAME" or "max:NAME" of a validation figure: the epoch the model is left at; None for the last.
        seed: seeds torch for the run; the caller's generator is left as it was.

    Raises:
        ValueError: a value outside its range.
    """

    epochs: int = 5
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    factor_weight_decay: float = 0.0
    warmup: float = 0.1
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float | None = None
    amp: str | None = None
    keep_best: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        def require(name: str, good: bool, expected: str) -> None:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        require("epochs", isinstance(self.epochs, int) and self.epochs >= 0, "an integer of at least 0")
        require("optimizer", self.optimizer in ("sgd", "adamw"), '"sgd" or "adamw"')
        require("lr", 0 < self.lr < math.inf, "a positive number")
        require("momentum", 0 <= self.momentum < 1, "a number from 0 to 1")
        for name in ("weight_decay", "factor_weight_decay"):
            require(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        require("warmup", 0 <= self.warmup <= 1, "a share from 0 to 1")
        require("clip_norm", self.clip_norm is None or self.clip_norm > 0, "None or a positive number")
        require("accumulate", isinstance(self.accumulate, int) and self.accumulate >= 1, "an integer of at least 1")
        require("ema", self.ema is None or 0 < self.ema < 1, "None or a number between 0 and 1")
        require("amp", self.amp in (None, "bfloat16"), 'None or "bfloat16"')
        named = self.keep_best is None or self.keep_best[:4] in ("min:", "max:")
        require("keep_best", named, 'None, "min:NAME" or "max:NAME"')


@dataclass
class TrainResult:
    """What happened: one record per epoch (`epoch` 0 is before training; then loss, seconds, validation figures)."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    resumed_from: int | None = None

    @property
    def seconds(self) -> float:
        """Training time, validation excluded, over all the sessions of the run."""
        return sum(record.get("seconds", 0.0) for record in self.history)


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    config: TrainConfig | None = None,
    *,
    loss: Loss,
    teacher: nn.Module | None = None,
    validate: Validate | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    description: str = "train",
    show_progress: bool = True,
) -> TrainResult:
    """Train `model` in place; minimises `loss(model(x), target, teacher(x))` over the loader.

    Batches are `(x, target)`, a mapping (passed as keyword arguments, `labels` is the target) or a bare tensor. The
    loader may draw from torch's, Python's and numpy's global generators, in `__iter__` and per batch: a resumed run
    replays the drawing of the epoch it stopped in, and ends with the same bits as an uninterrupted one (CPU). It is
    left at the weights that were validated: the average with `ema`, the best epoch's with `keep_best`.

    A run is its configuration, the model's layers (and starting weights, where it was inherited: those of a fresh
    network are a draw), the teacher's class and weights, the loss (an `Objective` by its values, a function by its
    name), the number of batches and the first of them, drawn again. What differs on resuming is refused by name. A
    loader whose first batch is another one each time, or that can be read only once, cannot be compared so.

    Args:
        model: trained on the device its parameters are on.
        loader: iterable of batches, iterated once per epoch; `len` (if it has one) sets the schedule's length. Targets are
            class indices or probabilities; the index −100 is ignored.
        config: `TrainConfig()` if None.
        loss: `loss(output, target, teacher_output)` → scalar; an `Objective` for instance.
        teacher: run in eval mode without gradients; its parameters, buffers and flags are left as they were.
        validate: figures of a model in eval mode, before training and after every epoch.
        checkpoint_dir: where the state is written, after every epoch and on SIGTERM or Ctrl-C; None for nowhere.
        resume: go on from the state in `checkpoint_dir` if there is one; False starts over.
        forward: `forward(model, batch)` → output, where the default does not fit.
        on_epoch: called with every record of the history.
        description: what the progress display calls the run.
        show_progress: a bar on a terminal; otherwise a line per epoch, and one now and then in a long epoch.

    Returns:
        The history and the epoch the model was left at.

    Raises:
        Interrupted: a signal came; the state is saved. (Without `checkpoint_dir` signals act as usual.)
        TypeError: the loader is a single batch.
        ValueError: no batches, or a loader that can be read only once for several epochs; no trainable parameters; a
            checkpoint of another run; a `keep_best` that `validate` does not return; what the loss raises, with the
            batch's number; an elastic model, whose levels share what would be trained for one of them.
        FloatingPointError: the loss or a gradient is not finite.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> result = fit(model, batches, TrainConfig(epochs=2), loss=lambda y, t, _: nn.functional.cross_entropy(y, t),
        ...              show_progress=False)
        >>> [record["epoch"] for record in result.history]
        [0, 1, 2]
    """
    if "inhernet_levels" in model.__dict__:
        raise ValueError(
            "model is elastic, and training at one level would spoil the others: train inhernet.cut(model, level), or all "
            "levels without labels by inhernet.refine_blocks"
        )
    run = _Run(model, loader, config or TrainConfig(), loss, teacher, validate, forward or default_forward)
    devices = [run.device] if run.device.type == "cuda" else []
    directory = None if checkpoint_dir is None else os.fspath(checkpoint_dir)
    with torch.random.fork_rng(devices), evaluating(teacher), caught_signals(directory is not None) as caught:
        torch.manual_seed(run.config.seed)
        news = run.open(directory, resume)
        total = None if run.batches is None else run.config.epochs * run.batches
        with progress(description, total, show_progress, run.position + run.epoch * (run.batches or 0)) as display:
            for line in news:
                display.line(line)
            run.train(directory, caught, display, on_epoch)
    return run.result


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay: dense weights, factors, and the rest (gates, biases, norms: none)."""
    factors, gates = set(), set()
    for module in model.modules():
        if isinstance(module, LowRankModule):
            factors |= {id(module.down), id(module.up)}
            gates |= {id(p) for p in module.parameters()} - factors
    chosen: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            if id(parameter) in factors:
                decay = config.factor_weight_decay
            else:
                decay = 0.0 if parameter.dim() < 2 or id(parameter) in gates else config.weight_decay
            chosen.setdefault(decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in chosen.items()]


def learning_rate(step: int, steps: int | None, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to 0 at `steps`; constant if `steps` is unknown."""
    if steps is None:
        return config.lr
    rising = config.warmup * steps
    if step < rising:
        return config.lr * min(1.0, (step + 1) / rising)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, steps - rising))))


class _Run:
    """The state of one `fit`."""

    def __init__(self, model, loader, config, loss, teacher, validate, forward) -> None:
        batches_of(loader)
        if isinstance(loader, Iterator) and config.epochs > 1:
            raise ValueError(
                f"loader is a {type(loader).__name__}, which can be read only once, and epochs is {config.epochs}; give "
                "a list of batches or a DataLoader"
            )
        self.model, self.loader, self.config, self.loss = model, loader, config, loss
        self.teacher, self.validate, self.forward = teacher, validate, forward
        groups = parameter_groups(model, config)
        if not groups:
            raise ValueError("model has no parameter that requires a gradient: nothing to train")
        self.parameters = [p for group in groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.momentum > 0)
        else:
            self.optimizer = torch.optim.AdamW(groups, config.lr)
        self.averaged = None
        if config.ema is not None:
            average = get_ema_multi_avg_fn(config.ema)
            self.averaged = AveragedModel(copied(model), multi_avg_fn=average, use_buffers=True)
        self.batches = length_of(loader)
        self.steps = None if self.batches is None else config.epochs * math.ceil(self.batches / config.accumulate)
        self.epoch = self.position = self.step = 0
        self.loss_sum, self.seconds = 0.0, 0.0
        self.epoch_rng: dict[str, Tensor] | None = None
        # With a checkpoint: what the run is, and its first batch (a hash) with the state that it was drawn in.
        self.identity: Identity | None = None
        self.first_batch: str | None = None
        self.first_rng: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] | None = None
        self.result = TrainResult()

    def train(self, directory, caught, display, on_epoch) -> None:
        def record(**figures: float) -> None:
            self.record(figures)
            if on_epoch is not None:
                on_epoch(self.result.history[-1])

        if not self.result.history:
            record(epoch=0)
        while self.epoch < self.config.epochs:
            for stepped in self.run_epoch(display):
                mean = self.loss_sum / self.position
                display.advance(note=f"epoch {self.epoch + 1}/{self.config.epochs}  loss {mean:.4g}")
                if stepped and caught and directory is not None:
                    raise Interrupted(caught[0], str(self.save(directory)))
            if self.position == 0:
                raise ValueError(f"loader gave no batch in epoch {self.epoch + 1}, expected at least one")
            record(epoch=self.epoch + 1, loss=self.loss_sum / self.position, seconds=self.seconds)
            display.line(describe(self.result.history[-1], self.config.epochs))
            self.epoch, self.position, self.loss_sum, self.seconds, self.epoch_rng = self.epoch + 1, 0, 0.0, 0.0, None
            if directory is not None:
                path = self.save(directory)
                if caught:
                    raise Interrupted(caught[0], str(path))
        self.finish()

    def run_epoch(self, display: Steps) -> Iterator[bool]:
        """Train one epoch from `self.position`; yields after every batch, whether an optimiser step was made."""
        self.model.train()  # every epoch: validation leaves the model in eval mode
        now = checkpoints.rng_state()
        if self.epoch_rng is None:
            self.epoch_rng = now
        else:
            checkpoints.set_rng_state(self.epoch_rng)
        batches = iter(self.loader)
        if self.position:
            with progress("passing over batches already trained on", self.position) as bar:
                for _ in range(self.position):
                    next(batches, None)
                    bar.advance()
            checkpoints.set_rng_state(now)
        started = time.perf_counter()
        pending = 0
        while (batch := next(batches, None)) is not None:
            if self.identity is not None and self.first_batch is None:
                self.first_batch, self.first_rng = contents(batch), self.epoch_rng
            self.loss_sum += self.backward(to_device(batch, self.device))
            self.position += 1
            pending += 1
            stepped = pending == self.config.accumulate
            if stepped:
                self.update(pending)
                pending = 0
            self.seconds += time.perf_counter() - started
            yield stepped
            started = time.perf_counter()
        if pending:
            self.update(pending)
        self.seconds += time.perf_counter() - started

    def backward(self, batch: Any) -> float:
        dtype = None if self.config.amp is None else getattr(torch, self.config.amp)
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            guidance = None
            if self.teacher is not None:
                with torch.inference_mode():
                    guidance = self.forward(self.teacher, batch)
                guidance = outside_inference(guidance)
            output = self.forward(self.model, batch)
        where = f"epoch {self.epoch + 1}, batch {self.position + 1}"
        try:
            value = self.loss(output, target_of(batch), guidance)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        figure = float(value.detach())
        if not math.isfinite(figure):
            if guidance is not None and not _finite(guidance):
                cause = "the teacher's output is not finite there"
            else:
                cause = f"lower lr (now {self.config.lr}) or set clip_norm"
            raise FloatingPointError(f"the loss is {figure} in {where}; {cause}")
        value.backward()
        return figure

    def update(self, batches: int) -> None:
        if batches > 1:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], batches)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not math.isfinite(norm):  # one such step, and every weight is NaN
            raise FloatingPointError(
                f"the gradient's norm is {float(norm)} in epoch {self.epoch + 1}, batch {self.position}, though the "
                f"loss is finite; lower lr (now {self.config.lr}), or look for a square root or a logarithm of 0"
            )
        if self.config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def record(self, figures: dict[str, float]) -> None:
        """Validate, append to the history and keep the weights if they are the best so far."""
        judged = self.model if self.averaged is None else self.averaged.module
        if self.validate is not None:
            flags = {module: module.training for module in judged.modules()}
            judged.eval()
            with torch.no_grad():
                figures |= self.validate(judged)
            for module, flag in flags.items():
                module.training = flag
        self.result.history.append(figures)
        if self.config.keep_best is None:
            return
        direction, name = self.config.keep_best.split(":", 1)
        if name not in figures:
            raise ValueError(f"keep_best names {name!r}, but validate returns {sorted(set(figures) - {'epoch'})}")
        scores = [past[name] for past in self.result.history if not math.isnan(past[name])]
        if scores and figures[name] == (min(scores) if direction == "min" else max(scores)):
            self.result.best_epoch = int(figures["epoch"])
            self.best = {key: value.detach().clone() for key, value in judged.state_dict().items()}

    def finish(self) -> None:
        """Leave the model at the weights that were validated."""
        if self.best is not None:
            self.model.load_state_dict(self.best)
        elif self.averaged is not None:
            self.model.load_state_dict(self.averaged.module.state_dict())
        self.model.eval()

    def save(self, directory: str):
        assert self.identity is not None  # `open` was called with the directory
        optimizer, plain = checkpoints.pack_optimizer(self.optimizer)
        groups = {"model": self.model.state_dict(), "optimizer": optimizer, "rng": checkpoints.rng_state()}
        groups["best"] = self.best or {}
        groups["epoch_rng"] = self.epoch_rng or {}
        groups["first_rng"] = self.first_rng
        groups["averaged"] = {} if self.averaged is None else self.averaged.state_dict()
        counters = {name: getattr(self, name) for name in COUNTERS}
        meta = {
            **asdict(self.identity),
            "first_batch": self.first_batch,
            "history": self.result.history,
            "best_epoch": self.result.best_epoch,
            "optimizer": plain,
            "time": time.time(),
        }
        return checkpoints.save_state(directory, groups, counters | meta)

    def open(self, directory: str | None, resume: bool) -> list[str]:
        """Go on from the state in `directory`, if there is one and `resume`; what is to be said about that."""
        if directory is None:
            return []
        self.identity = identify(self.model, self.teacher, self.loss, self.batches, asdict(self.config))
        found = checkpoints.load_state(directory) if resume else None
        if found is None:
            return []
        groups, plain = found
        changed = self.identity.changes(plain["settings"], plain["networks"])
        same = None if changed else same_first_batch(self.loader, plain["first_batch"], groups.get("first_rng", {}))
        if same is False:
            changed.append("the data's first batch differs")
        if changed:
            raise ValueError(
                f"checkpoint_dir {directory!r} holds another run ({'; '.join(changed)}); "
                "use another directory, or resume=False (`inhernet train --restart`) to start over"
            )
        self.restore(groups, plain)
        saved = f"(saved {ago(time.time() - plain['time'])} in {directory})"
        if self.epoch == self.config.epochs:
            return [f"all {self.epoch} epochs are done {saved}"]
        of = "" if self.batches is None else f" of {self.batches}"
        news = [f"resuming in epoch {self.epoch + 1} of {self.config.epochs}, after batch {self.position}{of} {saved}"]
        if same is None:
            news.append("its data cannot be compared: the loader's first batch is another one each time")
        return news

    def restore(self, groups: dict[str, dict[str, Tensor]], plain: dict[str, Any]) -> None:
        self.model.load_state_dict(groups["model"])
        checkpoints.unpack_optimizer(self.optimizer, groups.get("optimizer", {}), plain["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(groups["averaged"])
        self.best, self.epoch_rng = groups.get("best"), groups.get("epoch_rng")
        self.first_batch, self.first_rng = plain["first_batch"], groups.get("first_rng", {})
        for name in COUNTERS:
            setattr(self, name, plain[name])
        self.result = TrainResult(plain["history"], plain["best_epoch"], resumed_from=self.step)
        checkpoints.set_rng_state(groups["rng"])


def _finite(output: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for _, tensor in floating_outputs(output))


def ago(seconds: float) -> str:
    """How long ago that was, in one unit."""
    size, unit = next(((s, u) for s, u in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= 2 * s), (1, "s"))
    return f"{max(0.0, seconds) / size:.0f} {unit} ago"


def describe(record: Mapping[str, float], epochs: int) -> str:
    """One line of a history."""
    figures = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name not in ("epoch", "seconds"))
    return f"epoch {record['epoch']:.0f}/{epochs}  {figures}  {record.get('seconds', 0.0):.1f} s"
