"""What a run is told: one validated record, read from YAML or a preset and changed with ``--set key=value``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nasq.errors import InputError, choose_from

__all__ = ["RunConfig", "load_config", "presets"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Part):
    """Which images; see :func:`nasq.data.load`."""

    name: str | None = None
    root: Path | None = None
    download: bool = False
    validation: int | float | None = None
    validation_views: int = Field(default=1, ge=1)
    recalibration_augment: bool = True
    image_size: int | tuple[int, int] | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    test_seed: int | None = Field(default=None, ge=0, lt=2**63)


class QuantizationConfig(_Part):
    """Which bits and forms; see :func:`nasq.quant.quantize`."""

    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    weight_granularity: tuple[
        Literal["tensor", "channel"] | Annotated[str, Field(pattern="^group[1-9][0-9]*$")], ...
    ] = ("channel",)
    weight_symmetry: tuple[Literal["symmetric", "asymmetric"], ...] = ("symmetric",)
    activation_symmetry: tuple[Literal["symmetric", "asymmetric"], ...] = ("symmetric",)
    first_last_bits: int | None = Field(default=8, ge=2, le=8)
    power_of_two_steps: bool = False
    calibration_images: int = Field(default=512, ge=1)


class SplitConfig(_Part):
    """When and how the supernet is split; see :class:`nasq.training.splitting.SplitPlan`."""

    epochs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    groups: int | None = Field(default=2, ge=2)
    repetitions: int = Field(default=100, ge=1)
    batch_size: int = Field(default=64, ge=1)
    choices: tuple[str, ...] | None = None
    restart: bool = False


class MixtureConfig(_Part):
    """A balanced mixture of supernets; see :class:`nasq.training.splitting.MixturePaths`. With one set it is off."""

    sets: int = Field(default=1, ge=1)
    choices: tuple[str, ...] | None = None
    decay: float = Field(default=0.9, ge=0, lt=1)
    temperature: float = Field(default=100.0, gt=0, allow_inf_nan=False)


class CascadeConfig(_Part):
    """Cheap looks before a full evaluation; see :mod:`nasq.search.cascade`. Without levels it is off."""

    levels: tuple[Literal["proxy", "predictor", "part"], ...] = ()
    proxy: str = "naswot"
    proxy_images: int = Field(default=64, ge=2)
    images: float = Field(default=0.25, gt=0, le=1)
    step: int = Field(default=128, ge=1)
    recalibration_images: int = Field(default=256, ge=1)
    confidence: float = Field(default=3.0, gt=0)
    dominators: int = Field(default=4, ge=1)
    least: int = Field(default=24, ge=3)


class AssistConfig(_Part):
    """A cheap score that chooses among an algorithm's proposals; see :class:`nasq.search.Assist`. Without one it is off."""

    score: str | None = None
    images: int = Field(default=64, ge=2)
    starts: int = Field(default=10, ge=1)
    offspring: int = Field(default=4, ge=1)


class SearchConfig(_Part):
    """What is searched for, and how long."""

    objectives: tuple[str, ...] = ("accuracy", "bytes")
    constraints: tuple[str, ...] = ()
    algorithm: str = "nsga2"
    settings: dict[str, Any] = {}
    uniform_starts: bool = True
    evaluations: int = Field(default=200, ge=1)
    population: int = Field(default=40, ge=2)
    batch: int | None = Field(default=None, ge=1)
    recalibration_images: int = Field(default=1024, ge=1)
    batch_size: int = Field(default=512, ge=1)
    latency_batch: int = Field(default=1, ge=1)
    latency_table: Path | None = None
    cascade: CascadeConfig = CascadeConfig()
    assist: AssistConfig = AssistConfig()

    @field_validator("algorithm")
    @classmethod
    def _installed(cls, name: str) -> str:
        from nasq.search.algorithms import ALGORITHMS  # late, so that reading a configuration stays quick

        if name not in ALGORITHMS:
            raise ValueError(f"give one of {', '.join(ALGORITHMS)}")
        return name


class BenchConfig(_Part):
    """What is timed; see :func:`nasq.deploy.bench.bench_bundle`."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 64), min_length=1)
    threads: int = Field(default=1, ge=1)
    repeats: int = Field(default=30, ge=6)


class RunConfig(_Part):
    """A whole run.

    ``warmup`` and ``train`` are settings of :class:`nasq.training.TrainConfig`: first the float supernet, then the
    quantized one. Without ``warmup`` quantized training starts from random weights. With ``train_inside_constraints``
    the random subnets of quantized training keep the search's constraints. With ``split.epochs`` the supernet is split
    during quantized training, and the search runs on the forest; with ``mixture.sets`` several sets of weights are trained
    side by side. ``processes`` share the batches of training. With ``finetune`` (settings as in ``train``) the best
    subnet is trained on alone after the export.
    """

    space: str = "digits_mobile"
    space_arguments: dict[str, Any] = {}
    data: DataConfig = DataConfig()
    target: str = "onnxruntime-cpu"
    check_target: bool = True
    quantization: QuantizationConfig = QuantizationConfig()
    warmup: dict[str, Any] | None = {}
    train: dict[str, Any] = {}
    train_inside_constraints: bool = False
    split: SplitConfig = SplitConfig()
    mixture: MixtureConfig = MixtureConfig()
    search: SearchConfig = SearchConfig()
    export: int = Field(
        default=3, ge=1, description="How many subnets of the front become bundles, the best one included."
    )
    finetune: dict[str, Any] | None = None
    bench: BenchConfig = BenchConfig()
    device: str = "cpu"
    processes: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def to_yaml(self) -> str:
        """As YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def presets() -> list[str]:
    """Names of the configurations that come with nasq."""
    return sorted(path.name.removesuffix(".yaml") for path in _presets().iterdir() if path.name.endswith(".yaml"))


