"""How the leaves of the taxonomy look: a colour and a short name each, a marker shape for each family.

Colour is never the only sign. The palette stays apart for the common kinds of colour blindness (it extends that of
Okabe and Ito), and shape repeats the family for whoever sees neither colour nor shade.
"""

from __future__ import annotations

from typing import NamedTuple

from compress.passes import Taxon


class Style(NamedTuple):
    """name: short, for legends. color: hexadecimal. marker: matplotlib's letter for the family's shape."""

    name: str
    color: str
    marker: str


STYLES: dict[str, Style] = {
    Taxon.WEIGHT_ONLY.value: Style("weight-only quantization", "#0072B2", "o"),
    Taxon.WEIGHT_ACTIVATION.value: Style("weight-activation quantization", "#56B4E9", "o"),
    Taxon.QAT.value: Style("quantization-aware training", "#1B2A6B", "o"),
    Taxon.STRUCTURED.value: Style("structured pruning", "#D55E00", "s"),
    Taxon.UNSTRUCTURED.value: Style("unstructured pruning", "#E69F00", "s"),
    Taxon.LOW_RANK.value: Style("low-rank approximation", "#009E73", "D"),
    Taxon.WHITE_BOX.value: Style("white-box distillation", "#CC79A7", "^"),
    Taxon.BLACK_BOX.value: Style("black-box distillation", "#7B3F98", "^"),
    Taxon.SHARING.value: Style("parameter sharing", "#8C6D31", "h"),
}
OTHER = Style("other", "#7F7F7F", "X")
BASE = Style("base model", "#222222", "*")


def style_of(taxon: str | None, *, is_base: bool = False) -> Style:
    """The look of a point. An unknown leaf (a third party's) is grey; a chain wears the leaf of its last pass."""
    return BASE if is_base else STYLES.get(taxon or "", OTHER)
