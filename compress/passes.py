"""The kinds of pass, and what a pass declares to the engine.

A pass is a frozen pydantic object: the instance *is* its configuration, so a recipe, a command line and a Python call all
build the same thing and unknown keys are errors. A pass never touches files, devices or hooks: it declares what it needs
and maps tensors to tensors, and the engine (``stream.py``, ``train.py``) does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from torch import Tensor

from compress.weights import Dense, Masked, Weight

if TYPE_CHECKING:
    from compress.block import Block
    from compress.skeleton import Skeleton
    from compress.stats import LinearStats
    from compress.surgery import Surgery
    from compress.walk import Walk


class Taxon(str, Enum):
    """Leaves of the "Model Compression" branch of "Efficient Large Language Models: A Survey" (2312.03863)."""

    WEIGHT_ONLY = "quantization / post-training / weight-only"
    WEIGHT_ACTIVATION = "quantization / post-training / weight-activation"
    QAT = "quantization / quantization-aware training"
    STRUCTURED = "parameter pruning / structured"
    UNSTRUCTURED = "parameter pruning / unstructured"
    LOW_RANK = "low-rank approximation"
    WHITE_BOX = "knowledge distillation / white-box"
    BLACK_BOX = "knowledge distillation / black-box"
    SHARING = "parameter sharing"


class Needs(NamedTuple):
    """What a pass asks the engine for, before any compute.

    stats: names of :class:`compress.stats.LinearStats` sums ("sum", "sqnorm", "absmax", "hessian", "covariance", ...). All are
    of the inputs that a layer meets, but "fisher", which is of the model's gradients before the stage.
    teacher: whether a training pass is given the signal of the uncompressed model, and whether a block pass's ``reference`` is
    of that model, and not of what the stage began with.
    states: whether the signals of a training pass hold what enters every block.
    inputs: whether a :class:`BlockPass`, or a survey's ``effect``, is given the calibration activations that enter the block.
    reference: whether it is also given what the block put out before the stage, for inputs that no earlier block changed.
    """

    stats: frozenset[str] = frozenset()
    teacher: bool = False
    inputs: bool = False
    reference: bool = False
    states: bool = False

    @property
    def captured(self) -> frozenset[str]:
        """The statistics that are gathered from the inputs of layers as the stage goes on."""
        return self.stats - {"fisher"}


class Pass(BaseModel):
    """Configuration and behaviour of one compression step; see its kinds below."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    taxon: ClassVar[Taxon]
    paper: ClassVar[str]
    needs: ClassVar[Needs] = Needs()
    efforts: ClassVar[dict[str, dict[str, Any]]] = {}
    """Settings for "fast" and "best", where they differ from the defaults: what ``--effort`` stands for."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_among_choices(cls, value: object, info: ValidationInfo) -> object:
        """A command line writes 64 as text, which a choice of numbers would not know again."""
        choices = get_args(cls.model_fields[str(info.field_name)].annotation)
        return next((choice for choice in choices if isinstance(value, str) and str(choice) == value), value)

    @classmethod
    def method(cls) -> str:
        """The method's name: that of the file that defines it, which is also its key in recipes."""
        return cls.__module__.rpartition(".")[2]

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain JSON values."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def contents(self) -> str:
        """A digest of what else decides the result: the contents of files that the settings name; "": of none."""
        return ""

    def label(self) -> str:
        """The pass as the command line writes it, ``name:key=value,key=value``."""
        pairs = ",".join(f"{key}={format_value(value)}" for key, value in self.settings().items())
        return f"{self.method()}:{pairs}" if pairs else self.method()


def format_value(value: object) -> str:
    """Write a field as the command line reads it: lists joined by ``+``, truth values in lower case."""
    if isinstance(value, list | tuple):
        return "+".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


Patterns = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value.split("+")) if isinstance(value, str) else value)]
"""Shell patterns over the names of linear layers, in text joined by ``+``."""