def _presets() -> Any:
    return files("nasq.run") / "presets"


def _keys(location: Sequence[int | str]) -> list[str]:
    """The keys that would have been allowed where ``location`` points."""
    part: type[BaseModel] = RunConfig
    for name in location[:-1]:
        annotation = part.model_fields[str(name)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        part = annotation
    return list(part.model_fields)


def _refused(error: ValidationError, values: Mapping[str, Any]) -> InputError:
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        where = ".".join(map(str, first["loc"]))
        return choose_from("config key", where, [*_prefixed(first["loc"])], "See docs/config.md.")
    where, given = _given(first["loc"], values)
    # Where a key may have several types, there is an error for each of them.
    about = [one for one in error.errors() if _given(one["loc"], values)[0] == where]
    told = dict.fromkeys(_PLAIN.get(one["type"], one["msg"].removeprefix("Value error, ")) for one in about)
    return InputError(f"the config key {where!r} is {given!r}: {'; or '.join(told)}. See docs/config.md.")


_PLAIN = {
    "tuple_type": "give a list, such as [a, b]",
    "dict_type": "give keys with values, such as {key: value}",
    "model_type": "give keys with values, such as {key: value}",
}
"""What pydantic says in Python's words, in YAML's."""


def _given(location: Sequence[int | str], values: Any) -> tuple[str, Any]:
    """The key that an error is about, and its value; pydantic's location goes on with the types it tried."""
    names: list[str] = []
    for name in location:
        try:
            values = values[name]
        except (KeyError, IndexError, TypeError):
            break
        names.append(str(name))
    return ".".join(names), values


def _prefixed(location: Sequence[int | str]) -> list[str]:
    prefix = "".join(f"{name}." for name in location[:-1])
    return [prefix + key for key in _keys(location)]


class _Loader(yaml.SafeLoader):
    """YAML's plain values; ``1e-3`` is a number, as in YAML 1.2, and a key may be there only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; refuses a repeated key."""
        seen: list[object] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.append(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None)
        why = f" ({problem})" if problem else ""
        raise InputError(f"{source} is not YAML{line}{why}. Write one 'key: value' per line.") from error


def _set(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise InputError(f"--set {change!r} is not key=value. Example: --set search.evaluations=50")
    *parents, last = key.strip().split(".")
    inner = values
    for name in parents:
        found = inner.setdefault(name, {})
        if not isinstance(found, dict):
            raise InputError(f"--set {change!r}: {name!r} holds a value, not further keys. See docs/config.md.")
        inner = found
    inner[last] = _parse(text, f"--set {change!r}")


def load_config(path: Path | None = None, preset: str | None = None, changes: Sequence[str] = ()) -> RunConfig:
    """Reads a configuration.

    Args:
        path: A YAML file.
        preset: Name of a configuration that comes with nasq; the file's keys go on top of it.
        changes: ``key=value`` texts, values in YAML, keys with dots: ``search.evaluations=50``.

    Raises:
        InputError: An unknown key (the nearest one is suggested), a value outside its range, an unknown preset, or a
            file that is missing or not YAML.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            raise choose_from("preset", preset, presets())
        values = _parse((_presets() / f"{preset}.yaml").read_text(), f"preset {preset!r}")
    if path is not None:
        values = _merged(values, _read(path))
    for change in changes:
        _set(values, change)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise _refused(error, values) from error
    for key in ("warmup", "train", "finetune"):
        _check_training(key, getattr(config, key))
    return config


def _check_training(key: str, settings: Mapping[str, Any] | None) -> None:
    """Refuses what the trainer would refuse, before anything else is done."""
    if not settings:
        return
    from nasq.training import TrainConfig  # loads torch

    try:
        TrainConfig.from_dict(settings)
    except InputError as error:
        raise InputError(f"in the config key {key!r}: {str(error).rstrip('.')}. See docs/config.md.") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = _parse(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the config file {path} cannot be read: {error}. Give a YAML file or --preset NAME."
        ) from error
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"holds {str(found)[:40]!r}, not keys with values"
        raise InputError(f"the config file {path} {what}. Write one 'key: value' per line; see docs/config.md.")
    return found


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
