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
    """What can run here and what cannot, with the reasons: the text of ``python -m rift_kernels``.

    Never raises; imports neither triton nor a CUDA extension.
    """
    found = availability.INSTALLED["triton"]
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        gpu = f"{name} (sm_{capability[0]}{capability[1]})"
    else:
        gpu = "none that torch can use"
    lines = [
        f"rift_kernels {__version__}",
        f"  python   {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"  torch    {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        f"  triton   {'installed' if found else 'not installed'}",
        f"  GPU      {gpu}",
        f"  {ENVIRONMENT_VARIABLE}={os.environ.get(ENVIRONMENT_VARIABLE, '(not set)')}",
        "backends",
    ]
    for backend in availability.BACKENDS:
        reason = availability.reason_against(backend)
        lines.append(f"  {backend:<8} {'ready' if reason is None else 'no: ' + reason}")
    lines.append("on a GPU, the first that can run and was seen to work")
    lines += [
        f"  {backend:<8} {what}" for backend, what in (*PREFERRED, ("eager", "what neither takes"))
    ]
    lines += _verdict_lines()
    return "\n".join(lines)


def _verdict_lines() -> list[str]:
    """What is known of the kernels that could run on this GPU."""
    able = [name for name, _ in PREFERRED if availability.reason_against(name) is None]
    device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if not able or not torch.cuda.is_available():
        return []
    variable = self_test.ENVIRONMENT_VARIABLE
    lines = [f"tested on this GPU ({variable}={os.environ.get(variable, '(not set)')})"]
    for one in known_answers.ALL:
        if one.backend in able:
            verdict = verdicts.read(verdicts.identity(one.backend, device), one)
            state = "not yet" if verdict is None else "works" if verdict.good else verdict.seen
            lines.append(f"  {one!s:<26} {state}")
    return lines