class StreamPass(Pass):
    """A pass that the block loop applies: to one linear layer at a time, or to a block as a whole.

    targets, skip: shell patterns over full module names (``model.layers.0.mlp.up_proj``) or their last parts (``up_proj``);
    a layer is compressed when a target matches and no skip does.
    """

    targets: Patterns = ("*",)
    skip: Patterns = ("lm_head",)

    @property
    def surveys(self) -> Needs | None:
        """What :meth:`survey` needs, of a pass that sees every matching layer before the stage begins, so that
        :meth:`allocate` can say what is done to each; None of all others. Such a pass begins a stage of its own."""
        return None

    @property
    def sequential(self) -> bool:
        """Whether statistics are re-measured after each input group of a block (q/k/v, then o, ...)."""
        return False

    @property
    def undisturbed(self) -> bool:
        """Whether statistics are to be of the inputs that layers had when the stage began, and not of those that the blocks
        compressed so far have left. So they are in a stage whose passes all say so, which runs every block once instead of twice.
        """
        return False

    def matches(self, name: str) -> bool:
        """Whether this pass compresses the linear layer of that full name."""
        return matches_any(name, self.targets) and not matches_any(name, self.skip)

    def outline(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        """What a matrix will become, with meta tensors of the right shapes and dtypes: `plan` sizes it unseen.

        The default is for passes that only change values.
        """
        values = Dense(weight.to("meta"))
        return values if mask is None else Masked(values, mask.to("meta"))

    def check_budget(self, weights: Sequence[Weight]) -> None:
        """Raise ValueError where a budget cannot be met, given the layers that :meth:`survey` will see, of meta tensors."""

    def learning_tokens(self, samples: int, length: int) -> int:
        """Tokens of each block that gradients are taken on, with that much calibration: what `plan` reckons time by."""
        return 0

    def survey(self, weight: Weight, stats: LinearStats, effect: Callable[[Weight], float]) -> Any:
        """One layer's measurement for :meth:`allocate`, of plain JSON values, before anything is compressed.

        stats: as for ``linear``, of what ``surveys`` names. effect: how much the output of the layer's block would change
        with another weight in the layer's place: |dy|^2 / |y|^2 over some of the calibration tokens.
        """
        raise NotImplementedError(type(self).__name__)

    def allocate(self, found: dict[str, Any], groups: Sequence[tuple[str, ...]]) -> dict[str, LinearPass]:
        """The pass to apply to each layer, from what :meth:`survey` found, by full name.

        groups: the names of layers that share an input, and that fused runtimes need to share a scheme.
        """
        raise NotImplementedError(type(self).__name__)


class LinearPass(StreamPass):
    """A pass that rewrites one linear layer at a time."""

    factorises: ClassVar[bool] = False
    """True: the pass is given the whole matrix and returns factors, giving up an earlier mask or grid.
    False: the pass is applied to each factor of a low-rank layer, and keeps masks and ranks."""

    def linear(self, weight: Tensor, stats: LinearStats, mask: Tensor | None) -> Weight:
        """Compress one matrix.

        weight: (out, in) in its storage dtype, floating point; compute in float32 or more, return in this dtype.
        stats: sums over the calibration tokens of this layer's inputs; only what ``needs`` names may be read.
        mask: (out, in) bool or None; False marks a weight that an earlier pass removed: it is zero and must stay zero.
        """
        raise NotImplementedError(type(self).__name__)


class CorrectionPass(LinearPass):
    """A pass that adds to what earlier passes of the same stage made of a layer, to bring it closer to what it was.

    It must follow, in one stage, a pass that compresses the layers which it corrects.
    """

    moves_masks: ClassVar[bool] = False
    """True: which weights are removed may change, but for those that were when the stage began: they are zero in
    ``original``."""

    def correct(self, original: Tensor, weight: Weight, stats: LinearStats) -> Weight:
        """The corrected layer. original: (out, in), as it was when the stage began; weight: what it has become."""
        raise NotImplementedError(type(self).__name__)


class StoragePass(LinearPass):
    """A pass that changes how matrices are stored, and no value of them."""

    def store(self, weight: Weight) -> Weight:
        """The same matrix in another representation, or the weight itself. It may have meta tensors."""
        raise NotImplementedError(type(self).__name__)


class BlockPass(StreamPass):
    """A pass that rewrites a decoder block as a whole: moves scales between its layers, or tunes them together."""

    regrids: ClassVar[bool] = False
    """True: every selected matrix gets a new grid, so that earlier grids which no plain module holds are opened first."""

    def block(self, block: Block) -> None:
        """Rewrite the block in place, through the methods of :class:`compress.block.Block`."""
        raise NotImplementedError(type(self).__name__)


class ModelPass(Pass):
    """A pass that rewrites the model as a whole, embeddings and configuration included; a stage of its own."""

    def outline(self, weight: Weight) -> Weight:
        """What a linear layer, a weight of meta tensors, will become. Raises ValueError where it cannot be handled."""
        return weight

    @property
    def measures(self) -> bool:
        """Whether the pass must look at the model's weights or activations to decide: :meth:`measure` is then called."""
        return False

    def measure(self, walk: Walk) -> Any:
        """What :meth:`surgery` decides by, of plain JSON values, from a walk through the model's blocks."""
        raise NotImplementedError(type(self).__name__)

    def surgery(self, model: Skeleton, found: Any = None) -> Surgery:
        """What to do, from the model's shapes and configuration, and from what :meth:`measure` found.

        A plan asks before anything is measured, with None: any choice of the same sizes will do. Raises BadInput where the
        architecture does not allow it.
        """
        raise NotImplementedError(type(self).__name__)


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a full name, or the last part of it, is like one of the shell patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern) for pattern in patterns)
