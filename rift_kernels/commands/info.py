"""``python -m rift_kernels``: what can run on this machine, and why not."""

from __future__ import annotations

import os
import platform

import torch

from rift_kernels._version import __version__
from rift_kernels.dispatch import availability
from rift_kernels.dispatch.plan import ENVIRONMENT_VARIABLE, PREFERRED
from rift_kernels.trust import known_answers, self_test, verdicts


def backend_report() -> str:
    """Which backends can run here, and why others cannot: the text of ``python -m rift_kernels``.

    Never raises; imports neither triton nor a CUDA extension.
    """
    has_triton = availability.INSTALLED["triton"]
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        gpu = f"{name} (sm_{capability[0]}{capability[1]})"
    else:
        gpu = "none that torch can use"
    lines = [
        f"rift_kernels {__version__}",
        f"  python   {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"  torch    {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        f"  triton   {'installed' if has_triton else 'not installed'}",
        f"  GPU      {gpu}",
        f"  {ENVIRONMENT_VARIABLE}={os.environ.get(ENVIRONMENT_VARIABLE, '(not set)')}",
        "backends",
    ]
    for backend in availability.BACKENDS:
        reason = availability.reason_against(backend)
        lines.append(f"  {backend:<8} {'ready' if reason is None else 'no: ' + reason}")
    lines.append("on a GPU, auto takes the first that can run and passed its test")
    lines += [
        f"  {backend:<8} {measures}"
        for backend, measures in (*PREFERRED, ("eager", "everything else"))
    ]
    lines += _verdict_lines()
    return "\n".join(lines)


def _verdict_lines() -> list[str]:
    """The verdicts on the kernels that can run on this GPU."""
    backends = [name for name, _ in PREFERRED if availability.reason_against(name) is None]
    device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if not backends or not torch.cuda.is_available():
        return []
    variable = self_test.ENVIRONMENT_VARIABLE
    lines = [f"tested on this GPU ({variable}={os.environ.get(variable, '(not set)')})"]
    for kernels in known_answers.ALL:
        if kernels.backend in backends:
            verdict = verdicts.read(verdicts.identity(kernels.backend, device), kernels)
            state = "not yet" if verdict is None else "works" if verdict.good else verdict.seen
            lines.append(f"  {kernels!s:<35} {state}")
    return lines
