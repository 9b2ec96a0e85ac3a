"""`inhernet export`: a file for another engine."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from inhernet.console import say

from .options import Command, add_model, load_model
from .usage import DATA_HELP, TEACHER_HELP, UsageError

FORMATS = ("onnx", "program", "aoti", "dense", "lowrankarena")


def add(command: Command) -> None:
    parser = command("export", run, "write a file for another engine, run it, and compare it with the network")
    add_model(parser)
    parser.add_argument("--format", choices=FORMATS, required=True, help="onnx: ONNX Runtime, OpenVINO; program: "
                        "torch.export.load; aoti: compiled for C++ on this kind of processor; dense: the weights of the "
                        "dense network that equals it, safetensors; lowrankarena: a directory for that benchmark")  # fmt: skip
    parser.add_argument("--data", metavar="DATA", help=f"take an input from here: {DATA_HELP}")
    parser.add_argument("--teacher", metavar="TEACHER", help=f"whose tokenizer reads text: or images: ({TEACHER_HELP})")
    parser.add_argument("--input", metavar="SHAPE", help="shape of one example, such as 3x32x32")
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="examples to compare with (default: 2)")
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write (lowrankarena: DIR)")
    parser.add_argument("--overwrite", action="store_true", help="let --out replace a file")


def run(arguments: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from inhernet import atomic, formats

    from . import specs

    out = Path(arguments.out)
    if out.is_dir() or (out.exists() and not arguments.overwrite):
        raise UsageError(f"--out is {arguments.out!r}, which exists; give another file, or --overwrite to replace it")
    if arguments.batch < 1:
        raise UsageError(f"--batch is {arguments.batch}, expected at least 1")
    model = load_model(arguments, optimized=False)
    started = time.perf_counter()
    if arguments.format == "dense":
        dense = formats.to_dense(model)
        with atomic.file(out) as target:
            save_file({name: tensor.clone() for name, tensor in dense.state_dict().items()}, target)
        say(
            f"written to {out}: {sum(p.numel() for p in dense.parameters()):,} parameters, names as the dense network's"
        )
        return
    loader = specs.data(arguments.data, arguments.teacher).judge if arguments.data else None
    inputs = specs.example_inputs(model, arguments.input, loader)(arguments.batch)
    write = {"onnx": formats.export_onnx, "program": formats.export_program, "aoti": formats.export_aoti,
             "lowrankarena": formats.export_lowrankarena}  # fmt: skip
    difference = write[arguments.format](model, out, inputs)
    size = sum(path.stat().st_size for path in (out.iterdir() if out.is_dir() else [out]))
    say(
        f"written to {out} in {time.perf_counter() - started:.0f} s, {size / 1e6:.1f} MB; loaded and run at two numbers of "
        f"examples, largest relative difference {difference:.1e}"
    )
