"""A student with adapters is its own teacher: the model with its adapters disabled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .layer_names import modules_by_name

# What PEFT does not disable again; the other ways to begin leave the base as it is.
_REWRITING = ("pissa", "corda", "olora", "loftq", "lora_ga")  # beginnings of init_lora_weights
_CHANGING = ("kasa_config", "layer_replication")
# Prompt learning that adds keys and values to the attention, and no tokens.
_WITHOUT_TOKENS = ("PREFIX_TUNING", "CARTRIDGE")
# The names under which modules of PEFT keep what was there before.
_BASE = ("base_model", "model", "base_layer")


def check_adapters(model: nn.Module) -> None:
    """Refuse a model that, with its adapters disabled, is not what it was before it got them.

    Raises:
        ValueError: the model has no adapters, or an adapter changed the rest of the model, trains
            it, or has tokens of its own. The message names the adapter and its setting.
    """
    for adapted in _adapted(model):
        for name, config in adapted.peft_config.items():
            reason = _reason_against(config)
            if reason:
                raise ValueError(
                    f"teacher must not be None for an adapter with {reason}; got adapter {name!r}: "
                    "give teacher=copy.deepcopy(model) from before the adapter was added"
                )


def virtual_tokens(model: nn.Module) -> int:
    """The number of tokens that prompt learning puts before the inputs; 0 without it."""
    configs = [c for adapted in _find(model) for c in adapted.peft_config.values()]
    return max((_virtual_tokens(config) for config in configs), default=0)


def running_statistics(model: nn.Module) -> list[str]:
    """The modules whose running statistics change in each pass, by name."""
    return [
        name
        for name, module in modules_by_name(model).items()
        if isinstance(module, _NormBase) and module.running_mean is not None and module.training
        # Of a module that PEFT trains a copy of, only the copy runs.
        if not {"original_module", "modules_to_save"} & set(name.split("."))
    ]


def trained_base_parameters(features: Iterable[Tensor], model: nn.Module) -> list[str]:
    """The trained parameters outside adapters that affect these features, by name.

    They are looked for in the graph of the features, but not inside compiled parts of it, which
    name all of their parameters for each output.
    """
    trained = {id(p): name for name, p in _base_parameters(model) if p.requires_grad}
    return [trained[leaf] for leaf in _leaves(features) if leaf in trained] if trained else []


def without_adapters(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which the model behaves as before its adapters were added.

    Raises:
        ValueError: the model has no adapters.
    """
    return _disabled(_adapted(model))


def _adapted(model: nn.Module) -> list[Any]:
    """The outermost modules in a model, or itself, that have adapters of PEFT."""
    found = list(_find(model))
    if not found:
        raise ValueError(
            "teacher must not be None for a student without adapters (a PEFT model, or a "
            "transformers model with add_adapter); use copy.deepcopy(student) from before "
            f"finetuning; got None for {type(model).__name__}. If a trainer adds the adapters, "
            "give it rift=lambda model: rk.RIFTRegularizer(model, ...)"
        )
    return found


def _find(module: nn.Module) -> Iterator[Any]:
    # The former is of PEFT, and the latter of transformers, once it has adapters.
    if hasattr(module, "disable_adapter") or getattr(module, "_hf_peft_config_loaded", False):
        yield module
        return
    for child in module.children():
        yield from _find(child)


def _reason_against(config: Any) -> str | None:
    """The setting by which the model without this adapter is not the pretrained model, and how."""
    if getattr(config, "is_prompt_learning", False):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        return f"peft_type={kind!r}, whose virtual tokens a model without it does not have"
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_REWRITING):
        return f"init_lora_weights={init!r}, which rewrites the pretrained weights"
    for name in _CHANGING:
        if getattr(config, name, None):
            return f"{name}={getattr(config, name)!r}, which rewrites the pretrained model"
    bias = getattr(config, "bias", "none")
    return None if bias == "none" else f"bias={bias!r}, which trains the model's own biases"


def _virtual_tokens(config: Any) -> int:
    if not getattr(config, "is_prompt_learning", False) or config.peft_type in _WITHOUT_TOKENS:
        return 0
    return int(config.num_virtual_tokens)


def _base_parameters(
    module: nn.Module, prefix: str = "", is_adapter: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are not of adapters, with their names."""
    # A sharded module has a class of its own, whose base is PEFT's.
    is_of_peft = any(base.__module__.startswith("peft.") for base in type(module).__mro__)
    if not (is_adapter or is_of_peft):
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield name, parameter
    for name, child in module.named_children():
        is_added = is_adapter or (is_of_peft and name not in _BASE)
        yield from _base_parameters(child, f"{prefix}.{name}".removeprefix("."), is_added)


def _leaves(features: Iterable[Tensor]) -> Iterator[int]:
    """The ids of the parameters in the graph of these features."""
    nodes: list[Any] = [x.grad_fn for x in features if x.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "CompiledFunctionBackward":
            continue
        variable = getattr(node, "variable", None)  # of a node that accumulates a gradient
        if variable is not None:
            yield id(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


@contextmanager
def _disabled(models: list[Any]) -> Iterator[None]:
    """Disable the adapters, and afterwards restore ``requires_grad`` of every parameter.

    When PEFT enables an adapter again, it also unfreezes what the user had frozen in it.
    """
    states = [(p, p.requires_grad) for model in models for p in model.parameters()]
    try:
        with ExitStack() as stack:
            for model in models:
                if hasattr(model, "disable_adapter"):
                    stack.enter_context(model.disable_adapter())
                else:
                    stack.callback(model.enable_adapters)
                    model.disable_adapters()
            yield
    finally:
        for parameter, requires_grad in states:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
