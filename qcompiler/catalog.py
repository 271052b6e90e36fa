"""What there is to compile with, as data: passes, targets and operator rows, with the packages that they come from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from qcompiler.errors import UserError
from qcompiler.ops import OpRule
from qcompiler.pipeline import Pass, closest, format_value, parse_pipeline
from qcompiler.plugin import Registry
from qcompiler.quant import QuantSpec
from qcompiler.target import Target


@dataclass(frozen=True)
class PassFacts:
    """A pass: `options` with their defaults, `places` in the default pipeline (from 1), and where its code is."""

    name: str
    summary: str
    description: str
    options: Mapping[str, Any]
    requires: str
    establishes: str | None
    package: str
    places: tuple[int, ...]
    file: str

    @property
    def phases(self) -> str:
        """`calibrated -> qdq`, or the phase that it keeps."""
        return self.requires if self.establishes is None else f"{self.requires} -> {self.establishes}"

    @property
    def signature(self) -> str:
        """The options in text form: `search=true`."""
        return " ".join(f"{key}={format_value(value)}" for key, value in self.options.items())

    def lines(self, pipeline: list[str]) -> Iterator[str]:
        """The explanation of the pass; `pipeline` names the passes of the default one."""
        yield f"{self.name}: {self.description}"
        yield ""
        yield f"  phases    {self.phases}"
        yield f"  options   {self.signature or 'none'}"
        for place in self.places:
            before = f"after {pipeline[place - 2]}" if place > 1 else "first"
            behind = f", before {pipeline[place]}" if place < len(pipeline) else ", last"
            yield f"  default   {place} of {len(pipeline)}: {before}{behind}"
        if not self.places:
            yield "  default   not in the default pipeline; name it in --passes"
        yield f"  from      {self.package}"
        yield f"  file      {self.file}"


def passes(registry: Registry) -> list[PassFacts]:
    """All passes, by name."""
    order = default_order(registry)
    return [_pass_facts(registry, name, order) for name in sorted(registry.passes)]


def named_pass(registry: Registry, name: str) -> PassFacts:
    """One pass. Raises UserError if there is none of that name."""
    return _pass_facts(registry, _known(name, registry.passes, "pass"), default_order(registry))


def default_order(registry: Registry) -> list[str]:
    """The names of the passes of the default pipeline, in order."""
    return [stage.name for stage in parse_pipeline(registry.pipelines["default"], registry.passes).passes]


def _pass_facts(registry: Registry, name: str, order: list[str]) -> PassFacts:
    kind: type[Pass] = registry.passes[name]
    text = inspect.getdoc(kind) or ""
    return PassFacts(
        name=name,
        summary=re.split(r"\.\s+(?=[A-Z`])", " ".join(text.split()))[0].rstrip("."),
        description=text,
        options={f.name: f.default for f in fields(kind)},  # type: ignore[arg-type]
        requires=kind.requires.name.lower(),
        establishes=None if kind.establishes is None else kind.establishes.name.lower(),
        package=registry.home("pass", name),
        places=tuple(i for i, stage in enumerate(order, 1) if stage == name),
        file=inspect.getfile(kind),
    )


@dataclass(frozen=True)
class OpFacts:
    """An operator row and its fate on a target: `reason` says why all its nodes stay float, "" if they need not."""

    op: str
    operands: tuple[str, ...]
    result: str
    lowering: str
    anchor: bool
    conditions: bool
    reason: str
    package: str

    @property
    def fate(self) -> str:
        """What happens on the target, in words."""
        if self.reason:
            return f"float: {self.reason}"
        where = "" if self.anchor else " between integer neighbours"
        return f"integer{where}{', if the node allows it' if self.conditions else ''}"


def operators(registry: Registry, target: Target) -> list[OpFacts]:
    """All rows, in the order of the table."""
    return [
        OpFacts(
            op=key,
            operands=tuple(role.value for role in rule.operands),
            result=rule.result.value,
            lowering=rule.lowering.value,
            anchor=rule.anchor,
            conditions=rule.refuse is not OpRule.refuse,
            reason=target.why_never(rule) or "",
            package=registry.home("op", key),
        )
        for key, rule in registry.ops.items()
    ]


def named_target(registry: Registry, name: str) -> Target:
    """One target. Raises UserError if there is none of that name."""
    return registry.targets[_known(name, registry.targets, "target")]


def target_facts(registry: Registry, target: Target) -> dict[str, Any]:
    """A target as plain data; `float` has the reason for each operator that never is integer there."""
    return {
        "name": target.name,
        "description": target.description,
        "package": registry.home("target", target.name),
        "opset": target.opset,
        "activation": integer_type(target.activation),
        "weight": integer_type(target.weight) + (" per channel" if target.per_channel else ""),
        "lowerings": sorted(lowering.value for lowering in target.lowerings),
        "kernels": sorted(target.kernels),
        "float_result": sorted(target.float_result),
        "rewrites": sorted(target.rewrites),
        "float": {facts.op: facts.reason for facts in operators(registry, target) if facts.reason},
    }


def integer_type(spec: QuantSpec) -> str:
    """`int8 -64..63 symmetric`."""
    return f"{spec.dtype} {spec.qmin}..{spec.qmax}{' symmetric' if spec.symmetric else ''}"


def _known(name: str, table: Mapping[str, Any], kind: str) -> str:
    if name not in table:
        raise UserError(f"no {kind} is called {name!r}{closest(name, table)}", kind)
    return name
