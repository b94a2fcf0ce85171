"""Measures an arm in rounds, between which it waits for its turn.

An arm reports each round as a line of JSON on stdout and goes on when a line comes on stdin, so
that the rounds of the arms alternate in time while each arm starts only once. CPU seconds are the
process's own; a waiting process uses none.
"""

import json
import os
import resource
import sys
import time
from dataclasses import dataclass, field

MARK = "@round "


@dataclass
class Gate:
    """Counts one arm's steps and tokens; `steps` a round after `warmup` that are not measured."""

    steps: int
    rounds: int
    warmup: int = 1
    tokens: int = 0
    positions: int = 0
    data: float = 0.0
    _done: int = 0
    _began: float = field(default_factory=time.process_time)

    def ready(self, **found: float) -> None:
        """Report the start-up: imports, building, the first steps. Then wait."""
        self._pass("ready", **found)

    def step(self) -> None:
        """Count a step; at the end of a round report and wait, after the last one exit."""
        self._done += 1
        if self._done == self.warmup:
            self.ready()
        elif self._done > self.warmup and (self._done - self.warmup) % self.steps == 0:
            self._pass("round")
            if self._done == self.warmup + self.steps * self.rounds:
                os._exit(0)  # neither evaluation nor a saved model is measured

    def _pass(self, kind: str, **found: float) -> None:
        report = {
            "kind": kind,
            "cpu": time.process_time() - self._began,
            "tokens": self.tokens,
            "positions": self.positions,
            "data": self.data,
            "steps": self.steps,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            **found,
        }
        print(f"{MARK}{json.dumps(report)}", flush=True)
        if not sys.stdin.readline():
            os._exit(1)  # whoever gave the turns is gone
        self.tokens = self.positions = 0
        self.data = 0.0
        self._began = time.process_time()


class Timed:
    """Mixed into a Trainer: counts the tokens of its batches and the seconds of getting them."""

    gate: Gate
    pad_token: int

    def get_batch_samples(self, *arguments, **options):  # noqa: ANN002, ANN003, ANN201
        """Count the CPU seconds of what Trainer does to get the batches of a step."""
        began = time.process_time()
        found = super().get_batch_samples(*arguments, **options)
        self.gate.data += time.process_time() - began
        return found

    def training_step(self, model, inputs, *arguments, **options):  # noqa: ANN001, ANN002, ANN003, ANN201
        """Count the positions of a micro-batch, and those that are no padding."""
        ids = inputs["input_ids"]
        self.gate.tokens += int((ids != self.pad_token).sum())
        self.gate.positions += ids.numel()
        return super().training_step(model, inputs, *arguments, **options)
