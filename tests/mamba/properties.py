"""How the tests of this family draw their problems: examples per backend, trees of drafts."""

from __future__ import annotations

import functools
import inspect

import torch
from conftest import DEVICE, backends_here
from hypothesis import given, settings
from hypothesis import strategies as st


def examples(*strategies):
    """``given`` for a test of a backend: few examples in Triton's interpreter, where one takes a second."""

    def decorate(test):
        parameters = list(inspect.signature(test).parameters.values())
        fixtures = parameters[: len(parameters) - len(strategies)]

        def run(**values):
            slow = DEVICE == "cpu" and "triton" in (values.get("backend"), values.get("which"))
            most = settings().max_examples // (5 if slow else 1)
            first = [values[p.name] for p in fixtures]
            settings(max_examples=most)(given(st.tuples(*strategies))(lambda drawn: test(*first, *drawn)))()

        functools.update_wrapper(run, test)  # its name and its marks; pytest fills in what is not drawn
        run.__signature__ = inspect.Signature(fixtures)
        return run

    return decorate


def all_serving(*names):
    """The backends that every one of these operators has on this machine, for tests that call several."""
    return [b for b in backends_here(names) if all(b in backends_here([name]) for name in names)]


def checking(*names):
    """The backends that look at values, which a GPU's do not: there, a slot that does not exist ends the process."""
    return [b for b in backends_here(names) if b in ("reference", "cpu") and DEVICE == "cpu"]


def random_tree(rnd, batch, count):
    parents = [[rnd.randrange(-1, t) for t in range(count)] for _ in range(batch)]
    return torch.tensor(parents, dtype=torch.int32, device=DEVICE).view(batch, count)


def path_to(parents, t):
    """Numbers of the tokens from the state to token t."""
    path = [t]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path
