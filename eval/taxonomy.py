"""How the leaves of the taxonomy look: a colour and a short name each, a shape for each family, a core for each leaf of it.

Colour is never the only sign. The palette stays apart for the common kinds of colour blindness (it extends that of
Okabe and Ito); the shape repeats the family, and its core (none, a dot, a plus) the leaf, for whoever sees no colour.
"""

from __future__ import annotations

from typing import NamedTuple

from compress.passes import Taxon


class Style(NamedTuple):
    """name: short, for legends. color, dark: hexadecimal, on white and on a dark page. marker: matplotlib's letter for the
    family's shape. core: matplotlib's letter for the white sign inside it, empty for none."""

    name: str
    color: str
    dark: str
    marker: str
    core: str = ""

    @property
    def key(self) -> str:
        """The name as a word for class names."""
        return self.name.replace(" ", "-")


STYLES: dict[str, Style] = {
    Taxon.WEIGHT_ONLY.value: Style("weight-only quantization", "#0072B2", "#4DA6E0", "o"),
    Taxon.WEIGHT_ACTIVATION.value: Style("weight-activation quantization", "#56B4E9", "#9AD7FA", "o", "."),
    Taxon.QAT.value: Style("quantization-aware training", "#1B2A6B", "#98A6F2", "o", "+"),
    Taxon.STRUCTURED.value: Style("structured pruning", "#D55E00", "#F0894A", "s"),
    Taxon.UNSTRUCTURED.value: Style("unstructured pruning", "#E69F00", "#F4C04E", "s", "."),
    Taxon.LOW_RANK.value: Style("low-rank approximation", "#009E73", "#3CC79B", "D"),
    Taxon.WHITE_BOX.value: Style("white-box distillation", "#CC79A7", "#E6A5CA", "^", "."),
    Taxon.BLACK_BOX.value: Style("black-box distillation", "#7B3F98", "#C690E2", "^"),
    Taxon.SHARING.value: Style("parameter sharing", "#8C6D31", "#CFAE6B", "h"),
}
OTHER = Style("other", "#7F7F7F", "#A6A6A6", "X")
BASE = Style("base model", "#222222", "#E4E6E8", "*")

SHAPES = {
    "o": "M0-6A6 6 0 1 1 0 6A6 6 0 1 1 0-6Z",
    "s": "M-5.2-5.2H5.2V5.2H-5.2Z",
    "D": "M0-7L6.4 0 0 7-6.4 0Z",
    "^": "M0-6.8L6.9 5.2H-6.9Z",
    "h": "M0-6.6L5.7-3.3V3.3L0 6.6-5.7 3.3V-3.3Z",
    "X": "M-6-3L-3-6 0-3 3-6 6-3 3 0 6 3 3 6 0 3-3 6-6 3-3 0Z",
    "*": "M0-8.5L2.1-2.8 8.1-2.6 3.3 1.1 5 6.9 0 3.5-5 6.9-3.3 1.1-8.1-2.6-2.1-2.8Z",
}
"""The markers as SVG paths about (0, 0), 12 to 17 units wide."""
CORES = {
    "": "",
    ".": "M0-2.2A2.2 2.2 0 1 1 0 2.2A2.2 2.2 0 1 1 0-2.2Z",
    "+": "M-.8-3.4H.8V-.8H3.4V.8H.8V3.4H-.8V.8H-3.4V-.8H-.8Z",
}


def style_of(taxon: str | None, *, is_base: bool = False) -> Style:
    """The look of a point. An unknown leaf (a third party's) is grey; a chain wears the leaf of its last pass."""
    return BASE if is_base else STYLES.get(taxon or "", OTHER)
