"""`inhernet doctor`: what is installed, built and fast here."""

from __future__ import annotations

import argparse

from .options import Command


def add(command: Command) -> None:
    command("doctor", run, "what is installed, built and fast here, and why not")


def run(arguments: argparse.Namespace) -> None:
    from inhernet.doctor import doctor

    doctor()
