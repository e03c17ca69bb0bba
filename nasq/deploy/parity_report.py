"""What the gate found: one layer alone, and a whole file, with the reasons why it may not be shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nasq.deploy.runtimes import Coverage
from nasq.errors import ArtifactError
from nasq.quant.program import AvgPool, Concat, Conv, Input, Linear

__all__ = ["LayerResult", "ParityReport", "differing_alone", "may_change_class", "too_often"]

TOLERANCE = 100_000  # with average pooling, one differing integer in so many is allowed
FEW = 4  # integers that may differ in any case, at ties, where a target promises no equal ones
CHANGED = 1_000  # one image of so many may get another class than the reference's
_FEWEST_FOR_ONE = 50  # images: 1 - 0.999^50 is 4.9 %
COVERAGE = 0.95  # share of the convolutions, and of the sums, that must run as integer kernels


@dataclass(frozen=True)
class LayerResult:
    """One layer run alone on the reference's own integers.

    Attributes:
        path: The layer.
        kind: The operation, such as ``"Conv"``.
        total: Number of integers compared.
        differing: Those that differ.
        largest_step: Largest difference, in steps.
        example: Where the first difference is, and its values; empty without one.
        exact: Whether the target promises equal integers.
        away: Differing integers of the input, a convolution or a linear layer whose exact value is not at a rounding
            tie; looked at where the target promises no equal integers.
    """

    path: str
    kind: str
    total: int
    differing: int
    largest_step: int
    example: str = ""
    exact: bool = True
    away: int = 0

    @property
    def passed(self) -> bool:
        """All equal; average pooling and concatenation may differ by one step in 1 of 100,000 integers.

        Any operation of a target without that promise may do so, in one integer of fewer. The input, a convolution or a
        linear layer must differ at rounding ties alone; how often is a question to all of them together, because few bits
        make few values, and one that lies at a tie occurs often in its layer.
        """
        if not self.exact:
            layer = self.kind in (Input.__name__, Conv.__name__, Linear.__name__)
            few = layer or self.differing <= max(1, self.total // TOLERANCE)
            return few and self.largest_step <= 1 and not self.away
        if self.kind in (AvgPool.__name__, Concat.__name__):
            return self.differing <= self.total // TOLERANCE and self.largest_step <= 1
        return self.differing == 0


def differing_alone(layers: Sequence[LayerResult]) -> tuple[int, int, int]:
    """Where a target promises no equal integers: how many of its layers differ, of how many, and how many may."""
    loose = [layer for layer in layers if not layer.exact]
    total = sum(layer.total for layer in loose)
    return sum(layer.differing for layer in loose), total, max(FEW, total // TOLERANCE)


def too_often(layers: Sequence[LayerResult]) -> bool:
    """Whether more integers differ than the targets without a promise are allowed."""
    differing, _, allowed = differing_alone(layers)
    return differing > allowed


def may_change_class(images: int) -> int:
    """How many of so many images may get another class than the reference's: 1 in 1,000, and one of 50 to 999.

    One changed image of 50 or more is no evidence against 99.9 %: at that very share it is seen more than once in 20 times.
    """
    return max(images // CHANGED, int(images >= _FEWEST_FOR_ONE))


@dataclass(frozen=True)
class ParityReport:
    """What the gate found.

    Attributes:
        target: The target whose arithmetic the bundle follows.
        runtime: Name and version of the runtime that ran the file.
        images: Number of images.
        total, differing: Final integers compared, and those that differ from the reference.
        images_differing: Images with at least one differing integer.
        allowed: How many final integers may differ: 0 where the network has no average pooling; all of them where the
            target does not promise equal ones, and the classes decide.
        dequantized_differing: fp32 outputs that are not exactly ``(integer - zero_point) * scale``.
        accuracy: Of the file on the given labels, 0..1, or ``None`` without labels.
        coverage: Layers that run as integer kernels.
        layers: Every layer alone.
        findings: Numbers in the file that are not the bundle's.
        warnings: Why a match might mean little; they fail nothing.
        diagnosis: Where a difference comes from; empty where there is none.
        versions: Of nasq and the packages that took part.
        same_class: Share of the images to which file and reference give the same class; of all places, where an output
            has a class at each of several.
    """

    target: str
    runtime: str
    images: int
    total: int
    differing: int
    images_differing: int
    allowed: int
    dequantized_differing: int
    accuracy: float | None
    coverage: Coverage
    layers: tuple[LayerResult, ...]
    findings: tuple[str, ...]
    warnings: tuple[str, ...]
    diagnosis: str
    versions: Mapping[str, str]
    same_class: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether the file may be shipped."""
        return not self.failures()

    @property
    def images_of_another_class(self) -> int:
        """Images to which the file and the reference give different classes."""
        return round((1 - self.same_class) * self.images)

    def reaches(self, accuracy: float) -> bool:
        """Whether the file has an accuracy that the integers were evaluated to have on the same images.

        Exactly, but for the images to which the file gives another class: a target that promises no equal integers may
        change a few, and :meth:`failures` judges how many.
        """
        if self.accuracy is None:
            return False
        return round(abs(self.accuracy - accuracy) * self.images) <= self.images_of_another_class

    def failures(self, trained: bool = True) -> list[str]:
        """Every reason why the file may not be shipped, one sentence each.

        Args:
            trained: Whether the classes are judged. Those of an untrained network say nothing: its outputs are nearly
                equal, and one step decides.
        """
        reasons = []
        if self.differing > self.allowed:
            reasons.append(
                f"{self.differing} of {self.total} final integers differ, on {self.images_differing} of {self.images} "
                f"images; allowed: {self.allowed}."
            )
        changed = self.images_of_another_class
        if trained and changed > may_change_class(self.images):
            reasons.append(
                f"{self.same_class:.2%} of the images get the reference's class; at least {1 - 1 / CHANGED:.1%} must "
                f"({changed} of {self.images} do not; allowed: {may_change_class(self.images)})."
            )
        if self.dequantized_differing:
            reasons.append(f"{self.dequantized_differing} fp32 outputs are not their integers dequantized.")
        if self.findings:
            more = f" (and {len(self.findings) - 1} more)" if len(self.findings) > 1 else ""
            reasons.append(f"the file is not the bundle's: {self.findings[0]}{more}.")
        if wrong := [layer for layer in self.layers if not layer.passed]:
            reasons.append(f"{len(wrong)} of {len(self.layers)} layers differ when run alone on the same integers.")
        if too_often(self.layers):
            reasons.append(self._too_often())
        for kind in ("convolutions", "sums"):
            if self.coverage.share(kind) < COVERAGE:
                reasons.append(self._uncovered(kind))
        return reasons

    def _too_often(self) -> str:
        differing, total, allowed = differing_alone(self.layers)
        most = max((layer for layer in self.layers if not layer.exact), key=lambda layer: layer.differing)
        return (
            f"{differing} of {total} integers of the layers alone differ; allowed: {allowed}. {most.path!r} has "
            f"{most.differing} of them. Another subnet may have fewer values at ties; with "
            "quantization.power_of_two_steps there are none."
        )

    def _uncovered(self, kind: str) -> str:
        named = ", ".join(self.coverage.floats) or "the runtime kept no names"
        return (
            f"{self.coverage.integer[kind]} of {self.coverage.total[kind]} {kind} run as integer kernels; at least "
            f"{COVERAGE:.0%} must. In float: {named}."
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for ``parity.json``."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "passed": self.passed,
            "failures": self.failures(),
            **plain,
            "coverage": self.coverage.to_json(),
            "layers": [{**asdict(layer), "passed": layer.passed} for layer in self.layers],
            "findings": list(self.findings),
            "warnings": list(self.warnings),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ParityReport:
        """Undoes :meth:`to_json`.

        Raises:
            ArtifactError: It is not what :meth:`to_json` writes.
        """
        try:
            values = {name: found[name] for name in cls.__dataclass_fields__}
            cover = {**values["coverage"], "floats": tuple(values["coverage"]["floats"])}
            layers = [{key: one[key] for key in LayerResult.__dataclass_fields__} for one in values["layers"]]
            lists = {name: tuple(values[name]) for name in ("findings", "warnings")}
            return cls(
                **values | lists | {"coverage": Coverage(**cover), "layers": tuple(LayerResult(**a) for a in layers)}
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"this is not a parity report: {error!r}. Run 'nasq verify' again.") from error

    def summary(self) -> str:
        """A few lines for people: the verdict, the figures, why it failed, where."""
        cover, equal = self.coverage, sum(layer.differing == 0 for layer in self.layers)
        lines = [
            f"parity {'passed' if self.passed else 'FAILED'}: {self.target} on {self.runtime}, {self.images} images",
            f"final integers: {self.differing} of {self.total} differ (allowed: {self.allowed})",
            f"layers alone: {equal} of {len(self.layers)} equal",
            *(
                f"integer kernels: {cover.integer[kind]} of {cover.total[kind]} {kind}"
                for kind in ("convolutions", "sums")
                if cover.total[kind]
            ),
        ]
        if self.accuracy is not None:
            lines.append(f"accuracy of the file: {self.accuracy:.2%}")
        lines += [f"failed: {reason}" for reason in self.failures()]
        lines += [f"where: {self.diagnosis}"] if self.diagnosis else []
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])
